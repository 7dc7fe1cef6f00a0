"""What the checks of `snatd doctor` ask: this node, each part read when it is asked for, and once.

Finds nothing; the checks do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from snatd.config import Config
from snatd.core import programs, way
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.finding import Finding
from snatd.core.model import Address, Family, Hold, Network, NodeState
from snatd.core.networks import contains, subtract
from snatd.core.packet import Hook, Ranges, address_types
from snatd.core.passage import Leg
from snatd.core.programs import Process
from snatd.core.proof import Route, unused_address
from snatd.core.surroundings import UNICAST, Device, Hop, Surroundings, into
from snatd.core.word import Word
from snatd.host import processes
from snatd.host.docker import NAMES
from snatd.host.status import StatusFile
from snatd.kernel.hooks import Hooks, Kind, read_hooks
from snatd.kernel.sysctls import read_sysctl
from snatd.kernel.tools import Tools
from snatd.reconcile import View

# What a check makes of it.
Found = Iterator[Finding]

# Where these run, CNI gives containers their addresses, and Docker does something else.
_WITH_CNI = ("kubelet", *programs.K3S)
_PROGRAMS = (*NAMES, *_WITH_CNI, programs.FLANNELD, programs.KUBE_PROXY, "snatd")
# Of each reading of rules, which takes some milliseconds.
_RULES_S = 5.0


@dataclass(frozen=True)
class Reached:
    """One family with a bridge. `spare`: an address of the subnet that no container has. `there`:
    the routes into the networks; `legs`: what is behind them. `tells`: whether the kernel says
    where it would forward to, and nothing is known to be wrong with the bridge."""

    leased: Desired
    bridge: str
    spare: Address
    around: Surroundings
    there: tuple[Hop, ...]
    legs: tuple[Leg, ...]
    tells: bool

    @property
    def coming_in(self) -> tuple[str, ...]:
        """The devices by which the containers' packets come in, from here and from there."""
        return tuple(dict.fromkeys((self.bridge, *(leg.device for leg in self.legs))))


@dataclass(frozen=True)
class Examined:
    """What every check may ask: the configuration, the last look, and what is leased in it. What
    several ask for is read once. `complaints`: why the configuration is not the file's."""

    settings: Config
    tools: Tools
    view: View
    complaints: tuple[str, ...] = ()
    rules_read: dict[tuple[Family, str, str], Hooks] = field(default_factory=dict)

    @property
    def leased(self) -> tuple[Desired, ...]:
        return self.view.leased

    @property
    def node(self) -> NodeState | None:
        """None where it could not be read; the view says why."""
        return self.view.node

    @property
    def deadline(self) -> Deadline:
        """For one call of a tool or a few."""
        return Deadline(time.monotonic() + _RULES_S)

    def hooks(self, family: Family, *kinds: Kind) -> tuple[Hook, ...]:
        """The base chains of some kinds; what of them cannot be read is told at the end. Raises
        BackendError."""
        for one in kinds:
            if (where := (family, one.type, one.hook)) not in self.rules_read:
                self.rules_read[where] = read_hooks(family, self.tools, self.deadline, one)
        read = [self.rules_read[family, one.type, one.hook] for one in kinds]
        return tuple(hook for one in read for hook in one.hooks)

    def types(self, family: Family) -> tuple[tuple[str, Ranges], ...]:
        """The node's own addresses by their types. Raises BackendError."""
        from snatd.kernel.links import read_sources

        _, local, broadcast = read_sources(family)
        return address_types(family, local, broadcast)

    @cached_property
    def programs(self) -> tuple[Process, ...]:
        """Those that have to do with containers."""
        return processes.find(_PROGRAMS)

    @property
    def by_cni(self) -> bool:
        """Whether CNI gives containers their addresses, and not Docker."""
        return any(one.name in _WITH_CNI for one in self.programs)

    @cached_property
    def word(self) -> Word:
        """The daemon's."""
        return StatusFile(self.settings.runtime_dir).word()

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """Raises BackendError."""
        from snatd.kernel.links import read_devices

        return read_devices()

    @cached_property
    def reached(self) -> tuple[Reached, ...]:
        """What is around each family that has a bridge. Raises BackendError."""
        from snatd.kernel.links import read_surroundings

        if self.node is None:  # and so nothing is leased
            return ()
        return tuple(
            _reached(one, one.bridge, self.node, read_surroundings(one.family, self.devices))
            for one in self.leased
            if isinstance(one.bridge, str)
        )


def _reached(leased: Desired, bridge: str, node: NodeState, around: Surroundings) -> Reached:
    own = {address.ip for link in node.links for address in link.addresses}
    used = own | {one.address for one in around.neighbours}
    known = [Route(one.destination, "") for one in around.routes]
    last = leased.subnet[-2 if leased.subnet.num_addresses > 2 else 0]
    spare = unused_address(leased.subnet, used, known) or last
    there = into(around.routes, leased.networks, leased.subnet)
    legs = _legs(leased, there) or _by_default(leased)
    device, lease = around.device(bridge), node.lease
    of_family = None if isinstance(lease, Hold) else lease.of(leased.family)
    carriers = [link for link in node.links if of_family and of_family.gateway in link.addresses]
    forwards = read_sysctl(way.FORWARDING[leased.family].all) != "0"
    tells = forwards and len(carriers) == 1 and device is not None and device.up
    return Reached(leased, bridge, spare, around, there, legs, tells)


def _legs(leased: Desired, there: tuple[Hop, ...]) -> tuple[Leg, ...]:
    behind: dict[str, list[Network]] = {}
    for one in there:
        if one.kind == UNICAST and one.device not in ("", leased.bridge):
            inside = any(contains(some, one.destination) for some in leased.networks)
            wide = [some for some in leased.networks if contains(one.destination, some)]
            parts = subtract([one.destination] if inside else wide, leased.subnet)
            if parts:
                behind.setdefault(one.device, []).extend(parts)
    return tuple(Leg(device, tuple(dict.fromkeys(parts))) for device, parts in behind.items())


def _by_default(leased: Desired) -> tuple[Leg, ...]:
    """Where no route tells: what the kernel would do with the first of each network."""
    from snatd.kernel.links import find_route

    for network in leased.networks:
        for part in subtract((network,), leased.subnet)[:1]:
            found = find_route(first_container(part))
            if found is not None and not found.local:
                return (Leg(found.device, (part,)),)
    return ()


def first_container(network: Network) -> Address:
    """What a container may have there."""
    return network.network_address + min(2, network.num_addresses - 1)
