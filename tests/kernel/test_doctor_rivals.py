"""`snatd doctor` on what other programs write and are told to do: on nodes that really have the
fault, silent after its remedy, and on healthy ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGSTOP
from typing import Any

import pytest

from snatd import doctor_rivals
from snatd.core.word import Life
from snatd.host.status import StatusFile
from tests.kernel.test_guard import KUBE, _broken_nft
from tests.kernel.test_packets import NARROW, add, applied, rules
from tests.lab.netns import Namespace, until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import seen_by

BROAD = "-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"

# What Docker and kube-proxy have in a nat table besides, and are right to have.
USUAL = """
    iptables -t nat -N DOCKER
    iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
    iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
    iptables -t nat -A POSTROUTING -o docker0 -m addrtype --src-type LOCAL -j MASQUERADE
    iptables -t nat -A POSTROUTING -s 172.31.77.0/24 ! -o br-0123456789ab -j MASQUERADE
    iptables -t nat -A POSTROUTING -s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 \\
        -j MASQUERADE
    iptables -t nat -A DOCKER -i docker0 -j RETURN
    iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 \\
        -j DNAT --to-destination 172.7.21.2:80
"""
MASQ = "-m comment --comment 'flanneld masq'"
FLANNEL_OF_TODAY = f"""
    iptables -t nat -N FLANNEL-POSTRTG
    iptables -t nat -A POSTROUTING {MASQ} -j FLANNEL-POSTRTG
    iptables -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {MASQ} -j RETURN
    iptables -t nat -A FLANNEL-POSTRTG -s 172.7.21.0/24 -d 172.7.0.0/16 {MASQ} -j RETURN
    iptables -t nat -A FLANNEL-POSTRTG -s 172.7.0.0/16 -d 172.7.21.0/24 {MASQ} -j RETURN
    iptables -t nat -A FLANNEL-POSTRTG ! -s 172.7.0.0/16 -d 172.7.21.0/24 {MASQ} -j RETURN
    iptables -t nat -A FLANNEL-POSTRTG -s 172.7.0.0/16 ! -d 224.0.0.0/4 {MASQ} \\
        -j MASQUERADE --random-fully
    iptables -t nat -A FLANNEL-POSTRTG ! -s 172.7.0.0/16 -d 172.7.0.0/16 {MASQ} \\
        -j MASQUERADE --random-fully
"""
FLANNEL_OF_OLD = """
    iptables -t nat -A POSTROUTING -s 172.7.0.0/16 -d 172.7.0.0/16 -j RETURN
    iptables -t nat -A POSTROUTING -s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE
    iptables -t nat -A POSTROUTING ! -s 172.7.0.0/16 -d 172.7.21.0/24 -j RETURN
    iptables -t nat -A POSTROUTING ! -s 172.7.0.0/16 -d 172.7.0.0/16 -j MASQUERADE
"""


def own_etc(node: Node) -> Path:
    """An /etc of this node's own; where Docker's file is."""
    node.host.shell("cp -a /etc /run/etc; mount --bind /run/etc /etc")
    node.host.shell("rm -rf /etc/docker /etc/iptables /etc/sysconfig")
    node.host.shell("mkdir /etc/docker /etc/iptables /etc/sysconfig")
    return node.host.path("/etc/docker/daemon.json")


@pytest.fixture
def node(nft_lab: Lab, tmp_path: Path) -> Node:
    """A healthy node: what snatd keeps is in place."""
    node = nft_lab.nodes[0]
    node.write_lease()
    applied(node, tmp_path)
    return node


@pytest.fixture
def daemon_json(node: Node) -> Path:
    return own_etc(node)


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        yield snatd


# What the checks on others may find. One fault may be found by other checks too.
NAMES = {
    name
    for file in Path(doctor_rivals.__file__).parent.rglob("*.py")
    if file.stem
    in ("doctor", "doctor_rivals", "rivals", "flannel_rules", "docker", "programs", "boot")
    for name in re.findall(r'Finding\(\s*"(\w+)"', file.read_text())
}


def found(snatd: Snatd) -> dict[str, dict[str, Any]]:
    """Those findings by name."""
    done = snatd.command("doctor", "--json")
    everything = json.loads(done.stdout)["findings"]
    counts = any(one["severity"] != "info" for one in everything)
    assert (done.returncode, done.stderr) == (int(counts), "")
    return {one["name"]: one for one in everything if one["name"] in NAMES}


def silent(snatd: Snatd) -> None:
    done = snatd.command("doctor")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing found\n", "")


def only(snatd: Snatd, name: str, severity: str = "warning") -> dict[str, Any]:
    """The one finding that there is."""
    there = found(snatd)
    assert list(there) == [name]
    assert there[name]["severity"] == severity
    return there[name]


def heal(node: Node, one: dict[str, Any]) -> None:
    """What a finding says is to be done, typed into a shell on the node."""
    for line in one["remedy"]:
        if not line.startswith("#"):
            node.host.shell(line)


# The healthy ones.


@pytest.mark.parametrize("flannel", ["", FLANNEL_OF_TODAY, FLANNEL_OF_OLD])
def test_a_healthy_node_with_all_that_is_usual(lab: Lab, tmp_path: Path, flannel: str) -> None:
    node = lab.nodes[0]
    daemon_json = own_etc(node)
    daemon_json.write_text(
        '{"bip": "172.7.21.1/24", "ip-masq": %s}' % ("false" if flannel else "true")
    )
    node.write_lease(ipmasq=bool(flannel))
    node.host.shell(KUBE.format(mark="0x4000") + USUAL + flannel)
    docker(node.host, "-H", "fd://", "--containerd=/run/containerd/containerd.sock")
    node.host.program("kube-proxy", "--cluster-cidr=172.7.0.0/16", "--masquerade-all=false")
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        until(lambda: snatd.status()["in_sync"], "in sync")
        silent(snatd)
        assert snatd.stop() == 0
        silent(snatd)


def test_it_reads_only(nft_lab: Lab, tmp_path: Path) -> None:
    """On a node where nobody has written a rule, nor a file."""
    node = nft_lab.nodes[0]
    node.write_lease()
    own_etc(node)

    def all_there_is() -> str:
        ours = str(tmp_path)
        listed = f"find /run /etc {ours} -printf '%p %s %C@\\n' | grep -v '^/run/user' | sort"
        return node.host.shell(f"nft list ruleset; cat /proc/net/ip*_tables_names; {listed}")

    with Snatd(node.host, tmp_path) as snatd:
        before = all_there_is()
        assert set(found(snatd)) == {"no_egress", "guard_missing", "not_running"}
        assert all_there_is() == before


def test_without_a_lease(host: Namespace, tmp_path: Path) -> None:
    docker(host, "--bip=172.7.21.1/24")
    with Snatd(host, tmp_path) as snatd:
        assert found(snatd) == {}


# Rules.


def test_dockers_rule(lab: Lab, tmp_path: Path, backend: str) -> None:
    node, neighbour = lab.nodes
    node.write_lease()
    own_etc(node)
    dockerd = docker(node.host)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert seen_by(node.container, neighbour.container_address) == node.address
    with Snatd(node.host, tmp_path) as snatd:
        there = found(snatd)
        assert set(there) == {"broad_rule", "guard_missing", "not_running"}
        one = there["broad_rule"]
        assert one["severity"] == "error"
        assert one["evidence"] == [
            f"iptables-{backend} -t nat: -A POSTROUTING {BROAD} (as Docker writes it)",
            f"dockerd (pid {dockerd.pid}): --ip-masq is not given, so it is on",
        ]
        cure, source = one["remedy"]
        assert cure == "snatd apply"
        assert source.startswith("# if Docker writes it again and again")
        assert '"ip-masq": false' in source
        assert snatd.command("apply").returncode == 0
        silent(snatd)
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        assert found(snatd)["broad_rule"]["severity"] == "warning"
        assert seen_by(node.container, neighbour.container_address) == node.container_address


def test_in_mode_observe_the_mode_is_the_remedy(node: Node, snatd: Snatd) -> None:
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    snatd.write_config(mode="observe")
    assert 'mode = "enforce"' in found(snatd)["broad_rule"]["remedy"][0]


def test_what_is_snatds_own(node: Node, snatd: Snatd) -> None:
    add(node, "-F", "POSTROUTING")
    one = found(snatd)["no_egress"]
    assert one["severity"] == "error"
    assert one["remedy"] == ["snatd apply"]
    assert snatd.command("apply").returncode == 0
    silent(snatd)
    add(node, "-A", "POSTROUTING", *NARROW.split())
    one = found(snatd)["stale_rule"]
    assert one["evidence"] == [f"- -A POSTROUTING {NARROW}"]
    assert snatd.command("apply").returncode == 0
    silent(snatd)
    node.host.run("nft", "delete", "table", "ip", "snatd")
    one = found(snatd)["guard_missing"]
    assert "snat to ip saddr" in " ".join(one["evidence"])
    assert snatd.command("apply").returncode == 0
    silent(snatd)


EVIL = """it's "$(touch /run/owned)" `touch /run/owned` \\ ; touch /run/owned"""


def test_rules_that_hide_where_there_is_no_guard(node: Node, snatd: Snatd, nft_lab: Lab) -> None:
    snatd.write_config(guard="off")
    assert snatd.command("apply").returncode == 0
    silent(snatd)
    add(node, "-A", "POSTROUTING", "-m", "comment", "--comment", EVIL, "-j", "MASQUERADE")
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.address
    there = found(snatd)
    assert set(there) == {"can_snat", "inbound_snat"}
    one = there["can_snat"]
    assert one["severity"] == "error"
    assert one["evidence"][0].startswith("ip nat POSTROUTING rule 2: -m comment --comment ")
    for _ in range(2):
        heal(node, one)
    assert not node.host.path("/run/owned").exists()
    unmarked = "-m mark --mark 0x0/0x6000"
    kept = f"-s 172.7.21.0/24 -d 172.7.0.0/16 ! -o docker0 {unmarked} -j ACCEPT"
    assert rules(node)[:2] == [kept, NARROW]
    assert len(rules(node)) == 3
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.container_address
    only_for_others(snatd)
    node.host.shell("iptables -t nat -D POSTROUTING 1; iptables -t nat -D POSTROUTING 2")
    silent(snatd)
    add(node, "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    one = only(snatd, "can_snat")
    assert one["evidence"] == ["ip nat POSTROUTING rule 2: -o eth0 -j MASQUERADE, where `-o eth0`"]
    heal(node, one)
    silent(snatd)


def test_the_same_on_legacy(lab: Lab, tmp_path: Path, backend: str) -> None:
    node = lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path, guard="off") as snatd:
        assert snatd.command("apply").returncode == 0
        add(node, "-A", "POSTROUTING", "-m", "comment", "--comment", EVIL, "-j", "MASQUERADE")
        one = found(snatd)["can_snat"]
        assert one["severity"] == "error"
        guard, keep = one["remedy"]
        assert guard.startswith('# guard = "auto" in snatd.toml')
        assert keep.startswith(f"iptables-{backend} -t nat -D POSTROUTING -s 172.7.21.0/24 ")
        heal(node, one)
        only_for_others(snatd)


def only_for_others(snatd: Snatd) -> None:
    """What a rule without any match does on the bridge is not cluster traffic, and what it does to
    that of other nodes is not this node's: told apart from it."""
    done = snatd.command("doctor", "--json")
    names = [one["name"] for one in json.loads(done.stdout)["findings"]]
    assert sorted(names) == ["bridge_snat", "inbound_snat"]


INBOUND = {
    "-s 172.7.0.0/16 -j MASQUERADE": "error",
    "-o docker0 -j MASQUERADE": "error",
    "-d 172.7.21.0/24 -j SNAT --to-source 172.7.21.1": "error",
    "-m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT": "error",
    "-d 172.7.21.2/32 -j MASQUERADE": "warning",
}


@pytest.mark.parametrize("rule", INBOUND)
def test_a_rule_that_hides_other_nodes_containers(
    node: Node, snatd: Snatd, nft_lab: Lab, rule: str
) -> None:
    """The guard is for what this node's send. Whose rule it is decides of what they are sent."""
    other = nft_lab.nodes[1]
    assert seen_by(other.container, node.container_address) == other.container_address
    node.host.shell("iptables -t nat -N IP-MASQ-AGENT")
    for text in ("-d 10.0.0.0/8 -j RETURN", "-j MASQUERADE"):
        node.host.shell(f"iptables -t nat -A IP-MASQ-AGENT {text}")
    add(node, "-A", "POSTROUTING", *rule.split(" "))
    assert seen_by(other.container, node.container_address) == "172.7.21.1"
    assert seen_by(node.container, other.container_address) == node.container_address
    one = found(snatd)["inbound_snat"]
    assert one["severity"] == INBOUND[rule]
    where = "IP-MASQ-AGENT rule 2" if "AGENT" in rule else "POSTROUTING rule 2"
    assert where in one["evidence"][0]
    (remedy,) = one["remedy"]
    assert "nonMasqueradeCIDRs" in remedy if "AGENT" in rule else where in remedy
    assert "ip-masq" not in remedy
    node.host.shell(f"iptables -t nat -D POSTROUTING {rule}")
    silent(snatd)


def test_rules_that_only_the_guard_makes_harmless(node: Node, snatd: Snatd) -> None:
    for pod in range(2, 14):
        node.host.shell(
            f"iptables -t nat -N CNI-{pod:024x}\n"
            f"iptables -t nat -A CNI-{pod:024x} ! -d 224.0.0.0/4 -j MASQUERADE\n"
            f"iptables -t nat -A POSTROUTING -s 172.7.21.{pod}/32 -j CNI-{pod:024x}\n"
        )
    add(node, "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    one = only(snatd, "only_guarded", "info")
    assert len(one["evidence"]) == 9
    assert one["evidence"][-1] == "and 5 more"
    assert "(as CNI bridge writes it)" in one["evidence"][0]
    assert "/etc/cni/net.d" in one["remedy"][0]
    assert one["remedy"][1].startswith("# nothing, as long as the guard stands: ip nat POSTROUT")
    assert one["says"] == "without the guard 13 rules could hide containers of 172.7.21.0/24"
    assert snatd.command("doctor").returncode == 0


def test_docker_is_not_told_what_it_does_not_do(
    node: Node, snatd: Snatd, daemon_json: Path
) -> None:
    """A rule in Docker's form may be anybody's."""
    node.host.shell("iptables -t nat -A POSTROUTING -s 172.7.0.0/16 ! -o docker0 -j MASQUERADE")
    docker(node.host, "--bip=172.7.21.1/24", iptables="iptables-nft")
    for ip_masq, says in ((True, '"ip-masq": false into'), (False, "# nothing, as long as")):
        daemon_json.write_text(json.dumps({"ip-masq": ip_masq}))
        assert says in found(snatd)["only_guarded"]["remedy"][0]


def test_a_chain_before_the_guard(node: Node, snatd: Snatd) -> None:
    node.host.run("nft", "add table inet early")
    chain = "add chain inet early nat { type nat hook postrouting priority -199; }"
    node.host.run("nft", chain)
    one = only(snatd, "before_guard")
    assert one["evidence"] == ["nat chain inet early nat (priority -199)"]
    heal(node, one)
    node.host.run("nft", "delete chain inet early nat")
    node.host.run("nft", chain.replace("-199", "100"))
    silent(snatd)


def test_no_nft_at_all(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    node.host.run("mount", "--bind", str(empty), "/usr/sbin/nft")
    there = found(snatd)
    assert set(there) == {"no_guard", "rules_unread"}
    assert len(there["rules_unread"]["evidence"]) == 2  # of nat and of filter rules
    assert "nft is not installed" in there["no_guard"]["evidence"][0]
    assert there["no_guard"]["remedy"][0] == "apt-get install nftables"
    node.host.run("umount", "/usr/sbin/nft")
    silent(snatd)


@pytest.mark.parametrize("lists", [True, False])
def test_a_kernel_that_refuses_the_guard(nft_lab: Lab, tmp_path: Path, lists: bool) -> None:
    """It takes a try to know. The daemon tries."""
    node = nft_lab.nodes[0]
    node.write_lease()
    _broken_nft(node, tmp_path / "bin", lists)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        snatd.start()
        until(lambda: snatd.status()["in_sync"], "in sync")
        there = found(snatd)
        assert set(there) == ({"no_guard"} if lists else {"no_guard", "not_looked"})
        assert "Operation not supported" in there["no_guard"]["evidence"][0]
        assert "CONFIG_NFT_NAT" in there["no_guard"]["remedy"][0]
        snatd.write_config(guard="off")
        snatd.signal(SIGHUP)
        snatd.wait_for("configuration_loaded")
        assert "no_guard" not in found(snatd)


def test_a_mark_that_the_guard_does_not_know(node: Node, snatd: Snatd) -> None:
    node.host.shell(KUBE.format(mark="0x8000"))
    there = found(snatd)
    # What such a mark may lead to is not decided.
    assert set(there) == {"unknown_mark", "only_guarded"}
    one = there["unknown_mark"]
    assert one["evidence"] == [
        "ip nat KUBE-POSTROUTING: -m mark ! --mark 0x8000/0x8000 -j RETURN",
        "masquerade_marks = 0x2000, 0x4000",
    ]
    key, _, value = one["remedy"][0].removeprefix("# ").partition(" = ")
    snatd.write_config(**{key: json.loads(value.partition(" in ")[0])})
    assert snatd.command("apply").returncode == 0
    silent(snatd)


def test_the_mark_of_kube_proxys_nft_table(node: Node, snatd: Snatd) -> None:
    node.host.shell(
        "nft 'add table ip kube-proxy; "
        "add chain ip kube-proxy m; "
        "add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100; }; "
        "add rule ip kube-proxy nat-postrouting jump m; "
        "add rule ip kube-proxy m mark and 0x100 == 0 return; "
        "add rule ip kube-proxy m mark set mark xor 0x100; "
        "add rule ip kube-proxy m masquerade fully-random'"
    )
    there = found(snatd)
    assert "meta mark & 0x00000100" in there["unknown_mark"]["evidence"][0]
    node.host.run("nft", "delete table ip kube-proxy")
    silent(snatd)


def test_legacy_and_nft(node: Node, snatd: Snatd) -> None:
    # An empty legacy table, and one with nothing but a rule of snatd's, are no fault.
    add(node, "-A", "POSTROUTING", "-s", "192.0.2.0/24", "-j", "ACCEPT", command="iptables-legacy")
    add(node, "-D", "POSTROUTING", "1", command="iptables-legacy")
    add(node, "-A", "POSTROUTING", "-s", "192.0.2.0/24", "-j", "ACCEPT")
    silent(snatd)
    kube = ("-m", "comment", "--comment", "x", "-j", "RETURN")
    add(node, "-A", "POSTROUTING", *kube, command="iptables-legacy")
    one = only(snatd, "legacy_and_nft")
    assert one["evidence"] == [
        "iptables-nft -t nat: 1 rule of others in POSTROUTING, the first: "
        "-s 192.0.2.0/24 -j ACCEPT",
        "iptables-legacy -t nat: 1 rule of others in POSTROUTING, the first: "
        "-m comment --comment x -j RETURN",
    ]
    empty_after_a_save(node, one)
    silent(snatd)
    (saved,) = node.host.path("/run").glob("iptables-legacy-*.rules")
    assert "-A POSTROUTING -m comment --comment x -j RETURN" in saved.read_text()


def test_docker_in_legacy_and_kube_proxy_in_nft(lab: Lab, tmp_path: Path, backend: str) -> None:
    """snatd has narrowed the one rule that Docker had in nat POSTROUTING."""
    node = lab.nodes[0]
    node.write_lease()
    dockers, kube, other = (
        ("iptables-legacy -w 5", "iptables-nft", "nft")
        if backend == "legacy"
        else ("iptables-nft", "iptables-legacy -w 5", "legacy")
    )
    node.host.shell(
        f"{dockers} -t nat -A POSTROUTING {BROAD}; {dockers} -A FORWARD -i docker0 -j ACCEPT;"
        + KUBE.format(mark="0x4000").replace("iptables ", f"{kube} ")
    )
    with Snatd(node.host, tmp_path) as snatd:
        assert snatd.command("apply").returncode == 0
        one = only(snatd, "legacy_and_nft")
        assert sorted(line.partition(": ")[0] for line in one["evidence"]) == sorted(
            [f"iptables-{backend} -t filter", f"iptables-{other} -t nat"]
        )
        empty_after_a_save(node, one)
        silent(snatd)


def empty_after_a_save(node: Node, one: dict[str, Any]) -> None:
    """What the remedy types takes nothing away; that is for somebody who has restarted the rest."""
    save, why, *commands = one["remedy"]
    listing = "iptables-nft -S; iptables-nft -t nat -S; iptables-legacy-save | grep -v '^[#:]'"
    before = node.host.shell(listing)
    node.host.shell("\n".join(["HOME=/run", *one["remedy"]]))
    assert node.host.shell(listing) == before
    assert why.startswith("# restart what wrote them")
    assert all(line.startswith("# iptables-") for line in commands)
    assert save.endswith(".rules")
    for line in commands:
        node.host.shell(line.removeprefix("# "))


# flannel's rules.


def masquerading(node: Node, snatd: Snatd, flannel: str) -> None:
    """A healthy node whose egress is flannel's, without a guard, so that its rules decide."""
    node.write_lease(ipmasq=True)
    add(node, "-F", "POSTROUTING")
    node.host.shell(flannel)
    snatd.write_config(guard="off")
    assert snatd.command("apply").returncode == 0
    silent(snatd)


def test_flannels_rules_of_another_lease(node: Node, snatd: Snatd, nft_lab: Lab) -> None:
    masquerading(node, snatd, FLANNEL_OF_TODAY)
    node.host.shell("iptables -t nat -F FLANNEL-POSTRTG")
    build = FLANNEL_OF_TODAY.partition("FLANNEL-POSTRTG\n    iptables")[2].partition("\n")[2]
    node.host.shell(build.replace("172.7.21.0/24", "172.7.33.0/24"))
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.address
    there = found(snatd)
    assert set(there) == {"flannel_stale", "flannel_order"}
    stale, order = there["flannel_stale"], there["flannel_order"]
    assert stale["evidence"][0] == (
        "iptables-nft -t nat, rule 2: -A FLANNEL-POSTRTG -s 172.7.33.0/24 -d 172.7.0.0/16 "
        '-m comment --comment "flanneld masq" -j RETURN'
    )
    assert len(stale["evidence"]) == 4
    assert order["severity"] == "error"
    assert order["remedy"] == ["systemctl restart flanneld"]
    for line in stale["remedy"][:-1]:
        node.host.shell(line)
    assert set(found(snatd)) == {"flannel_order"}
    # A restarted flanneld makes its chain anew.
    node.host.shell(f"iptables -t nat -F FLANNEL-POSTRTG\n{build}")
    silent(snatd)
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.container_address


def test_old_flannels_rule_for_an_old_subnet(node: Node, snatd: Snatd) -> None:
    masquerading(node, snatd, FLANNEL_OF_OLD)
    node.host.shell("iptables -t nat -I POSTROUTING ! -s 172.7.0.0/16 -d 172.7.33.0/24 -j RETURN")
    one = only(snatd, "flannel_stale")
    node.host.shell(one["remedy"][0])
    silent(snatd)


@pytest.mark.parametrize(
    ("flannel", "chain", "comment", "copies"),
    [(FLANNEL_OF_TODAY, "FLANNEL-POSTRTG", MASQ, 1), (FLANNEL_OF_OLD, "POSTROUTING", "", 2)],
)
def test_flannels_rules_in_the_wrong_order(
    node: Node, snatd: Snatd, nft_lab: Lab, flannel: str, chain: str, comment: str, copies: int
) -> None:
    masquerading(node, snatd, flannel)
    rule = f"{chain} -s 172.7.0.0/16 ! -d 224.0.0.0/4 {comment} -j MASQUERADE"
    rule += " --random-fully" if comment else ""
    # Without the counters: iptables-nft 1.8.11 counts what a policy let pass, 1.8.9 does not.
    before = node.host.run("iptables", "-t", "nat", "-S")
    node.host.shell(f"iptables -t nat -D {rule}")
    node.host.shell(f"iptables -t nat -I {rule}\n" * copies)
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.address
    one = only(snatd, "flannel_order", "error")
    assert len(one["evidence"]) == copies + 1
    heal(node, one)
    silent(snatd)
    assert seen_by(node.container, nft_lab.nodes[1].container_address) == node.container_address
    # Each rule is there as often as before.
    after = node.host.run("iptables", "-t", "nat", "-S")
    assert sorted(after.splitlines()) == sorted(before.splitlines())


def test_with_the_guard_a_wrong_order_is_a_warning(node: Node, snatd: Snatd) -> None:
    node.write_lease(ipmasq=True)
    lines = FLANNEL_OF_OLD.splitlines()
    node.host.shell("\n".join([lines[2], lines[1]]))
    assert found(snatd)["flannel_order"]["severity"] == "warning"


@pytest.mark.parametrize("flannel", [FLANNEL_OF_TODAY, FLANNEL_OF_OLD])
def test_flannels_rules_twice(node: Node, snatd: Snatd, flannel: str) -> None:
    masquerading(node, snatd, flannel)
    again = flannel.replace("iptables -t nat -N FLANNEL-POSTRTG\n", "")
    node.host.shell(again)
    before = rules(node)
    there = found(snatd)
    assert set(there) == {"flannel_twice"}
    done = snatd.command("doctor", "--json")
    for one in json.loads(done.stdout)["findings"]:
        heal(node, one)
    silent(snatd)
    assert sorted(rules(node)) == sorted(set(before))


# Docker.


def test_a_daemon_json_that_docker_refuses(snatd: Snatd, daemon_json: Path) -> None:
    daemon_json.write_text('{"ip-masq": "no\\u001b[31m\033[31m"}')
    assert "Invalid control character" in only(snatd, "docker_config")["evidence"][0]
    daemon_json.write_text('{"ip-masq": "no\\u001b[31m"}')
    done = snatd.command("doctor")
    assert 'daemon.json: "ip-masq" is not true or false: "no\\u001b[31m"' in done.stdout
    assert "\033" not in done.stdout + done.stderr
    daemon_json.unlink()
    os.mkfifo(daemon_json)
    one = only(snatd, "docker_config")
    assert one["evidence"] == ["/etc/docker/daemon.json: not a regular file"]
    daemon_json.unlink()
    daemon_json.write_text('{"log-driver": "journald"}')
    silent(snatd)


def test_what_docker_is_told_twice(node: Node, snatd: Snatd, daemon_json: Path) -> None:
    daemon_json.write_text('{"bip": "172.7.21.1/24"}')
    dockerd = docker(node.host, "--bip", "172.7.21.1/24")
    one = only(snatd, "docker_config")
    assert one["evidence"] == [
        f"dockerd (pid {dockerd.pid}): --bip is given, and /etc/docker/daemon.json has "
        '"bip": "172.7.21.1/24"'
    ]
    daemon_json.write_text("{}")
    silent(snatd)


def docker(
    host: Namespace, *arguments: str, name: str = "dockerd", iptables: str = "iptables"
) -> subprocess.Popen[bytes]:
    """A process of its name, and what leads to its rules."""
    for table, chain in (("filter", "FORWARD"), ("nat", "PREROUTING")):
        command = f"{iptables} -w -t {table}"
        host.shell(
            f"{command} -S DOCKER || {{ {command} -N DOCKER; {command} -A {chain} -j DOCKER; }}"
        )
    return host.program(name, *arguments)


def restarted(
    node: Node, dockerd: subprocess.Popen[bytes], *arguments: str
) -> subprocess.Popen[bytes]:
    dockerd.kill()
    dockerd.wait()
    return docker(node.host, *arguments)


def test_somebody_removed_dockers_rules(lab: Lab, tmp_path: Path, backend: str) -> None:
    node = lab.nodes[0]
    node.write_lease()
    own_etc(node)
    tool = f"iptables-{backend}"
    other = {"nft": "iptables-legacy", "legacy": "iptables-nft"}[backend]
    with Snatd(node.host, tmp_path) as snatd:
        assert snatd.command("apply").returncode == 0
        # What the other backend has is left from before it was changed.
        before = docker(node.host, "--bip=172.7.21.1/24", iptables=other)
        one = found(snatd)["docker_other_tables"]
        assert one["says"].endswith(f" and the node's iptables writes to {backend} ones")
        assert "docker_rules_gone" not in found(snatd)
        before.kill()
        before.wait()
        dockerd = docker(node.host, "--bip=172.7.21.1/24", iptables=tool)
        assert "docker_rules_gone" not in found(snatd)
        node.host.shell(f"{tool} -F FORWARD")
        one = found(snatd)["docker_rules_gone"]
        assert one["severity"] == "warning"
        assert one["evidence"] == [
            f"dockerd (pid {dockerd.pid}): --iptables is not given, so it is on",
            "nothing in FORWARD leads to a chain of Docker's",
        ]
        node.host.shell(f"{tool} -t nat -F PREROUTING; {tool} -P FORWARD DROP")
        first, *_ = snatd.json("doctor")["findings"]
        assert (first["name"], first["severity"]) == ("docker_rules_gone", "error")
        assert first["evidence"][2] == "nothing in nat PREROUTING leads to a chain of Docker's"
        assert first["evidence"][3].endswith("FORWARD (priority 0) drops what no rule accepts")
        restarted(node, dockerd, "--bip=172.7.21.1/24", "--iptables=false")
        assert "docker_rules_gone" not in found(snatd)


@pytest.mark.usefixtures("daemon_json")
def test_docker_with_tables_of_its_own(node: Node, snatd: Snatd) -> None:
    """As Docker 29 writes them with "firewall-backend": "nftables"."""
    chains = {"filter-FORWARD": "filter hook forward", "nat-prerouting": "nat hook prerouting"}
    node.host.run("nft", "add table ip docker-bridges")
    for name, hook in chains.items():
        node.host.run("nft", f"add chain ip docker-bridges {name} {{ type {hook} priority 0; }}")
    node.host.program("dockerd", "--bip=172.7.21.1/24")
    silent(snatd)


def test_flannel_and_docker_both_masquerade(node: Node, snatd: Snatd, daemon_json: Path) -> None:
    node.write_lease(ipmasq=True)
    dockerd = docker(node.host)
    one = only(snatd, "two_masquerade")
    assert one["evidence"] == [
        "subnet.env: FLANNEL_IPMASQ=true",
        f"dockerd (pid {dockerd.pid}): --ip-masq is not given, so it is on",
    ]
    assert one["remedy"][0] == '# put "ip-masq": false into /etc/docker/daemon.json'
    daemon_json.write_text('{"ip-masq": true}')
    one = only(snatd, "two_masquerade")
    assert one["evidence"][1] == '/etc/docker/daemon.json: "ip-masq": true'
    daemon_json.write_text('{"ip-masq": false}')
    dockerd = restarted(node, dockerd)
    silent(snatd)
    daemon_json.unlink()
    dockerd = restarted(node, dockerd, "--ip-masq=true", "--bip=172.7.21.1/24")
    one = only(snatd, "two_masquerade")
    assert one["evidence"][1] == f"dockerd (pid {dockerd.pid}): --ip-masq=true"
    assert one["remedy"][0] == "# start dockerd with --ip-masq=false"
    restarted(node, dockerd, "--ip-masq=false", "--bip=172.7.21.1/24")
    silent(snatd)


@pytest.mark.usefixtures("daemon_json")
def test_docker_elsewhere_is_no_rival(node: Node, nft_lab: Lab, snatd: Snatd) -> None:
    """In another network namespace, with another bridge, without rules, or just the client."""
    node.write_lease(ipmasq=True)
    docker(nft_lab.nodes[1].host)
    docker(node.host, "-b", "none")
    docker(node.host, "--iptables=false", "--bip=172.7.21.1/24")
    node.host.program("docker", "run", "-d", "--ip-masq=true")
    silent(snatd)


@pytest.mark.usefixtures("daemon_json")
def test_neither_masquerades(node: Node, snatd: Snatd) -> None:
    docker(node.host, "daemon", "--ip-masq=0", "--bip=172.7.21.1/24", name="docker")
    one = only(snatd, "nobody_masquerades", "info")
    assert one["evidence"][0] == "subnet.env: FLANNEL_IPMASQ=false"


@pytest.mark.usefixtures("daemon_json")
def test_a_config_file_elsewhere(node: Node, snatd: Snatd) -> None:
    node.write_lease(ipmasq=True)
    config = node.host.path("/run/away/daemon.json")
    config.parent.mkdir()
    config.write_text('{"ip-masq": false}')
    docker(node.host, "--config-file", "/run/away/daemon.json")
    silent(snatd)
    # And one that only the process itself sees.
    hidden = node.host.popen(
        *("unshare", "--mount", "--propagation", "private", "sh", "-euc"),
        "cp /run/programs/dockerd /run/inside; mount -t tmpfs tmpfs /run/away; "
        "echo '{\"ip-masq\": true}' > /run/away/daemon.json; cp /run/inside /run/away/dockerd; "
        "exec /run/away/dockerd --config-file=/run/away/daemon.json",
    )
    try:
        until(lambda: Path(f"/proc/{hidden.pid}/comm").read_text() == "dockerd\n", "dockerd")
        one = only(snatd, "two_masquerade")
        assert one["evidence"][1] == '/run/away/daemon.json: "ip-masq": true'
    finally:
        hidden.kill()
        hidden.wait()
    silent(snatd)


def test_dockers_bip(node: Node, snatd: Snatd, daemon_json: Path) -> None:
    """docker0 is right as long as it is not made anew."""
    daemon_json.write_text('{"bip": "172.7.33.1/24"}')
    dockerd = docker(node.host)
    one = only(snatd, "docker_bip")
    assert one["evidence"] == [
        '/etc/docker/daemon.json: "bip": "172.7.33.1/24"',
        "subnet.env: FLANNEL_SUBNET=172.7.21.1/24",
    ]
    assert one["remedy"][0] == '# put "bip": "172.7.21.1/24" into /etc/docker/daemon.json'
    daemon_json.write_text('{"bip": "172.7.21.1/24"}')
    silent(snatd)
    daemon_json.write_text("{}")
    restarted(node, dockerd, "--bip", "nonsense\033[31m")
    one = only(snatd, "docker_bip")
    assert one["remedy"][0] == "# start dockerd with --bip=172.7.21.1/24"
    assert "\033" not in snatd.command("doctor").stdout


@pytest.mark.usefixtures("daemon_json")
def test_dockers_bip_while_nothing_carries_the_lease(node: Node, snatd: Snatd) -> None:
    node.host.shell("ip addr del 172.7.21.1/24 dev docker0; ip addr add 172.17.0.1/16 dev docker0")
    dockerd = docker(node.host)
    assert found(snatd)["docker_bip"]["severity"] == "warning"
    restarted(node, dockerd, "--bip=172.7.33.1/24")
    assert found(snatd)["docker_bip"]["severity"] == "error"
    # With Kubernetes another bridge gets it, and Docker's is not flannel's business.
    kubelet = node.host.program("kubelet")
    assert "docker_bip" not in found(snatd)
    kubelet.kill()
    kubelet.wait()
    node.host.shell("ip addr flush dev docker0; ip addr add 172.7.21.1/24 dev docker0")
    node.host.shell("ip route add 172.7.22.0/24 via 10.4.7.22 || true")
    assert found(snatd)["docker_bip"]["severity"] == "warning"


def test_networks_of_dockers_inside_the_clusters(node: Node, snatd: Snatd) -> None:
    node.host.shell(
        "ip link add br-0123456789ab type bridge; ip addr add 172.7.99.1/24 dev br-0123456789ab; "
        "ip link add br-ffffffffffff type bridge; ip addr add 172.18.0.1/16 dev br-ffffffffffff"
    )
    one = found(snatd)["docker_network"]
    assert one["evidence"][0] == "br-0123456789ab carries 172.7.99.1/24"
    assert one["remedy"][1] == "# if nothing needs it: docker network rm 0123456789ab"
    node.host.run("ip", "link", "del", "br-0123456789ab")
    assert snatd.command("apply").returncode == 0
    silent(snatd)


# kube-proxy, flanneld, snatd.


def test_kube_proxy(node: Node, snatd: Snatd) -> None:
    proxy = node.host.program("kube-proxy", "--masquerade-all", "--cluster-cidr", "10.244.0.0/16")
    there = found(snatd)
    assert there["masquerade_all"]["evidence"] == [
        f"kube-proxy (pid {proxy.pid}): masquerade-all is true"
    ]
    assert there["cluster_cidr"]["evidence"][1] == "this node's subnet is 172.7.21.0/24"
    assert there["cluster_cidr"]["remedy"] == [
        "# start kube-proxy with --cluster-cidr=172.7.0.0/16"
    ]
    proxy.kill()
    proxy.wait()
    config = node.host.path("/run/config.conf")
    config.write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nclusterCIDR: 10.244.0.0/16,fd00::/8\n"
        'detectLocalMode: ""\niptables:\n  masqueradeAll: true\n  masqueradeBit: null\n'
    )
    # The file counts, the arguments do not.
    node.host.program("kube-proxy", "--config=/run/config.conf", "--cluster-cidr=172.7.0.0/16")
    assert set(found(snatd)) == {"masquerade_all", "cluster_cidr"}
    config.write_text("clusterCIDR: 172.0.0.0/8\niptables:\n  masqueradeAll: false\n")
    silent(snatd)
    config.write_text("clusterCIDR: 10.244.0.0/16\ndetectLocalMode: NodeCIDR\n")
    silent(snatd)


def test_a_lease_older_than_flanneld(node: Node, snatd: Snatd) -> None:
    lease = node.host.path("/run/flannel/subnet.env")
    old_s = time.time() - 120
    os.utime(lease, (old_s, old_s))
    silent(snatd)  # it has just begun
    until(lambda: "lease_old" in found(snatd), "the finding", 20)
    one = only(snatd, "lease_old")
    assert node.flanneld is not None
    assert f"flanneld (pid {node.flanneld.pid}) started" in one["evidence"][0]
    node.write_lease()
    silent(snatd)


def test_a_lease_older_than_the_boot(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    lease = node.host.path("/run/flannel/subnet.env")
    # What lies in memory cannot be: the clock was wrong.
    os.utime(lease, (1, 1))
    silent(snatd)
    copy = tmp_path / "subnet.env"
    copy.write_text(lease.read_text())
    snatd.write_config(subnet_file=str(copy))
    silent(snatd)
    os.utime(copy, (1, 1))
    one = only(snatd, "lease_old")
    assert "days ago, and this node booted" in one["evidence"][0]


def test_flanneld(node: Node, snatd: Snatd) -> None:
    assert node.flanneld is not None
    node.flanneld.kill()
    node.flanneld.wait()
    one = only(snatd, "flanneld_missing", "info")
    (remedy,) = one["remedy"]
    assert remedy.startswith("systemctl start flanneld")
    k3s = node.host.program("k3s-server")
    silent(snatd)
    k3s.kill()
    k3s.wait()
    node.host.program("flanneld", "-ip-masq", "-subnet-file=/run/elsewhere.env")
    one = only(snatd, "other_subnet_file")
    assert one["evidence"][1] == "subnet_file = /run/flannel/subnet.env"


def test_two_snatd(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    snatd.start()
    silent(snatd)
    with Snatd(node.host, tmp_path / "two", runtime_dir="/run/two") as two:
        two.start()
        one = only(snatd, "several_snatd")
        assert [line.split(":")[0] for line in one["evidence"]] == [
            f"snatd (pid {pid})" for pid in sorted((snatd.pid, two.pid))
        ]
        two.stop()
        silent(snatd)


def test_a_daemon_that_does_not_answer(node: Node, snatd: Snatd) -> None:
    snatd.start()
    silent(snatd)
    snatd.signal(SIGSTOP)
    file = StatusFile(node.host.path("/run/snatd"))
    until(lambda: file.word().life is Life.STOPPED, "the stop")
    one = only(snatd, "not_answering")
    assert f"pid {snatd.pid} - its process was stopped by a signal" in one["evidence"][0]
    snatd.signal(SIGCONT)
    silent(snatd)


def test_a_daemon_that_was_killed(snatd: Snatd) -> None:
    """Nothing is to be done yet, and nobody will do it."""
    snatd.start()
    silent(snatd)
    snatd.process.kill()
    snatd.process.wait()
    one = only(snatd, "not_running")
    assert f"pid {snatd.pid} - it was killed, or it crashed" in one["evidence"][0]
    snatd.start()
    silent(snatd)


def test_a_fight(node: Node, snatd: Snatd) -> None:
    """`snatd status` exits 1 then; the rules may be right at this moment."""
    snatd.start()
    rival = node.host.popen(
        *("sh", "-c", f"while :; do iptables -t nat -I POSTROUTING {BROAD}; sleep 0.1; done")
    )
    try:
        until(lambda: snatd.status()["fights"]["now"], "a fight", 30)
        one = found(snatd)["fighting"]
        assert one["evidence"][0].startswith("iptables (pid ")
    finally:
        rival.kill()
        rival.wait()


def test_a_configuration_that_the_daemon_refused(snatd: Snatd) -> None:
    snatd.start()
    good = snatd.config.read_text()
    snatd.config.write_text("mode = 'watch'\n")
    snatd.signal(SIGHUP)
    snatd.wait_for("configuration_refused")
    until(lambda: snatd.status()["configuration_refused"], "the word of it")
    assert "'watch' is none of" in found(snatd)["configuration_wrong"]["evidence"][0]
    # The other keys count, among them where the daemon's word is.
    snatd.config.write_text(good + 'mode = "watch"\nunheard_of = "x"\n')
    one = only(snatd, "configuration_wrong", "error")
    assert [where.split(":")[1] for where in one["evidence"]] == [" mode", " unheard_of"]
    snatd.config.write_text(good)
    one = only(snatd, "configuration_refused")
    assert "'watch' is none of" in one["evidence"][0]
    snatd.signal(SIGHUP)
    until(lambda: not snatd.status()["configuration_refused"], "the good one")
    silent(snatd)


def test_a_fight_for_the_guard(lab: Lab, tmp_path: Path) -> None:
    """What it hides is counted from the beginning to the end, and not from each repair."""
    node, neighbour = lab.nodes
    node.write_lease()
    add(node, "-A", "POSTROUTING", "-s", "172.7.0.0/16", "-j", "MASQUERADE")
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        rival = node.host.popen(
            "sh", "-c", "while :; do nft delete table ip snatd 2>/dev/null; sleep 0.05; done"
        )
        try:
            until(lambda: snatd.status()["fights"]["now"], "a fight", 30)
            assert "it undoes each repair, the guard too" in snatd.status()["told"]
            assert "undone again and again" in snatd.command("status").stdout
            (fight,) = snatd.wait_for("fighting")
            assert fight["guard"].startswith("undone as well")

            def hidden() -> Any:
                seen_by(node.container, neighbour.container_address)
                counted = snatd.status()["flows"]
                return counted and counted[0]["changed_since"] and counted[0]

            first = until(hidden, "the hidden ones", 60)
            until(lambda: hidden()["changed_since"] > first["changed_since"], "more of them", 60)
            assert hidden()["since"] == first["since"]
        finally:
            rival.kill()
            rival.wait()


def test_networks_that_are_excluded_in_vain(snatd: Snatd) -> None:
    snatd.write_config(exclude=["172.9.0.0/16", "172.7.40.0/24", "fd00::/8"])
    one = found(snatd)["exclude_in_vain"]
    assert one["evidence"] == ["exclude: 172.9.0.0/16", "the networks: 172.7.0.0/16"]


@pytest.mark.usefixtures("daemon_json")
def test_programs_that_come_and_go(node: Node, snatd: Snatd) -> None:
    docker(node.host, "--bip=172.7.21.1/24")
    rival = node.host.popen(
        "sh",
        "-c",
        "cp /bin/true /run/programs/kube-proxy; while :; do /run/programs/kube-proxy "
        "--cluster-cidr=172.7.0.0/16; done",
    )
    try:
        for _ in range(5):
            silent(snatd)
    finally:
        rival.kill()
        rival.wait()


# What the next boot brings.


def test_frozen_chains(node: Node, snatd: Snatd) -> None:
    own_etc(node)
    node.host.shell(KUBE.format(mark="0x4000") + USUAL)
    file = node.host.path("/etc/iptables/rules.v4")
    node.host.shell("iptables-save > /etc/iptables/rules.v4")
    one = only(snatd, "frozen_chains")
    assert one["evidence"] == ["/etc/iptables/rules.v4: 2 chains: DOCKER, KUBE-POSTROUTING"]
    command = one["remedy"][0].split()
    assert command[0] == "snatd"
    assert snatd.command(*command[1:]).returncode == 0
    assert "KUBE" not in file.read_text()
    silent(snatd)
    snatd.write_config(saved_rules="off")
    node.host.shell("iptables-save > /etc/iptables/rules.v4")
    one = only(snatd, "frozen_chains")
    assert one["remedy"][0].startswith("# take them and the rules that jump to them out of ")


def test_a_service_that_saves_what_lives(node: Node, snatd: Snatd) -> None:
    own_etc(node)
    for family, key in (("iptables", "IPTABLES"), ("ip6tables", "IP6TABLES")):
        config = node.host.path(f"/etc/sysconfig/{family}-config")
        config.write_text(
            f'# {key}_SAVE_ON_STOP="yes"\n{key}_SAVE_ON_RESTART=yes\n'
            f'{key}_SAVE_ON_STOP="yes"\n{key}_SAVE_ON_STOP="no"\n'
        )
        one = only(snatd, "saves_live_rules")
        assert one["evidence"] == [
            f"/etc/sysconfig/{family}-config line 2: {key}_SAVE_ON_RESTART=yes"
        ]
        heal(node, one)
        silent(snatd)
        assert f'{key}_SAVE_ON_RESTART="no"\n' in config.read_text()


SAVED = "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING {}\nCOMMIT\n"


def test_a_saved_rule_that_hides(node: Node, snatd: Snatd) -> None:
    own_etc(node)
    file = node.host.path("/etc/iptables/rules.v4")
    file.write_text(SAVED.format(BROAD))
    one = only(snatd, "saved_broad_rule")
    assert one["evidence"] == [f"/etc/iptables/rules.v4: -A POSTROUTING {BROAD}"]
    assert one["remedy"] == ["snatd save"]
    assert snatd.command("save").returncode == 0
    silent(snatd)
    file.write_text(SAVED.format(BROAD))
    snatd.write_config(saved_rules="off")
    one = only(snatd, "saved_broad_rule")
    assert 'saved_rules = "auto"' in one["remedy"][0]
    snatd.write_config(saved_rules="auto")
    assert snatd.command("save").returncode == 0
    silent(snatd)


def test_a_saved_rule_in_a_file_that_does_not_load(node: Node, snatd: Snatd) -> None:
    own_etc(node)
    file = node.host.path("/etc/iptables/rules.v4")
    file.write_text(SAVED.format(BROAD).replace("COMMIT", "-A POSTROUTING --nonsense\nCOMMIT"))
    snatd.start()
    until(lambda: snatd.status()["saved_rules"], "a look at the file")
    one = found(snatd)["saved_broad_rule"]
    assert one["evidence"][1].startswith("the daemon leaves it alone: ")
    assert "nonsense" in one["evidence"][1]
    assert one["remedy"] == ["# mend that as it says, then:", "snatd save"]


def test_saved_files_that_are_not_understood(node: Node, snatd: Snatd) -> None:
    own_etc(node)
    file = node.host.path("/etc/iptables/rules.v4")
    for content, why in (
        ("*nat\n-A POSTROUTING -s 172.7.21.0/24 -j SNAT\033[31m\n", "has no COMMIT"),
        (SAVED.format("-s 172.7.21.0/24 --jump-to MASQUERADE"), "cannot read it for certain"),
    ):
        file.write_text(content)
        one = only(snatd, "saved_not_understood")
        assert why in one["evidence"][0]
        assert "\033" not in snatd.command("doctor").stdout
    file.unlink()
    os.mkfifo(file)
    assert "not a regular file" in only(snatd, "saved_not_understood")["evidence"][0]
    file.unlink()
    silent(snatd)
