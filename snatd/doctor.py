"""`snatd doctor`: what on this node makes containers lose their address or their way.

Asks the checks, and prints what they find. Writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from snatd import doctor_rivals, doctor_way
from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.errors import BackendError, Illegible
from snatd.core.finding import Finding, Severity, in_order
from snatd.core.model import count
from snatd.core.rivals import INSTALL_NFT
from snatd.examined import Examined, Found
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import look
from snatd.report import EXIT_DRIFT, EXIT_OK, Answer

_LIMIT_S = 20.0
SCHEMA = 1


def doctor(settings: Config, complaints: Sequence[str] = ()) -> Answer:
    """Looks, and says what it found. About a second. `complaints`: what is wrong with the file of
    these settings, which are its other keys and the defaults."""
    tools = Tools()
    view = look(open_edges(settings, tools), settings.policy, Deadline(time.monotonic() + _LIMIT_S))
    examined = Examined(settings, tools, view, tuple(complaints))
    found = in_order(tuple(finding for check in _CHECKS for finding in _made(check, examined)))
    counted = [one for one in found if one.severity is not Severity.INFO]
    return Answer(
        {"schema": SCHEMA, "findings": [_document(one) for one in found]},
        tuple(_lines(found)),
        exit_code=EXIT_DRIFT if counted else EXIT_OK,
    )


_LEGIBLE = (
    "nft -a list ruleset",
    "# move the rule that iptables cannot write out of iptables' tables into one of its own",
)


def _problems(examined: Examined) -> Found:
    for problem in examined.view.problems:
        yield Finding(
            "unreadable",
            Severity.ERROR,
            "a table cannot be read, so snatd cannot keep it right",
            (str(problem),),
            "rules in it may hide containers, and nobody would see",
            _LEGIBLE if isinstance(problem.error, Illegible) else ("snatd check",),
        )


def _unread(examined: Examined) -> Found:
    """What the checks before wanted to read, and could not."""
    unread = {why: None for one in examined.rules_read.values() for why in one.unread}
    if unread:
        missing = any("is not installed" in why for why in unread)
        yield Finding(
            "rules_unread",
            Severity.INFO,
            "not all rules could be looked at",
            tuple(unread),
            "one of them may hide containers or drop their packets",
            INSTALL_NFT if missing else ("nft list ruleset", "# look at these yourself"),
        )


# Each is asked; the gravest answer comes first.
_CHECKS: tuple[Callable[[Examined], Found], ...] = (
    _problems,
    doctor_rivals.dockers_rules,
    *doctor_way.CHECKS,
    *doctor_rivals.CHECKS,
    _unread,
)


def _made(check: Callable[[Examined], Found], examined: Examined) -> Found:
    try:
        yield from check(examined)
    except BackendError as error:
        yield Finding(
            "not_looked",
            Severity.WARNING,
            "a part of this node could not be examined",
            (str(error),),
            "what is wrong there stays unseen",
            ("# look at what the error says, then `snatd doctor` again",),
        )


def _document(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "severity": finding.severity.value,
        "says": finding.says,
        "evidence": list(finding.evidence),
        "why": finding.why,
        "remedy": list(finding.remedy),
    }


def _lines(found: tuple[Finding, ...]) -> Iterator[str]:
    for one in found:
        yield f"{one.severity.value}: {one.says} ({one.name})"
        for label, lines in (("found", one.evidence), ("why", (one.why,)), ("remedy", one.remedy)):
            for number, line in enumerate(lines):
                yield f"    {'' if number else label:6}  {line}"
        yield ""
    yield _total(found)


def _total(found: tuple[Finding, ...]) -> str:
    if not found:
        return "nothing found"
    numbers = {severity: sum(one.severity is severity for one in found) for severity in Severity}
    return ", ".join(
        f"{n} {severity.value}" if severity is Severity.INFO else count(n, severity.value)
        for severity, n in numbers.items()
        if n
    )
