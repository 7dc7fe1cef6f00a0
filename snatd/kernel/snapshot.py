"""What every pass asks the kernel, by plain netlink sockets: devices with their addresses, direct
routes, and whether an nf_tables table exists and its chains are asked. Creates nothing.

pyroute2 takes 1.5 ms for the same devices and routes, this 0.2 ms; and the import of pyroute2, 40
to 80 ms, is not waited for by the first guard. iptables-nft or nft take 1.5 to 2 ms to say that
there is no table. `links` has all that is asked less often.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from snatd.core.errors import BackendBusy, BackendFailed
from snatd.core.model import DirectRoute, Family, Interface, Link
from snatd.kernel.messages import HEADER, attribute, attribute_of, messages

_NETLINK_NETFILTER = 12
_DOMAINS = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
# The kernel answers at once; this is for one that does not.
_ANSWER_S = 1.0
_ANSWER_BYTES = 1 << 16  # a dump comes in pieces of 32 KiB at most
_TRIES = 5
_NLM_F_REQUEST, _NLM_F_DUMP_INTR, _NLM_F_DUMP = 0x001, 0x010, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NO_IPV6 = Path("/proc/sys/net/ipv6/conf/all/disable_ipv6")

# linux/nfnetlink.h, linux/netfilter/nf_tables.h
_NFNL_SUBSYS_NFTABLES, _NFT_MSG_GETTABLE = 10, 1
_NFTA_TABLE_NAME, _NFTA_TABLE_FLAGS, _NFT_TABLE_F_DORMANT = 1, 2, 1
_NFGENMSG_SIZE = 4
_NF_FAMILIES = {"ip": socket.AF_INET, "ip6": socket.AF_INET6, "inet": 1}
# linux/rtnetlink.h, linux/if_addr.h
_RTM_GETADDR, _RTM_GETROUTE = 22, 26
_IFADDRMSG, _RTMSG = struct.Struct("=BBBBI"), struct.Struct("=BBBBBBBBI")
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 4, 5, 18
_MAIN_TABLE, _UNICAST = 254, 1


def has_table(family: Family, name: str) -> bool:
    """False only where the kernel says so. Where it cannot be asked, or has no nf_tables, the tools
    may find that out and say why."""
    try:
        answer, body = _table(_DOMAINS[family], name)
    except OSError:
        return True
    return answer != _NLMSG_ERROR or _error(body) != errno.ENOENT


def is_dormant(nft_family: str, name: str) -> bool:
    """Whether the kernel does not ask a table's chains; of a table that is gone, false.

    nft 1.0.6 garbles the flags in its JSON, and to print them at all it reads the rules of all
    tables: 0.75 s of 50,000. Raises BackendBusy where the kernel cannot be asked.
    """
    try:
        answer, body = _table(_NF_FAMILIES[nft_family], name)
    except OSError as error:
        raise BackendBusy(f"netlink: {error.strerror or error}") from None
    if answer == _NLMSG_ERROR:
        return False
    flags = attribute_of(body[_NFGENMSG_SIZE:], _NFTA_TABLE_FLAGS)
    return bool(int.from_bytes(flags, "big") & _NFT_TABLE_F_DORMANT)


def _table(domain: int, name: str) -> tuple[int, bytes]:
    """Type and body of the answer about an nf_tables table. Raises OSError."""
    value = attribute(_NFTA_TABLE_NAME, os.fsencode(name) + b"\0")
    body = struct.pack("=BBH", domain, 0, 0) + value
    kind = _NFNL_SUBSYS_NFTABLES << 8 | _NFT_MSG_GETTABLE
    with _asking(_NETLINK_NETFILTER, kind, _NLM_F_REQUEST, body) as asked:
        return next(messages(asked.recv(_ANSWER_BYTES)), (0, b""))


def read_links(
    families: Collection[Family],
) -> tuple[tuple[Link, ...], tuple[DirectRoute, ...]]:
    """Devices with their addresses by index, and the direct routes of the main table in some
    families.

    Raises BackendBusy where no socket can be had or the dump does not come, BackendFailed where
    the kernel refuses.
    """
    try:
        names = dict(socket.if_nameindex())
        addresses: dict[int, list[Interface]] = {}
        for index, address in _addresses():
            addresses.setdefault(index, []).append(address)
        routes = tuple(
            route for family in families for route in _direct_routes(_DOMAINS[family], names)
        )
    except OSError as error:
        raise BackendBusy(f"netlink: {error.strerror or error}") from None
    links = tuple(
        Link(index, name, tuple(addresses.get(index, ()))) for index, name in sorted(names.items())
    )
    return links, routes


def _addresses() -> Iterator[tuple[int, Interface]]:
    for body in _dump(_RTM_GETADDR, _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)):
        _, length, _, _, index = _IFADDRMSG.unpack_from(body)
        attributes = body[_IFADDRMSG.size :]
        # On a point-to-point link IFA_ADDRESS is the peer's; IFA_LOCAL is ours.
        address = attribute_of(attributes, _IFA_LOCAL) or attribute_of(attributes, _IFA_ADDRESS)
        if address:
            yield index, ipaddress.ip_interface((address, length))


def _direct_routes(domain: int, names: dict[int, str]) -> Iterator[DirectRoute]:
    for body in _dump(_RTM_GETROUTE, _RTMSG.pack(domain, *bytes(8))):
        _, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
        if (table, kind) != (_MAIN_TABLE, _UNICAST):
            continue
        attributes = body[_RTMSG.size :]
        destination = attribute_of(attributes, _RTA_DST)
        device = names.get(int.from_bytes(attribute_of(attributes, _RTA_OIF), sys.byteorder))
        gateway = attribute_of(attributes, _RTA_GATEWAY) or attribute_of(attributes, _RTA_VIA)
        if destination and device is not None and not gateway:
            network = ipaddress.ip_network((destination, length))
            if not network.is_link_local and not network.is_multicast:
                yield DirectRoute(network, device)


def _dump(kind: int, body: bytes) -> list[bytes]:
    """The bodies of all answers. One that something changed under is asked for again."""
    for _ in range(_TRIES):
        with _asking(socket.NETLINK_ROUTE, kind, _NLM_F_REQUEST | _NLM_F_DUMP, body) as asked:
            answers = _answers(asked)
        if answers is not None:
            return answers
    raise OSError(errno.EINTR, "the network changes all the time")


def _answers(asked: socket.socket) -> list[bytes] | None:
    found: list[bytes] = []
    while datagram := asked.recv(_ANSWER_BYTES):
        (_, _, flags, _, _) = HEADER.unpack_from(datagram)
        if flags & _NLM_F_DUMP_INTR:
            return None
        for kind, body in messages(datagram):
            if kind == _NLMSG_DONE:
                return found
            if kind == _NLMSG_ERROR:
                raise BackendFailed(f"netlink refused a dump: {os.strerror(_error(body))}")
            found.append(body)
    raise OSError(errno.EIO, "the answer ended in the middle")


def _asking(protocol: int, kind: int, flags: int, body: bytes) -> socket.socket:
    """A socket on which a question was asked."""
    asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    try:
        asking.settimeout(_ANSWER_S)
        asking.send(HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body)
    except OSError:
        asking.close()
        raise
    return asking


def _error(body: bytes) -> int:
    """The number in an NLMSG_ERROR."""
    (number,) = struct.unpack_from("=i", body)
    return -int(number)


def has_ipv6() -> bool:
    """False where the kernel was started with ipv6.disable=1 or the sysctl switches it off."""
    try:
        return _NO_IPV6.read_text().strip() == "0"
    except OSError:
        return False
