"""The fault matrix: each row has the tests that it names, and each such test has its row."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]
MATRIX = TESTS / "faults" / "README.md"
ROWS = range(1, 35)


def the_rows() -> dict[int, list[str]]:
    """The cells of each row, by its number."""
    lines = [line for line in MATRIX.read_text().splitlines() if re.match(r"\| \d", line)]
    rows = [line.strip("|").split(" | ") for line in lines]
    assert all(len(cells) == 5 for cells in rows)
    numbered = {int(cells[0]): cells[1:] for cells in rows}
    assert [int(cells[0]) for cells in rows] == list(ROWS)
    return numbered


def the_tests() -> dict[int, set[tuple[str, str]]]:
    """The folder and the name of each test that has a row's number in its name."""
    found: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.FunctionDef) and part.name.startswith("test_fault_"):
                found[int(part.name.split("_")[2])].add((path.parent.name, part.name))
    return found


def test_each_row_names_its_tests_and_no_others() -> None:
    tests = the_tests()
    assert set(tests) == set(ROWS)
    for number, (_, _, named, _) in the_rows().items():
        words = re.findall(r"(?:(\w+): )?`(\w+)`", named)
        assert {(folder or "faults", name) for folder, name in words} == tests[number], number


def test_each_row_says_what_must_be_seen_and_what_was_found() -> None:
    for number, cells in the_rows().items():
        assert all(cell.strip() for cell in cells), number
