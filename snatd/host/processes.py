"""The programs that run in this process's own network namespace. Asks only /proc; decides nothing.

One that ends while it is looked at is not there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from snatd.core.programs import Process
from snatd.host.files import FileRefused, read_bounded

PROC = Path("/proc")
# The kernel takes no more arguments than 6 MiB (three quarters of a stack of 8).
_LONGEST_BYTES = 8 << 20


def find(names: Collection[str], proc: Path = PROC, owner: int = 0) -> tuple[Process, ...]:
    """Those of some names, by pid. 20 us for each process of the machine.

    Only root's: what another calls itself means nothing, since it cannot write rules. Only of these
    more than the name is read: a process that hangs in the kernel may hold up who asks for its
    arguments. Raises OSError where there is no /proc.
    """
    here = os.readlink(proc / "self/ns/net")
    found = []
    for pid in sorted(int(name) for name in os.listdir(proc) if name.isdigit()):
        with suppress(OSError, FileRefused, ValueError, IndexError):
            folder = proc / str(pid)
            name = read_bounded(folder / "comm", _LONGEST_BYTES).decode(errors="replace")
            if name.removesuffix("\n") not in names or os.stat(folder).st_uid != owner:
                continue
            if os.readlink(folder / "ns/net") == here:
                found.append(_read(folder, pid))
    return tuple(found)


def _read(folder: Path, pid: int) -> Process:
    # proc(5): `pid (comm) state ppid ...`; the name may hold anything, parentheses too.
    head, _, tail = read_bounded(folder / "stat", _LONGEST_BYTES).rpartition(b")")
    fields = tail.split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    words = read_bounded(folder / "cmdline", _LONGEST_BYTES).decode(errors="backslashreplace")
    return Process(
        pid=pid,
        name=head.partition(b"(")[2].decode(errors="replace"),
        arguments=tuple(words.removesuffix("\0").split("\0")),
        age_s=uptime_s() - started_s,
        parent=int(fields[1]),
    )


def uptime_s() -> float:
    """Since the boot, sleep included: what the start of a process is counted from."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
