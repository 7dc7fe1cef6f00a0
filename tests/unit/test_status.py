"""The daemon's word counts only while the daemon lives and answers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snatd.core.word import Life, Word
from snatd.host import status
from snatd.host.instance import Instance
from snatd.host.status import SCHEMA, StatusFile, path_in, write
from tests.lab.netns import until

NOBODY = 2**22 + 1  # above the largest pid that Linux gives


def found(directory: Path) -> Word:
    return StatusFile(directory).word()


def stored(directory: Path) -> dict[str, Any]:
    return dict(json.loads(path_in(directory).read_bytes()))


def changed(directory: Path, **changes: object) -> Word:
    path_in(directory).write_text(json.dumps(stored(directory) | changes))
    return found(directory)


@pytest.fixture(autouse=True)
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing lies in memory, wherever this machine has its temporary files."""
    path = tmp_path / "mountinfo"
    path.write_text("")
    monkeypatch.setattr(status, "_MOUNTS", path)
    return path


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """A folder with this process's word."""
    write(tmp_path, {"state": "in sync"}, longest_silence_s=90)
    return tmp_path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "run", {"state": "in sync", "odd": "\u2028\udcff"}, 90)
    word = found(tmp_path / "run")
    assert (word.life, word.pid) == (Life.ANSWERS, os.getpid())
    assert word.age_s is not None
    assert 0 <= word.age_s < 60
    assert word.document is not None
    assert (word.document["state"], word.document["odd"]) == ("in sync", "\u2028\udcff")
    assert (word.document["schema"], word.document["pid"]) == (SCHEMA, os.getpid())
    assert stat.S_IMODE(path_in(tmp_path / "run").stat().st_mode) == 0o644


def test_no_file_is_no_word(tmp_path: Path) -> None:
    assert found(tmp_path).life is Life.ABSENT
    assert found(tmp_path / "missing").life is Life.ABSENT
    (tmp_path / "file").touch()
    assert found(tmp_path / "file").life is Life.ABSENT


def test_a_dead_daemons_last_word_is_known_as_such(said: Path) -> None:
    word = changed(said, pid=NOBODY)
    assert (word.life, word.pid) == (Life.GONE, NOBODY)
    assert word.document is not None
    assert word.document["state"] == "in sync"


@contextmanager
def child(*command: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, int]]]:
    """A process, and what a status file says of it."""
    with subprocess.Popen(command) as process:
        try:
            ticks = (Path("/proc") / str(process.pid) / "stat").read_text().rpartition(")")[2]
            yield process, {"pid": process.pid, "started_ticks": int(ticks.split()[19])}
        finally:
            process.kill()


def in_state(process: subprocess.Popen[bytes], state: str) -> None:
    stat_file = Path(f"/proc/{process.pid}/stat")
    until(lambda: stat_file.read_text().rpartition(") ")[2].startswith(state), f"state {state}")


def test_a_daemon_whose_exit_status_nobody_has_asked_for_is_dead(said: Path) -> None:
    with child("true") as (process, of):
        in_state(process, "Z")
        assert changed(said, **of).life is Life.GONE


def test_a_stopped_daemon_does_not_answer_however_fresh_its_word_is(said: Path) -> None:
    with child("sleep", "60") as (process, of):
        in_state(process, "S")
        assert changed(said, **of).life is Life.ANSWERS
        process.send_signal(signal.SIGSTOP)
        in_state(process, "T")
        assert found(said).life is Life.STOPPED
        process.send_signal(signal.SIGCONT)
        in_state(process, "S")
        assert found(said).life is Life.ANSWERS


def test_a_pid_given_to_another_process_is_another(said: Path) -> None:
    ticks = stored(said)["started_ticks"]
    assert changed(said, started_ticks=ticks + 1).life is Life.GONE
    assert changed(said, pid=1).life is Life.GONE


def test_a_live_daemon_that_says_nothing_any_more(said: Path) -> None:
    spoke_s = stored(said)["written_monotonic_s"]
    assert changed(said, written_monotonic_s=spoke_s - 60).life is Life.ANSWERS
    word = changed(said, written_monotonic_s=spoke_s - 91)
    assert word.life is Life.SILENT
    assert word.document is not None
    assert changed(said, longest_silence_s=3630).life is Life.ANSWERS


def test_the_nodes_clock_and_its_sleep_make_no_word_older(said: Path) -> None:
    assert changed(said, written_at="2001-01-01T00:00:00.000+00:00").life is Life.ANSWERS
    # Eight hours asleep: the daemon had no time to say anything, yet it was so long ago.
    slept = changed(said, written_boottime_s=stored(said)["written_boottime_s"] - 8 * 3600)
    assert slept.life is Life.ANSWERS
    assert slept.age_s is not None
    assert slept.age_s > 8 * 3600 - 1


def test_in_another_pid_namespace_only_the_age_counts(said: Path) -> None:
    """The numbers of its processes say nothing here, whether or not such a process exists."""
    spoke_s = stored(said)["written_monotonic_s"]
    for pid in (os.getpid(), NOBODY, 1):
        elsewhere = {"pid_namespace": "pid:[1]", "pid": pid}
        assert changed(said, **elsewhere, written_monotonic_s=spoke_s).life is Life.UNSEEN
        late = changed(said, **elsewhere, written_monotonic_s=spoke_s - 91)
        assert late.life is Life.UNSEEN_SILENT
    assert changed(said, pid_namespace=None).life is Life.UNSEEN_SILENT, "unknown is not ours"


def test_under_other_clocks_and_unseen_nothing_can_be_told(said: Path) -> None:
    elsewhere = {"pid_namespace": "pid:[1]"}
    word = changed(said, **elsewhere, boot_id="another")
    assert (word.life, word.age_s) == (Life.ELSEWHERE, None)
    same = stored(said)["boot_id"]
    write(said, {}, 90)
    word = changed(said, **elsewhere, boot_id=same, time_namespace="time:[1]")
    assert (word.life, word.age_s) == (Life.ELSEWHERE, None)


def test_a_container_with_a_boot_id_of_its_own(said: Path) -> None:
    assert changed(said, boot_id="another").life is Life.ANSWERS, "the process is seen"
    assert changed(said, pid=NOBODY).life is Life.GONE, "as after a boot"


def test_what_lies_in_memory_is_of_this_boot(said: Path, mounts: Path) -> None:
    """In systemd-nspawn a unit sees another boot id than the shell from which status is asked."""
    device = said.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    line = "31 23 {} / /run rw,nosuid shared:9 - {} tmpfs rw,size=800000k\n"
    dead = {"boot_id": "another", "pid": NOBODY}
    mounts.write_text(line.format("0:0", "tmpfs") + line.format(number, "ext4"))
    assert changed(said, **dead).age_s is None
    mounts.write_text(line.format("0:0", "ext4") + line.format(number, "tmpfs"))
    word = changed(said, **dead)
    assert word.life is Life.GONE
    assert word.age_s is not None
    assert 0 <= word.age_s < 60


def test_a_daemon_that_has_not_spoken_yet(said: Path) -> None:
    """It holds the lock; the word, if there is any, is of the one before."""
    lock = Instance(said)
    lock.take()
    assert found(said).life is Life.ANSWERS
    word = changed(said, pid=NOBODY)
    assert (word.life, word.pid) == (Life.STARTING, os.getpid())
    path_in(said).unlink()
    assert found(said).life is Life.STARTING
    lock.release()
    assert found(said).life is Life.ABSENT


def test_another_schema_is_not_understood_and_not_dead(said: Path) -> None:
    for schema in (SCHEMA - 1, SCHEMA + 1):
        word = changed(said, schema=schema)
        assert (word.life, word.document) == (Life.UNREADABLE, None)
        assert f"of schema {schema}, and this snatd reads {SCHEMA}" in word.why
    # Schema 1 did not say in which namespace it was written.
    assert changed(said, schema=1, pid_namespace=None, pid=NOBODY).life is Life.UNREADABLE


def test_another_schema_of_a_daemon_that_is_dead(said: Path) -> None:
    word = changed(said, schema=SCHEMA + 1, pid=NOBODY)
    assert (word.life, word.document) == (Life.GONE, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"schema": 2, "pid": null, "started_ticks": 1}',
        b'{"schema": 2, "pid": "self", "started_ticks": 1}',
        b'{"schema": 2, "pid": true, "started_ticks": 1}',
        b'{"schema": 2, "pid": Infinity, "started_ticks": 1}',
        b'{"schema": 2, "pid": 1}',
        b'{"pid": 1, "started_ticks": 1}',
        b"\xff",
        b"[" * 100_000,
        b" " * (16 << 20) + b"{}",
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_broken_file_is_said_to_be_broken(content: bytes, tmp_path: Path) -> None:
    path_in(tmp_path).write_bytes(content)
    word = found(tmp_path)
    assert word.life is Life.UNREADABLE
    assert word.why


@pytest.mark.parametrize(
    "part",
    [
        {"longest_silence_s": None},
        {"longest_silence_s": "long"},
        {"written_monotonic_s": {}},
        {"written_boottime_s": None},
    ],
)
def test_half_a_file_of_the_right_schema(part: dict[str, Any], said: Path) -> None:
    assert changed(said, **part).life is Life.UNREADABLE


@pytest.mark.parametrize("pid", [-1, 0, 2**70])
def test_a_pid_that_is_none_is_dead_and_signals_nobody(said: Path, pid: int) -> None:
    assert changed(said, pid=pid).life is Life.GONE


def test_neither_a_fifo_nor_a_directory_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(path_in(tmp_path))
    assert found(tmp_path).why == f"{path_in(tmp_path)}: not a regular file"
    path_in(tmp_path).unlink()
    path_in(tmp_path).mkdir()
    assert found(tmp_path).why == f"{path_in(tmp_path)}: not a regular file"


def test_the_file_is_read_again_when_it_has_changed(said: Path) -> None:
    file = StatusFile(said)
    first, identity = file.word().document, file.identity
    assert file.word().document is first
    write(said, {"state": "drift"}, 90)
    again = file.word().document
    assert again is not None
    assert again["state"] == "drift"
    assert file.identity != identity
    path_in(said).unlink()
    assert file.word().life is Life.ABSENT
