"""Which rules of this node could SNAT cluster traffic: for `check`, and for what the daemon tells.

Reads; decides nothing. The decision is `core.trace`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import BackendError
from snatd.core.packet import Hook, Packet, Ranges, address_types
from snatd.core.trace import GUARD_TABLE, Answer, before_guard, cluster_packets, rewriters
from snatd.core.writers import told
from snatd.kernel.hooks import Hooks, read_hooks
from snatd.kernel.tools import Tools


@dataclass(frozen=True)
class Suspects:
    """`rules`: each that could, with what it depends on. `earlier`: nat chains of other programs
    that are asked before the guard. `unknown`: what could not be looked at, and why. `hooks`: all
    that was read, None where nothing could be. `packets`: what was asked about."""

    desired: Desired
    hooks: Hooks | None = None
    rules: tuple[Answer, ...] = ()
    earlier: tuple[Hook, ...] = ()
    unknown: tuple[str, ...] = ()
    packets: tuple[Packet, ...] = ()

    @property
    def none(self) -> bool:
        """Whether no rule on this node can, for certain."""
        return not (self.rules or self.unknown)

    @property
    def guarded(self) -> bool | None:
        """Whether a guard is asked, whatever it says; None where that could not be looked at."""
        there = () if self.hooks is None else self.hooks.hooks
        if any(one.table.partition(" ")[2] == GUARD_TABLE for one in there):
            return True
        return None if self.unknown else False


def find_suspects(
    leased: Iterable[Desired], marks: int, tools: Tools, deadline: Deadline
) -> tuple[Suspects, ...]:
    """For each family."""
    return tuple(of_family(one, marks, tools, deadline) for one in leased)


def of_family(desired: Desired, marks: int, tools: Tools, deadline: Deadline) -> Suspects:
    """10 ms where few chains can be reached, else 0.1 s and more of large tables. What cannot be
    read is `unknown`."""
    # Imported here: pyroute2 costs 0.1 s, and whoever reads this module's answers does not need it.
    from snatd.kernel.links import read_sources

    try:
        read = read_hooks(desired.family, tools, deadline)
        _, local, broadcast = read_sources(desired.family)
    except BackendError as error:
        return Suspects(desired, unknown=(str(error),))
    return suspects_of(desired, marks, read, address_types(desired.family, local, broadcast))


def suspects_of(
    desired: Desired, marks: int, read: Hooks, types: tuple[tuple[str, Ranges], ...]
) -> Suspects:
    """Those among rules that were read. `types`: the node's addresses by their types."""
    packets = cluster_packets(desired, marks, types)
    rules = rewriters(read.hooks, packets)
    return Suspects(desired, read, rules, before_guard(read.hooks), read.unread, packets)


def lines(found: Iterable[Suspects]) -> tuple[str, ...]:
    """For a person, in the order of importance."""
    found = tuple(found)
    return (
        *rule_lines(found),
        *earlier_lines(found),
        *(
            f"not known whether a rule can SNAT cluster traffic from {one.desired.subnet}: {why}"
            for one in found
            for why in one.unknown
        ),
        *(
            f"no rule on this node can SNAT unmarked cluster traffic from {one.desired.subnet}"
            for one in found
            if one.none
        ),
    )


def rule_lines(found: Iterable[Suspects]) -> list[str]:
    """The rules that can."""
    return [
        f"can SNAT cluster traffic from {one.desired.subnet}: {told(answer)}"
        for one in found
        for answer in one.rules
    ]


def earlier_lines(found: Iterable[Suspects]) -> list[str]:
    """The nat chains that come before the guard; of a table for both families once."""
    hooks = [
        f"asked before the guard, or may be: nat chain {hook}"
        for one in found
        for hook in one.earlier
    ]
    return list(dict.fromkeys(hooks))


def document(found: Iterable[Suspects]) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [
        {
            "family": one.desired.family.value,
            "none": one.none,
            "rules": [told(answer) for answer in one.rules],
            "before_guard": [str(hook) for hook in one.earlier],
            "unknown": list(one.unknown),
        }
        for one in found
    ]
