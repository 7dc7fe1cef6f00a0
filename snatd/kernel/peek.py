"""Looks at the legacy tables from outside: whether they are in use, and whether they changed.

Creates nothing, forks nothing, takes no lock. Does not know what a rule is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

from snatd.core.errors import BackendBusy, is_scarcity
from snatd.core.model import Family

# include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter_ipv6/ip6_tables.h
_GET_INFO, _GET_ENTRIES = 64, 65
_INFO = struct.Struct("=32sI5I5III")
_ENTRIES_HEADER = struct.Struct("=32sI4x")
# Four chains with their policies and the terminating error entry.
_EMPTY_NAT_ENTRIES = 5


@dataclass(frozen=True)
class _Layout:
    """Where one family's struct ipt_entry keeps what is needed here, in bytes."""

    domain: socket.AddressFamily
    level: int
    names: str
    next_offset: int
    counters: int


_LAYOUTS = {
    Family.V4: _Layout(socket.AF_INET, socket.IPPROTO_IP, "/proc/net/ip_tables_names", 90, 96),
    Family.V6: _Layout(
        socket.AF_INET6, socket.IPPROTO_IPV6, "/proc/net/ip6_tables_names", 142, 152
    ),
}
_COUNTERS_SIZE = 16
_NAMES_SIZE = 4096
_LONGEST_RUN = 4096

_libc = ctypes.CDLL(None, use_errno=True)


class Glance:
    """A table as it was. All of it is in memory until somebody asks for its fingerprint."""

    def __init__(
        self, digest: int, content: mmap.mmap | None = None, layout: _Layout | None = None
    ) -> None:
        self._digest, self._content, self._layout = digest, content, layout

    def digest(self) -> int:
        """A fingerprint of it without its counters; 0 where it is not in use. Only this process can
        compare it: it is the interpreter's keyed hash (SipHash, 64 bits)."""
        if self._content is not None and self._layout is not None:
            _clear_counters(self._content, self._layout)
            self._digest = hash(memoryview(self._content).toreadonly()) or 1
            self._content = None
        return self._digest


class Peek:
    """One family's legacy nat table, by descriptors that stay open: whoever asks each second pays
    for opening them else (0.9 ms of CPU after a second of sleep, 0.6 so; measured). They belong
    to the network namespace in which they were opened. A context manager.
    """

    def __init__(self, family: Family) -> None:
        self._layout = _LAYOUTS[family]
        self._names: int | None = None
        self._socket: socket.socket | None = None

    def entries(self) -> int:
        """How many it holds, and 0 where it holds no more than its policies. Raises OSError where
        it cannot be asked."""
        number, _ = self._info()
        return number if number > _EMPTY_NAT_ENTRIES else 0

    def digest(self) -> int:
        """`Glance.digest` of it as it is now.

        60 us at 28 entries, 22 ms at 50,000, of which the kernel takes 17 (measured).
        """
        return self.glance().digest()

    def glance(self) -> Glance:
        """Reads it, as one snapshot of the kernel's."""
        try:
            number, size = self._info()
            if number <= _EMPTY_NAT_ENTRIES:
                return Glance(0)
            return Glance(0, self._entries(size), self._layout)
        except FileNotFoundError:
            return Glance(0)  # a kernel without ip_tables
        except OSError:
            # Changed between the two questions, or the module was replaced: certainly different
            # from what it was.
            self.close()
            return Glance(int.from_bytes(os.urandom(8), "big"))

    def _info(self) -> tuple[int, int]:
        """Number of entries and their size in bytes, 0 of a table that is not listed: asking for
        one creates it (before 5.15 it is listed in every namespace)."""
        if self._names is None:
            # open() makes nine system calls of it.
            self._names = os.open(self._layout.names, os.O_RDONLY | os.O_CLOEXEC)
        if b"nat" not in os.pread(self._names, _NAMES_SIZE, 0).split():
            return 0, 0
        answer = bytearray(_INFO.size)
        answer[:3] = b"nat"
        self._ask(_GET_INFO, answer)
        *_, number, size = _INFO.unpack(answer)
        return number, size

    def _entries(self, size: int) -> mmap.mmap:
        # Of 10 MB: to touch each page for the first time takes 14 ms in a bytearray, 2 in this.
        answer = mmap.mmap(
            -1,
            _ENTRIES_HEADER.size + size,
            flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE,
        )
        answer[: _ENTRIES_HEADER.size] = _ENTRIES_HEADER.pack(b"nat", size)
        self._ask(_GET_ENTRIES, answer)
        return answer

    def _ask(self, option: int, asked: bytearray | mmap.mmap) -> None:
        """Writes the answer where the question is."""
        if self._socket is None:
            self._socket = socket.socket(self._layout.domain, socket.SOCK_DGRAM)
        # socket.getsockopt() cannot pass a request in, and these are questions with arguments.
        buffer = (ctypes.c_char * len(asked)).from_buffer(asked)
        length = ctypes.c_uint32(len(asked))
        handle, level = self._socket.fileno(), self._layout.level
        if _libc.getsockopt(handle, level, option, buffer, ctypes.byref(length)) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        """What is open is opened again by the next question."""
        if self._names is not None:
            os.close(self._names)
            self._names = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Peek:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def entries(family: Family) -> int:
    """`Peek.entries` of this network namespace's legacy nat table; 0: it is not in use.

    Takes 10 us. Raises BackendBusy where it cannot be asked now.
    """
    try:
        with Peek(family) as table:
            return table.entries()
    except OSError as error:
        if is_scarcity(error):
            raise BackendBusy(f"{_LAYOUTS[family].names}: {error.strerror}") from None
        return 0


def digest(family: Family) -> int:
    """`Peek.digest` of this network namespace, once."""
    with Peek(family) as table:
        return table.digest()


def listed_tables(family: Family) -> frozenset[str]:
    """The legacy tables of this network namespace, in use or not."""
    try:
        names = Path(_LAYOUTS[family].names).read_text()
    except OSError:
        return frozenset()
    return frozenset(names.split())


def _clear_counters(entries: mmap.mmap, layout: _Layout) -> None:
    """In runs of entries of one length, as tables with many have them: a step of a slice instead
    of a turn of a loop for each."""
    position = _ENTRIES_HEADER.size
    while position + layout.counters + _COUNTERS_SIZE <= len(entries):
        at = position + layout.next_offset
        length = int.from_bytes(entries[at : at + 2], sys.byteorder)
        if length == 0:
            return
        window = position + _LONGEST_RUN * length
        same = min(
            _leading(entries[at + byte : window + layout.next_offset + byte : length])
            for byte in (0, 1)
        )
        end = position + same * length
        for byte in range(layout.counters, layout.counters + _COUNTERS_SIZE):
            span = slice(position + byte, end + byte, length)
            entries[span] = bytes(len(range(*span.indices(len(entries)))))
        position = end


def _leading(values: bytes) -> int:
    """How many of the first bytes are equal."""
    return len(values) - len(values.lstrip(values[:1]))
