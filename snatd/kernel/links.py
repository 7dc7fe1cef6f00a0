"""What the node's network looks like: devices, addresses, direct routes. By pyroute2, read only.

A socket is opened for each look and closed after it: in pyroute2 0.9 a lasting, subscribed one
raises ENOBUFS for ever after one overflow, so the ears are raw sockets (`events`) and this, the
eyes, is a dump.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from snatd.core.errors import BackendBusy, BackendFailed
from snatd.core.flows import Address
from snatd.core.model import DirectRoute, Family, Interface, Link
from snatd.core.proof import Route

_MAIN_TABLE = 254
_UNICAST = 1
# NUD_INCOMPLETE, NUD_FAILED: somebody was looked for there and did not answer. The answer to an
# earlier probe leaves such an entry for the address that it was sent from.
_NOBODY = (0x01, 0x20)
_DOMAINS = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NO_IPV6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")


@contextmanager
def _netlink() -> Iterator[IPRoute]:
    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        raise BackendFailed(f"netlink refused a dump: {error}") from None
    except OSError as error:
        raise BackendBusy(f"netlink: {error.strerror or error}") from None


def read_links(
    families: Collection[Family],
) -> tuple[tuple[Link, ...], tuple[DirectRoute, ...]]:
    """Devices with their addresses by index, and the direct routes of the main table in some
    families. About 3 ms for one.

    Raises BackendBusy where no socket can be had or the dump does not come, BackendFailed where
    the kernel refuses.
    """
    with _netlink() as netlink:
        names = dict(socket.if_nameindex())
        addresses: dict[int, list[Interface]] = {}
        for message in netlink.get_addr():
            # On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL is ours.
            address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if address is not None:
                interface = ipaddress.ip_interface(f"{address}/{message['prefixlen']}")
                addresses.setdefault(message["index"], []).append(interface)
        routes = tuple(
            route
            for family in families
            for route in _direct_routes(netlink, _DOMAINS[family], names)
        )
    links = tuple(
        Link(index, name, tuple(addresses.get(index, ()))) for index, name in sorted(names.items())
    )
    return links, routes


def read_paths(family: Family) -> tuple[tuple[Route, ...], frozenset[Address]]:
    """The unicast routes of a family's main table with a destination, and who was met by its
    neighbour table. Raises as `read_links` does."""
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


def _direct_routes(netlink: IPRoute, family: int, names: dict[int, str]) -> Iterator[DirectRoute]:
    for message in netlink.get_routes(family=family, table=_MAIN_TABLE):
        destination = message.get_attr("RTA_DST")
        device = names.get(message.get_attr("RTA_OIF"))
        if (
            destination is None
            or device is None
            or message["type"] != _UNICAST
            or message.get_attr("RTA_GATEWAY")
            or message.get_attr("RTA_VIA")
        ):
            continue
        network = ipaddress.ip_network(f"{destination}/{message['dst_len']}")
        if not network.is_link_local and not network.is_multicast:
            yield DirectRoute(network, device)


def has_ipv6() -> bool:
    """False where the kernel was started with ipv6.disable=1 or the sysctl switches it off."""
    try:
        return _NO_IPV6.read_text().strip() == "0"
    except OSError:
        return False
