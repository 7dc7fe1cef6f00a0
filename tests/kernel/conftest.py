"""Kernel tests run real iptables and real packets in namespaces of their own.

Where they cannot run they fail; they are never skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.netns import Namespace
from tests.lab.network import Lab


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    if os.geteuid() != 0:
        pytest.exit("the kernel tests make network namespaces: run them as root", 1)


@pytest.fixture(params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def lab(backend: str) -> Iterator[Lab]:
    """Two nodes whose iptables command is the backend's."""
    with Lab(backend) as lab:
        yield lab


@pytest.fixture
def nft_lab() -> Iterator[Lab]:
    with Lab("nft") as lab:
        yield lab


@pytest.fixture
def host() -> Iterator[Namespace]:
    """One lonely host."""
    host = Namespace()
    yield host
    host.close()


def _tables_of_the_machine() -> tuple[str, ...]:
    command = ["nft", "list", "ruleset"]
    rules = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [Path(f"/proc/net/{name}_tables_names").read_text() for name in ("ip", "ip6")]
    return (rules, *names)


@pytest.fixture(autouse=True, scope="session")
def _the_machines_own_tables_stay_as_they_are(_root: None) -> Iterator[None]:
    before = _tables_of_the_machine()
    yield
    assert _tables_of_the_machine() == before
