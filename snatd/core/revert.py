"""What was there before us, and the transaction that puts it back.

Decides only; where the memory is kept is `host.memory`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from snatd.core.errors import RuleError
from snatd.core.model import POSTROUTING, Network, Rule, Ruleset
from snatd.core.plan import ChainEdit, Change, Reason, Shape, Transaction, owned_shape
from snatd.core.rules import Spec, is_ours, parse


@dataclass(frozen=True)
class Memory:
    """The broad rules that ours stand for, in one backend and family: text and number of copies.

    No rule in it says that there was none: ours were added.
    """

    subnet: Network
    replaced: tuple[tuple[str, int], ...] = ()


def remember(transaction: Transaction, subnet: Network, before: Memory | None) -> Memory:
    """The memory to keep before a transaction is applied; what it held of this subnet stays.

    Of a rule that its owner writes again and again, the largest number of copies counts.
    """
    copies = Counter(dict(before.replaced)) if before and before.subnet == subnet else Counter()
    for edit in transaction.edits:
        if edit.chain == POSTROUTING:
            found = Counter(rule.text for rule in edit.removed if not is_ours(rule))
            copies |= found
    return Memory(subnet, tuple(copies.items()))


def revert(ruleset: Ruleset, memory: Memory | None, today: Network | None) -> Transaction:
    """All that is ours goes, and what it stands for comes back in its place.

    `today` is the subnet leased now, None if unknown: what belongs to another subnet goes without
    a replacement, and a memory of another is not replayed. Where there is no memory of a rule's
    subnet, it becomes the broad rule of its own shape again, since taking it away would take away
    the egress too. What ours no longer stands for (somebody deleted it) comes back at the end.
    """
    there = Counter(rule.text for rule in ruleset.postrouting)
    replay = memory is not None and today in (None, memory.subnet)
    # What its owner has put back since is not put back again.
    left = Counter(dict(memory.replaced)) - there if memory and replay else Counter[str]()
    after: list[Rule] = []
    for rule in ruleset.postrouting:
        if not is_ours(rule):
            after.append(rule)
            continue
        spec = parse(rule.text)
        shape = owned_shape(rule.text, spec, ruleset)
        if shape is None or today not in (None, spec.source):
            continue
        if memory is None or memory.subnet != spec.source:
            broad = Spec(source=spec.source, out=shape.out, target=shape.target)
            after.append(Rule(str(broad), rule.counters, shape.origin))
            continue
        for text in [text for text in left if _shape(text) == shape]:
            first = Rule(text, rule.counters, shape.origin)
            after += [first] + [replace(first, counters=None)] * (left.pop(text) - 1)
    for text, copies in left.items():
        after += [Rule(text)] * copies
    edits = (
        ChainEdit(POSTROUTING, ruleset.postrouting, tuple(after)),
        *(ChainEdit(name, rules, None) for name, rules in ruleset.own_chains),
    )
    changed = tuple(edit for edit in edits if edit.before != edit.after)
    return Transaction(
        ruleset.family,
        ruleset.backend,
        changed,
        (Reason(Change.UNDONE, "that is what was there before snatd"),),
    )


def _shape(text: str) -> Shape | None:
    try:
        spec = parse(text)
    except RuleError:
        return None
    return Shape(spec.out, spec.target) if spec.target else None
