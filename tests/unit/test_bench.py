"""The arithmetic of the benchmark: what it says of samples."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tests.bench.figures import Aim, Figure, markdown, table
from tests.bench.picture import exponent, series, svg

SAMPLES = tuple(float(number) for number in range(1, 201))


def test_p99_is_the_largest_of_few_and_not_of_many() -> None:
    assert Figure("few", "ms", SAMPLES[:99]).p99 == 99
    assert Figure("many", "ms", SAMPLES).p99 == 198
    assert Figure("one", "ms", (5.0,)).p99 == 5


@pytest.mark.parametrize(
    ("aim", "met"),
    [
        (Aim(100.5), True),
        (Aim(100), False),
        (Aim(90, beside=10.5), True),
        (Aim(198, "p99"), True),
        (Aim(197, "p99"), False),
        (Aim(20, "ratio", at_least=True), True),
        (Aim(21, "ratio", at_least=True), False),
    ],
)
def test_an_aim(aim: Aim, met: bool) -> None:
    figure = Figure("f", "ms", SAMPLES, (aim,), floor=(5.0, 5.0, 5.0))
    assert figure.met is met
    assert not figure.broken
    assert Figure("f", "ms", SAMPLES, (aim, Aim(0)), floor=(5.0,)).met is False


def test_a_wrong_source_is_a_broken_product_and_none_is_not() -> None:
    def wrong(count: float) -> Figure:
        return Figure("wrong sources", "", (count,), (Aim(0, "p99"),), vital=True)

    assert wrong(1).broken
    assert not wrong(0).broken


def test_the_table_has_the_ratio_to_the_first_run_where_there_was_one() -> None:
    figures = [Figure("old", "ms", (6.0,), (Aim(3),)), Figure("  new", "ms", (6.0,))]
    lines = table(figures, {"old": 4.0}).splitlines()
    assert lines[0].split()[-2:] == ["x", "first"]
    assert lines[1].split() == ["old", "ms", "6", "6", "1", "median", "<=", "3", "NO", "1.50"]
    assert lines[2].split() == ["new", "ms", "6", "6", "1"]
    assert "first" not in table(figures, {})
    assert markdown(figures).splitlines()[-1].startswith("| &nbsp; new | ms | 6 |")


def test_a_name_does_not_break_the_table_of_the_readme() -> None:
    (row,) = markdown([Figure("-C || -I", "s", (1.0,))]).splitlines()[2:]
    assert row.replace("\\|", "").count("|") == 9


def test_exponents() -> None:
    assert exponent([(1, 7), (10, 7), (100, 7)]) == pytest.approx(0)
    assert exponent([(1, 3), (10, 30), (1000, 3000)]) == pytest.approx(1)
    assert exponent([(1, 2), (4, 4), (16, 8)]) == pytest.approx(0.5)


def test_the_picture_has_each_point_of_each_line_inside_of_it() -> None:
    figures = [
        Figure("f", "ms", (y,), point=(name, x))
        for name, y, x in (("a & b", 5.0, 1), ("a & b", 50.0, 250), ("c", 0.4, 50_000))
    ]
    lines = series([*figures, Figure("no point", "ms", (1.0,))])
    assert lines == {"a & b": [(1, 5.0), (250, 50.0)], "c": [(50_000, 0.4)]}
    lines["c"].append((100, 0.4))
    root = ET.fromstring(svg(lines))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    circles = [one.attrib for one in root.iter() if one.tag.endswith("circle")]
    assert len(circles) == 4
    assert all(0 < float(one["cx"]) < width and 0 < float(one["cy"]) < height for one in circles)
    texts = {one.text for one in root.iter() if one.tag.endswith("text")}
    assert {"a & b: exponent 0.42", "c: exponent 0.00"} <= texts
