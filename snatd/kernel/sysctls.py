"""The kernel's settings of this network namespace, read from /proc/sys. Writes none."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/proc/sys")


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
