"""Two programs that write at the same time never lose a rule."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import StaleRuleset
from snatd.core.mend import misplaced
from snatd.core.model import Backend, Family
from snatd.core.plan import (
    Transaction,
    plan,
)
from snatd.kernel.events import LegacyPoll
from snatd.kernel.legacy import LARGE_ENTRIES, LegacyTables
from snatd.kernel.lock import XtablesLock
from snatd.kernel.nft import NftTables
from snatd.kernel.tools import Tools
from tests.lab.netns import Namespace

SUBNET, CLUSTER = ip_network("172.7.21.0/24"), (ip_network("172.7.0.0/16"),)
WANTED = Desired(Family.V4, SUBNET, CLUSTER, CLUSTER, CLUSTER, (), "docker0", True, False)
BROAD = "-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"
NARROW = "-s 172.7.21.0/24 ! -d 172.7.0.0/16 ! -o docker0 -m comment --comment snatd -j MASQUERADE"


def soon() -> Deadline:
    return Deadline(time.monotonic() + 20)


def only(tables: NftTables | LegacyTables) -> Transaction:
    (transaction,) = plan(WANTED, {tables.backend: tables.read(soon())}, tables.backend)
    return transaction


@pytest.fixture
def inside(host: Namespace) -> Iterator[Namespace]:
    """This thread's network is the host's for the test."""
    with host.entered():
        yield host


def test_fault_11_nft_a_rival_inserts_between_read_and_write_200_times(inside: Namespace) -> None:
    tables = NftTables(Family.V4, Tools())
    foreign = [f"-s 192.0.2.{number}/32 -j RETURN" for number in range(4)]
    inside.run(
        "iptables-nft-restore",
        stdin="*nat\n" + "".join(f"-A POSTROUTING {one}\n" for one in foreign) + "COMMIT\n",
    )
    expected = list(foreign)
    for number in range(200):
        place = number % 4 + 1
        inside.run("iptables-nft", "-t", "nat", "-I", "POSTROUTING", str(place), *BROAD.split(" "))
        expected.insert(place - 1, "ours")
        transaction = only(tables)
        rival = f"-s 198.51.100.{number}/32 -j RETURN"
        inside.run("iptables-nft", "-t", "nat", "-I", "POSTROUTING", "1", *rival.split(" "))
        expected.insert(0, rival)
        tables.apply(transaction, soon())
        fix = misplaced(transaction, tables.read(soon()))
        if fix is not None:
            tables.apply(fix, soon())
        texts = [rule.text for rule in tables.read(soon()).postrouting]
        assert [one for one in texts if one != NARROW] == [one for one in expected if one != "ours"]
        assert [one.replace(NARROW, "ours") for one in texts] == expected
        inside.run("iptables-nft", "-t", "nat", "-D", "POSTROUTING", *NARROW.split(" "))
        expected.remove("ours")
        if number % 20 == 19:
            # Short again, or the last rounds only test long chains.
            for one in expected[:20]:
                inside.run("iptables-nft", "-t", "nat", "-D", "POSTROUTING", *one.split(" "))
            del expected[:20]


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_fault_11_what_is_no_longer_there_is_not_removed(
    inside: Namespace, kind: str, tmp_path: Path
) -> None:
    tables = _tables(kind, tmp_path)
    command = f"iptables-{kind}"
    inside.run(command, "-t", "nat", "-A", "POSTROUTING", *BROAD.split(" "))
    transaction = only(tables)
    inside.run(command, "-t", "nat", "-F", "POSTROUTING")
    inside.run(command, "-t", "nat", "-A", "POSTROUTING", "-s", "192.0.2.1/32", "-j", "RETURN")
    with pytest.raises(StaleRuleset):
        tables.apply(transaction, soon())
    assert [rule.text for rule in tables.read(soon()).postrouting] == ["-s 192.0.2.1/32 -j RETURN"]


def _tables(kind: str, folder: Path) -> NftTables | LegacyTables:
    if kind == Backend.NFT.value:
        return NftTables(Family.V4, Tools())
    return LegacyTables(Family.V4, Tools(), XtablesLock(folder / "xtables.lock"))


def test_fault_08_legacy_does_not_write_while_another_holds_the_lock(
    inside: Namespace, tmp_path: Path
) -> None:
    """Fails at once when the lock is left out: the write would not wait."""
    tables = _tables("legacy", tmp_path)
    inside.run("iptables-legacy", "-t", "nat", "-A", "POSTROUTING", *BROAD.split(" "))
    transaction = only(tables)
    order: list[str] = []

    def release() -> None:
        time.sleep(0.3)
        order.append("released")
        fcntl.flock(lock, fcntl.LOCK_UN)

    with (tmp_path / "xtables.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rival = threading.Thread(target=release)
        rival.start()
        tables.apply(transaction, soon())
        order.append("written")
        rival.join()
    assert order == ["released", "written"]


def test_fault_11_legacy_against_a_rival_that_takes_the_lock(
    inside: Namespace, tmp_path: Path
) -> None:
    """Each iptables-legacy call reads, changes and commits the whole table under the lock."""
    tables = _tables("legacy", tmp_path)
    lock = f"XTABLES_LOCKFILE={tmp_path / 'xtables.lock'}"
    script = (
        f"export {lock}; n=0; while [ $n -lt 240 ]; do n=$((n+1)); "
        "iptables-legacy -w 20 -t nat -A FOREIGN -s 192.0.2.$n/32 -j RETURN; done"
    )
    inside.run("iptables-legacy", "-t", "nat", "-N", "FOREIGN")
    rival = inside.popen("sh", "-euc", script)
    writes = 0
    while rival.poll() is None:
        writes += _narrow_and_widen(tables, inside, tmp_path)
    assert rival.returncode == 0
    listing = inside.run("iptables-legacy", "-t", "nat", "-S", "FOREIGN").splitlines()
    assert listing[1:] == [f"-A FOREIGN -s 192.0.2.{n}/32 -j RETURN" for n in range(1, 241)]
    assert writes > 3


def _narrow_and_widen(tables: NftTables | LegacyTables, host: Namespace, folder: Path) -> int:
    environment = f"XTABLES_LOCKFILE={folder / 'xtables.lock'}"
    host.shell(f"{environment} iptables-legacy -w 20 -t nat -I POSTROUTING 1 {BROAD}")
    transaction = only(tables)
    try:
        tables.apply(transaction, soon())
    except StaleRuleset:
        return 0
    texts = [rule.text for rule in tables.read(soon()).postrouting]
    assert texts == [NARROW], "what was applied stays applied"
    return 1


@dataclass
class RacedTools(Tools):
    """A rival writes right after each listing, so once under the lock between our two digests."""

    rival: Callable[[], object] = print

    def run(self, *arguments: Any, **options: Any) -> str:
        output = super().run(*arguments, **options)
        self.rival()
        return output


def test_fault_10_legacy_sees_a_writer_without_the_lock(inside: Namespace, tmp_path: Path) -> None:
    """The size stays the same, so the kernel itself would let us undo it."""

    def legacy(*words: str) -> str:
        return inside.run("iptables-legacy", "-t", "nat", *words)

    legacy("-A", "POSTROUTING", *BROAD.split(" "))
    legacy("-A", "OUTPUT", "-s", "192.0.2.1/32", "-j", "RETURN")
    lock = XtablesLock(tmp_path / "xtables.lock")
    transaction = only(LegacyTables(Family.V4, Tools(), lock))
    change = ("-R", "OUTPUT", "1", "-s", "192.0.2.2/32", "-j", "RETURN")
    raced = LegacyTables(Family.V4, RacedTools(rival=lambda: legacy(*change)), lock)
    with pytest.raises(StaleRuleset, match="without the lock"):
        raced.apply(transaction, soon())
    assert "192.0.2.2/32" in legacy("-S", "OUTPUT"), "the rival's change is not lost"


def test_fault_09_the_lock_follows_its_file(tmp_path: Path) -> None:
    """Removed and made again by somebody (fault 9): the new file is the lock."""
    lock = XtablesLock(tmp_path / "xtables.lock")
    with lock.held(soon()):
        pass
    lock.path.unlink()
    with lock.held(soon()), lock.path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


@dataclass
class CountedTools(Tools):
    """How often a tool was run."""

    runs: int = 0

    def run(self, *arguments: Any, **options: Any) -> str:
        self.runs += 1
        return super().run(*arguments, **options)


@dataclass
class Large:
    """A table of so many rules that a write goes by the listing that it was planned for, as the
    daemon reads it: with fingerprints taken before."""

    host: Namespace
    lock: XtablesLock
    tools: CountedTools
    poll: LegacyPoll
    tables: LegacyTables

    def legacy(self, *words: str) -> str:
        """A program with the lock."""
        lock = f"XTABLES_LOCKFILE={self.lock.path}"
        return self.host.run("env", lock, "iptables-legacy", "-w", "20", "-t", "nat", *words)

    def planned(self) -> Transaction:
        self.poll.rebase(0)
        return only(self.tables)

    def postrouting(self) -> list[str]:
        return self.legacy("-S", "POSTROUTING").splitlines()[1:]


@pytest.fixture
def large(inside: Namespace, tmp_path: Path) -> Large:
    foreign = "-A OUTPUT -s 192.0.2.1/32 -j RETURN\n" * LARGE_ENTRIES
    script = f"*nat\n{foreign}-A POSTROUTING {BROAD}\nCOMMIT\n"
    inside.run("iptables-legacy-restore", stdin=script)
    lock, tools, poll = XtablesLock(tmp_path / "xtables.lock"), CountedTools(), LegacyPoll()
    return Large(
        inside, lock, tools, poll, LegacyTables(Family.V4, tools, lock, digests=poll.digests)
    )


def test_of_a_large_legacy_table_a_write_lists_nothing_again(large: Large) -> None:
    for number in range(3):
        transaction = large.planned()
        before = large.tools.runs
        large.tables.apply(transaction, soon())
        assert large.tools.runs == before, f"write {number}"
        assert large.postrouting() == [f"-A POSTROUTING {NARROW}"]
        large.legacy("-I", "POSTROUTING", "1", *BROAD.split(" "))


def test_after_its_own_write_it_lists_a_large_table_again(large: Large) -> None:
    """The fingerprint is of what was before. A rival who puts that back changes nothing of it."""
    large.tables.apply(large.planned(), soon())
    large.legacy("-R", "POSTROUTING", "1", *BROAD.split(" "))
    transaction, before = only(large.tables), large.tools.runs
    large.tables.apply(transaction, soon())
    assert large.tools.runs > before
    assert large.postrouting() == [f"-A POSTROUTING {NARROW}"]


@pytest.mark.parametrize("when", ["before the listing", "after the listing"])
@pytest.mark.parametrize("lock", ["with the lock", "without the lock"])
def test_fault_10_of_a_large_legacy_table_what_a_rival_wrote_meanwhile_stays(
    large: Large, when: str, lock: str
) -> None:
    """Of the same size, in another chain; the library's copy is older than that, or may be."""
    write = large.legacy if lock == "with the lock" else _unlocked(large.host)
    large.tables.apply(large.planned(), soon())  # from here on it takes its copies early
    for number in range(2):
        large.poll.rebase(0)
        large.tables.read(soon())
        large.legacy("-I", "POSTROUTING", "1", *BROAD.split(" "))
        change = ("-R", "OUTPUT", "7", "-s", f"192.0.2.{number + 2}/32", "-j", "RETURN")
        large.poll.rebase(0)
        large.poll.digests()
        if when == "before the listing":
            write(*change)
        transaction = only(large.tables)
        if when == "after the listing":
            write(*change)
        large.tables.apply(transaction, soon())
        assert f"-s 192.0.2.{number + 2}/32" in large.legacy("-S", "OUTPUT", "7")
        assert large.postrouting() == [f"-A POSTROUTING {NARROW}"]


def test_fault_10_of_a_large_legacy_table_a_write_that_was_planned_before(large: Large) -> None:
    """The library's copy is of another table than the one that is listed under the lock."""
    large.tables.apply(large.planned(), soon())
    large.legacy("-R", "POSTROUTING", "1", *BROAD.split(" "))
    transaction = large.planned()
    for number, rule in enumerate((NARROW, BROAD)):
        large.poll.rebase(0)
        large.tables.read(soon())
        large.legacy("-R", "POSTROUTING", "1", *rule.split(" "))
        large.legacy("-R", "OUTPUT", "7", "-s", f"192.0.2.{7 + number}/32", "-j", "RETURN")
    large.tables.apply(transaction, soon())
    assert "-s 192.0.2.8/32" in large.legacy("-S", "OUTPUT", "7")
    assert large.postrouting() == [f"-A POSTROUTING {NARROW}"]


def _unlocked(host: Namespace) -> Callable[..., str]:
    def write(*words: str) -> str:
        no_lock = "XTABLES_LOCKFILE=/dev/null"
        return host.run("env", no_lock, "iptables-legacy", "-t", "nat", *words)

    return write


@pytest.mark.parametrize(
    "there",
    [
        "-s 172.7.21.0/24 -o docker1 -j MASQUERADE",
        "-s 172.7.21.0/24 ! -o docker0 -j ACCEPT",
        "-s 172.7.22.0/24 ! -o docker0 -j MASQUERADE",
        "-s 172.7.21.0/24 -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE",
    ],
)
def test_fault_10_of_a_large_legacy_table_that_was_another_while_it_was_listed(
    large: Large, there: str
) -> None:
    """Of the same length, and before and after the listing the same: what was planned for is not
    what is there, and a foreign rule would go."""
    large.legacy("-R", "POSTROUTING", "1", *there.split(" "))
    large.poll.rebase(0)
    large.poll.digests()
    large.legacy("-R", "POSTROUTING", "1", *BROAD.split(" "))
    transaction = only(large.tables)
    large.legacy("-R", "POSTROUTING", "1", *there.split(" "))
    with pytest.raises(StaleRuleset):
        large.tables.apply(transaction, soon())
    assert large.postrouting() == [f"-A POSTROUTING {there}"]
