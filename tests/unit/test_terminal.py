"""What reaches a terminal: harmless, coloured where it is wanted, and put back as it was."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from snatd.host.status import path_in, write
from snatd.host.terminal import can_print, cut, print_lines, safe
from tests.lab.netns import until
from tests.unit.test_told import in_sync

SNATD = str(Path(sys.executable).with_name("snatd"))
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"


def stream(encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def test_what_a_terminal_obeys_is_shown_and_not_done() -> None:
    assert (
        safe("\x1b[2J\r\n\u202e\udcff\u00e9", stream()) == r"\x1b[2J\x0d\x0a\x202e\xdcff" + "\u00e9"
    )


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\xe9\\u4e16"), ("latin-1", "\xe9\\u4e16")]
)
def test_what_an_encoding_does_not_have_is_escaped(encoding: str, shown: str) -> None:
    assert safe("\xe9\u4e16", stream(encoding)) == shown
    assert can_print("\u00b7", stream()) is True
    assert can_print("\u00b7", stream("ascii")) is False
    assert can_print("\u00b7", None) is False


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdef", 5, "abcd>"),
        ("abcdef", 1, ">"),
        ("\u4e16\u754c", 4, "\u4e16\u754c"),
        ("\u4e16\u754c", 3, "\u4e16>"),
        ("\u4e16\u754c", 2, ">"),
        ("", 1, ""),
    ],
)
def test_cut_counts_columns(text: str, columns: int, shown: str) -> None:
    assert cut(text, columns) == shown


def test_nobody_to_print_to() -> None:
    assert print_lines(None, [("x", "")]) is False


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """A configuration whose daemon is this process, which is in sync."""
    config = tmp_path / "snatd.toml"
    config.write_text(f'runtime_dir = "{tmp_path}/run"\n')
    say(config)
    return config


def say(config: Path, **changes: Any) -> None:
    write(config.parent / "run", in_sync() | {"pid": os.getpid()} | changes, 90)


# What a shell starts in the background ignores SIGINT, and all that it starts does.
_INTERRUPTIBLE = ("env", "--default-signal=INT")


class Terminal:
    """A program on a terminal of its own, 24 rows of 80 columns if not told otherwise."""

    def __init__(self, *command: str, columns: int = 80, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.resize(24, columns)
        self.printed = ""
        self.process = subprocess.Popen(
            (*_INTERRUPTIBLE, "setsid", "--ctty", *command),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", **environment},
        )
        os.close(theirs)

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def read(self) -> str:
        with suppress(OSError):  # EIO: the program has closed its side
            while select.select([self._ours], [], [], 0)[0] and (
                some := os.read(self._ours, 65536)
            ):
                self.printed += some.decode()
        return self.printed

    def shows(self, text: str, within_s: float = 10.0) -> None:
        until(lambda: text in self.read(), f"{text!r} on the screen", within_s)

    def screens(self) -> list[list[str]]:
        """Each drawing so far, as lines without colours."""
        drawings = self.read().split("\x1b[H")[1:]
        plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", one) for one in drawings]
        return [one.rstrip("\r\n").split("\r\n") for one in plain]

    def end(self) -> int:
        code = self.process.wait(10)
        self.read()
        os.close(self._ours)
        return code


@contextmanager
def terminal(*arguments: str, columns: int = 80, **environment: str) -> Iterator[Terminal]:
    one = Terminal(SNATD, "status", *arguments, columns=columns, **environment)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def piped(config: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SNATD, "status", "--config", str(config), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, True),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "0"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": ""}, False),
    ],
)
def test_colour_where_it_is_wanted(said: Path, environment: dict[str, Any], coloured: bool) -> None:
    with terminal("--config", str(said), **environment) as shown:
        assert shown.end() == 0
    head = "in sync since 02:40:48 UTC"
    assert f"{chr(27)}[32m{head}" in shown.printed if coloured else shown.printed.startswith(head)
    assert ("\x1b" in shown.printed) == coloured


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_in_a_narrow_terminal_a_table_stays_one(said: Path, columns: int) -> None:
    with terminal("--config", str(said), columns=columns) as shown:
        assert shown.end() == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.printed).splitlines()
    assert max(map(len, lines)) <= columns
    labels = [line[:13].strip() for line in lines[1:]]
    assert {"node", "ipv4 nft", "repairs"} <= {*labels}
    whole = piped(said).stdout
    assert {*labels} <= {"", *(line[:13].strip() for line in whole.splitlines()[1:])}
    assert words(whole) == words(" ".join(lines))


def words(text: str) -> list[str]:
    """Whatever stands between them, and whenever it was asked."""
    return re.sub(r"\d+ s ago|\d\d:\d\d:\d\d;", "now", " ".join(text.split())).split(" ")


def test_in_a_terminal_that_is_too_narrow_for_a_table_nothing_is_folded(said: Path) -> None:
    with terminal("--config", str(said), columns=30) as shown:
        assert shown.end() == 0
    assert len(shown.printed.splitlines()) == len(piped(said).stdout.splitlines())


def test_no_colour_in_a_pipe_and_no_dot_where_there_is_none(said: Path) -> None:
    done = piped(said, PYTHONIOENCODING="utf-8")
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[0].startswith("in sync since 02:40:48 UTC \u00b7 172.7.21.0/24")
    ascii_only = piped(said, PYTHONIOENCODING="ascii")
    assert ascii_only.stdout.startswith("in sync since 02:40:48 UTC - 172.7.21.0/24")
    assert ascii_only.returncode == 0


def test_a_watch_is_drawn_in_place_and_leaves_the_terminal_as_it_was(said: Path) -> None:
    with terminal("--config", str(said), "--watch") as shown:
        shown.shows("in sync since 02:40:48")
        say(said, told=["drift since 02:50:00 UTC", "\x1b[2Jhostile"], state="drift", in_sync=False)
        shown.shows("drift since 02:50:00")
        shown.type(b"\x03")
        assert shown.end() == 130
    assert shown.printed.startswith(ENTER)
    assert shown.printed.rstrip("\r\n").endswith(LEAVE)
    assert shown.printed.count("\x1b[?1049h") == 1, "drawn in place"
    first, last = shown.screens()[0], shown.screens()[-1]
    assert first[0].startswith("in sync since")
    assert last[0].startswith("drift since 02:50:00 UTC")
    assert r"\x1b[2Jhostile" in last[0]
    assert [line for screen in shown.screens() for line in screen if len(line) > 80] == []
    assert any(line.endswith(">") for line in first), "a rule is longer than the screen is wide"


def test_a_watch_fits_into_what_the_terminal_has_become(said: Path) -> None:
    with terminal("--config", str(said), "--watch", "60") as shown:
        shown.shows("all times are UTC")
        shown.resize(6, 30)
        until(lambda: len(shown.screens()) > 1, "another drawing, long before the next look")
        shown.shows("more lines; this window")
        shown.process.terminate()
        assert shown.end() == 143
    small = shown.screens()[-1]
    assert len(small) == 6
    assert all(len(line) <= 30 for line in small)
    assert shown.printed.rstrip("\r\n").endswith(LEAVE)


def test_a_watch_that_is_stopped_gives_the_terminal_back_meanwhile(said: Path) -> None:
    # A shell with job control, since the kernel stops nobody whom nobody could let go on.
    watch = f"{SNATD} status --config {said} --watch"
    one = Terminal("bash", "-c", f"set -m; {watch}; echo stopped: $?; fg; echo ended: $?; cat")
    one.shows("all times are UTC")
    one.type(b"\x1a")
    one.shows("stopped: 148")
    assert one.read().count(LEAVE) == 1
    until(lambda: one.read().count(ENTER) == 2, "the screen after `fg`")
    one.shows("all times are UTC")
    one.type(b"\x03")
    one.shows("ended: 130")
    one.process.kill()
    assert one.end() != 0
    assert one.printed.count(LEAVE) == 2


class Pipe:
    """`snatd status --watch` into a pipe, line by line."""

    def __init__(self, config: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*_INTERRUPTIBLE, SNATD, "status", "--config", str(config), "--watch", *arguments],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONUTF8": "1"},
        )
        self._printed = b""

    def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._printed:
            assert select.select([self.process.stdout], [], [], 10)[0], "nothing was printed"
            some = os.read(self.process.stdout.fileno(), 65536)
            assert some, "it ended"
            self._printed += some
        line, _, self._printed = self._printed.partition(b"\n")
        return line.decode()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_a_watch_as_json_is_one_object_a_line_and_each_word_once(said: Path) -> None:
    with Pipe(said, "1", "--json") as pipe:
        first = json.loads(pipe.line())
        assert (first["running"], first["in_sync"], first["repairs"]) == (True, True, 3)
        say(said, repairs=4)
        assert json.loads(pipe.line())["repairs"] == 4
        path_in(said.parent / "run").unlink()
        assert json.loads(pipe.line())["running"] is False
        pipe.process.send_signal(signal.SIGINT)
        assert pipe.process.wait(10) == 130


def test_a_watch_in_a_pipe_appends(said: Path) -> None:
    with Pipe(said) as pipe:
        assert pipe.line().startswith("in sync since")
        while not pipe.line().endswith("all times are UTC"):
            pass
        say(said, told=["drift since 02:50:00 UTC"])
        assert pipe.line() == ""
        assert pipe.line() == "drift since 02:50:00 UTC"


def test_a_watch_that_nobody_reads_ends(said: Path) -> None:
    with Pipe(said, "3600", "--json") as pipe:
        pipe.line()
        assert pipe.process.stdout is not None
        pipe.process.stdout.close()
        started_s = time.monotonic()
        assert pipe.process.wait(10) == 141
        assert time.monotonic() - started_s < 10


def test_a_watch_wants_a_number_of_seconds(said: Path) -> None:
    assert piped(said, "--watch", "0").returncode == 2
    assert piped(said, "--watch", "soon").returncode == 2


def test_half_a_status_file_is_said_to_be_half(said: Path) -> None:
    write(said.parent / "run", {"in_sync": True}, 90)
    done = piped(said)
    assert done.returncode == 4
    assert done.stdout.startswith("the status file cannot be understood")
    assert "not a whole status file of snatd's" in done.stdout
    found = json.loads(piped(said, "--json").stdout)
    assert (found["running"], found["last_word"]) == (None, None)
    assert "in_sync" not in found
