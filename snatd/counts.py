"""What the daemon counts for its metrics, and which metrics there are. README.md has the meanings.

Nothing is decided by it. Counters begin at 0 with the daemon.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any

from snatd import __version__
from snatd.core.model import Backend, Family
from snatd.core.plan import Transaction
from snatd.host.metrics import Metric, Sample
from snatd.reconcile import Pass

# A quick repair takes 15 ms, one in a fight up to 5 s, one behind a held lock longer.
_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Each writer is a series of its own, and anybody may call himself anything.
_WRITERS = 20
# There from the first file on: where a series begins with an event, Prometheus does not count that.
_NO_EVENTS = dict.fromkeys(("nft", "legacy-digest", "xtables_lock", "link", "subnet_file"), 0)


class Counts:
    """Counts since the start."""

    def __init__(self) -> None:
        self.fights = 0
        self._overflows = 0
        self._drifts = 0
        self._repairs: Counter[tuple[str, str, str]] = Counter()
        self._repair_total_s = 0.0
        self._in_bucket = [0] * (len(_BUCKETS_S) + 1)
        self._passes = 0
        self._passes_total_s = 0.0
        self._last_pass_at_s = 0.0
        self._guarded: Counter[Family] = Counter()
        self._guard_said: dict[Family, int] = {}
        self._writers: set[str] = set()
        self._left: tuple[Transaction, ...] = ()
        self._heard_s: float | None = None
        self._wrong_since_s: float | None = None

    def heard(self, now_s: float, *, overflow: bool) -> None:
        """An event."""
        self._overflows += overflow
        if self._heard_s is None:
            self._heard_s = now_s

    def begun(self, now_s: float) -> None:
        """A pass begins. What it repairs was wrong since the first event that asked for it."""
        if self._wrong_since_s is None:
            self._wrong_since_s = now_s if self._heard_s is None else self._heard_s
        self._heard_s = None

    def passed(
        self,
        done: Pass,
        writers: Mapping[Transaction, Collection[str]],
        duration_s: float,
        now_s: float,
        *,
        enforce: bool,
    ) -> None:
        """It ended. `writers`: the programs that may have caused each repair; `enforce`: whether it
        may repair."""
        self._passes += 1
        self._passes_total_s += duration_s
        self._last_pass_at_s = time.time()
        self._drifts += len({*done.applied, *done.view.plan} - {*self._left})
        self._left = done.view.plan
        for one in dict.fromkeys(done.applied):
            who = self._who(one, writers.get(one, ()))
            self._repairs[one.family.value, one.backend.value, who] += 1
        if not done.view.plan and done.applied and self._wrong_since_s is not None:
            took_s = now_s - self._wrong_since_s
            self._in_bucket[bisect_left(_BUCKETS_S, took_s)] += 1
            self._repair_total_s += took_s
        if not (done.view.plan and enforce):
            self._wrong_since_s = None
        self._count_guarded(done)

    def _who(self, repair: Transaction, writers: Collection[str]) -> str:
        # nf_tables names who wrote to it, and so nobody who wrote to a legacy table.
        if repair.backend is Backend.LEGACY or not writers:
            return "unknown"
        if len(writers) > 1:
            return "several"
        (who,) = writers
        if len(self._writers) < _WRITERS:
            self._writers.add(who)
        return who if who in self._writers else "other"

    def _count_guarded(self, done: Pass) -> None:
        """The kernel's counter begins anew whenever the guard is written; ours does not."""
        anew = {one.family for one in done.applied if one.backend is Backend.GUARD}
        for ruleset in done.view.rulesets:
            family = ruleset.family
            if ruleset.backend is not Backend.GUARD:
                continue
            if not ruleset.postrouting and family not in self._guard_said:
                continue
            says = sum(rule.counters.packets for rule in ruleset.postrouting if rule.counters)
            before = 0 if family in anew else self._guard_said.get(family, says)
            self._guarded[family] += says - before if says >= before else says
            self._guard_said[family] = says

    def metrics(
        self, document: Mapping[str, Any], resync_s: float, lock_waits: tuple[int, float]
    ) -> tuple[Metric, ...]:
        """All of them. `document` as in the status file; `lock_waits`: how often and how long."""
        values = {
            "build_info": (Sample(1, (("version", __version__),)),),
            "in_sync": (Sample(int(document["in_sync"])),),
            "holds": (Sample(len(document["waiting_for"])),),
            "problems": (Sample(len(document["problems"])),),
            "fighting": (Sample(int(document["fights"]["now"] is not None)),),
            "last_pass_timestamp_seconds": (Sample(round(self._last_pass_at_s, 3)),),
            "resync_seconds": (Sample(resync_s),),
            "pass_seconds": _summary(self._passes, self._passes_total_s),
            "drift_seen_total": (Sample(self._drifts),),
            "repairs_total": tuple(
                Sample(number, (("family", family), ("backend", backend), ("writer", writer)))
                for (family, backend, writer), number in sorted(self._repairs.items())
            ),
            "repair_seconds": self._histogram(),
            "fights_total": (Sample(self.fights),),
            "events_total": tuple(
                Sample(number, (("source", source),))
                for source, number in sorted((_NO_EVENTS | document["events"]).items())
            ),
            "event_overflow_total": (Sample(self._overflows),),
            "lock_wait_seconds": _summary(*lock_waits),
            "guard_connections_total": tuple(
                Sample(number, (("family", family.value),))
                for family, number in self._guarded.items()
            ),
            "stale_flows": tuple(
                Sample(one["stale"], (("family", one["family"]),))
                for one in document["flows"]
                if one["since"] is not None  # not counted yet
            ),
        }
        return tuple(Metric(kind, name, text, values[name]) for name, kind, text in METRICS)

    def _histogram(self) -> tuple[Sample, ...]:
        limits = [*map(str, _BUCKETS_S), "+Inf"]
        numbers = list(accumulate(self._in_bucket))
        return (
            *(
                Sample(number, (("le", limit),), "_bucket")
                for limit, number in zip(limits, numbers, strict=True)
            ),
            Sample(round(self._repair_total_s, 6), suffix="_sum"),
            Sample(numbers[-1], suffix="_count"),
        )


def _summary(count: int, total_s: float) -> tuple[Sample, ...]:
    return (Sample(round(total_s, 6), suffix="_sum"), Sample(count, suffix="_count"))


METRICS = (
    ("build_info", "gauge", "The version that runs, always 1."),
    ("in_sync", "gauge", "Whether all is as it should be."),
    ("holds", "gauge", "Reasons why something cannot be decided yet."),
    ("problems", "gauge", "Tables that could not be read or written."),
    ("fighting", "gauge", "Whether another program undoes each repair."),
    ("last_pass_timestamp_seconds", "gauge", "When the last pass ended."),
    ("resync_seconds", "gauge", "A pass runs at least this often."),
    ("pass_seconds", "summary", "How long passes took."),
    ("drift_seen_total", "counter", "Differences found that the pass before had not left."),
    ("repairs_total", "counter", "Transactions written, by who had written before."),
    ("repair_seconds", "histogram", "From the first event heard until nothing was left to repair."),
    ("fights_total", "counter", "Times that another program began to undo each repair."),
    ("events_total", "counter", "Reasons to look, by where they were heard."),
    ("event_overflow_total", "counter", "Times that the kernel dropped events; each is a look."),
    ("lock_wait_seconds", "summary", "How long the xtables lock was waited for."),
    ("guard_connections_total", "counter", "Connections whose address the guard kept."),
    ("stale_flows", "gauge", "Connections that are seen as somebody else."),
)
