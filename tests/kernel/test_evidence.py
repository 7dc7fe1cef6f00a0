"""What the daemon finds out beside the rules: proofs, suspects and flows, by packets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from signal import SIGHUP
from typing import Any

import pytest

from tests.kernel.test_packets import add
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import Discard, Udp, seen_by_udp


@pytest.fixture
def node(lab: Lab) -> Node:
    lab.nodes[0].write_lease()
    return lab.nodes[0]


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd", resync=1) as snatd:
        yield snatd
    log = snatd.log_path.read_text() if snatd.log_path.exists() else ""
    assert "Traceback" not in log, log


def test_proved_by_a_datagram_and_said_with_its_time(lab: Lab, node: Node, snatd: Snatd) -> None:
    discard = Discard(lab.nodes[1].host, "172.7.22.1")
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd.start()
    until(lambda: snatd.status()["proof"]["proved_at"], "the proof")
    status = snatd.status()
    (probe,) = status["proof"]["probes"]
    assert (probe["dst"], probe["kept"]) == ("172.7.22.1", True)
    assert f"proved at {status['proof']['proved_at'][11:19]} UTC" in status["status"]
    assert status["suspects"][0]["none"]
    # Repairs in quick succession: nobody is sent two a minute.
    for _ in range(5):
        narrowed = len(snatd.events("rule_narrowed"))
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        snatd.wait_for("rule_narrowed", narrowed + 1)
    passes = snatd.status()["passes"]
    until(lambda: snatd.status()["passes"] > passes + 2, "two resyncs", within_s=15)
    assert discard.count() == 1


def test_no_probe_where_none_is_wanted(lab: Lab, node: Node, snatd: Snatd) -> None:
    discard = Discard(lab.nodes[1].host, "172.7.22.1")
    snatd.write_config(probe="off")
    snatd.start()
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    snatd.wait_for("rule_narrowed")
    until(lambda: snatd.status()["suspects"] and snatd.status()["flows"][0]["since"], "a look")
    assert snatd.status()["proof"]["probes"] == []
    assert "proved" not in snatd.status()["status"]
    assert discard.count() == 0


def test_snated_is_degraded_and_names_the_rule(node: Node, snatd: Snatd) -> None:
    """Without a guard an operator's rule hides containers, and no rule of ours is out of sync."""
    snatd.write_config(guard="off")
    operators = ("-o", "eth0", "-j", "MASQUERADE")
    add(node, "-I", "POSTROUTING", *operators)
    snatd.start()
    until(lambda: snatd.status()["state"] == "degraded", "the probe's answer")
    status = snatd.status()
    assert not status["in_sync"]
    said = "172.7.22.1 sees 10.4.7.21 ("
    assert said in status["status"]
    assert "rule 1" in status["status"]
    (wrong,) = snatd.wait_for("not_kept")[0]["what"]
    assert wrong.startswith(said)
    assert "-o eth0 -j MASQUERADE" in snatd.events("can_snat")[0]["what"][0]
    assert snatd.events("can_snat")[0]["guard"] == 'none: guard is "off"'
    assert snatd.command("status").returncode == 1


def test_a_proof_ends_where_a_rule_could_undo_it(node: Node, snatd: Snatd) -> None:
    """A rule for TCP only, which the probe's datagram cannot show."""
    snatd.write_config(guard="off")
    snatd.start()
    until(lambda: snatd.status()["proof"]["proved_at"], "the proof")
    add(node, "-I", "POSTROUTING", "-o", "eth0", "-p", "tcp", "-j", "MASQUERADE")
    until(lambda: snatd.status()["proof"]["proved_at"] is None, "no proof any more")
    status = snatd.status()
    assert status["state"] == "in sync", "the datagram was kept"
    (rule,) = status["suspects"][0]["rules"]
    assert "-o eth0 -p tcp -j MASQUERADE" in rule
    (line,) = snatd.events("can_snat")
    assert line["what"] == [f"can SNAT cluster traffic from 172.7.21.0/24: {rule}"]
    if not node.host.run("iptables", "-V").strip().endswith("(legacy)"):
        (pid,) = line["writer_pid"]
        assert line["writer"].startswith(f"iptables (pid {pid})")
        assert line["writer_comm"] == ["iptables"]
    assert "there is no guard, and another rule can SNAT" in status["status"]
    assert "keeps its address" not in status["status"]
    add(node, "-D", "POSTROUTING", "-o", "eth0", "-p", "tcp", "-j", "MASQUERADE")
    snatd.wait_for("none_can_snat")
    until(lambda: snatd.status()["suspects"][0]["none"], "no suspect any more")
    assert "keeps its address" in snatd.status()["status"]


def test_what_contradicts_the_rules_is_said(nft_lab: Lab, tmp_path: Path) -> None:
    """An iptables-nft that hides a rule: the datagram and the rules say different things."""
    node = nft_lab.nodes[0]
    node.write_lease()
    add(node, "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "iptables-nft").write_text('#!/bin/sh\necho "-P POSTROUTING ACCEPT"\n')
    (folder / "iptables-nft").chmod(0o755)
    node.host.use_iptables(folder)
    with Snatd(node.host, tmp_path / "snatd", guard="off", egress="keep") as snatd:
        snatd.start()
        (wrong,) = snatd.wait_for("not_kept")[0]["what"]
        assert "left as 10.4.7.21, but by the rules 172.7.22.1 sees 172.7.21.254" in wrong
        until(lambda: snatd.status()["state"] == "degraded", "the state")


def test_another_programs_chain_before_the_guard_is_told(node: Node, snatd: Snatd) -> None:
    snatd.start()
    until(lambda: snatd.status()["proof"]["proved_at"], "the first look")
    node.host.run(
        *("nft", "-f", "-"),
        stdin="table ip early { chain post { type nat hook postrouting priority -199; }; }",
    )
    (line,) = snatd.wait_for("before_guard")
    (told,) = line["what"]
    assert line["writer_comm"] == ["nft"]
    assert told == "asked before the guard, or may be: nat chain ip early post (priority -199)"
    assert told in snatd.command("check").stdout


def test_a_rule_before_the_guard_is_in_the_headline(node: Node, snatd: Snatd) -> None:
    snatd.start()
    until(
        lambda: snatd.status()["proof"]["proved_at"], "a healthy node, whom nobody asks again now"
    )
    assert "keeps its address" in snatd.status()["status"]
    node.host.shell(
        "nft add table ip early; nft add chain ip early post "
        "'{ type nat hook postrouting priority -199; }'; "
        "nft add rule ip early post oifname eth0 masquerade"
    )
    says = "the guard does not decide, and another rule can SNAT cluster traffic from 172.7.21.0/24"
    until(lambda: says in snatd.status()["status"], "the headline")
    assert "keeps its address" not in snatd.status()["status"]
    check = snatd.command("check")
    assert check.returncode == 0, "nothing that snatd would change"
    assert check.stdout.startswith(
        "in sync: nothing is to be changed, but a rule of somebody else's"
    )
    findings = {one["name"] for one in snatd.json("doctor")["findings"]}
    assert {"can_snat", "before_guard"} <= findings
    assert "only_guarded" not in findings, "the guard makes it harmless, or it does not"
    node.host.run("nft", "delete", "table", "ip", "early")
    until(lambda: "keeps its address" in snatd.status()["status"], "the headline after that")


def test_what_explained_a_snated_datagram_is_gone(node: Node, snatd: Snatd) -> None:
    """The neighbour may not be asked again for a minute; the rules say enough until then."""
    snatd.write_config(guard="off")
    add(node, "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    snatd.start()
    until(lambda: snatd.status()["state"] == "degraded", "the datagram")
    add(node, "-D", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    until(lambda: snatd.status()["state"] == "in sync", "the rules alone", within_s=20)
    assert "proved" not in snatd.status()["status"]


@pytest.mark.parametrize(
    ("settings", "before", "guard"),
    [
        ({"mode": "observe"}, "", "none: mode is observe"),
        ({"guard": "off", "mode": "observe"}, "", 'none: guard is "off"'),
        ({}, "-199", "there, and does not decide for all of this traffic"),
    ],
)
def test_why_the_guard_does_not_keep_a_rule_from_it_is_told(
    node: Node, snatd: Snatd, settings: dict[str, str], before: str, guard: str
) -> None:
    add(node, "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    if before:
        node.host.shell(
            "nft add table ip early; nft add chain ip early post "
            f"'{{ type nat hook postrouting priority {before}; }}'; "
            "nft add rule ip early post oifname eth0 masquerade"
        )
    snatd.write_config(**settings)
    snatd.start()
    assert snatd.wait_for("can_snat")[0]["guard"] == guard


@pytest.mark.parametrize(
    ("policy", "goes_on_as"), [("off", "node"), ("report", "node"), ("udp", "container")]
)
def test_flows_that_were_wrong_before(
    lab: Lab, node: Node, snatd: Snatd, policy: str, goes_on_as: str
) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    flow = Udp(node.container, lab.nodes[1].container_address)
    assert flow.seen_as() == node.address
    snatd.write_config(stale_flows=policy)
    snatd.start()
    until(lambda: snatd.status()["suspects"], "a look")
    if policy == "off":
        assert snatd.status()["flows"] == []
    else:
        until(lambda: snatd.status()["flows"] and snatd.status()["flows"][0]["since"], "the count")
        (counted,) = snatd.status()["flows"]
        deleted = int(policy == "udp")
        assert (counted["stale"], counted["deleted"]) == (1 - deleted, deleted)
        assert "1 connection from 172.7.21.0/24" in snatd.events("stale_flows")[0]["what"]
    assert flow.seen_as() == (node.address if goes_on_as == "node" else node.container_address)


def test_stale_flows_that_stay_are_told_once(lab: Lab, node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    flow = Udp(node.container, lab.nodes[1].container_address)
    assert flow.seen_as() == node.address
    snatd.start()

    def counted() -> Any:
        flows = snatd.status()["flows"]
        return flows and flows[0]["since"]

    since = until(counted, "the count")
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: counted() != since, "the count after the repair")
    assert snatd.status()["flows"][0]["stale"] == 1
    assert len(snatd.events("stale_flows")) == 1


def test_observe_deletes_no_flow(lab: Lab, node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    flow = Udp(node.container, lab.nodes[1].container_address)
    assert flow.seen_as() == node.address
    snatd.write_config(stale_flows="all", mode="observe")
    snatd.start()
    until(lambda: snatd.status()["flows"] and snatd.status()["flows"][0]["since"], "the count")
    assert snatd.status()["flows"][0]["stale"] == 1
    assert flow.seen_as() == node.address


def test_the_containers_own_flows_are_the_best_proof(lab: Lab, node: Node, snatd: Snatd) -> None:
    old = Udp(node.container, lab.nodes[1].container_address)
    snatd.start()
    assert old.seen_as() == node.container_address

    def since() -> str:
        (flows,) = snatd.status()["flows"] or ({"since": None},)
        return flows["since"] or ""

    first = until(since, "the count")
    snatd.signal(SIGHUP)
    until(lambda: since() not in ("", first), "the count after the reload")
    for _ in range(3):
        seen = seen_by_udp(node.container, lab.nodes[1].container_address)
        assert seen == node.container_address
    # Somebody's write to a nat table is a reason to look sooner than a resync is.
    add(node, "-A", "POSTROUTING", "-s", "192.0.2.1/32", "-j", "RETURN")
    until(lambda: snatd.status()["flows"][0]["kept_since"] == 3, "three flows", within_s=120)
    assert snatd.status()["flows"][0]["changed_since"] == 0
    assert "3 kept, 0 changed since" in snatd.command("status").stdout


def test_without_conntrack_it_says_so_and_goes_on(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    empty = tmp_path / "empty"
    empty.write_text("")
    node.host.run("mount", "--bind", str(empty), "/usr/sbin/conntrack")
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        snatd.start()
        (said,) = snatd.wait_for("flows_unknown")
        assert "conntrack" in said["what"]
        until(lambda: snatd.status()["proof"]["proved_at"], "the proof all the same")
