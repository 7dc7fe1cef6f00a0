"""What the daemon tells about itself, for STATUS and the status file. Nothing is decided by it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from snatd import __version__, report
from snatd.core.model import Backend, count, join
from snatd.core.plan import Change, Transaction
from snatd.host import journal
from snatd.kernel.events import Writer
from snatd.reconcile import Pass

# So much of a repair is told, and of so many; the journal has the rest.
_RECENT = 5
_RULES, _LONGEST, _WRITERS = 4, 500, 4


# Each repair, and who may have caused it.
Causes = Mapping[Transaction, Sequence[Writer]]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Facts:
    """Counts and last times since the start. `mode` as in snatd.toml; `clock` gives the time, as
    `now` does."""

    def __init__(self, mode: str, clock: Callable[[], str] = now) -> None:
        self.mode = mode
        self._now = clock
        self.started_at = clock()
        self.repairs = 0
        self.passes = 0
        self.events: Counter[str] = Counter()
        self.last_event: dict[str, Any] | None = None
        self.last_pass: dict[str, Any] | None = None
        self.metrics_problem: str | None = None
        self._fight: dict[str, Any] | None = None
        self._placed = False  # whether the unit or parent of who is fought with is known
        self._fights = 0
        self._last_fight: dict[str, Any] | None = None
        self._refused: dict[str, Any] | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._evidence: dict[str, Any] = {}
        self._exposed = ""
        self._state = "starting"
        self._since = self.started_at
        self._particulars: tuple[str, ...] = ()
        self._view: dict[str, Any] = {}

    def passed(self, done: Pass, triggers: Counter[str], causes: Causes, duration_s: float) -> None:
        at = self._now()  # first, so that it and the duration tell when the pass began
        repairs = tuple(dict.fromkeys(done.applied))
        trigger = ",".join(triggers) or "resync"
        self.passes += 1
        self.repairs += len(repairs)
        self._view = report.document(done.view)
        self._particulars = report.particulars(done.view)
        self.last_pass = {
            "at": at,
            "duration_ms": round(duration_s * 1000, 1),
            "trigger": trigger,
        }
        for one in repairs:
            self._recent.appendleft(_repair(one, at, trigger, causes[one]))
        self._enter(anew=bool(repairs))

    def heard(self, source: str, writer: Writer | None) -> None:
        self.events[source] += 1
        by = str(writer) if writer else None
        self.last_event = {"at": self._now(), "source": source, "writer": by}

    def found(self, evidence: dict[str, Any], exposed: str = "") -> None:
        """What was found out beside the rules, in place of what was before. `exposed`: which rule
        can SNAT cluster traffic, and why the guard does not keep it from that."""
        self._evidence, self._exposed = evidence, exposed
        self._enter()

    def refused(self, complaints: Iterable[str] | None) -> None:
        """A new configuration was refused, or, with None, taken."""
        self._refused = None if complaints is None else {"at": self._now(), "why": list(complaints)}

    def fights(self, rivals: Sequence[Writer], repairs: int, lasted_s: float) -> None:
        """A fight begins or goes on. Empty: with somebody whom the kernel does not name. A rival
        whose unit or parent was seen once is not replaced by one that was gone too early."""
        if self._fight is None:
            self._fights += 1
            began = datetime.fromisoformat(self._now()) - timedelta(seconds=lasted_s)
            since = began.isoformat(timespec="milliseconds")
            self._fight = {"with": "a program that the kernel does not name", "since": since}
            self._placed = False
        placed = any(one.of for one in rivals)
        if rivals and (placed or not self._placed):
            self._fight["with"] = join(rivals)
        self._placed = self._placed or placed
        self._fight["repairs"] = repairs
        self._fight["guard_undone"] = self.guard_is_undone

    def fight_ended(self, repairs: int) -> str:
        """Returns whose it was."""
        assert self._fight is not None, "a fight that ends has begun"
        self._last_fight = self._fight | {"repairs": repairs, "ended_at": self._now()}
        self._fight = None
        return str(self._last_fight["with"])

    def _enter(self, *, anew: bool = False) -> None:
        """`since` is when the state began; of "in sync" also when it was last repaired."""
        wrong = self._is_wrong()
        state = "degraded" if wrong else str(self._view.get("state", self._state))
        if state != self._state or (anew and state == "in sync"):
            self._state, self._since = state, self._now()

    def headline(self) -> str:
        """STATUS=: what most needs to be known comes first. Plain ASCII, see `report.headline`."""
        told = list(self._headline(whole=True))
        proved_at = self._evidence.get("proof", {}).get("proved_at")
        if proved_at and not (self._is_wrong() or self._changed()):
            told.append(f"proved at {self._clock(proved_at)}")
        return report.SEPARATOR.join((*told, count(self.repairs, "repair")))

    def _headline(self, *, whole: bool = False) -> tuple[str, ...]:
        """Its parts; `whole`: with what has a row of its own in `snatd status`."""
        parts = [f"{self._state} since {self._clock(self._since)}"]
        if self._fight:
            parts = [
                f"fighting with {self._fight['with']} since {self._clock(self._fight['since'])}",
                "it undoes each repair" + (", the guard too" if self.guard_is_undone else ""),
                f"at the last look {self._state}",
            ]
            guarded = self._is_guarded() and not self.guard_is_undone
            if self._state != "in sync" and guarded:
                parts.append("the guard keeps cluster addresses meanwhile")
        if self._refused:
            at = self._clock(self._refused["at"])
            why = self._refused["why"] if whole else ()
            parts = [
                f"new configuration refused at {at}, the old one is in force",
                *why,
                *parts,
            ]
        changed = self._changed()
        if self.mode == "observe":
            parts.append(f"mode is observe: nothing is changed{self._meanwhile()}")
        wrong = self._is_wrong()
        if wrong:
            parts.append("the rules are in sync, but " + wrong)
        elif self._exposed and self._view.get("in_sync"):
            parts.append(self._exposed)
        elif changed and self._view.get("in_sync"):
            parts.append(f"{count(changed, 'new connection')} did not keep {_its(changed)} address")
        elif not self.guard_is_undone:
            parts += self._particulars
            if self._view.get("problems") and self._is_guarded():
                parts.append("the guard keeps cluster addresses")
        parts += [
            f"saved rules {one['path']} {one['state']}"
            for one in self._evidence.get("saved_rules", ())
            if one["state"] in ("left alone", "not written")
        ]
        if self.metrics_problem:
            parts.append(f"metrics not written: {self.metrics_problem}")
        return tuple(map(report.plain, parts))

    @property
    def guard_is_undone(self) -> bool:
        """Whether whom the daemon fights with takes the guard away too."""
        return self._fight is not None and any(
            one["backend"] == Backend.GUARD.value and one["at"] >= self._fight["since"]
            for one in self._recent
        )

    def _meanwhile(self) -> str:
        """What becomes of containers' addresses while only the plan is right."""
        reasons = [reason for one in self._view.get("plan", ()) for reason in one["reasons"]]
        if all(reason["change"] != Change.NARROWED.value for reason in reasons):
            return ""
        if self._is_guarded():
            return ", the guard keeps the containers' addresses"
        return ", containers are seen under this node's address"

    def _is_guarded(self) -> bool:
        guards = [one["in_place"] for one in self._view.get("guard", ())]
        return bool(guards) and all(guards)

    def _changed(self) -> int:
        """The containers' own connections are a better proof than a datagram of ours."""
        return sum(one["changed_since"] for one in self._evidence.get("flows", ()))

    def _clock(self, at: str) -> str:
        return f"{report.clock(at, self._now())} UTC"

    def _is_wrong(self) -> str:
        """What a datagram showed, although the rules are in sync: it counts for more."""
        wrong = self._evidence.get("proof", {}).get("wrong")
        return str(wrong[0]) if wrong and self._view.get("in_sync") else ""

    def document(self) -> dict[str, Any]:
        return {
            **self._view,
            **self._evidence,
            **({"state": "degraded", "in_sync": False} if self._is_wrong() else {}),
            "version": __version__,
            "mode": self.mode,
            "started_at": self.started_at,
            "written_at": self._now(),
            "status": self.headline(),
            "told": list(self._headline()),
            "since": self._since,
            "repairs": self.repairs,
            "recent_repairs": list(self._recent),
            "fights": {"count": self._fights, "now": self._fight, "last": self._last_fight},
            "passes": self.passes,
            "events": dict(self.events),
            "last_event": self.last_event,
            "last_pass": self.last_pass,
            "configuration_refused": self._refused,
            "metrics_problem": self.metrics_problem,
            "dropped_log_lines": journal.dropped["lines"],
        }


def _its(number: int) -> str:
    return "its" if number == 1 else "their"


def _repair(
    transaction: Transaction, at: str, trigger: str, writers: Sequence[Writer]
) -> dict[str, Any]:
    return {
        "at": at,
        "family": transaction.family.value,
        "backend": transaction.backend.value,
        "changes": list(dict.fromkeys(one.change.value for one in transaction.reasons)),
        "removed": [text[:_LONGEST] for text in transaction.removed[:_RULES]],
        "added": [text[:_LONGEST] for text in transaction.added[:_RULES]],
        "more_removed": len(transaction.removed[_RULES:]),
        "more_added": len(transaction.added[_RULES:]),
        "trigger": trigger,
        "writers": [{"comm": one.comm, "pid": one.pid, "of": one.of} for one in writers[:_WRITERS]],
    }
