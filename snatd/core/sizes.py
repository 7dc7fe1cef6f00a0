"""Whether packets fit: MTUs from a container to the way to other nodes. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from snatd.core.finding import Finding, Severity, some
from snatd.core.model import count
from snatd.core.surroundings import Device


@dataclass(frozen=True)
class Sizes:
    """`flannel`: FLANNEL_MTU, None where the file has none. `out`: the devices by which routes lead
    to other nodes."""

    flannel: int | None
    bridge: Device
    ports: tuple[Device, ...]
    out: tuple[Device, ...]
    all: tuple[Device, ...] = ()


def sizes(read: Sizes) -> Iterator[Finding]:
    yield from _between(read)
    yield from _of_containers(read)
    yield from _of_the_way(read)


def _between(read: Sizes) -> Iterator[Finding]:
    """Nobody answers "too big" on a bridge or a veth: what does not fit vanishes."""
    lost = [
        one
        for one in read.ports
        if one.mtu < read.bridge.mtu or not read.bridge.mtu <= _inner(one) <= one.mtu
    ]
    if not lost:
        return
    least = min(map(_inner, read.ports))
    yield Finding(
        "mtu_differs_on_bridge",
        Severity.ERROR,
        f"{count(len(lost), 'container')} behind {read.bridge.name} lose what is large",
        (
            _says(read.bridge),
            *some(map(_port, lost)),
        ),
        "what is larger than the next device takes vanishes there, and nobody is told",
        (
            *(_set(one, _inner(one)) for one in lost if one.mtu != _inner(one)),
            *([_set(read.bridge, least)] if least < read.bridge.mtu else []),
        ),
    )


def _inner(one: Device) -> int:
    """What the container has, as far as that is known."""
    return one.mtu if one.inner_mtu is None else one.inner_mtu


def _set(one: Device, mtu: int) -> str:
    return f"ip link set {shlex.quote(one.name)} mtu {mtu}"


def _of_containers(read: Sizes) -> Iterator[Finding]:
    ways = {f"{one.name} has mtu {one.mtu}": one.mtu for one in read.out}
    if read.flannel is not None:
        ways[f"FLANNEL_MTU={read.flannel}"] = read.flannel
    if not ways:
        return
    most = min(ways.values())
    large = [one for one in read.ports if _inner(one) > most]
    if not large:
        return
    # Only flannel said so: on this node, at least, it passes.
    passes = bool(read.out) and min(one.mtu for one in read.out) >= max(map(_inner, large))
    yield Finding(
        "mtu_above_flannel",
        Severity.INFO if passes else Severity.WARNING,
        f"{count(len(large), 'container')} may send what is too large for the way to other nodes",
        (
            *(line for line, mtu in ways.items() if mtu == most),
            *some(map(_port, large)),
            *(map(_says, read.out) if passes else ()),
        ),
        f"the way takes it on this node; where it does not on another, each packet above {most} "
        "bytes is sent twice, or lost"
        if passes
        else f"each packet above {most} bytes is sent twice at best; where an ICMP answer is "
        "filtered the connection hangs",
        (
            f'# Docker: "mtu": {most} in /etc/docker/daemon.json, systemctl restart docker; '
            f'CNI: "mtu": {most} in the bridge plugin',
            "# then make the containers anew",
        ),
    )


def _of_the_way(read: Sizes) -> Iterator[Finding]:
    for one in read.out:
        if read.flannel is not None and one.mtu < read.flannel:
            overlay = one.vxlan is not None or one.name.startswith("flannel")
            yield Finding(
                "mtu_below_flannel",
                Severity.WARNING,
                f"{one.name}, by which other nodes are reached, takes less than flannel promised",
                (_says(one), f"FLANNEL_MTU={read.flannel}"),
                f"containers are set up for packets of {read.flannel} bytes, which do not fit",
                (
                    _set(one, read.flannel),
                    *(
                        ()
                        if overlay
                        else ("# or, if it cannot take more: systemctl restart flanneld",)
                    ),
                ),
            )
        lower = next(
            (other for other in read.all if one.vxlan and other.name == one.vxlan.lower), None
        )
        if one.vxlan is not None and lower is not None:
            needed = one.mtu + one.vxlan.overhead_bytes
            if lower.mtu < needed:
                yield Finding(
                    "mtu_of_tunnel",
                    Severity.WARNING,
                    f"what {one.name} sends does not fit {lower.name} beneath it",
                    (_says(one), f"{_says(lower)}, and the tunnel needs {needed}"),
                    "large packets to other nodes are cut in two or lost",
                    (
                        _set(one, lower.mtu - one.vxlan.overhead_bytes),
                        "# then systemctl restart flanneld, so that FLANNEL_MTU follows",
                    ),
                )


def _says(one: Device) -> str:
    return f"{one.name} has mtu {one.mtu}"


def _port(one: Device) -> str:
    inside = [] if one.inner_mtu is None else [f"its end in the container has mtu {one.inner_mtu}"]
    return ", ".join((_says(one), *inside))


def on_bridge(devices: Sequence[Device], name: str) -> tuple[Device, ...]:
    """The ports of a bridge."""
    return tuple(one for one in devices if one.master == name)
