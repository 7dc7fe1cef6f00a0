"""Proof by packet: whom to send a datagram, from which address, and what the answers prove."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from snatd.core.desired import Desired
from snatd.core.flows import concerns
from snatd.core.model import Address, Network, join
from snatd.core.networks import contains

NEIGHBOURS = 16
# Sent to the discard port (RFC 863), which nobody minds.
UDP, DISCARD = 17, 9
INTERVAL_S = 60.0
_TRIED = 256


@dataclass(frozen=True)
class Route:
    """A unicast route of the main table; `hop` is its gateway, or its device where it has none."""

    destination: Network
    hop: str


@dataclass(frozen=True)
class Probe:
    """A datagram and what became of it. `seen_as` is None where that is not known, and why.

    `inside`: the destination is one where a container is to keep its address.
    """

    destination: Address
    inside: bool = True
    sent_from: Address | None = None
    seen_as: Address | None = None
    why: str = ""

    @property
    def kept(self) -> bool | None:
        return None if self.seen_as is None else self.seen_as == self.sent_from


@dataclass(frozen=True)
class Limiter:
    """Who was sent a datagram, and when: nobody gets two a minute, nor more than 16 get one."""

    sent: tuple[tuple[Address, float], ...] = ()

    def allow(
        self, neighbours: Iterable[Address], now_s: float
    ) -> tuple[Limiter, tuple[Address, ...]]:
        """Those of the neighbours who may be sent one now, and the limiter after that."""
        recent = tuple(one for one in self.sent if now_s - one[1] < INTERVAL_S)
        known = {address for address, _ in recent}
        due = [one for one in dict.fromkeys(neighbours) if one not in known]
        due = due[: max(0, NEIGHBOURS - len(recent))]
        return Limiter((*recent, *((one, now_s) for one in due))), tuple(due)


def neighbours(routes: Iterable[Route], desired: Desired) -> tuple[Address, ...]:
    """The first address of another node's subnet, one for each next hop into the networks.

    A route as wide as the network itself (WireGuard's) tells no subnet: then that of a node which
    may not exist. The datagram passes this node all the same, and that is what is asked.
    """
    found: dict[str, Address] = {}
    for route in routes:
        if any(contains(network, route.destination) for network in desired.networks):
            address = _first_address(route.destination, desired.subnet)
            if address is not None and concerns(address, desired):
                found.setdefault(route.hop, address)
    return tuple(found.values())[:NEIGHBOURS]


def _first_address(network: Network, subnet: Network) -> Address | None:
    if network.prefixlen < subnet.prefixlen:
        parts = cast(Iterable[Network], network.subnets(new_prefix=subnet.prefixlen))
        network = next(part for part in parts if part != subnet)
    return network.network_address + (1 if network.num_addresses > 1 else 0)


def unused_address(
    subnet: Network, used: Collection[Address], routes: Iterable[Route]
) -> Address | None:
    """An address of the subnet that no container has, as far as the node knows, from the far end.

    Docker and CNI give addresses from the near end. Used is what a device carries, what stands in
    the neighbour table, and what a route of its own leads to (CNI's ptp). None where all of the
    last 256 are.
    """
    own = [one.destination for one in routes if one.destination != subnet]
    own = [one for one in own if contains(subnet, one)]
    for offset in range(1, min(_TRIED, subnet.num_addresses - 2)):
        address = subnet.broadcast_address - offset
        if address not in used and not any(address in network for network in own):
            return address
    return None


def exit_code(probes: Sequence[Probe]) -> int:
    """0: every one into the networks kept its source; 1: one was SNATed; 3: not all are known."""
    kept = [probe.kept for probe in probes if probe.inside]
    if False in kept:
        return 1
    return 0 if kept and None not in kept else 3


def conclusion(probes: Sequence[Probe]) -> tuple[str, ...]:
    """What the answers prove, and what they do not."""
    inside = [probe for probe in probes if probe.inside and probe.kept is not None]
    if not inside:
        return ("nothing is proved",)
    wrong = [str(probe.destination) for probe in inside if not probe.kept]
    kept = [str(probe.destination) for probe in inside if probe.kept]
    what = "a UDP datagram of this node with an address of the container subnet as its source"
    found = [f"is SNATed on its way to {join(wrong)}"] if wrong else []
    found += [f"keeps it on its way to {join(kept)}"] if kept else []
    return (
        f"proved: {what} {' and '.join(found)}",
        "not proved: the same of a container's own packets, which also pass PREROUTING and FORWARD "
        "and come in by the bridge, of other protocols, marks and addresses; and that somebody is "
        "there who got it",
    )
