"""What the tests share: a node and its rulesets in a few words, and nat tables in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_interface, ip_network

from snatd.core.deadline import Deadline
from snatd.core.desired import Absent, Desired, desired
from snatd.core.errors import BackendError, BackendFailed, StaleRuleset
from snatd.core.model import (
    POSTROUTING,
    Backend,
    Counters,
    DirectRoute,
    EgressPolicy,
    Family,
    FamilyLease,
    Hold,
    Lease,
    Link,
    Network,
    NodeState,
    Policy,
    Rule,
    Ruleset,
)
from snatd.core.plan import Transaction, applied, plan
from snatd.core.rules import own_jumps
from snatd.kernel.nft import restore_script

V4, V6 = Family.V4, Family.V6
NFT, LEGACY = Backend.NFT, Backend.LEGACY
IPTABLES = (NFT, LEGACY)

P = ip_network("172.7.21.0/24")
N = ip_network("172.7.0.0/16")
BROAD = "-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"
OURS = "-s 172.7.21.0/24 ! -d 172.7.0.0/16 ! -o docker0 -m comment --comment snatd -j MASQUERADE"
HAND_MADE = "-s 172.7.21.0/24 ! -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE"
JUMP = "-s 172.7.21.0/24 ! -o docker0 -m comment --comment snatd -j SNATD-POSTROUTING"

FAR_AWAY = Deadline(1e12)


def networks(text: str) -> tuple[Network, ...]:
    """The networks of a text with blanks between them."""
    return tuple(ip_network(word) for word in text.split())


def lease(
    subnet: str = "172.7.21.1/24",
    inside: str = "172.7.0.0/16",
    family: Family = V4,
    *,
    ipmasq: bool = False,
    whole: bool = True,
) -> Lease:
    """A lease of one family."""
    of_family = FamilyLease(ip_interface(subnet), networks(inside))
    return Lease(((family, of_family),), ipmasq=ipmasq, whole=whole)


def link(index: int, name: str, addresses: str = "") -> Link:
    return Link(index, name, tuple(ip_interface(word) for word in addresses.split()))


DOCKER0 = link(3, "docker0", "172.7.21.1/24")
FLANNEL1 = link(4, "flannel.1", "172.7.21.0/32")
ETH0 = link(2, "eth0", "192.168.33.10/24")
LO = link(1, "lo", "127.0.0.1/8 ::1/128")


def node(
    of: Lease | Hold | None = None,
    *links: Link,
    routes: str = "192.168.33.0/24@eth0 172.7.21.0/24@docker0",
    ipv6: bool = True,
    iptables_is: Backend = NFT,
) -> NodeState:
    """A node. `routes`: direct ones, `PREFIX@DEVICE`, blanks between."""
    direct = tuple(
        DirectRoute(ip_network(prefix), device)
        for prefix, device in (one.split("@") for one in routes.split())
    )
    return NodeState(
        of or lease(), links or (LO, ETH0, DOCKER0, FLANNEL1), direct, ipv6, iptables_is
    )


def wish(of: NodeState | None = None, policy: Policy | None = None, family: Family = V4) -> Desired:
    """What a node should be, where that is known."""
    result = desired(family, of or node(), policy or Policy())
    assert isinstance(result, Desired), result
    return result


def egress(how: str) -> Policy:
    return Policy(egress=EgressPolicy(how))


def listed(text: str, family: Family = V4, backend: Backend = NFT) -> Ruleset:
    """A ruleset from `-S` lines. `-N CHAIN` names a chain of ours; `[p:b]` is what `-c` gives."""
    postrouting: list[Rule] = []
    own: dict[str, list[Rule]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        found = re.fullmatch(r"(?:\[(\d+):(\d+)\] )?-([AN]) (\S+)(?: (.*))?", line)
        assert found, line
        packets, octets, verb, chain, words = found.groups()
        counters = Counters(int(packets), int(octets)) if packets else None
        rules = postrouting if chain == POSTROUTING else own.setdefault(chain, [])
        if verb == "A":
            rules.append(Rule(words, counters))
    chains = tuple((name, tuple(rules)) for name, rules in own.items())
    return Ruleset(family, backend, tuple(postrouting), chains)


def shown(ruleset: Ruleset) -> list[str]:
    """A ruleset as `-S` lines, with the counters where there are any."""
    chains = ((POSTROUTING, ruleset.postrouting), *ruleset.own_chains)
    return [f"{_prefix(rule)}-A {chain} {rule.text}" for chain, rules in chains for rule in rules]


def _prefix(rule: Rule) -> str:
    return f"[{rule.counters.packets}:{rule.counters.bytes}] " if rule.counters else ""


def plans(
    wanted: Desired | Absent, *rulesets: Ruleset, iptables_is: Backend = NFT
) -> tuple[Transaction, ...]:
    return plan(wanted, {one.backend: one for one in rulesets}, iptables_is)


def after(wanted: Desired | Absent, ruleset: Ruleset, iptables_is: Backend = NFT) -> Ruleset:
    """A ruleset after one plan; the plan after that one is empty."""
    for transaction in plans(wanted, ruleset, iptables_is=iptables_is):
        ruleset = applied(ruleset, transaction)
    assert plans(wanted, ruleset, iptables_is=iptables_is) == ()
    return ruleset


def restored(ruleset: Ruleset, script: str) -> Ruleset:
    """What `iptables-restore --noflush --counters` makes of a script: all of it or StaleRuleset.

    Understands no deletion by number: whoever writes one fails here.
    """
    chains: dict[str, list[Rule]] = {POSTROUTING: list(ruleset.postrouting)}
    chains |= {name: list(rules) for name, rules in ruleset.own_chains}
    head, *lines, commit, end = script.split("\n")
    assert (head, commit, end) == ("*nat", "COMMIT", ""), script
    for line in lines:
        _restore_line(line, chains)
    for rules in chains.values():
        for target in re.findall(
            r"(?:^|\s)-[jg] (SNATD-\S+)", "\n".join(rule.text for rule in rules)
        ):
            _demand(target in chains, f"a jump to {target}, which is gone")
    postrouting = tuple(chains.pop(POSTROUTING))
    own = tuple((name, tuple(rules)) for name, rules in chains.items())
    return replace(ruleset, postrouting=postrouting, own_chains=own)


def _restore_line(line: str, chains: dict[str, list[Rule]]) -> None:
    found = re.fullmatch(r"(?:\[(\d+):(\d+)\] )?(:|-[ADIFX] )(\S+)(?: (.*))?", line, re.DOTALL)
    assert found, f"not a line that snatd writes: {line!r}"
    packets, octets, verb, chain, words = found.groups()
    words = words or ""
    counters = Counters(int(packets), int(octets)) if packets else None
    if verb == ":":
        assert words == "- [0:0]", line
        chains[chain] = []
        return
    _demand(chain in chains, f"no chain {chain}")
    rules = chains[chain]
    match verb.strip():
        case "-A":
            target = re.search(r"-[jg] (SNATD-\S+)", words)
            _demand(target is None or target[1] in chains, f"{line}: no such target yet")
            rules.append(Rule(words, counters))
        case "-I":
            number, _, text = words.partition(" ")
            _demand(0 < int(number) <= len(rules) + 1, f"{line}: index past the end")
            rules.insert(int(number) - 1, Rule(text, counters))
        case "-D":
            assert not words.isdigit(), f"{line}: removes by number"
            _demand(Rule(words) in rules, f"{line}: no such rule")
            rules.remove(Rule(words))
        case "-F":
            rules.clear()
        case "-X":
            _demand(not rules, f"{line}: not empty")
            del chains[chain]


def _demand(right: bool, otherwise: str) -> None:
    if not right:
        raise StaleRuleset(otherwise)


Hook = Callable[["FakeTables"], None]


@dataclass
class FakeTables:
    """nat tables in memory. nft obeys the very restore script, legacy compares and swaps.

    `before_apply` runs between read and write, `after_apply` right behind a write; both are where
    a rival writes. `reads` and `writes` hold what the next calls raise, None for nothing.
    """

    ruleset: Ruleset
    before_apply: Hook = lambda _: None
    after_apply: Hook = lambda _: None
    reads: list[BackendError | None] = field(default_factory=list)
    writes: list[BackendError | None] = field(default_factory=list)
    read_count: int = 0
    written: list[Transaction] = field(default_factory=list)

    @property
    def family(self) -> Family:
        return self.ruleset.family

    @family.setter
    def family(self, family: Family) -> None:
        self.ruleset = replace(self.ruleset, family=family)

    @property
    def backend(self) -> Backend:
        return self.ruleset.backend

    def read(self, deadline: Deadline, *, thorough: bool = False) -> Ruleset:
        deadline.remaining_s(0.0)
        self.read_count += 1
        _raise_next(self.reads)
        seen = own_jumps(self.ruleset.postrouting)
        own = tuple((n, rules) for n, rules in self.ruleset.own_chains if thorough or n in seen)
        return replace(self.ruleset, own_chains=own)

    def apply(self, transaction: Transaction, deadline: Deadline) -> None:
        deadline.remaining_s(0.0)
        self.before_apply(self)
        _raise_next(self.writes)
        if self.backend is NFT:
            self.ruleset = restored(self.ruleset, restore_script(transaction))
        else:
            for edit in transaction.edits:
                # A chain of ours that nothing jumps to is not read, and written anew all the same.
                known = edit.before is not None or edit.chain == POSTROUTING
                there = self.ruleset.chain(edit.chain) or ()
                _demand(not known or there == (edit.before or ()), "moved")
            self.ruleset = applied(self.ruleset, transaction)
        self.written.append(transaction)
        self.after_apply(self)

    def insert(self, text: str, position: int = 0) -> None:
        """A rival's `-I POSTROUTING`."""
        rules = list(self.ruleset.postrouting)
        rules.insert(position, Rule(text))
        self.ruleset = replace(self.ruleset, postrouting=tuple(rules))

    def remove(self, text: str) -> None:
        """A rival's `-D POSTROUTING`; nothing where there is no such rule."""
        rules = list(self.ruleset.postrouting)
        if Rule(text) in rules:
            rules.remove(Rule(text))
        self.ruleset = replace(self.ruleset, postrouting=tuple(rules))

    @property
    def texts(self) -> list[str]:
        return [rule.text for rule in self.ruleset.postrouting]


def _raise_next(errors: list[BackendError | None]) -> None:
    error = errors.pop(0) if errors else None
    if error is not None:
        raise error


def once(hook: Hook) -> Hook:
    """A hook that acts the first time only."""
    todo = [hook]

    def act(tables: FakeTables) -> None:
        if todo:
            todo.pop()(tables)

    return act


def replacing(old: str, new: str, at: int = 0) -> Hook:
    """A rival that takes one rule away and inserts another."""

    def act(tables: FakeTables) -> None:
        tables.remove(old)
        tables.insert(new, at)

    return act


def texts(rules: Iterable[Rule]) -> list[str]:
    return [rule.text for rule in rules]


def refused(message: str = "refused") -> BackendFailed:
    return BackendFailed(message)


def each_line(lines: Sequence[str]) -> str:
    """Lines as one text, so that a difference reads like a diff."""
    return "\n".join(lines)
