"""Rows 1 to 7, 13 and 14: what other programs do to the rules."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Measured, Start
from tests.faults.watching import cpu_shares, heard
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import seen_by

LIBRARIES = Path("/usr/lib")
FOREIGN = ("-s 192.0.2.1/32 -j RETURN", "-s 192.0.2.2/32 -o eth0 -j SNAT --to-source 10.4.7.21")
UNDOES = f"while :; do iptables -w 5 -t nat -D POSTROUTING {NARROW} 2>/dev/null; sleep 0.2; done"


def write(node: Node, *texts: str, command: str = "iptables") -> None:
    for text in texts:
        add(node, "-A", "POSTROUTING", *text.split(" "), command=command)


def settled(snatd: Snatd) -> None:
    """The look after the watches were set up is over: from here on only news makes a pass."""
    until(lambda: snatd.status()["passes"] >= 2 and snatd.status()["in_sync"], "in sync")


def saved(node: Node, command: str = "iptables") -> list[str]:
    """The whole nat table without ours and without what counts packets or names the time."""
    lines = node.host.run(f"{command}-save", "-t", "nat").splitlines()
    lines = [line.partition(" [")[0] if line.startswith(":") else line for line in lines]
    return [line for line in lines if line[:1] != "#" and "--comment snatd" not in line]


def test_fault_01_our_rule_deleted_is_back_with_one_line_that_names_who(
    lab: Lab, start: Start, backend: str
) -> None:
    node = lab.nodes[0]
    node.write_lease()
    write(node, FOREIGN[0], NARROW, FOREIGN[1])
    snatd = start(node)
    settled(snatd)
    told = len(snatd.events())
    add(node, "-D", "POSTROUTING", *NARROW.split(" "))
    (event,) = snatd.wait_for("rule_added")
    until(lambda: rules(node) == [*FOREIGN, NARROW], "our rule")
    if backend == "nft":  # nf_tables tells who committed; ip_tables does not
        assert event["writer"].startswith("iptables (pid ")
    else:
        assert "writer" not in event
    snatd.signal(signal.SIGUSR1)
    snatd.wait_for("summary")
    assert [one["event"] for one in snatd.events()[told:]] == ["rule_added", "summary"]
    promises_hold(lab)


def test_fault_02_our_rule_moved_below_a_broad_one(lab: Lab, start: Start) -> None:
    node = lab.nodes[0]
    node.write_lease()
    write(node, FOREIGN[0], " ".join(node.broad_rule), FOREIGN[1])
    snatd = start(node)
    settled(snatd)
    assert rules(node) == [FOREIGN[0], NARROW, FOREIGN[1]]
    add(node, "-D", "POSTROUTING", *NARROW.split(" "))
    write(node, " ".join(node.broad_rule), NARROW)
    until(lambda: rules(node).count(NARROW) == len(rules(node)) - 2 == 1, "one rule, and ours")
    assert [one for one in rules(node) if one != NARROW] == list(FOREIGN)
    promises_hold(lab)


@pytest.mark.parametrize("command", ["iptables-nft", "iptables-legacy"])
def test_fault_03_a_broad_rule_of_no_source_at_the_head(
    nft_lab: Lab, node: Node, start: Start, command: str
) -> None:
    """It is an operator's, wider than the subnet: the guard's business, and it stays."""
    write(node, *FOREIGN, command=command)
    snatd = start(node)
    settled(snatd)
    before = rules(node, command)
    add(node, "-I", "POSTROUTING", "1", "-j", "MASQUERADE", command=command)
    promises_hold(nft_lab)  # at once, not after a repair
    assert snatd.events("can_snat") == [], "the guard stands before it"
    assert rules(node, command) == ["-j MASQUERADE", *before]
    promises_hold(nft_lab)


@pytest.mark.long
def test_fault_04_a_thousand_times_all_is_flushed(
    nft_lab: Lab, node: Node, start: Start, measured: Measured
) -> None:
    """Every way to empty the tables, one after the other as fast as they go."""
    snatd = start(node)
    settled(snatd)
    before_s, began_s = snatd.cpu_s(), time.monotonic()
    node.host.shell(
        "for n in $(seq 250); do iptables -t nat -F; iptables -t nat -X; nft flush ruleset;"
        " nft delete table ip snatd 2>/dev/null || :; done"
    )
    took_s = time.monotonic() - began_s
    share = (snatd.cpu_s() - before_s) / took_s
    until(lambda: snatd.status()["in_sync"] and rules(node) == [NARROW], "rebuilt", 20)
    assert "snat to ip saddr" in node.host.run("nft", "list", "table", "ip", "snatd")
    promises_hold(nft_lab)
    measured(f"{share:.1%} of a core for {took_s:.1f} s")
    assert share < 0.25
    lines = len(snatd.events("rule_added")) + len(snatd.events("guard_written"))
    assert lines < 120, "each repair is told, but not in a fight"


def test_fault_05_an_old_save_restored_with_flush(lab: Lab, start: Start) -> None:
    """The saved file has the broad rule; what is foreign in it comes back as it was saved."""
    node = lab.nodes[0]
    node.write_lease()
    write(node, FOREIGN[0], " ".join(node.broad_rule), FOREIGN[1])
    add(node, "-N", "THEIRS")
    add(
        node,
        "-A",
        "THEIRS",
        "-d",
        "198.51.100.0/24",
        "-m",
        "comment",
        "--comment",
        "a b",
        "-j",
        "RETURN",
    )
    add(node, "-A", "POSTROUTING", "-j", "THEIRS")
    old = node.host.run("iptables-save", "-t", "nat")
    expected = [one for one in saved(node) if " ".join(node.broad_rule) not in one]
    snatd = start(node)
    settled(snatd)
    for _ in range(3):
        node.host.run("iptables-restore", stdin=old)
        until(lambda: rules(node)[1] == NARROW and len(rules(node)) == 4, "the repair")
        assert saved(node) == expected
    promises_hold(lab)


def test_fault_06_a_reload_like_firewallds_takes_few_passes(
    nft_lab: Lab, node: Node, start: Start, measured: Measured
) -> None:
    """All is flushed, and 50 rules come back one by one within 300 ms or so."""
    snatd = start(node)
    settled(snatd)
    before = snatd.status()["passes"]
    node.host.shell(
        "iptables -t nat -F; iptables -t nat -X;"
        "for n in 1 2 3 4 5; do iptables -t nat -N ZONE$n;"
        " iptables -t nat -A POSTROUTING -s 192.0.2.$n/32 -j ZONE$n;"
        " for m in 1 2 3 4 5 6 7 8 9; do"
        " iptables -t nat -A ZONE$n -d 198.51.100.$m/32 -j RETURN; done; done"
    )
    until(lambda: snatd.status()["passes"] > before and NARROW in rules(node), "the repair")
    until(lambda: snatd.status()["in_sync"], "in sync")
    quiet = snatd.status()["passes"]
    time.sleep(1)
    snatd.signal(signal.SIGUSR1)
    snatd.wait_for("summary")
    assert snatd.status()["passes"] <= quiet + 1
    measured(f"{quiet - before} passes")
    assert quiet - before <= 12
    assert [one for one in rules(node) if one != NARROW] == [
        f"-s 192.0.2.{n}/32 -j ZONE{n}" for n in range(1, 6)
    ]
    promises_hold(nft_lab)


@pytest.mark.long
def test_fault_07_a_rival_that_deletes_ours_every_200_ms(start: Start, measured: Measured) -> None:
    """On both backends at the same time, to wait only once."""
    with Lab("nft") as nft, Lab("legacy") as legacy:
        labs = (nft, legacy)
        daemons, rivals = [], []
        for lab in labs:
            lab.nodes[0].write_lease()
            write(lab.nodes[0], *FOREIGN)
            daemons.append(start(lab.nodes[0]))
            settled(daemons[-1])
            rivals.append(lab.nodes[0].host.popen("sh", "-uc", UNDOES))
        for snatd in daemons:
            snatd.wait_for("fighting", within_s=40)
            snatd.wait_for_notification("STATUS=fighting with ")
        # nf_tables tells who committed; ip_tables does not.
        assert daemons[0].status()["fights"]["now"]["with"].startswith("iptables (pid ")
        time.sleep(8)  # until the repairs are as far apart as they get
        unheard = heard(daemons[1])
        # CPU time is dearer beside others that use the caches: what stays so is the daemon's own.
        for _ in range(3):
            shares = cpu_shares(daemons, 15)
            if max(shares) < 0.02:
                break
        for share, lab in zip(shares, labs, strict=True):
            measured(f"{share:.2%} of a core over 15 s, {'nft' if lab is nft else 'legacy'}")
            assert share < 0.02
        # Passes come unasked now, so a rival's release of the lock wakes nobody.
        assert heard(daemons[1]) <= unheard + 1
        for lab, snatd, rival in zip(labs, daemons, rivals, strict=True):
            # The guard holds the first promise whatever becomes of the rule.
            container, neighbour = lab.nodes[0].container, lab.nodes[1].container_address
            assert {seen_by(container, neighbour) for _ in range(20)} == {
                lab.nodes[0].container_address
            }
            assert len(snatd.events("fighting")) == 1
            assert len(snatd.events("rule_added")) < 40
            rival.kill()
            rival.wait()
        for lab, snatd in zip(labs, daemons, strict=True):
            snatd.wait_for("fight_ended", within_s=30)
            until(lambda: rules(lab.nodes[0]) == [*FOREIGN, NARROW], "ours, behind theirs")  # noqa: B023
            promises_hold(lab)
        until(lambda: daemons[1].status()["events"]["watch_started"] == 2, "the watch is back")
        unheard = heard(daemons[1])
        labs[1].nodes[0].host.run("iptables", "-t", "nat", "-S")
        until(lambda: heard(daemons[1]) > unheard, "the release of the lock is heard again")


# In each something that snatd has no name for; the third and fourth would be broad without it.
ODD = (
    "-p tcp -m multiport --dports 80,443 -m statistic --mode nth --every 3 --packet 1 -j ACCEPT",
    "-m u32 --u32 0x0>>0x16&0x3c@0x0=0x1 -j RETURN",
    "-s 172.7.21.0/24 ! -o docker0 -m addrtype --src-type LOCAL -j MASQUERADE",
    "-s 172.7.21.0/24 ! -o docker0 -p udp -j MASQUERADE --to-ports 1024-31000",
    "-m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully",
    "-m policy --dir out --pol ipsec -j ACCEPT",
    "-m recent --rcheck --name odd --mask 255.255.255.255 --rsource -j RETURN",
    "-m time --timestart 01:00:00 --timestop 02:00:00 -j RETURN",
    '-m string --string "a b" --algo bm -j RETURN',
    "-m hashlimit --hashlimit-upto 5/min --hashlimit-name odd -j RETURN",
    "-s 192.0.2.0/24 -j NETMAP --to 198.51.100.0/24",
    "-m conntrack --ctstate NEW -m limit --limit 7/hour -j RETURN",
    "-d 192.0.2.9/32 -j SNAT --to-source 10.4.7.21 --random-fully --persistent",
)


def test_fault_13_options_that_we_have_no_name_for_stay_as_they_are(lab: Lab, start: Start) -> None:
    node = lab.nodes[0]
    node.write_lease()
    for text in ODD:  # not each kernel has each extension
        node.host.run("iptables", "-t", "nat", "-A", "POSTROUTING", *shlex.split(text), check=False)
    before = saved(node)
    assert len([one for one in before if one.startswith("-A")]) > len(ODD) / 2
    snatd = start(node)
    settled(snatd)
    for number in range(1, 4):
        add(node, "-I", "POSTROUTING", str(number), *node.broad_rule)
        until(lambda: " ".join(node.broad_rule) not in rules(node), "the repair")
        assert saved(node) == before
    # Another form, a chain, and back.
    chain = NARROW.replace(" ! -d 172.7.0.0/16", "").replace("MASQUERADE", "SNATD-POSTROUTING")
    for networks, ours in ((["10.99.0.0/16"], chain), ([], NARROW)):
        snatd.write_config(networks=networks)
        snatd.signal(signal.SIGHUP)
        until(lambda: ours in rules(node), "the other form")  # noqa: B023
        assert [one for one in saved(node) if "SNATD-" not in one] == before


def test_fault_13_a_rule_whose_extension_is_not_installed(lab: Lab, start: Start) -> None:
    """iptables prints half a list then, and fails: nothing of it is believed."""
    node = lab.nodes[0]
    node.write_lease()
    write(node, FOREIGN[0], "-m statistic --mode nth --every 3 --packet 1 -j ACCEPT")
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd = start(node)
    settled(snatd)
    before = saved(node)
    (library,) = (one for one in LIBRARIES.glob("*/xtables/libxt_statistic.so"))
    node.host.run("mount", "--bind", "/dev/null", str(library))
    add(node, "-I", "POSTROUTING", *node.broad_rule, command="iptables")
    until(lambda: snatd.status()["state"] == "degraded", "the list that cannot be read")
    promises_hold(lab)
    node.host.run("umount", str(library))
    until(lambda: snatd.status()["in_sync"], "the recovery", 20)
    assert saved(node) == before


def test_fault_14_both_homes_of_rules_at_once(nft_lab: Lab, node: Node, start: Start) -> None:
    commands = ("iptables-nft", "iptables-legacy")
    for command in commands:
        write(node, FOREIGN[0], " ".join(node.broad_rule), FOREIGN[1], command=command)
    snatd = start(node)
    settled(snatd)
    for _ in range(3):
        for command in commands:
            assert rules(node, command) == [FOREIGN[0], NARROW, FOREIGN[1]]
            add(node, "-I", "POSTROUTING", "2", *node.broad_rule, command=command)
        for command in commands:
            until(lambda: " ".join(node.broad_rule) not in rules(node, command), "the repair")  # noqa: B023
    told = {event["backend"] for event in snatd.events("rule_narrowed")}
    assert told == {"nft", "legacy"}
    ours = [one["backend"] for one in snatd.status()["rulesets"] if one["ours"]]
    assert ours == ["nft", "legacy"], "both are reported"
    promises_hold(nft_lab)
