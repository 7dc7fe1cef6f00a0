"""Two nodes with Docker, and a host outside that knows no way back to a container.

                 10.4.7.0/24
   ┌──────────────────┬──────────────────┐
.21│               .22│              .100│
 node 1             node 2            outside (203.0.113.9)
 caller             web
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.docker.dockerd import Docker, callers
from tests.lab.netns import Namespace, until
from tests.lab.network import OUTSIDE, make_lan, plug
from tests.lab.outside import bare_packets, count_bare
from tests.lab.process import Snatd
from tests.lab.who import WhoServer

# A connection that left a container as itself; a late FIN of a forgotten one is none.
_BEGINS = "tcp flags & (syn | ack) == syn"
# Three rounds of the caller.
ENOUGH = 30


@dataclass(frozen=True)
class Step:
    """What was seen from the begin of an event until enough calls after its end."""

    called_by: dict[str, int]
    outside: dict[str, int]
    bare: int
    rules: list[str]
    said: list[tuple[str, str]]
    more: dict[str, Any]


class World:
    """A context manager; everything is gone at its end."""

    def __init__(self, tree: Path, folder: Path, backend: str, *, with_snatd: bool) -> None:
        self.steps: dict[str, Step] = {}
        self.lan = Namespace()
        make_lan(self.lan)
        self.outside = Namespace()
        plug(self.lan, self.outside, 100)
        self.outside.shell(f"ip addr add {OUTSIDE}/32 dev lo")
        count_bare(self.outside, "172.0.0.0/8", _BEGINS)
        self._server = WhoServer(self.outside, OUTSIDE)
        self.nodes = [
            Docker(self.lan, number, tree, folder / str(number), backend) for number in (21, 22)
        ]
        self.node, self.neighbour = self.nodes
        self.snatds = [node.snatd() for node in self.nodes] if with_snatd else []
        for node in self.nodes:
            node.lease()
        self.route(self.node, self.neighbour)
        self.route(self.neighbour, self.node)

    @property
    def snatd(self) -> Snatd | None:
        return self.snatds[0] if self.snatds else None

    def route(self, at: Docker, to: Docker) -> None:
        """As flanneld adds it with host-gw."""
        at.host.run("ip", "route", "replace", f"172.7.{to.subnet}.0/24", "via", to.address)

    def start_neighbour(self, *flags: str, options: tuple[str, ...] = ()) -> None:
        """Its Docker, and the web server there that is called."""
        self.neighbour.start(*flags)
        if not (self.neighbour.folder / "image").exists():
            self.neighbour.make_image()
        self.calls = self.neighbour.serve("web", *options)
        self.web = self.neighbour.address_of("web")

    def start_caller(self) -> None:
        """It comes back with each restart of Docker, and calls at once."""
        self.node.make_image()
        self.node.run("caller", "--restart=always", command=("/call", self.web, OUTSIDE))

    def seen(self) -> tuple[int, int, int]:
        return self.calls.stat().st_size, len(self._server.log), bare_packets(self.outside)

    def since(self, begin: tuple[int, int, int]) -> tuple[Counter[str], Counter[str], int]:
        """Who called the web server and the host outside, and how many left bare."""
        size, length, bare = begin
        text = self.calls.read_bytes()[size:].decode(errors="replace")
        return callers(text), Counter(self._server.log[length:]), bare_packets(self.outside) - bare

    def more_calls(self, number: int = ENOUGH) -> None:
        """Waits until so many more calls arrived at both."""
        begin = self.seen()

        def there() -> bool:
            web, outside, bare = self.since(begin)
            return web.total() >= number and outside.total() + bare >= number

        until(there, f"{number} calls", 30)

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Something happens to Docker on node 1, while its container calls."""
        begin, log = self.seen(), self.node.log.stat().st_size
        more: dict[str, Any] = {}
        yield more
        self.more_calls()
        self._settled()
        web, outside, bare = self.since(begin)
        said = sorted(self.node.said(log))
        self.steps[name] = Step(dict(web), dict(outside), bare, self.node.rules(), said, more)

    def _settled(self) -> None:
        """Until snatd, once it runs, has repaired what there was to repair."""
        if self.snatd is not None and self.snatd.notifications:
            until(self.node.narrowed, "the repair", 15)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for snatd in self.snatds:
            snatd.close()
        for node in self.nodes:
            node.close()
        self._server.close()
        self.outside.close()
        self.lan.close()
