"""Which of a device's addresses MASQUERADE takes, by the kernel's rules as far as that is provable.

Several in the answer: one of them, and which cannot be told from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from snatd.core.model import Address, Family, Interface

# RFC 6724 section 2.1 as in net/ipv6/addrlabel.c, longest first.
_LABELS = tuple(
    (ip_network(prefix), label)
    for prefix, label in (
        *(("::1/128", 0), ("::ffff:0:0/96", 4), ("::/96", 3), ("2001::/32", 6)),
        *(("2001:10::/28", 7), ("3ffe::/16", 12), ("2002::/16", 2), ("fec0::/10", 11)),
        *(("fc00::/7", 5), ("::/0", 1)),
    )
)


@dataclass(frozen=True)
class DeviceAddress:
    """An address, where the kernel's own order has it. `prefix`: of the peer on a point-to-point
    link. `universal`: of a scope that is good beyond the link. `second_choice`: secondary (IPv4);
    deprecated or optimistic (IPv6). `temporary`: of IPv6's privacy extensions."""

    device: str
    address: Address
    prefix: Interface
    universal: bool = True
    second_choice: bool = False
    temporary: bool = False


def masquerade_addresses(
    family: Family,
    out: str,
    destination: Address,
    next_hop: Address | None,
    carried: Sequence[DeviceAddress],
) -> tuple[Address, ...]:
    """What the source may become; empty where the kernel would have nothing and drop the packet.
    `next_hop` is None where the route is not known."""
    usable = [one for one in carried if one.universal]
    if family is Family.V4:
        return _inet_select_addr([one for one in usable if one.device == out], usable, next_hop)
    return _ipv6_get_saddr(out, usable, destination)


def _inet_select_addr(
    there: Iterable[DeviceAddress], usable: Iterable[DeviceAddress], next_hop: Address | None
) -> tuple[Address, ...]:
    """net/ipv4/devinet.c: the first primary address in the next hop's subnet, else the first."""
    primary = [one for one in there if not one.second_choice]
    if next_hop is None:
        return _each(primary) or _each(one for one in usable if not one.second_choice)
    near = [one for one in primary if next_hop in one.prefix.network]
    if chosen := near or primary:
        return (chosen[0].address,)
    # Then the first of each other device, in an order that is not shown.
    first: dict[str, DeviceAddress] = {}
    for one in usable:
        if not one.second_choice:
            first.setdefault(one.device, one)
    return (first["lo"].address,) if "lo" in first else _each(first.values())


def _ipv6_get_saddr(
    out: str, usable: Sequence[DeviceAddress], destination: Address
) -> tuple[Address, ...]:
    """net/ipv6/addrconf.c, rules 3, 5 and 8 in this order, and of equals the first. Where
    something decides that is not read here (addrlabel, use_tempaddr, the order of devices), all
    remain."""
    first = [one for one in usable if not one.second_choice] or usable
    first = [one for one in first if one.device == out] or first
    if len({(one.device, _label(one.address), one.temporary) for one in first}) > 1:
        return _each(first)
    bits = [
        min(_common_bits(one.address, destination), one.prefix.network.prefixlen) for one in first
    ]
    return (first[bits.index(max(bits))].address,) if first else ()


def _label(address: Address) -> int:
    return next(label for network, label in _LABELS if address in network)


def _common_bits(one: Address, other: Address) -> int:
    return 128 - (int(one) ^ int(other)).bit_length()


def _each(some: Iterable[DeviceAddress]) -> tuple[Address, ...]:
    return tuple(dict.fromkeys(one.address for one in some))
