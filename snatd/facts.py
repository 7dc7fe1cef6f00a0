"""What the daemon tells about itself, for STATUS and the status file. Nothing is decided by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from snatd import __version__, report
from snatd.core.model import count
from snatd.core.plan import Transaction
from snatd.host import journal
from snatd.kernel.events import Writer
from snatd.reconcile import Pass

# Each repair, and who may have caused it.
Causes = Mapping[Transaction, Sequence[Writer]]


class Facts:
    """Counts and last times since the start."""

    def __init__(self) -> None:
        self.started_at = now()
        self.repairs = 0
        self.passes = 0
        self.events: Counter[str] = Counter()
        self.last_event: dict[str, Any] | None = None
        self.last_repair: dict[str, Any] | None = None
        self.last_pass: dict[str, Any] | None = None
        self.fighting: str | None = None
        self.refused: str | None = None
        self.evidence: dict[str, Any] = {}
        self._state = ""
        self._since = now()
        self._view: dict[str, Any] = {}

    def passed(self, done: Pass, triggers: Counter[str], causes: Causes, duration_s: float) -> None:
        self.passes += 1
        self.repairs += len(dict.fromkeys(done.applied))
        self._view = report.document(done.view)
        state = report.state(done.view)
        if state != self._state:
            self._state, self._since = state, now()
        trigger = ",".join(triggers) or "resync"
        self.last_pass = {
            "at": now(),
            "duration_ms": round(duration_s * 1000, 1),
            "trigger": trigger,
        }
        for one in done.applied:
            self.last_repair = {
                "at": now(),
                "trigger": trigger,
                "writers": [str(writer) for writer in causes[one]],
                **report.transaction_document(one),
            }

    def headline(self) -> str:
        """STATUS=: what most needs to be known comes first."""
        line = str(self._view.get("headline", "starting"))
        if wrong := self._is_wrong():
            line = f"degraded: the rules are in sync, but {wrong}"
        elif proved_at := self.evidence.get("proof", {}).get("proved_at"):
            line += f"; proved at {proved_at[11:19]} UTC"
        for one in self.evidence.get("saved_rules", ()):
            if one["state"] in ("left alone", "not written"):
                line += report.plain(f"; saved rules {one['path']} {one['state']}")
        if problem := self.evidence.get("metrics_problem"):
            line += f"; metrics not written: {problem}"
        if self.fighting:
            line = (
                f"fighting with {self.fighting}, which undoes each repair; at the last look {line}"
            )
        if self.refused:
            line = f"new configuration refused, the old one is in force ({self.refused}); {line}"
        return f"{line}; {count(self.repairs, 'repair')}"

    def _is_wrong(self) -> str:
        """What a datagram showed, although the rules are in sync: it counts for more."""
        wrong = self.evidence.get("proof", {}).get("wrong")
        return report.plain(wrong[0]) if wrong and self._view.get("in_sync") else ""

    def document(self, mode: str) -> dict[str, Any]:
        return {
            **self._view,
            **self.evidence,
            **({"state": "degraded", "in_sync": False} if self._is_wrong() else {}),
            "version": __version__,
            "mode": mode,
            "started_at": self.started_at,
            "written_at": now(),
            "status": self.headline(),
            "since": self._since,
            "repairs": self.repairs,
            "passes": self.passes,
            "events": dict(self.events),
            "last_event": self.last_event,
            "last_pass": self.last_pass,
            "last_repair": self.last_repair,
            "fighting": self.fighting,
            "configuration_refused": self.refused,
            "dropped_log_lines": journal.dropped["lines"],
        }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
