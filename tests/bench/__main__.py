"""`make bench`: a table of what the daemon takes, against the aims. See README.md beside this."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench import daemon, look, observers, repair
from tests.bench.figures import Figure, machine, table
from tests.bench.repair import Site
from tests.lab.network import Lab
from tests.lab.process import Snatd


@dataclass(frozen=True)
class Size:
    """How many samples of each, and how long the daemons are left alone."""

    repairs: int = 30
    repairs_without_lock: int = 15
    starts: int = 10
    looks: int = 30
    idle_s: float = 20.0


_QUICK = Size(repairs=7, repairs_without_lock=3, starts=3, looks=5, idle_s=5.0)


def main() -> int:
    """Measures, prints, cleans up also when interrupted. A missed aim is not a failure: times on a
    shared machine are what they are."""
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, under a minute")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all samples there too")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the benchmark makes network namespaces: run it as root", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        before = machine()
        figures = measure(_QUICK if options.quick else Size())
    except KeyboardInterrupt:
        print("\ninterrupted; the namespaces are gone", file=sys.stderr)
        return 130
    after = machine()["load_average"]
    print(table(figures))
    print(
        f"{before['cores']} cores of {before['cpu']}, Linux {before['kernel']}, "
        f"Python {before['python']}, {' and '.join(before['iptables'])}, "
        f"load {before['load_average'][0]} before and {after[0]} after"
    )
    if options.json is not None:
        document = {
            "machine": {**before, "load_average_after": after},
            "quick": options.quick,
            "figures": [one.document() for one in figures],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def measure(size: Size) -> list[Figure]:
    """All figures. Two networks at once, as a daemon on each has to be left alone for long."""
    progress = _Progress()
    progress("two networks in namespaces")
    with Lab("nft") as nft_lab, Lab("legacy") as legacy_lab:
        nft, legacy = _site("nft", nft_lab), _site("legacy", legacy_lab)
        starts, repairs, idle, looks = [], [], [], []
        for site in (nft, legacy):
            progress(f"{size.starts} starts, {site.backend}")
            starts += daemon.starts(site, size.starts)
        with _daemon(nft) as on_nft, _daemon(legacy) as on_legacy:
            daemons = ((nft, on_nft), (legacy, on_legacy))
            for site, snatd in daemons:
                daemon.started(snatd)
                progress(f"{size.repairs} repairs, {site.backend}")
                repairs += repair.repairs(site, snatd, size.repairs)
            progress(f"{size.repairs_without_lock} repairs, legacy without the lock")
            repairs += repair.repairs_without_lock(legacy, on_legacy, size.repairs_without_lock)
            progress(f"{size.idle_s:g} s idle")
            idle += daemon.idle(daemons, size.idle_s)
        for site in (nft, legacy):
            progress(f"{size.looks} looks twice, {site.backend}")
            looks += look.looks(site, size.looks)
        progress("done")
    return [*repairs, *starts, *idle, *looks]


def _site(backend: str, lab: Lab) -> Site:
    node = lab.nodes[0]
    node.write_lease()
    return Site(backend, lab, observers.on(node.host, backend))


def _daemon(site: Site) -> Snatd:
    return Snatd(site.node.host, site.folder / "snatd")


class _Progress:
    """What is being done, and since when, on stderr."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()

    def __call__(self, what: str) -> None:
        print(f"{time.monotonic() - self._started_s:5.0f} s  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
