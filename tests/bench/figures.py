"""A figure is samples with a name; here it becomes a line of the table and an entry of the JSON."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Aim:
    """What one statistic of a figure (`median`, `p99` or `ratio`) should be: at most, or with
    `at_least` no less. `beside` is added: what cannot be avoided, measured in the same run."""

    limit: float
    of: str = "median"
    at_least: bool = False
    beside: float = 0.0

    def __str__(self) -> str:
        limit = f"{self.limit:g}" + (f" + {_number(self.beside)}" if self.beside else "")
        return f"{self.of} {'>=' if self.at_least else '<='} {limit}"

    def met(self, figure: Figure) -> bool:
        value = {"median": figure.median, "p99": figure.p99, "ratio": figure.ratio or 0.0}[self.of]
        limit = self.limit + self.beside
        return value >= limit if self.at_least else value <= limit


@dataclass(frozen=True)
class Figure:
    """`floor`: samples taken in between, of the least work that could do the same or of whatever
    else this is compared with. `point`: its place in a picture, series and x. `vital`: the product
    is broken where an aim is missed."""

    name: str
    unit: str
    samples: tuple[float, ...]
    aims: tuple[Aim, ...] = ()
    floor: tuple[float, ...] = ()
    point: tuple[str, float] | None = None
    vital: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p99(self) -> float:
        """The largest one of fewer than a hundred."""
        return sorted(self.samples)[math.ceil(0.99 * len(self.samples)) - 1]

    @property
    def ratio(self) -> float | None:
        below = statistics.median(self.floor) if self.floor else 0.0
        return self.median / below if below else None

    @property
    def met(self) -> bool | None:
        return all(aim.met(self) for aim in self.aims) if self.aims else None

    @property
    def broken(self) -> bool:
        return self.vital and not self.met

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name.strip(),
            "unit": self.unit,
            "n": len(self.samples),
            "median": self.median,
            "p99": self.p99,
            "ratio": self.ratio,
            "aims": [str(aim) for aim in self.aims],
            "met": self.met,
            "point": self.point,
            "samples": list(self.samples),
        }


_HEAD = ("figure", "unit", "median", "p99", "n", "ratio", "aim", "met")
# Words to the left, numbers to the right.
_WORDS = ("figure", "unit", "aim", "met")


def table(figures: Sequence[Figure], first: Mapping[str, float]) -> str:
    """`first`: the medians of another run by name; if there are any, how many times that it is."""
    head, *rows = _rows(figures, first)
    rows = [head, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in _WORDS else cell.rjust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def markdown(figures: Sequence[Figure]) -> str:
    """The same for README.md."""
    head, *rows = _rows(figures, {})
    rule = ("---" if name in _WORDS else "---:" for name in head)
    body = ((row[0].replace("  ", "&nbsp; ").replace("|", "\\|"), *row[1:]) for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def _rows(figures: Sequence[Figure], first: Mapping[str, float]) -> list[tuple[str, ...]]:
    more = ("x first",) if first else ()
    return [(*_HEAD, *more), *(_row(one) + _since(one, first) for one in figures)]


def _since(figure: Figure, first: Mapping[str, float]) -> tuple[str, ...]:
    if not first:
        return ()
    before = first.get(figure.name.strip())
    return (f"{figure.median / before:.2f}" if before else "",)


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        figure.unit,
        _number(figure.median),
        _number(figure.p99),
        str(len(figure.samples)),
        "" if figure.ratio is None else f"{figure.ratio:.2f}",
        ", ".join(map(str, figure.aims)),
        {None: "", True: "yes", False: "NO"}[figure.met],
    )


def _number(value: float) -> str:
    if value == round(value):
        return f"{value:.0f}"
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
