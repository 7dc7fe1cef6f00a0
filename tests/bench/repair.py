"""From a rival's write to the repaired rule."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.observers import Observer
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

# The daemon gives 20 repairs at once and one more a second before it takes a rival for an enemy.
_FREE_REPAIRS = 15
_PERIOD_S = 0.7
# How often it compares the legacy tables, for writers without the lock.
_POLL_S = 1.0


@dataclass(frozen=True)
class Repair:
    """One repair, counted from the rival's return and from before its start."""

    since_return_ms: float
    since_exec_ms: float


@dataclass(frozen=True)
class Site:
    """A network whose `iptables` is of one backend. The daemon runs on its first node only."""

    backend: str
    lab: Lab
    observer: Observer

    @property
    def node(self) -> Node:
        return self.lab.nodes[0]

    @property
    def folder(self) -> Path:
        return self.lab.folder


_AIMS = {"nft": Aim(30), "legacy": Aim(100)}
_FLOORS = {
    "nft": ("bare iptables-nft-restore of -D and -I", bare.nft_floor_ms),
    "legacy": ("bare iptables-legacy -w -D, then -I", bare.legacy_floor_ms),
}


def repairs(site: Site, snatd: Snatd, count: int) -> list[Figure]:
    """With the floor in between."""
    what, floor_ms = _FLOORS[site.backend]
    other = site.lab.nodes[1]
    bare.only_broad(other)
    floors: list[float] = []
    found = _repairs(site, snatd, count, between=lambda: floors.append(floor_ms(other)))
    name = "legacy, rival takes the lock" if site.backend == "legacy" else site.backend
    return [
        *_figures(name, found, _AIMS[site.backend], tuple(floors)),
        Figure(f"  floor: {what}", "ms", tuple(floors)),
    ]


def repairs_without_lock(site: Site, snatd: Snatd, count: int) -> list[Figure]:
    """At any moment of the poll: a rival knows no phase."""

    def quiet() -> None:
        time.sleep(random.uniform(0, 1) * _POLL_S)

    found = _repairs(site, snatd, count, between=quiet, lock=bare.NO_LOCK)
    return _figures("legacy, rival takes no lock", found, Aim(1200, "max"))


def _figures(
    name: str, found: list[Repair], aim: Aim, floor: tuple[float, ...] = ()
) -> list[Figure]:
    since_return = tuple(one.since_return_ms for one in found)
    since_exec = tuple(one.since_exec_ms for one in found)
    return [
        Figure(f"repair, {name}", "ms", since_return, aim, floor),
        Figure("  counted from before the rival's exec", "ms", since_exec),
    ]


def _repairs(
    site: Site,
    snatd: Snatd,
    count: int,
    *,
    between: Callable[[], None],
    lock: str | None = None,
) -> list[Repair]:
    rules = _rules(site.node)
    found = []
    started_s = time.monotonic()
    for number in range(count):
        between()
        time.sleep(max(0.0, _may_start_s(started_s, number) - time.monotonic()))
        found.append(one_repair(site, snatd, lock))
    assert _rules(site.node) == rules, "not what it was before the rival came"
    assert not snatd.status()["fights"]["now"], "so often that the daemon backed off"
    return found


def _may_start_s(started_s: float, number: int) -> float:
    """Quiet between two, and never out of free repairs."""
    return started_s + max(number * _PERIOD_S, number - _FREE_REPAIRS)


def one_repair(site: Site, snatd: Snatd, lock: str | None = None) -> Repair:
    """Ends when the daemon has read back, written its status and is waiting again."""
    before = snatd.status()["repairs"]
    site.observer.arm()
    rival = bare.insert_broad(site.node, lock)
    repaired_s = site.observer.repaired_s()
    until(lambda: _is_over(snatd, before), "the end of the pass")
    return Repair(
        since_return_ms=(repaired_s - rival.after_s) * 1000,
        since_exec_ms=(repaired_s - rival.before_s) * 1000,
    )


def _is_over(snatd: Snatd, before: int) -> bool:
    status = snatd.status()
    return bool(status["repairs"] > before and status["in_sync"])


def _rules(node: Node) -> str:
    return node.host.run("iptables", "-w", "-t", "nat", "-S", "POSTROUTING")
