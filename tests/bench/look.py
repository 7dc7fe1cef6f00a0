"""A pass that finds all in sync. Run as a process on the node, it takes the samples."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import look, reconcile
from tests.bench.figures import Aim, Figure
from tests.bench.site import Site

_ROOT = Path(__file__).parents[2]
_RESYNC_S = Config().resync
_NFT_AIM = Aim(6)


def looks(site: Site, count: int) -> list[Figure]:
    """At the site's number of foreign rules. Legacy may take more than 6 ms by as much as the one
    chain takes to read, which its tool reads the whole table for."""
    found = _on(site, count)
    floor = tuple(found["floor_ms"])
    beside = 0.0 if site.backend == "nft" else statistics.median(floor)
    share = (found["cpu_s"] / count / _RESYNC_S * 100,)
    return [
        Figure(
            f"a pass in sync, {site}",
            "ms",
            tuple(found["wall_ms"]),
            (Aim(_NFT_AIM.limit, beside=beside),),
            floor,
            (f"pass, {site.backend}", site.foreign_rules),
        ),
        Figure(f"  floor: bare iptables-{site.backend} -S POSTROUTING, {site}", "ms", floor),
        Figure(f"  its CPU as a share of the time between resyncs, {site}", "% core", share),
    ]


def looks_by_networks(site: Site, counts: Sequence[int], count: int) -> list[Figure]:
    """With more networks than flannel's, which makes a chain of ours and a set in the guard."""
    return [
        Figure(
            f"a pass in sync, nft, {networks} {'network' if networks == 1 else 'networks'}",
            "ms",
            tuple(_on(site, count, networks - 1)["wall_ms"]),
            point=("pass, nft, by networks", networks),
        )
        for networks in counts
    ]


def looks_by_pods(site: Site, counts: Sequence[int], count: int) -> list[Figure]:
    """With the rules and the device that CNI's bridge plugin makes for each pod."""
    figures, pods = [], 0
    for wanted in counts:
        _add_pods(site, range(pods, wanted))
        pods = wanted
        figures.append(
            Figure(
                f"a pass in sync, nft, {pods} {'pod' if pods == 1 else 'pods'} with CNI chains",
                "ms",
                tuple(_on(site, count)["wall_ms"]),
                point=("pass, nft, by pods", pods),
            )
        )
    return figures


def _add_pods(site: Site, numbers: range) -> None:
    node = site.node
    rules, chains, links = [], [], []
    for number in numbers:
        chain, pod = f"CNI-{number:024x}", f"{node.pods}.{node.number}.{number + 3}"
        comment = f'-m comment --comment "name: \\"cbr0\\" id: \\"{number:064x}\\""'
        chains.append(f":{chain} - [0:0]")
        rules += [
            f"-A {chain} -d {node.subnet} {comment} -j ACCEPT",
            f"-A {chain} ! -d 224.0.0.0/4 {comment} -j MASQUERADE",
            f"-A POSTROUTING -s {pod}/32 {comment} -j {chain}",
        ]
        links += [
            f"link add pod{number} type veth peer name in{number}",
            f"link set pod{number} master docker0 up",
            f"link set in{number} up",
        ]
    script = "\n".join(["*nat", *chains, *rules, "COMMIT", ""])
    node.host.run("iptables-restore", "--noflush", stdin=script)
    node.host.run("ip", "-batch", "-", stdin="\n".join([*links, ""]))


def _on(site: Site, count: int, more_networks: int = 0) -> dict[str, Any]:
    # A process that enters a mount namespace begins at its root.
    command = ("env", f"PYTHONPATH={_ROOT}", sys.executable, "-m", __name__)
    options = (str(count), site.backend, str(more_networks), str(site.folder / "look"))
    return dict(json.loads(site.node.host.run(*command, *options)))


def _cpu_s() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Makes the node in sync, then looks, with the floor in between, and prints JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("backend")
    parser.add_argument("more_networks", type=int)
    parser.add_argument("state", type=Path)
    options = parser.parse_args()
    networks = tuple(ip_network(f"100.{64 + n}.0.0/16") for n in range(options.more_networks))
    config = Config(networks=networks, state_dir=options.state)
    edges = open_edges(config, Tools())
    done = reconcile(edges, config.policy, Deadline(time.monotonic() + 20))
    assert done.view.in_sync, done.view
    bare = (f"iptables-{options.backend}", "-t", "nat", "-S", "POSTROUTING")
    wall_ms, floor_ms, cpu_s = [], [], 0.0
    for _ in range(options.count):
        before_s, started_s = _cpu_s(), time.monotonic()
        view = look(edges, config.policy, Deadline(started_s + 20))
        wall_ms.append((time.monotonic() - started_s) * 1000)
        cpu_s += _cpu_s() - before_s
        assert view.in_sync, view
        started_s = time.monotonic()
        subprocess.run(bare, stdout=subprocess.DEVNULL, check=True)
        floor_ms.append((time.monotonic() - started_s) * 1000)
    print(json.dumps({"wall_ms": wall_ms, "floor_ms": floor_ms, "cpu_s": cpu_s}))


if __name__ == "__main__":
    main()
