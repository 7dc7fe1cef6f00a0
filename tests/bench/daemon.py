"""What the daemon costs to start, to keep waiting, and in memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from signal import SIGHUP

from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.observers import GuardObserver
from tests.bench.repair import one_repair
from tests.bench.site import Site
from tests.bench.usage import Usage, cpu_s, memory_mib
from tests.lab.netns import Namespace, until
from tests.lab.process import Snatd, stopwatch_ms

_READY, _GUARD = (Aim(400),), (Aim(250),)
_MEMORY_MIB = {"nft": (Aim(34),), "legacy": (Aim(48),)}
_IDLE_PERCENT = (Aim(0.1),)
_WAKE_UPS = {"nft": (Aim(1),), "legacy": ()}
_QUIET_S = 2.0
_WAKES_UP = "import time\nwhile True:\n    time.sleep(1)"
_TRIES = 5


def settled(snatd: Snatd) -> None:
    """It has looked a second time, as it does once its file watches are set up, and has found all
    that it finds after a start: whatever it imports, it has."""
    until(lambda: snatd.status()["passes"] >= 2 and snatd.status()["in_sync"], "the second look")
    for _ in range(_TRIES):
        with suppress(AssertionError):
            until(lambda: all(one["since"] for one in _flows(snatd)), "a look at flows", 15)
            return
        # It was cut off, since the machine is so busy that `conntrack` did not end in time.
        snatd.signal(SIGHUP)
    raise AssertionError("no look at flows comes to its end")


def _flows(snatd: Snatd) -> list[dict[str, object]]:
    return list(snatd.status()["flows"]) or [{"since": None}]


def starts(site: Site, count: int) -> list[Figure]:
    """Starts on a node with a broad rule, no memory of an earlier run and a warm page cache."""
    ready_ms, guard_ms, floor_ms, memories = [], [], [], []
    for number in range(count):
        site.node.host.shell("nft delete table ip snatd 2>/dev/null || true")
        bare.only_broad(site.node)
        guard = GuardObserver(site.node.host)
        with ThreadPoolExecutor(1) as hearing:
            guarded_s = hearing.submit(guard.guarded_s)
            with Snatd(site.node.host, site.folder / f"start-{number}") as snatd:
                started_s = time.monotonic()
                snatd.start()
                ready_ms.append(stopwatch_ms(started_s))
                guard_ms.append((guarded_s.result() - started_s) * 1000)
                settled(snatd)
                one_repair(site, snatd)
                memories.append(memory_mib(snatd.pid))
                snatd.stop()
        guard.close()
        floor_ms.append(_python_ms(site.node.host))
    aims, backend = _MEMORY_MIB[site.backend], site.backend
    floor = tuple(floor_ms)
    return [
        Figure(f"exec to READY=1, {backend}", "ms", tuple(ready_ms), _READY, floor),
        Figure(f"exec to the guard in place, {backend}", "ms", tuple(guard_ms), _GUARD, floor),
        Figure(f"  floor: bare python -c pass, {backend}", "ms", floor),
        Figure(f"RSS after a repair, {backend}", "MiB", tuple(rss for rss, _ in memories), aims),
        Figure(f"PSS after a repair, {backend}", "MiB", tuple(pss for _, pss in memories), aims),
    ]


def _python_ms(host: Namespace) -> float:
    """An interpreter that does nothing, started as the daemon is."""
    started_s = time.monotonic()
    host.popen(sys.executable, "-c", "pass").wait()
    return stopwatch_ms(started_s)


def _is_quiet(site: Site, snatd: Snatd) -> bool:
    """The poll of the legacy tables wakes it once a second."""
    before = Usage.of(snatd)
    time.sleep(_QUIET_S)
    polls = _QUIET_S if site.backend == "legacy" else 0
    return Usage.of(snatd).wakes - before.wakes <= polls + 1


def idle(daemons: Sequence[tuple[Site, Snatd]], for_s: float) -> list[Figure]:
    """All at the same time: who sleeps disturbs nobody. What the repair before it has them look at
    is waited for."""
    for site, snatd in daemons:
        one_repair(site, snatd)
    until(lambda: all(_is_quiet(*one) for one in daemons), "quiet", 90)
    with daemons[0][0].node.host.popen(sys.executable, "-c", _WAKES_UP) as floor:
        time.sleep(_QUIET_S)
        before = [Usage.of(snatd) for _, snatd in daemons]
        floor_s = cpu_s(floor.pid)
        time.sleep(for_s)
        after = [Usage.of(snatd) for _, snatd in daemons]
        floor_percent = (cpu_s(floor.pid) - floor_s) / for_s * 100
        floor.kill()
    figures = [
        Figure("  floor: an interpreter that wakes up once a second", "% core", (floor_percent,))
    ]
    for (site, _), then, now in zip(daemons, before, after, strict=True):
        assert now.passes == then.passes, f"{site.backend}: something woke it"
        wakes = ((now.wakes - then.wakes) / (now.at_s - then.at_s),)
        figures += [
            Figure(
                f"idle CPU over {for_s:g} s, {site.backend}",
                "% core",
                (now.cpu_percent(then),),
                _IDLE_PERCENT,
                (floor_percent,),
            ),
            Figure(
                f"  wake-ups of the main thread, {site.backend}",
                "1/s",
                wakes,
                _WAKE_UPS[site.backend],
            ),
        ]
    return figures
