"""The daemon's word counts only while the daemon lives."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from snatd.host.status import path_in, read, write
from tests.lab.netns import until


def changed(directory: Path, **changes: object) -> None:
    document: dict[str, Any] = json.loads(path_in(directory).read_bytes())
    path_in(directory).write_text(json.dumps(document | changes))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "run", {"state": "in sync", "odd": "\u2028\udcff"})
    found = read(tmp_path / "run")
    assert found is not None
    assert (found["state"], found["odd"]) == ("in sync", "\u2028\udcff")
    assert (found["schema"], found["pid"]) == (1, os.getpid())
    assert stat.S_IMODE(path_in(tmp_path / "run").stat().st_mode) == 0o644


def test_no_file_is_no_word(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert read(tmp_path / "missing") is None


def test_a_dead_daemons_word_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, {})
    # Above the largest pid that Linux gives.
    changed(tmp_path, pid=2**22 + 1)
    assert read(tmp_path) is None


def test_a_daemon_whose_exit_status_nobody_has_asked_for_is_dead(tmp_path: Path) -> None:
    write(tmp_path, {})
    with subprocess.Popen(["true"]) as child:
        stat_file = Path(f"/proc/{child.pid}/stat")
        until(lambda: stat_file.read_text().rpartition(") ")[2].startswith("Z"), "its end")
        ticks = int(stat_file.read_text().rpartition(")")[2].split()[19])
        changed(tmp_path, pid=child.pid, started_ticks=ticks)
        assert read(tmp_path) is None


def test_a_pid_given_to_another_process_is_another(tmp_path: Path) -> None:
    write(tmp_path, {})
    found = read(tmp_path)
    assert found is not None
    changed(tmp_path, started_ticks=found["started_ticks"] + 1)
    assert read(tmp_path) is None
    changed(tmp_path, pid=1, started_ticks=found["started_ticks"] + 1)
    assert read(tmp_path) is None


def test_another_schema_is_not_understood(tmp_path: Path) -> None:
    write(tmp_path, {})
    changed(tmp_path, schema=2)
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"pid": null, "started_ticks": 1}',
        b'{"pid": "self", "started_ticks": 1}',
        b'{"pid": -1, "started_ticks": 1}',
        b'{"pid": Infinity, "started_ticks": 1}',
        b'{"pid": 1}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_broken_file_is_no_word(content: bytes, tmp_path: Path) -> None:
    path_in(tmp_path).write_bytes(content)
    assert read(tmp_path) is None
