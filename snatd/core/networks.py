"""Prefixes and sets of them: from text, and what one leaves of another."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import cast

from snatd.core.model import Interface, Network

# ipaddress would also take netmasks, host masks (0.0.0.255) and IPv6 zones of any text.
_PREFIX = re.compile(r"[0-9A-Fa-f.:]+(?:/[0-9]{1,3})?\Z")


def network(text: str, *, strict: bool = True) -> Network:
    """`ADDRESS/LENGTH` or an address alone. Raises ValueError; `strict`: also for host bits."""
    return ipaddress.ip_network(_checked(text), strict)


def interface(text: str) -> Interface:
    """An address with the prefix that it lies in. Raises ValueError."""
    return ipaddress.ip_interface(_checked(text))


def _checked(text: str) -> str:
    if not _PREFIX.match(text):
        raise ValueError(f"{text[:60]!r} is not ADDRESS/LENGTH")
    return text


def contains(outer: Network, inner: Network) -> bool:
    """Whether every address of `inner` is one of `outer`'s; False across versions."""
    return outer.version == inner.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def overlaps(one: Network, other: Network) -> bool:
    """Whether two networks share an address."""
    return contains(one, other) or contains(other, one)


def collapse(networks: Iterable[Network]) -> tuple[Network, ...]:
    """The fewest prefixes for the same addresses, in order. Of one version only."""
    return tuple(cast(Iterable[Network], ipaddress.collapse_addresses(networks)))


def subtract(networks: Iterable[Network], hole: Network) -> tuple[Network, ...]:
    """The networks without a hole, as the fewest prefixes, in order."""
    left: list[Network] = []
    for one in networks:
        if contains(hole, one):
            continue
        if contains(one, hole):
            left += cast(Iterable[Network], one.address_exclude(hole))  # type: ignore[arg-type]
        else:
            left.append(one)
    return collapse(left)
