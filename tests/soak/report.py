"""What a soak measured, and whether the daemon stayed as large as it was. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# The allocator gives back late; more than this between the third and the last fifth is a leak.
LARGEST_GROWTH_KIB = 2048


@dataclass(frozen=True)
class Size:
    """The daemon at rest, after a round."""

    memory_kib: int
    descriptors: int
    children: int


def growth(sizes: Sequence[Size]) -> str:
    """What grew; empty where nothing did. The first two fifths are for warming up."""
    fifth = len(sizes) // 5
    if fifth == 0:
        return ""
    middle, last = sizes[2 * fifth : 3 * fifth], sizes[-fifth:]
    grown = median(one.memory_kib for one in last) - median(one.memory_kib for one in middle)
    if grown > LARGEST_GROWTH_KIB:
        return f"{grown:.0f} KiB of memory"
    for what in ("descriptors", "children"):
        before, after = (max(getattr(one, what) for one in some) for some in (middle, last))
        if after > before:
            return f"{what}: {after}, at most {before} before"
    return ""


def table(seed: str, seconds: float, tally: Counter[str], sizes: Sequence[Size]) -> str:
    rows = [("seed", seed), ("seconds", f"{seconds:.0f}")]
    rows += [(what, f"{number:,}") for what, number in sorted(tally.items())]
    if sizes:
        first, last = sizes[len(sizes) // 10], sizes[-1]
        rows += [
            (what, f"{getattr(first, name):,} after a tenth, {getattr(last, name):,} at the end")
            for what, name in (
                ("memory, KiB", "memory_kib"),
                ("descriptors", "descriptors"),
                ("children", "children"),
            )
        ]
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:{width}}  {value}" for what, value in rows)
