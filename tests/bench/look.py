"""A pass that finds all in sync. Run as a process on the node, it takes the samples."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import look
from tests.bench.figures import Figure
from tests.bench.repair import Site
from tests.lab.network import Node

FOREIGN_RULES = 10_000
_ROOT = Path(__file__).parents[2]
_RESYNC_S = Config().resync


def looks(site: Site, count: int) -> list[Figure]:
    """On a node in sync, with nothing else in its table and with FOREIGN_RULES elsewhere in it."""
    bare_ms, bare_cpu_s = _on(site.node, count)
    _add_foreign_rules(site.node)
    full_ms, full_cpu_s = _on(site.node, count)
    return [
        Figure(f"a pass in sync, {site.backend}, no foreign rule", "ms", bare_ms),
        Figure("  its CPU as a share of the time between resyncs", "% core", _share(bare_cpu_s)),
        Figure(f"a pass in sync, {site.backend}, {FOREIGN_RULES} foreign rules", "ms", full_ms),
        Figure("  its CPU as a share of the time between resyncs", "% core", _share(full_cpu_s)),
    ]


def _share(cpu_s: float) -> tuple[float, ...]:
    return (cpu_s / _RESYNC_S * 100,)


def _on(node: Node, count: int) -> tuple[tuple[float, ...], float]:
    """Milliseconds of each look, and CPU seconds of the mean one with its child processes."""
    # A process that enters a mount namespace begins at its root.
    command = ("env", f"PYTHONPATH={_ROOT}", sys.executable, "-m", __name__, str(count))
    found = json.loads(node.host.run(*command))
    return tuple(found["wall_ms"]), float(found["cpu_s"]) / count


def _add_foreign_rules(node: Node) -> None:
    """In a chain of their own, as kube-proxy's are."""
    rules = "".join(
        f"-A KUBE-SVC -d 10.{96 + number // 62500}.{number // 250 % 250}.{number % 250}/32 "
        "-j RETURN\n"
        for number in range(FOREIGN_RULES)
    )
    script = f"*nat\n:KUBE-SVC - [0:0]\n{rules}COMMIT\n"
    node.host.run("iptables-restore", "--noflush", stdin=script)


def _cpu_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(count: int) -> None:
    config = Config()
    edges = open_edges(config, Tools())

    def once() -> None:
        view = look(edges, config.policy, Deadline(time.monotonic() + 20))
        assert view.in_sync, view

    once()  # imports
    wall_ms = []
    before_s = _cpu_s()
    for _ in range(count):
        started_s = time.monotonic()
        once()
        wall_ms.append((time.monotonic() - started_s) * 1000)
    print(json.dumps({"wall_ms": wall_ms, "cpu_s": _cpu_s() - before_s}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
