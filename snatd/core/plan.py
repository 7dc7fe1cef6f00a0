"""The differences between desired and actual, as transactions: pure, printable, empty if in sync.

Knows what a rule is worth (broad, ours, hand-made, foreign) and where ours goes. Knows nothing of
how a backend writes.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from snatd.core.desired import Absent, Desired
from snatd.core.errors import RuleError
from snatd.core.model import (
    OWN_CHAIN_PREFIX,
    OWN_COMMENT,
    POSTROUTING,
    Backend,
    Family,
    Hold,
    Network,
    Rule,
    Ruleset,
)
from snatd.core.networks import contains
from snatd.core.rules import SNAT_TARGETS, Match, Spec, Target, is_ours, parse
from snatd.core.xtables import targets

MASQUERADE = Target("MASQUERADE")


@dataclass(frozen=True)
class ChainEdit:
    """One chain as it was read and as it shall be. None: the chain does not exist, or goes."""

    chain: str
    before: tuple[Rule, ...] | None
    after: tuple[Rule, ...] | None

    @property
    def removed(self) -> tuple[Rule, ...]:
        return _minus(self.before or (), self.after or ())

    @property
    def added(self) -> tuple[Rule, ...]:
        return _minus(self.after or (), self.before or ())

    @property
    def touched(self) -> frozenset[str]:
        """The texts that a writer takes out and puts in again: what goes, what comes, and where
        the rest is in another order, what is ours. A foreign rule is never moved."""
        texts = frozenset(rule.text for rule in (*self.removed, *self.added))
        before = [rule for rule in self.before or () if rule.text not in texts]
        after = [rule for rule in self.after or () if rule.text not in texts]
        moved = () if before == after else (rule.text for rule in after if is_ours(rule))
        return texts.union(moved)


class Change(enum.Enum):
    """What a transaction is for. The value is the name of the event that tells of it."""

    NARROWED = "rule_narrowed"
    ADDED = "rule_added"
    STALE = "stale_rule_removed"
    CHAIN = "own_chain_rewritten"
    GUARD_WRITTEN = "guard_written"
    GUARD_REMOVED = "guard_removed"
    UNDONE = "change_undone"


@dataclass(frozen=True)
class Reason:
    """One purpose of a transaction, and why, in words."""

    change: Change
    why: str


@dataclass(frozen=True)
class Transaction:
    """What one backend of one family applies whole or not at all."""

    family: Family
    backend: Backend
    edits: tuple[ChainEdit, ...]
    reasons: tuple[Reason, ...] = ()

    @property
    def removed(self) -> tuple[str, ...]:
        return self._lines((edit.chain, rule) for edit in self.edits for rule in edit.removed)

    def removed_for(self, reason: Reason) -> tuple[str, ...]:
        """Of several reasons one is about what somebody wrote, the others about what is ours."""
        if len(self.reasons) < 2:
            return self.removed
        narrowed = reason.change is Change.NARROWED
        return self._lines(
            (edit.chain, rule)
            for edit in self.edits
            for rule in edit.removed
            if (edit.chain == POSTROUTING and not is_ours(rule)) is narrowed
        )

    @property
    def added(self) -> tuple[str, ...]:
        return self._lines((edit.chain, rule) for edit in self.edits for rule in edit.added)

    def _lines(self, rules: Iterable[tuple[str, Rule]]) -> tuple[str, ...]:
        return tuple(self.backend.line(chain, rule.text) for chain, rule in rules)


def applied(ruleset: Ruleset, transaction: Transaction) -> Ruleset:
    """What a ruleset is after a transaction that found it as it was read."""
    chains = dict(ruleset.own_chains)
    postrouting = ruleset.postrouting
    for edit in transaction.edits:
        if edit.chain == POSTROUTING:
            postrouting = edit.after or ()
        elif edit.after is None:
            chains.pop(edit.chain, None)
        else:
            chains[edit.chain] = edit.after
    return replace(ruleset, postrouting=postrouting, own_chains=tuple(chains.items()))


@dataclass(frozen=True)
class Shape:
    """What a source-rewriting rule of P carries besides P and N: interface and target."""

    out: Match | None
    target: Target
    origin: tuple[str, str] | None = field(default=None, compare=False)
    """Chain and text of the rule whose target this is."""

    def is_egress_past(self, bridge: str) -> bool:
        """Whether it covers all that leaves the node: no interface, or `! -o BRIDGE`."""
        return self.out is None or (self.out.negated and self.out.value == bridge)


@dataclass(frozen=True)
class _Broad:
    shape: Shape


@dataclass(frozen=True)
class _HandMade:
    shape: Shape


@dataclass(frozen=True)
class _Owned:
    """Carries our comment. `shape` is None where nothing can be carried over into today's rule."""

    shape: Shape | None
    source: Network | None


_Kind = _Broad | _HandMade | _Owned | None


def _kind(rule: Rule, ruleset: Ruleset, wanted: Desired) -> _Kind:
    """What a rule of POSTROUTING is to us; None is foreign."""
    if "\n" in rule.text:
        return None
    try:
        spec = parse(rule.text)
    except RuleError:
        return None
    if spec.owned:
        return _Owned(
            owned_shape(rule.text, spec, ruleset), None if spec.source_negated else spec.source
        )
    return _kind_of_anothers(rule.text, spec, wanted)


def unwritable(wanted: Desired, ruleset: Ruleset) -> tuple[int, ...]:
    """The numbers of broad rules that stay, since no restore could name them: with a comment over
    two lines, or an interface with a quote in its name."""
    found = []
    for number, rule in enumerate(ruleset.postrouting, 1):
        if str(wanted.subnet) in rule.text and _kind(rule, ruleset, wanted) is None:
            with suppress(RuleError):
                spec = parse(rule.text, any_device=True)
                if isinstance(_kind_of_anothers(rule.text, spec, wanted), _Broad):
                    found.append(number)
    return tuple(found)


def _kind_of_anothers(text: str, spec: Spec, wanted: Desired) -> _Broad | _HandMade | None:
    target = spec.target
    if (
        spec.source != wanted.subnet
        or spec.source_negated
        or spec.others
        or target is None
        or target.goto
        or target.name not in SNAT_TARGETS
    ):
        return None
    shape = Shape(spec.out, target, (POSTROUTING, text))
    if spec.destination is None:
        return _Broad(shape)
    if not spec.destination_negated:
        return None
    if all(contains(spec.destination, network) for network in wanted.networks):
        return _HandMade(shape)
    within = any(contains(network, spec.destination) for network in wanted.cluster)
    return _Broad(shape) if within else None


def owned_shape(text: str, spec: Spec, ruleset: Ruleset) -> Shape | None:
    if spec.others or spec.target is None:
        return None
    name = spec.target.name
    if name in SNAT_TARGETS:
        return Shape(spec.out, spec.target, (POSTROUTING, text))
    rules = ruleset.chain(name)
    if not rules:
        # Emptied by somebody. The plain chain's name says what it ended in; another's is lost.
        return Shape(spec.out, MASQUERADE) if name == chain_name(MASQUERADE) else None
    for rule in rules:
        if "\n" in rule.text:  # not to be told for certain, and not to be written again
            continue
        with suppress(RuleError):
            target = parse(rule.text).target
            if target is not None and target.name in SNAT_TARGETS:
                return Shape(spec.out, target, (name, rule.text))
    return None


def chain_name(target: Target) -> str:
    """The chain of ours that ends in a target. The plain one has the plain name."""
    if target == MASQUERADE:
        return f"{OWN_CHAIN_PREFIX}{POSTROUTING}"
    # Few nodes have one, and this loads OpenSSL: 3.5 MB.
    import hashlib

    # A second target (SNAT to a host address, say) needs a chain of its own, found again by what
    # it does and not by what we remember. 28 characters are the kernel's limit; this has 19.
    digest = hashlib.sha256(str(target).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{OWN_CHAIN_PREFIX}{target.name[:4]}-{digest}"


def narrowed(wanted: Desired, shape: Shape) -> Spec:
    """The rule of ours that stands in POSTROUTING for a shape."""
    spec = Spec(source=wanted.subnet, out=shape.out, comment=OWN_COMMENT)
    if len(wanted.networks) == 1:
        (network,) = wanted.networks
        return replace(spec, destination=network, destination_negated=True, target=shape.target)
    return replace(spec, target=Target(chain_name(shape.target)))


def own_chain(wanted: Desired, target: Target) -> tuple[Spec, ...]:
    """The chain for several networks, which one `! -d` cannot say: RETURNs and the target."""
    returns = (Spec(destination=one, target=Target("RETURN")) for one in wanted.networks)
    return (*returns, Spec(target=target))


def plan(
    wanted: Desired | Absent,
    rulesets: Mapping[Backend, Ruleset],
    iptables_is: Backend,
) -> tuple[Transaction, ...]:
    """The transactions of one family, in the order of the backends given.

    `rulesets` holds the backends that could be read. Where no rule masquerades what leaves the
    node and one is wanted, ours is added to the backend that the node's iptables command is.
    """
    if isinstance(wanted, Absent):
        if not wanted.certain:
            return ()
        stale = (_without_ours(ruleset) for ruleset in rulesets.values())
        return tuple(transaction for transaction in stale if transaction.edits)
    if isinstance(wanted.bridge, Hold):
        return ()
    bridge = wanted.bridge
    has_egress = any(_has_egress(ruleset, wanted, bridge) for ruleset in rulesets.values())
    transactions = []
    for backend, ruleset in rulesets.items():
        add = wanted.add_egress and not has_egress and backend is iptables_is
        transaction = _backend_plan(ruleset, wanted, bridge, add)
        if transaction.edits:
            transactions.append(transaction)
    return tuple(transactions)


def _has_egress(ruleset: Ruleset, wanted: Desired, bridge: str) -> bool:
    for rule in ruleset.postrouting:
        match _kind(rule, ruleset, wanted):
            case _Broad(shape) | _HandMade(shape) if shape.is_egress_past(bridge):
                return True
            case _Owned(Shape() as shape, source) if (
                source == wanted.subnet and shape.is_egress_past(bridge)
            ):
                return True
            case None if wanted.flannel_egress_counts and _is_flannels(rule, wanted):
                return True
    return False


def _is_flannels(rule: Rule, wanted: Desired) -> bool:
    """flannel's own masquerade: FLANNEL-POSTRTG (v0.20 on) or its rule for N (before)."""
    try:
        spec = parse(rule.text)
    except RuleError:
        return False
    if spec.target is None or spec.source_negated:
        return False
    if spec.target.name == "FLANNEL-POSTRTG":
        return True
    return (
        spec.target.name == "MASQUERADE"
        and not spec.others
        and spec.source in wanted.flannel_networks
        and spec.destination == wanted.family.multicast
        and spec.destination_negated
    )


def _backend_plan(ruleset: Ruleset, wanted: Desired, bridge: str, add_egress: bool) -> Transaction:
    kinds = [(rule, _kind(rule, ruleset, wanted)) for rule in ruleset.postrouting]
    # What is right already stays where it is; a broad rule of the same shape only goes.
    standing = {kind.shape for _, kind in kinds if isinstance(kind, _HandMade)}
    in_place = {
        rule.text
        for rule, kind in kinds
        if isinstance(kind, _Owned)
        and kind.shape is not None
        and rule.text == str(narrowed(wanted, kind.shape))
    }
    after: list[Rule] = []
    reasons: dict[Reason, None] = {}
    chains: dict[str, Shape] = {}
    written: set[str] = set()

    def put(shape: Shape, old: Rule | None) -> None:
        new = str(narrowed(wanted, shape))
        stays = old is not None and old.text == new
        if new in written or (not stays and (new in in_place or shape in standing)):
            return
        written.add(new)
        if len(wanted.networks) > 1:
            chains[chain_name(shape.target)] = shape
        after.append(
            old if old and stays else Rule(new, old.counters if old else None, shape.origin)
        )

    for rule, kind in kinds:
        match kind:
            case None | _HandMade():
                after.append(rule)
            case _Broad(shape):
                reasons[_broad_reason(wanted)] = None
                put(shape, rule)
            case _Owned(shape, source):
                if shape is not None and source != wanted.subnet:
                    # Of an older lease. Its place and its target serve the rule that is to come.
                    new = replace(shape, out=Match(bridge, negated=True))
                    shape, add_egress = (new if add_egress else None), False
                if rule.text not in in_place or rule.text in written:
                    reasons[_stale_reason(wanted)] = None
                if shape is not None:
                    put(shape, rule)
    if add_egress:
        why = f"nothing masquerades what {wanted.subnet} sends elsewhere"
        reasons[Reason(Change.ADDED, why)] = None
        put(Shape(Match(bridge, negated=True), MASQUERADE), None)
    edits = (
        *_chain_edits(ruleset, wanted, chains),
        *without_chains(ruleset, after, keep=chains),
        ChainEdit(POSTROUTING, ruleset.postrouting, tuple(after)),
    )
    changed = tuple(edit for edit in edits if edit.before != edit.after)
    if changed and not reasons:
        why = f"our chain is not what {wanted.inside} need"
        reasons[Reason(Change.CHAIN, why)] = None
    return Transaction(ruleset.family, ruleset.backend, changed, tuple(reasons))


def _broad_reason(wanted: Desired) -> Reason:
    why = f"it hides the addresses of {wanted.subnet} from {wanted.inside}"
    return Reason(Change.NARROWED, why)


def _stale_reason(wanted: Desired) -> Reason:
    now = f"{wanted.subnet} inside {wanted.inside}"
    why = f"it is ours, but there twice, or not what lease and configuration now want for {now}"
    return Reason(Change.STALE, why)


def _chain_edits(
    ruleset: Ruleset, wanted: Desired, chains: Mapping[str, Shape]
) -> Iterable[ChainEdit]:
    """The chains of ours that POSTROUTING will need."""
    for name, shape in chains.items():
        *returns, last = own_chain(wanted, shape.target)
        rules = (*(Rule(str(one)) for one in returns), Rule(str(last), like=shape.origin))
        yield ChainEdit(name, ruleset.chain(name), rules)


def without_chains(
    ruleset: Ruleset, after: Iterable[Rule], keep: Collection[str] = ()
) -> Iterable[ChainEdit]:
    """The end of the chains of ours. One stays that somebody else's rule in POSTROUTING, as it
    will be, jumps to: the kernel would refuse the whole transaction."""
    idle = [(name, rules) for name, rules in ruleset.own_chains if name not in keep]
    jumped_to = targets(after) if idle else ()
    for name, rules in idle:
        if name not in jumped_to:
            yield ChainEdit(name, rules, None)


def _without_ours(ruleset: Ruleset) -> Transaction:
    """All that is ours goes; for a family that the lease no longer has."""
    kept = tuple(rule for rule in ruleset.postrouting if not is_ours(rule))
    edits = [ChainEdit(POSTROUTING, ruleset.postrouting, kept)] * (kept != ruleset.postrouting)
    edits += without_chains(ruleset, kept)
    reason = Reason(Change.STALE, f"flannel leases no {ruleset.family.value} subnet to this node")
    return Transaction(ruleset.family, ruleset.backend, tuple(edits), (reason,))


def _minus(minuend: tuple[Rule, ...], subtrahend: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of one chain that another has not, copies counted."""
    left = [rule.text for rule in subtrahend]
    result = []
    for rule in minuend:
        if rule.text in left:
            left.remove(rule.text)
        else:
            result.append(rule)
    return tuple(result)
