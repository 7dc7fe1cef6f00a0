"""Rows 15 and 16: more events than can be heard, and no events at all."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest

from tests.faults.conftest import Measured, Start, not_here
from tests.faults.test_rules import settled
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import SNATD, Snatd

STORM = "*nat\n:STORM - [0:0]\n{rules}COMMIT\n".format(
    rules="".join(f"-A STORM -d 10.96.{n // 250}.{n % 250}/32 -j RETURN\n" for n in range(5000))
)


def test_fault_15_more_than_the_ear_can_hold(nft_lab: Lab, node: Node, start: Start) -> None:
    """What was lost of the events is found by the look that the overflow is."""
    snatd = start(node, resync=3600)
    settled(snatd)
    snatd.signal(SIGSTOP)
    heard = drops(snatd)
    while drops(snatd) == heard:
        node.host.run("iptables-nft-restore", "--noflush", stdin=STORM)
    # It comes last, when nothing more fits in.
    node.host.run("nft", "delete", "table", "ip", "snatd")
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    assert rules(node)[0] == " ".join(node.broad_rule)
    snatd.signal(SIGCONT)
    until(lambda: rules(node) == [NARROW], "the repair", 20)
    assert node.host.run("nft", "list", "table", "ip", "snatd")
    promises_hold(nft_lab)


def drops(snatd: Snatd) -> int:
    """What the kernel could not give to the daemon's netlink sockets: proc_net_netlink's Drops."""
    lines = snatd.host.run("cat", "/proc/net/netlink").splitlines()
    return sum(int(line.split()[8]) for line in lines[1:])


@pytest.mark.long
@pytest.mark.parametrize("command", ["nft", "legacy"])
def test_fault_15_a_storm_of_restores(
    nft_lab: Lab,
    node: Node,
    start: Start,
    tmp_path: Path,
    measured: Measured,
    command: str,
) -> None:
    """On nft each is an event of 3 MB; on legacy somebody gives the lock back each time."""
    add(node, "-A", "POSTROUTING", *node.broad_rule, command=f"iptables-{command}")
    snatd = start(node)
    settled(snatd)
    storm = tmp_path / "storm"
    storm.write_text(STORM)
    restore = f"iptables-{command}-restore --noflush <{storm}"
    before_s, began_s, passes = snatd.cpu_s(), time.monotonic(), snatd.status()["passes"]
    for _ in range(20):
        node.host.shell(f"for n in $(seq 50); do {restore}; done")
    took_s = time.monotonic() - began_s
    share = (snatd.cpu_s() - before_s) / took_s
    passes = snatd.status()["passes"] - passes
    measured(f"{share:.1%} of a core and {passes} passes in {took_s:.0f} s, 1000 restores")
    assert share < 0.25
    add(node, "-I", "POSTROUTING", *node.broad_rule, command=f"iptables-{command}")
    until(lambda: rules(node, f"iptables-{command}") == [NARROW], "the repair", 5)
    promises_hold(nft_lab)


@pytest.mark.parametrize(
    ("source", "script"),
    [
        ("nft", "nft add table ip snatd; nft add chain ip snatd more"),
        ("link", "ip link add more type veth; ip addr add 172.7.99.1/24 dev more"),
    ],
)
def test_fault_16_a_netlink_socket_dies(
    nft_lab: Lab, node: Node, start: Start, tmp_path: Path, source: str, script: str
) -> None:
    """The next receive fails, whatever for: another socket, which hears again."""
    snatd = start(node, resync=3600)
    settled(snatd)
    quiet(snatd)
    with injected(snatd, "recvfrom:error=ECONNRESET:when=1", tmp_path):
        node.host.shell(script)
        (told,) = snatd.wait_for("ear_reopened")
    assert told["source"] == source
    until(lambda: snatd.status()["in_sync"], "in sync")
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) != [" ".join(node.broad_rule), NARROW], "the repair")
    node.host.run("ip", "addr", "add", "172.7.98.1/24", "dev", "eth0")
    until(lambda: "172.7.98.0/24" in str(snatd.status()["families"]), "the other ear")
    promises_hold(nft_lab)


def quiet(snatd: Snatd) -> None:
    """All looks and proofs that follow a start are over: it asks the kernel for nothing more."""
    seen: tuple[object, ...] = ()
    while seen != (seen := (snatd.status()["written_at"], snatd.cpu_s())):
        time.sleep(1)


class injected:
    """System calls of a daemon fail for a while, by strace."""

    def __init__(self, snatd: Snatd, what: str, folder: Path) -> None:
        self._log = folder / "strace"
        trace = what.partition(":")[0]
        argv = ("strace", "-f", "-qq", "-o", str(self._log), "-e", f"trace={trace}")
        self._argv = (*argv, "-e", f"inject={what}", "-p", str(snatd.pid))
        self._pid = snatd.pid

    def __enter__(self) -> None:
        self._strace = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL)
        until(self._is_traced, "strace")

    def _is_traced(self) -> bool:
        assert self._strace.poll() is None, "strace could not attach"
        status = Path(f"/proc/{self._pid}/status").read_text()
        return f"TracerPid:\t{self._strace.pid}\n" in status

    def __exit__(self, *_: object) -> None:
        self._strace.terminate()
        self._strace.wait(60)


# A user namespace has limits of its own, so that nobody else here runs out of watches.
IN_A_USER_NAMESPACE = """
ip link set lo up
ip link add docker0 type bridge
ip addr add 172.7.21.1/24 dev docker0
echo {limit} >/proc/sys/user/{which}
exec "$@"
"""


@pytest.mark.parametrize("which", ["max_inotify_instances", "max_inotify_watches"])
def test_fault_16_inotify_is_used_up(node: Node, tmp_path: Path, which: str) -> None:
    if not Path(f"/proc/sys/user/{which}").exists():
        not_here(16, f"this kernel has no user.{which}")
    unshare = ("unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-euc")
    script = IN_A_USER_NAMESPACE.format(limit=0, which=which)
    with Snatd(node.host, tmp_path, log_format="json") as snatd:
        snatd.program = (*unshare, script, "sh", SNATD)
        snatd.start()
        (told,) = snatd.wait_for("watch_failed")
        assert "max_user_instances" in told["hint"]
        assert "172.7.21.0/24" in snatd.status()["headline"]
        node.write_lease("172.4.0.0/14")
        until(lambda: "172.4.0.0/14" in snatd.status()["headline"], "the poll", 8)
        limit = f"/proc/sys/user/{which}"
        node.host.run("nsenter", "-t", str(snatd.pid), "-U", "sh", "-c", f"echo 99 >{limit}")
        snatd.wait_for("watch_restored", within_s=8)
        before = snatd.status()["events"].get("subnet_file", 0)
        node.write_lease("172.6.0.0/15")
        until(lambda: "172.6.0.0/15" in snatd.status()["headline"], "it was read", 4)
        # A resync that is due then may read it first.
        until(lambda: snatd.status()["events"].get("subnet_file", 0) > before, "the event", 4)
        assert len(snatd.events("watch_failed")) == 1
