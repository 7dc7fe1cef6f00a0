"""Row 28: a journal and a notify socket that are gone, full, or come back."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGHUP, SIGUSR1

from tests.faults.conftest import Start
from tests.faults.test_rules import settled
from tests.faults.watching import longest_silence_s
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd


@contextmanager
def journald(node: Node) -> Iterator[socket.socket]:
    """A socket where journald's is. Nobody reads it but the test."""
    folder = node.host.path("/run/systemd/journal")
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(f"{folder}/socket")
        journal.settimeout(10)
        yield journal
        (folder / "socket").unlink(missing_ok=True)


def summaries(snatd: Snatd, number: int) -> None:
    """Has it log, each time one line more."""
    for _ in range(number):
        before = snatd.status()["written_at"]
        # Which is in milliseconds: one that follows within the same would look like this one.
        time.sleep(0.002)
        snatd.signal(SIGUSR1)
        until(lambda: snatd.status()["written_at"] != before, "a summary")  # noqa: B023


def dropped(snatd: Snatd) -> int:
    return int(snatd.status()["dropped_log_lines"])


def test_fault_28_a_stopped_journal_does_not_block(nft_lab: Lab, node: Node, start: Start) -> None:
    """What does not fit is dropped and counted; when somebody reads again nothing more is."""
    with journald(node) as journal:
        snatd = start(node, {"WATCHDOG_USEC": "4000000"}, log_format="journal")
        settled(snatd)
        while dropped(snatd) < 5:
            summaries(snatd, 1)
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: rules(node) == [NARROW], "the repair goes on")
        assert longest_silence_s(snatd, 2) < 2
        before = dropped(snatd)
        while select.select([journal], [], [], 0)[0]:
            journal.recv(65536)
        summaries(snatd, 1)
        assert f"dropped_log_lines={before}" in journal.recv(65536).decode()
        assert dropped(snatd) == before
    promises_hold(nft_lab)


def test_fault_28_the_journal_goes_and_comes_back(nft_lab: Lab, node: Node, start: Start) -> None:
    """Its socket is removed, nobody listens on it, another one is there: each line goes somewhere,
    and to the journal as soon as there is one."""
    with journald(node):
        snatd = start(node, log_format="journal")
        settled(snatd)
    for what in ("removed", "nobody listens"):
        if what == "nobody listens":
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as dead:
                dead.bind(str(node.host.path("/run/systemd/journal/socket")))
        lines = snatd.log_path.read_text().count("<6>summary: ")
        summaries(snatd, 1)
        until(lambda: snatd.log_path.read_text().count("<6>summary: ") == lines + 1, what)  # noqa: B023
    node.host.run("rm", "/run/systemd/journal/socket")
    with journald(node) as journal:
        summaries(snatd, 1)
        assert b"SNATD_EVENT=summary" in journal.recv(65536)
    assert dropped(snatd) == 0
    promises_hold(nft_lab)


def test_fault_28_stderr_that_nobody_reads(node: Node, tmp_path: Path) -> None:
    """A pipe that is full, then one that is closed."""
    reader, writer = os.pipe()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.log_path = Path(f"/dev/fd/{writer}")
        snatd.start()
        os.close(writer)
        while dropped(snatd) < 5:
            summaries(snatd, 1)
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: rules(node) == [NARROW], "the repair goes on")
        os.close(reader)
        before = dropped(snatd)
        snatd.signal(SIGUSR1)
        until(lambda: dropped(snatd) > before, "another line that is lost")
        assert snatd.stop() == 0


def rebound(snatd: Snatd) -> None:
    """Another socket in the place of systemd's, as after it was started anew."""
    path = snatd.folder / "notify"
    snatd._notify.close()
    snatd._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    snatd._notify.bind(str(path))


def test_fault_28_a_full_notify_socket(node: Node, start: Start) -> None:
    """Nothing blocks, and what was true all the time is said when somebody reads again."""
    snatd = start(node, {"WATCHDOG_USEC": "2000000"}, resync=1)
    settled(snatd)
    # A stopped systemd: nobody reads, until not one more message fits in.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        other.connect(str(snatd.folder / "notify"))
        with suppress(BlockingIOError):
            while other.send(b"X_FULL=1"):
                pass
    node.host.run("ip", "addr", "del", "172.7.21.1/24", "dev", "docker0")
    until(lambda: snatd.status()["state"] == "waiting", "something to say")
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    snatd.write_config(resync=1, guard="on")
    snatd.signal(SIGHUP)
    snatd.wait_for("configuration_loaded")
    passes = snatd.status()["passes"]
    until(lambda: snatd.status()["passes"] > passes + 1, "passes go on")
    snatd.wait_for_notification("WATCHDOG=1", within_s=2)
    snatd.notifications.clear()
    snatd.wait_for_notification("no device carries 172.7.21.1/24")
    snatd.wait_for_notification("READY=1")
    assert longest_silence_s(snatd, 1) < 1


def test_fault_28_another_notify_socket(node: Node, start: Start) -> None:
    snatd = start(node, {"WATCHDOG_USEC": "2000000"}, resync=1)
    settled(snatd)
    (snatd.folder / "notify").unlink()
    node.host.run("ip", "addr", "del", "172.7.21.1/24", "dev", "docker0")
    until(lambda: snatd.status()["state"] == "waiting", "something to say")
    rebound(snatd)
    snatd.notifications.clear()
    snatd.wait_for_notification("WATCHDOG=1", within_s=2)
    snatd.wait_for_notification("no device carries 172.7.21.1/24")
    assert longest_silence_s(snatd, 1) < 1
