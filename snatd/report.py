"""What a view means in words, in JSON and as an exit status. Pure; prints nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from snatd.core.desired import Desired
from snatd.core.errors import BackendBusy, NotConverged
from snatd.core.model import Backend, Family, Hold, Lease, Ruleset, count
from snatd.core.plan import Transaction
from snatd.core.proof import Probe
from snatd.core.rules import is_ours, own_jumps
from snatd.reconcile import View

EXIT_OK, EXIT_DRIFT, EXIT_USAGE, EXIT_WAITING, EXIT_FAILING = 0, 1, 2, 3, 4
EXIT_NOT_PERMITTED, EXIT_CONFIG = 77, 78

# Between the parts of a daemon's headline, where only ASCII will do.
SEPARATOR = " - "


@dataclass(frozen=True)
class Answer:
    """What a command has to say: as JSON, as lines, to stderr, and as its exit status."""

    document: dict[str, Any]
    lines: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    exit_code: int = EXIT_OK


def exit_code(view: View) -> int:
    """Of several reasons, the one that most needs a person: failing, then drift, then waiting."""
    if view.problems:
        return EXIT_FAILING
    if view.plan:
        return EXIT_DRIFT
    return EXIT_WAITING if view.holds else EXIT_OK


def state(view: View) -> str:
    return {
        EXIT_OK: "in sync",
        EXIT_DRIFT: "drift",
        EXIT_WAITING: "waiting",
        EXIT_FAILING: "degraded",
    }[exit_code(view)]


def headline(view: View) -> str:
    """One line that answers "is it right?".

    Plain ASCII whatever rules and devices are called: systemd reads a line of its own in every
    newline, and a status of any other encoding loses the whole message.
    """
    return plain(f"{state(view)}: {'; '.join(particulars(view))}")


def plain(text: str) -> str:
    """A text of harmless characters only."""
    return "".join(one if " " <= one <= "~" else ascii(one)[1:-1] for one in text)


def particulars(view: View) -> tuple[str, ...]:
    """What a headline says behind the name of the state."""
    if view.problems:
        more = f" (and {len(view.problems) - 1} more)" if len(view.problems) > 1 else ""
        return (f"{view.problems[0]}{more}",)
    if view.plan:
        go = sum(len(one.removed) for one in view.plan)
        come = sum(len(one.added) for one in view.plan)
        return (f"{count(go, 'rule')} to remove, {come} to add",)
    if view.holds:
        return (view.holds[0],)
    parts = [
        f"{one.subnet} keeps its address towards the rest of {one.inside}" for one in view.leased
    ]
    if not parts:
        return ("nothing is leased in a family that this kernel has",)
    without = ", without a guard" if view.unguarded else ""
    return (*parts[:-1], parts[-1] + without)


def clock(at: str, now: str) -> str:
    """A time of ISO 8601 as a person reads it: without the date if that is today's."""
    return at[11:19] if at[:10] == now[:10] else f"{at[:10]} {at[11:19]}"


def duration(seconds: float) -> str:
    """In the largest unit of which there are some."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (10 if unit == "min" else 2) * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def diff(transactions: Iterable[Transaction], note: str = "") -> tuple[str, ...]:
    """`-` lines to go and `+` lines to come, under a head for each backend, with the reasons."""
    lines: list[str] = []
    for one in transactions:
        lines.append(f"{one.family.value} {one.backend.value}{note}:")
        lines += [f"- {line}" for line in one.removed]
        lines += [f"+ {line}" for line in one.added]
        lines += [f"  because {reason.why}" for reason in one.reasons]
    return tuple(lines)


def cut_out_lines(view: View) -> tuple[str, ...]:
    return tuple(f"{cut.network} ({cut.why})" for one in view.leased for cut in one.cut_outs)


def document(view: View) -> dict[str, Any]:
    """The view as JSON: the common part of `check --json`, `apply --json` and the status file."""
    lease = view.node.lease if view.node else None
    return {
        "state": state(view),
        "in_sync": view.in_sync,
        "headline": headline(view),
        "iptables_is": view.node.iptables_is.value if view.node else None,
        "ipmasq": lease.ipmasq if isinstance(lease, Lease) else None,
        "families": [
            {
                "family": one.family.value,
                "subnet": str(one.subnet),
                "networks": [str(network) for network in one.networks],
                "cut_outs": [{"network": str(cut.network), "why": cut.why} for cut in one.cut_outs],
                "bridge": None if isinstance(one.bridge, Hold) else one.bridge,
            }
            for one in view.leased
        ],
        "rulesets": [_ruleset(one) for one in view.rulesets if one.backend is not Backend.GUARD],
        "guard": [_guard(family, view) for family in _guarded(view)],
        "waiting_for": list(view.holds),
        "problems": [
            {
                "family": one.family.value if one.family else None,
                "backend": one.backend.value if one.backend else None,
                "kind": one.error.label,
                "message": str(one.error),
            }
            for one in view.problems
        ],
        "plan": [transaction_document(one) for one in view.plan],
    }


def _ruleset(ruleset: Ruleset) -> dict[str, Any]:
    ours = [rule.text for rule in ruleset.postrouting if is_ours(rule)]
    return {
        "family": ruleset.family.value,
        "backend": ruleset.backend.value,
        "postrouting_rules": len(ruleset.postrouting),
        "ours": [f"-A POSTROUTING {text}" for text in ours],
        "own_chains": list(own_jumps(ruleset.postrouting)),
    }


def _guarded(view: View) -> list[Family]:
    """The families that shall have a guard, and those that have that of a lease which is not known
    any more."""
    there = [
        one.family for one in view.rulesets if one.backend is Backend.GUARD and one.postrouting
    ]
    return [
        family
        for family, wanted in view.wanted.items()
        if isinstance(wanted, Desired) or (isinstance(wanted, Hold) and family in there)
    ]


def _guard(family: Family, view: View) -> dict[str, Any]:
    """`connections`: those that it gave their own address; a nat chain sees only first packets."""
    rules = [
        rule
        for one in view.rulesets
        if one.family is family and one.backend is Backend.GUARD
        for rule in one.postrouting
    ]
    planned = any(one.family is family and one.backend is Backend.GUARD for one in view.plan)
    counters = [rule.counters.packets for rule in rules if rule.counters]
    failing = [
        str(one.error)
        for one in (*view.problems, *view.unguarded)
        if one.family is family and one.backend is Backend.GUARD
    ]
    in_place = bool(rules) and not planned
    why_not = failing[0] if failing else "to be written" if planned else "off"
    return {
        "family": family.value,
        "in_place": in_place,
        "connections": sum(counters) if rules else None,
        "why_not": None if in_place else why_not,
    }


def guard_meanwhile(view: View, *, undone: bool) -> str:
    """What becomes of cluster traffic while a rule that hides it stands. `undone`: whether a rival
    takes the guard away too."""
    if undone:
        return "undone as well: what begins before it is repaired is masqueraded, and stays so"
    families = [one.family for one in view.leased]
    if families and all(_guard(family, view)["in_place"] for family in families):
        return "in place: cluster traffic keeps its address all the same"
    return "not in place: what begins before a repair is masqueraded, and stays so"


def transaction_document(transaction: Transaction) -> dict[str, Any]:
    return {
        "family": transaction.family.value,
        "backend": transaction.backend.value,
        "remove": list(transaction.removed),
        "add": list(transaction.added),
        "reasons": [
            {"change": reason.change.value, "why": reason.why} for reason in transaction.reasons
        ],
    }


def probe_document(one: Probe) -> dict[str, Any]:
    """A probe as JSON."""
    return {
        "dst": str(one.destination),
        "sent_from": None if one.sent_from is None else str(one.sent_from),
        "seen_as": None if one.seen_as is None else str(one.seen_as),
        "kept": one.kept,
        "inside": one.inside,
        "why": one.why or None,
    }


def is_busy(view: View) -> bool:
    """Whether what is wrong may pass by itself: a lock or a tool that did not answer in time, or a
    rival who was quicker."""
    passing = (BackendBusy, NotConverged)
    return bool(view.problems) and all(isinstance(one.error, passing) for one in view.problems)


def lines(
    view: View, transactions: Iterable[Transaction], note: str = "", *, exposed: bool = False
) -> tuple[str, ...]:
    """What `check` and `apply` print: the headline, the diff, and what else there is to know.
    `exposed`: somebody else's rule can SNAT cluster traffic all the same."""
    head = headline(view)
    if exposed and view.in_sync:
        head = "in sync: nothing is to be changed, but a rule of somebody else's can hide addresses"
    notes = [f"waiting: {reason}" for reason in view.holds if reason not in head]
    notes += [f"problem: {problem}" for problem in view.problems if str(problem) not in head]
    notes += [f"no guard: {problem}" for problem in view.unguarded]
    notes += [f"stays masqueraded: {line}" for line in cut_out_lines(view)]
    return (head, *diff(transactions, note), *notes)
