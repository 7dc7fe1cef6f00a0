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

    No rule in it says that there was none: ours were added.
    """

    subnet: Network
    replaced: tuple[tuple[str, int], ...] = ()


def remember(transaction: Transaction, subnet: Network, before: Memory | None) -> Memory:
    """The memory to keep before a transaction is applied; `before` is what it was for this subnet.

    Of a rule that its owner writes again and again, the largest number of copies counts.
    """
    kept = before.replaced if before and before.subnet == subnet else ()
    copies = Counter(dict(kept))
    for edit in transaction.edits:
        if edit.chain == POSTROUTING:
            copies |= Counter(rule.text for rule in edit.removed if not is_ours(rule))
    return Memory(subnet, tuple(copies.items()))


def revert(ruleset: Ruleset, memories: Sequence[Memory], today: Network | None) -> Transaction:
    """All that is ours goes, and what it stands for comes back in its place.

    `today` is the subnet leased now, None if unknown: what belongs to another subnet goes without
    a replacement, and a memory of another is not replayed. Where there is no memory of a rule's
    subnet, it becomes the broad rule of its own shape again, since taking it away would take away
    the egress too. What ours no longer stands for (somebody deleted it) comes back at the end.
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
    if known is not None:
        for text, copies in left.get(known, Counter[str]()).items():
            after += [Rule(text)] * copies
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
