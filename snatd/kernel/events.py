"""Hears that something changed in the kernel, and who changed it. Never says what it is now.

Raw netlink sockets, because pyroute2's subscribed ones die of one overflow (0.9) and decode every
message in full. Here a storm of foreign rules costs one search through each datagram.
"""

from __future__ import annotations

import errno
import math
import re
import socket
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from snatd.core.model import Backend, Family
from snatd.kernel import origin, peek
from snatd.kernel.messages import attribute, attribute_of, messages

_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_ROUTE_GROUPS = (1, 5, 7, 9, 11)  # LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_SO_RCVBUFFORCE = 33
# A restore of 5000 rules overflows the default of 212 kB and fits into this.
_RECEIVE_BUFFER_BYTES = 16 * 1024 * 1024
# The kernel puts at most some 8 KiB into one. malloc() maps and unmaps a buffer of 128 KiB and more
# each time, which takes longer than the call.
_DATAGRAM_BYTES = 64 * 1024
# So that a storm leaves the loop time for its other duties; what is left is still readable.
_DATAGRAMS_A_TURN = 2000


@dataclass(frozen=True)
class Writer:
    """Who committed a change, as the kernel tells it. `of` is its unit or its parent's name, None
    if it was gone already."""

    pid: int
    comm: str
    of: str | None = None

    def __str__(self) -> str:
        return f"{self.comm} (pid {self.pid})" + (f" of {self.of}" if self.of else "")

    @property
    def program(self) -> str:
        """The same without what is another each time: pids, and the units that systemd names by
        itself for a login, a container or a `systemd-run`."""
        service = self.of and self.of.endswith(".service") and not self.of.startswith("run-")
        return f"{self.comm} of {self.of}" if service else self.comm


Tables = frozenset[tuple[Family, Backend]]


@dataclass(frozen=True)
class Event:
    """Look again, because of `source`. `wrote`: where the writer changed rules that a repair may
    be about; empty where what it wrote is only a reason to look. `overflow`: messages were lost,
    of whoever."""

    source: str
    writer: Writer | None = None
    wrote: Tables = frozenset()
    overflow: bool = False


def who_wrote(
    writers: Mapping[Writer, Tables], family: Family, backend: Backend
) -> tuple[Writer, ...]:
    """Those who may have caused a repair. Nobody for legacy tables, whose writers are not named."""
    return tuple(writer for writer, wrote in writers.items() if (family, backend) in wrote)


# Plain substrings: searching for these four costs a quarter of one regular expression. A chance
# hit inside of some other message is a needless look, no more.
# A rule of nat POSTROUTING (NFTA_RULE_TABLE, NFTA_RULE_CHAIN).
_IN_POSTROUTING = attribute(1, b"nat\0") + attribute(2, b"POSTROUTING\0")
# A rule of a chain of ours, and anything in our own table.
_IN_OWN_CHAIN, _IN_OWN_TABLE = b"\x02\0SNATD-", attribute(1, b"snatd\0")
# A chain of anybody's on a nat hook (NFTA_CHAIN_TYPE).
_NAT_CHAIN = attribute(7, b"nat\0")
_HEADER_REST = rb".{2}.{8}.\x00.{2}"  # nlmsg flags, seq, port; nfgenmsg family, version, res_id
# A storm has thousands of datagrams without it, and a search for two bytes costs half of one for a
# regular expression.
_DELTABLE = b"\x02\x0a"
# NFT_MSG_DELTABLE, then NFTA_TABLE_NAME: the removal of any table.
_TABLE_REMOVAL = re.compile(_DELTABLE + _HEADER_REST + rb".\x00\x01\x00", re.DOTALL)
# NFT_MSG_NEWGEN closes each commit: NFTA_GEN_ID, NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME.
_GENERATION = re.compile(
    rb"\x0f\x0a" + _HEADER_REST + rb"\x08\x00\x01\x00.{4}\x08\x00\x02\x00(.{4})"
    rb".{2}\x03\x00([^\x00]*)\x00",
    re.DOTALL,
)
# It is the last message of its datagram, mostly the only one, and has 60 bytes with the longest
# name: only that end is searched.
_GENERATION_BYTES = 128


_NFNL_SUBSYS_NFTABLES = 10
_NEWRULE, _DELRULE = 6, 8
_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN = 1, 2  # of every message the first one is the table's name
_FAMILIES = {int(socket.AF_INET): Family.V4, int(socket.AF_INET6): Family.V6}
# A netlink port is the pid of its process, as that counts; where somebody has the number already,
# one from here on (netlink_autobind).
_NO_PID = 1 << 31


class NftEar:
    """Commits to nf_tables that may concern us, each with its writer.

    Our own are left out where pids are what the kernel names, and never have a writer.
    """

    source = "nft"

    def __init__(self, own_pids: Collection[int]) -> None:
        self._own_pids = own_pids
        self._nested = not origin.pids_are_the_kernels()
        self._pending: Tables | None = None
        self._socket = _listen(_NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def events(self) -> Iterator[Event]:
        """Never blocks. An overflow is a look, nothing more. Raises OSError: open another ear."""
        for datagram in _datagrams(self._socket):
            if datagram is None:
                # What was being heard has lost its end, and the next end is another's.
                self._pending = None
                yield Event(self.source, overflow=True)
            else:
                yield from self._heard(datagram)

    def _heard(self, datagram: bytes) -> Iterator[Event]:
        if _is_relevant(datagram):
            self._pending = (self._pending or frozenset()).union(_written(datagram))
        generation = _GENERATION.search(datagram, max(0, len(datagram) - _GENERATION_BYTES))
        if generation is None:
            return
        wrote, self._pending = self._pending, None
        if wrote is None:
            return
        pid, comm = int.from_bytes(generation[1], "big"), generation[2]
        (port,) = struct.unpack_from("=I", datagram, generation.start() + 8)
        if not self._nested:
            if pid not in self._own_pids:
                yield Event(self.source, _writer(pid, pid, comm), wrote)
        elif port in self._own_pids or port >= _NO_PID:
            # Ours, or another's with the same pid in a namespace of his: so a look all the same.
            yield Event(self.source)
        else:
            yield Event(self.source, _writer(pid, port, comm), wrote)


def _writer(pid: int, local_pid: int, comm: bytes) -> Writer:
    # Now, while it lives: it has committed, and has its answer still to read.
    return Writer(pid, _printable(comm), origin.of(local_pid, comm))


def _written(datagram: bytes) -> Iterator[tuple[Family, Backend]]:
    """Where its messages change rules that a repair may be about."""
    for kind, body in messages(datagram):
        if kind >> 8 != _NFNL_SUBSYS_NFTABLES or len(body) < 4 or body[0] not in _FAMILIES:
            continue
        attributes = body[4:]
        table = attribute_of(attributes, _NFTA_RULE_TABLE)
        if table == b"snatd\0":
            yield _FAMILIES[body[0]], Backend.GUARD
        elif table == b"nat\0" and kind & 0xFF in (_NEWRULE, _DELRULE):
            chain = attribute_of(attributes, _NFTA_RULE_CHAIN)
            if chain == b"POSTROUTING\0" or chain.startswith(b"SNATD-"):
                yield _FAMILIES[body[0]], Backend.NFT


def _is_relevant(datagram: bytes) -> bool:
    # Written out: `any` makes a generator each time, which is a quarter of all this.
    return (
        _IN_POSTROUTING in datagram
        or _IN_OWN_CHAIN in datagram
        or _IN_OWN_TABLE in datagram
        or _NAT_CHAIN in datagram
        or (_DELTABLE in datagram and _TABLE_REMOVAL.search(datagram) is not None)
    )


_RTM_DELLINK = 17
_RTM_LINK, _RTM_ADDRESS, _RTM_ROUTE = (16, 17), (20, 21), (24, 25)
_MAIN_TABLE, _UNICAST, _SCOPE_LINK = 254, 1, 253
_RTA_DST, _IFLA_IFNAME = 1, 3


class LinkEar:
    """Changes of addresses and direct routes, and the end or another name of one of `bridges`,
    which are names by index.

    Everything else about devices (a veth pair is a dozen messages) ends at its header.
    """

    source = "link"

    def __init__(self) -> None:
        self.bridges: Mapping[int, bytes] = {}
        self._socket = _listen(socket.NETLINK_ROUTE, _ROUTE_GROUPS)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def events(self) -> Iterator[Event]:
        """Never blocks. An overflow is a look, nothing more. Raises OSError: open another ear."""
        for datagram in _datagrams(self._socket):
            if datagram is None:
                yield Event(self.source, overflow=True)
            elif any(self._concerns(kind, body) for kind, body in messages(datagram)):
                yield Event(self.source)

    def _concerns(self, kind: int, body: bytes) -> bool:
        if len(body) < 12:
            return False
        if kind in _RTM_LINK:
            name = self.bridges.get(struct.unpack_from("=i", body, 4)[0])
            renamed = attribute_of(body[16:], _IFLA_IFNAME) != (name or b"") + b"\0"
            return name is not None and (kind == _RTM_DELLINK or renamed)
        if kind in _RTM_ADDRESS:
            return not (body[0] == socket.AF_INET6 and body[3] == _SCOPE_LINK)
        if kind in _RTM_ROUTE:
            table, route_type = body[4], body[7]
            return table == _MAIN_TABLE and route_type == _UNICAST and not _is_link_local(body[12:])
        return False


def _is_link_local(attributes: bytes) -> bool:
    """fe80::/10 and ff00::/8: one such route comes and goes with every veth."""
    destination = attribute_of(attributes, _RTA_DST)
    return len(destination) == 16 and destination.startswith((b"\xff", b"\xfe\x80"))


def _listen(protocol: int, groups: tuple[int, ...]) -> socket.socket:
    ear = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    try:
        ear.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER_BYTES)
    except PermissionError:  # a user namespace: the default buffer overflows sooner, no more
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
    ear.bind((0, sum(1 << (group - 1) for group in groups)))
    return ear


def _datagrams(ear: socket.socket) -> Iterator[bytes | None]:
    """What has arrived; None for an overflow, which loses messages but not the socket.

    Raises OSError where the socket itself is of no more use.
    """
    for _ in range(_DATAGRAMS_A_TURN):
        try:
            yield ear.recv(_DATAGRAM_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            yield None


def _printable(name: bytes) -> str:
    """A program may call itself anything; in a log line only harmless characters are."""
    return "".join(chr(byte) if 32 < byte < 127 else "?" for byte in name[:16]) or "?"


class LegacyPoll:
    """Compares the digests of the legacy tables now and then, for writers that take no lock.

    The period stretches with the cost of a look, so that all looks together stay under 0.2 % of
    a core.
    """

    source = "legacy-digest"
    shortest_s = 1.0
    # While no table is in use: nothing else tells of a first rule with watchdog before 5.0.
    unused_s = 5.0
    share = 0.002

    def __init__(self) -> None:
        self._tables = {family: peek.Peek(family) for family in Family}
        self._glances: dict[Family, peek.Glance] = {}
        self._digests: dict[Family, int] = {}
        self._cost_s = 0.0
        self.period_s = self.shortest_s
        self.due_s = math.inf

    def rebase(self, now_s: float) -> None:
        """Before a pass reads: from here on a difference is news. What was read is in memory until
        `digests` is called."""
        self._glance()
        self.due_s = now_s + self.period_s

    def digests(self) -> Mapping[Family, int]:
        """As they were at the last `rebase`: the same object until the next one."""
        if self._glances:
            self._digests = self._take()
        return self._digests

    def events(self, now_s: float) -> tuple[Event, ...]:
        """An event if something changed since `rebase`. Call when `due_s` has come."""
        before = self.digests()
        self._glance()
        changed = self._take() != before
        self.due_s = now_s + self.period_s
        return (Event(self.source),) if changed else ()

    def _glance(self) -> None:
        started_s = time.thread_time()
        self._glances = {family: table.glance() for family, table in self._tables.items()}
        self._cost_s = time.thread_time() - started_s

    def _take(self) -> dict[Family, int]:
        started_s = time.thread_time()
        digests = {family: glance.digest() for family, glance in self._glances.items()}
        self._glances = {}
        self._cost_s += time.thread_time() - started_s
        shortest_s = self.shortest_s if any(digests.values()) else self.unused_s
        self.period_s = max(shortest_s, self._cost_s / self.share)
        return digests
