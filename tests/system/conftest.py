"""System tests install the built packages into booted machines of their own.

Where they cannot run they fail; they are never skipped.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import snatd
from tests.lab import tree
from tests.lab.mounts import memory
from tests.system.machine import Machine
from tests.system.node import Node

PROJECT = Path(snatd.__file__).parents[1]
PACKAGES = (*tree.SNATD, "systemd", "systemd-sysv", "dbus", "kmod", "iptables-persistent", "rpm")
NEXT = f"{snatd.__version__}+next"
NEXT_TOML = "\n\n# A key that came with the next version.\n#next = 1\n"
DISTRIBUTIONS = ("el9", "el10", "fc43")


@dataclass(frozen=True)
class Rpms:
    """Those of one distribution, with snatd-legacy."""

    this: Path
    next: Path
    legacy: Path


@dataclass(frozen=True)
class Packages:
    """What was built of the working tree: this version, and the same as the next one with another
    snatd.toml; the RPMs by distribution."""

    deb: Path
    next_deb: Path
    rpms: dict[str, Rpms]


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    if os.geteuid() != 0:
        pytest.exit("the system tests boot machines: run them as root", 1)


@pytest.fixture(scope="session")
def work(_root: None) -> Iterator[Path]:
    """Memory, mounted for this process alone: however it ends, nothing of it is left."""
    with memory("system") as folder:
        yield folder


def git(*words: str, stdin: str = "", index: Path | None = None) -> str:
    done = subprocess.run(
        ["git", "-c", "safe.directory=*", *words],
        env={**os.environ, **_AUTHOR, **({"GIT_INDEX_FILE": str(index)} if index else {})},
        input=stdin,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


_WHO = {"NAME": "x", "EMAIL": "x@invalid"}
_AUTHOR = {f"GIT_{who}_{what}": to for who in ("AUTHOR", "COMMITTER") for what, to in _WHO.items()}


@pytest.fixture(scope="session")
def commit() -> str:
    """The last commit with the changes of the working tree on top, as a commit of its own."""
    return git("stash", "create") or "HEAD"


@pytest.fixture(scope="session")
def next_commit(work: Path, commit: str) -> str:
    """The same with another snatd.toml in the packages. No branch and no file knows of it."""
    path, index = "packaging/snatd.toml", work / "index"
    git("read-tree", commit, index=index)
    text = git("show", f"{commit}:{path}") + NEXT_TOML
    blob = git("hash-object", "-w", "--stdin", stdin=text)
    git("update-index", "--cacheinfo", f"100644,{blob},{path}", index=index)
    return git("commit-tree", "-p", commit, "-m", NEXT, git("write-tree", index=index))


def build(script: str, *words: str) -> Path:
    """Runs a build script; the path that it prints last."""
    done = subprocess.run(
        [PROJECT / script, *words], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.split()[-1])


@pytest.fixture(scope="session")
def packages(work: Path, commit: str, next_commit: str) -> Packages:
    output = str(work / "packages")

    def rpms(distribution: str) -> Rpms:
        return Rpms(
            build("packaging/rpm/build", output, distribution, commit),
            build("packaging/rpm/build", output, distribution, next_commit, NEXT),
            build("packaging/rpm/build-legacy", output, distribution, commit),
        )

    return Packages(
        deb=build("packaging/deb", output, commit),
        next_deb=build("packaging/deb", output, next_commit, NEXT),
        rpms={one: rpms(one) for one in DISTRIBUTIONS},
    )


@pytest.fixture(scope="session", params=["bookworm", "trixie"])
def base(request: pytest.FixtureRequest, work: Path) -> Path:
    """The tree of a suite, without snatd."""
    return tree.unpack(str(request.param), PACKAGES, work / str(request.param))


@pytest.fixture(scope="session")
def installed(base: Path, packages: Packages, work: Path) -> list[Path]:
    """The same with the package installed in it while it ran."""
    folder = work / f"{base.name}-installed"
    node = Node([base], folder)
    try:
        node.boot()
        install(node.machine, packages.deb)
        node.machine.power_off()
    finally:
        node.close()
    return [folder / "upper", base]


def install(machine: Machine, *packages: Path) -> str:
    """Really, by apt, which needs no network for it: what it depends on is there."""
    names = machine.copy(*packages)
    return machine.run("apt-get", "install", "-y", "-q", "--no-install-recommends", *names)


@pytest.fixture
def folder(work: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def bare(base: Path, folder: Path) -> Iterator[Node]:
    """A node without snatd, up."""
    node = Node([base], folder)
    try:
        node.boot()
        yield node
    finally:
        node.close()


@pytest.fixture
def off(installed: list[Path], folder: Path) -> Iterator[Node]:
    """A node with snatd installed, not started yet."""
    node = Node(installed, folder)
    try:
        yield node
    finally:
        node.close()


@pytest.fixture
def node(off: Node) -> Node:
    """A node with snatd running and all there: network, container, lease."""
    off.boot()
    off.network()
    off.lease()
    return off
