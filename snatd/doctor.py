"""`snatd doctor`: what on this node makes containers lose their address or their way.

Asks the checks, and prints what they find. Writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from snatd import doctor_rivals, doctor_way
from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import BackendError
from snatd.core.finding import Finding, Severity, in_order
from snatd.core.model import Family, NodeState, count
from snatd.core.packet import Hook, Ranges, address_types
from snatd.core.programs import Process
from snatd.core.rivals import INSTALL_NFT
from snatd.core.surroundings import Device
from snatd.core.word import Word
from snatd.doctor_way import Found, Reached, read_reached
from snatd.host import processes
from snatd.host.status import StatusFile
from snatd.kernel.hooks import Hooks, Kind, read_hooks
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import View, look
from snatd.report import EXIT_DRIFT, EXIT_OK, Answer

# Of the look, and of each reading of rules, which takes some milliseconds.
_LIMIT_S, _RULES_S = 20.0, 5.0


@dataclass(frozen=True)
class Examined:
    """What every check may ask: the configuration, the last look, and what is leased in it. What
    several ask for is read once."""

    settings: Config
    tools: Tools
    view: View
    rules_read: dict[tuple[Family, str], Hooks] = field(default_factory=dict)

    @property
    def leased(self) -> tuple[Desired, ...]:
        return self.view.leased

    @property
    def node(self) -> NodeState | None:
        """None where it could not be read; the view says why."""
        return self.view.node

    @property
    def deadline(self) -> Deadline:
        """For one call of a tool or a few."""
        return Deadline(time.monotonic() + _RULES_S)

    def hooks(self, family: Family, *kinds: Kind) -> tuple[Hook, ...]:
        """The base chains of some kinds; what of them cannot be read is told at the end. Raises
        BackendError."""
        for one in kinds:
            if (family, one.hook) not in self.rules_read:
                read = read_hooks(family, self.tools, self.deadline, one)
                self.rules_read[family, one.hook] = read
        return tuple(hook for one in kinds for hook in self.rules_read[family, one.hook].hooks)

    def types(self, family: Family) -> tuple[tuple[str, Ranges], ...]:
        """The node's own addresses by their types. Raises BackendError."""
        from snatd.kernel.links import read_sources

        _, local, broadcast = read_sources(family)
        return address_types(family, local, broadcast)

    @cached_property
    def programs(self) -> tuple[Process, ...]:
        """Those that have to do with containers."""
        return processes.find(doctor_rivals.PROGRAMS)

    @cached_property
    def word(self) -> Word:
        """The daemon's."""
        return StatusFile(self.settings.runtime_dir).word()

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
