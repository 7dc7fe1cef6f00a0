"""These tests run Docker as Debian 12, 13 and the next one package it, out of trees of theirs.

Nothing is installed or started on the machine itself. Where they cannot run they fail.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import snatd
from tests.docker.world import Step
from tests.kernel.conftest import (  # noqa: F401  fixtures are found by their names here
    _root,
    _the_machines_own_tables_stay_as_they_are,
)
from tests.lab import tree
from tests.lab.mounts import memory
from tests.lab.netns import DIE_WITH_PARENT

_PROJECT = Path(snatd.__file__).parents[1]
_PACKAGES = (*tree.SNATD, "mount", "busybox-static", "docker.io")
# Docker's command has a package of its own since Debian 13.
_MORE = {"bookworm": (), "trixie": ("docker-cli",), "forky": ("docker-cli",)}
_LIVES = [("bookworm", "nft"), ("bookworm", "legacy"), ("trixie", "nft"), ("forky", "nft")]


@dataclass(frozen=True)
class Life:
    steps: dict[str, Step]
    complaints: list[dict[str, Any]]
    exits: list[int]


@dataclass(frozen=True)
class Lives:
    """The same things happened to Docker with snatd and without."""

    suite: str
    alone: Life
    beside_snatd: Life


@pytest.fixture(scope="session")
def work(_root: None) -> Iterator[Path]:  # noqa: F811
    with memory("docker") as folder:
        shutil.copytree(_PROJECT / "snatd", folder / "code/snatd")
        yield folder


def unpacked(suite: str, work: Path) -> Path:
    folder = work / suite
    return folder if folder.exists() else tree.unpack(suite, (*_PACKAGES, *_MORE[suite]), folder)


@pytest.fixture(scope="session", params=_LIVES, ids="-".join)
def lives(request: pytest.FixtureRequest, work: Path) -> Lives:
    """Both at the same time: most of it is waiting."""
    suite, backend = request.param
    lower = unpacked(suite, work)
    running = {how: _begin(suite, lower, work, backend, how) for how in ("without", "with")}
    ended = {how: one.communicate() for how, one in running.items()}
    for how, one in running.items():
        assert one.returncode == 0, f"{how} snatd: {ended[how][1].decode()[-6000:]}"
    return Lives(suite, _life(ended["without"][0]), _life(ended["with"][0]))


def _begin(suite: str, lower: Path, work: Path, backend: str, how: str) -> subprocess.Popen[bytes]:
    words = (suite, str(lower), str(work / f"{suite}-{backend}-{how}"), backend, how)
    return subprocess.Popen(
        [*DIE_WITH_PARENT, sys.executable, "-m", "tests.docker.life", *words],
        cwd=_PROJECT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _life(said: bytes) -> Life:
    told = json.loads(said)
    steps = {name: Step(**step) for name, step in told["steps"].items()}
    return Life(steps, told["complaints"], told["exits"])
