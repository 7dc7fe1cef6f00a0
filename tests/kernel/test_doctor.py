"""`snatd doctor` on nodes that really have the fault, and on those that have none.

Packets are the oracle: what is found really keeps containers from each other, and no longer does
when the commands of the remedy were run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.test_packets import applied
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import seen_by_udp


@pytest.fixture
def node(nft_lab: Lab, tmp_path: Path) -> Node:
    """A healthy node: what snatd keeps is in place."""
    return healthy(nft_lab, tmp_path)


def healthy(lab: Lab, folder: Path, **lease: Any) -> Node:
    node = lab.nodes[0]
    node.write_lease(**lease)
    applied(node, folder)
    return node


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        yield snatd


Found = dict[str, dict[str, Any]]


def found(snatd: Snatd, exit_code: int = 1) -> Found:
    """The findings by name."""
    began_s = time.monotonic()
    done = snatd.command("doctor", "--json")
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert time.monotonic() - began_s < 10
    return {one["name"]: one for one in json.loads(done.stdout)["findings"]}


def only(snatd: Snatd, name: str, severity: str = "error") -> dict[str, Any]:
    """The one finding that there is."""
    all_found = found(snatd, 0 if severity == "info" else 1)
    assert list(all_found) == [name], json.dumps(all_found, indent=1)
    assert all_found[name]["severity"] == severity
    return all_found[name]


def mend(node: Node, one: dict[str, Any]) -> None:
    """Runs the commands of a remedy, each as a shell takes it."""
    commands = [line for line in one["remedy"] if not line.startswith("#")]
    assert commands, one
    for command in commands:
        node.host.shell(command)


def calls(lab: Lab, v6: bool = False) -> tuple[bool, bool]:
    """Whether a container reaches the other node's, and is reached by it."""
    node, other = lab.nodes
    here, there = node.container_address, other.container_address
    if v6:
        here, there = node.container_v6, other.container_v6
    return (
        seen_by_udp(node.container, there, 0.4) == here,
        seen_by_udp(other.container, here, 0.4) == there,
    )


BOTH, NEITHER = (True, True), (False, False)


def mended(lab: Lab, v6: bool = False) -> bool:
    """Whether both reach each other; who was looked for in vain is looked for again after 1 s."""
    return bool(until(lambda: calls(lab, v6) == BOTH, "containers reach each other"))


def test_a_healthy_node(nft_lab: Lab, snatd: Snatd) -> None:
    assert calls(nft_lab) == BOTH
    done = snatd.command("doctor")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing found\n", "")
    assert snatd.json("doctor") == {"schema": 1, "findings": []}


@pytest.mark.parametrize("all_rules", [False, True])
def test_a_healthy_node_of_either_backend_with_both_families(
    lab: Lab, tmp_path: Path, all_rules: bool
) -> None:
    node = healthy(lab, tmp_path, v6=True)
    if all_rules:
        dockers_rules(node, accept=True)
        dockers_rules(node, accept=True, v6=True)
    assert calls(lab) == calls(lab, v6=True) == BOTH
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        assert found(snatd, 0) == {}


def dockers_rules(node: Node, *, accept: bool, v6: bool = False, policy: str = "DROP") -> None:
    """What Docker 20 to 27 makes of FORWARD when it switched forwarding on by itself."""
    subnet, network = node.subnet, "172.7.0.0/16"
    container, command = f"{node.container_address}/32", "iptables"
    if v6:
        subnet, network = node.subnet_v6, "fd00:7::/32"
        container, command = f"{node.container_v6}/128", "ip6tables"
    chains = ("DOCKER", "DOCKER-USER", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2")
    rules = [
        "FORWARD -j DOCKER-USER",
        "FORWARD -j DOCKER-ISOLATION-STAGE-1",
        "FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "FORWARD -o docker0 -j DOCKER",
        "FORWARD -i docker0 ! -o docker0 -j ACCEPT",
        "FORWARD -i docker0 -o docker0 -j ACCEPT",
        f"DOCKER -d {container} ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT",
        "DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2",
        "DOCKER-ISOLATION-STAGE-1 -j RETURN",
        "DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP",
        "DOCKER-ISOLATION-STAGE-2 -j RETURN",
        "DOCKER-USER -j RETURN",
    ]
    if accept:
        rules.insert(0, f"DOCKER-USER -s {network} -d {subnet} -j ACCEPT")
    lines = ["*filter", f":FORWARD {policy}", *(f":{one} -" for one in chains)]
    script = "\n".join([*lines, *(f"-A {one}" for one in rules), "COMMIT", ""])
    node.host.run(f"{command}-restore", "--noflush", stdin=script)


def test_forwarding_off(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell("echo 0 > /proc/sys/net/ipv4/ip_forward")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "forwarding_off")
    assert one["evidence"] == ["net.ipv4.ip_forward = 0"]
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}
    assert node.host.run("cat", "/etc/sysctl.d/90-containers.conf") == "net.ipv4.ip_forward = 1\n"


def test_forwarding_off_for_ipv6(nft_lab: Lab, tmp_path: Path) -> None:
    node = healthy(nft_lab, tmp_path, v6=True)
    node.host.shell("echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
    assert (calls(nft_lab), calls(nft_lab, v6=True)) == (BOTH, NEITHER)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "forwarding_off")
        assert one["evidence"] == ["net.ipv6.conf.all.forwarding = 0"]
        # Linux 6.17 has a way for single devices.
        for device in ("eth0", "docker0"):
            node.host.shell(f"echo 1 > /proc/sys/net/ipv6/conf/{device}/force_forwarding")
        assert calls(nft_lab, v6=True) == BOTH
        assert found(snatd, 0) == {}
        node.host.shell("echo 0 > /proc/sys/net/ipv6/conf/eth0/force_forwarding")
        assert calls(nft_lab, v6=True) == NEITHER
        mend(node, only(snatd, "forwarding_off"))
        assert mended(nft_lab, v6=True)
        assert found(snatd, 0) == {}


@pytest.mark.parametrize("device", ["eth0", "docker0"])
def test_forwarding_off_for_a_device(nft_lab: Lab, node: Node, snatd: Snatd, device: str) -> None:
    node.host.shell(f"echo 0 > /proc/sys/net/ipv4/conf/{device}/forwarding")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "forwarding_off_device")
    assert one["evidence"] == [f"net/ipv4/conf/{device}/forwarding = 0"]
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_no_lease(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "no_lease")
        assert one["evidence"] == [
            "/run/flannel/subnet.env: no such file: waiting for flanneld to write it"
        ]
        healthy(nft_lab, tmp_path)
        assert found(snatd, 0) == {}


def test_a_lease_that_says_too_little(node: Node, snatd: Snatd) -> None:
    path = node.host.path("/run/flannel/subnet.env")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if "NETWORK" not in line) + "\n")
    one = only(snatd, "undecided")
    assert "no network contains this node's subnet 172.7.21.0/24" in one["evidence"][0]


def test_ipv6_is_leased_and_switched_off(node: Node, snatd: Snatd) -> None:
    node.host.shell("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    node.write_lease(v6=True)
    only(snatd, "family_off", "info")


@pytest.mark.parametrize("device", ["docker0", "cni0"])
def test_the_bridge_has_another_address(
    nft_lab: Lab, node: Node, snatd: Snatd, device: str
) -> None:
    node.host.shell("ip addr del 172.7.21.1/24 dev docker0; ip addr add 172.17.0.1/16 dev docker0")
    node.host.shell(f"ip link set docker0 down; ip link set docker0 name {device} up")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "bridge_elsewhere")
    assert one["evidence"] == [
        "FLANNEL_SUBNET says 172.7.21.1/24",
        f"{device} carries 172.17.0.1/16",
    ]
    mend(node, one)
    if device == "docker0":
        assert mended(nft_lab)
        assert found(snatd, 0) == {}


def test_the_bridge_has_the_address_with_another_length(
    nft_lab: Lab, node: Node, snatd: Snatd
) -> None:
    node.host.shell("ip addr del 172.7.21.1/24 dev docker0; ip addr add 172.7.21.1/16 dev docker0")
    one = only(snatd, "bridge_elsewhere")
    assert one["evidence"][1] == "docker0 carries 172.7.21.1/16"
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_the_bridge_has_no_address_of_ipv6(nft_lab: Lab, tmp_path: Path) -> None:
    node = healthy(nft_lab, tmp_path, v6=True)
    node.host.shell("echo 1 > /proc/sys/net/ipv6/conf/docker0/disable_ipv6")
    assert (calls(nft_lab), calls(nft_lab, v6=True)) == (BOTH, NEITHER)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "bridge_elsewhere", "warning")
        assert one["evidence"] == [
            "FLANNEL_SUBNET says fd00:7:21::1/64",
            "docker0 carries no address of IPv6",
            "net/ipv6/conf/docker0/disable_ipv6 = 1",
        ]
        mend(node, one)
        assert mended(nft_lab, v6=True)
        assert found(snatd, 0) == {}


def test_no_bridge_yet_is_no_fault(node: Node, snatd: Snatd) -> None:
    node.host.shell("ip link del docker0")
    only(snatd, "no_bridge", "info")


def test_a_veth_with_the_gateways_address_alone_is_no_bridge(node: Node, snatd: Snatd) -> None:
    """What CNI's ptp plugin makes."""
    node.host.shell(
        "ip link del docker0; ip link add pod1 type veth peer name inner1;"
        "ip addr add 172.7.21.1/32 dev pod1; ip link set pod1 up"
    )
    only(snatd, "no_bridge", "info")


def test_two_devices_carry_the_address(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """Docker and CNI were both given FLANNEL_SUBNET; the containers are behind the second."""
    node.host.shell(
        "ip link set docker0 down; ip link add cni0 type bridge; ip link set cni0 up;"
        "ip addr add 172.7.21.1/24 dev cni0; ip link set docker0 up"
    )
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "subnet_on_two_devices")
    assert one["evidence"] == ["docker0 carries 172.7.21.1/24", "cni0 carries 172.7.21.1/24"]
    assert one["remedy"][0] == "ip addr del 172.7.21.1/24 dev cni0"
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_the_bridge_is_down(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "link", "set", "docker0", "down")
    assert calls(nft_lab) == NEITHER
    mend(node, only(snatd, "bridge_down"))
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_a_route_takes_the_subnet_away(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """A lease that another node had before."""
    node.host.run("ip", "route", "add", "172.7.21.0/25", "via", "10.4.7.22")
    node.host.run("ip", "route", "add", "172.7.21.128/25", "via", "10.4.7.22")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "subnet_goes_elsewhere")
    assert "ip route get 172.7.21.254: via 10.4.7.22 dev eth0" in one["evidence"]
    assert "172.7.21.128/25 via 10.4.7.22 dev eth0" in one["evidence"]
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_the_subnets_own_route_is_gone(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "route", "del", "172.7.21.0/24", "dev", "docker0")
    assert calls(nft_lab) == NEITHER
    mend(node, only(snatd, "subnet_goes_elsewhere"))
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("v6", [False, True])
def test_a_policy_rule_sends_containers_elsewhere(nft_lab: Lab, tmp_path: Path, v6: bool) -> None:
    node = healthy(nft_lab, tmp_path, v6=v6)
    ip, subnet, gateway = "-4", node.subnet, "10.4.7.100"
    if v6:
        ip, subnet, gateway = "-6", node.subnet_v6, "fd00:4:7::100"
    node.host.shell(
        f"ip {ip} route add default via {gateway} table 100;"
        f"ip {ip} rule add from {subnet} lookup 100 priority 1000"
    )
    assert calls(nft_lab, v6=v6) == NEITHER
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "route_not_followed")
        assert f"1000: from {subnet} lookup 100" in one["evidence"]
        assert f"via {gateway} dev eth0" in one["evidence"][0]
        mend(node, one)
        assert mended(nft_lab, v6=v6)
        assert found(snatd, 0) == {}


def test_a_policy_rule_keeps_packets_from_containers(
    nft_lab: Lab, node: Node, snatd: Snatd
) -> None:
    node.host.shell(
        "ip route add default via 10.4.7.100 table 100;"
        "ip rule add iif eth0 lookup 100 priority 1000"
    )
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "subnet_goes_elsewhere")
    assert one["evidence"] == [
        "ip route get 172.7.21.254 from 172.7.22.2 iif eth0: via 10.4.7.100 dev eth0",
        "1000: iif eth0 lookup 100",
    ]
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_policy_rules_that_are_about_others(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell(
        "ip route add default via 10.4.7.100 table 100;"
        "ip rule add from 10.9.0.0/16 lookup 100; ip rule add fwmark 7 lookup 100"
    )
    assert calls(nft_lab) == BOTH
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("v6", [False, True])
def test_docker_drops_what_is_forwarded_to_a_container(lab: Lab, tmp_path: Path, v6: bool) -> None:
    node = healthy(lab, tmp_path, v6=v6)
    dockers_rules(node, accept=False, v6=v6)
    assert calls(lab, v6=v6) == (True, False)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "inbound_dropped")
        legacy = node.host.run("iptables", "-V").strip().endswith("(legacy)")
        table = f"{'legacy ' * legacy}ip{'6' * v6} filter"
        assert one["evidence"] == [f"{table} FORWARD policy drop"]
        command = "ip6tables" if v6 else "iptables"
        assert one["remedy"][0].startswith(f"{command} -I DOCKER-USER -s ")
        mend(node, one)
        assert mended(lab, v6=v6)
        assert found(snatd, 0) == {}


def test_a_forward_policy_without_any_rule(lab: Lab, tmp_path: Path) -> None:
    node = healthy(lab, tmp_path)
    node.host.run("iptables", "-w", "5", "-P", "FORWARD", "DROP")
    assert calls(lab) == NEITHER
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        all_found = found(snatd)
        # The node's own containers cannot reach each other either: bridges ask iptables here.
        assert list(all_found) == ["inbound_dropped", "outbound_dropped", "bridge_dropped"]
        for one in all_found.values():
            mend(node, one)
        assert mended(lab)
        assert found(snatd, 0) == {}


def test_answers_are_dropped(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    for rule in ("-s 172.7.21.0/24 -j ACCEPT", "-j REJECT"):
        node.host.run("iptables", "-A", "FORWARD", *rule.split(" "))
    assert calls(nft_lab) == NEITHER
    all_found = found(snatd)
    assert list(all_found) == ["inbound_dropped", "outbound_dropped"]
    assert all_found["outbound_dropped"]["evidence"] == [
        "ip filter FORWARD rule 2: -j REJECT --reject-with icmp-port-unreachable"
    ]
    mend(node, all_found["outbound_dropped"])
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("family", ["ip", "inet"])
def test_a_native_chain_drops(nft_lab: Lab, node: Node, snatd: Snatd, family: str) -> None:
    node.host.run(
        *("nft", "-f", "-"),
        stdin=f"""table {family} fw {{ chain forwarded {{
            type filter hook forward priority 10; policy drop;
            ct state vmap {{ established : accept, related : accept, invalid : drop }}
            ct status dnat accept
            iifname "docker0" oifname != "docker0" accept
            iifname "docker0" oifname "docker0" accept
        }}; }}""",
    )
    assert calls(nft_lab) == (True, False)
    one = only(snatd, "inbound_dropped")
    assert one["evidence"] == [f"{family} fw forwarded policy drop"]
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_two_chains_drop_and_the_remedy_names_both(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    dockers_rules(node, accept=False)
    node.host.shell(
        "nft add table inet fw; nft add chain inet fw pre "
        "'{ type filter hook prerouting priority -310; }';"
        "nft add rule inet fw pre iifname eth0 ip daddr 172.7.21.0/24 drop"
    )
    all_found = found(snatd)
    assert list(all_found) == ["inbound_dropped", "outbound_dropped"]
    one = all_found["inbound_dropped"]
    assert [line for line in one["remedy"] if not line.startswith("#")] == [
        "nft insert rule inet fw pre ip saddr 172.7.0.0/16 ip daddr 172.7.21.0/24 accept",
        "iptables -I DOCKER-USER -s 172.7.0.0/16 -d 172.7.21.0/24 -j ACCEPT",
    ]
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_some_neighbours_only(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """An operator's list of nodes that has grown old."""
    dockers_rules(node, accept=False)
    node.host.run("ip", "route", "add", "172.7.23.0/24", "via", "10.4.7.22")
    node.host.run("iptables", "-I", "FORWARD", "-s", "172.7.23.0/24", "-j", "ACCEPT")
    assert calls(nft_lab) == (True, False)
    one = only(snatd, "inbound_dropped")
    assert "172.7.22.0/24" in one["why"]
    assert "172.7.23.0/24" not in one["why"]


@pytest.mark.parametrize(
    ("match", "severity"),
    [
        ("-p tcp -m tcp --dport 80", "info"),
        ("-m statistic --mode random --probability 0.5", "warning"),
    ],
)
def test_what_cannot_be_decided_is_no_error(
    node: Node, snatd: Snatd, match: str, severity: str
) -> None:
    dockers_rules(node, accept=False)
    words = f"-I DOCKER-USER -d 172.7.21.0/24 {match} -j ACCEPT"
    node.host.run("iptables", *words.split(" "))
    one = only(snatd, "inbound_may_be_dropped", severity)
    assert f"depends on `{match[:6]}" in one["evidence"][0]
    mend(node, one)
    assert found(snatd, 0) == {}


def docker_28(node: Node, published: bool = True) -> None:
    """Its raw and filter tables for a container on docker0, as its documentation shows them."""
    raw = f"-A PREROUTING -d {node.container_address}/32 ! -i docker0 -j DROP"
    chains = ("DOCKER", "DOCKER-BRIDGE", "DOCKER-CT", "DOCKER-FORWARD", "DOCKER-USER")
    rules = [
        "FORWARD -j DOCKER-USER",
        "FORWARD -j DOCKER-FORWARD",
        "DOCKER-FORWARD -j DOCKER-CT",
        "DOCKER-FORWARD -j DOCKER-BRIDGE",
        "DOCKER-FORWARD -i docker0 -j ACCEPT",
        "DOCKER-BRIDGE -o docker0 -j DOCKER",
        "DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        *(
            [
                f"DOCKER -d {node.container_address}/32 ! -i docker0 -o docker0 -p tcp -m tcp "
                "--dport 80 -j ACCEPT"
            ]
            if published
            else []
        ),
        "DOCKER ! -i docker0 -o docker0 -j DROP",
    ]
    lines = ["*raw", raw, "COMMIT", "*filter", ":FORWARD ACCEPT", *(f":{one} -" for one in chains)]
    script = "\n".join([*lines, *(f"-A {one}" for one in rules), "COMMIT", ""])
    node.host.run("iptables-restore", "--noflush", stdin=script)


def test_docker_28(lab: Lab, tmp_path: Path) -> None:
    node = healthy(lab, tmp_path)
    docker_28(node)
    # The answers to its own calls come to its address too, and they are not masqueraded any more.
    assert calls(lab) == NEITHER
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        all_found = found(snatd)
        assert list(all_found) == ["inbound_dropped", "direct_routing_dropped"]
        direct = all_found["direct_routing_dropped"]
        assert direct["evidence"][0].endswith(
            "ip raw PREROUTING rule 1 (written by Docker): -d 172.7.21.2/32 ! -i docker0 -j DROP"
        )
        assert "DOCKER rule 2 (written by Docker)" in all_found["inbound_dropped"]["evidence"][0]
        assert "allow-direct-routing" in direct["remedy"][-1]
        for one in all_found.values():
            assert calls(lab) == NEITHER or one is direct
            mend(node, one)
        assert mended(lab)
        assert found(snatd, 0) == {}


def test_docker_28_before_its_rule_was_for_the_whole_container(
    nft_lab: Lab, node: Node, snatd: Snatd
) -> None:
    words = "-A PREROUTING -d 172.7.21.2/32 ! -i docker0 -p udp -m udp --dport 8080 -j DROP"
    node.host.run("iptables", "-t", "raw", *words.split(" "))
    assert calls(nft_lab) == (True, False)
    one = only(snatd, "direct_routing_dropped")
    assert one["says"] == "Docker drops what other nodes send to 172.7.21.2"
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}


def test_docker_29_with_its_own_nft_table(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run(
        *("nft", "-f", "-"),
        stdin="""table ip docker-bridges { chain raw-PREROUTING {
            type filter hook prerouting priority raw; policy accept;
            ip daddr 172.7.21.2 iifname != "docker0" counter drop comment "DROP DIRECT ACCESS"
        }; }""",
    )
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "direct_routing_dropped")
    assert one["evidence"][0].startswith("ip docker-bridges raw-PREROUTING rule 1")
    mend(node, one)
    assert mended(nft_lab)
    assert found(snatd, 0) == {}
