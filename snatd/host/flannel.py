"""Reads subnet.env, in every form that flannel v0.1 to v0.28 has written it.

Never blocks and never reads more than 64 KiB, whatever stands at the path.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from snatd.core.errors import LeaseError
from snatd.core.model import (
    SHORTEST_PREFIX,
    Family,
    FamilyLease,
    Hold,
    Interface,
    Lease,
    Network,
)
from snatd.core.networks import contains, interface, network
from snatd.host.files import open_regular, open_to_others

LARGEST_FILE_BYTES = 64 * 1024

_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)\Z")
_KEYS = {
    Family.V4: ("FLANNEL_SUBNET", "FLANNEL_NETWORK"),
    Family.V6: ("FLANNEL_IPV6_SUBNET", "FLANNEL_IPV6_NETWORK"),
}


def read_lease(path: Path) -> Lease | Hold:
    """The lease, or a Hold with file, line and reason."""
    try:
        return parse_lease(_read(path))
    except LeaseError as error:
        return Hold(f"{path}: {error}", error.explained)
    except OSError as error:
        return Hold(f"{path}: {_WHY.get(type(error), error.strerror)}")


_WHY: dict[type[OSError], str] = {
    FileNotFoundError: "no such file: waiting for flanneld to write it",
    NotADirectoryError: "no such file: a part of its path is not a directory",
}


def _read(path: Path) -> str:
    descriptor = open_regular(path)
    if descriptor is None:
        raise LeaseError("not a regular file: remove it and restart flanneld")
    try:
        # Whoever decides which networks there are decides what is masqueraded.
        if why := open_to_others(path):
            raise LeaseError(
                f"not believed, since others could have written it: {why}: read it, then "
                "`chown root` and `chmod go-w`",
                explained=True,
            )
        # A regular file gives all that it has in one read.
        content = os.read(descriptor, LARGEST_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(content) > LARGEST_FILE_BYTES:
        raise LeaseError(f"larger than {LARGEST_FILE_BYTES // 1024} KiB: not written by flannel")
    try:
        return content.decode("ascii")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise LeaseError(f"line {line}: a byte that is not ASCII") from None


def parse_lease(text: str) -> Lease:
    """The lease that a subnet.env's text says. Raises LeaseError with line and reason."""
    values = _values(text)
    families = []
    for family, (subnet_key, network_key) in _KEYS.items():
        networks = _networks(values, network_key, family)
        if subnet_key not in values:
            if networks:
                raise LeaseError(f"{network_key} without {subnet_key}: half-written?")
            continue
        line, text_value = values[subnet_key]
        gateway = _interface(text_value, family, f"line {line}: {subnet_key}")
        subnet = gateway.network
        if networks and not any(contains(one, subnet) for one in networks):
            inside = values[network_key][1]
            raise LeaseError(
                f"line {line}: {subnet_key}={gateway} lies outside {network_key}={inside}"
            )
        families.append((family, FamilyLease(gateway, networks)))
    if not families:
        raise LeaseError("no FLANNEL_SUBNET and no FLANNEL_IPV6_SUBNET: empty or half-written")
    # flannel's last line. Without it a family that seems missing may only be cut off.
    whole = "FLANNEL_IPMASQ" in values
    return Lease(tuple(families), _ipmasq(values), _mtu(values), whole)


def _values(text: str) -> dict[str, tuple[int, str]]:
    if text and not text.endswith("\n"):
        raise LeaseError(f"line {text.count(chr(10)) + 1}: cut in the middle of a line")
    values: dict[str, tuple[int, str]] = {}
    for number, raw in enumerate(text.split("\n")[:-1], 1):
        line = raw.removesuffix("\r").strip(" \t")
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise LeaseError(f"line {number}: not KEY=VALUE: {line[:60]!r}")
        key, value = match[1], _unquoted(match[2])
        if key in values and values[key][1] != value:
            raise LeaseError(f"line {number}: {key} differs from line {values[key][0]}")
        values.setdefault(key, (number, value))
    return values


def _unquoted(value: str) -> str:
    """Hand-made files, sourced by a shell, sometimes carry quotes; flannel writes none."""
    value = value.strip(" \t")
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value


def _interface(value: str, family: Family, where: str) -> Interface:
    try:
        gateway = interface(value)
    except ValueError as error:
        raise LeaseError(f"{where}: {error}") from None
    if "/" not in value:
        raise LeaseError(f"{where}: {value!r} has no prefix length")
    _check(gateway.network, family, where)
    return gateway


def _check(found: Network, family: Family, where: str) -> None:
    if found.version != family.version:
        raise LeaseError(f"{where}: {found} is not {family.value}")
    if found.prefixlen < SHORTEST_PREFIX[family]:
        raise LeaseError(f"{where}: {found} is wider than /{SHORTEST_PREFIX[family]}")


def _networks(values: dict[str, tuple[int, str]], key: str, family: Family) -> tuple[Network, ...]:
    """A comma list since v0.21 (v0.25 went back to one); missing before v0.5.3."""
    if key not in values:
        return ()
    line, text = values[key]
    result: list[Network] = []
    for item in text.split(","):
        try:
            one = network(item.strip(" \t"), strict=False)
        except ValueError as error:
            raise LeaseError(f"line {line}: {key}: {error}") from None
        _check(one, family, f"line {line}: {key}")
        result.append(one)
    return tuple(result)


def _ipmasq(values: dict[str, tuple[int, str]]) -> bool:
    if "FLANNEL_IPMASQ" not in values:
        return False
    line, value = values["FLANNEL_IPMASQ"]
    if value not in ("true", "false"):
        raise LeaseError(f"line {line}: FLANNEL_IPMASQ={value!r} is neither true nor false")
    return value == "true"


def _mtu(values: dict[str, tuple[int, str]]) -> int | None:
    if "FLANNEL_MTU" not in values:
        return None
    line, value = values["FLANNEL_MTU"]
    if not (re.fullmatch("[0-9]{2,5}", value) and 68 <= int(value) <= 65535):
        raise LeaseError(f"line {line}: FLANNEL_MTU={value[:20]!r} is not an MTU")
    return int(value)
