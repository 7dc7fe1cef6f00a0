"""From the node's state and the operator's policy to what the rulesets should do.

Decides the networks, never the rules: how a wish becomes rules is `plan`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from snatd.core.model import (
    EgressPolicy,
    Family,
    FamilyLease,
    Hold,
    Interface,
    Link,
    Network,
    NodeState,
    Policy,
    join,
)
from snatd.core.networks import collapse, contains, overlaps, subtract
from snatd.core.rules import names_one_device

# kube-proxy in IPVS mode puts every service address on this device. They are translated before
# POSTROUTING, and cutting out thousands of them would only make the chain long.
_SERVICE_ADDRESS_DEVICE = "kube-ipvs0"


@dataclass(frozen=True)
class CutOut:
    """A part of the networks that stays masqueraded, and what makes it so."""

    network: Network
    why: str


@dataclass(frozen=True)
class Desired:
    """What holds for one family: traffic from `subnet` into `networks` keeps its source.

    `networks` is `cluster` (flannel's networks and the operator's) without the cut-outs.
    """

    family: Family
    subnet: Network
    networks: tuple[Network, ...]
    cluster: tuple[Network, ...]
    flannel_networks: tuple[Network, ...]
    cut_outs: tuple[CutOut, ...]
    bridge: str | Hold
    add_egress: bool
    flannel_egress_counts: bool

    @property
    def inside(self) -> str:
        """The networks as a person would say it."""
        cut_outs = [cut_out.network for cut_out in self.cut_outs]
        return join(self.cluster) + (f" except {join(cut_outs)}" if cut_outs else "")


@dataclass(frozen=True)
class Absent:
    """The lease has nothing in this family: what is ours there is stale, if that is `certain`."""

    family: Family
    certain: bool = True


def desired(family: Family, node: NodeState, policy: Policy) -> Desired | Absent | Hold:
    """What one family should be, or why that cannot be told."""
    if isinstance(node.lease, Hold):
        return node.lease
    lease = node.lease.of(family)
    if lease is None or not node.has(family):
        return Absent(family, certain=node.lease.whole)
    configured = _same_family(policy.networks, family)
    networks = collapse((*lease.networks, *configured))
    if not any(contains(network, lease.subnet) for network in networks):
        return Hold(
            f"no network contains this node's subnet {lease.subnet} (known: {join(networks)}): "
            "subnet.env has no network for it, so add it to `networks` in snatd.toml"
        )
    bridge = find_bridge(lease, node.links)
    cut_outs = tuple(_cut_outs(family, lease, networks, bridge, node, policy))
    kept = networks
    for cut_out in cut_outs:
        kept = subtract(kept, cut_out.network)
    if not kept:
        return Hold(f"`exclude` in snatd.toml leaves nothing of {join(networks)}: nothing to keep")
    auto = policy.egress is EgressPolicy.AUTO
    return Desired(
        family=family,
        subnet=lease.subnet,
        networks=kept,
        cluster=networks,
        flannel_networks=lease.networks,
        cut_outs=cut_outs,
        bridge=bridge,
        add_egress=policy.egress is EgressPolicy.ENSURE or (auto and needs_nat(lease.subnet)),
        flannel_egress_counts=auto and node.lease.ipmasq,
    )


def needs_nat(subnet: Network) -> bool:
    """Whether hosts outside cannot answer this subnet: all of IPv4, and IPv6's ULA (RFC 4193)."""
    return subnet.version == 4 or contains(ipaddress.ip_network("fc00::/7"), subnet)


def find_bridge(lease: FamilyLease, links: Iterable[Link]) -> str | Hold:
    """The device that carries exactly FLANNEL_SUBNET's address, whatever its name.

    flannel.1 carries another address of the subnet (its first, /32), and so is not it.
    """
    near: list[str] = []
    for link in sorted(links, key=lambda link: link.index):
        for address in link.addresses:
            if address == lease.gateway:
                if names_one_device(link.name):
                    return link.name
                return Hold(
                    f"the device that carries {address} is called {link.name!r}, and no rule of "
                    "iptables can name it: give it another name"
                )
            if address.ip == lease.gateway.ip:
                near.append(f"{link.name} carries {address}")
    but = f" ({join(near)})" if near else ""
    return Hold(f"no device carries {lease.gateway} yet{but}: waiting for the container bridge")


def _cut_outs(
    family: Family,
    lease: FamilyLease,
    networks: tuple[Network, ...],
    bridge: str | Hold,
    node: NodeState,
    policy: Policy,
) -> Iterable[CutOut]:
    """The parts of the networks that are not containers', widest first, none inside another."""
    ours = {bridge if isinstance(bridge, str) else None, *_overlay_devices(lease, node.links)}
    found = [CutOut(network, "exclude") for network in _same_family(policy.exclude, family)]
    found += [
        CutOut(route.destination, f"directly connected on {route.device}")
        for route in node.direct_routes
        if route.device not in ours and route.destination.version == family.version
    ]
    found += [
        CutOut(_host(address), f"this node's own address on {link.name}")
        for link in node.links
        if link.name not in ours and link.name != _SERVICE_ADDRESS_DEVICE
        for address in link.addresses
        if address.version == family.version
    ]
    taken: list[Network] = []
    for cut_out in sorted(found, key=lambda cut: (cut.network.prefixlen, cut.network)):
        inside = any(
            contains(network, cut_out.network) and network != cut_out.network
            for network in networks
        )
        # A prefix that covers a whole network says nothing about it: flannel's routes are longer
        # and win. Only `exclude`, an explicit wish, may take away a network whole.
        wished = cut_out.why == "exclude" and any(
            overlaps(network, cut_out.network) for network in networks
        )
        if not (inside or wished) or contains(lease.subnet, cut_out.network):
            continue
        if any(contains(earlier, cut_out.network) for earlier in taken):
            continue
        taken.append(cut_out.network)
        yield cut_out


def _overlay_devices(lease: FamilyLease, links: Iterable[Link]) -> set[str]:
    """flannel's devices: by name (flannel.1, flannel-wg, flannel0, ...) or by an address of P."""
    return {
        link.name
        for link in links
        if link.name.startswith("flannel")
        or any(
            address.version == lease.subnet.version and address.ip in lease.subnet
            for address in link.addresses
        )
    }


def _host(address: Interface) -> Network:
    return ipaddress.ip_network(address.ip)


def _same_family(networks: Iterable[Network], family: Family) -> tuple[Network, ...]:
    return tuple(network for network in networks if network.version == family.version)
