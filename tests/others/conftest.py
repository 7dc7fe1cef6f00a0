"""The trees in which the other programs are, and what all these tests want.

Where they cannot run they fail; they are never skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import _root, _the_machines_own_tables_stay_as_they_are
from tests.lab import tree
from tests.lab.mounts import memory

__all__ = ["_root", "_the_machines_own_tables_stay_as_they_are"]

PACKAGES = (
    *(*tree.SNATD, "systemd", "systemd-sysv", "dbus", "kmod"),
    *("podman", "crun", "netavark", "busybox-static", "containernetworking-plugins", "firewalld"),
)


@pytest.fixture(scope="session")
def work(_root: None) -> Iterator[Path]:
    with memory("others") as folder:
        yield folder


@pytest.fixture(scope="session")
def trixie(work: Path) -> Path:
    return tree.unpack("trixie", PACKAGES, work / "trixie")


@pytest.fixture(scope="session")
def forky(work: Path) -> Path:
    return tree.unpack("forky", PACKAGES, work / "forky")
