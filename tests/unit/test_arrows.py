"""Who may import whom, read from the sources: the direction of the arrows may not change."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import snatd

ROOT = Path(snatd.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

# Reading, writing, waiting, asking the time, chance, logging.
NO_IO = {
    *("asyncio", "ctypes", "datetime", "fcntl", "io", "logging", "multiprocessing", "os"),
    *("pathlib", "random", "secrets", "select", "selectors", "shutil", "signal", "socket"),
    *("subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid"),
}
NO_IO_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
MODULES_OF = {"pyroute2": 1, "iptc": 1, "sdnotify": 1, "watchdog": 1, "structlog": 1}


def name(path: Path) -> str:
    """snatd/core/plan.py is snatd.core.plan."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[str]:
    """The full names of all that a module imports, wherever in it that stands."""
    for part in ast.walk(ast.parse(path.read_text())):
        if isinstance(part, ast.Import):
            yield from (one.name for one in part.names)
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f"{path}: a relative import"
            assert part.module is not None
            # `from snatd import report` imports snatd.report.
            yield from (f"{part.module}.{one.name}" for one in part.names)


def inside(imported: str, *packages: str) -> bool:
    return any(f"{imported}.".startswith(f"{package}.") for package in packages)


def package(path: Path) -> str:
    return ".".join(name(path).split(".")[:2])


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_the_arrows(path: Path) -> None:
    allowed = {
        "snatd.core": ("snatd.core",),
        "snatd.kernel": ("snatd.core", "snatd.kernel"),
        "snatd.host": ("snatd.core", "snatd.host"),
        # It reads its file with the care that any file is read with.
        "snatd.config": ("snatd.core", "snatd.host.files"),
        "snatd.reconcile": ("snatd.core",),
        "snatd.report": ("snatd.core", "snatd.reconcile"),
        "snatd.told": ("snatd.core", "snatd.report"),
        "snatd.explain": ("snatd.core", "snatd.kernel"),
    }.get(package(path), ("snatd",))
    wrong = [one for one in imports(path) if inside(one, "snatd") and not inside(one, *allowed)]
    assert wrong == []


def test_no_arrow_leads_back() -> None:
    """Also none for a type alone; where there is a circle, CycleError names it."""
    there = set(map(name, MODULES)) - {"snatd"}
    order = TopologicalSorter(
        {
            name(path): {one for one in there for what in imports(path) if inside(what, one)}
            for path in MODULES
        }
    )
    assert {*order.static_order()} >= there


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_what_comes_from_elsewhere_is_declared(path: Path) -> None:
    known = {*sys.stdlib_module_names, *MODULES_OF, "snatd"}
    assert {one.partition(".")[0] for one in imports(path)} <= known


CORE = [path for path in MODULES if package(path) == "snatd.core"]
LINE = [*CORE, ROOT / "reconcile.py", ROOT / "report.py"]


@pytest.mark.parametrize("path", LINE, ids=name)
def test_decisions_do_nothing_but_decide(path: Path) -> None:
    tops = {one.partition(".")[0] for one in imports(path)}
    assert tops <= {*sys.stdlib_module_names, "snatd"}
    assert tops & NO_IO == set()
    calls = {
        part.func.id
        for part in ast.walk(ast.parse(path.read_text()))
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
    }
    assert calls & NO_IO_CALLS == set()


@pytest.mark.parametrize("library", MODULES_OF)
def test_each_library_has_its_module(library: str) -> None:
    users = [name(path) for path in MODULES if any(inside(one, library) for one in imports(path))]
    assert 1 <= len(users) <= MODULES_OF[library], users
    assert all(inside(user, "snatd.kernel", "snatd.host") for user in users)


def test_only_config_reads_toml() -> None:
    users = [name(path) for path in MODULES if any(inside(one, "tomllib") for one in imports(path))]
    assert users == ["snatd.config"]


def test_only_the_wiring_knows_both_sides() -> None:
    both = [
        name(path)
        for path in MODULES
        if all(
            any(inside(i, side) for i in imports(path)) for side in ("snatd.host", "snatd.kernel")
        )
    ]
    wiring = {"node", "daemon", "cli", "facts", "doctor_rivals", "examined"}
    assert {one.removeprefix("snatd.") for one in both} <= wiring


def test_there_is_something_to_look_at() -> None:
    assert {"snatd.core.plan", "snatd.kernel.nft", "snatd.host.flannel"} <= set(map(name, MODULES))
