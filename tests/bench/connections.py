"""New connections a second through a node, with the guard and without."""

from __future__ import annotations

import random
import socket
import time

from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.site import Site
from tests.lab.process import Snatd

_FLOWS = 20_000
_NO_DIFFERENCE = (Aim(0.95, "ratio", at_least=True),)
_FIRST_PORT = 20_000


def connections(site: Site, count: int) -> list[Figure]:
    """One datagram each, each to another port. It passes both nodes before `sendto` returns, and
    ends at a container that drops it. The rules stay; only the guard comes and goes."""
    bare.only_broad(site.node)
    with Snatd(site.node.host, site.folder / "connections") as snatd:
        assert snatd.command("apply").returncode == 0
    host = site.node.host
    guard = host.run("nft", "list", "table", "ip", "snatd")
    site.other.container.shell(
        "nft add table ip sink; "
        "nft 'add chain ip sink input { type filter hook input priority 0; }'; "
        f"nft add rule ip sink input udp dport '>=' {_FIRST_PORT} drop"
    )
    rates: dict[bool, list[float]] = {True: [], False: []}
    try:
        for _ in range(count):
            for guarded in random.sample((True, False), 2):
                host.shell("nft delete table ip snatd 2>/dev/null || true")
                if guarded:
                    host.run("nft", "-f", "-", stdin=guard)
                for node in site.lab.nodes:
                    node.host.run("conntrack", "-F")
                rates[guarded].append(_rate(site))
    finally:
        site.other.container.shell("nft delete table ip sink")
    without = tuple(rates[False])
    return [
        Figure(
            "new connections a second (ratio: to those without the guard)",
            "1/s",
            tuple(rates[True]),
            _NO_DIFFERENCE,
            without,
        ),
        Figure("  the same without the guard", "1/s", without),
    ]


def _rate(site: Site) -> float:
    with site.node.container.entered():
        caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with caller:
        caller.sendto(b"", (site.other.container_address, _FIRST_PORT))  # neighbours are found
        time.sleep(0.1)
        started_s = time.monotonic()
        for port in range(_FIRST_PORT + 1, _FIRST_PORT + 1 + _FLOWS):
            caller.sendto(b"", (site.other.container_address, port))
        took_s = time.monotonic() - started_s
    made = int(site.node.host.run("conntrack", "-C"))
    assert made >= _FLOWS, f"{made} connections of {_FLOWS}"
    return _FLOWS / took_s
