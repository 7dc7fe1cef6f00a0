"""A file is the old or the new, never half, and nothing is left beside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from snatd.host.files import make_directory, try_out, write_whole


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"old", b"", b"new\0\xff" * 10_000):
        write_whole(path, content, durable=durable)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_mode_is_what_was_asked_for(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o777)
    before = os.umask(0o077)
    try:
        write_whole(path, b"x", mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_anybody_may_look_into_a_directory_that_was_made_again(tmp_path: Path) -> None:
    made, own = tmp_path / "a" / "b", tmp_path / "own"
    own.mkdir(0o700)
    before = os.umask(0o077)
    try:
        make_directory(made)
        make_directory(own)
    finally:
        os.umask(before)
    assert stat.S_IMODE(made.stat().st_mode) == 0o755
    assert stat.S_IMODE(own.stat().st_mode) == 0o700, "somebody's own"


def test_who_has_the_old_one_open_keeps_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_whole(path, b"new and longer")
        assert reader.read() == b"old"


def test_a_symlink_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_bytes(b"precious")
    path.symlink_to(target)
    write_whole(path, b"new")
    assert (target.read_bytes(), path.read_bytes()) == (b"precious", b"new")
    assert not path.is_symlink()


def test_what_a_killed_process_of_the_same_pid_left_is_no_obstacle(tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "file"
    target.write_bytes(b"precious")
    (tmp_path / f".file.snatd-{os.getpid()}").symlink_to(target)
    write_whole(path, b"new")
    assert (target.read_bytes(), path.read_bytes()) == (b"precious", b"new")
    assert names(tmp_path) == ["file", "target"]


def test_without_a_directory_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "file", b"x")


def test_where_it_cannot_be_replaced_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (path / "inside").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="file"):
        write_whole(path, b"x")
    assert names(tmp_path) == ["file"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_to_try_out_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    try_out(path)
    assert names(tmp_path) == []
    path.write_bytes(b"old")
    before = path.stat()
    try_out(path)
    assert names(tmp_path) == ["file"]
    assert (path.stat().st_ino, path.read_bytes()) == (before.st_ino, b"old")
    with pytest.raises(FileNotFoundError):
        try_out(tmp_path / "missing" / "file")
