"""The daemon's own word: the status file, written after each pass, read by `snatd status`.

Who reads it learns as well whether it still counts. What it means is not known here.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from snatd.core.word import Life, Process, Word, judge
from snatd.host.files import make_directory, open_regular, write_whole
from snatd.host.instance import holder

SCHEMA = 2
_LARGEST_BYTES = 16 << 20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOUNTS = Path("/proc/self/mountinfo")


def path_in(runtime_dir: Path) -> Path:
    return runtime_dir / "status.json"


def write(runtime_dir: Path, document: dict[str, Any], longest_silence_s: float) -> None:
    """Replaces the file; anybody may read it. Raises OSError, and then there is none, if possible.

    `longest_silence_s`: until then another word comes, or something is wrong with this process.
    """
    stamp = {"schema": SCHEMA, **_myself(), **_clocks(), "longest_silence_s": longest_silence_s}
    content = json.dumps(stamp | document, indent=1) + "\n"
    path = path_in(runtime_dir)
    make_directory(runtime_dir)
    try:
        write_whole(path, content.encode())
    except OSError:
        # The word before is no longer what we would say: none is better. And it leaves its room.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        write_whole(path, content.encode())


@cache
def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "started_ticks": _state_and_ticks(pid)[1], **_here()}


def _here() -> dict[str, str | None]:
    """Which kernel this is, and which of its processes and clocks are seen; None: not known."""
    try:
        boot_id: str | None = _BOOT_ID.read_text().strip()
    except OSError:
        boot_id = None
    return {
        "boot_id": boot_id,
        "pid_namespace": _namespace("pid"),
        "time_namespace": _namespace("time"),
    }


def _namespace(kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return None


def _clocks() -> dict[str, float]:
    """Both go on evenly whoever sets the time. The first stands still while the node sleeps, as the
    daemon does; the second does not."""
    return {
        "written_monotonic_s": round(time.monotonic(), 3),
        "written_boottime_s": round(time.clock_gettime(time.CLOCK_BOOTTIME), 3),
    }


class StatusFile:
    """The file, for one look or many: it is read when it has changed."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self.path = path_in(runtime_dir)
        self.identity: tuple[int, ...] = ()
        self._found: dict[str, Any] | str = ""

    def word(self) -> Word:
        """What it says, and whether that counts now. Raises nothing, and never blocks."""
        try:
            self._read()
        except (FileNotFoundError, NotADirectoryError):
            self.identity = ()
            return self._nobodys(Word(Life.ABSENT, why=str(self.path)))
        except OSError as error:
            return Word(Life.UNREADABLE, why=f"{self.path}: {error.strerror}")
        if isinstance(self._found, str):
            return Word(Life.UNREADABLE, why=f"{self.path}: {self._found}")
        word = _word(self._found, is_of_this_boot=_is_in_memory(self.path))
        return self._nobodys(word) if word.life is Life.GONE else word

    def _read(self) -> None:
        status = self.path.stat()
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)
        if identity != self.identity:
            self._found = _document(self.path)
            self.identity = identity

    def _nobodys(self, word: Word) -> Word:
        """A word whose daemon does not run, unless another one is about to say its first."""
        pid = holder(self._runtime_dir)
        return word if pid is None else Word(Life.STARTING, word.document, word.age_s, pid)


def _document(path: Path) -> dict[str, Any] | str:
    """The file's content, or what is wrong with it. Raises OSError."""
    descriptor = open_regular(path)
    if descriptor is None:
        return "not a regular file"
    with open(descriptor, "rb") as file:
        content = file.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:
        return f"larger than {_LARGEST_BYTES >> 20} MiB"
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return "not JSON"
    numbers = ("schema", "pid", "started_ticks")
    if not isinstance(document, dict) or not all(type(document.get(one)) is int for one in numbers):
        return "not a status file of snatd's"
    return document


def _is_in_memory(path: Path) -> bool:
    """Whether no boot leaves the file behind."""
    try:
        device = path.stat().st_dev
        mounts = _MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(
        one.split(" ", 3)[2] == number and one.partition(" - ")[2].startswith("tmpfs ")
        for one in mounts
    )


def _word(document: dict[str, Any], *, is_of_this_boot: bool) -> Word:
    pid, here = document["pid"], _here()
    process = Process.UNSEEN
    if here["pid_namespace"] is not None and here["pid_namespace"] == document.get("pid_namespace"):
        # In another time namespace the same start has another time.
        same_times = here["time_namespace"] == document.get("time_namespace")
        process = _look_at(pid, document["started_ticks"]) if same_times else _ask_for(pid)
    if document["schema"] != SCHEMA:
        why = f"of schema {document['schema']}, and this snatd reads {SCHEMA}"
        life = Life.GONE if process is Process.GONE else Life.UNREADABLE
        return Word(life, pid=pid, why=f"{why}: snatd was updated and not restarted, or put back")
    try:
        # A container has a boot id of its own, and its units see the kernel's (systemd-nspawn 252).
        # Whose process is seen is on our kernel, and so is what lies in memory.
        same_boot = here["boot_id"] is not None and here["boot_id"] == document["boot_id"]
        same_boot |= is_of_this_boot or process in (Process.RUNS, Process.STOPPED)
        same_clocks = same_boot and here["time_namespace"] == document["time_namespace"]
        silent_s, age_s = _silence_and_age(document) if same_clocks else (None, None)
        life = judge(process, silent_s, document["longest_silence_s"])
    except (KeyError, TypeError):
        return Word(Life.UNREADABLE, pid=pid, why="not a whole status file of snatd's")
    return Word(life, document, age_s, pid)


def _silence_and_age(document: dict[str, Any]) -> tuple[float, float]:
    """How long the daemon could have said something else, and how long ago it spoke. Raises
    KeyError, TypeError."""
    clocks = _clocks()
    return (
        clocks["written_monotonic_s"] - document["written_monotonic_s"],
        clocks["written_boottime_s"] - document["written_boottime_s"],
    )


def _look_at(pid: int, started_ticks: int) -> Process:
    """A pid may have been given to another process since; with its start time it is the one."""
    try:
        state, ticks = _state_and_ticks(pid)
    except OSError:
        return _ask_for(pid)
    if ticks != started_ticks or state in "ZX":
        return Process.GONE
    return Process.STOPPED if state == "T" else Process.RUNS


def _state_and_ticks(pid: int) -> tuple[str, int]:
    """proc(5): fields 3 and 22 of stat, the latter in ticks since boot. The name in field 2 may
    hold anything. Raises OSError where there is no such process, or it is hidden."""
    words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return words[0], int(words[19])


def _ask_for(pid: int) -> Process:
    """What /proc does not show may be hidden from us (hidepid=). Signal 0 is none; it only asks."""
    try:
        if pid > 0:
            os.kill(pid, 0)
            return Process.UNSEEN
    except PermissionError:
        return Process.UNSEEN
    except (ProcessLookupError, OverflowError):
        pass
    return Process.GONE
