"""Root file systems of Debian suites: built once by mmdebstrap, kept outside of the checkout."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

# What snatd needs of a node, as Debian packages it.
SNATD = (
    *("procps", "iptables", "nftables", "iproute2", "conntrack"),
    *("python3", "python3-pyroute2", "python3-iptables", "python3-sdnotify"),
    *("python3-watchdog", "python3-structlog"),
)
# The next Debian's list of packages may be past its date on a mirror.
_OPTIONS = {"forky": ('--aptopt=Acquire::Check-Valid-Until "false"',)}
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def archive(suite: str, packages: Sequence[str]) -> Path:
    """The archive of a suite's tree. Takes half a minute where it is not there yet."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "/var/cache") / "snatd-tests"
    root.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(" ".join((suite, *packages)).encode()).hexdigest()[:12]
    path = root / f"{suite}-{key}.tar.zst"
    if path.exists():  # and does not wait while another one is made
        return path
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_name(f".part-{path.name}")
            part.unlink(missing_ok=True)
            command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(packages)}"]
            _run([*command, *_OPTIONS.get(suite, ()), "--format=tar", suite, str(part)])
            part.rename(path)
    return path


def unpack(suite: str, packages: Sequence[str], folder: Path) -> Path:
    folder.mkdir(parents=True)
    _run(["tar", "--zstd", "-xpf", str(archive(suite, packages)), "-C", str(folder)])
    return folder


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr[-2000:]}"
