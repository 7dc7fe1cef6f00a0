"""From a rival's write to the repaired rule, by snatd and by what is used instead today."""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from snatd.kernel.events import LegacyPoll
from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.observers import NftObserver
from tests.bench.site import Site
from tests.lab.netns import Namespace, until
from tests.lab.network import Node
from tests.lab.process import Snatd

# The daemon gives 20 repairs at once and one more a second before it takes a rival for an enemy.
_FREE_REPAIRS = 15
_PERIOD_S = 0.7
_NFT_AIMS = (Aim(25), Aim(60, "p99"))
_LEGACY_MS = 40
_LOOP_AIM = Aim(20, "ratio", at_least=True)


@dataclass(frozen=True)
class Repair:
    """One repair, counted from the rival's return and from before its start."""

    since_return_ms: float
    since_exec_ms: float


Write = Callable[[Node], bare.Span]


def repairs(site: Site, snatd: Snatd, count: int) -> list[Figure]:
    """At the site's number of foreign rules, with the floor in between."""
    nft = site.backend == "nft"
    floor_ms = bare.nft_floor_ms if nft else bare.legacy_floor_ms
    bare.only_broad(site.other)
    floors: list[float] = []
    found = _repairs(site, snatd, count, between=lambda: floors.append(floor_ms(site.other)))
    aims = _NFT_AIMS if nft else (Aim(_LEGACY_MS, beside=statistics.median(floors)),)
    point = (f"repair, {site.backend}", site.foreign_rules)
    what = "bare iptables-nft-restore of two lines" if nft else "bare iptables-legacy -D"
    return [
        *_figures(f"repair, {site}", found, aims, tuple(floors), point),
        Figure(f"  floor: {what}, {site}", "ms", tuple(floors)),
    ]


def repairs_without_lock(site: Site, snatd: Snatd, count: int) -> list[Figure]:
    """At any moment of the poll: a rival knows no phase."""

    def quiet() -> None:
        time.sleep(random.uniform(0, 1) * LegacyPoll.shortest_s)

    def write(node: Node) -> bare.Span:
        return bare.insert_broad(node, bare.NO_LOCK)

    found = _repairs(site, snatd, count, between=quiet, write=write)
    return _figures(f"repair, {site}, rival without the lock", found, (Aim(1200, "p99"),))


def poll_period(site: Site) -> Figure:
    """How often the legacy tables of this size are compared, for rivals without the lock: what a
    process on the node finds, as the daemon does."""
    code = (
        "from snatd.kernel.events import LegacyPoll; import json; poll, found = LegacyPoll(), []\n"
        "for _ in range(5): poll.rebase(0); poll.digests(); found.append(poll.period_s)\n"
        "print(json.dumps(found))"
    )
    found = tuple(json.loads(site.node.host.run(sys.executable, "-c", code)))
    return Figure(f"  period of the comparison, {site}", "s", found)


def _figures(
    name: str,
    found: list[Repair],
    aims: tuple[Aim, ...],
    floor: tuple[float, ...] = (),
    point: tuple[str, float] | None = None,
) -> list[Figure]:
    since_return = tuple(one.since_return_ms for one in found)
    since_exec = tuple(one.since_exec_ms for one in found)
    within = name.removeprefix("repair, ")
    return [
        Figure(name, "ms", since_return, aims, floor, point),
        Figure(f"  counted from before the rival's exec, {within}", "ms", since_exec),
    ]


def _repairs(
    site: Site,
    snatd: Snatd,
    count: int,
    *,
    between: Callable[[], None],
    write: Write = bare.insert_broad,
) -> list[Repair]:
    rules = _rules(site.node)
    found = []
    started_s = time.monotonic()
    for number in range(count):
        between()
        time.sleep(max(0.0, _may_start_s(started_s, number) - time.monotonic()))
        found.append(one_repair(site, snatd, write))
    assert _rules(site.node) == rules, "not what it was before the rival came"
    assert not snatd.status()["fights"]["now"], "so often that the daemon backed off"
    return found


def _may_start_s(started_s: float, number: int) -> float:
    """Quiet between two, and never out of free repairs."""
    return started_s + max(number * _PERIOD_S, number - _FREE_REPAIRS)


def one_repair(site: Site, snatd: Snatd, write: Write = bare.insert_broad) -> Repair:
    """Ends when the daemon has read back, written its status and is waiting again."""
    before = snatd.status()["repairs"]
    site.observer.arm()
    rival = write(site.node)
    repaired_s = site.observer.repaired_s()
    until(lambda: _is_over(snatd, before), "the end of the pass", 60)
    return Repair(
        since_return_ms=(repaired_s - rival.after_s) * 1000,
        since_exec_ms=(repaired_s - rival.before_s) * 1000,
    )


def _is_over(snatd: Snatd, before: int) -> bool:
    status = snatd.status()
    return bool(status["repairs"] > before and status["in_sync"])


def _rules(node: Node) -> str:
    return node.host.run("iptables", "-w", "-t", "nat", "-S", "POSTROUTING")


def against_loops(site: Site, snatd: Snatd, counts: dict[float, int]) -> list[Figure]:
    """Beside snatd, at the same time, on hosts of their own: a loop of `iptables -C || iptables -I`
    each so many seconds, `counts` times. The rival is a reload that flushes the chain."""
    loops = [_Loop(site.node, site.folder / "iptables-nft", period_s) for period_s in counts]
    try:
        late_ms: dict[float, list[float]] = {one.period_s: [] for one in loops}
        threads = [
            threading.Thread(
                target=lambda loop=one: late_ms[loop.period_s].extend(
                    loop.late_ms() for _ in range(counts[loop.period_s])
                )
            )
            for one in loops
        ]
        for thread in threads:
            thread.start()
        ours = _repairs(
            site,
            snatd,
            max(counts.values()),
            between=lambda: time.sleep(0.5),
            write=bare.flush_and_add_broad,
        )
        for thread in threads:
            thread.join()
    finally:
        for one in loops:
            one.close()
    ours_ms = tuple(one.since_return_ms for one in ours)
    compared = [
        Figure(
            f"  a loop of -C || -I each {period_s:g} s (ratio: to snatd)",
            "ms",
            tuple(found),
            (_LOOP_AIM,),
            ours_ms,
        )
        for period_s, found in late_ms.items()
    ]
    return [Figure(f"repair after a flush, {site}", "ms", ours_ms), *compared]


class _Loop:
    """What agents do today: they look now and then whether their rule is there."""

    def __init__(self, node: Node, iptables: Path, period_s: float) -> None:
        self.period_s = period_s
        self._node = Node(node.number, Namespace(), node.container, node.pods)
        self._node.host.use_iptables(iptables)
        rule = f"POSTROUTING -s {node.subnet} -d {node.pods}.0.0/16 -j ACCEPT"
        script = (
            f"while :; do iptables -t nat -C {rule} 2>/dev/null || iptables -t nat -I {rule}; "
            f"sleep {period_s:g}; done"
        )
        self._observer = NftObserver(self._node.host, b"iptables")
        self._loop = self._node.host.popen("sh", "-c", script)
        self._observer.repaired_s()

    def late_ms(self) -> float:
        time.sleep(random.uniform(0.1, self.period_s))
        self._observer.arm()
        rival = bare.flush_and_add_broad(self._node)
        return (self._observer.repaired_s() - rival.after_s) * 1000

    def close(self) -> None:
        self._loop.kill()
        self._loop.wait()
        self._observer.close()
        self._node.host.close()
