"""Whose process a pid is: the unit that it runs in, or else its parent. Asks only /proc.

Best effort and never blocks: a program that changes a rule lives for milliseconds, and what is gone
is not known. Needs no capability: root's group sees all of /proc under hidepid=invisible as well,
which is ProtectProc=invisible of a unit (fs/proc/base.c, has_pid_permissions).
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
_COMM_BYTES = 15
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of linux/proc_ns.h


def of(pid: int, comm: bytes, proc: Path = PROC) -> str | None:
    """The innermost unit of a process, such as "docker.service", else its parent's name.

    None if it is gone. `comm` is what the kernel called it, so that its pid's next owner is not
    taken for it.
    """
    with suppress(OSError, ValueError, IndexError):
        name, parent = _name_and_parent(proc, pid)
        if name != comm[:_COMM_BYTES]:
            return None
        groups = (proc / str(pid) / "cgroup").read_text(errors="replace")
        unit = innermost_unit(groups)
        return unit or _printable(_name_and_parent(proc, parent)[0])
    return None


def pids_are_the_kernels(proc: Path = PROC) -> bool:
    """Whether a pid here is what nf_tables says: its own count, that of the initial pid namespace.

    A container's and a machine's of systemd-nspawn or LXC are not. False where that is not known.
    """
    with suppress(OSError):
        return (proc / "self/ns/pid").stat().st_ino == _INITIAL_PID_NAMESPACE
    return False


def innermost_unit(groups: str) -> str | None:
    """The last service or scope in the path of systemd's hierarchy, which is the unified one (0::)
    or, with cgroup v1, its named one. `groups` is the text of /proc/<pid>/cgroup."""
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and controllers != "name=systemd":
            continue
        for part in reversed(path.split("/")):
            if part.endswith((".service", ".scope")):
                return _printable(part.encode())
    return None


def _name_and_parent(proc: Path, pid: int) -> tuple[bytes, int]:
    """proc(5): `pid (comm) state ppid ...`; the name may hold anything, parentheses too."""
    head, _, tail = (proc / str(pid) / "stat").read_bytes().rpartition(b")")
    return head.partition(b"(")[2], int(tail.split()[1])


def _printable(name: bytes) -> str:
    return re.sub(r"[^!-~]", "?", name.decode("latin-1"))[:64]
