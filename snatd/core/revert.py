"""What was there before us, and the transaction that puts it back.

Decides only; where the memory is kept is `host.memory`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from snatd.core.errors import RuleError
from snatd.core.model import POSTROUTING, Network, Rule, Ruleset
from snatd.core.plan import (
    ChainEdit,
    Change,
    Reason,
    Shape,
    Transaction,
    owned_shape,
    without_chains,
)
from snatd.core.rules import Spec, is_ours, parse


@dataclass(frozen=True)
class Memory:
    """The broad rules that ours stand for, in one backend and family: text and number of copies.

    No rule in it says that there was none: ours were added. `gone`: texts of those that would not
    be there without us either, see `lapsed`.
    """

    subnet: Network
    replaced: tuple[tuple[str, int], ...] = ()
    gone: frozenset[str] = frozenset()


def remember(transaction: Transaction, subnet: Network, before: Memory | None) -> Memory:
    """The memory to keep before a transaction is applied; `before` is what it was for this subnet.

    Of a rule that somebody writes again and again, the number of copies that there were at first
    counts: what a rival leaves in between is not what was there before snatd.
    """
    if before is None or before.subnet != subnet:
        before = Memory(subnet)
    copies, gone = Counter(dict(before.replaced)), before.gone
    for edit in transaction.edits:
        if edit.chain == POSTROUTING:
            here = Counter(rule.text for rule in edit.removed if not is_ours(rule))
            for text in here:
                if text in gone or text not in copies:
                    copies[text] = here[text]
            gone -= here.keys()
    return Memory(subnet, tuple(copies.items()), gone)


def lapsed(memory: Memory, transaction: Transaction) -> Memory:
    """What a transaction says of other memories of its family and subnet, in whichever backend.

    Ours is added where nothing masquerades any more: a boot or somebody's flush took ours away,
    and would have taken what it stood for.
    """
    if all(reason.change is not Change.ADDED for reason in transaction.reasons):
        return memory
    return replace(memory, gone=frozenset(text for text, _ in memory.replaced))


def revert(ruleset: Ruleset, memories: Sequence[Memory], today: Network | None) -> Transaction:
    """All that is ours goes, and what it stands for comes back in its place.

    `today` is the subnet leased now, None if unknown: what belongs to another subnet goes without
    a replacement, and a memory of another is not replayed. Where there is no memory of a rule's
    subnet, it becomes the broad rule of its own shape again, since taking it away would take away
    the egress too. What ours no longer stands for (somebody deleted it) comes back at the end,
    unless it would be gone anyway, as where all rules of the chain are.
    """
    there = Counter(rule.text for rule in ruleset.postrouting)
    # What its owner has put back since is not put back again.
    left = {one.subnet: Counter(dict(one.replaced)) - there for one in memories}
    after: list[Rule] = []
    guessed = False
    for rule in ruleset.postrouting:
        if not is_ours(rule):
            after.append(rule)
            continue
        spec = parse(rule.text)
        shape = owned_shape(rule.text, spec, ruleset)
        if shape is None or spec.source is None or today not in (None, spec.source):
            continue
        if spec.source not in left:
            guessed = True
            broad = Spec(source=spec.source, out=shape.out, target=shape.target)
            after.append(Rule(str(broad), rule.counters, shape.origin))
            continue
        of_subnet = left[spec.source]
        for text in [text for text in of_subnet if _shape(text) == shape]:
            first = Rule(text, rule.counters, shape.origin)
            after += [first] + [replace(first, counters=None)] * (of_subnet.pop(text) - 1)
    known = today or (memories[-1].subnet if memories else None)
    gone = {text for one in memories if one.subnet == known for text in one.gone}
    if known is not None and ruleset.postrouting:
        for text, copies in left.get(known, Counter[str]()).items():
            after += [] if text in gone else [Rule(text)] * copies
    edits = (
        ChainEdit(POSTROUTING, ruleset.postrouting, tuple(after)),
        *without_chains(ruleset, after),
    )
    changed = tuple(edit for edit in edits if edit.before != edit.after)
    return Transaction(
        ruleset.family,
        ruleset.backend,
        changed,
        (Reason(Change.UNDONE, _GUESSED if guessed else _KNOWN),),
    )


_KNOWN = "that is what was there before snatd"
_GUESSED = "what was there before is not remembered: this is the rule of the same shape"


def _shape(text: str) -> Shape | None:
    try:
        spec = parse(text)
    except RuleError:
        return None
    return Shape(spec.out, spec.target) if spec.target else None
