"""See in the kernel itself when a rule was repaired. No processes, nothing of snatd's."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from tests.lab.netns import Namespace

_LIMIT_S = 10.0
_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_DATAGRAM_BYTES = 1 << 18
_NFT_MSG_NEWGEN = 0x0A0F
_NFTA_GEN_PROC_NAME = 3
_MESSAGE = struct.Struct("=IHHII")
_NFGENMSG_BYTES = 4
_ATTRIBUTE = struct.Struct("=HH")
# The name of a process has 15 bytes.
_RESTORE = b"iptables-nft-restore"[:15]

_IPT_SO_GET_INFO = 64
# struct ipt_getinfo: name, hooks, two times five offsets, number of entries, size.
_INFO = struct.Struct("=32s13I")
_POLL_S = 0.0005

_libc = ctypes.CDLL(None, use_errno=True)


class Observer(Protocol):
    """`arm` while the node is in sync; then a rival writes; then `repaired_s`, monotonic."""

    def arm(self) -> None: ...

    def repaired_s(self) -> float: ...

    def close(self) -> None: ...


@contextmanager
def suppress_overflow() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise


class NftObserver:
    """Hears the commit of a program of some name. On a node only snatd's repair runs an
    `iptables-nft-restore`."""

    def __init__(self, host: Namespace, program: bytes = _RESTORE) -> None:
        self._program = program
        with host.entered():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def arm(self) -> None:
        """Forgets what was heard before, and what was too much to be heard."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                with suppress_overflow():
                    self._socket.recv(_DATAGRAM_BYTES)

    def repaired_s(self) -> float:
        self._socket.settimeout(_LIMIT_S)
        while self._program not in _writers(self._socket.recv(_DATAGRAM_BYTES)):
            pass
        return time.monotonic()

    def close(self) -> None:
        self._socket.close()


def _writers(datagram: bytes) -> Iterator[bytes]:
    """Names of the processes whose commits end in this datagram."""
    start = 0
    while start + _MESSAGE.size <= len(datagram):
        length, kind, *_ = _MESSAGE.unpack_from(datagram, start)
        if length < _MESSAGE.size:
            return
        if kind == _NFT_MSG_NEWGEN:
            attributes = datagram[start + _MESSAGE.size + _NFGENMSG_BYTES : start + length]
            yield from _attributes(attributes, _NFTA_GEN_PROC_NAME)
        start += (length + 3) & ~3


def _attributes(content: bytes, wanted: int) -> Iterator[bytes]:
    start = 0
    while start + _ATTRIBUTE.size <= len(content):
        length, kind = _ATTRIBUTE.unpack_from(content, start)
        if kind == wanted:
            yield content[start + _ATTRIBUTE.size : start + length].rstrip(b"\0")
        start += max(_ATTRIBUTE.size, (length + 3) & ~3)


class LegacyObserver:
    """Asks for the number of entries, 10 us a time: the broad rule is one more, until repaired.

    ip_tables tells nobody of a change, so this one polls: late by 0.6 ms at most.
    """

    def __init__(self, host: Namespace) -> None:
        with host.entered():
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._in_sync = 0

    def arm(self) -> None:
        self._in_sync = self._entries()

    def repaired_s(self) -> float:
        end_s = time.monotonic() + _LIMIT_S
        while self._entries() != self._in_sync:
            if time.monotonic() > end_s:
                raise TimeoutError(f"no repair within {_LIMIT_S:g} s")
            time.sleep(_POLL_S)
        return time.monotonic()

    def close(self) -> None:
        self._socket.close()

    def _entries(self) -> int:
        # The same buffer takes the question and the answer; socket.getsockopt() cannot do that.
        buffer = ctypes.create_string_buffer(b"nat", _INFO.size)
        length = ctypes.c_uint32(_INFO.size)
        number = (self._socket.fileno(), socket.IPPROTO_IP, _IPT_SO_GET_INFO)
        if _libc.getsockopt(*number, buffer, ctypes.byref(length)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return int(_INFO.unpack(buffer.raw)[-2])


class GuardObserver:
    """Hears the first commit that has to do with a table `snatd`."""

    def __init__(self, host: Namespace) -> None:
        with host.entered():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        self._socket.settimeout(_LIMIT_S)

    def guarded_s(self) -> float:
        while b"snatd\0" not in self._socket.recv(_DATAGRAM_BYTES):
            pass
        return time.monotonic()

    def close(self) -> None:
        self._socket.close()


def on(host: Namespace, backend: str) -> Observer:
    return LegacyObserver(host) if backend == "legacy" else NftObserver(host)
