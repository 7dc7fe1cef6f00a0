"""The tests in the tree of a Debian suite, with that suite's own programs and Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab import tree
from tests.lab.netns import DIE_WITH_PARENT
from tests.matrix.table import VERSIONS, Row
from tests.matrix.versions import LIBRARIES

PROJECT = Path(__file__).parents[2]
_BASE = (
    *("iptables", "nftables", "iproute2", "conntrack", "mount", "procps", "strace"),
    *("python3", "python3-venv", "python3-setuptools", "python3-wheel"),
)
# python-iptables has an extension in C, which pip compiles.
_COMPILER = ("python3-dev", "gcc", "libc6-dev")
_PATH = "/opt/snatd/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PYTHON = "/opt/snatd/bin/python"
# The linters and the test of the table read the same text wherever they run: `make test` runs them.
ALL = (
    *("tests/unit", "tests/property", "tests/kernel"),
    *("--ignore=tests/unit/test_lint.py", "--ignore=tests/unit/test_matrix.py"),
)

# In a network and mount namespace of its own: the tree becomes the root. chroot would not do, as
# `nsenter --mount` goes to the root of the mount namespace.
_INSIDE = """
mount --bind "$1" "$1"
for one in proc sys dev; do mount --rbind "/$one" "$1/$one"; done
for one in run tmp; do mount -t tmpfs tmpfs "$1/$one"; done
cd "$1"
shift
pivot_root . mnt
umount --lazy /mnt
cd /src
exec "$@"
"""


@dataclass(frozen=True)
class Tree:
    """A suite with its own python3-* packages or with the newest releases from PyPI."""

    distribution: str
    suite: str
    newest: bool = False

    def run(self, folder: Path, within_s: float, tests: Sequence[str] = ALL) -> tuple[Row, str]:
        """Takes a folder that is not there yet. What the tests gave, and what pytest printed."""
        libraries = _COMPILER if self.newest else tuple(f"python3-{one}" for one in _IN_DEBIAN)
        tree.unpack(self.suite, (*_BASE, *libraries), folder)
        leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
        shutil.copytree(PROJECT, folder / "src", ignore=leave_out)
        self._install(folder)
        argv = (*("-m", "pytest", "-o", "console_output_style=classic"), *tests)
        try:
            done = _inside(folder, within_s, _PYTHON, *argv, "--junitxml=/results.xml")
        except subprocess.TimeoutExpired as error:
            said = (error.output or b"").decode()[-2000:]
            raise AssertionError(
                f"{self.distribution}: {within_s:g} s were not enough: {said}"
            ) from None
        versions = json.loads(_checked(folder, _PYTHON, "-m", "tests.matrix.versions"))
        try:
            row = self._row(versions, folder / "results.xml")
        except (FileNotFoundError, ET.ParseError):
            raise AssertionError(f"{self.distribution}: no result: {done.stdout}") from None
        assert (done.returncode == 0) == (not row.failed), done.stdout
        return row, done.stdout

    def _install(self, folder: Path) -> None:
        project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
        extra = project["optional-dependencies"]["test"]
        tools = [one for one in extra if one.startswith(("pytest", "hypothesis"))]
        version = 'import sys; print("%d.%d" % sys.version_info[:2])'
        python = _checked(folder, "/usr/bin/python3", "-c", version).strip()
        # Fetched from outside: the machine's own pip knows the way to an index.
        fetch = [
            sys.executable,
            *("-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        ]
        fetch += ["--python-version", python, "--dest", str(folder / "wheels")]
        commands = [[*fetch, "--only-binary=:all:", *tools]]
        if self.newest:
            sources = "--no-binary=python-iptables,sdnotify"
            commands.append([*fetch, "--no-deps", sources, *LIBRARIES])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-2000:]}"
        _checked(folder, "/usr/bin/python3", "-m", "venv", "--system-site-packages", "/opt/snatd")
        pip = (
            *(_PYTHON, "-m", "pip", "install", "--quiet"),
            *("--no-index", "--find-links=/wheels"),
        )
        # Without a connection: fails where the tree lacks a library or has it too old.
        _checked(folder, *pip, "--no-build-isolation", *tools, "--editable", "/src")
        shutil.copy(Path(sys.executable).with_name("promtool"), folder / "opt/snatd/bin")

    def _row(self, versions: dict[str, str], results: Path) -> Row:
        cases = list(ET.parse(results).iter("testcase"))
        failed = tuple(_name(one) for one in cases if _did_not_pass(one))
        legacy = [_name(one) for one in cases if "legacy" in one.get("name", "")]
        return Row(
            self.distribution,
            tuple(versions[one] for one in VERSIONS),
            legacy=bool(legacy) and not set(legacy) & set(failed),
            tests=len(cases),
            failed=failed,
        )


TREES = (
    Tree("Debian 12", "bookworm"),
    Tree("Debian 13", "trixie"),
    Tree("Debian forky, not released yet", "forky"),
    Tree("Debian 12, libraries from PyPI", "bookworm", newest=True),
)

_IN_DEBIAN = [one.removeprefix("python-") for one in LIBRARIES]


def _did_not_pass(case: ET.Element) -> bool:
    """Tests are never skipped."""
    return any(case.find(one) is not None for one in ("failure", "error", "skipped"))


def _name(case: ET.Element) -> str:
    return f"{case.get('classname', '').removeprefix('tests.')}.{case.get('name')}"


def _inside(folder: Path, within_s: float, *argv: str) -> subprocess.CompletedProcess[str]:
    unshare = ("unshare", "--net", "--mount", "--propagation", "private")
    clean = ("env", "-i", f"PATH={_PATH}", "HOME=/root", "LC_ALL=C.UTF-8")
    return subprocess.run(
        [*DIE_WITH_PARENT, *unshare, "sh", "-euc", _INSIDE, "sh", str(folder), *clean, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=within_s,
        check=False,
    )


def _checked(folder: Path, *argv: str) -> str:
    done = _inside(folder, 300, *argv)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stdout[-2000:]}"
    return done.stdout
