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

    `today` is the subnet leased now, None if unknown: a memory of another subnet is not replayed.
    Without any memory a rule of ours becomes the broad rule of its own shape again, since taking
    it away would take away the egress too. What ours no longer stands for (somebody deleted it)
    comes back at the end.
    """
    replay = memory is not None and today in (None, memory.subnet)
    left = dict(memory.replaced) if memory and replay else {}
    after: list[Rule] = []
    for rule in ruleset.postrouting:
        if not is_ours(rule):
            left.pop(rule.text, None)
            after.append(rule)
            continue
        spec = parse(rule.text)
        shape = owned_shape(rule.text, spec, ruleset)
        if shape is None:
            continue
        if memory is None:
            broad = Spec(source=spec.source, out=shape.out, target=shape.target)
            after.append(Rule(str(broad), rule.counters, shape.origin))
        elif replay and spec.source == memory.subnet:
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
    return Transaction(ruleset.family, ruleset.backend, changed, (Reason(Change.UNDONE, "revert"),))


def _shape(text: str) -> Shape | None:
    try:
        spec = parse(text)
    except RuleError:
        return None
    return Shape(spec.out, spec.target) if spec.target else None
