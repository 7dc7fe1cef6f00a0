"""Rows 8 to 11: the xtables lock, writers without it, and writers at the same time."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from snatd.kernel.legacy import LARGE_ENTRIES
from tests.faults.conftest import Measured, Start
from tests.faults.test_rules import settled, write
from tests.faults.watching import heard, longest_silence_s, most_children
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

FOREIGN = "-s 192.0.2.1/32 -j RETURN"


def without_lock(node: Node, *words: str) -> str:
    """A writer that knows nothing of the lock, and a look that does not wait for it."""
    command = ("env", "XTABLES_LOCKFILE=/run/other.lock", "iptables-legacy", "-t", "nat")
    return node.host.run(*command, *words)


def legacy_rules(node: Node) -> list[str]:
    listed = without_lock(node, "-S", "POSTROUTING").splitlines()
    return [one.removeprefix("-A POSTROUTING ") for one in listed[1:]]


@contextmanager
def held(node: Node) -> Iterator[None]:
    with node.host.path("/run/xtables.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def started(node: Node, start: Start, **environment: str) -> Snatd:
    """A daemon on a node whose legacy table is in use."""
    write(node, FOREIGN, command="iptables-legacy")
    snatd = start(node, environment)
    settled(snatd)
    return snatd


def test_fault_08_a_lock_held_for_a_second(nft_lab: Lab, node: Node, start: Start) -> None:
    snatd = started(node, start)
    with held(node):
        without_lock(node, "-I", "POSTROUTING", *node.broad_rule)
        promises_hold(nft_lab)
        passes = snatd.status()["passes"]
        time.sleep(1)
        assert " ".join(node.broad_rule) in legacy_rules(node), "nobody writes without the lock"
    until(lambda: legacy_rules(node) == [NARROW, FOREIGN], "the repair")
    assert snatd.events("backend_failed") == []
    assert snatd.status()["passes"] <= passes + 4, "it waits, and does not try again and again"


@pytest.mark.long
def test_fault_08_a_lock_held_for_ever(
    nft_lab: Lab, node: Node, start: Start, measured: Measured
) -> None:
    snatd = started(node, start, WATCHDOG_USEC="4000000")
    with held(node), most_children(snatd) as most:
        without_lock(node, "-I", "POSTROUTING", *node.broad_rule)
        silence_s = longest_silence_s(snatd, 12)
        by = f"degraded: ipv4 legacy: /run/xtables.lock is held by pid {os.getpid()} "
        assert snatd.status()["headline"].startswith(by)
        # The other rules are looked after all the same.
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: rules(node) == [NARROW], "the repair of the other backend", 20)
        promises_hold(nft_lab)
        assert " ".join(node.broad_rule) in legacy_rules(node)
    measured(f"watchdog of 4 s fed after {silence_s:.2f} s at most, {most[-1]} child at a time")
    assert silence_s < 3
    assert most[-1] <= 2
    until(lambda: legacy_rules(node) == [NARROW, FOREIGN], "the repair once it is free", 40)
    until(lambda: snatd.status()["in_sync"], "in sync")
    assert snatd.process.poll() is None


@pytest.mark.parametrize("again", [True, False])
def test_fault_09_the_lock_file_is_removed(
    nft_lab: Lab, node: Node, start: Start, again: bool
) -> None:
    """And made again, by somebody or by snatd: events of it are heard, and it is what locks."""
    snatd = started(node, start)
    for number in range(1, 3):
        before = heard(snatd)
        node.host.run("rm", "/run/xtables.lock")
        until(lambda: heard(snatd) > before, "the removal")  # noqa: B023
        before = heard(snatd)
        if again:
            node.host.run("iptables-legacy", "-t", "nat", "-I", "POSTROUTING", *node.broad_rule)
        else:
            without_lock(node, "-I", "POSTROUTING", *node.broad_rule)
        snatd.wait_for("rule_narrowed", number)
        # The digest may have been quicker; the lock's release is heard all the same.
        until(lambda: not again or heard(snatd) > before, "the release")  # noqa: B023
        until(lambda: legacy_rules(node) == [NARROW, FOREIGN], "the repair")
    lock = node.host.path("/run/xtables.lock").stat()
    assert (lock.st_mode & 0o7777, lock.st_uid) == (0o600, 0)
    with held(node):
        without_lock(node, "-I", "POSTROUTING", *node.broad_rule)
        time.sleep(2)
        assert " ".join(node.broad_rule) in legacy_rules(node), "the new file is the lock"
    until(lambda: " ".join(node.broad_rule) not in legacy_rules(node), "the repair", 20)
    promises_hold(nft_lab)


SOMETHING_ELSE = {
    "a directory": ("mkdir /run/xtables.lock", "Is a directory"),
    "a FIFO": ("mkfifo /run/xtables.lock", "not a regular file"),
    "a symlink": ("ln -s /run/elsewhere /run/xtables.lock", "Too many levels of symbolic links"),
}


@pytest.mark.parametrize("what", SOMETHING_ELSE)
def test_fault_09_something_else_in_its_place(
    nft_lab: Lab, node: Node, start: Start, what: str
) -> None:
    """Told; it never blocks, and the poll goes on."""
    make, says = SOMETHING_ELSE[what]
    snatd = started(node, start, WATCHDOG_USEC="4000000")
    node.host.run("rm", "/run/xtables.lock")
    node.host.shell(make)
    without_lock(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: snatd.status()["state"] == "degraded", "it told")
    assert f"/run/xtables.lock cannot be opened: {says}" in snatd.status()["headline"]
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair of the other backend", 20)
    promises_hold(nft_lab)
    node.host.run("rm", "-r", "/run/xtables.lock")
    until(lambda: legacy_rules(node) == [NARROW, FOREIGN], "the recovery", 20)
    assert not node.host.path("/run/elsewhere").exists()


# Makes a rule of POSTROUTING the broad one and another of OUTPUT another one, at once and without
# the lock: as many entries as before.
IPTC = """
import iptc
table = iptc.Table(iptc.Table.NAT, autocommit=False)
table.refresh()
broad = iptc.Chain(table, "POSTROUTING").rules[1]
broad.src, broad.out_interface = "172.7.21.0/24", "!docker0"
other = iptc.Rule()
other.src = "192.0.2.{number}/32"
other.create_target("RETURN")
iptc.Chain(table, "OUTPUT").replace_rule(other, 0)
table.commit()
"""


def test_fault_10_a_writer_without_the_lock_that_keeps_the_number_of_entries(
    nft_lab: Lab, node: Node, start: Start
) -> None:
    """python-iptables takes no lock. The digest finds it, and what else it wrote is not lost."""
    without_lock(node, "-A", "OUTPUT", "-s", "192.0.2.1/32", "-j", "RETURN")
    write(node, FOREIGN, command="iptables-legacy")
    snatd = start(node)
    settled(snatd)
    for number in range(1, 4):
        without_lock(node, "-F", "POSTROUTING")
        theirs = "-s 198.51.100.0/24 -o eth7 -j MASQUERADE"
        write(node, FOREIGN, theirs, command="iptables-legacy")
        node.host.run(sys.executable, "-W", "ignore", "-c", IPTC.replace("{number}", str(number)))
        snatd.wait_for("rule_narrowed", number)
        until(lambda: legacy_rules(node) == [FOREIGN, NARROW], "the repair")
        assert f"-s 192.0.2.{number}/32 -j RETURN" in without_lock(node, "-S", "OUTPUT")
    assert any("legacy-digest" in event["trigger"] for event in snatd.events("rule_narrowed"))
    promises_hold(nft_lab)


@pytest.mark.long
@pytest.mark.parametrize("others", [0, LARGE_ENTRIES])
def test_fault_11_two_that_restore_at_the_same_time(
    lab: Lab, start: Start, measured: Measured, others: int
) -> None:
    """Each write of theirs has to be there in the end, in its order, and ours too; also where a
    legacy table is too large to be listed twice."""
    node = lab.nodes[0]
    node.write_lease()
    many = "-A MANY -j RETURN\n" * others
    node.host.run("iptables-restore", "--noflush", stdin=f"*nat\n:MANY -\n{many}COMMIT\n")
    snatd = start(node)
    settled(snatd)
    broad = " ".join(node.broad_rule)
    rivals = []
    for rival in (1, 2):
        add(node, "-N", f"THEIRS{rival}")
        add(node, "-A", "POSTROUTING", "-s", f"192.0.2.{rival}/32", "-j", f"THEIRS{rival}")
        script = (
            f"for n in $(seq 100); do until printf '*nat\n-A THEIRS{rival} -d 198.51.100.%s/32 "
            f"-j RETURN\n-I POSTROUTING {rival} {broad}\nCOMMIT\n' $n |"
            f" iptables-restore -w 20 --noflush 2>/dev/null; do :; done; sleep 0.02; done"
        )
        rivals.append(node.host.popen("sh", "-uc", script))
    for process in rivals:
        assert process.wait(60) == 0
    until(lambda: snatd.status()["in_sync"] and broad not in rules(node), "in sync", 30)
    for rival in (1, 2):
        listed = node.host.run("iptables", "-w", "5", "-t", "nat", "-S", f"THEIRS{rival}")
        assert listed.splitlines()[1:] == [
            f"-A THEIRS{rival} -d 198.51.100.{n}/32 -j RETURN" for n in range(1, 101)
        ]
    foreign = [one for one in rules(node) if one != NARROW]
    assert foreign == [f"-s 192.0.2.{rival}/32 -j THEIRS{rival}" for rival in (1, 2)]
    assert rules(node).count(NARROW) == 1
    listed = node.host.run("iptables", "-w", "5", "-t", "nat", "-S", "MANY")
    assert listed.count("-A MANY -j RETURN\n") == others
    measured(f"{snatd.status()['passes']} passes, {snatd.status()['repairs']} repairs")
    assert snatd.status()["passes"] < 200
    assert len(snatd.events("backend_failed")) < 20
    promises_hold(lab)
