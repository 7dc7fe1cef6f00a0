"""Saved files are found, and replaced by one like them, or left as they are and it is said why."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from snatd.core.errors import BackendBusy, BackendFailed, RuleError
from snatd.core.saved import Edited
from snatd.host.saved_rules import (
    Outcome,
    SavedFile,
    State,
    drop_backup,
    find,
    rewrite,
    signature,
)
from tests.fakes import V4, V6

Test = Callable[[bytes], None]


def fine(_: bytes) -> None:
    """A content that would load."""


def refusing(word: bytes, error: Exception) -> Test:
    def test(content: bytes) -> None:
        if word in content:
            raise error

    return test


def edit(content: bytes) -> Edited:
    return Edited(content.replace(b"old", b"new"))


def done(
    path: Path, test: Test = fine, change: Callable[[bytes], Edited] = edit, **how: bool
) -> Outcome:
    return rewrite(SavedFile(V4, path), change, test, lambda _: None, owner=os.getuid(), **how)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rules.v4"
    path.write_bytes(b"old rules\n")
    path.chmod(0o640)
    return path


def beside(path: Path) -> list[str]:
    return sorted(one for one in os.listdir(path.parent) if one != path.name)


def test_it_is_replaced_by_one_like_it(path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert done(path).state is State.WRITTEN
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new rules\n"
    backup = path.with_name("rules.v4.snatd-backup")
    assert backup.read_bytes() == b"old rules\n"
    for one in (path, backup):
        assert stat.S_IMODE(one.stat().st_mode) == 0o640
        assert one.stat().st_nlink == 1
    assert beside(path) == [backup.name]
    assert done(path).state is State.IN_LINE


def test_the_backup_is_the_first_one_for_ever(path: Path) -> None:
    done(path)
    path.write_bytes(b"old again\n")
    assert done(path).state is State.WRITTEN
    assert path.with_name("rules.v4.snatd-backup").read_bytes() == b"old rules\n"


def test_a_symlink_stays_and_the_real_file_is_replaced(path: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    link = tmp_path / "a" / "link"
    link.symlink_to("../rules.v4")
    assert done(link).state is State.WRITTEN
    assert link.is_symlink()
    assert path.read_bytes() == b"new rules\n"
    assert beside(path) == ["a", "rules.v4.snatd-backup"]


def test_attributes_are_kept(path: Path) -> None:
    os.setxattr(path, "user.note", b"\0kept")
    done(path)
    assert os.getxattr(path, "user.note") == b"\0kept"
    assert os.getxattr(path.with_name("rules.v4.snatd-backup"), "user.note") == b"\0kept"


def writes(path: Path) -> None:
    path.write_bytes(b"somebody else's\n")


def writes_the_same_size(path: Path) -> None:
    path.write_bytes(b"odd rules\n")


def replaces(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"old rules\n")
    other.rename(path)


def removes(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("rival", [writes, writes_the_same_size, replaces, removes])
def test_what_somebody_wrote_meanwhile_is_not_overwritten(
    path: Path, rival: Callable[[Path], None]
) -> None:
    after: list[bytes] = []

    def test(content: bytes) -> None:
        if b"new" in content:
            rival(path)
            after.append(path.read_bytes() if path.exists() else b"")

    outcome = done(path, test)
    assert (outcome.state, outcome.why) == (
        State.NOT_WRITTEN,
        "another program wrote it at the same moment",
    )
    assert (path.read_bytes() if path.exists() else b"") == after[0]
    assert beside(path) == ["rules.v4.snatd-backup"]


@pytest.mark.parametrize(
    ("word", "error", "state"),
    [
        (b"old", BackendFailed("line 3"), State.LEFT_ALONE),
        (b"new", BackendFailed("line 3"), State.LEFT_ALONE),
        (b"old", BackendBusy("line 3"), State.NOT_WRITTEN),
    ],
)
def test_what_would_not_load_is_left_alone(
    path: Path, word: bytes, error: Exception, state: State
) -> None:
    outcome = done(path, refusing(word, error))
    assert (outcome.state, outcome.why) == (state, "line 3")
    assert path.read_bytes() == b"old rules\n"
    assert beside(path) == []


def test_a_whole_save_may_replace_what_does_not_load(path: Path) -> None:
    test = refusing(b"old", BackendFailed("line 3"))
    assert done(path, test, old_must_load=False).state is State.WRITTEN


def test_the_tools_word_comes_before_ours(path: Path) -> None:
    def change(_: bytes) -> Edited:
        raise RuleError("ours")

    assert done(path, fine, change).why == "ours"
    assert done(path, refusing(b"old", BackendFailed("its")), change).why == "its"


def test_somebody_elses_file_is_left_alone(path: Path) -> None:
    outcome = rewrite(SavedFile(V4, path), edit, fine, lambda _: None, owner=os.getuid() + 1)
    assert outcome.state is State.LEFT_ALONE
    assert "not to root" in outcome.why
    assert path.read_bytes() == b"old rules\n"


def test_what_is_no_file(tmp_path: Path) -> None:
    fifo, loop, large = tmp_path / "fifo", tmp_path / "loop", tmp_path / "large"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    with large.open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert done(fifo).why == done(tmp_path).why == "not a regular file"
    assert done(large).why == "larger than 16 MiB"
    assert done(loop).state is State.NOT_WRITTEN
    assert done(tmp_path / "missing").state is State.LEFT_ALONE


def test_not_to_write_writes_nothing(path: Path) -> None:
    assert done(path, write=False).state is State.WOULD_CHANGE
    assert (path.read_bytes(), beside(path)) == (b"old rules\n", [])


def test_what_is_to_be_kept_is_kept_before_the_write(path: Path) -> None:
    seen: list[bytes] = []
    rewrite(
        SavedFile(V4, path),
        edit,
        fine,
        lambda _: seen.append(path.read_bytes()),
        owner=os.getuid(),
    )
    assert seen == [b"old rules\n"]


def test_only_a_dead_process_leaves_something_over(path: Path) -> None:
    dead, alive = ".rules.v4.snatd-4194305", f".rules.v4.snatd-{os.getppid()}"
    for name in (dead, alive, ".rules.v4.20260101", ".rules.v4.snatd-note"):
        (path.parent / name).touch()
    done(path, write=False)
    assert beside(path) == sorted([alive, ".rules.v4.20260101", ".rules.v4.snatd-note"])


def test_a_signature_tells_of_every_change(path: Path) -> None:
    file = SavedFile(V4, path)
    seen = [signature(file)]
    for rival in (writes, replaces, removes):
        rival(path)
        assert signature(file) not in seen
        seen.append(signature(file))


def test_the_files_of_a_setting(tmp_path: Path) -> None:
    assert find("off") == ()
    for name, family in (
        ("rules.v6", V6),
        ("ip6tables", V6),
        ("rules.v4", V4),
        ("iptables", V4),
        ("x", V4),
    ):
        assert find(str(tmp_path / name)) == (SavedFile(family, tmp_path / name),)


def test_a_backup_goes_only_if_its_file_says_the_same(path: Path) -> None:
    backup = path.with_name("rules.v4.snatd-backup")
    assert drop_backup(path) is None
    backup.write_bytes(b"other\n")
    assert drop_backup(path) == backup
    link = path.with_name("link")
    link.symlink_to(path)
    path.write_bytes(b"other\n")
    assert drop_backup(link) is None
    assert not backup.exists()
    # Whatever else may stand there is neither followed nor waited for.
    for make in (os.mkfifo, os.mkdir, lambda at: os.symlink("/nowhere", at)):
        make(backup)
        assert drop_backup(path) == backup
        backup.rmdir() if backup.is_dir() else backup.unlink()
    backup.write_bytes(b"other\n")
    path.unlink()
    assert drop_backup(path) == backup
