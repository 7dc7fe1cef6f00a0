"""The README's support table: what the tests gave in each tree, between two comments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.matrix.versions import LIBRARIES, TOOLS

VERSIONS = ("Python", *TOOLS, *LIBRARIES)
_COLUMNS = ("Distribution", *VERSIONS, "legacy tables", "tests passed")
_BEGIN, _END = "<!-- from `make test-matrix` -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Row:
    """One tree. `failed` names the tests that did not pass there."""

    distribution: str
    versions: tuple[str, ...]
    legacy: bool
    tests: int
    failed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.versions) == len(VERSIONS), self.versions
        assert len(self.failed) <= self.tests


def block(rows: Sequence[Row]) -> str:
    """The table, and under it what does not work."""
    cells = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, rows)]
    lines = [f"| {' | '.join(one)} |" for one in cells]
    wrong = [f"* {row.distribution}: `{name}` fails." for row in rows for name in row.failed]
    return "\n".join([*lines, *([""] if wrong else []), *wrong]) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    passed = f"{row.tests - len(row.failed)} of {row.tests}"
    return row.distribution, *row.versions, "yes" if row.legacy else "no", passed


def put(readme: str, rows: Sequence[Row]) -> str:
    """The README with the table in its place."""
    before, _, after = _split(readme)
    return f"{before}{_BEGIN}{block(rows)}{_END}{after}"


def read(readme: str) -> list[Row]:
    """The table that the README has. Raises ValueError where `block` would not write it so."""
    found = _split(readme)[1]
    lines = [line[2:-2].split(" | ") for line in found.splitlines() if line.startswith("| ")][2:]
    failed = re.findall(r"(?m)^\* (.+?): `(.+)` fails\.$", found)
    rows = []
    for distribution, *versions, legacy, passed in lines:
        names = tuple(name for tree, name in failed if tree == distribution)
        tests = int(passed.rpartition(" ")[2])
        rows.append(Row(distribution, tuple(versions), legacy == "yes", tests, names))
    if block(rows) != found:
        raise ValueError(f"not a table of `make test-matrix`:\n{found}")
    return rows


def _split(readme: str) -> tuple[str, str, str]:
    parts = re.split(f"(?:{re.escape(_BEGIN)}|{re.escape(_END)})", readme)
    if len(parts) != 3 or not readme.startswith(_BEGIN, len(parts[0])):
        raise ValueError("the README has not one place for the table of `make test-matrix`")
    return parts[0], parts[1], parts[2]
