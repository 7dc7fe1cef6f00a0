"""The promises, by packets: a server on the other side says who called."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.netns import until
from tests.lab.network import LAN_HOST, OUTSIDE, OUTSIDE_V6, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import WhoServer, seen_by, seen_by_udp

NARROW = "-s 172.7.21.0/24 ! -d 172.7.0.0/16 ! -o docker0 -m comment --comment snatd -j MASQUERADE"


def add(node: Node, *words: str, command: str = "iptables") -> None:
    node.host.run(command, "-w", "5", "-t", "nat", *words)


def rules(node: Node, command: str = "iptables") -> list[str]:
    output = node.host.run(command, "-w", "5", "-t", "nat", "-S", "POSTROUTING")
    return [line.removeprefix("-A POSTROUTING ") for line in output.splitlines()[1:]]


def applied(node: Node, folder: Path, **settings: object) -> Snatd:
    """One `snatd apply`, which must end in sync."""
    snatd = Snatd(node.host, folder, **settings)
    done = snatd.command("apply")
    assert done.returncode == 0, done.stdout + done.stderr
    snatd.close()
    return snatd


def promises_hold(lab: Lab, v6: bool = False) -> None:
    node, neighbour = lab.nodes
    assert seen_by(node.container, neighbour.container_address) == node.container_address
    assert seen_by_udp(node.container, neighbour.container_address) == node.container_address
    assert seen_by(node.container, OUTSIDE) == node.address
    assert seen_by_udp(node.container, OUTSIDE) == node.address
    if v6:
        assert seen_by(node.container, neighbour.container_v6) == node.container_v6
        assert seen_by(node.container, OUTSIDE_V6) == node.address_v6


@pytest.fixture
def node(lab: Lab) -> Node:
    lab.nodes[0].write_lease()
    return lab.nodes[0]


def test_dockers_rule_hides_the_container_and_the_narrowed_one_does_not(
    lab: Lab, node: Node, tmp_path: Path
) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert seen_by(node.container, lab.nodes[1].container_address) == node.address
    applied(node, tmp_path)
    assert rules(node) == [NARROW]
    promises_hold(lab)


def test_both_families(lab: Lab, node: Node, tmp_path: Path) -> None:
    node.write_lease(v6=True)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    v6_rule = ("-s", node.subnet_v6, "!", "-o", "docker0", "-j", "MASQUERADE")
    add(node, "-A", "POSTROUTING", *v6_rule, command="ip6tables")
    assert seen_by(node.container, lab.nodes[1].container_v6) == node.address_v6
    applied(node, tmp_path)
    assert rules(node, "ip6tables") == [
        "-s fd00:7:21::/64 ! -d fd00:7::/32 ! -o docker0 -m comment --comment snatd -j MASQUERADE"
    ]
    promises_hold(lab, v6=True)


def test_egress_is_added_where_there_is_none(lab: Lab, node: Node, tmp_path: Path) -> None:
    node.write_lease(v6=True)
    assert seen_by(node.container, OUTSIDE, timeout_s=0.5) is None
    applied(node, tmp_path)
    promises_hold(lab, v6=True)


def test_egress_keep_adds_nothing(node: Node, tmp_path: Path) -> None:
    applied(node, tmp_path, egress="keep")
    assert rules(node) == []


def test_an_operators_earlier_snat_keeps_its_say(node: Node, tmp_path: Path) -> None:
    node.host.run("ip", "addr", "add", "10.4.7.99/24", "dev", "eth0")
    one = ("-s", f"{node.container_address}/32", "-o", "eth0")
    add(node, "-A", "POSTROUTING", *one, "-d", OUTSIDE, "-j", "SNAT", "--to-source", "10.4.7.99")
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    applied(node, tmp_path)
    assert seen_by(node.container, OUTSIDE) == "10.4.7.99"
    assert seen_by(node.container, LAN_HOST) == node.address


def test_an_operators_earlier_return_keeps_its_say(lab: Lab, node: Node, tmp_path: Path) -> None:
    # The site can answer a container: it knows the way back.
    lab.outside.run("ip", "route", "add", node.subnet, "via", node.address)
    site = ("-s", f"{node.container_address}/32", "-d", f"{OUTSIDE}/32", "-j", "RETURN")
    add(node, "-A", "POSTROUTING", *site)
    applied(node, tmp_path)
    assert rules(node)[0] == f"-s {node.container_address}/32 -d {OUTSIDE}/32 -j RETURN"
    assert seen_by(node.container, OUTSIDE) == node.container_address
    assert seen_by(node.container, LAN_HOST) == node.address


def test_snat_to_a_host_address_keeps_its_target(lab: Lab, node: Node, tmp_path: Path) -> None:
    node.host.run("ip", "addr", "add", "10.4.7.99/24", "dev", "eth0")
    options = ("--to-source", "10.4.7.99", "--random-fully", "--persistent")
    add(node, "-A", "POSTROUTING", *node.broad_rule[:-1], "SNAT", *options)
    applied(node, tmp_path)
    assert rules(node) == [NARROW.replace("MASQUERADE", f"SNAT {' '.join(options)}")]
    assert seen_by(node.container, OUTSIDE) == "10.4.7.99"
    assert seen_by(node.container, lab.nodes[1].container_address) == node.container_address


def test_fault_14_both_backends_at_once(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    for command in ("iptables-nft", "iptables-legacy"):
        add(node, "-A", "POSTROUTING", *node.broad_rule, command=command)
    applied(node, tmp_path)
    assert rules(node, "iptables-nft") == rules(node, "iptables-legacy") == [NARROW]
    promises_hold(nft_lab)


def test_the_nodes_lan_stays_reachable_inside_a_wide_network(backend: str, tmp_path: Path) -> None:
    with Lab(backend, pods="10.7") as lab:
        node, neighbour = lab.nodes
        node.write_lease("10.0.0.0/8")
        add(node, "-A", "POSTROUTING", *node.broad_rule)
        snatd = applied(node, tmp_path)
        assert seen_by(node.container, neighbour.container_address) == node.container_address
        # The host on the LAN has no route back to containers: unmasqueraded, this times out.
        assert seen_by(node.container, LAN_HOST) == node.address
        assert seen_by(node.container, OUTSIDE) == node.address
        (family,) = snatd.json("check")["families"]
        assert family["cut_outs"] == [
            {"network": "10.4.7.0/24", "why": "directly connected on eth0"}
        ]


def test_the_nodes_own_addresses_are_cut_out(backend: str, tmp_path: Path) -> None:
    with Lab(backend, pods="10.7") as lab:
        node, neighbour = lab.nodes
        node.write_lease("10.0.0.0/8")
        node.host.run("ip", "addr", "add", "10.200.0.1/32", "dev", "lo")
        snatd = applied(node, tmp_path)
        (family,) = snatd.json("check")["families"]
        assert {"network": "10.200.0.1/32", "why": "this node's own address on lo"} in family[
            "cut_outs"
        ]
        assert seen_by(node.container, neighbour.container_address) == node.container_address
        server = WhoServer(node.host)
        assert seen_by(node.container, "10.200.0.1") == node.container_address
        server.close()


def test_exclude_is_masqueraded_inside_the_network(lab: Lab, node: Node, tmp_path: Path) -> None:
    lab.nodes[1].container.run("ip", "addr", "add", "172.7.200.1/32", "dev", "lo")
    node.host.run("ip", "route", "add", "172.7.200.0/24", "via", lab.nodes[1].address)
    lab.nodes[1].host.run("ip", "route", "add", "172.7.200.0/24", "via", "172.7.22.2")
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    applied(node, tmp_path, exclude=["172.7.200.0/24"])
    assert seen_by(node.container, "172.7.200.1") == node.address
    promises_hold(lab)


def test_several_networks_make_a_chain_and_one_again(lab: Lab, node: Node, tmp_path: Path) -> None:
    lab.outside.run("ip", "route", "add", node.subnet, "via", node.address)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    applied(node, tmp_path, networks=["203.0.113.0/24"])
    listing = node.host.run("iptables", "-w", "5", "-t", "nat", "-S")
    assert [line for line in listing.splitlines() if "SNATD" in line] == [
        "-N SNATD-POSTROUTING",
        "-A POSTROUTING -s 172.7.21.0/24 ! -o docker0 -m comment --comment snatd"
        " -j SNATD-POSTROUTING",
        "-A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN",
        "-A SNATD-POSTROUTING -d 203.0.113.0/24 -j RETURN",
        "-A SNATD-POSTROUTING -j MASQUERADE",
    ]
    assert seen_by(node.container, OUTSIDE) == node.container_address
    assert seen_by(node.container, LAN_HOST) == node.address
    applied(node, tmp_path / "one")
    assert rules(node) == [NARROW]
    assert "SNATD-" not in node.host.run("iptables", "-w", "5", "-t", "nat", "-S")
    promises_hold(lab)


def test_counters_and_foreign_rules_stay(node: Node, tmp_path: Path) -> None:
    foreign = [
        "-A POSTROUTING -s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
        '-A POSTROUTING -o docker0 -m addrtype --src-type LOCAL -m comment --comment "it\'s" '
        "-j MASQUERADE",
        "-A POSTROUTING -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN",
    ]
    table = "\n".join(
        [
            "*nat",
            f"[3:180] {foreign[0]}",
            f"[7:420] -A POSTROUTING {' '.join(node.broad_rule)}",
            f"[5:300] {foreign[1]}",
            f"-A POSTROUTING {' '.join(node.broad_rule)}",
            f"[9:540] {foreign[2]}",
            "COMMIT\n",
        ]
    )
    node.host.run("iptables-restore", "--counters", stdin=table)
    applied(node, tmp_path)
    saved = node.host.run("iptables-save", "-c", "-t", "nat").replace("\\'", "'").splitlines()
    assert [line for line in saved if "-A POSTROUTING" in line] == [
        f"[3:180] {foreign[0]}",
        f"[7:420] -A POSTROUTING {NARROW}",
        f"[5:300] {foreign[1]}",
        f"[9:540] {foreign[2]}",
    ]


def test_flannels_own_masquerade_is_enough_egress(lab: Lab, node: Node, tmp_path: Path) -> None:
    node.write_lease(ipmasq=True)
    flannel = [
        "-s 172.7.0.0/16 -d 172.7.0.0/16 -j RETURN",
        "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
    ]
    for rule in flannel:
        add(node, "-A", "POSTROUTING", *rule.split(" "))
    applied(node, tmp_path)
    assert rules(node) == flannel
    promises_hold(lab)


def test_until_waits_for_a_condition() -> None:
    with pytest.raises(AssertionError, match="not within"):
        until(lambda: False, "never", within_s=0.01)
