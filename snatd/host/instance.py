"""One daemon per node: the instance lock in runtime_dir."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from snatd.core import locks
from snatd.core.errors import BackendBusy, ConfigError, is_scarcity
from snatd.host.files import make_directory, open_to_others

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class AlreadyRunning(Exception):
    """Another snatd holds the lock."""

    def __init__(self, pid: str, path: Path) -> None:
        super().__init__(f"snatd is already running as pid {pid} (it holds {path})")
        self.pid = pid


def holder(runtime_dir: Path) -> int | None:
    """The pid of who holds the lock, asked of /proc/locks: taking it, even for an instant, would
    keep a daemon from starting. None where nobody does, or nobody who is to be seen from here."""
    try:
        file = _path_in(runtime_dir).stat()
        text = Path("/proc/locks").read_text()
    except OSError:
        return None
    return locks.holder(text, (os.major(file.st_dev), os.minor(file.st_dev)), file.st_ino)


def _path_in(runtime_dir: Path) -> Path:
    return runtime_dir / "snatd.lock"


class Instance:
    """The lock, held from `take` to the end of the process (the kernel releases it)."""

    def __init__(self, runtime_dir: Path) -> None:
        self.path = _path_in(runtime_dir)
        self._descriptor: int | None = None

    def take(self) -> None:
        """Raises AlreadyRunning with the holder's pid, ConfigError where no file can be made or
        others could, BackendBusy where there is no room for it now."""
        try:
            make_directory(self.path.parent)
            if why := open_to_others(self.path.parent):
                raise ConfigError((f"runtime_dir: {why}: others could forge what is in it",))
            # Who may open it may lock it, and so keep snatd from starting.
            descriptor = os.open(self.path, _FLAGS, 0o600)
            os.fchmod(descriptor, 0o600)
        except OSError as error:
            if is_scarcity(error):
                raise BackendBusy(f"runtime_dir: {self.path}: {error.strerror}") from None
            raise ConfigError((f"runtime_dir: {self.path}: {error.strerror}",)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise AlreadyRunning(pid, self.path) from None
        self._descriptor = descriptor
        # The lock counts; the pid is for whoever is refused, and needs room.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def keep(self) -> bool:
        """Takes the lock again if somebody removed its file; True if that was so.

        Where no file can be made any more it stays as it is, and the next call tries again. Raises
        AlreadyRunning where another process took it meanwhile.
        """
        if self._descriptor is None:
            return False
        held = os.fstat(self._descriptor)
        with suppress(OSError):
            there = os.stat(self.path)
            if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino):
                return False
        before = self._descriptor
        try:
            self.take()
        except (BackendBusy, ConfigError):
            return False
        os.close(before)
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
