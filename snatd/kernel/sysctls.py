"""The kernel's settings and counters of this network namespace, from /proc. Writes none."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

_ROOT = Path("/proc/sys")
_COUNTERS = Path("/proc/net")


def read_sysctl(key: str, *, root: Path = _ROOT) -> str | None:
    """The value of `net.ipv4.ip_forward`, None where this kernel has no such setting.

    A device's name in a key stands between slashes, since it may hold dots:
    `net/ipv4/conf/eth0.7/rp_filter`.
    """
    path = key if "/" in key else key.replace(".", "/")
    try:
        return (root / path).read_text().strip()
    except OSError:
        return None


def read_number(key: str, *, root: Path = _ROOT) -> int | None:
    """The same as a number; None also where it is none."""
    value = read_sysctl(key, root=root)
    return int(value) if value is not None and value.isdigit() else None


def read_table(name: str, *, root: Path = _COUNTERS) -> dict[str, int]:
    """The counters of `stat/nf_conntrack` and the like, which has one line of hexadecimal numbers
    for each processor; empty without. What counts entries is the same in each."""
    try:
        head, *rows = (root / name).read_text().splitlines()
        numbers = [[int(one, 16) for one in row.split()] for row in rows]
    except (OSError, ValueError):
        return {}
    columns = zip(head.split(), zip(*numbers, strict=False), strict=False)
    return {key: max(some) if key == "entries" else sum(some) for key, some in columns}


def read_counter(group: str, name: str, *, root: Path = _COUNTERS) -> int:
    """A counter of `netstat`, like TcpExt and IPReversePathFilter; 0 where there is none."""
    try:
        lines = (root / "netstat").read_text().splitlines()
    except OSError:
        return 0
    for head, values in pairwise(lines):
        if head.startswith(f"{group}:"):
            found = dict(zip(head.split(), values.split(), strict=False)).get(name, "")
            if found.isdigit():
                return int(found)
    return 0
