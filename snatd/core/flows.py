"""Connections as `conntrack -L` prints them, and which of them hide a container's address.

Raises nothing but `FlowError`. Deletes nothing; that is `kernel.conntrack`.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache

from snatd.core.desired import Desired
from snatd.core.errors import FlowError
from snatd.core.model import Address

# libnetfilter_conntrack's default output (1.0.9): protocol, number, seconds left (none for an entry
# that hardware keeps alive), state, the original tuple, the reply tuple, and then what there is.
_LINE = re.compile(
    r"(?P<name>[a-z0-9-]+) +(?P<number>\d{1,3}) (?:(?P<timeout>\d{1,10}) )?"
    r"(?:(?P<state>[A-Z][A-Z0-9_]*) )?src=(?P<source>\S+) dst=(?P<destination>\S+) "
    r"(?P<original>.*?)src=(?P<reply_source>\S+) dst=(?P<reply_destination>\S+) (?P<reply>.*)"
)


@dataclass(frozen=True)
class FlowKey:
    """What names one entry: its original tuple. `icmp`: type, code, id."""

    protocol: int
    source: Address
    destination: Address
    source_port: int | None = None
    destination_port: int | None = None
    icmp: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Flow:
    """An entry. `id` is the kernel's, a hash of the tuple and of where the entry lies in memory.

    `age_s` is known only where net.netfilter.nf_conntrack_timestamp is switched on. `state`: of
    TCP and SCTP, and empty for others.
    """

    key: FlowKey
    protocol: str
    id: int
    seen_as: Address
    answered_by: Address
    answered_from_port: int | None
    timeout_s: int | None = None
    age_s: int | None = None
    state: str = ""
    mark: int = 0
    zoned: bool = False

    @property
    def is_over(self) -> bool:
        """Both sides have closed it; the entry only waits for its end."""
        return self.state in ("TIME_WAIT", "CLOSE")

    @property
    def identity(self) -> int:
        """32 bits that are the same for the same connection with the same outcome.

        Not `id` alone: the next connection of the same tuple may be put where the last one was, and
        then has its id (seen on 6.18), but perhaps another source.
        """
        return _identity(self.id, self.seen_as)


def _identity(entry_id: int, seen_as: Address) -> int:
    return entry_id ^ int(seen_as) % 0xFFFFFFFB


class Verdict(enum.Enum):
    """What became of a connection's source address."""

    KEPT = "kept"
    WRONG = "wrong"
    FOREIGN = "foreign"


def parse_flow(line: str) -> Flow:
    """One line of `conntrack -L -o id`. Raises FlowError where it cannot be read for certain."""
    match = _LINE.fullmatch(line.rstrip())
    if match is None:
        raise FlowError(f"conntrack printed a line that cannot be read: {line[:120]!r}")
    original, reply = _pairs(match["original"]), _pairs(match["reply"])
    name = match["name"]
    try:
        icmp = name.startswith("icmp")
        ports = original.get("sport", original.get("srckey"))
        key = FlowKey(
            protocol=_whole(match["number"], 8),
            source=_address(match["source"]),
            destination=_address(match["destination"]),
            source_port=_number(ports),
            destination_port=_number(original.get("dport", original.get("dstkey"))),
            icmp=_icmp(original) if icmp else None,
        )
        return Flow(
            key=key,
            protocol=name if name != "unknown" else match["number"],
            # The reply of an ICMP entry has an `id` too; the entry's own is printed last.
            id=_whole(match["reply"].rpartition(" id=")[2].split(" ", 1)[0], 32),
            seen_as=_address(match["reply_destination"]),
            answered_by=_address(match["reply_source"]),
            answered_from_port=_number(reply.get("sport", reply.get("srckey"))),
            timeout_s=_number(match["timeout"], 32),
            age_s=_number(reply.get("delta-time"), 64),
            state=match["state"] or "",
            mark=_whole(reply.get("mark", "0"), 32),
            zoned="zone" in match["original"] or "zone" in match["reply"],
        )
    except (ValueError, KeyError) as error:
        raise FlowError(f"conntrack printed {line[:120]!r}: {error}") from None


# Few addresses have many connections: this halves the time for a line.
_address = lru_cache(maxsize=1024)(ipaddress.ip_address)


def _pairs(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def _number(text: str | None, bits: int = 16) -> int | None:
    return None if text is None else _whole(text, bits)


def _whole(text: str, bits: int) -> int:
    """What goes back to the kernel in so many bits. Raises ValueError."""
    number = int(text, 0)
    if number < 0 or number >> bits:
        raise ValueError(f"{text!r} is not a number of {bits} bits")
    return number


def _icmp(original: dict[str, str]) -> tuple[int, int, int]:
    return _whole(original["type"], 8), _whole(original["code"], 8), _whole(original["id"], 16)


def concerns(destination: Address, desired: Desired) -> bool:
    """Whether a container of the subnet is to be seen there under its own address."""
    return destination not in desired.subnet and any(
        destination in network for network in desired.networks
    )


def verdict(flow: Flow, desired: Desired, marks: int) -> Verdict:
    """Whether a connection from the subnet into the networks kept its source.

    In doubt it is FOREIGN, and so is never deleted. The entry does not hold the packet's mark, by
    which kube-proxy and host ports ask for masquerade (tested: it is 0 after their work), but that
    is always asked for together with another destination: an answer from elsewhere than the one
    who was called is service traffic. `marks` count where somebody saved them in the entry.
    A zone is another program's namespace of connections.
    """
    key = flow.key
    if key.source not in desired.subnet or not concerns(key.destination, desired):
        return Verdict.FOREIGN
    if (flow.answered_by, flow.answered_from_port) != (key.destination, key.destination_port):
        return Verdict.FOREIGN
    if flow.mark & marks or flow.zoned:
        return Verdict.FOREIGN
    return Verdict.KEPT if flow.seen_as == key.source else Verdict.WRONG


# Answers come from whom it called, to who called, and neither a mark nor a zone was given. Ports
# above 64999 are left to `parse_flow`, which knows where they end.
_PORT = r"(0|[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3})"
_KEPT = re.compile(
    r"(?:tcp +6|udp +17) (?:0|[1-9]\d{0,8}) (?:[A-Z][A-Z0-9_]* )?"
    rf"src=([0-9a-f.:]+) dst=([0-9a-f.:]+) sport={_PORT} dport={_PORT} (?:\[UNREPLIED\] )?"
    r"src=\2 dst=\1 sport=\4 dport=\3 (?:\[[A-Z_]+\] )*(?:mark=0 )?use=\d+ "
    r"id=(0|[1-9]\d{0,9})"
)


class Kept:
    """Tells most of the connections that kept their source by their line alone, in 2 us where
    `parse_flow` and `verdict` take 8: a table of 260,000 has to be read without being in the way.
    """

    def __init__(self, desired: Desired) -> None:
        @lru_cache(maxsize=4096)
        def concerns_us(source: str, destination: str) -> bool:
            return _address(source) in desired.subnet and concerns(_address(destination), desired)

        self._concerns_us = concerns_us

    def identity(self, line: str) -> int | None:
        """The identity of a flow that is certainly KEPT. None says nothing: it has to be parsed."""
        match = _KEPT.fullmatch(line)
        if match is None:
            return None
        source, destination, _, _, own_id = match.groups()
        try:
            if not self._concerns_us(source, destination):
                return None
        except ValueError:
            return None
        entry_id = int(own_id)
        return _identity(entry_id, _address(source)) if entry_id < 1 << 32 else None


def to_delete(flow: Flow, policy: str) -> bool:
    """Whether the policy (`off`, `report`, `udp`, `all`) deletes a wrong flow.

    A UDP flow goes on with the right address with its next packet; a TCP connection's peer knows
    nobody at that address and resets it.
    """
    return policy == "all" or (policy == "udp" and flow.protocol == "udp")


# So many connections that kept their source are told apart by half a MiB.
_MOST_KEPT = 1 << 16


def one_in(entries: int) -> int:
    """Of how many connections that kept their source one is counted, in a table of so many."""
    return 1 << (max(entries - 1, 0) // _MOST_KEPT).bit_length()


class Ids:
    """A growing set of flows' identities at 3 bytes each, where a set takes 64. Spread over rows of
    about 20, none is ever sorted or copied as a whole. What is left of an identity when its row is
    known fits in three bytes.

    `one_in`, a power of two, bounds what a table of a million takes: of the connections that kept
    their source, of which there are most and of which none is ever shown, only those are added
    that are `counted`. The wrong ones are all added.
    """

    def __init__(self, one_in: int = 1) -> None:
        self.one_in = one_in
        self._rows = [b""] * _ROWS

    def counted(self, one: int) -> bool:
        """Whether it is the one of so many. It is so each time, and evenly spread: an identity is
        the kernel's hash."""
        return one // _ROWS % self.one_in == 0

    def add(self, one: int) -> None:
        self._rows[one % _ROWS] += _in_row(one)

    def __contains__(self, one: int) -> bool:
        row, wanted = self._rows[one % _ROWS], _in_row(one)
        at = row.find(wanted)
        while at % _ID_BYTES and at > 0:  # across two of them
            at = row.find(wanted, at + 1)
        return at >= 0

    def __len__(self) -> int:
        return sum(map(len, self._rows)) // _ID_BYTES


_ROWS, _ID_BYTES = 4096, 3


def _in_row(one: int) -> bytes:
    return (one // _ROWS).to_bytes(_ID_BYTES, "big")
