"""What the daemon costs to start, to keep waiting, and in memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.repair import Site, one_repair
from tests.lab.netns import Namespace, until
from tests.lab.process import Snatd, stopwatch_ms

_READY = Aim(600)
_MEMORY_MIB = {"nft": Aim(36), "legacy": None}
_IDLE_PERCENT = Aim(0.1)
_SETTLED_S = 2.0


def started(snatd: Snatd) -> float:
    """Starts a daemon; milliseconds to READY=1. Returns when it has also looked a second time,
    as it does once its file watches are set up."""
    started_s = time.monotonic()
    snatd.start()
    took_ms = stopwatch_ms(started_s)
    until(lambda: snatd.status()["passes"] >= 2 and snatd.status()["in_sync"], "the second look")
    return took_ms


def starts(site: Site, count: int) -> list[Figure]:
    """Starts on a node with a broad rule, no memory of an earlier run and a warm page cache."""
    ready_ms, floor_ms, memories = [], [], []
    for number in range(count):
        bare.only_broad(site.node)
        with Snatd(site.node.host, site.folder / f"start-{number}") as snatd:
            ready_ms.append(started(snatd))
            one_repair(site, snatd)
            memories.append(_memory_mb(snatd.pid))
            snatd.stop()
        floor_ms.append(_python_ms(site.node.host))
    aim = _MEMORY_MIB[site.backend]
    return [
        Figure(f"exec to READY=1, {site.backend}", "ms", tuple(ready_ms), _READY, tuple(floor_ms)),
        Figure("  floor: bare python -c pass", "ms", tuple(floor_ms)),
        Figure(
            f"RSS after a repair, {site.backend}", "MiB", tuple(rss for rss, _ in memories), aim
        ),
        Figure(
            f"PSS after a repair, {site.backend}", "MiB", tuple(pss for _, pss in memories), aim
        ),
    ]


def _python_ms(host: Namespace) -> float:
    """An interpreter that does nothing, started as the daemon is."""
    started_s = time.monotonic()
    host.popen(sys.executable, "-c", "pass").wait()
    return stopwatch_ms(started_s)


def _memory_mb(pid: int) -> tuple[float, float]:
    """Resident, and resident with shared pages divided among those who share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {words[0]: int(words[1]) for words in map(str.split, lines)}
    return kib["Rss:"] / 1024, kib["Pss:"] / 1024


@dataclass(frozen=True)
class _Usage:
    at_s: float
    cpu_s: float
    children_s: float
    wakes: int
    passes: int

    @classmethod
    def of(cls, snatd: Snatd) -> _Usage:
        pid = snatd.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # clock_getcpuclockid(3): all threads, in nanoseconds; /proc has ticks of 10 ms.
        cpu_s = time.clock_gettime((~pid << 3) | 2)
        children_s = (int(fields[13]) + int(fields[14])) / 100
        passes = snatd.status()["passes"]
        return cls(time.monotonic(), cpu_s, children_s, _voluntary_switches(pid), passes)


def _voluntary_switches(pid: int) -> int:
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    (count,) = (
        line.split()[1]
        for line in status.splitlines()
        if line.startswith("voluntary_ctxt_switches:")
    )
    return int(count)


def idle(daemons: Sequence[tuple[Site, Snatd]], for_s: float) -> list[Figure]:
    """All at the same time: who sleeps disturbs nobody. The repair before it puts the next resync
    off, so that none falls into it; the next poll of the legacy tables may still look once more."""
    for site, snatd in daemons:
        one_repair(site, snatd)
    time.sleep(_SETTLED_S)
    before = [_Usage.of(snatd) for _, snatd in daemons]
    time.sleep(for_s)
    after = [_Usage.of(snatd) for _, snatd in daemons]
    figures = []
    for (site, _), then, now in zip(daemons, before, after, strict=True):
        assert now.passes == then.passes, f"{site.backend}: something woke it"
        took_s = now.at_s - then.at_s
        used_s = (now.cpu_s - then.cpu_s) + (now.children_s - then.children_s)
        percent = (used_s / took_s * 100,)
        wakes = ((now.wakes - then.wakes) / took_s,)
        figures += [
            Figure(f"idle CPU over {for_s:g} s, {site.backend}", "% core", percent, _IDLE_PERCENT),
            Figure("  wake-ups of the main thread", "1/s", wakes),
        ]
    return figures
