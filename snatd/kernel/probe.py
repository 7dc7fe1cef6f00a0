"""Sends a datagram as a container would, and looks up which source the kernel gave it."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Collection

from snatd.core.flows import FlowKey
from snatd.core.model import Address, Family
from snatd.core.proof import DISCARD, UDP
from snatd.kernel.conntrack import Entries

_POLL_S = 0.005
_IPV6_TRANSPARENT = 75  # include/uapi/linux/in6.h; the socket module of 3.11 lacks it
_TRANSPARENT = {
    4: (socket.AF_INET, socket.IPPROTO_IP, socket.IP_TRANSPARENT),
    6: (socket.AF_INET6, socket.IPPROTO_IPV6, _IPV6_TRANSPARENT),
}


def send(destination: Address, unused: Address | None, own: Address | None) -> FlowKey | str:
    """Sends one datagram to the discard port: from an address that no device has (IP_TRANSPARENT,
    which wants CAP_NET_ADMIN), or from this node's own where that fails.

    Returns the flow that it began, or why it did not leave. Does not block.
    """
    domain, level, option = _TRANSPARENT[destination.version]
    why = "no address of the container subnet can be sent from"
    for source, transparent in ((unused, 1), (own, 0)):
        if source is None:
            continue
        with socket.socket(domain, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            try:
                sender.setsockopt(level, option, transparent)
                sender.bind((str(source), 0))
                port = sender.getsockname()[1]
                sender.sendto(b"snatd verify\n", (str(destination), DISCARD))
            except OSError as error:
                why = f"not sent from {source}: {error.strerror}"
                if error.errno == errno.EPERM:
                    why += ": a firewall rule of this node drops it"
            else:
                return FlowKey(UDP, source, destination, port, DISCARD)
    return why


def seen_as(family: Family, sent: Collection[FlowKey], limit_s: float) -> dict[FlowKey, Address]:
    """Under which source each flow left, and removes its entry; those without one are missing.

    An entry is there when the send returns, unless a queue holds the packet: that is what the limit
    is for, and with 0 it looks once (0.5 ms each). Raises BackendError.
    """
    found: dict[FlowKey, Address] = {}
    ends_s = time.monotonic() + limit_s
    with Entries(family) as entries:
        while True:
            for key in sent:
                if key not in found and (source := entries.seen_as(key)) is not None:
                    found[key] = source
                    entries.delete(key)
            if len(found) == len(sent) or time.monotonic() >= ends_s:
                return found
            time.sleep(_POLL_S)
