"""The files that iptables.service and netfilter-persistent load: found, and replaced with care.

Does not know what is in them; what to make of one, and whether that would load, is given to it.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from snatd.core.errors import BackendBusy, BackendError, RuleError
from snatd.core.model import Family
from snatd.core.saved import Edited
from snatd.host import files

# A node on which whole-table saves came back twice has hundreds of thousands of rules. What is
# larger than this no test would finish in time.
LARGEST_FILE_BYTES = 16 << 20

BACKUP_SUFFIX = ".snatd-backup"

_AUTO = (
    (Family.V4, Path("/etc/sysconfig/iptables")),
    (Family.V6, Path("/etc/sysconfig/ip6tables")),
    (Family.V4, Path("/etc/iptables/rules.v4")),
    (Family.V6, Path("/etc/iptables/rules.v6")),
)


@dataclass(frozen=True)
class SavedFile:
    """A saved file and the family whose `iptables-restore` loads it."""

    family: Family
    path: Path


class State(enum.Enum):
    """What came of a look at a file; the value is for status and JSON."""

    IN_LINE = "in line"
    WRITTEN = "written"
    WOULD_CHANGE = "would change"
    LEFT_ALONE = "left alone"
    NOT_WRITTEN = "not written"


@dataclass(frozen=True)
class Outcome:
    """A look at a file. NOT_WRITTEN may pass by itself, LEFT_ALONE needs a person."""

    file: SavedFile
    state: State
    why: str = ""
    edited: Edited = field(default_factory=lambda: Edited(b""))


def candidates(setting: str) -> tuple[SavedFile, ...]:
    """Where files may be by the key `saved_rules`. Of a path, its name tells the family."""
    if setting == "off":
        return ()
    if setting == "auto":
        return tuple(SavedFile(family, path) for family, path in _AUTO)
    path = Path(setting)
    six = path.name.endswith(("v6", "ip6tables"))
    return (SavedFile(Family.V6 if six else Family.V4, path),)


def find(setting: str) -> tuple[SavedFile, ...]:
    """The files to look after: those that are there, and a configured path in any case."""
    return tuple(
        one for one in candidates(setting) if setting != "auto" or os.path.lexists(one.path)
    )


def signature(file: SavedFile) -> tuple[int, ...]:
    """Differs when a file was written, replaced, made or removed, or its owner changed."""
    try:
        status = os.stat(file.path)
    except OSError as error:
        return (error.errno or 0,)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def rewrite(
    file: SavedFile,
    edit: Callable[[bytes], Edited],
    test: Callable[[bytes], None],
    keep: Callable[[Edited], None],
    *,
    write: bool = True,
    old_must_load: bool = True,
    owner: int = 0,
) -> Outcome:
    """Edits a file if that changes it, and both the old and the new would load.

    `test` raises BackendError where a content would not; `keep` hears of the edit before it is
    written. Raises nothing: what went wrong is in the outcome.
    """

    def outcome(state: State, why: object = "", edited: Edited | None = None) -> Outcome:
        return Outcome(file, state, str(why), edited or Edited(b""))

    try:
        old = files.read_original(file.path, LARGEST_FILE_BYTES)
        with suppress(OSError):  # of a read-only directory nothing can be removed
            files.sweep(old.path)
            files.sweep(_backup(old.path))
        try:
            edited = edit(old.content)
        except RuleError:
            test(old.content)  # the tool's own words come first
            raise
        if edited.content == old.content:
            return outcome(State.IN_LINE, edited=edited)
        if old.status.st_uid != owner:
            return outcome(State.LEFT_ALONE, f"it belongs to uid {old.status.st_uid}, not to root")
        if old_must_load:
            test(old.content)
        test(edited.content)
        if not write:
            return outcome(State.WOULD_CHANGE, edited=edited)
        keep(edited)
        if not _backup(old.path).exists():
            files.write_whole(_backup(old.path), old.content, durable=True, like=old)
        files.write_whole(old.path, edited.content, durable=True, like=old)
    except FileNotFoundError:
        return outcome(
            State.LEFT_ALONE, "no such file; `iptables-save` makes one, snatd does not invent it"
        )
    except (BackendBusy, files.FileChanged) as error:
        return outcome(State.NOT_WRITTEN, error)
    except (BackendError, RuleError, files.FileRefused) as error:
        return outcome(State.LEFT_ALONE, error)
    except OSError as error:
        # The unit's sandbox has the directories that there were at its start.
        newer = ", or made after snatd started: systemctl restart snatd"
        return outcome(State.NOT_WRITTEN, f"{error.strerror}{newer * (error.errno == errno.EROFS)}")
    return outcome(State.WRITTEN, edited=edited)


def drop_backup(path: Path) -> Path | None:
    """Removes the backup of a file that is again what it was, byte for byte. The path of one that
    stays. Raises nothing."""
    real = Path(os.path.realpath(path))
    backup = _backup(real)
    try:
        then = files.read_original(backup, LARGEST_FILE_BYTES)
        if files.read_original(real, LARGEST_FILE_BYTES).content == then.content:
            backup.unlink()
    except (OSError, files.FileRefused):
        pass
    return backup if os.path.lexists(backup) else None


def _backup(path: Path) -> Path:
    return path.with_name(f"{path.name}{BACKUP_SUFFIX}")
