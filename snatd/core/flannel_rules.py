"""flannel's own iptables rules: of an older lease, in the wrong order, or there twice. Pure.

flannel looks every few seconds whether each of them exists, never at their order. Versions before
0.20 write them to POSTROUTING, later ones to FLANNEL-POSTRTG.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from snatd.core.desired import Desired
from snatd.core.errors import RuleError
from snatd.core.finding import Finding, Severity
from snatd.core.model import POSTROUTING, Network
from snatd.core.networks import contains
from snatd.core.packet import Hook
from snatd.core.rivals import Where, rule_command
from snatd.core.rules import Spec, parse
from snatd.core.xtables import iptables_of

_CHAIN, _COMMENT = "FLANNEL-POSTRTG", "flanneld masq"
_RESTART = "systemctl restart flanneld"


@dataclass(frozen=True)
class _Own:
    """A rule of flannel's. `number` as in `iptables -S`'s order."""

    command: str
    chain: str
    number: int
    text: str
    spec: Spec

    def __str__(self) -> str:
        return f"{self.command} -t nat, rule {self.number}: -A {self.chain} {self.text}"

    def commanded(self, how: str) -> str:
        return rule_command(self.command, how, self.chain, self.text)

    @property
    def masquerades(self) -> bool:
        return self.spec.target is not None and self.spec.target.name == "MASQUERADE"


def flannel_rules(
    hooks: Sequence[Hook], wanted: Desired, hiding: Collection[Where | None]
) -> Iterator[Finding]:
    """`hiding`: the rules that do SNAT cluster traffic now."""
    for hook in hooks:
        for chain in (POSTROUTING, _CHAIN):
            stale, rest = _of_chain(hook, chain, wanted)
            if stale:
                yield _stale(stale, wanted)
            if early := _early(rest, wanted):
                hides = any((hook.table, chain, one.text) in hiding for one in early)
                yield _misordered(early, rest, wanted, hides=hides)
            elif copies := _copies(rest):
                yield _twice(copies, rest, wanted)


def early_rules(hooks: Sequence[Hook], wanted: Desired) -> frozenset[Where]:
    """The rules that `flannel_rules` says are in the wrong order."""
    return frozenset(
        (hook.table, chain, one.text)
        for hook in hooks
        for chain in (POSTROUTING, _CHAIN)
        for one in _early(_of_chain(hook, chain, wanted)[1], wanted)
    )


def _of_chain(hook: Hook, chain: str, wanted: Desired) -> tuple[list[_Own], list[_Own]]:
    """flannel's rules in it: those of another lease, and the rest."""
    command, _ = iptables_of(hook.table)
    rules = list(_own(hook, chain, command, wanted)) if command else []
    stale = [one for one in rules if _is_stale(one, wanted)]
    return stale, [one for one in rules if one not in stale]


def _own(hook: Hook, chain: str, command: str, wanted: Desired) -> Iterator[_Own]:
    specs = []
    for step in hook.chains.get(chain, ()):
        # What nft printed, since iptables could not, is in another language.
        with suppress(RuleError):
            specs.append((step, parse(step.text)))
    networks = {
        spec.source
        for _, spec in specs
        if spec.source and spec.source == spec.destination and not spec.others
    }
    known = {*wanted.flannel_networks, *networks}
    for step, spec in specs:
        if chain == _CHAIN or spec.comment == _COMMENT or _is_bare(spec, known, wanted):
            yield _Own(command, chain, step.number, step.text, spec)


def _is_bare(spec: Spec, networks: Collection[Network | None], wanted: Desired) -> bool:
    """A rule of a flannel that wrote no comments: before 0.11."""
    source, destination, target = spec.source, spec.destination, spec.target
    if source not in networks or destination is None or target is None or spec.others or spec.out:
        return False
    match spec.source_negated, spec.destination_negated, target.name:
        case False, False, "RETURN":
            return source == destination
        case False, True, "MASQUERADE":
            return destination == wanted.family.multicast
        case True, False, "RETURN" | "MASQUERADE":
            return source is not None and contains(source, destination)
    return False


def _is_stale(one: _Own, wanted: Desired) -> bool:
    named = {one.spec.source, one.spec.destination} - {None, wanted.family.multicast}
    return not named <= {wanted.subnet, *wanted.flannel_networks}


def _early(rules: Sequence[_Own], wanted: Desired) -> list[_Own]:
    """The masquerades of the network that are reached before anything lets the subnet's traffic
    into that network go."""
    found = []
    for number, one in enumerate(rules):
        source = one.spec.source
        if source is None or one.spec.source_negated or not one.masquerades:
            continue
        if not any(_lets_go(other, source, wanted) for other in rules[:number]):
            found.append(one)
    return found


def _lets_go(one: _Own, network: Network, wanted: Desired) -> bool:
    spec = one.spec
    return (
        spec.target is not None
        and spec.target.name in ("RETURN", "ACCEPT")
        and not (spec.others or spec.out or spec.source_negated or spec.destination_negated)
        and spec.source is not None
        and spec.destination is not None
        and contains(spec.source, wanted.subnet)
        and contains(spec.destination, network)
    )


def _copies(rules: Sequence[_Own]) -> list[_Own]:
    """The copies beyond the first."""
    seen = Counter[str]()
    found = []
    for one in rules:
        seen[one.text] += 1
        if seen[one.text] > 1:
            found.append(one)
    return found


def _stale(rules: Sequence[_Own], wanted: Desired) -> Finding:
    return Finding(
        "flannel_stale",
        Severity.WARNING,
        "rules of flannel's are for another lease than this node's",
        (
            *map(str, rules),
            f"leased are {wanted.subnet} of {', '.join(map(str, wanted.flannel_networks))}",
        ),
        "they do not let this subnet's traffic through, and may masquerade it",
        (*(one.commanded("-D") for one in rules), _RESTART),
    )


def _misordered(
    wrong: Sequence[_Own], rules: Sequence[_Own], wanted: Desired, *, hides: bool
) -> Finding:
    source = wrong[0].spec.source
    assert source is not None
    letting = [one for one in rules if _lets_go(one, source, wanted)]
    right = [one for one in rules if one not in wrong and one.masquerades]
    moves = [one.commanded("-D") for one in wrong]
    for one in dict.fromkeys(one.commanded("-A") for one in wrong):
        if not any(other.commanded("-A") == one for other in right):
            moves.append(one)
    return Finding(
        "flannel_order",
        Severity.ERROR if hides else Severity.WARNING,
        "flannel's rules masquerade cluster traffic before they let it go",
        (
            *map(str, wrong),
            *(
                map(str, letting)
                if letting
                else (f"no rule lets {wanted.subnet} into {source} go",)
            ),
        ),
        "other nodes see this node's address instead of the container's"
        + ("" if hides else ", if nothing in front keeps it"),
        tuple(moves) if letting else (_RESTART,),
    )


def _twice(copies: Sequence[_Own], rules: Sequence[_Own], wanted: Desired) -> Finding:
    # `-D` takes the first of equal rules, so the last stay. Masquerades go first, so that none is
    # ever without what has to be before it, and come back last where the one that stays would be.
    last = [one for n, one in enumerate(rules) if one.text not in {r.text for r in rules[n + 1 :]}]
    moved = {one.text: one for one in _early(last, wanted)}
    gone = [one for one in copies if one.text not in moved]
    gone.sort(key=lambda one: not one.masquerades)
    return Finding(
        "flannel_twice",
        Severity.WARNING,
        "rules of flannel's are there more than once",
        tuple(map(str, copies)),
        "flannel removes one copy when it ends or its lease changes, and the others stay",
        (
            "# each line once: typed again, it takes the copy that stays",
            *(one.commanded("-D") for one in rules if one.text in moved),
            *(one.commanded("-D") for one in gone),
            *(one.commanded("-A") for one in moved.values()),
        ),
    )
