"""Whether the routes into the cluster network lead anywhere. Pure.

A part of it without a route of its own is no fault by itself: no node may have it. It is one where
something was sent there, or where flannel prepared everything but the route.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from snatd.core.desired import Desired
from snatd.core.finding import Finding, Severity
from snatd.core.model import Address, Link, Network, join
from snatd.core.networks import contains, network, overlaps
from snatd.core.surroundings import UNICAST, Device, Hop, Neighbour, Surroundings, into
from snatd.core.way import ip

_MOST = 4
# An entry that failed stays until its place is needed. While packets wait for an answer it is
# renewed every few seconds.
_LATELY_S = 60.0


def routes(leased: Desired, around: Surroundings, links: Sequence[Link]) -> Iterator[Finding]:
    there = into(around.routes, leased.networks, leased.subnet)
    yield from _refusing(leased, there)
    alive = [one for one in there if one.kind == UNICAST]
    dead = [one for one in alive if {"dead", "linkdown"} & {*one.flags}]
    usable = [one for one in alive if one not in dead]
    yield from _dead(dead)
    used = {one.device for one in usable}
    tunnels = {
        one.name: one
        for one in around.devices
        if one.vxlan is not None and (one.name in used or one.name.startswith("flannel"))
    }
    yield from _overlay_down(leased, around)
    yield from _silent([one for one in usable if one.device not in tunnels], around)
    yield from _off_link([one for one in usable if one.device not in tunnels], around, links)
    yield from _tunnel(leased, usable, around, tunnels)
    yield from _none(leased, there)


def _refusing(leased: Desired, there: Sequence[Hop]) -> Iterator[Finding]:
    """A summary that catches what nobody has is good practice; a node's subnet is another thing."""
    for one in there:
        if one.kind == UNICAST or one.destination in leased.cluster:
            continue
        of_a_node = one.destination.prefixlen >= leased.subnet.prefixlen
        covers = any(
            contains(one.destination, other.destination) for other in there if other is not one
        )
        if covers or not any(contains(some, one.destination) for some in leased.networks):
            continue
        yield Finding(
            "route_refuses",
            Severity.ERROR if of_a_node else Severity.INFO,
            f"this node sends nothing to {one.destination}",
            (str(one),),
            f"it lies in {leased.inside}, and no route of its own leads there",
            (f"{ip(leased)} route del {shlex.join(one.words)}",),
        )


def _dead(dead: Sequence[Hop]) -> Iterator[Finding]:
    if dead:
        devices = list(dict.fromkeys(one.device for one in dead))
        yield Finding(
            "route_dead",
            Severity.ERROR,
            f"routes to other nodes lead by {join(devices)}, which has no link",
            tuple(map(str, dead[:_MOST])),
            f"nothing reaches the containers in {join([one.destination for one in dead])}",
            (
                *(f"ip link set {shlex.quote(one)} up" for one in devices),
                "# and look for the cable, or the device beneath it",
            ),
        )


def _overlay_down(leased: Desired, around: Surroundings) -> Iterator[Finding]:
    down = [one.name for one in around.devices if one.name.startswith("flannel") and not one.up]
    if down:
        yield Finding(
            "overlay_down",
            Severity.ERROR,
            f"{join(down)} is switched off",
            tuple(f"{one} is not up" for one in down),
            f"with it all routes went, and nothing gets from {leased.subnet} to other nodes",
            (
                *(f"ip link set {shlex.quote(one)} up" for one in down),
                "systemctl restart flanneld",
            ),
        )


def _silent(usable: Sequence[Hop], around: Surroundings) -> Iterator[Finding]:
    found = {(one.device, one.address): one for one in around.neighbours}
    lately: list[tuple[Hop, Neighbour]] = []
    before: list[tuple[Hop, Neighbour]] = []
    for hop in usable:
        one = found.get((hop.device, hop.gateway)) if hop.gateway else None
        if one is not None and one.state in ("FAILED", "INCOMPLETE"):
            (lately if one.age_s <= _LATELY_S else before).append((hop, one))
    for some, severity in ((lately, Severity.ERROR), (before, Severity.INFO)):
        if some:
            nodes = list(dict.fromkeys(one.address for _, one in some))
            age = "" if severity is Severity.ERROR else ", and nobody has asked since"
            yield Finding(
                "gateway_silent",
                severity,
                f"{join(nodes)} did not answer this node{age}",
                tuple(
                    line
                    for hop, one in some[:_MOST]
                    for line in (f"route {hop}", f"neighbour {one}, for {one.age_s:.0f} s")
                ),
                f"nothing reaches the containers in {join([hop.destination for hop, _ in some])}",
                (
                    "# is the node up, and on the same link? If it is gone for good, remove its "
                    "lease from flannel's store",
                    *(
                        f"ip neigh del {one.address} dev {shlex.quote(one.device)}"
                        for _, one in some[:_MOST]
                        if severity is Severity.INFO
                    ),
                ),
            )


def _off_link(
    usable: Sequence[Hop], around: Surroundings, links: Sequence[Link]
) -> Iterator[Finding]:
    near: dict[str, list[Network]] = {}
    for link in links:
        near[link.name] = [address.network for address in link.addresses]
    for hop in around.routes:
        if hop.gateway is None and hop.kind == UNICAST and hop.destination.prefixlen:
            near.setdefault(hop.device, []).append(hop.destination)
    known = {(one.device, one.address) for one in around.neighbours if one.answers}
    off = [
        one
        for one in usable
        if one.gateway is not None
        and (one.device, one.gateway) not in known
        and not one.device.startswith("flannel")
        and not any(
            one.gateway.version == some.version and one.gateway in some
            for some in near.get(one.device, ())
        )
    ]
    if off:
        yield Finding(
            "gateway_off_link",
            Severity.WARNING,
            f"{join([one.gateway for one in off])} is not on the link that the route says",
            (
                *(f"route {one}" for one in off[:_MOST]),
                *(
                    f"{name} is on {join(list(dict.fromkeys(near.get(name, ()))))}"
                    for name in dict.fromkeys(one.device for one in off)
                ),
            ),
            "the host-gw backend needs all nodes on one link: a router between them does not know "
            "where the containers are",
            ("# flannel's backend vxlan, or this node's address and netmask",),
        )


def _tunnel(
    leased: Desired, usable: Sequence[Hop], around: Surroundings, tunnels: dict[str, Device]
) -> Iterator[Finding]:
    """flannel makes three things for each node: a route, a neighbour and a tunnel end."""
    neighbours = {
        (one.device, one.address): one.link_address for one in around.neighbours if one.answers
    }
    ends = {(one.device, one.link_address) for one in around.tunnel_ends}
    missing: list[str] = []
    lost: list[Network | Address] = []
    for hop in usable:
        device = tunnels.get(hop.device)
        if device is None or device.vxlan is None or device.vxlan.asks or hop.gateway is None:
            continue
        link_address = neighbours.get((hop.device, hop.gateway))
        if link_address is None:
            missing.append(f"route {hop}, but no neighbour {hop.gateway} dev {hop.device}")
        elif (hop.device, link_address) not in ends:
            missing.append(f"route {hop}, but no tunnel end for {link_address} dev {hop.device}")
        else:
            continue
        lost.append(hop.destination)
    known = {*neighbours.values(), _ANYBODY}
    for one in () if missing else around.tunnel_ends:
        vxlan = tunnels[one.device].vxlan if one.device in tunnels else None
        if vxlan is None or vxlan.asks or vxlan.local is None or one.link_address in known:
            continue
        if vxlan.local.version == leased.family.version:
            missing.append(f"tunnel end {one}, but no neighbour has that address")
            lost.append(one.node)
    if missing:
        yield Finding(
            "tunnel_incomplete",
            Severity.ERROR,
            f"the tunnel to {join(lost)} is not complete",
            tuple(missing[:_MOST]),
            "packets for the containers there end in this node",
            ("systemctl restart flanneld",),
        )
    yield from _unrouted(leased, around, tunnels, ends)


_ANYBODY = "00:00:00:00:00:00"


def _unrouted(
    leased: Desired,
    around: Surroundings,
    tunnels: dict[str, Device],
    ends: set[tuple[str, str]],
) -> Iterator[Finding]:
    """Neighbours and tunnel ends of subnets to which no route leads."""
    found: list[tuple[Neighbour, Network]] = []
    for one in around.neighbours:
        if one.device not in tunnels or (one.device, one.link_address) not in ends:
            continue
        subnet = network(f"{one.address}/{leased.subnet.prefixlen}", strict=False)
        led = around.route(one.address)
        if (
            any(contains(some, subnet) for some in leased.networks)
            and subnet != leased.subnet
            and (led is None or not led.destination.prefixlen)
        ):
            found.append((one, subnet))
    if found:
        yield Finding(
            "route_missing",
            Severity.ERROR,
            f"no route leads to {join([subnet for _, subnet in found])}, but a tunnel does",
            tuple(f"neighbour {one}" for one, _ in found[:_MOST]),
            "packets for the containers there follow the default route",
            tuple(
                f"{ip(leased)} route add {subnet} via {one.address} dev "
                f"{shlex.quote(one.device)} onlink"
                for one, subnet in found
            ),
        )


def _none(leased: Desired, there: Sequence[Hop]) -> Iterator[Finding]:
    for some in leased.cluster:
        if some == leased.subnet or any(overlaps(one.destination, some) for one in there):
            continue
        configured = not any(contains(wide, some) for wide in leased.flannel_networks)
        says = "is one of `networks` in snatd.toml" if configured else "is FLANNEL_NETWORK"
        yield Finding(
            "no_routes",
            Severity.INFO,
            f"no route but the default one leads into {some}",
            (f"{some} {says}",),
            f"packets from {leased.subnet} go there under their own address, and who answers must "
            "know the way back to this node"
            if configured
            else "so it is on the only node, or on one whose routes are kept outside (by a cloud's "
            "router); else flanneld made none",
            (
                f"# on the router there: {_way_back(leased)}"
                if configured
                else "# if there are other nodes: systemctl status flanneld",
            ),
        )


@dataclass(frozen=True)
class Peer:
    """Somebody in the networks with connections from or to containers of ours. `answers`: whether
    any of them got an answer, None where none may be wanted (UDP); `line`: one of them as
    `conntrack -L` prints it."""

    address: Address
    answers: bool | None
    line: str


_ENDS = re.compile(r"\bsrc=(\S+) dst=(\S+) ")


def peer(line: str, *, outbound: bool) -> Peer | None:
    """Of one line of `conntrack -L`, of a connection from the subnet (`outbound`) or to it; None
    where it says nothing. Raises ValueError where it cannot be read."""
    ends = _ENDS.search(line)
    if ends is None:
        raise ValueError(f"no connection: {line[:120]!r}")
    if outbound:
        asks = None if line.startswith("udp") else False
        answers = asks if "[UNREPLIED]" in line else True
    elif "[ASSURED]" in line:
        answers = True
    elif " SYN_RECV " in line:
        answers = False  # answered by our container, and he did not hear it
    else:
        return None
    return Peer(ip_address(ends[2 if outbound else 1]), answers, " ".join(line.split()))


def best(one: Peer | None, other: Peer) -> Peer:
    """Of two connections with the same peer the one that tells more."""
    order = (None, False, True)
    return max((one or other, other), key=lambda some: order.index(some.answers))


def strays(leased: Desired, peers: Iterable[Peer], around: Surroundings) -> Iterator[Finding]:
    """Who is talked to in vain, by the default route or another one that is wider than N."""
    # Where no route at all leads to other nodes, a router outside may know the way.
    routed = any(one.kind == UNICAST for one in into(around.routes, leased.networks, leased.subnet))
    lost: list[tuple[Peer, Hop]] = []
    exempted: dict[Network, list[Peer]] = {}
    behind: dict[tuple[Network, Hop], list[Peer]] = {}
    for one in peers:
        if not any(one.address in some for some in leased.networks):
            continue
        if not any(one.address in some for some in leased.flannel_networks):
            there = next(some for some in leased.cluster if one.address in some)
            exempted.setdefault(there, []).append(one)
            continue
        led = around.route(one.address)
        if led is None or led.kind != UNICAST:
            continue
        if any(contains(some, led.destination) for some in leased.cluster):
            behind.setdefault((_subnet_of(one, leased), led), []).append(one)
        elif not one.answers and (one.answers is False or routed):
            lost.append((one, led))
    for some, known in exempted.items():
        if silent := _silent_peers(known):
            yield _no_way_back(leased, some, silent)
    for (subnet, led), known in behind.items():
        if silent := _silent_peers(known):
            yield _subnet_silent(leased, subnet, led, silent)
    if not lost:
        return
    parts = dict.fromkeys(_subnet_of(one, leased) for one, _ in lost)
    yield Finding(
        "default_route_taken",
        Severity.ERROR if routed else Severity.WARNING,
        f"what {leased.subnet} and {join(list(parts))} send each other follows the default route, "
        "and gets no answer",
        (
            *(f"route {led}" for led in dict.fromkeys(led for _, led in lost)),
            *(f"connection {one.line}" for one, _ in lost[:_MOST]),
        ),
        "the route that flanneld makes for each node is missing, or there is no such node",
        (
            "systemctl restart flanneld",
            *(f"# or: {ip(leased)} route add {part} via NODE" for part in list(parts)[:_MOST]),
        ),
    )


def _subnet_of(one: Peer, leased: Desired) -> Network:
    """The subnet of a node's, as far as all are as large as ours."""
    return network(f"{one.address}/{leased.subnet.prefixlen}", strict=False)


def _silent_peers(known: Sequence[Peer]) -> list[Peer]:
    """Those who do not answer, if nobody does."""
    answers = any(one.answers for one in known)
    return [] if answers else [one for one in known if one.answers is False]


def _no_way_back(leased: Desired, exempted: Network, peers: Sequence[Peer]) -> Finding:
    return Finding(
        "no_way_back",
        Severity.WARNING,
        f"nobody in {exempted} answers containers of {leased.subnet}",
        (
            f"{exempted} is one of `networks` in snatd.toml",
            *(f"connection {one.line}" for one in peers[:_MOST]),
        ),
        "packets go there under the container's own address; who does not know the way back to "
        "this node cannot answer",
        (
            f"# on the router there: {_way_back(leased)}",
            "# or take it out of `networks`, and it is masqueraded again: systemctl reload snatd",
        ),
    )


def _way_back(leased: Desired) -> str:
    return f"{ip(leased)} route add {leased.subnet} via THIS_NODE"


def _subnet_silent(leased: Desired, subnet: Network, led: Hop, peers: Sequence[Peer]) -> Finding:
    """One container that does not answer may be gone; of several that is less likely."""
    return Finding(
        "subnet_silent",
        Severity.WARNING if len(peers) > 1 else Severity.INFO,
        f"nobody in {subnet} answers containers of {leased.subnet}",
        (f"route {led}", *(f"connection {one.line}" for one in peers[:_MOST])),
        "the route may lead to a node that does not have that subnet, or something on the way "
        "drops the packets; or these containers are gone",
        (
            "systemctl restart flanneld",
            f"# it renews the routes; else `snatd doctor` on {led.gateway or 'that node'}",
        ),
    )
