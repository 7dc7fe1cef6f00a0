"""A packet, or a class of packets, and the small language that iptables and nft rules become.

Three-valued: a test is None where it holds for a part of the class only, or cannot be decided.
A packet opens a connection that no helper expected (nat chains see no other), or answers one.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from snatd.core.model import Address, Family, Network

Range = tuple[int, int]
Ranges = tuple[Range, ...]

ALL_BITS = 0xFFFFFFFF
NEW, ESTABLISHED = "new", "established"
_STATES = {NEW, ESTABLISHED, "related", "invalid", "untracked"}
_TRANSLATED = {"dnat", "snat"}

PROTOCOLS = {
    **{"icmp": 1, "igmp": 2, "ipencap": 4, "tcp": 6, "udp": 17, "dccp": 33, "ipv6": 41, "gre": 47},
    **{"esp": 50, "ah": 51, "ipv6-icmp": 58, "icmpv6": 58, "ospf": 89, "sctp": 132, "udplite": 136},
}


def merge(pairs: Iterable[Range]) -> Ranges:
    """The same numbers as the fewest ranges, in order."""
    merged: list[Range] = []
    for low, high in sorted(pairs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def addresses(networks: Iterable[Network]) -> Ranges:
    return merge((int(one.network_address), int(one.broadcast_address)) for one in networks)


def covered(some: Ranges | None, within: Ranges) -> bool | None:
    """Whether all, none or a part (None) of some numbers lie in ranges. Unknown numbers: None."""
    if some is None:
        return None if within else False
    found = set()
    for low, high in some:
        at = bisect_right(within, low, key=lambda one: one[0]) - 1
        if at >= 0 and high <= within[at][1]:
            found.add(True)
        elif (at >= 0 and low <= within[at][1]) or (
            at + 1 < len(within) and within[at + 1][0] <= high
        ):
            return None
        else:
            found.add(False)
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True)
class Mark:
    """A packet's mark, as far as it is known bit by bit. Unknown bits are 0 in `value`."""

    value: int = 0
    known: int = ALL_BITS


class Field(enum.Enum):
    SOURCE = "source"
    DESTINATION = "destination"
    PROTOCOL = "protocol"
    SPORT = "sport"
    DPORT = "dport"


@dataclass(frozen=True)
class Packet:
    """What is known of a packet; None is unknown. `not_out`: devices that it certainly does not
    leave by. `came_in`: empty for a packet of the node's own. `types`: see address_types.
    `state`: of its connection. `untranslated`: whether that has no NAT. `came_right`: whether the
    route back to its source leaves by the device that it came in by."""

    family: Family
    source: Ranges
    destination: Ranges
    out: str | None = None
    not_out: tuple[str, ...] = ()
    came_in: str | None = None
    mark: Mark = Mark()
    protocol: int | None = None
    sport: int | None = None
    dport: int | None = None
    types: tuple[tuple[str, Ranges], ...] = ()
    state: str = NEW
    untranslated: bool = False
    came_right: bool | None = None

    def known(self, field: Field) -> Ranges | None:
        value = getattr(self, field.value)
        return ((value, value),) if isinstance(value, int) else value

    @property
    def exact_source(self) -> Address | None:
        (low, high), *more = self.source
        return self.address(low) if low == high and not more else None

    def address(self, number: int) -> Address:
        return IPv4Address(number) if self.family is Family.V4 else IPv6Address(number)


def address_types(
    family: Family, local: Iterable[Network], broadcast: Iterable[Network] = ()
) -> tuple[tuple[str, Ranges], ...]:
    """Which addresses are of which type to the kernel (inet_addr_type; xt_addrtype and nft's fib
    disagree about IPv6's unicast, which is therefore left out). From the node's local table."""
    types = {"local": addresses(local), "multicast": addresses((family.multicast,))}
    if family is Family.V4:
        always = (ip_network("0.0.0.0/8"), ip_network("255.255.255.255/32"))
        types["broadcast"] = addresses((*broadcast, *always))
        special = merge(pair for pairs in types.values() for pair in pairs)
        edges = [-1, *(edge for pair in special for edge in pair), 1 << 32]
        types["unicast"] = tuple(
            (before + 1, after - 1)
            for before, after in zip(edges[::2], edges[1::2], strict=True)
            if before + 1 < after
        )
    return tuple(types.items())


@dataclass(frozen=True)
class Within:
    field: Field
    ranges: Ranges


@dataclass(frozen=True)
class Device:
    """One of some names; a `*` at the end stands for the rest of a name."""

    out: bool
    names: tuple[str, ...]


@dataclass(frozen=True)
class Marked:
    mask: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class OfType:
    field: Field
    types: tuple[str, ...]


@dataclass(frozen=True)
class InState:
    """Of a connection, whose translation is one of its states to iptables."""

    states: frozenset[str]


@dataclass(frozen=True)
class Flags:
    """Of TCP: those of `among` that are set are these."""

    among: frozenset[str]
    set: frozenset[str]


@dataclass(frozen=True)
class CameRight:
    """Asked by rpfilter and nft's fib: that the route back leaves by the device it came in by."""


Test = Within | Device | Marked | OfType | InState | Flags | CameRight


@dataclass(frozen=True)
class Check:
    """`what` may also be plainly true or false; None cannot be decided. `text` is the rule's."""

    text: str
    what: Test | bool | None
    negated: bool = False


def holds(test: Check, packet: Packet, mark: Mark) -> bool | None:
    found = _found(test.what, packet, mark)
    return found if found is None else found != test.negated


def _found(what: Test | bool | None, packet: Packet, mark: Mark) -> bool | None:
    match what:
        case InState(states):
            return _in_state(states, packet)
        case Flags(among, flags) if packet.protocol == PROTOCOLS["tcp"] and packet.state == NEW:
            return {"SYN"} & among == flags
        case Flags():
            return None
        case CameRight():
            return packet.came_right
        case Within(field, ranges):
            return covered(packet.known(field), ranges)
        case Device(out, names):
            return (
                _device(names, packet.out, packet.not_out)
                if out
                else _device(names, packet.came_in)
            )
        case Marked(mask, values):
            known = mask & mark.known
            possible = {one for one in values if not (one ^ mark.value) & known and not one & ~mask}
            return (True if known == mask else None) if possible else False
        case OfType(field, types):
            ranges_of = dict(packet.types)
            answers = {
                covered(packet.known(field), ranges_of[one]) if one in ranges_of else None
                for one in types
            }
            return True if True in answers else None if None in answers else False
        case _:
            return what


def _in_state(states: frozenset[str], packet: Packet) -> bool | None:
    if packet.state in states:
        return True
    known = _STATES | (_TRANSLATED if packet.untranslated else set())
    return False if states <= known else None


def _device(
    names: tuple[str, ...], name: str | None, certainly_not: tuple[str, ...] = ()
) -> bool | None:
    if name is None:
        return False if set(names) <= set(certainly_not) else None
    return any(name.startswith(one[:-1]) if one.endswith("*") else name == one for one in names)


@dataclass(frozen=True)
class Jump:
    chain: str
    goto: bool = False


class Verdict(enum.Enum):
    RETURN = "return"
    ACCEPT = "accept"
    DROP = "drop"


@dataclass(frozen=True)
class SetMark:
    """mark = (mark & keep) ^ flip; the bits of `lost` are not known then."""

    keep: int = 0
    flip: int = 0
    lost: int = 0

    def of(self, mark: Mark) -> Mark:
        known = (mark.known | ~self.keep) & ~self.lost & ALL_BITS
        return Mark(((mark.value & self.keep) ^ self.flip) & known, known)


LOSE_MARK = SetMark(lost=ALL_BITS)


@dataclass(frozen=True)
class Masquerade:
    """To the address that the kernel chooses."""


@dataclass(frozen=True)
class Snat:
    """To an address, to one of some, or (None) to one that is not known."""

    to: Range | None


@dataclass(frozen=True)
class Keep:
    """A binding to the packet's own source: no later rule is asked."""


@dataclass(frozen=True)
class Netmap:
    """The source's prefix is replaced."""

    network: Network


Rewrite = Masquerade | Snat | Keep | Netmap


@dataclass(frozen=True)
class Unknown:
    """Something that may end the way, rewrite, mark or do nothing."""


Action = Jump | Verdict | SetMark | Rewrite | Unknown


@dataclass(frozen=True)
class Step:
    """A rule: its text as its own tool prints it, and its tests and actions in order."""

    number: int
    text: str
    parts: tuple[Check | Action, ...]


@dataclass(frozen=True)
class Hook:
    """A base chain and the chains that can be reached from it. `hook`: where the kernel asks it."""

    table: str
    chain: str
    priority: int
    chains: Mapping[str, tuple[Step, ...]]
    drops: bool = False
    hook: str = "postrouting"

    def __str__(self) -> str:
        return f"{self.table} {self.chain} (priority {self.priority})"


_BITS = {Family.V4: 32, Family.V6: 128}


def rewritten(
    rewrite: Rewrite, packet: Packet, masquerade: tuple[Address, ...] | None
) -> tuple[Address, ...] | None:
    """The addresses that a source may become; None where any. `masquerade`: those of the device."""
    source = packet.exact_source
    match rewrite:
        case Keep():
            return (source,) if source else None
        case Masquerade():
            return masquerade
        case Snat((one, other)) if one == other and one >> _BITS[packet.family] == 0:
            return (packet.address(one),)
        case Netmap(network) if source:
            host = int(source) & int(network.hostmask)
            return (ip_address(int(network.network_address) | host),)
    return None
