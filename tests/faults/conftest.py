"""The faults' tests run real iptables, nft and netlink, and the real daemon, in namespaces.

What a machine cannot make is not passed over in silence: the run's last lines name it, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.kernel.conftest import (  # noqa: F401  fixtures are found by their names here
    _root,
    _the_machines_own_tables_stay_as_they_are,
    backend,
    host,
    lab,
    nft_lab,
)
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

Measured = Callable[[str], None]


class Start(Protocol):
    """Starts a daemon on a node and waits for READY=1."""

    def __call__(self, node: Node, environment: dict[str, str] = ..., **settings: Any) -> Snatd: ...


@pytest.fixture
def node(nft_lab: Lab) -> Node:  # noqa: F811
    """A node with a lease, whose iptables command is nft's."""
    nft_lab.nodes[0].write_lease()
    return nft_lab.nodes[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    running: list[Snatd] = []

    def begin(node: Node, environment: dict[str, str] | None = None, **settings: Any) -> Snatd:
        snatd = Snatd(node.host, tmp_path / f"snatd-{len(running)}", **settings)
        running.append(snatd)
        return snatd.start(**(environment or {}))

    yield begin
    for snatd in running:
        snatd.close()
        log = snatd.log_path.read_text()
        assert not crashed(log), log


def crashed(log: str) -> bool:
    """Whether a traceback is in a log. What a library's destructors complain of is no crash."""
    before = ""
    for line in log.splitlines():
        if line.startswith("Traceback") and not before.startswith("Exception ignored in"):
            return True
        before = line
    return False


_not_made: list[str] = []
_measured: list[str] = []


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Tells a figure of a test in the run's last lines; the matrix has such figures."""
    return lambda figure: _measured.append(f"{request.node.name}: {figure}")


def not_here(row: int, why: str) -> None:
    """Ends a test whose fault this machine cannot make."""
    _not_made.append(f"row {row}: {why}")
    pytest.skip(why)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _measured:
        terminalreporter.write_line(f"measured: {line}")
    for line in _not_made:
        terminalreporter.write_line(f"fault that cannot be made on this machine: {line}")
