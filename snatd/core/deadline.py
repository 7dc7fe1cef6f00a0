"""The end of what a whole pass may take: all its time-outs together stay under one bound."""

from __future__ import annotations

from dataclasses import dataclass

from snatd.core.errors import BackendBusy

LONGEST_CALL_S = 5.0


@dataclass(frozen=True)
class Deadline:
    """A point of the monotonic clock."""

    at_s: float

    def remaining_s(self, now_s: float) -> float:
        """Seconds that one call may take. Raises BackendBusy where none are left."""
        left_s = min(LONGEST_CALL_S, self.at_s - now_s)
        if left_s <= 0:
            raise BackendBusy("this pass took too long; the rest of it waits for the next one")
        return left_s
