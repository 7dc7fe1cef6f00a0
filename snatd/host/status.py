"""The daemon's own word: the status file, written after each pass, read by `snatd status`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from snatd.host.files import write_whole

SCHEMA = 1


def path_in(runtime_dir: Path) -> Path:
    return runtime_dir / "status.json"


def write(runtime_dir: Path, document: dict[str, Any]) -> None:
    """Replaces the file; anybody may read it. Raises OSError."""
    stamped = {"schema": SCHEMA, "pid": os.getpid(), "started_ticks": _started_ticks(os.getpid())}
    content = json.dumps(stamped | document, indent=1) + "\n"
    runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    write_whole(path_in(runtime_dir), content.encode())


def read(runtime_dir: Path) -> dict[str, Any] | None:
    """The word of a daemon that is alive, None where there is none.

    A pid alone may have been given to another process since; with the start time it is the one.
    """
    try:
        document: dict[str, Any] = json.loads(path_in(runtime_dir).read_bytes())
        alive = _started_ticks(document["pid"]) == document["started_ticks"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return document if alive and document.get("schema") == SCHEMA else None


def _started_ticks(pid: int) -> int:
    """proc(5): field 22 of stat, ticks since boot. The name in field 2 may hold anything.

    Raises OSError where there is no such process, or only its remains.
    """
    stat = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    if stat[0] in "ZX":
        raise ProcessLookupError(f"{pid} has ended, and nobody has asked for its exit status yet")
    return int(stat[19])
