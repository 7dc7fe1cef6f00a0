"""Whether the daemon's last word, the status file, still counts: by its process and by its age.

Nothing is read here, and no clock is asked.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any


class Process(enum.Enum):
    """What is to be seen of the process that left the word."""

    RUNS = "runs"
    STOPPED = "stopped"
    GONE = "gone"
    UNSEEN = "unseen"
    """It is in another pid namespace, or /proc hides it."""


class Life(enum.Enum):
    """What the daemon does, as far as it can be told. `runs`, and whether its word `is_stale`: None
    where that is not known."""

    def __init__(self, _: str, runs: bool | None, is_stale: bool | None) -> None:
        self.runs = runs
        self.is_stale = is_stale

    ANSWERS = ("answers", True, False)
    UNSEEN = ("unseen", None, False)
    SILENT = ("silent", True, True)
    STOPPED = ("stopped", True, True)
    UNSEEN_SILENT = ("unseen and silent", None, True)
    GONE = ("gone", False, True)
    ABSENT = ("absent", False, None)
    STARTING = ("starting", None, None)
    ELSEWHERE = ("elsewhere", None, None)
    UNREADABLE = ("unreadable", None, None)


@dataclass(frozen=True)
class Word:
    """What was found. `document`: the status file, None where there is none that is understood.

    `pid`: whose word it is, or who is starting. `age_s`: None where no clock can tell. `why`: what
    is wrong with the file, or which one is missing.
    """

    life: Life
    document: dict[str, Any] | None = None
    age_s: float | None = None
    pid: int | None = None
    why: str = ""

    @property
    def counts(self) -> bool:
        """Whether the daemon would say the same now."""
        return self.document is not None and self.life.is_stale is False


def judge(process: Process, silent_s: float | None, longest_s: float) -> Life:
    """`silent_s`: how long the daemon could have said something and did not, None where no clock
    can tell; `longest_s`: how long a healthy one may be silent."""
    if process is Process.GONE:
        return Life.GONE
    if process is Process.STOPPED:
        return Life.STOPPED
    if silent_s is None or not silent_s >= 0:
        return Life.ELSEWHERE
    late = not silent_s <= longest_s
    if process is Process.RUNS:
        return Life.SILENT if late else Life.ANSWERS
    return Life.UNSEEN_SILENT if late else Life.UNSEEN


def units_in(writers: str) -> tuple[str, ...]:
    """The units among writers, as `kernel.events` names them."""
    found = re.findall(r"\) of ([\w@.:\\-]+\.(?:service|scope))", writers)
    return tuple(dict.fromkeys(found))
