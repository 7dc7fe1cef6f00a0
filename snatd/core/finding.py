"""What `snatd doctor` finds on a node, as a value. Finds nothing itself."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class Severity(enum.Enum):
    """ERROR: traffic goes wrong now. WARNING: it will or may. INFO: worth knowing, and no fault."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True)
class Finding:
    """`name`: what kind of finding, in words that never change. `evidence`: the very lines, files
    or values. `remedy`: what a shell takes: commands that mend it, and comments (`# ...`) where no
    command can."""

    name: str
    severity: Severity
    says: str
    evidence: tuple[str, ...]
    why: str
    remedy: tuple[str, ...]


def some(lines: Iterable[str], most: int = 4, mark: str = "") -> tuple[str, ...]:
    """Each once, and not more than anybody would read. `mark`: before the number of the others."""
    all_lines = tuple(dict.fromkeys(lines))
    more = len(all_lines) - most
    return (*all_lines[:most], *((f"{mark}and {more} more",) if more > 0 else ()))


def in_order(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The gravest first, else as they were found; each once."""
    gravity = list(Severity)
    return tuple(sorted(dict.fromkeys(findings), key=lambda one: gravity.index(one.severity)))
