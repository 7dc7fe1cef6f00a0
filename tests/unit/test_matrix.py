"""The README's support table is one that `make test-matrix` wrote."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.matrix import table
from tests.matrix.table import VERSIONS, Row
from tests.matrix.tree import PROJECT, TREES

README = (PROJECT / "README.md").read_text()
BROKEN = Row("B, too", ("4.5",) * len(VERSIONS), legacy=False, tests=3, failed=("a.b[c | d]", "e"))
ROWS = [Row("A", ("1.2",) * len(VERSIONS), legacy=True, tests=3), BROKEN]


def test_the_readme_has_a_whole_run() -> None:
    rows = table.read(README)
    assert [row.distribution for row in rows] == [tree.distribution for tree in TREES]
    assert all(row.tests > 2000 for row in rows)


def test_a_table_is_put_in_its_place_and_nowhere_else() -> None:
    written = table.put(README, ROWS)
    assert table.read(written) == ROWS
    assert table.put(written, table.read(README)) == README


def test_what_does_not_work_is_named() -> None:
    said = table.block(ROWS)
    assert "| yes | 3 of 3 |\n" in said
    assert "| no | 1 of 3 |\n" in said
    assert said.endswith("\n\n* B, too: `a.b[c | d]` fails.\n* B, too: `e` fails.\n")


@pytest.mark.parametrize(
    ("what", "by"),
    [
        ("* B, too: `e` fails.\n", ""),
        ("* B, too: `e`", "* C: `e`"),
        ("1 of 3", "2 of 3"),
        ("| no |", "| perhaps |"),
        ("| no |", "|"),
        ("| Python |", "| Perl |"),
        ("<!-- end -->\n", ""),
        ("<!-- from `make test-matrix` -->\n", ""),
        ("<!-- end -->\n", "<!-- end -->\n<!-- end -->\n"),
    ],
)
def test_no_other_table_is_taken_for_one(what: str, by: str) -> None:
    written = table.put("before\n<!-- from `make test-matrix` -->\n<!-- end -->\nafter\n", ROWS)
    assert what in written
    with pytest.raises((ValueError, AssertionError)):
        table.read(written.replace(what, by))


def test_a_row_has_each_version() -> None:
    with pytest.raises(AssertionError):
        replace(BROKEN, versions=("1.2",))
