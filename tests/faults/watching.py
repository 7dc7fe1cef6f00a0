"""What a running daemon costs and has: CPU, children, what it told systemd."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.lab.netns import Namespace
from tests.lab.process import Snatd


def children(pid: int) -> list[int]:
    """The processes that a process started and that it has not asked for yet."""
    return [child for child, parent in _parents().items() if parent == pid]


def descendants(pid: int) -> list[int]:
    """The same, and theirs."""
    parents, found = _parents(), [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _parents() -> dict[int, int]:
    """Each process's parent: field 4 of proc(5)'s stat. The name in field 2 may hold anything."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            stat = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
            found[int(process.name)] = int(stat[1])
    return found


def commands_in(host: Namespace) -> set[str]:
    """What else than snatd and flanneld runs in a host's network, as command lines."""
    home, found = os.readlink(f"/proc/{host.pid}/ns/net"), set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if os.readlink(process / "ns/net") == home and int(process.name) != host.pid:
                words = (process / "cmdline").read_bytes().split(b"\0")
                found.add(b" ".join(words).decode(errors="replace").strip())
    return {one for one in found if one and "snatd run" not in one and "flanneld" not in one}


def most_memory_mib(snatd: Snatd) -> float:
    """Since it was started."""
    status = Path(f"/proc/{snatd.pid}/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return int(peak) / 1024


@contextmanager
def most_children(snatd: Snatd) -> Iterator[list[int]]:
    """How many children a daemon had at once, at most: the last of the list."""
    most = [0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            most.append(max(most[-1], len(children(snatd.pid))))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield most
    finally:
        done.set()
        looking.join()


def cpu_shares(daemons: Sequence[Snatd], for_s: float) -> list[float]:
    """What share of a core each of some daemons, with its children that ended, takes in a while."""
    before, began_s = [one.cpu_s() for one in daemons], time.monotonic()
    time.sleep(for_s)
    took_s = time.monotonic() - began_s
    return [(one.cpu_s() - then_s) / took_s for one, then_s in zip(daemons, before, strict=True)]


def longest_silence_s(snatd: Snatd, for_s: float) -> float:
    """How long systemd's watchdog had to wait for a daemon at most, in a while."""
    silences, end_s = [], time.monotonic() + for_s
    while (began_s := time.monotonic()) < end_s:
        snatd.notifications.clear()
        snatd.wait_for_notification("WATCHDOG=1", within_s=60)
        silences.append(time.monotonic() - began_s)
    return max(silences)


def heard(snatd: Snatd) -> int:
    """How often something was heard of the lock's file, up to the last look."""
    return int(snatd.status()["events"].get("xtables_lock", 0))
