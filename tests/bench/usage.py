"""What a daemon has used until now."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from tests.lab.process import Snatd


@dataclass(frozen=True)
class Usage:
    at_s: float
    cpu_s: float
    wakes: int
    passes: int

    @classmethod
    def of(cls, snatd: Snatd) -> Usage:
        pid = snatd.pid
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # Its ticks are 10 ms, but only there are the children that were waited for.
        children_s = (int(fields[13]) + int(fields[14])) / 100
        passes = snatd.status()["passes"]
        return cls(time.monotonic(), cpu_s(pid) + children_s, _voluntary_switches(pid), passes)

    def cpu_percent(self, since: Usage) -> float:
        return (self.cpu_s - since.cpu_s) / (self.at_s - since.at_s) * 100


def cpu_s(pid: int) -> float:
    """Of all threads, in nanoseconds: clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def _voluntary_switches(pid: int) -> int:
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    (count,) = (
        line.split()[1]
        for line in status.splitlines()
        if line.startswith("voluntary_ctxt_switches:")
    )
    return int(count)


def memory_mib(pid: int) -> tuple[float, float]:
    """Resident, and resident with shared pages divided among those who share them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {words[0]: int(words[1]) for words in map(str.split, lines)}
    return kib["Rss:"] / 1024, kib["Pss:"] / 1024
