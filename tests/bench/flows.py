"""A look at many connections: by the command, and by the daemon while its loop goes on."""

from __future__ import annotations

import json
import time
from datetime import datetime
from signal import SIGHUP, SIGUSR1

from tests.bench import bare
from tests.bench.daemon import settled
from tests.bench.figures import Aim, Figure
from tests.bench.site import Site
from tests.bench.usage import memory_mib
from tests.lab.netns import until
from tests.lab.process import Snatd, stopwatch_ms

# How many entries, and in how many ms they are to be looked at.
SIZES = {10_000: 200.0, 60_000: 600.0, 260_000: 2000.0}
_BLOCK_MS, _MORE_MIB = (Aim(50, "p99"),), (Aim(1, "p99"),)
_PORTS = 50_000
_PAUSE_S = 0.003
# Of so many entries one is SNATed.
_ONE_WRONG_IN = 10


def flows(site: Site, snatd: Snatd, sizes: dict[int, float], count: int) -> list[Figure]:
    figures: list[Figure] = []
    settled(snatd)
    _look(snatd)
    before_mib, _ = memory_mib(snatd.pid)
    filled = 0
    for entries, limit_ms in sizes.items():
        _fill(site, filled, entries)
        filled = entries
        command_ms, floor_ms, look_ms, block_ms = [], [], [], []
        for _ in range(count):
            started_s = time.monotonic()
            assert snatd.command("flows", "--json").returncode == 0
            command_ms.append(stopwatch_ms(started_s))
            floor_ms.append(_bare_ms(site))
            took_ms, blocks = _look(snatd)
            look_ms.append(took_ms)
            block_ms.append(max(blocks))
        more_mib = memory_mib(snatd.pid)[0] - before_mib
        aims = (Aim(limit_ms),)
        what = f"{entries} entries"
        floor = tuple(floor_ms)
        figures += [
            Figure(f"snatd flows, {what}", "ms", tuple(command_ms), aims, floor),
            Figure(f"  floor: bare conntrack -L, {what}", "ms", floor),
            Figure(f"  the daemon's look at flows, {what}", "ms", tuple(look_ms), aims, floor),
            Figure(
                f"  its loop's longest silence meanwhile, {what}", "ms", tuple(block_ms), _BLOCK_MS
            ),
            Figure(f"  more RSS than before, {what}", "MiB", (more_mib,), _MORE_MIB),
        ]
    return figures


def _fill(site: Site, have: int, wanted: int) -> None:
    """As after so many UDP flows from the container to a container elsewhere."""
    node, me, pods = site.node, site.node.container_address, site.other.pods
    lines = []
    for number in range(have, wanted):
        port, host = 1024 + number % _PORTS, number // _PORTS + 10
        pod = f"{pods}.{site.other.number}.{host}"
        to = f"-n {node.address}" if number % _ONE_WRONG_IN == 0 else f"-q {me}"
        lines.append(
            f"-A -t 3600 -u SEEN_REPLY,ASSURED -s {me} -d {pod} -r {pod} {to} -p udp "
            f"--sport {port} --dport 53 --reply-port-src 53 --reply-port-dst {port}\n"
        )
    node.host.run("conntrack", "-R", "-", stdin="".join(lines))


def _bare_ms(site: Site) -> float:
    listing = ("conntrack", "-L", "-f", "ipv4", "-s", site.node.subnet, "-o", "id")
    return bare.run(site.node.host, *listing).took_ms


def _look(snatd: Snatd) -> tuple[float, list[float]]:
    """A reload, after which flows are looked at. How long that took, from the end of the pass, and
    how long the loop took to answer each of many signals meanwhile."""
    passes = snatd.status()["passes"]
    snatd.signal(SIGHUP)
    until(lambda: snatd.status()["passes"] > passes, "the reload's pass", 20)
    started_s, silences_ms = time.monotonic(), []
    ask = _Asking(snatd)
    while not _looked(snatd):
        silences_ms.append(ask())
        assert time.monotonic() - started_s < 60, "the look at flows does not end"
    return stopwatch_ms(started_s), silences_ms


def _looked(snatd: Snatd) -> bool:
    """A reload forgets all flows."""
    found = snatd.status()["flows"]
    return bool(found) and all(one["since"] for one in found)


class _Asking:
    """Asks the loop for a sign of life, which is a line in its log with the time."""

    def __init__(self, snatd: Snatd) -> None:
        self._snatd = snatd
        self._log = snatd.log_path.open()
        self._log.seek(0, 2)
        self._rest = ""

    def __call__(self) -> float:
        """Milliseconds until the answer."""
        asked_s = time.time()
        self._snatd.signal(SIGUSR1)
        line = until(self._answer, "an answer to SIGUSR1")
        time.sleep(_PAUSE_S)
        return (datetime.fromisoformat(json.loads(line)["timestamp"]).timestamp() - asked_s) * 1000

    def _answer(self) -> str:
        # A line is written in pieces.
        *lines, self._rest = (self._rest + self._log.read()).split("\n")
        return next((line for line in lines if '"event": "summary"' in line), "")
