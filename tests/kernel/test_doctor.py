"""`snatd doctor` on nodes that really have the fault, and on those that have none.

Packets are the oracle: what is found really keeps containers from each other, and no longer does
when the commands of the remedy were run.
"""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.test_packets import applied
from tests.lab.netns import Namespace, until
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import PORT, WhoServer, seen_by, seen_by_udp


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
    before_s = children_cpu_s()
    done = snatd.command("doctor", "--json")
    assert done.returncode == exit_code, done.stdout + done.stderr
    # Not by the clock, which goes on while the machine does something else.
    assert children_cpu_s() - before_s < 5
    return {one["name"]: one for one in json.loads(done.stdout)["findings"]}


def children_cpu_s() -> float:
    """Of all that were waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def only(snatd: Snatd, name: str, severity: str = "error") -> dict[str, Any]:
    """The one finding that there is."""
    all_found = found(snatd, 0 if severity == "info" else 1)
    assert list(all_found) == [name], json.dumps(all_found, indent=1)
    assert all_found[name]["severity"] == severity
    return all_found[name]


def mend(node: Node, one: dict[str, Any]) -> None:
    """Types a remedy as it stands into a shell."""
    assert commands_of(one), one
    node.host.shell("\n".join(one["remedy"]))


def commands_of(one: dict[str, Any]) -> list[str]:
    return [line for line in one["remedy"] if not line.startswith("#")]


def start_dockers(node: Node, one: dict[str, Any]) -> None:
    """Twice, with what a remedy says is to be done then, which is its last line."""
    (lasting,) = re.findall("^# ExecStartPost=(.*)$", one["remedy"][-1])
    for _ in range(2):
        node.host.shell(lasting)


def accepting(node: Node) -> list[str]:
    """The rules for cluster traffic that are in force, each as often as it is there."""
    listed = node.host.shell("nft -s list ruleset; iptables-legacy -S; ip6tables-legacy -S")
    lines = [line.strip() for line in listed.splitlines()]
    networks = ("172.7.0.0/16", "fd00:7::/32")
    return [one for one in lines if any(n in one for n in networks) and "accept" in one.lower()]


def calls(lab: Lab, v6: bool = False) -> tuple[bool, bool]:
    """Whether a container reaches the other node's, and is reached by it."""
    node, other = lab.nodes
    here, there = node.container_address, other.container_address
    if v6:
        here, there = node.container_v6, other.container_v6
    return (
        seen_by_udp(node.container, there, 0.25) == here,
        seen_by_udp(other.container, here, 0.25) == there,
    )


BOTH, NEITHER, OUT = (True, True), (False, False), (True, False)


def connected(lab: Lab, v6: bool = False, *, how: tuple[bool, bool] = BOTH) -> bool:
    """Whether both reach each other; who was looked for in vain is looked for again after 1 s."""
    return bool(until(lambda: calls(lab, v6) == how, f"containers reach each other: {how}"))


def test_a_healthy_node(nft_lab: Lab, snatd: Snatd) -> None:
    assert connected(nft_lab)
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
    assert connected(lab)
    assert connected(lab, v6=True)
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
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}
    assert node.host.run("cat", "/etc/sysctl.d/90-containers.conf") == "net.ipv4.ip_forward = 1\n"


def test_forwarding_off_for_ipv6(nft_lab: Lab, tmp_path: Path) -> None:
    node = healthy(nft_lab, tmp_path, v6=True)
    node.host.shell("echo 0 > /proc/sys/net/ipv6/conf/all/forwarding")
    assert connected(nft_lab)
    assert calls(nft_lab, v6=True) == NEITHER
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "forwarding_off")
        assert one["evidence"] == ["net.ipv6.conf.all.forwarding = 0"]
        # Linux 6.17 has a way for single devices.
        for device in ("eth0", "docker0"):
            node.host.shell(f"echo 1 > /proc/sys/net/ipv6/conf/{device}/force_forwarding")
        assert connected(nft_lab, v6=True)
        assert found(snatd, 0) == {}
        node.host.shell("echo 0 > /proc/sys/net/ipv6/conf/eth0/force_forwarding")
        assert calls(nft_lab, v6=True) == NEITHER
        mend(node, only(snatd, "forwarding_off"))
        assert connected(nft_lab, v6=True)
        assert found(snatd, 0) == {}


@pytest.mark.parametrize("device", ["eth0", "docker0"])
def test_forwarding_off_for_a_device(nft_lab: Lab, node: Node, snatd: Snatd, device: str) -> None:
    node.host.shell(f"echo 0 > /proc/sys/net/ipv4/conf/{device}/forwarding")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "forwarding_off_device")
    assert one["evidence"] == [f"net/ipv4/conf/{device}/forwarding = 0"]
    mend(node, one)
    assert connected(nft_lab)
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
    one = only(snatd, "family_off", "info")
    assert one["evidence"] == ["net.ipv6.conf.all.disable_ipv6 = 1"]


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
        assert connected(nft_lab)
        assert found(snatd, 0) == {}


def test_dockers_bridge_is_dockers_to_move(node: Node, snatd: Snatd) -> None:
    """It would go on with the old subnet, and containers with a gateway that nobody has."""
    node.host.shell("ip addr del 172.7.21.1/24 dev docker0; ip addr add 172.17.0.1/16 dev docker0")
    node.host.program("dockerd")
    one = found(snatd)["bridge_elsewhere"]
    assert one["remedy"] == [
        '# "bip": "172.7.21.1/24" in /etc/docker/daemon.json, systemctl restart docker',
        "# containers with another address have to be made anew",
    ]


def test_the_bridge_has_the_address_with_another_length(
    nft_lab: Lab, node: Node, snatd: Snatd
) -> None:
    node.host.shell("ip addr del 172.7.21.1/24 dev docker0; ip addr add 172.7.21.1/16 dev docker0")
    one = only(snatd, "bridge_elsewhere")
    assert one["evidence"][1] == "docker0 carries 172.7.21.1/16"
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_the_bridge_has_no_address_of_ipv6(nft_lab: Lab, tmp_path: Path) -> None:
    node = healthy(nft_lab, tmp_path, v6=True)
    node.host.shell("echo 1 > /proc/sys/net/ipv6/conf/docker0/disable_ipv6")
    assert connected(nft_lab)
    assert calls(nft_lab, v6=True) == NEITHER
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "bridge_elsewhere", "warning")
        assert one["evidence"] == [
            "FLANNEL_SUBNET says fd00:7:21::1/64",
            "docker0 carries no address of IPv6",
            "net/ipv6/conf/docker0/disable_ipv6 = 1",
        ]
        mend(node, one)
        assert connected(nft_lab, v6=True)
        assert found(snatd, 0) == {}


def test_no_bridge_yet_is_no_fault(node: Node, snatd: Snatd) -> None:
    node.host.shell("ip link del docker0")
    only(snatd, "no_bridge", "info")


def test_no_bridge_since_docker_was_stopped(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    node.host.shell("ip link del docker0")
    commands = tmp_path / "commands"
    there, *_ = node.host.environment()["PATH"].split(":")
    shutil.copytree(there, commands, symlinks=True)
    (commands / "dockerd").touch(mode=0o755)
    node.host.use_iptables(commands)
    one = only(snatd, "no_bridge", "warning")
    assert one["evidence"][1] == f"{commands}/dockerd is installed, and does not run"
    assert one["remedy"] == ["# if Docker makes it: systemctl start docker"]
    node.host.program("dockerd")
    assert "runs, which makes docker0" in found(snatd)["no_bridge"]["evidence"][1]


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
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_the_bridge_is_down(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "link", "set", "docker0", "down")
    assert calls(nft_lab) == NEITHER
    mend(node, only(snatd, "bridge_down"))
    assert connected(nft_lab)
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
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_the_subnets_own_route_is_gone(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "route", "del", "172.7.21.0/24", "dev", "docker0")
    assert calls(nft_lab) == NEITHER
    mend(node, only(snatd, "subnet_goes_elsewhere"))
    assert connected(nft_lab)
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
        assert connected(nft_lab, v6=v6)
        assert found(snatd, 0) == {}


def test_another_device_is_in_the_same_subnet(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell(
        "ip link add other type bridge; ip link set other up; ip addr add 172.7.21.9/24 dev other;"
        "ip route del 172.7.21.0/24 dev docker0; ip route append 172.7.21.0/24 dev docker0"
    )
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "subnet_goes_elsewhere")
    assert "172.7.21.0/24 dev other" in one["evidence"]
    mend(node, one)
    assert connected(nft_lab)


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
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_policy_rules_that_are_about_others(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell(
        "ip route add default via 10.4.7.100 table 100;"
        "ip rule add from 10.9.0.0/16 lookup 100; ip rule add fwmark 7 lookup 100"
    )
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("v6", [False, True])
def test_docker_drops_what_is_forwarded_to_a_container(lab: Lab, tmp_path: Path, v6: bool) -> None:
    node = healthy(lab, tmp_path, v6=v6)
    dockers_rules(node, accept=False, v6=v6)
    assert connected(lab, v6=v6, how=OUT)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "inbound_dropped")
        legacy = node.host.run("iptables", "-V").strip().endswith("(legacy)")
        table = f"{'legacy ' * legacy}ip{'6' * v6} filter"
        assert one["evidence"] == [f"{table} FORWARD policy drop"]
        command = "ip6tables" if v6 else "iptables"
        assert one["remedy"][0].startswith(f"{command} -C DOCKER-USER -s ")
        mend(node, one)
        assert connected(lab, v6=v6)
        assert found(snatd, 0) == {}
        # What makes it last does the same, at each start of Docker.
        node.host.run(command, "-w", "5", "-D", "DOCKER-USER", "1")
        assert connected(lab, v6=v6, how=OUT)
        start_dockers(node, one)
        assert connected(lab, v6=v6)
        assert len(accepting(node)) == 1


def test_a_forward_policy_without_any_rule(lab: Lab, tmp_path: Path) -> None:
    node = healthy(lab, tmp_path)
    node.host.run("iptables", "-w", "5", "-P", "FORWARD", "DROP")
    assert calls(lab) == NEITHER
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        all_found = found(snatd)
        # The node's own containers cannot reach each other either: bridges ask iptables here.
        assert list(all_found) == ["inbound_dropped", "outbound_dropped", "bridge_dropped"]
        for _ in range(2):
            for one in all_found.values():
                mend(node, one)
        assert connected(lab)
        assert found(snatd, 0) == {}
        assert len(accepting(node)) == 2


def test_a_node_without_snatd_comes_under_its_own_address(lab: Lab, tmp_path: Path) -> None:
    """The remedy says how it is let in too."""
    node, other = healthy(lab, tmp_path), lab.nodes[1]
    dockers_rules(node, accept=False)
    words = ("-A", "POSTROUTING", *other.broad_rule)
    other.host.run("iptables", "-w", "5", "-t", "nat", *words)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "inbound_dropped")
        mend(node, one)
        assert found(snatd, 0) == {}
    assert seen_by_udp(other.container, node.container_address, 0.4) is None
    (command,) = (
        line.partition("for each: ")[2] for line in one["remedy"] if "without snatd" in line
    )
    node.host.shell(command.replace("ADDRESS", other.address))
    caller = until(lambda: seen_by_udp(other.container, node.container_address, 0.4), "it calls")
    assert caller == other.address


@pytest.mark.parametrize(
    ("chain", "rule"), [("DOCKER-USER", ""), ("FORWARD", "-d 172.7.21.0/24 -j DROP")]
)
def test_an_accept_that_stands_too_late(lab: Lab, tmp_path: Path, chain: str, rule: str) -> None:
    """Appended to DOCKER-USER it is behind Docker's RETURN."""
    node = healthy(lab, tmp_path)
    dockers_rules(node, accept=False)
    if rule:
        node.host.run("iptables", "-w", "5", "-I", chain, *rule.split(" "))
    words = f"-A {chain} -s 172.7.0.0/16 -d 172.7.21.0/24 -j ACCEPT"
    node.host.run("iptables", "-w", "5", *words.split(" "))
    assert connected(lab, how=NEITHER if rule else OUT)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = found(snatd)["inbound_dropped"]
        mend(node, one)
        mend(node, one)
        assert connected(lab)
        assert found(snatd, 0) == {}
        assert len(accepting(node)) == 1
        if not rule:
            node.host.run("iptables", "-w", "5", "-F", "DOCKER-USER")
            start_dockers(node, one)
            assert connected(lab)
            assert len(accepting(node)) == 1


def test_the_tables_of_the_other_backend_drop(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """Of which nothing but a policy is in use."""
    node.host.run("iptables-legacy", "-w", "5", "-P", "FORWARD", "DROP")
    assert calls(nft_lab) == NEITHER
    one = found(snatd)["inbound_dropped"]
    assert one["evidence"] == ["legacy ip filter FORWARD policy drop"]
    mend(node, one)
    assert connected(nft_lab)
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
    assert connected(nft_lab)
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
    assert connected(nft_lab, how=OUT)
    one = only(snatd, "inbound_dropped")
    assert one["evidence"] == [f"{family} fw forwarded policy drop"]
    mend(node, one)
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}
    assert accepting(node) == ["ip saddr 172.7.0.0/16 ip daddr 172.7.21.0/24 accept"]


def test_an_accept_of_nft_that_stands_too_late(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    accept = "ip saddr 172.7.0.0/16 ip daddr 172.7.21.0/24 accept"
    foreign = f'{accept} comment "not the remedy"'
    node.host.run(
        *("nft", "-f", "-"),
        stdin=f"""table inet fw {{ chain forwarded {{
            type filter hook forward priority 10
            iifname "eth0" ct state new drop
            {accept}
            {foreign}
        }}
        }}""",
    )
    assert connected(nft_lab, how=OUT)
    one = only(snatd, "inbound_dropped")
    mend(node, one)
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}
    assert accepting(node) == [accept, foreign]


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
    rules = (
        "inet fw pre ip saddr 172.7.0.0/16 ip daddr 172.7.21.0/24 accept",
        "DOCKER-USER -s 172.7.0.0/16 -d 172.7.21.0/24 -j ACCEPT",
    )
    assert [line.partition(" || ")[2] for line in commands_of(one)] == [
        f"nft insert rule {rules[0]}",
        f"iptables -I {rules[1]}",
    ]
    for each in all_found.values():
        mend(node, each)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}
    assert len(accepting(node)) == 2


def test_a_rule_before_dockers_place_for_an_operators_drops(
    nft_lab: Lab, node: Node, snatd: Snatd
) -> None:
    dockers_rules(node, accept=False)
    node.host.run("iptables", "-I", "FORWARD", "-d", "172.7.21.0/24", "-j", "DROP")
    for one in found(snatd).values():
        assert all(line.startswith("iptables -C FORWARD -s ") for line in commands_of(one))
        mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_some_neighbours_only(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """An operator's list of nodes that has grown old."""
    dockers_rules(node, accept=False)
    node.host.run("ip", "route", "add", "172.7.23.0/24", "via", "10.4.7.22")
    node.host.run("iptables", "-I", "FORWARD", "-s", "172.7.23.0/24", "-j", "ACCEPT")
    assert connected(nft_lab, how=OUT)
    one = only(snatd, "inbound_dropped")
    assert "172.7.22.0/24" in one["why"]
    assert "172.7.23.0/24" not in one["why"]


_CHANCE = "-m statistic --mode random --probability 0.50000000000"


@pytest.mark.parametrize(
    ("match", "severity", "depends"),
    [
        ("-p tcp -m tcp --dport 80", "info", "`-m tcp --dport 80`, `-p udp`"),
        (_CHANCE, "warning", f"`{_CHANCE}`"),
    ],
)
def test_what_cannot_be_decided_is_no_error(
    node: Node, snatd: Snatd, match: str, severity: str, depends: str
) -> None:
    dockers_rules(node, accept=False)
    words = f"-I DOCKER-USER -d 172.7.21.0/24 {match} -j ACCEPT"
    node.host.run("iptables", *words.split(" "))
    one = only(snatd, "inbound_may_be_dropped", severity)
    assert one["evidence"] == [f"ip filter FORWARD policy drop; it depends on {depends}"]
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
            "ip raw PREROUTING rule 1 (as Docker writes it): -d 172.7.21.2/32 ! -i docker0 -j DROP"
        )
        assert "DOCKER rule 2 (as Docker writes it)" in all_found["inbound_dropped"]["evidence"][0]
        assert "allow-direct-routing" in direct["remedy"][-1]
        for one in all_found.values():
            assert calls(lab) == NEITHER or one is direct
            mend(node, one)
        assert connected(lab)
        assert found(snatd, 0) == {}


def test_docker_28_before_its_rule_was_for_the_whole_container(
    nft_lab: Lab, node: Node, snatd: Snatd
) -> None:
    words = "-A PREROUTING -d 172.7.21.2/32 ! -i docker0 -p udp -m udp --dport 8080 -j DROP"
    node.host.run("iptables", "-t", "raw", *words.split(" "))
    assert connected(nft_lab, how=OUT)
    one = only(snatd, "direct_routing_dropped")
    assert one["says"] == "Docker drops what other nodes send to 172.7.21.2"
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_docker_29_with_its_own_nft_table(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run(
        *("nft", "-f", "-"),
        stdin="""table ip docker-bridges {
            map filter-forward-in-jumps {
                type ifname : verdict
                elements = { "docker0" : jump filter-forward-in__docker0 }
            }
            chain filter-FORWARD {
                type filter hook forward priority filter; policy accept;
                oifname vmap @filter-forward-in-jumps
            }
            chain filter-forward-in__docker0 {
                ct state established,related counter accept
                iifname "docker0" counter accept comment "ICC"
                counter drop comment "UNPUBLISHED PORT DROP"
            }
            chain raw-PREROUTING {
                type filter hook prerouting priority raw; policy accept;
                ip daddr 172.7.21.2 iifname != "docker0" counter drop comment "DROP DIRECT ACCESS"
            }
        }""",
    )
    assert calls(nft_lab) == NEITHER
    all_found = found(snatd)
    assert list(all_found) == ["inbound_dropped", "direct_routing_dropped"]
    for one, where in (
        (all_found["inbound_dropped"], "filter-forward-in__docker0 rule 3"),
        (all_found["direct_routing_dropped"], "raw-PREROUTING rule 1"),
    ):
        assert one["evidence"][0].startswith(f"ip docker-bridges {where} (as Docker writes it): ")
        assert "allow-direct-routing" in one["remedy"][-1]
        mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def answered(host: Namespace, destination: str, size_bytes: int, *, whole: bool = False) -> bool:
    """Whether a packet of so many bytes, headers included, gets an answer. `whole`: not in parts,
    and it is told where it is known that it will not fit."""
    with host.entered():
        caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with caller:
        caller.settimeout(0.4)
        mode = _WHOLE if whole else _IN_PARTS
        caller.setsockopt(socket.IPPROTO_IP, _MTU_DISCOVER, mode)
        caller.sendto(bytes(size_bytes - 28), (destination, PORT))
        try:
            return bool(caller.recv(64))
        except TimeoutError:
            return False


# linux/in.h; the socket module has no names for them before Python 3.14.
_MTU_DISCOVER, _IN_PARTS, _WHOLE = 10, 0, 2


def set_mtu(node: Node, bridge: int, port: int, inner: int) -> None:
    # The bridge follows its ports until it is told otherwise.
    node.host.shell(f"ip link set veth0 mtu {port}; ip link set docker0 mtu {bridge}")
    node.container.run("ip", "link", "set", "eth0", "mtu", str(inner))


@pytest.mark.parametrize(
    ("bridge", "port", "inner"),
    [(1500, 1400, 1500), (1500, 1500, 1400), (1500, 1400, 1400), (1400, 1400, 1500)],
)
def test_mtus_that_differ_behind_the_bridge(
    nft_lab: Lab, node: Node, snatd: Snatd, bridge: int, port: int, inner: int
) -> None:
    set_mtu(node, bridge, port, inner)
    other = nft_lab.nodes[1]
    there, here = other.container_address, node.container_address

    def fits() -> tuple[bool, bool]:
        return answered(node.container, there, 1500), answered(other.container, here, 1500)

    assert connected(nft_lab)
    assert False in fits()
    one = only(snatd, "mtu_differs_on_bridge")
    assert one["evidence"] == [
        f"docker0 has mtu {bridge}",
        f"veth0 has mtu {port}, its end in the container has mtu {inner}",
    ]
    mend(node, one)
    assert fits() == (True, True)
    assert found(snatd, 0) == {}


def with_vxlan(lab: Lab, folder: Path) -> Node:
    """Both nodes as flannel's vxlan backend leaves them."""
    for node in lab.nodes:
        set_mtu(node, 1450, 1450, 1450)
        node.host.shell(
            f"ip link add flannel.1 type vxlan id 1 dstport 8472 local {node.address} dev eth0 "
            f"nolearning; ip link set flannel.1 address {link_address(node)} up;"
            f"ip addr add 172.7.{node.number}.0/32 dev flannel.1"
        )
    for node in lab.nodes:
        (other,) = (one for one in lab.nodes if one is not node)
        node.host.shell(f"ip route del {other.subnet}")
        for command in _TUNNEL:
            node.host.shell(_filled(command, other))
    return healthy(lab, folder, mtu=1450)


_NEIGHBOUR = "ip neigh replace {first} lladdr {mac} dev flannel.1 nud permanent"
_END = "bridge fdb append {mac} dev flannel.1 dst {node}"
_ROUTE = "ip route add {subnet} via {first} dev flannel.1 onlink"
_TUNNEL = (_NEIGHBOUR, _END, _ROUTE)


def _filled(command: str, other: Node) -> str:
    return command.format(
        first=f"172.7.{other.number}.0",
        mac=link_address(other),
        node=other.address,
        subnet=other.subnet,
    )


def link_address(node: Node) -> str:
    return f"02:00:00:00:00:{node.number}"


@pytest.fixture
def vxlan(nft_lab: Lab, tmp_path: Path) -> Node:
    return with_vxlan(nft_lab, tmp_path)


@pytest.fixture
def vxlan_snatd(vxlan: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(vxlan.host, tmp_path / "snatd") as snatd:
        yield snatd


def test_a_healthy_node_with_vxlan(nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd) -> None:
    assert connected(nft_lab)
    there = nft_lab.nodes[1].container_address
    assert answered(vxlan.container, there, 1450, whole=True)
    assert found(vxlan_snatd, 0) == {}


@pytest.mark.parametrize("size", [1500, 1480])
def test_containers_with_more_than_flannel_has(
    nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd, size: int
) -> None:
    """What everybody gets who starts Docker without --mtu."""
    set_mtu(vxlan, size, size, size)
    there = nft_lab.nodes[1].container_address
    assert not answered(vxlan.container, there, size, whole=True)
    with pytest.raises(OSError, match="too long"):  # the second time it is known, if ICMP came
        answered(vxlan.container, there, size, whole=True)
    one = only(vxlan_snatd, "mtu_above_flannel", "warning")
    assert one["evidence"] == [
        "flannel.1 has mtu 1450",
        "FLANNEL_MTU=1450",
        f"veth0 has mtu {size}, its end in the container has mtu {size}",
    ]
    assert '"mtu": 1450' in one["remedy"][0]
    set_mtu(vxlan, 1450, 1450, 1450)  # as Docker would make them then
    assert answered(vxlan.container, there, 1450, whole=True)
    assert found(vxlan_snatd, 0) == {}


def test_the_tunnel_takes_less_than_flannel_said(
    nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd
) -> None:
    vxlan.host.run("ip", "link", "set", "flannel.1", "mtu", "1400")
    there = nft_lab.nodes[1].container_address
    assert not answered(vxlan.container, there, 1450, whole=True)
    all_found = found(vxlan_snatd)
    assert list(all_found) == ["mtu_above_flannel", "mtu_below_flannel"]
    mend(vxlan, all_found["mtu_below_flannel"])
    vxlan.container.run("ip", "route", "flush", "cache")
    assert answered(vxlan.container, there, 1450, whole=True)
    assert found(vxlan_snatd, 0) == {}


def test_the_tunnel_does_not_fit_the_device_beneath(
    nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd
) -> None:
    nft_lab.nodes[1].host.run("ip", "link", "set", "eth0", "mtu", "1400")
    vxlan.host.run("ip", "link", "set", "eth0", "mtu", "1400")
    one = only(vxlan_snatd, "mtu_of_tunnel", "warning")
    assert one["evidence"] == [
        "flannel.1 has mtu 1450",
        "eth0 has mtu 1400, and the tunnel needs 1500",
    ]
    mend(vxlan, one)
    assert "mtu_of_tunnel" not in found(vxlan_snatd)  # and FLANNEL_MTU waits for flanneld
    vxlan.write_lease(mtu=1350)
    set_mtu(vxlan, 1350, 1350, 1350)
    assert found(vxlan_snatd, 0) == {}
    there = nft_lab.nodes[1].container_address
    assert answered(vxlan.container, there, 1350, whole=True)


def test_the_lan_takes_less_than_flannel_said(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "link", "set", "eth0", "mtu", "1400")
    assert not answered(node.container, nft_lab.nodes[1].container_address, 1500, whole=True)
    all_found = found(snatd)
    assert list(all_found) == ["mtu_above_flannel", "mtu_below_flannel"]
    mend(node, all_found["mtu_below_flannel"])
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("missing", ["neighbour", "end"])
def test_a_tunnel_is_not_complete(
    nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd, missing: str
) -> None:
    other = nft_lab.nodes[1]
    undo = {
        "neighbour": "ip neigh del 172.7.22.0 dev flannel.1",
        "end": f"bridge fdb del {link_address(other)} dev flannel.1 dst {other.address}",
    }
    vxlan.host.shell(undo[missing])
    assert calls(nft_lab) == NEITHER
    one = only(vxlan_snatd, "tunnel_incomplete")
    (line,) = one["evidence"]
    assert line.startswith("route 172.7.22.0/24 via 172.7.22.0 dev flannel.1 onlink, but no ")
    for command in (_NEIGHBOUR, _END):  # as flanneld does when it starts
        vxlan.host.shell(_filled(command, other).replace("append", "replace"))
    assert connected(nft_lab)
    assert found(vxlan_snatd, 0) == {}


def test_a_tunnel_without_a_route(nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd) -> None:
    vxlan.host.run("ip", "route", "del", "172.7.22.0/24")
    assert calls(nft_lab) == NEITHER
    all_found = found(vxlan_snatd)
    one = all_found["route_missing"]
    assert one["severity"] == "error"
    assert one["evidence"] == [
        "neighbour 172.7.22.0 dev flannel.1 lladdr 02:00:00:00:00:22 PERMANENT"
    ]
    mend(vxlan, one)
    assert connected(nft_lab)
    assert found(vxlan_snatd, 0) == {}


def test_the_tunnels_port_is_closed(lab: Lab, tmp_path: Path) -> None:
    node = with_vxlan(lab, tmp_path)
    rules = (
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-i lo -j ACCEPT",
        "-p tcp -m tcp --dport 22 -j ACCEPT",
        "-p icmp -j ACCEPT",
    )
    for rule in rules:
        node.host.run("iptables", "-w", "5", "-A", "INPUT", *rule.split(" "))
    node.host.run("iptables", "-w", "5", "-P", "INPUT", "DROP")
    assert calls(lab)[1] is False
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        one = only(snatd, "tunnel_dropped")
        assert one["evidence"][0] == "flannel.1: UDP port 8472 of 10.4.7.21"
        assert one["evidence"][1].endswith("ip filter INPUT policy drop")
        mend(node, one)
        assert connected(lab)
        assert found(snatd, 0) == {}


def test_a_route_that_refuses(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell("ip route del 172.7.22.0/24; ip route add unreachable 172.7.22.0/24")
    assert calls(nft_lab) == NEITHER
    one = found(snatd)["route_refuses"]
    assert one["evidence"] == ["unreachable 172.7.22.0/24"]
    mend(node, one)
    node.host.run("ip", "route", "add", "172.7.22.0/24", "via", "10.4.7.22")
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_a_summary_that_refuses_what_nobody_has(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell("ip route add unreachable 172.7.0.0/16; ip route add blackhole 172.7.16.0/20")
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("v6", [False, True])
def test_a_node_that_does_not_answer(nft_lab: Lab, tmp_path: Path, v6: bool) -> None:
    node = healthy(nft_lab, tmp_path, v6=v6)
    nft_lab.lan.run("ip", "link", "set", "v22", "down")
    node.host.shell("ip neigh flush dev eth0")
    gateway = "fd00:4:7::22" if v6 else "10.4.7.22"
    with Snatd(node.host, tmp_path / "snatd") as snatd:

        def findings() -> list[dict[str, Any]]:
            # A kernel that knows many, in all its namespaces, forgets this one at any time.
            assert calls(nft_lab, v6=v6) == NEITHER
            if "FAILED" not in node.host.run("ip", "neigh", "show", gateway):
                return []
            return list(json.loads(snatd.command("doctor", "--json").stdout)["findings"])

        (one,) = until(findings, "a finding about a node that does not answer")
        assert (one["name"], one["severity"]) == ("gateway_silent", "error")
        assert one["evidence"][1].startswith(f"neighbour {gateway} dev eth0 FAILED, for ")
        nft_lab.lan.run("ip", "link", "set", "v22", "up")
        assert connected(nft_lab, v6=v6)
        assert found(snatd, 0) == {}


@pytest.mark.usefixtures("node")
def test_the_link_to_other_nodes_is_down(nft_lab: Lab, snatd: Snatd) -> None:
    nft_lab.lan.run("ip", "link", "set", "v21", "down")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "route_dead")
    assert one["evidence"] == ["172.7.22.0/24 via 10.4.7.22 dev eth0 linkdown"]
    nft_lab.lan.run("ip", "link", "set", "v21", "up")
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_a_gateway_on_no_link_of_ours(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """host-gw between two LANs: the router between them does not know the containers."""
    node.host.run(
        *("ip", "route", "replace", "172.7.22.0/24"),
        *("via", "10.99.0.22", "dev", "eth0", "onlink"),
    )
    one = only(snatd, "gateway_off_link", "warning")
    assert one["evidence"] == [
        "route 172.7.22.0/24 via 10.99.0.22 dev eth0 onlink",
        "eth0 is on 10.4.7.0/24, fd00:4:7::/64, fe80::/64",
    ]
    assert calls(nft_lab) == NEITHER


def test_no_route_to_any_other_node_is_no_fault(node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "route", "del", "172.7.22.0/24")
    one = only(snatd, "no_routes", "info")
    assert one["evidence"] == ["172.7.0.0/16 is FLANNEL_NETWORK"]


def test_a_network_of_one_node(node: Node, snatd: Snatd) -> None:
    node.host.run("ip", "route", "add", "172.0.0.0/8", "via", "10.4.7.22")
    node.write_lease("172.7.21.0/24")
    applied(node, snatd.folder / "again")
    assert found(snatd, 0) == {}


def test_a_configured_network_by_the_default_route(node: Node, tmp_path: Path) -> None:
    with Snatd(node.host, tmp_path / "more", networks=["203.0.113.0/24"]) as snatd:
        assert snatd.command("apply").returncode == 0
        one = only(snatd, "no_routes", "info")
        assert one["evidence"] == ["203.0.113.0/24 is one of `networks` in snatd.toml"]
        assert seen_by_udp(node.container, OUTSIDE, 0.3) is None
        (line,) = one["remedy"]
        command = line.removeprefix("# on the router there: ").replace("THIS_NODE", node.address)
        assert command == "ip -4 route add 172.7.21.0/24 via 10.4.7.21"


def test_a_route_that_leads_to_the_wrong_node(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """A lease that has moved: who is asked is there, and does not know these containers."""
    other = nft_lab.nodes[1]
    node.host.run("ip", "route", "replace", other.subnet, "via", "10.4.7.100")
    assert seen_by(node.container, other.container_address, 0.4) is None
    one = only(snatd, "subnet_silent", "info")
    assert one["evidence"][0] == "route 172.7.22.0/24 via 10.4.7.100 dev eth0"
    assert seen_by(node.container, "172.7.22.3", 0.4) is None
    assert len(only(snatd, "subnet_silent", "warning")["evidence"]) == 3
    # As a restarted flanneld does.
    node.host.run("ip", "route", "replace", other.subnet, "via", other.address)
    assert seen_by(node.container, other.container_address) == node.container_address
    assert found(snatd, 0) == {}


def test_nobody_in_an_exempted_network_knows_the_way_back(
    nft_lab: Lab, node: Node, tmp_path: Path
) -> None:
    with Snatd(node.host, tmp_path / "more", networks=["203.0.113.0/24"]) as snatd:
        assert snatd.command("apply").returncode == 0
        node.host.run("ip", "route", "add", "203.0.113.0/24", "via", "10.4.7.100")
        assert found(snatd, 0) == {}
        assert seen_by(node.container, OUTSIDE, 0.4) is None
        one = only(snatd, "no_way_back", "warning")
        assert one["evidence"][0] == "203.0.113.0/24 is one of `networks` in snatd.toml"
        assert f"src=172.7.21.2 dst={OUTSIDE} " in one["evidence"][1]
        command = one["remedy"][0].removeprefix("# on the router there: ")
        nft_lab.outside.shell(command.replace("THIS_NODE", node.address))
        assert seen_by(node.container, OUTSIDE) == node.container_address
        assert found(snatd, 0) == {}


@pytest.mark.parametrize("protocol", ["tcp", "udp", "from outside"])
def test_a_subnet_that_is_talked_to_by_the_default_route(
    nft_lab: Lab, node: Node, snatd: Snatd, protocol: str
) -> None:
    other = nft_lab.nodes[1]
    node.host.shell("ip route del 172.7.22.0/24; ip route add 172.7.23.0/24 via 10.4.7.22")
    if protocol == "from outside":
        assert seen_by(other.container, node.container_address, 0.4) is None
    elif protocol == "tcp":
        assert seen_by(node.container, other.container_address, 0.4) is None
    else:
        assert seen_by_udp(node.container, other.container_address, 0.4) is None
    one = only(snatd, "default_route_taken")
    assert one["evidence"][0] == "route default via 10.4.7.100 dev eth0"
    assert other.container_address in one["evidence"][1]
    assert one["remedy"][1] == "# or: ip -4 route add 172.7.22.0/24 via NODE"
    node.host.run("ip", "route", "add", "172.7.22.0/24", "via", other.address)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_an_answer_by_way_of_the_default_router(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """As on a cloud whose router knows where each node's containers are."""
    other = nft_lab.nodes[1]
    nft_lab.outside.shell(
        "echo 1 > /proc/sys/net/ipv4/ip_forward; ip route add 172.7.21.0/24 via 10.4.7.21;"
        "ip route add 172.7.22.0/24 via 10.4.7.22"
    )
    for one in nft_lab.nodes:
        one.host.shell(f"ip route del 172.7.{43 - one.number}.0/24")
    assert connected(nft_lab)
    assert seen_by(node.container, other.container_address) == node.container_address
    only(snatd, "no_routes", "info")


def second_link(lab: Lab, prefix: str) -> None:
    """eth1 on both nodes, to a link of its own or to the same."""
    same = prefix == "10.4.7"
    if not same:
        lab.lan.shell("ip link add br1 type bridge mcast_snooping 0; ip link set br1 up")
    for node in lab.nodes:
        lab.lan.shell(
            f"ip link add w{node.number} type veth peer name eth1 netns {node.host.pid};"
            f"ip link set w{node.number} master {'br0' if same else 'br1'} up"
        )
        node.host.shell(
            f"ip link set eth1 up; ip addr add {prefix}.{node.number + 10 * same}/24 dev eth1"
        )


def test_strict_reverse_path_on_a_second_link(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """The neighbour sends by the second link, the route back leads by the first."""
    other = nft_lab.nodes[1]
    second_link(nft_lab, "10.4.8")
    other.host.run("ip", "route", "replace", node.subnet, "via", "10.4.8.21")
    assert connected(nft_lab)
    assert found(snatd, 0) == {}
    node.host.shell("echo 1 > /proc/sys/net/ipv4/conf/eth1/rp_filter")
    assert calls(nft_lab) == NEITHER
    one = only(snatd, "reverse_path_filter", "info")
    assert one["evidence"][:3] == [
        "route 172.7.22.0/24 via 10.4.7.22 dev eth0",
        "net/ipv4/conf/all/rp_filter = 0",
        "net/ipv4/conf/eth1/rp_filter = 1",
    ]
    assert "IPReversePathFilter" in one["evidence"][3]
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


@pytest.mark.parametrize("where", ["all", "eth1"])
def test_strict_reverse_path_where_the_neighbour_was_met(
    nft_lab: Lab, node: Node, snatd: Snatd, where: str
) -> None:
    """Both links in one LAN; the nodes meet by the second, the routes name the first."""
    other = nft_lab.nodes[1]
    second_link(nft_lab, "10.4.7")
    node.host.shell(
        "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore;"
        "ip route del 10.4.7.0/24 dev eth0;"
        "ip route replace 172.7.22.0/24 via 10.4.7.22 dev eth0 onlink;"
        f"echo 1 > /proc/sys/net/ipv4/conf/{where}/rp_filter"
    )
    other.host.run("ip", "route", "replace", node.subnet, "via", "10.4.7.31")
    assert calls(nft_lab)[1] is False
    one = only(snatd, "reverse_path_filter")
    assert any(line.startswith("neighbour 10.4.7.22 dev eth1") for line in one["evidence"])
    mend(node, one)
    assert until(lambda: calls(nft_lab)[1], "the neighbour is heard")
    assert "reverse_path_filter" not in found(snatd, 0)


def test_strict_reverse_path_that_does_no_harm(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    for device in ("all", "eth0", "docker0"):
        node.host.shell(f"echo 1 > /proc/sys/net/ipv4/conf/{device}/rp_filter")
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


@pytest.fixture
def sibling(nft_lab: Lab) -> Iterator[Namespace]:
    """Another container on the first node."""
    host = Namespace()
    add_container(nft_lab.nodes[0], host, 3)
    server = WhoServer(host, "172.7.21.3")
    yield host
    server.close()
    host.close()


def add_container(node: Node, host: Namespace, number: int) -> None:
    node.host.shell(
        f"ip link add veth{number} type veth peer name eth{number} netns {host.pid};"
        f"ip link set veth{number} master docker0 up"
    )
    host.shell(
        f"ip addr add 172.7.21.{number}/24 dev eth{number}; ip link set eth{number} up;"
        f"ip route replace default via 172.7.21.1"
    )


SIBLING = "172.7.21.3"


@pytest.mark.usefixtures("sibling")
def test_rules_drop_what_stays_behind_the_bridge(node: Node, snatd: Snatd) -> None:
    dockers_rules(node, accept=True)
    assert seen_by_udp(node.container, SIBLING) == node.container_address
    inside = "-i docker0 -o docker0 -j ACCEPT"
    node.host.run("iptables", "-D", "FORWARD", *inside.split(" "))
    node.host.run("iptables", "-D", "DOCKER-USER", "1")
    words = "-s 172.7.0.0/16 ! -i docker0 -j ACCEPT"
    node.host.run("iptables", "-I", "DOCKER-USER", *words.split(" "))
    assert seen_by_udp(node.container, SIBLING, 0.4) is None
    one = only(snatd, "bridge_dropped")
    assert one["evidence"] == [
        "net.bridge.bridge-nf-call-iptables = 1",
        "ip filter FORWARD policy drop",
    ]
    mend(node, one)
    assert until(
        lambda: seen_by_udp(node.container, SIBLING) == node.container_address, "the sibling"
    )
    assert found(snatd, 0) == {}


@pytest.mark.usefixtures("sibling")
def test_docker_was_told_to_keep_containers_apart(node: Node, snatd: Snatd) -> None:
    words = "-i docker0 -o docker0 -j DROP"
    node.host.run("iptables", "-A", "FORWARD", *words.split(" "))
    assert seen_by_udp(node.container, SIBLING, 0.4) is None
    only(snatd, "bridge_dropped", "info")
    node.host.shell("sysctl -w net.bridge.bridge-nf-call-iptables=0")
    assert until(lambda: seen_by_udp(node.container, SIBLING, 0.4), "the sibling")
    assert found(snatd, 0) == {}


@pytest.mark.usefixtures("sibling")
@pytest.mark.parametrize("of_the_bridge", [False, True])
def test_rules_hide_what_stays_behind_the_bridge(
    node: Node, snatd: Snatd, of_the_bridge: bool
) -> None:
    """The guard leaves alone what stays in the subnet, because of hairpin traffic."""
    if of_the_bridge:
        node.host.shell(
            "sysctl -w net.bridge.bridge-nf-call-iptables=0;"
            "ip link set docker0 type bridge nf_call_iptables 1"
        )
    node.host.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
    assert seen_by_udp(node.container, SIBLING) == "172.7.21.1"
    one = found(snatd)["bridge_snat"]
    assert "ip nat POSTROUTING rule 2: -j MASQUERADE" in one["evidence"]
    mend(node, one)
    if of_the_bridge:
        node.host.shell("ip link set docker0 type bridge nf_call_iptables 0")
    assert seen_by_udp(node.container, SIBLING) == node.container_address
    # The rule itself is still there: other nodes' containers are hidden from these by it.
    assert list(found(snatd)) == ["inbound_snat", "only_guarded"]


def test_dockers_hairpin_rules_hide_nobody(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    rule = "-s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE"
    node.host.run("iptables", "-t", "nat", "-A", "POSTROUTING", *rule.split(" "))
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def kube_proxy(node: Node) -> None:
    """A service at 10.96.0.10 with the sibling behind it."""
    chains = ("KUBE-SERVICES", "KUBE-SVC-1", "KUBE-SEP-1", "KUBE-POSTROUTING")
    rules = [
        'PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        f"KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport {PORT} -j KUBE-SVC-1",
        "KUBE-SVC-1 -j KUBE-SEP-1",
        f"KUBE-SEP-1 -p tcp -m tcp -j DNAT --to-destination {SIBLING}:{PORT}",
        "POSTROUTING -j KUBE-POSTROUTING",
        "KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "KUBE-POSTROUTING -j MASQUERADE",
    ]
    lines = ["*nat", *(f":{one} -" for one in chains), *(f"-A {one}" for one in rules)]
    node.host.run("iptables-restore", "--noflush", stdin="\n".join([*lines, "COMMIT", ""]))


def test_a_service_whose_answers_pass_by_the_rules(lab: Lab, tmp_path: Path) -> None:
    node = healthy(lab, tmp_path)
    sibling = Namespace()
    add_container(node, sibling, 3)
    server = WhoServer(sibling)
    kube_proxy(node)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        assert seen_by(node.container, "10.96.0.10") == node.container_address
        assert found(snatd, 0) == {}
        node.host.shell("echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables")
        assert seen_by(node.container, "10.96.0.10", 0.4) is None
        one = only(snatd, "bridge_not_asking", "warning")
        assert one["evidence"] == ["net.bridge.bridge-nf-call-iptables = 0"]
        mend(node, one)
        assert seen_by(node.container, "10.96.0.10") == node.container_address
        assert found(snatd, 0) == {}
    server.close()
    sibling.close()


def test_kube_proxy_of_nftables_mode(node: Node, snatd: Snatd) -> None:
    node.host.shell("nft add table ip kube-proxy; nft add chain ip kube-proxy services")
    assert found(snatd, 0) == {}
    node.host.shell("echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables")
    only(snatd, "bridge_not_asking", "warning")


def test_the_table_of_connections_is_nearly_full(node: Node, snatd: Snatd) -> None:
    most = int(node.host.run("sysctl", "-n", "net.netfilter.nf_conntrack_max"))
    fill_connections(node.host, int(most * 0.94))
    one = found(snatd)["connections_full"]
    assert one["severity"] == "warning"
    assert one["evidence"][0].endswith(f" entries, net.netfilter.nf_conntrack_max = {most}")
    assert f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}" in one["remedy"]
    node.host.run("conntrack", "-F")  # only the machine itself may have a larger one
    assert found(snatd, 0) == {}


def fill_connections(host: Namespace, number: int) -> None:
    """One after the other, each to another address of the loopback device."""
    with host.entered():
        caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with caller, server:
        server.bind(("", PORT))
        for one in range(number):
            destination = f"127.{1 + (one >> 16)}.{one >> 8 & 255}.{one & 255}"
            caller.sendto(b"", (destination, PORT))


@pytest.mark.parametrize(
    ("lacking", "says", "exit_code"), [("conntrack", "conntrack", 0), ("nft", "nft is not", 1)]
)
def test_a_tool_is_missing(
    node: Node, snatd: Snatd, tmp_path: Path, lacking: str, says: str, exit_code: int
) -> None:
    """Said, and no fault of the containers' way; but without nft there is no guard."""
    nothing = tmp_path / "nothing"
    nothing.touch(mode=0o644)
    node.host.run("mount", "--bind", str(nothing), f"/usr/sbin/{lacking}")
    one = found(snatd, exit_code)["not_looked" if lacking == "conntrack" else "rules_unread"]
    assert one["severity"] == "info"
    assert all(says in line for line in one["evidence"])


@pytest.mark.parametrize(
    ("script", "evidence", "severity"),
    [
        ("echo broken >&2; exit 1", "failed (exit 1): broken", "warning"),
        ("echo nonsense", "no connection: 'nonsense'", "warning"),
        ("exec sleep 60", "was not done after 3 s", "info"),
    ],
)
def test_a_tool_that_fails_or_hangs(
    node: Node, snatd: Snatd, tmp_path: Path, script: str, evidence: str, severity: str
) -> None:
    """The other checks go on; what a hanging list had not said by then is not waited for."""
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    node.host.run("mount", "--bind", str(broken), "/usr/sbin/conntrack")
    node.host.shell("echo 0 > /proc/sys/net/ipv4/ip_forward")
    all_found = found(snatd)
    assert list(all_found) == ["forwarding_off", "not_looked"]
    assert all_found["not_looked"]["severity"] == severity
    assert evidence in all_found["not_looked"]["evidence"][0]


def test_on_a_terminal_the_gravity_is_a_colour(node: Node, snatd: Snatd) -> None:
    node.host.shell("echo 0 > /proc/sys/net/ipv4/ip_forward")
    plain = snatd.command("doctor").stdout
    assert "\033" not in plain
    ours, theirs = pty.openpty()
    command = (*snatd.program, "doctor", "--config", str(snatd.config))
    environment = node.host.environment({"TERM": "xterm"})
    process = node.host.popen(*command, stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # what a terminal says when the other side is gone
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert process.wait(10) == 1
    first, *rest = plain.splitlines()
    assert shown.decode().splitlines() == [f"\033[1;31m{first}\033[0m", *rest]
    assert rest[-1] == "1 error"


def test_many_containers_and_what_a_look_takes(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    pods = Namespace()
    commands = [
        f"link add p{one} type veth peer name c{one} netns {pods.pid}\n"
        f"link set p{one} master docker0 up"
        for one in range(200)
    ]
    node.host.run("ip", "-batch", "-", stdin="\n".join(commands) + "\n")
    dockers_rules(node, accept=True)
    rules = [
        f"-A DOCKER -d 172.7.21.{one}/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT"
        for one in range(3, 250)
    ]
    node.host.run(
        "iptables-restore", "--noflush", stdin="\n".join(["*filter", *rules, "COMMIT", ""])
    )
    routes = [f"route add 172.7.{one}.0/24 via 10.4.7.22" for one in range(30, 250)]
    node.host.run("ip", "-batch", "-", stdin="\n".join(routes) + "\n")
    assert connected(nft_lab)
    assert found(snatd, 0) == {}
    pods.close()


def test_the_tunnel_is_switched_off(nft_lab: Lab, vxlan: Node, vxlan_snatd: Snatd) -> None:
    other = nft_lab.nodes[1]
    vxlan.host.run("ip", "link", "set", "flannel.1", "down")
    assert calls(nft_lab) == NEITHER
    one = found(vxlan_snatd)["overlay_down"]
    assert one["remedy"] == ["ip link set flannel.1 up", "systemctl restart flanneld"]
    vxlan.host.shell(one["remedy"][0])
    # Without flanneld only the tunnel's end is still there, which would stay unnoticed.
    assert calls(nft_lab) == NEITHER
    one = found(vxlan_snatd)["tunnel_incomplete"]
    assert one["evidence"] == [
        f"tunnel end {link_address(other)} dev flannel.1 dst 10.4.7.22, but no neighbour has that "
        "address"
    ]
    for command in (_NEIGHBOUR, _ROUTE):
        vxlan.host.shell(_filled(command, other))
    assert connected(nft_lab)
    assert found(vxlan_snatd, 0) == {}


def test_ufw_lets_pings_through(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    rules = [
        "FORWARD -j ufw-before-forward",
        "ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT",
        "ufw-before-forward -p tcp ! --syn -m conntrack --ctstate NEW -j DROP",
        "ufw-before-forward -j ufw-user-forward",
        "ufw-user-forward -s 172.7.21.0/24 -i docker0 -j ACCEPT",
    ]
    lines = ["*filter", ":FORWARD DROP", ":ufw-before-forward -", ":ufw-user-forward -"]
    script = "\n".join([*lines, *(f"-A {one}" for one in rules), "COMMIT", ""])
    node.host.run("iptables-restore", "--noflush", stdin=script)
    assert connected(nft_lab, how=OUT)
    one = only(snatd, "inbound_dropped")
    assert one["remedy"][-1] == (
        "# to last: ufw route allow from 172.7.0.0/16 to 172.7.21.0/24, and back"
    )
    mend(node, one)
    assert connected(nft_lab)
    assert found(snatd, 0) == {}


def test_firewalld(nft_lab: Lab, node: Node, snatd: Snatd) -> None:
    """The node's LAN is in its zone public, and docker0 in none: so in public too."""
    zone = "filter_FORWARD_public"
    node.host.run(
        *("nft", "-f", "-"),
        stdin=f"""table inet firewalld {{
            chain filter_PREROUTING {{
                type filter hook prerouting priority filter + 10; policy accept;
                icmpv6 type {{ nd-router-advert, nd-neighbor-solicit }} accept
                meta nfproto ipv6 fib saddr . mark . iif oif missing drop
            }}
            chain {zone}_deny {{ }}
            chain {zone} {{
                jump {zone}_deny
                reject with icmpx admin-prohibited
            }}
            chain filter_FORWARD_POLICIES {{
                iifname "docker0" oifname "eth0" accept
                iifname "eth0" jump {zone}
            }}
            chain filter_FORWARD {{
                type filter hook forward priority filter + 10; policy accept;
                ct state {{ established, related }} accept
                ct status dnat accept
                iifname "lo" accept
                ct state invalid drop
                ip6 daddr {{ ::/96, 2002:a00::/24 }} reject with icmpv6 addr-unreachable
                jump filter_FORWARD_POLICIES
            }}
        }}""",
    )
    node.write_lease(v6=True)
    applied(node, snatd.folder / "again")
    assert connected(nft_lab, how=OUT)
    assert connected(nft_lab, v6=True, how=OUT)
    all_found = json.loads(snatd.command("doctor", "--json").stdout)["findings"]
    assert [one["name"] for one in all_found] == ["inbound_dropped"] * 2
    for one in all_found:
        assert one["evidence"] == [
            f"inet firewalld {zone} rule 2 (as firewalld writes it): "
            "reject with icmpx admin-prohibited"
        ]
        assert "firewall-cmd --permanent --zone=trusted" in one["remedy"][-1]
        mend(node, one)
    assert connected(nft_lab)
    assert connected(nft_lab, v6=True)
    assert found(snatd, 0) == {}
