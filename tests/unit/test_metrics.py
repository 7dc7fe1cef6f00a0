"""Metrics as text, and the file that they go into."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from snatd.core.errors import ConfigError
from snatd.host.metrics import Metric, MetricsFile, Sample, render


def metric(*samples: Sample) -> Metric:
    return Metric("gauge", "x", "What it is.", samples)


def test_the_text() -> None:
    summary = Metric(
        "summary", "y_seconds", "How long.", (Sample(0.25, (), "_sum"), Sample(2, (), "_count"))
    )
    two = metric(Sample(1, (("a", "b"), ("c", "d"))), Sample(2.5, (("a", "e"),)))
    assert render([two, summary]).decode() == (
        "# HELP snatd_x What it is.\n"
        "# TYPE snatd_x gauge\n"
        'snatd_x{a="b",c="d"} 1\n'
        'snatd_x{a="e"} 2.5\n'
        "# HELP snatd_y_seconds How long.\n"
        "# TYPE snatd_y_seconds summary\n"
        "snatd_y_seconds_sum 0.25\n"
        "snatd_y_seconds_count 2\n"
    )


def test_what_has_no_sample_is_left_out() -> None:
    assert render([metric()]) == b""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ('a"b', r"a\"b"),
        ("a\\b", r"a\\b"),
        ("a\nb", r"a\nb"),
        ('\\"', r"\\\""),
        ("\\n", r"\\n"),
        ('x"} 1\nsnatd_in_sync 1\ny{z="', r"x\"} 1\nsnatd_in_sync 1\ny{z=\""),
        ("\udcff", "?"),
        ("café", "café"),
        ("a b\t\r", "a b\t\r"),
        ("", ""),
    ],
)
def test_a_hostile_label_stays_a_label(value: str, shown: str) -> None:
    text = render([metric(Sample(1, (("who", value),)))]).decode()
    assert text.split("\n")[2:] == [f'snatd_x{{who="{shown}"}} 1', ""]


def written(path: Path) -> str:
    return path.read_text().splitlines()[-1]


def offer(file: MetricsFile, now_s: float, value: float) -> None:
    file.offer(now_s, lambda: [metric(Sample(value))])


def test_it_is_written_and_not_twice_in_a_second(tmp_path: Path) -> None:
    path = tmp_path / "snatd.prom"
    file = MetricsFile(path)
    file.check()
    assert os.listdir(tmp_path) == []
    offer(file, 100.0, 1)
    assert (written(path), file.due_s) == ("snatd_x 1", None)
    for number in range(2, 50):
        offer(file, 100.0 + number / 50, number)
    assert (written(path), file.due_s) == ("snatd_x 1", 101.0)
    assert [file.is_due(now_s) for now_s in (100.9, 101.0, 102.0)] == [False, True, True]
    offer(file, 101.0, 50)
    assert (written(path), file.due_s) == ("snatd_x 50", None)
    offer(file, 161.0, 51)
    assert (written(path), file.due_s) == ("snatd_x 51", None)
    assert not file.is_due(1e9)
    assert os.listdir(tmp_path) == ["snatd.prom"]


def test_everybody_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "snatd.prom"
    before = os.umask(0o077)
    try:
        offer(MetricsFile(path), 0, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_without_a_path_nothing_is_asked_and_nothing_written() -> None:
    def never() -> list[Metric]:
        raise AssertionError("asked")

    file = MetricsFile(None)
    file.check()
    file.offer(0, never)
    file.offer(0, never)
    file.remove()
    assert (file.due_s, file.problem) == (None, "")


def test_what_goes_wrong_later_is_kept_until_it_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    file = MetricsFile(folder / "snatd.prom")
    file.check()
    folder.rmdir()
    offer(file, 0, 1)
    assert file.problem == f"{folder}/snatd.prom: No such file or directory"
    folder.mkdir()
    offer(file, 0.5, 2)
    assert file.problem
    offer(file, 1, 2)
    assert (file.problem, written(folder / "snatd.prom")) == ("", "snatd_x 2")


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        MetricsFile(path).check()
    (complaint,) = caught.value.complaints
    return complaint


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "missing"
    complaint = refused(folder / "snatd.prom")
    assert complaint == (
        f"metrics_textfile: {folder}/snatd.prom cannot be written: No such file or directory: "
        f"make the directory {folder}, or install the node exporter that reads it; snatd.service "
        "may write there only after `systemctl edit snatd` with the lines `[Service]` and "
        f"`ReadWritePaths={folder}`, and `systemctl restart snatd`"
    )


def test_a_file_as_its_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(tmp_path / "file" / "snatd.prom")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_directory_that_may_not_be_written_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    real = os.open

    def denied(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    complaint = refused(tmp_path / "snatd.prom")
    assert os.strerror(number) in complaint
    assert f"`ReadWritePaths={tmp_path}`" in complaint
    assert ("root must own" in complaint) is (number == errno.EACCES)


@pytest.mark.parametrize("kind", ["directory", "symlink", "dangling", "fifo"])
def test_what_is_no_regular_file_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "snatd.prom", tmp_path / "target"
    target.write_text("precious")
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target if kind == "symlink" else tmp_path / "nowhere")
    assert "something else than a regular file" in refused(path)
    MetricsFile(path).remove()
    assert os.path.lexists(path)
    assert target.read_text() == "precious"


def test_a_check_leaves_the_old_file_and_takes_away_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "snatd.prom"
    path.write_text("old")
    (tmp_path / f".snatd.prom.snatd-{2**22 + 1}").write_text("half")  # no such pid
    (tmp_path / f".snatd.prom.snatd-{os.getpid()}").write_text("half")
    MetricsFile(path).check()
    assert (os.listdir(tmp_path), path.read_text()) == (["snatd.prom"], "old")


def test_the_name_of_what_is_half_written_is_none_that_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names: list[str] = []
    real = os.rename

    def renamed(old: Path, new: Path) -> None:
        names.append(old.name)
        real(old, new)

    monkeypatch.setattr(os, "rename", renamed)
    offer(MetricsFile(tmp_path / "snatd.prom"), 0, 1)
    assert len(names) == 1
    assert not names[0].endswith(".prom")


def test_remove(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "snatd.prom")
    file.remove()
    offer(file, 0, 1)
    file.remove()
    assert os.listdir(tmp_path) == []


def test_a_path_is_one_line_of_status(tmp_path: Path) -> None:
    complaint = refused(tmp_path / "a\nMAINPID=1\nb" / "snatd.prom")
    assert re.fullmatch("[ -~]*", complaint)
