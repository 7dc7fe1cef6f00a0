"""After a write: what moves ours back to its place, and what takes the whole write back.

Decides only; the transactions are applied like any other.
"""

from __future__ import annotations

from dataclasses import replace

from snatd.core.model import POSTROUTING, Rule, Ruleset
from snatd.core.plan import ChainEdit, Change, Reason, Transaction


def misplaced(transaction: Transaction, actual: Ruleset) -> Transaction | None:
    """The transaction that moves ours to where it was meant to go, if a rival's write came between.

    The number in an insert counts rules at the time of the write. Where one was added or removed
    before it, ours may stand on the wrong side of a foreign rule: of one that was read, or of one
    that came to the head since and now stands right behind ours.
    """
    for edit in transaction.edits:
        if edit.chain != POSTROUTING or not edit.after or not edit.removed:
            continue
        ours = {rule.text for rule in edit.added}
        order = [rule.text for rule in edit.after]
        chain = [rule for rule in actual.postrouting if rule.text not in ours]
        for rule in actual.postrouting:
            if rule.text in ours:
                place = _behind(order[: order.index(rule.text)], chain)
                while place < len(chain) and chain[place].text not in order:
                    place += 1
                chain.insert(place, rule)
        if tuple(chain) != actual.postrouting:
            reason = Reason(
                Change.CHAIN, "another program wrote at the same moment: order restored"
            )
            fix = ChainEdit(POSTROUTING, actual.postrouting, tuple(chain))
            return replace(transaction, edits=(fix,), reasons=(reason,))
    return None


def _behind(wanted: list[str], chain: list[Rule]) -> int:
    """Right behind the last of some rules, met in a chain one after the other; copies count."""
    place = 0
    for text in wanted:
        place = next((n + 1 for n in range(place, len(chain)) if chain[n].text == text), place)
    return place


def undone(transaction: Transaction, actual: Ruleset) -> Transaction:
    """What puts back what a transaction changed; others may have changed the ruleset since."""
    # A target comes back from the rule of ours that took it over.
    likes = {
        rule.like: (edit.chain, rule.text)
        for edit in transaction.edits
        for rule in edit.after or ()
        if rule.like is not None
    }
    edits = []
    for edit in transaction.edits:
        now = actual.chain(edit.chain)
        if edit.chain != POSTROUTING:
            edits += [ChainEdit(edit.chain, now, edit.before)]
            continue
        ours = {rule.text for rule in edit.added}
        back = [rule for rule in now or () if rule.text not in ours]
        gone = [rule.text for rule in edit.removed]
        place = 0
        for rule in edit.before or ():
            if rule.text in gone:
                gone.remove(rule.text)
                back.insert(place, replace(rule, like=likes.get((POSTROUTING, rule.text))))
                place += 1
            elif rule in back[place:]:
                place = back.index(rule, place) + 1
        edits.append(ChainEdit(POSTROUTING, now, tuple(back)))
    changed = tuple(edit for edit in edits if edit.before != edit.after)
    return replace(
        transaction, edits=changed, reasons=(Reason(Change.UNDONE, "nobody confirmed it in time"),)
    )
