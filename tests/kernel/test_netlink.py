"""An answer that there is no memory for is an error, and nobody waits for it."""

from __future__ import annotations

import faulthandler
import gc
import ipaddress
import os
import socket
from asyncio import selector_events
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest

from snatd.core.errors import BackendBusy
from snatd.core.flows import FlowKey
from snatd.core.model import Family
from snatd.kernel.conntrack import Entries
from snatd.kernel.links import read_paths, read_sources
from tests.lab.netns import Namespace

# Before 0.9 pyroute2 reads without asyncio, and what fails is raised where it is called.
_BY_ASYNCIO = tuple(map(int, version("pyroute2").split(".")[:2])) >= (0, 9)
_KEY = FlowKey(
    socket.IPPROTO_UDP, ipaddress.ip_address("192.0.2.1"), ipaddress.ip_address("192.0.2.2"), 1, 2
)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For what asyncio reads. A call that hangs ends the tests with its traceback."""

    class Short:
        def __init__(self, whole: Any) -> None:
            self._whole = whole

        def __getattr__(self, name: str) -> Any:
            return getattr(self._whole, name)

        def recvfrom(self, _: int) -> None:
            raise MemoryError

    transport = selector_events._SelectorDatagramTransport  # type: ignore[attr-defined]
    ready = transport._read_ready

    def read_ready(self: Any) -> None:
        self._sock = Short(self._sock)
        ready(self)

    monkeypatch.setattr(transport, "_read_ready", read_ready)
    faulthandler.dump_traceback_later(30, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def _entry() -> None:
    with Entries(Family.V4) as entries:
        entries.seen_as(_KEY)


@pytest.mark.parametrize(
    "ask", [lambda: read_sources(Family.V4), lambda: read_paths(Family.V4), _entry]
)
@pytest.mark.usefixtures("no_memory")
def test_it_ends(host: Namespace, ask: Callable[[], object]) -> None:
    with host.entered():
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            if _BY_ASYNCIO:
                with pytest.raises(BackendBusy, match="Cannot allocate memory"):
                    ask()
            else:
                ask()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before


def test_otherwise_there_is_an_answer(host: Namespace) -> None:
    with host.entered():
        assert read_sources(Family.V4)
        _entry()
