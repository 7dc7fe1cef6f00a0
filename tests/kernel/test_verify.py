"""`snatd verify` against what the neighbour itself saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.test_flows import entries
from tests.kernel.test_packets import add, applied
from tests.lab.netns import Namespace
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import Discard

UNUSED, UNUSED_V6 = "172.7.21.254", "fd00:7:21:0:ffff:ffff:ffff:fffe"
FIRST, FIRST_V6 = "172.7.22.1", "fd00:7:22::1"


@pytest.fixture
def node(lab: Lab) -> Node:
    lab.nodes[0].write_lease()
    return lab.nodes[0]


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        yield snatd


def verified(snatd: Snatd, *words: str, exit_code: int) -> list[dict[str, Any]]:
    done = snatd.command("verify", "--json", *words)
    assert done.returncode == exit_code, done.stdout + done.stderr
    probes: list[dict[str, Any]] = json.loads(done.stdout)["probes"]
    return probes


def test_broad_then_narrowed(lab: Lab, node: Node, snatd: Snatd, tmp_path: Path) -> None:
    discard = Discard(lab.nodes[1].host, FIRST)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    (one,) = verified(snatd, exit_code=1)
    assert one == {
        "dst": FIRST,
        "sent_from": UNUSED,
        "seen_as": node.address,
        "kept": False,
        "inside": True,
        "why": one["why"],
    }
    # What `explain` says of the datagram.
    assert one["why"].startswith(f"{FIRST} sees {node.address} (as Docker writes it, ")
    assert discard.sender() == node.address
    applied(node, tmp_path)
    (one,) = verified(snatd, exit_code=0)
    assert (one["sent_from"], one["seen_as"], one["kept"]) == (UNUSED, UNUSED, True)
    assert discard.sender() == UNUSED
    assert entries(node.host) == set(), "a probe leaves nothing"
    assert discard.count() == 0, "one datagram a command"


def test_what_it_says(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    applied(node, tmp_path, guard="off")
    done = snatd.command("verify")
    assert done.stdout.splitlines()[:2] == [
        f"{FIRST}  sent from {UNUSED}, seen as {UNUSED}: kept",
        "proved: a UDP datagram of this node with an address of the container subnet as its source "
        f"keeps it on its way to {FIRST}",
    ]
    assert "not proved: the same of a container's own packets" in done.stdout
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    said = snatd.command("verify").stdout
    assert f"sent from {UNUSED}, seen as {node.address}: SNATed" in said
    assert "is SNATed on its way" in said


def test_both_families(lab: Lab, node: Node, snatd: Snatd, tmp_path: Path) -> None:
    node.write_lease(v6=True)
    discard = Discard(lab.nodes[1].host, FIRST_V6)
    v6_rule = ("-s", node.subnet_v6, "!", "-o", "docker0", "-j", "MASQUERADE")
    add(node, "-A", "POSTROUTING", *v6_rule, command="ip6tables")
    applied(node, tmp_path, guard="off")
    add(node, "-I", "POSTROUTING", *v6_rule, command="ip6tables")
    v4, v6 = verified(snatd, exit_code=1)
    assert (v4["dst"], v4["kept"]) == (FIRST, True)
    assert (v6["dst"], v6["sent_from"], v6["seen_as"]) == (FIRST_V6, UNUSED_V6, node.address_v6)
    assert discard.sender() == node.address_v6
    add(node, "-D", "POSTROUTING", *v6_rule, command="ip6tables")
    assert verified(snatd, exit_code=0)[1]["seen_as"] == UNUSED_V6
    assert discard.sender() == UNUSED_V6


def test_another_address_of_the_subnet_is_not_the_senders(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", "-s", node.subnet, "-j", "SNAT", "--to-source", "172.7.21.1")
    (one,) = verified(snatd, exit_code=1)
    assert (one["seen_as"], one["kept"]) == ("172.7.21.1", False)


def test_no_neighbour(node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "route", "del", "172.7.22.0/24")
    done = snatd.command("verify")
    assert done.returncode == 3
    assert "no neighbour: no route" in done.stderr
    assert done.stdout == "nothing is proved\n"
    assert verified(snatd, exit_code=3) == []


def test_a_firewall_drops_it(lab: Lab, node: Node, snatd: Snatd) -> None:
    discard = Discard(lab.nodes[1].host, FIRST)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    for chain in ("OUTPUT", "POSTROUTING"):
        rule = (chain, "-p", "udp", "--dport", "9", "-j", "DROP")
        node.host.run("iptables", "-w", "5", "-t", "mangle", "-A", *rule)
        (one,) = verified(snatd, exit_code=3)
        assert (one["seen_as"], one["kept"]) == (None, None)
        assert "a firewall rule of this node drops it" in one["why"]
        node.host.run("iptables", "-w", "5", "-t", "mangle", "-D", *rule)
    assert discard.count() == 0


def test_untracked_is_no_answer(lab: Lab, node: Node, snatd: Snatd) -> None:
    discard = Discard(lab.nodes[1].host, FIRST)
    # No nat rule: the kernel does not track connections here at all.
    (one,) = verified(snatd, exit_code=3)
    assert one["kept"] is None
    assert "connection tracking is off" in one["why"]
    assert discard.sender() == UNUSED
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    rule = ("-t", "raw", "-A", "OUTPUT", "-p", "udp", "--dport", "9", "-j", "NOTRACK")
    node.host.run("iptables", "-w", "5", *rule)
    assert verified(snatd, exit_code=3)[0]["kept"] is None
    assert discard.sender() == UNUSED


def test_an_unreachable_neighbour_is_no_obstacle(
    lab: Lab, node: Node, snatd: Snatd, tmp_path: Path
) -> None:
    lab.nodes[1].host.run("ip", "link", "set", "eth0", "down")
    applied(node, tmp_path)
    assert verified(snatd, exit_code=0)[0]["kept"] is True


def test_one_neighbour_for_each_next_hop(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    # flannel's vxlan: each lease by the remote flannel.1, on link. And host-gw, twice by one node.
    node.host.shell(
        "ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 nolearning; "
        "ip addr add 172.7.21.0/32 dev flannel.1; "
        "ip link set flannel.1 up; "
        "ip route add 172.7.31.0/24 via 172.7.31.0 dev flannel.1 onlink; "
        "ip route add 172.7.32.0/24 via 172.7.32.0 dev flannel.1 onlink; "
        "ip route add 172.7.23.0/24 via 10.4.7.22; ip route add 172.8.0.0/16 via 10.4.7.23; "
        "ip route add blackhole 172.7.40.0/24"
    )
    applied(node, tmp_path)
    probes = verified(snatd, exit_code=0)
    assert [one["dst"] for one in probes] == [FIRST, "172.7.31.1", "172.7.32.1"]
    assert {one["seen_as"] for one in probes} == {UNUSED}


def test_one_route_for_all(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    node.host.shell(
        "ip route del 172.7.22.0/24; ip link add flannel-wg type veth; "
        "ip link set flannel-wg up; ip route add 172.7.0.0/16 dev flannel-wg"
    )
    applied(node, tmp_path)
    assert [one["dst"] for one in verified(snatd, exit_code=0)] == ["172.7.0.1"]


def test_destinations_of_ones_own(lab: Lab, node: Node, snatd: Snatd, tmp_path: Path) -> None:
    applied(node, tmp_path)
    pod = lab.nodes[1].container_address
    discard = Discard(lab.nodes[1].container, pod)
    (one,) = verified(snatd, pod, exit_code=0)
    assert (one["dst"], one["kept"]) == (pod, True)
    assert discard.sender() == UNUSED
    (one,) = verified(snatd, OUTSIDE, exit_code=3)
    assert (one["inside"], one["kept"], one["seen_as"]) == (False, False, node.address)
    said = snatd.command("verify", OUTSIDE).stdout
    assert "not among the networks where that is promised" in said
    assert "nothing is proved" in said
    assert len(verified(snatd, pod, OUTSIDE, exit_code=0)) == 2
    (one,) = verified(snatd, "fd00:7:22::1", exit_code=3)
    assert one["why"] == "nothing is leased in its family"
    for wrong in ("172.7.22", "224.0.0.1", "::", "container"):
        assert snatd.command("verify", wrong).returncode == 2


def test_the_unused_address(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    applied(node, tmp_path)
    node.host.shell(
        "ip addr add 172.7.21.254/32 dev lo; "
        "ip neigh add 172.7.21.253 lladdr 02:00:00:00:00:01 dev docker0; "
        "ip route add 172.7.21.252/32 dev docker0"
    )
    # The neighbour's answer makes this node look for the sender, in vain: it stays unused.
    for _ in range(3):
        assert verified(snatd, exit_code=0)[0]["sent_from"] == "172.7.21.251"


def test_from_the_bridges_address_where_there_is_no_other(
    lab: Lab, node: Node, tmp_path: Path
) -> None:
    node.write_lease(subnet="172.7.21.1/30")
    node.host.shell(
        "ip addr del 172.7.21.1/24 dev docker0; ip addr add 172.7.21.1/30 dev docker0; "
        "ip neigh add 172.7.21.2 lladdr 02:00:00:00:00:01 dev docker0"
    )
    discard = Discard(lab.nodes[1].host, FIRST)
    snatd = applied(node, tmp_path)
    (one,) = verified(snatd, exit_code=0)
    assert one["sent_from"] == one["seen_as"] == "172.7.21.1"
    assert discard.sender() == "172.7.21.1"


SEND = """
import ipaddress
from snatd.kernel.probe import send
print(send(*map(ipaddress.ip_address, ("172.7.22.1", "172.7.21.254", "172.7.21.1"))))
"""


def test_from_the_bridges_address_where_no_other_is_allowed(lab: Lab, node: Node) -> None:
    discard = Discard(lab.nodes[1].host, FIRST)
    less = "-net_admin,-net_raw"
    drop = ("setpriv", "--bounding-set", less, "--inh-caps", less, "--")
    said = node.host.run(*drop, sys.executable, "-c", SEND)
    assert discard.sender() == "172.7.21.1"
    assert "IPv4Address('172.7.21.1')" in said


def test_without_a_lease(host: Namespace, tmp_path: Path) -> None:
    with Snatd(host, tmp_path) as snatd:
        done = snatd.command("verify")
        assert done.returncode == 3
        assert "subnet.env" in done.stderr
