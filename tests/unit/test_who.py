"""Who answers a call, and not who answered another one too late."""

from __future__ import annotations

import socket
import threading

from tests.lab.netns import Namespace
from tests.lab.who import PORT, census

SLOW, QUICK = "127.0.0.2", "127.0.0.3"


def test_a_late_answer_is_none() -> None:
    host = Namespace()
    try:
        host.shell("ip link set lo up")
        with host.entered():
            servers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        for server, address in zip(servers, (SLOW, QUICK), strict=True):
            server.bind((address, PORT))
            server.settimeout(20)

        def answer() -> None:
            slow, quick = servers
            for _ in range(5):
                _, to_slow = slow.recvfrom(64)
                _, to_quick = quick.recvfrom(64)
                slow.sendto(b"slow", to_slow)
                quick.sendto(b"quick", to_quick)

        thread = threading.Thread(target=answer)
        thread.start()
        seen = census(host, (SLOW, QUICK), lambda done: done < 5, timeout_s=0.1)
        thread.join()
        for server in servers:
            server.close()
    finally:
        host.close()
    assert seen == {(SLOW, None): 5, (QUICK, "quick"): 5}
