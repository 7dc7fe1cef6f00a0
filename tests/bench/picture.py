"""How figures grow, as an SVG with both axes logarithmic, and the exponent of each line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from tests.bench.figures import Figure

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 290, 20, 50
_COLOURS = ("#1b6ca8", "#c0392b", "#1e8449", "#8e44ad", "#b9770e", "#566573", "#117a65", "#a04000")
Points = list[tuple[float, float]]


def series(figures: Sequence[Figure]) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for one in figures:
        if one.point is not None:
            name, x = one.point
            found.setdefault(name, []).append((x, one.median))
    return found


def exponent(points: Points) -> float:
    """Of y = a * x^b the b that fits best: 0 does not grow, 1 grows with x."""
    xs, ys = ([math.log(one[axis]) for one in points] for axis in (0, 1))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    along = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return along / sum((x - mean_x) ** 2 for x in xs)


def svg(lines: dict[str, Points]) -> str:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    right = _decade(max(xs), up=True)
    bottom, top = _decade(min(ys)), _decade(max(ys), up=True)

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log10(x) / right * (_WIDTH - _LEFT - _RIGHT)
        up = (math.log10(y) - bottom) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for power in range(right + 1):
        x, low = place(10**power, 10**bottom)
        parts.append(_line(x, low, x, place(1, 10**top)[1]))
        parts.append(_text(x, low + 16, f"{10**power:,}", "middle"))
    for power in range(bottom, top + 1):
        left, y = place(1, 10.0**power)
        parts.append(_line(left, y, place(10**right, 1)[0], y))
        parts.append(_text(left - 6, y + 4, f"{10.0**power:g}", "end"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, "number of", "middle"))
    parts.append(_text(8, _TOP - 6, "ms"))
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        told = f"{name}: exponent {exponent(points):.2f}"
        parts.append(_text(_WIDTH - _RIGHT + 12, _TOP + 14 + 20 * number, told, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _decade(value: float, *, up: bool = False) -> int:
    power = math.log10(value)
    return math.ceil(power) if up else math.floor(power)


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#333") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} fill="{colour}">{escape(text)}</text>'
