"""A figure is samples with a name; here it becomes a line of the table and an entry of the JSON."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Aim:
    """The most that one statistic of a figure (`median` or `max`) should be."""

    limit: float
    of: str = "median"

    def __str__(self) -> str:
        return f"{self.of} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """`floor`: the samples of the least work that could do the same, taken in between."""

    name: str
    unit: str
    samples: tuple[float, ...]
    aim: Aim | None = None
    floor: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def max(self) -> float:
        return max(self.samples)

    @property
    def ratio(self) -> float | None:
        return self.median / statistics.median(self.floor) if self.floor else None

    @property
    def met(self) -> bool | None:
        if self.aim is None:
            return None
        return (self.max if self.aim.of == "max" else self.median) <= self.aim.limit

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "n": len(self.samples),
            "median": self.median,
            "max": self.max,
            "ratio_to_floor": self.ratio,
            "aim": None if self.aim is None else {"of": self.aim.of, "at_most": self.aim.limit},
            "met": self.met,
            "samples": list(self.samples),
        }


def table(figures: Sequence[Figure]) -> str:
    head = ("figure", "unit", "median", "max", "n", "x floor", "aim", "met")
    rows = [head, *map(_row, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            # Words to the left, numbers to the right.
            cell.ljust(width) if column in (0, 1, 6, 7) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        figure.unit,
        _number(figure.median),
        _number(figure.max),
        str(len(figure.samples)),
        "" if figure.ratio is None else f"{figure.ratio:.1f}",
        str(figure.aim or ""),
        {None: "", True: "yes", False: "NO"}[figure.met],
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.1f}"


def machine() -> dict[str, Any]:
    """What absolute times depend on, and how busy it was just now."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "iptables": [_version("iptables-nft"), _version("iptables-legacy")],
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _version(command: str) -> str:
    return subprocess.run(
        [command, "-V"], capture_output=True, text=True, check=True
    ).stdout.strip()
