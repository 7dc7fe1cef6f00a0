"""What the node's network looks like beyond what every pass asks (`snapshot`): paths, neighbours,
tunnels, rules, all about devices. By pyroute2, read only.

A socket is opened for each look and closed after it: in pyroute2 0.9 a lasting, subscribed one
raises ENOBUFS for ever after one overflow, so the ears are raw sockets (`events`) and this, the
eyes, is a dump.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from snatd.core.errors import BackendFailed
from snatd.core.masquerade import DeviceAddress
from snatd.core.model import Address, Family, Network
from snatd.core.proof import Route
from snatd.core.surroundings import (
    UNICAST,
    Device,
    Hop,
    Neighbour,
    Surroundings,
    TunnelEnd,
    Vxlan,
)
from snatd.kernel.netlink import IPRoute, NetlinkError, answering, errors

_MAIN_TABLE, _LOCAL_TABLE = 254, 255
_UNICAST, _LOCAL, _BROADCAST = 1, 2, 3
# NUD_INCOMPLETE, NUD_FAILED: somebody was looked for there and did not answer. The answer to an
# earlier probe leaves such an entry for the address that it was sent from.
_NOBODY = (0x01, 0x20)
# linux/if_addr.h. The first is called secondary in IPv4, temporary in IPv6.
_SECONDARY, _OPTIMISTIC, _DAD_FAILED, _DEPRECATED, _TENTATIVE = 0x01, 0x04, 0x08, 0x20, 0x40
_DOMAINS = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}


@contextmanager
def _netlink() -> Iterator[IPRoute]:
    try:
        with errors(), answering(IPRoute()) as netlink:
            yield netlink
    except NetlinkError as error:
        raise BackendFailed(f"netlink refused a dump: {error}") from None


def read_paths(family: Family) -> tuple[tuple[Route, ...], frozenset[Address]]:
    """The unicast routes of a family's main table with a destination, and who was met by its
    neighbour table. Raises BackendBusy where no socket can be had or the
    dump does not come, BackendFailed where the kernel refuses."""
    with _netlink() as netlink:
        names = dict(socket.if_nameindex())
        routes = tuple(_routes(netlink, _DOMAINS[family], names))
        neighbours = frozenset(
            ipaddress.ip_address(address)
            for message in netlink.get_neighbours(family=_DOMAINS[family])
            if message["state"] not in _NOBODY and (address := message.get_attr("NDA_DST"))
        )
    return routes, neighbours


def _routes(netlink: IPRoute, family: int, names: dict[int, str]) -> Iterator[Route]:
    for message in netlink.get_routes(family=family, table=_MAIN_TABLE):
        destination = message.get_attr("RTA_DST")
        if destination is None or message["type"] != _UNICAST:
            continue
        hop = message.get_attr("RTA_GATEWAY") or names.get(message.get_attr("RTA_OIF"))
        # A route over several hops has neither here, and is a hop of its own.
        network = ipaddress.ip_network(f"{destination}/{message['dst_len']}")
        yield Route(network, hop or str(network))


@dataclass(frozen=True)
class Way:
    """Where a packet goes. `next_hop`: the destination itself where there is no gateway of its
    family; `local`: it is this node's own."""

    device: str
    next_hop: Address
    local: bool


def find_route(
    destination: Address,
    source: Address | None = None,
    *,
    out: str = "",
    came_in: str = "",
    mark: int = 0,
) -> Way | None:
    """The kernel's answer to RTM_GETROUTE; None where it has no route. `source` must be the node's
    own, or be given with the device by which it comes in."""
    asked: dict[str, Any] = {"dst": str(destination)}
    try:
        if source is not None:
            asked["src"] = str(source)
        for option, name in (("oif", out), ("iif", came_in)):
            if name:
                asked[option] = socket.if_nametoindex(name)
        if mark:
            asked["mark"] = mark
        with _netlink() as netlink:
            domain = socket.AF_INET if destination.version == 4 else socket.AF_INET6
            try:
                (message, *_) = netlink.route("get", family=domain, **asked)
            except NetlinkError:
                return None
            device = socket.if_indextoname(message.get_attr("RTA_OIF"))
    except OSError:
        return None  # a device that is gone
    if message["type"] not in (_UNICAST, _LOCAL):
        return None
    gateway = message.get_attr("RTA_GATEWAY")
    next_hop = ipaddress.ip_address(gateway) if gateway else destination
    return Way(device, next_hop, message["type"] == _LOCAL)


def read_sources(
    family: Family,
) -> tuple[tuple[DeviceAddress, ...], tuple[Network, ...], tuple[Network, ...]]:
    """What MASQUERADE chooses from, in the kernel's order; and the local table: what is local,
    what is broadcast. Raises as read_paths does."""
    carried: list[DeviceAddress] = []
    types: dict[int, list[Network]] = {_LOCAL: [], _BROADCAST: []}
    with _netlink() as netlink:
        names = dict(socket.if_nameindex())
        for message in netlink.get_addr(family=_DOMAINS[family]):
            peer = message.get_attr("IFA_ADDRESS")
            address = message.get_attr("IFA_LOCAL") or peer
            if address is None:
                continue
            flags = message.get_attr("IFA_FLAGS") or message["flags"]
            v4 = family is Family.V4
            if not v4 and (flags & _DAD_FAILED or flags & (_TENTATIVE | _OPTIMISTIC) == _TENTATIVE):
                continue
            carried.append(
                DeviceAddress(
                    names.get(message["index"], ""),
                    ipaddress.ip_address(address),
                    ipaddress.ip_interface(f"{peer or address}/{message['prefixlen']}"),
                    universal=message["scope"] == 0,
                    second_choice=bool(flags & (_SECONDARY if v4 else _DEPRECATED | _OPTIMISTIC)),
                    temporary=bool(not v4 and flags & _SECONDARY),
                )
            )
        for message in netlink.get_routes(family=_DOMAINS[family], table=_LOCAL_TABLE):
            if message["type"] in types and (prefix := message.get_attr("RTA_DST")):
                network = ipaddress.ip_network(f"{prefix}/{message['dst_len']}")
                types[message["type"]].append(network)
    return tuple(carried), tuple(types[_LOCAL]), tuple(types[_BROADCAST])


# linux/rtnetlink.h and linux/neighbour.h
_ROUTE_TYPES = {_UNICAST: UNICAST, 6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}
_HOP_FLAGS = {0x01: "dead", 0x04: "onlink", 0x10: "linkdown"}
_FROM_ADVERTISEMENT = 9
_STATES = {
    **{0x00: "NONE", 0x01: "INCOMPLETE", 0x02: "REACHABLE", 0x04: "STALE", 0x08: "DELAY"},
    **{0x10: "PROBE", 0x20: "FAILED", 0x40: "NOARP", 0x80: "PERMANENT"},
}
_AF_BRIDGE = 7
_TICKS_PER_S = 100  # USER_HZ, on every architecture that Linux still has
_IFF_UP = 1
_INVERTED = 2
_RULES_OF_THE_KERNEL = ((0, 255), (32766, 254), (32767, 253))


def read_devices() -> tuple[Device, ...]:
    """All devices; what only the other end of a veth knows is asked of its namespace, 0.5 ms each.
    Raises as read_paths does."""
    with _netlink() as netlink:
        links = list(netlink.get_links())
        names = {one["index"]: str(one.get_attr("IFLA_IFNAME")) for one in links}
        return tuple(_device(netlink, one, names) for one in links)


def _device(netlink: IPRoute, link: Any, names: dict[int, str]) -> Device:
    about = link.get_attr("IFLA_LINKINFO")
    kind = str(about.get_attr("IFLA_INFO_KIND") or "") if about else ""
    data = about.get_attr("IFLA_INFO_DATA") if about else None
    calls = []
    if kind == "bridge" and data:
        calls += [Family.V4] if data.get_attr("IFLA_BR_NF_CALL_IPTABLES") else []
        calls += [Family.V6] if data.get_attr("IFLA_BR_NF_CALL_IP6TABLES") else []
    return Device(
        name=names[link["index"]],
        kind=kind,
        mtu=link.get_attr("IFLA_MTU"),
        up=bool(link["flags"] & _IFF_UP),
        master=names.get(link.get_attr("IFLA_MASTER"), ""),
        inner_mtu=_inner_mtu(netlink, link) if kind == "veth" else None,
        vxlan=_vxlan(data, names) if kind == "vxlan" and data else None,
        calls_iptables=frozenset(calls),
    )


def _inner_mtu(netlink: IPRoute, link: Any) -> int | None:
    index, where = link.get_attr("IFLA_LINK"), link.get_attr("IFLA_LINK_NETNSID")
    if not index or (where is not None and where < 0):
        return None
    there = {} if where is None else {"IFLA_IF_NETNSID": where}
    try:
        (other,) = netlink.link("get", index=index, **there)
    except (NetlinkError, ValueError):
        return None  # gone meanwhile, or in a namespace that we may not ask
    return int(other.get_attr("IFLA_MTU"))


def _vxlan(data: Any, names: dict[int, str]) -> Vxlan:
    local = data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")
    return Vxlan(
        port=data.get_attr("IFLA_VXLAN_PORT"),
        local=ipaddress.ip_address(local) if local else None,
        lower=names.get(data.get_attr("IFLA_VXLAN_LINK"), ""),
        asks=bool(data.get_attr("IFLA_VXLAN_L2MISS") or data.get_attr("IFLA_VXLAN_L3MISS")),
    )


def read_surroundings(family: Family, devices: tuple[Device, ...]) -> Surroundings:
    """What there is of a family besides. Raises as read_paths does."""
    domain = _DOMAINS[family]
    with _netlink() as netlink:
        names = dict(socket.if_nameindex())
        return Surroundings(
            devices,
            tuple(
                hop
                for route in netlink.get_routes(family=domain, table=_MAIN_TABLE)
                for hop in _hops(route, names, family)
            ),
            tuple(_neighbours(netlink, domain, names)),
            tuple(_tunnel_ends(netlink, names)),
            tuple(_rules(netlink, domain)),
        )


def _hops(route: Any, names: dict[int, str], family: Family) -> Iterator[Hop]:
    if route["type"] not in _ROUTE_TYPES:
        return
    everywhere = ipaddress.ip_address(bytes(4 if family is Family.V4 else 16))
    prefix = route.get_attr("RTA_DST") or everywhere
    kind = _ROUTE_TYPES[route["type"]]
    hops = route.get_attr("RTA_MULTIPATH") or [route]
    for hop in hops:
        gateway = hop.get_attr("RTA_GATEWAY")
        device = hop["oif"] if "oif" in hop else route.get_attr("RTA_OIF")
        flags = [name for bit, name in _HOP_FLAGS.items() if hop["flags"] & bit]
        flags += ["proto ra"] if route["proto"] == _FROM_ADVERTISEMENT else []
        yield Hop(
            ipaddress.ip_network(f"{prefix}/{route['dst_len']}"),
            kind,
            names.get(device, "") if kind == UNICAST else "",
            ipaddress.ip_address(gateway) if gateway else None,
            route.get_attr("RTA_PRIORITY") or 0,
            tuple(flags),
        )


def _neighbours(netlink: IPRoute, domain: int, names: dict[int, str]) -> Iterator[Neighbour]:
    for one in netlink.get_neighbours(family=domain):
        address, about = one.get_attr("NDA_DST"), one.get_attr("NDA_CACHEINFO")
        if address is not None and one["ifindex"] in names:
            yield Neighbour(
                ipaddress.ip_address(address),
                names[one["ifindex"]],
                _STATES.get(one["state"], "NONE"),
                one.get_attr("NDA_LLADDR") or "",
                about["ndm_updated"] / _TICKS_PER_S if about else 0.0,
            )


def _tunnel_ends(netlink: IPRoute, names: dict[int, str]) -> Iterator[TunnelEnd]:
    for one in netlink.get_neighbours(family=_AF_BRIDGE):
        node, address = one.get_attr("NDA_DST"), one.get_attr("NDA_LLADDR")
        if node is not None and address is not None and one["ifindex"] in names:
            yield TunnelEnd(names[one["ifindex"]], address, ipaddress.ip_address(node))


def _rules(netlink: IPRoute, domain: int) -> Iterator[str]:
    """As `ip rule` prints them, as far as an operator needs to find them."""
    for one in netlink.get_rules(family=domain):
        priority = one.get_attr("FRA_PRIORITY") or 0
        table = one.get_attr("FRA_TABLE") or one["table"]
        if (priority, table) in _RULES_OF_THE_KERNEL:
            continue
        words = [f"{priority}:", *["not"] * bool(one["flags"] & _INVERTED)]
        for word, attribute, length in (
            ("from", "FRA_SRC", "src_len"),
            ("to", "FRA_DST", "dst_len"),
        ):
            if prefix := one.get_attr(attribute):
                words += [word, f"{prefix}/{one[length]}"]
        for word, attribute in (("iif", "FRA_IIFNAME"), ("oif", "FRA_OIFNAME")):
            if name := one.get_attr(attribute):
                words += [word, str(name)]
        if mark := one.get_attr("FRA_FWMARK"):
            words += ["fwmark", f"{mark:#x}"]
        words += ["lookup", str(table)] if table else [_ROUTE_TYPES.get(one["action"], "")]
        yield " ".join(words)
