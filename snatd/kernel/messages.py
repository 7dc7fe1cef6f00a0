"""The form that all netlink messages have, and their attributes. No message's meaning."""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")


def messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message."""
    position = 0
    while position + HEADER.size <= len(datagram):
        length, kind, _, _, _ = HEADER.unpack_from(datagram, position)
        if length < HEADER.size:
            return
        yield kind, datagram[position + HEADER.size : position + length]
        position += (length + 3) & ~3


def attribute_of(attributes: bytes, wanted: int) -> bytes:
    """The value of one attribute; empty where there is none."""
    position = 0
    while position + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, position)
        if kind == wanted:
            return attributes[position + _ATTRIBUTE.size : position + length]
        position += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return b""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, not padded."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value
