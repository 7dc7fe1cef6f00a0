"""`snatd doctor`: what on this node makes containers lose their address or their way.

Asks the checks, and prints what they find. Writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from snatd import doctor_rivals, doctor_way
from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import BackendError
from snatd.core.finding import Finding, Severity, in_order
from snatd.core.model import NodeState, count
from snatd.core.surroundings import Device
from snatd.doctor_way import Found, Reached, read_reached
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import View, look
from snatd.report import EXIT_DRIFT, EXIT_OK, Answer

_LIMIT_S = 20.0


@dataclass(frozen=True)
class Examined:
    """What every check may ask: the configuration, the last look, and what is leased in it."""

    settings: Config
    tools: Tools
    view: View

    @property
    def leased(self) -> tuple[Desired, ...]:
        return self.view.leased

    @property
    def node(self) -> NodeState | None:
        """None where it could not be read; the view says why."""
        return self.view.node

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """Raises BackendError."""
        from snatd.kernel.links import read_devices

        return read_devices()

    @cached_property
    def reached(self) -> tuple[Reached, ...]:
        """What is around each family that has a bridge. Raises BackendError."""
        return read_reached(self)


SCHEMA = 1


def doctor(settings: Config) -> Answer:
    """Looks, and says what it found. About a second."""
    tools = Tools()
    view = look(open_edges(settings, tools), settings.policy, Deadline(time.monotonic() + _LIMIT_S))
    examined = Examined(settings, tools, view)
    found = in_order(tuple(finding for check in _CHECKS for finding in _made(check, examined)))
    counted = [one for one in found if one.severity is not Severity.INFO]
    return Answer(
        {"schema": SCHEMA, "findings": [_document(one) for one in found]},
        tuple(_lines(found)),
        exit_code=EXIT_DRIFT if counted else EXIT_OK,
    )


def _problems(examined: Examined) -> Found:
    for problem in examined.view.problems:
        yield Finding(
            "unreadable",
            Severity.ERROR,
            "a table cannot be read, so snatd cannot keep it right",
            (str(problem),),
            "rules in it may hide containers, and nobody would see",
            ("snatd check",),
        )


# Each is asked; the gravest answer comes first.
_CHECKS: tuple[Callable[[Examined], Found], ...] = (
    _problems,
    *doctor_way.CHECKS,
    *doctor_rivals.CHECKS,
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


_NOUNS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def _total(found: tuple[Finding, ...]) -> str:
    if not found:
        return "nothing found"
    numbers = {severity: sum(one.severity is severity for one in found) for severity in Severity}
    return ", ".join(count(n, _NOUNS[severity]) for severity, n in numbers.items() if n)
