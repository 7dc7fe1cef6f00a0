"""Never stuck: whatever hangs, the watchdog is fed, STATUS tells the truth, it ends by itself."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.faults.conftest import Measured, Start
from tests.faults.test_journal import journald, summaries
from tests.faults.test_lock import legacy_rules, without_lock
from tests.faults.test_rules import settled, write
from tests.faults.test_tools import Shims
from tests.faults.watching import children, commands_in, longest_silence_s, most_children
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

HANGS = "exec sleep 600"
WATCHDOG_S = 6


@pytest.mark.long
def test_everything_hangs_at_once(
    nft_lab: Lab, node: Node, start: Start, tmp_path: Path, measured: Measured
) -> None:
    """Both tools of each backend, the list of connections, the lock, the journal, systemd."""
    shims = Shims(node, tmp_path / "shims")
    write(node, "-s 192.0.2.1/32 -j RETURN", command="iptables-legacy")
    tools = ("nft", "iptables-nft", "iptables-nft-restore", "iptables-legacy", "conntrack")
    with ExitStack() as stack:
        stack.enter_context(journald(node))
        environment = {"WATCHDOG_USEC": str(WATCHDOG_S * 1_000_000)}
        snatd = start(node, environment, log_format="journal", resync=1)
        settled(snatd)
        while snatd.status()["dropped_log_lines"] == 0:
            summaries(snatd, 1)
        without_lock(node, "-I", "POSTROUTING", *node.broad_rule)
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        for tool in tools:
            shims.put(tool, HANGS)
        lock = stack.enter_context(node.host.path("/run/xtables.lock").open("a"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        most = stack.enter_context(most_children(snatd))
        until(lambda: snatd.status()["state"] == "degraded", "it told", 30)
        assert "did not answer within" in snatd.status()["headline"]
        snatd.wait_for_notification("STATUS=degraded since ", within_s=10)
        silence_s = longest_silence_s(snatd, 10)
        promises_hold(nft_lab)
        fill(snatd)
        passes = snatd.status()["passes"]
        until(lambda: snatd.status()["passes"] > passes, "a pass that nobody is told of", 40)
        for tool in tools:
            shims.remove(tool)
    measured(f"fed after {silence_s:.1f} s of {WATCHDOG_S} at most, {most[-1]} child at a time")
    assert silence_s < WATCHDOG_S * 0.75
    assert most[-1] <= 2
    until(lambda: snatd.status()["in_sync"], "the recovery", 60)
    assert rules(node) == [NARROW]
    assert legacy_rules(node)[0] == NARROW
    snatd.notifications.clear()
    snatd.wait_for_notification("STATUS=in sync since ", within_s=5)
    assert longest_silence_s(snatd, 3) < 3
    assert snatd.process.poll() is None
    until(lambda: not commands_in(node.host), "no child left")
    promises_hold(nft_lab)


def fill(snatd: Snatd) -> None:
    """Not one more message fits into systemd's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        other.connect(str(snatd.folder / "notify"))
        with suppress(BlockingIOError):
            while other.send(b"X_FULL=1"):
                pass


# A tool whose end nobody gets to know: who traces it is told first, and does not ask. To its
# parent that is what a process is that hangs in the kernel: killed, and still there.
UNDYING = """#!{python} -IS
import ctypes, os, signal, sys
ptrace = ctypes.CDLL(None).ptrace
tool = os.getpid()
if os.fork() == 0:
    os.setsid()
    ptrace(0x4206, tool, None, None)  # PTRACE_SEIZE
    open({pids!r}, "a").write(f"{{os.getpid()}}\\n")
    signal.pause()
signal.pause()
"""


@pytest.mark.long
def test_tools_that_cannot_even_be_killed(
    nft_lab: Lab, node: Node, start: Start, tmp_path: Path, measured: Measured
) -> None:
    """A pass does not wait for their end, and there are not ever more of them."""
    shims, pids = Shims(node, tmp_path / "shims"), tmp_path / "pids"
    pids.touch()
    snatd = start(node, {"WATCHDOG_USEC": f"{WATCHDOG_S}000000"}, resync=1)
    settled(snatd)
    shims.put("iptables-nft", "")
    (shims.folder / "iptables-nft").write_text(
        UNDYING.format(python="/usr/bin/python3", pids=str(pids))
    )
    try:
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: "were killed and do not end" in snatd.status()["headline"], "it told", 60)
        silence_s = longest_silence_s(snatd, 5)
        assert silence_s < WATCHDOG_S * 0.75
        many = len(children(snatd.pid))
        assert many == 4
        promises_hold(nft_lab)
    finally:
        shims.remove("iptables-nft")
        for pid in map(int, pids.read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    measured(
        f"fed after {silence_s:.1f} s of {WATCHDOG_S} at most, {many} children that do not end"
    )
    until(lambda: snatd.status()["in_sync"] and rules(node) == [NARROW], "the recovery", 60)
    assert children(snatd.pid) == []
    promises_hold(nft_lab)
