"""`make bench`: a table of what the daemon takes, against the aims. See README.md beside this."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import (
    bare,
    connections,
    daemon,
    flows,
    look,
    observers,
    picture,
    repair,
    sources,
    storms,
)
from tests.bench.figures import Figure, machine, markdown, table
from tests.bench.site import SIZES, Site
from tests.lab.network import Lab
from tests.lab.process import Snatd

_README = Path(__file__).with_name("README.md")
_PICTURE = Path(__file__).parents[2] / "docs" / "growth.svg"
_BEGIN, _END = "<!-- the table: begin -->", "<!-- the table: end -->"


@dataclass(frozen=True)
class Size:
    """How many samples of each, and how long the daemons are left alone."""

    connections: int = 5_000
    repairs: Mapping[str, int] = field(default_factory=lambda: {"nft": 25, "legacy": 12})
    repairs_without_lock: int = 12
    loops: Mapping[float, int] = field(default_factory=lambda: {1.0: 20, 5.0: 8})
    starts: int = 10
    looks: int = 30
    rules: tuple[int, ...] = SIZES
    pods: tuple[int, ...] = (1, 10, 50, 250)
    networks: tuple[int, ...] = (1, 4, 16, 32)
    restores_s: float = 30.0
    veths_s: float = 10.0
    idle_s: float = 20.0
    flows: Mapping[int, float] = field(default_factory=lambda: flows.SIZES)
    flow_looks: int = 3
    rates: int = 10
    wake_ups: int = 200


_QUICK = Size(
    connections=500,
    repairs={"nft": 7, "legacy": 5},
    repairs_without_lock=3,
    loops={1.0: 3},
    starts=3,
    looks=5,
    rules=(100, 1_000),
    pods=(1, 10),
    networks=(1, 4),
    restores_s=3.0,
    veths_s=3.0,
    idle_s=5.0,
    flows={10_000: flows.SIZES[10_000]},
    flow_looks=1,
    rates=3,
    wake_ups=50,
)


def main() -> int:
    """Measures, prints, cleans up also when interrupted. A missed aim is not a failure: times on a
    shared machine are what they are. A wrong source is."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, about a minute")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples there too")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FIRST.json",
        help="print the ratio to that run as well",
    )
    parser.add_argument(
        "--publish", action="store_true", help="put the table into README.md, and draw the picture"
    )
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the benchmark makes network namespaces: run it as root", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    first = _medians(options.compare) if options.compare else {}
    try:
        before = machine()
        figures = measure(_QUICK if options.quick else Size())
    except KeyboardInterrupt:
        print("\ninterrupted; the namespaces are gone", file=sys.stderr)
        return 130
    after = machine()["load_average"]
    conditions = (
        f"{before['cores']} cores of {before['cpu']}, Linux {before['kernel']}, "
        f"Python {before['python']}, {' and '.join(before['iptables'])}, "
        f"load {before['load_average'][0]} before and {after[0]} after"
    )
    growth = [
        f"{name}: exponent {picture.exponent(points):.2f}"
        for name, points in picture.series(figures).items()
    ]
    print("\n".join((conditions, "", table(figures, first), "", *growth)))
    if options.json is not None:
        document = {
            "machine": {**before, "load_average_after": after},
            "quick": options.quick,
            "figures": [one.document() for one in figures],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.publish:
        _publish(figures, conditions)
    return 1 if any(one.broken for one in figures) else 0


def _medians(path: Path) -> dict[str, float]:
    return {one["name"]: one["median"] for one in json.loads(path.read_text())["figures"]}


def _publish(figures: list[Figure], conditions: str) -> None:
    before, _, rest = _README.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    body = f"{_BEGIN}\n{conditions}.\n\n{markdown(figures)}\n{_END}"
    _README.write_text(f"{before}{body}{after}")
    _PICTURE.write_text(picture.svg(picture.series(figures)))


def measure(size: Size) -> list[Figure]:
    """All figures. Two networks at once, as a daemon on each has to be left alone for long."""
    progress = _Progress()
    with ExitStack() as stack:
        progress("two networks in namespaces")
        both = [stack.enter_context(_site(backend)) for backend in ("nft", "legacy")]
        nft, legacy = both
        found: list[Figure] = []
        for site in both:
            progress(f"sources of {size.connections} connections thrice, {site.backend}")
            with Snatd(site.node.host, site.folder / "sources") as snatd:
                found += sources.sources(site, snatd, size.connections)
        progress("new connections a second")
        found += connections.connections(nft, size.rates)
        progress("bare wake-ups")
        found.append(bare.wake_ups(nft.node.host, size.wake_ups))
        for site in both:
            progress(f"{size.starts} starts, {site.backend}")
            found += daemon.starts(site, size.starts)
        daemons = []
        for site in both:
            bare.only_broad(site.node)
            # No resync is to fall into what is measured.
            snatd = Snatd(site.node.host, site.folder / "snatd", resync=3600)
            stack.enter_context(snatd)
            snatd.start()
            daemon.settled(snatd)
            daemons.append((site, snatd))
        (_, on_nft), (_, on_legacy) = daemons
        progress(f"{size.idle_s:g} s idle")
        found += daemon.idle(daemons, size.idle_s)
        progress(f"{size.restores_s:g} s of restores, {size.veths_s:g} s of veths")
        found += storms.restores(nft, on_nft, size.restores_s)
        found += storms.veths(nft, on_nft, size.veths_s)
        progress("flows")
        found += flows.flows(nft, on_nft, dict(size.flows), size.flow_looks)
        for rules in size.rules:
            for site, snatd in daemons:
                site.fill_to(rules)
                progress(f"repairs and looks, {site}")
                found += repair.repairs(site, snatd, size.repairs[site.backend])
                found += look.looks(site, size.looks)
                if site is legacy:
                    found.append(repair.poll_period(site))
            if rules == size.rules[0]:
                progress(f"repairs beside loops and without the lock, {rules} rules")
                found += repair.against_loops(nft, on_nft, dict(size.loops))
                found += repair.repairs_without_lock(legacy, on_legacy, size.repairs_without_lock)
        for _, snatd in daemons:
            snatd.stop()
        progress("networks and pods")
        found += look.looks_by_networks(nft, size.networks, size.looks)
        found += look.looks_by_pods(nft, size.pods, size.looks)
        progress("done")
    return found


@contextmanager
def _site(backend: str) -> Iterator[Site]:
    with Lab(backend) as lab:
        node = lab.nodes[0]
        node.write_lease()
        site = Site(backend, lab, observers.on(node.host, backend))
        yield site
        site.observer.close()


class _Progress:
    """What is being done, and since when, on stderr."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self._started_s:5.0f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
