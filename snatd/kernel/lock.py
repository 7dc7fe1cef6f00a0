"""The lock that every iptables-legacy command takes: /run/xtables.lock, by flock.

The descriptor stays open, since each close of that file wakes everybody who watches it, ourselves
included.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendBusy, BackendFailed, is_scarcity
from snatd.core.locks import holder

PATH = Path(os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock"))
_TRY_AGAIN_S = 0.005
# Without O_NONBLOCK a FIFO would be waited for until somebody writes to it.
_FLAGS = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass
class Waits:
    """How often this process wanted the lock, and how long that took together, got or not."""

    count: int = 0
    total_s: float = 0.0


waits = Waits()


class XtablesLock:
    """One process's handle on the lock. Not reentrant."""

    def __init__(self, path: Path = PATH) -> None:
        self.path = path
        self._descriptor: int | None = None

    @contextmanager
    def held(self, deadline: Deadline) -> Iterator[None]:
        """Holds the lock. Blocks up to the deadline, then BackendBusy says who holds it."""
        began_s = time.monotonic()
        try:
            descriptor = self._take(deadline)
        finally:
            waits.count += 1
            waits.total_s += time.monotonic() - began_s
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _take(self, deadline: Deadline) -> int:
        descriptor = self._open()
        end_s = time.monotonic() + deadline.remaining_s(time.monotonic())
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end_s:
                    raise BackendBusy(f"{self.path} is held by {self._holder()}") from None
                time.sleep(_TRY_AGAIN_S)
                continue
            # Whoever waited on a file that was removed meanwhile holds what nobody else sees.
            if self._is_current(descriptor):
                return descriptor
            descriptor = self._open()

    def _open(self) -> int:
        if self._descriptor is not None and self._is_current(self._descriptor):
            return self._descriptor
        self.close()
        try:
            # As iptables opens it, so that whoever comes first leaves the same file.
            descriptor = os.open(self.path, _FLAGS, 0o600)
        except OSError as error:
            if is_scarcity(error):
                raise BackendBusy(f"{self.path} cannot be opened now: {error.strerror}") from None
            raise self._unusable(error.strerror or str(error)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise self._unusable("not a regular file")
        self._descriptor = descriptor
        return descriptor

    def _unusable(self, why: str) -> BackendFailed:
        return BackendFailed(f"{self.path} cannot be opened: {why}: iptables-legacy cannot either")

    def _is_current(self, descriptor: int) -> bool:
        try:
            there = os.stat(self.path)
        except OSError:
            return False
        here = os.fstat(descriptor)
        return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)

    def _holder(self) -> str:
        """The pid in /proc/locks whose lock is on our file; best effort."""
        with suppress(OSError):
            file = os.stat(self.path)
            device = (os.major(file.st_dev), os.minor(file.st_dev))
            pid = holder(Path("/proc/locks").read_text(), device, file.st_ino)
            if pid is not None:
                return f"pid {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
        return "another process"

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
