"""Rows 17 to 20: flannel's file, what is in it, and the devices that it speaks of."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Measured, Start
from tests.faults.test_rules import settled, write
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.who import seen_by

PLAIN = """FLANNEL_NETWORK=172.7.0.0/16
FLANNEL_SUBNET=172.7.21.1/24
FLANNEL_MTU=1500
FLANNEL_IPMASQ=false
"""


def test_fault_17_the_folder_comes_and_goes_five_times(
    nft_lab: Lab, node: Node, start: Start
) -> None:
    """Also while something else is in its place; the last good state is kept meanwhile."""
    folder = node.host.path("/run/flannel")
    snatd = start(node, resync=3600)
    settled(snatd)
    for turn in range(5):
        shutil.rmtree(folder)
        until(lambda: snatd.status()["state"] == "waiting", "the folder removed")
        (guard,) = snatd.status()["guard"]
        assert (guard["family"], guard["in_place"]) == ("ipv4", True)
        if turn % 2:
            folder.write_text("not a folder")
            until(lambda: "not a directory" in snatd.status()["headline"], "a file there")
            folder.unlink()
        assert rules(node) == [NARROW]
        promises_hold(nft_lab)
        network = f"172.{4 if turn % 2 else 6}.0.0/{14 if turn % 2 else 15}"
        node.write_lease(network)
        moved = NARROW.replace("172.7.0.0/16", network)
        until(lambda: rules(node) == [moved], "heard at once")  # noqa: B023
        node.write_lease()
        until(lambda: rules(node) == [NARROW], "and the file in it")


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode("latin-1"))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.write(PLAIN.encode())
        file.truncate(1 << 30)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def wider(mode: int, owner: int = 0) -> Callable[[Path], None]:
    """A file that says of wider networks, by whoever could write it."""

    def make(path: Path) -> None:
        new = path.with_name("new")
        new.write_text(PLAIN.replace("172.7.0.0/16", "172.0.0.0/8"))
        new.chmod(mode)
        os.chown(new, owner, owner)
        new.rename(path)

    return make


# What is wrong, how it comes about, and what has to be said of it.
REJECTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (text(""), "no FLANNEL_SUBNET"),
    "cut in a line": (text(PLAIN[:40]), "line 2: cut in the middle of a line"),
    "cut between lines": (text(PLAIN[:29]), "FLANNEL_NETWORK without FLANNEL_SUBNET"),
    "garbage": (text("\x7fELF\x01\x02" * 99), "line 1: "),
    "no key": (text(f"{PLAIN}nonsense\n"), "line 5: not KEY=VALUE: 'nonsense'"),
    "a gigabyte": (sparse, "larger than 64 KiB"),
    "a symlink loop": (loop, "Too many levels of symbolic links"),
    "a symlink to nowhere": (lambda path: path.symlink_to("/nowhere"), "no such file"),
    "a symlink to a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a directory": (Path.mkdir, "not a regular file"),
    "NUL bytes": (text(PLAIN.replace("172", "1\x0072")), "line 1: "),
    "not UTF-8": (text(f"{PLAIN}FLANNEL_X=\xff\xfe\n"), "line 5: a byte that is not ASCII"),
    "two subnets": (
        text(f"{PLAIN}FLANNEL_SUBNET=172.7.9.1/24\n"),
        "line 5: FLANNEL_SUBNET differs",
    ),
    "outside": (text(PLAIN.replace("172.7.0.0/16", "10.0.0.0/8")), "lies outside FLANNEL_NETWORK"),
    "/0": (text(PLAIN.replace("172.7.0.0/16", "0.0.0.0/0")), "wider than /8"),
    "/33": (text(PLAIN.replace("21.1/24", "21.1/33")), "line 2: FLANNEL_SUBNET"),
    "v6 in v4": (text(PLAIN.replace("172.7.21.1/24", "fd00::1/64")), "line 2: FLANNEL_SUBNET"),
    "a shell": (text(PLAIN.replace("172.7.21.1/24", "$(touch /run/owned)")), "line 2: "),
    "writable": (wider(0o646), "can be written by others (mode 0646)"),
    "theirs": (wider(0o644, 65534), "belongs to uid 65534"),
    "escapes": (text(f"{PLAIN}\x1b[2J\x1b]0;x\x07\n"), "line 5: not KEY=VALUE: '\\x1b[2J"),
}


def test_fault_18_a_file_that_makes_no_sense(nft_lab: Lab, node: Node, start: Start) -> None:
    """Rejected with file, line and reason, and the rules stay. One daemon for all of them."""
    path = node.host.path("/run/flannel/subnet.env")
    snatd = start(node, {"WATCHDOG_USEC": "4000000"}, resync=3600)
    settled(snatd)
    before = node.host.run("nft", "-s", "list", "ruleset")
    for name, (make, says) in REJECTED.items():
        path.unlink()
        make(path)
        until(lambda: says in snatd.status()["headline"], f"{name}: {says}")  # noqa: B023
        headline = snatd.status()["headline"]
        assert headline.startswith("waiting: /run/flannel/subnet.env: "), name
        assert headline.isprintable(), name
        assert node.host.run("nft", "-s", "list", "ruleset") == before, name
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        node.write_lease()
        until(lambda: snatd.status()["in_sync"], f"after {name}")
    assert not node.host.path("/run/owned").exists()
    assert len(snatd.events("holding")) >= len(REJECTED)
    promises_hold(nft_lab)


@pytest.mark.parametrize("content", [PLAIN.replace("\n", "\r\n"), PLAIN + PLAIN])
def test_fault_18_a_file_whose_meaning_is_certain(
    nft_lab: Lab, node: Node, start: Start, content: str
) -> None:
    """CRLF, and keys twice with one and the same value."""
    node.host.path("/run/flannel/subnet.env").write_text(content)
    snatd = start(node)
    assert snatd.status()["in_sync"]
    assert rules(node) == [NARROW]
    promises_hold(nft_lab)


def test_fault_19_another_lease_on_both_backends(nft_lab: Lab, node: Node, start: Start) -> None:
    """Subnet and network both; the container moves with it. Nothing of the old one stays."""
    commands = ("iptables-nft", "iptables-legacy")
    for command in commands:
        add(node, "-A", "POSTROUTING", *node.broad_rule, command=command)
    snatd = start(node)
    settled(snatd)
    old = " ".join(node.broad_rule).replace("172.7.21.0", "172.9.3.0")
    for command in commands:
        write(node, old, command=command)
        assert rules(node, command)[0] == NARROW
    node.host.run("ip", "addr", "add", "172.9.3.1/24", "dev", "docker0")
    node.container.shell(
        "ip addr add 172.9.3.2/24 dev eth0; ip addr del 172.7.21.2/24 dev eth0;"
        "ip route replace default via 172.9.3.1"
    )
    node.write_lease("172.9.0.0/16", subnet="172.9.3.1/24")
    new = NARROW.replace("172.7.21.0", "172.9.3.0").replace("172.7.0.0", "172.9.0.0")
    for command in commands:
        until(lambda: rules(node, command) == [new], "the new lease's rule alone")  # noqa: B023
    assert "172.7." not in node.host.run("nft", "list", "ruleset")
    # The other node's subnet is not in this network; its answer shows who called.
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.address


def test_fault_20_the_bridge_goes_and_comes_back(nft_lab: Lab, node: Node, start: Start) -> None:
    snatd = start(node, resync=3600)
    settled(snatd)
    for before, name in (("docker0", "docker0"), ("docker0", "docker0"), ("docker0", "cni0")):
        node.host.run("ip", "link", "del", before)
        until(lambda: "no device carries 172.7.21.1/24" in snatd.status()["headline"], "it gone")
        assert len(rules(node)) == 1, "the egress stays"
        node.host.shell(
            f"ip link add {name} type bridge mcast_snooping 0; ip link set {name} up;"
            f"ip addr add 172.7.21.1/24 dev {name}; ip link set veth0 master {name}"
        )
        until(lambda: snatd.status()["in_sync"], "in sync")
        # What ours says of another bridge is as true as before: it stays.
        assert rules(node)[-1] == NARROW.replace("docker0", name)
        promises_hold(nft_lab)
    # Another address, and back.
    node.host.run("ip", "addr", "del", "172.7.21.1/24", "dev", "cni0")
    until(lambda: snatd.status()["state"] == "waiting", "the address gone")
    node.host.run("ip", "addr", "add", "172.7.21.1/24", "dev", "cni0")
    until(lambda: snatd.status()["in_sync"], "in sync")
    promises_hold(nft_lab)


@pytest.mark.long
def test_fault_20_two_hundred_veths_that_come_and_go(
    nft_lab: Lab, node: Node, start: Start, measured: Measured
) -> None:
    """As on a node that starts and ends containers all the time."""
    snatd = start(node)
    settled(snatd)
    before_s, began_s, passes = snatd.cpu_s(), time.monotonic(), snatd.status()["passes"]
    node.host.shell(
        "for round in 1 2 3; do"
        " for n in $(seq 200); do echo link add pod$n type veth peer name peer$n;"
        " echo link set pod$n master docker0 up; done | ip -batch -;"
        " for n in $(seq 200); do echo link del pod$n; done | ip -batch -; done"
    )
    took_s = time.monotonic() - began_s
    share = (snatd.cpu_s() - before_s) / took_s
    passes = snatd.status()["passes"] - passes
    measured(f"{share:.1%} of a core and {passes} passes in {took_s:.0f} s, 600 veths")
    assert share < 0.25
    assert snatd.status()["in_sync"]
    promises_hold(nft_lab)


def test_fault_31_ipv6_switched_off_and_on_again(nft_lab: Lab, node: Node, start: Start) -> None:
    """While it runs: skipped, and said once; back as soon as it is there."""
    node.write_lease(v6=True)
    snatd = start(node, resync=1)
    settled(snatd)
    promises_hold(nft_lab, v6=True)
    for turn in (1, 2):
        node.host.shell("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
        until(lambda: len(snatd.status()["families"]) == 1, "v4 alone")
        passes = snatd.status()["passes"]
        until(lambda: snatd.status()["passes"] > passes + 1, "two resyncs")  # noqa: B023
        assert snatd.status()["in_sync"]
        assert len(snatd.events("ipv6_skipped")) == turn
        promises_hold(nft_lab)
        node.host.shell(
            "echo 0 >/proc/sys/net/ipv6/conf/all/disable_ipv6;"
            "ip addr add fd00:7:21::1/64 dev docker0 nodad;"
            "ip addr add fd00:4:7::21/64 dev eth0 nodad;"
            "ip -6 route add default via fd00:4:7::100;"
            "ip -6 route add fd00:7:22::/64 via fd00:4:7::22"
        )
        until(lambda: len(snatd.status()["families"]) == 2 and snatd.status()["in_sync"], "both")
        promises_hold(nft_lab, v6=True)
