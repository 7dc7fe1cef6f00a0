"""What the node's network looks like: devices, addresses, direct routes. By pyroute2, read only.

A socket is opened for each look and closed after it: in pyroute2 0.9 a lasting, subscribed one
raises ENOBUFS for ever after one overflow, so the ears are raw sockets (`events`) and this, the
eyes, is a dump.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from snatd.core.errors import BackendBusy, BackendFailed
from snatd.core.model import DirectRoute, Family, Interface, Link

_MAIN_TABLE = 254
_UNICAST = 1
_DOMAINS = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NO_IPV6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")


def read_links(
    families: Collection[Family],
) -> tuple[tuple[Link, ...], tuple[DirectRoute, ...]]:
    """Devices with their addresses by index, and the direct routes of the main table in some
    families. About 3 ms for one.

    Raises BackendBusy where no socket can be had or the dump does not come, BackendFailed where
    the kernel refuses.
    """
    try:
        with IPRoute() as netlink:
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
    except NetlinkError as error:
        raise BackendFailed(f"netlink refused a dump: {error}") from None
    except OSError as error:
        raise BackendBusy(f"netlink: {error.strerror or error}") from None
    links = tuple(
        Link(index, name, tuple(addresses.get(index, ()))) for index, name in sorted(names.items())
    )
    return links, routes


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
