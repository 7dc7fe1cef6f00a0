"""Files that are the old or the new, never half: the one way in which snatd writes any."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snatd.core.errors import SnatdError

# The kernel computes these from the content.
_NOT_COPIED = ("security.ima", "security.evm")


class FileRefused(SnatdError):
    """Not a file that snatd reads, and why."""


class FileChanged(SnatdError):
    """Somebody wrote a file between its read and its replacement; it was not replaced."""


@dataclass(frozen=True)
class Original:
    """A file as it was read: to be replaced by one of the same owner, mode, label and attributes,
    if it is still that one. `path` has no symlinks."""

    path: Path
    content: bytes
    status: os.stat_result
    attributes: tuple[tuple[str, bytes], ...] = ()

    def is_still_there(self) -> bool:
        """Whether nobody wrote, replaced or removed it since. Raises OSError."""
        try:
            return _identity(os.lstat(self.path)) == _identity(self.status)
        except FileNotFoundError:
            return False


def _identity(status: os.stat_result) -> tuple[int, ...]:
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return (status.st_dev, status.st_ino, status.st_size, *times)


def open_regular(path: Path, *, follow: bool = True) -> int | None:
    """A descriptor to read from, None where there is something else than a regular file.

    Never blocks: O_NONBLOCK opens a FIFO at once instead of waiting for a writer. Raises OSError,
    without `follow` also where there is a symlink.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return None


def read_bounded(path: Path, largest_bytes: int, *, follow: bool = True) -> bytes:
    """A file's content. Never blocks. Raises OSError, FileRefused."""
    descriptor = open_regular(path, follow=follow)
    if descriptor is None:
        raise FileRefused("not a regular file")
    with open(descriptor, "rb") as file:
        content = file.read(largest_bytes + 1)
    if len(content) > largest_bytes:
        raise FileRefused(f"larger than {largest_bytes >> 10} KiB")
    return content


def open_to_others(path: Path) -> str:
    """Why others than root and this process's user decide what is at a path: by its owner or mode,
    or by those of a directory or symlink on the way to it. Empty where nobody else does.

    Raises OSError where there is nothing.
    """
    trusted = {0, os.geteuid()}
    todo, seen = [Path(os.path.abspath(path))], set[Path]()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        todo.append(one.parent)
        status = os.lstat(one)
        if status.st_uid not in trusted:
            return f"{one} belongs to uid {status.st_uid}"
        if stat.S_ISLNK(status.st_mode):
            todo.append(one.parent / os.readlink(one))
        # In a sticky directory nobody removes or renames what is another's.
        elif status.st_mode & _others(status) and not _is_sticky(status):
            return f"{one} can be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _others(status: os.stat_result) -> int:
    return stat.S_IWOTH | (stat.S_IWGRP if status.st_gid else 0)


def _is_sticky(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and bool(status.st_mode & stat.S_ISVTX)


def read_original(path: Path, largest_bytes: int) -> Original:
    """A file behind whatever symlinks. Raises OSError, FileRefused."""
    real = Path(os.path.realpath(path))
    descriptor = open_regular(real)
    if descriptor is None:
        raise FileRefused("not a regular file")
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        content = file.read(largest_bytes + 1)
        if len(content) > largest_bytes:
            raise FileRefused(f"larger than {largest_bytes >> 20} MiB")
        return Original(real, content, status, _attributes(descriptor))


def _attributes(descriptor: int) -> tuple[tuple[str, bytes], ...]:
    try:
        names = [name for name in os.listxattr(descriptor) if name not in _NOT_COPIED]
        return tuple((name, os.getxattr(descriptor, name)) for name in names)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        return ()


def write_whole(
    path: Path,
    content: bytes,
    mode: int = 0o644,
    *,
    durable: bool = False,
    like: Original | None = None,
) -> None:
    """Replaces a file by rename. Raises OSError and leaves the old one where it cannot.

    `durable` also waits for the disk (fsync of file and directory), for what must outlive a power
    cut. A symlink at the path is replaced, not followed. `like`: with its owner, mode and
    attributes. If the path is that file's own, it is replaced only if it is still as it was read,
    else FileChanged is raised; if it is another, a file that is there already stays.
    """
    temporary, descriptor = _open_temporary(path, 0o600 if like else mode)
    try:
        with open(descriptor, "wb") as file:
            if like is None:
                os.fchmod(descriptor, mode)
            else:
                _dress(descriptor, like)
            file.write(content)
            if durable:
                file.flush()
                os.fsync(descriptor)
        _put(temporary, path, like)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _open_temporary(path: Path, mode: int) -> tuple[Path, int]:
    """A new file beside the one that it will replace. Raises OSError."""
    temporary = path.with_name(f"{_temporary_prefix(path)}{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        temporary.unlink()
    return temporary, os.open(temporary, flags, mode)


def make_directory(path: Path) -> None:
    """One that anybody may look into, whatever the umask is (snatd.service has 077); one that is
    there stays as it is. Raises OSError."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o755)


def try_out(path: Path) -> None:
    """Raises OSError where `write_whole` can make no file; leaves what is there as it is."""
    temporary, descriptor = _open_temporary(path, 0o600)
    os.close(descriptor)
    temporary.unlink()


def _put(temporary: Path, path: Path, like: Original | None) -> None:
    if like is not None and path != like.path:
        with suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()
        return
    if like is not None and not like.is_still_there():
        raise FileChanged("another program wrote it at the same moment")
    os.rename(temporary, path)


def _dress(descriptor: int, like: Original) -> None:
    """Owner, mode and attributes, each only where it differs: a service may not be allowed to set
    what is right already."""
    is_now = os.fstat(descriptor)
    if (is_now.st_uid, is_now.st_gid) != (like.status.st_uid, like.status.st_gid):
        os.fchown(descriptor, like.status.st_uid, like.status.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(like.status.st_mode))
    given = dict(_attributes(descriptor))
    for name, value in like.attributes:
        if given.get(name) != value:
            os.setxattr(descriptor, name, value)


def sweep(path: Path) -> None:
    """Removes what a killed process left beside a file. Raises OSError."""
    prefix = _temporary_prefix(path)
    for name in os.listdir(path.parent):
        pid = name.removeprefix(prefix)
        if name.startswith(prefix) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            path.with_name(name).unlink(missing_ok=True)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}.snatd-"
