"""One contract for every backend: the two real ones in both families, and the fake of the tests.

What holds here for the fake is what the unit tests stand on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import pytest

from snatd.core.deadline import Deadline
from snatd.core.desired import Absent, Desired
from snatd.core.errors import StaleRuleset
from snatd.core.model import Backend, Counters, Family, Rule, Ruleset
from snatd.core.plan import Transaction, applied, plan
from snatd.kernel.legacy import LegacyTables
from snatd.kernel.lock import XtablesLock
from snatd.kernel.nft import NftTables
from snatd.kernel.tools import Tools
from snatd.reconcile import Tables
from tests.fakes import FakeTables, listed
from tests.lab.netns import Namespace

SUBNETS = {Family.V4: "172.7.21.0/24", Family.V6: "fd00:7:21::/64"}
NETWORKS = {
    Family.V4: ("172.7.0.0/16", "10.9.0.0/16"),
    Family.V6: ("fd00:7::/32", "fd00:9::/32"),
}
HOSTS = {
    Family.V4: ("192.0.2.1/32", "192.0.2.2/32"),
    Family.V6: ("2001:db8::1/128", "2001:db8::2/128"),
}
SNAT_TO = {Family.V4: "10.4.7.21", Family.V6: "fd00:4:7::21"}


@dataclass
class Subject:
    """A backend under test, and how to write to it as a rival would."""

    tables: Tables
    host: Namespace | None

    @property
    def family(self) -> Family:
        return self.tables.family

    @property
    def subnet(self) -> str:
        return SUBNETS[self.family]

    @property
    def broad(self) -> str:
        return f"-s {self.subnet} ! -o docker0 -j MASQUERADE"

    @property
    def foreign(self) -> tuple[str, str]:
        one, two = (f"-s {host} -j RETURN" for host in HOSTS[self.family])
        return one, f'{two[:-10]} -m comment --comment "it\\\'s \\"quoted\\"" -j RETURN'

    @property
    def keeps_counters(self) -> bool:
        """ip6tables-nft-restore ignores counters (1.8.9): what it writes starts at zero."""
        return self.host is None or (self.family, self.tables.backend) != (Family.V6, Backend.NFT)

    def wanted(self, networks: int = 1) -> Desired:
        several = tuple(ip_network(one) for one in NETWORKS[self.family][:networks])
        subnet = ip_network(self.subnet)
        return Desired(self.family, subnet, several, several, several, (), "docker0", True, False)

    def seed(self, *rules: str) -> None:
        """Rules of others, with counters as `[p:b] ` in front."""
        lines = [
            f"{head}-A POSTROUTING {text}"
            for head, text in ((rule[: rule.find("-")], rule[rule.find("-") :]) for rule in rules)
        ]
        if self.host is None:
            assert isinstance(self.tables, FakeTables)
            self.tables.ruleset = listed("\n".join(lines), self.family, self.tables.backend)
        else:
            command = f"{self.family.command}-{self.tables.backend.value}-restore"
            script = "\n".join(["*nat", *lines, "COMMIT", ""])
            self.host.run(command, "--counters", stdin=script)

    def read(self, thorough: bool = False) -> Ruleset:
        return self.tables.read(soon(), thorough=thorough)

    def planned(self, wanted: Desired | Absent) -> Transaction | None:
        backend = self.tables.backend
        transactions = plan(wanted, {backend: self.read()}, backend)
        return transactions[0] if transactions else None

    def become(self, wanted: Desired | Absent) -> Ruleset:
        """Plans, applies, and holds the kernel to what the plan said."""
        before, transaction = self.read(), self.planned(wanted)
        assert transaction is not None
        self.tables.apply(transaction, soon())
        after = self.read()
        assert after == applied(before, transaction)
        assert self.planned(wanted) is None
        return after


def soon() -> Deadline:
    return Deadline(time.monotonic() + 20)


@pytest.fixture(params=list(Family), ids=lambda family: family.value)
def family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


@pytest.fixture(params=["nft", "legacy", "fake-nft", "fake-legacy"])
def subject(request: pytest.FixtureRequest, family: Family, tmp_path: Path) -> Iterator[Subject]:
    backend = Backend(request.param.removeprefix("fake-"))
    if request.param.startswith("fake"):
        yield Subject(FakeTables(Ruleset(family, backend)), None)
        return
    host = Namespace()
    try:
        with host.entered():
            lock = XtablesLock(tmp_path / "xtables.lock")
            if backend is Backend.NFT:
                yield Subject(NftTables(family, Tools()), host)
            else:
                yield Subject(LegacyTables(family, Tools(), lock), host)
    finally:
        host.close()


def test_reading_nothing_creates_nothing(subject: Subject) -> None:
    assert subject.read() == Ruleset(subject.family, subject.tables.backend)
    if subject.host is not None:
        assert subject.host.run("nft", "list", "ruleset") == ""
        for name in ("ip", "ip6"):
            assert subject.host.run("cat", f"/proc/net/{name}_tables_names") == ""


def test_rules_and_counters_are_read(subject: Subject) -> None:
    one, two = subject.foreign
    subject.seed(f"[3:180] {one}", two, f"[7:420] {subject.broad}")
    rules = subject.read().postrouting
    assert [rule.text for rule in rules] == [one, two, subject.broad]
    if subject.keeps_counters:
        assert rules[0].counters == Counters(3, 180)
        assert rules[2].counters == Counters(7, 420)


def test_narrowed_in_its_place_with_its_counters(subject: Subject) -> None:
    one, two = subject.foreign
    subject.seed(f"[3:180] {one}", f"[7:420] {subject.broad}", f"[5:300] {two}", subject.broad)
    rules = subject.become(subject.wanted()).postrouting
    network = NETWORKS[subject.family][0]
    ours = (
        f"-s {subject.subnet} ! -d {network} ! -o docker0 -m comment --comment snatd -j MASQUERADE"
    )
    assert [rule.text for rule in rules] == [one, ours, two]
    if subject.keeps_counters:
        counters = [Counters(3, 180), Counters(7, 420), Counters(5, 300)]
        assert [rule.counters for rule in rules] == counters


def test_added_to_an_empty_table(subject: Subject) -> None:
    (rule,) = subject.become(subject.wanted()).postrouting
    assert "--comment snatd" in rule.text


def test_an_snat_keeps_its_options_through_every_shape(subject: Subject) -> None:
    target = f"SNAT --to-source {SNAT_TO[subject.family]} --random-fully --persistent"
    subject.seed(f"-s {subject.subnet} ! -o docker0 -j {target}", subject.foreign[0])
    assert subject.become(subject.wanted()).postrouting[0].text.endswith(target)
    two = subject.become(subject.wanted(2))
    ((name, rules),) = two.own_chains
    assert name.startswith("SNATD-SNAT-")
    assert rules[-1].text == f"-j {target}"
    assert subject.become(subject.wanted()).postrouting[0].text.endswith(target)
    assert subject.read(thorough=True).own_chains == ()


def test_a_chain_is_made_rewritten_and_removed(subject: Subject) -> None:
    subject.seed(subject.broad, subject.foreign[0])
    ((name, rules),) = subject.become(subject.wanted(2)).own_chains
    assert name == "SNATD-POSTROUTING"
    assert [rule.text for rule in rules] == [
        *(f"-d {network} -j RETURN" for network in NETWORKS[subject.family]),
        "-j MASQUERADE",
    ]
    gone = subject.become(Absent(subject.family))
    assert [rule.text for rule in gone.postrouting] == [subject.foreign[0]]
    assert subject.read(thorough=True).own_chains == ()


def test_a_chain_without_a_jump_is_found_by_a_thorough_look(subject: Subject) -> None:
    subject.seed(subject.broad, subject.foreign[0])
    ruleset = subject.become(subject.wanted(2))
    jump = ruleset.postrouting[0]
    if subject.host is None:
        assert isinstance(subject.tables, FakeTables)
        subject.tables.remove(jump.text)
    else:
        command = f"{subject.family.command}-{subject.tables.backend.value}"
        subject.host.run(command, "-t", "nat", "-D", "POSTROUTING", *jump.text.split(" "))
    assert subject.read().own_chains == ()
    assert [name for name, _ in subject.read(thorough=True).own_chains] == ["SNATD-POSTROUTING"]
    # And the next narrowing writes it anew.
    assert subject.become(subject.wanted(2)).own_chains == ruleset.own_chains


def test_a_chain_that_somebody_elses_rule_jumps_to_stays(subject: Subject) -> None:
    subject.seed(subject.broad, subject.foreign[0])
    subject.become(subject.wanted(2))
    theirs = f"-s {HOSTS[subject.family][0]} -j SNATD-POSTROUTING"
    if subject.host is None:
        assert isinstance(subject.tables, FakeTables)
        subject.tables.insert(theirs)
    else:
        command = f"{subject.family.command}-{subject.tables.backend.value}"
        subject.host.run(command, "-t", "nat", "-I", "POSTROUTING", *theirs.split(" "))
    chains = subject.read().own_chains
    for wanted in (subject.wanted(), Absent(subject.family)):
        transaction = subject.planned(wanted)
        assert transaction is not None
        subject.tables.apply(transaction, soon())
        assert subject.planned(wanted) is None
        assert theirs in [rule.text for rule in subject.read().postrouting]
        assert subject.read(thorough=True).own_chains == chains


def test_all_or_nothing_where_the_rule_is_gone(subject: Subject) -> None:
    subject.seed(subject.broad, subject.foreign[0])
    transaction = subject.planned(subject.wanted(2))
    assert transaction is not None
    subject.seed(subject.foreign[0])
    before = subject.read(thorough=True)
    with pytest.raises(StaleRuleset):
        subject.tables.apply(transaction, soon())
    assert subject.read(thorough=True) == before


def test_one_of_equal_rules_goes_and_the_other_stays_where_it_is(subject: Subject) -> None:
    ours = subject.become(subject.wanted()).postrouting[0].text
    one, two = subject.foreign
    subject.seed(one, f"[4:240] {ours}", two, ours)
    rules = subject.become(subject.wanted()).postrouting
    assert [rule.text for rule in rules] == [one, ours, two]
    assert rules[1] == Rule(ours)
    if subject.keeps_counters:
        assert rules[1].counters == Counters(4, 240)


def test_what_we_write_is_what_iptables_would_write(subject: Subject) -> None:
    """Its own `-D` finds our rule, byte for byte: the masks of an interface name included."""
    host = subject.host
    command = f"{subject.family.command}-{subject.tables.backend.value}"
    for networks in (1, 2):
        text = subject.become(subject.wanted(networks)).postrouting[0].text
        if host is None:
            subject.seed()
        else:
            host.run(command, "-t", "nat", "-D", "POSTROUTING", *text.split(" "))
        assert subject.read().postrouting == ()
