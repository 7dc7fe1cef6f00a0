"""Gives up for good what a daemon that looks after nat tables does not need.

Under snatd.service systemd has done so before; this is for every other way to start it.
"""

from __future__ import annotations

import ctypes
import struct

# linux/capability.h: reading and writing nat tables; the raw socket that iptables-legacy is.
_CAP_NET_ADMIN, _CAP_NET_RAW = 12, 13
_KEPT = 1 << _CAP_NET_ADMIN | 1 << _CAP_NET_RAW
# linux/prctl.h
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 23, 24, 38
_VERSION_3 = 0x20080522
_HEADER, _SETS = struct.Struct("=Ii"), struct.Struct("=6I")

_libc = ctypes.CDLL(None, use_errno=True)


def drop_capabilities() -> None:
    """Keeps CAP_NET_ADMIN and CAP_NET_RAW, as far as it has them, and no other capability; nor will
    any program that this process starts have one. Raises nothing: it drops what it can."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    number = 0
    while (there := _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0)) >= 0:
        if there and not _KEPT >> number & 1:
            _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
        number += 1
    header = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0), _HEADER.size)
    sets = ctypes.create_string_buffer(_SETS.size)
    if _libc.capget(header, sets) == 0:
        # Effective, permitted, inheritable: of the first 32 capabilities, then of the rest.
        permitted = _SETS.unpack(sets.raw)[1] & _KEPT
        sets.raw = _SETS.pack(permitted, permitted, 0, 0, 0, 0)
        _libc.capset(header, sets)
