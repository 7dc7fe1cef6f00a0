"""What a node's packets meet outside the rules: devices, routes, neighbours. Values, no judgement.

Each prints as `ip` prints it, since that is the evidence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from snatd.core.model import Address, Family, Network
from snatd.core.networks import contains, network

UNICAST = "unicast"


@dataclass(frozen=True)
class Vxlan:
    """What a tunnel's device was made with. `lower`: the device beneath it. `asks`: whether the
    kernel asks a program for each unknown neighbour, as flannel wanted it before 0.9."""

    port: int
    local: Address | None = None
    lower: str = ""
    asks: bool = False

    @property
    def overhead_bytes(self) -> int:
        """Outer IP, UDP, VXLAN and the inner Ethernet header."""
        return 70 if self.local is not None and self.local.version == 6 else 50


@dataclass(frozen=True)
class Device:
    """`inner_mtu`: of a veth's other end, in whatever namespace; None where that is not known.
    `calls_iptables`: the families whose rules a bridge asks because of an option of its own."""

    name: str
    kind: str = ""
    mtu: int = 1500
    up: bool = True
    master: str = ""
    inner_mtu: int | None = None
    vxlan: Vxlan | None = None
    calls_iptables: frozenset[Family] = frozenset()


@dataclass(frozen=True)
class Hop:
    """A route of the main table, one for each of its hops. `flags`: as `ip route` prints them."""

    destination: Network
    kind: str = UNICAST
    device: str = ""
    gateway: Address | None = None
    metric: int = 0
    flags: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Behind `ip route add` or `del`."""
        words = [] if self.kind == UNICAST else [self.kind]
        words.append(str(self.destination) if self.destination.prefixlen else "default")
        words += ["via", str(self.gateway)] if self.gateway else []
        words += ["dev", self.device] if self.device else []
        words += ["metric", str(self.metric)] if self.metric else []
        return tuple(words)

    def __str__(self) -> str:
        return " ".join((*self.words, *self.flags))


@dataclass(frozen=True)
class Neighbour:
    """An entry of the ARP or neighbour discovery table. `age_s`: since its state changed."""

    address: Address
    device: str
    state: str
    link_address: str = ""
    age_s: float = 0.0

    @property
    def answers(self) -> bool:
        """Whether somebody is there, as far as the kernel knows."""
        return self.state not in ("INCOMPLETE", "FAILED", "NONE")

    def __str__(self) -> str:
        known = f" lladdr {self.link_address}" if self.link_address else ""
        return f"{self.address} dev {self.device}{known} {self.state}"


@dataclass(frozen=True)
class TunnelEnd:
    """An entry of a vxlan device's forwarding table: behind which node a link address is."""

    device: str
    link_address: str
    node: Address

    def __str__(self) -> str:
        return f"{self.link_address} dev {self.device} dst {self.node}"


@dataclass(frozen=True)
class Surroundings:
    """All of it, of one family. `rules`: the policy rules that are not the kernel's own three."""

    devices: tuple[Device, ...] = ()
    routes: tuple[Hop, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    tunnel_ends: tuple[TunnelEnd, ...] = ()
    rules: tuple[str, ...] = ()

    def device(self, name: str) -> Device | None:
        return next((one for one in self.devices if one.name == name), None)

    @cached_property
    def _by_length(self) -> dict[int, dict[Network, Hop]]:
        """Of each prefix the route of the least metric, the longest prefixes first."""
        found: dict[int, dict[Network, Hop]] = {}
        for one in sorted(self.routes, key=lambda one: (-one.destination.prefixlen, -one.metric)):
            found.setdefault(one.destination.prefixlen, {})[one.destination] = one
        return found

    def route(self, address: Address) -> Hop | None:
        """What the main table says: the longest prefix, of these the least metric."""
        for length, routes in self._by_length.items():
            prefix = network(f"{address}/{min(length, address.max_prefixlen)}", strict=False)
            if found := routes.get(prefix):
                return found
        return None


def into(routes: Iterable[Hop], networks: Iterable[Network], subnet: Network) -> tuple[Hop, ...]:
    """The routes that lead into some networks and not into the subnet: those to a part of them,
    and those that cover one whole without being the default."""
    found = []
    for one in routes:
        inside = any(contains(some, one.destination) for some in networks)
        wider = one.destination.prefixlen > 0 and any(
            contains(one.destination, some) for some in networks
        )
        if (inside or wider) and not contains(subnet, one.destination):
            found.append(one)
    return tuple(found)
