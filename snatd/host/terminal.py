"""Lines for a person: harmless characters, colours where they are wanted, and a screen that is
drawn again and again. Knows nothing of what the lines say.
"""

from __future__ import annotations

import os
import select
import signal
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TextIO

_COLOURS = {
    **{"red": "\033[31m", "green": "\033[32m", "yellow": "\033[33m"},
    **{"bold red": "\033[1;31m", "bold yellow": "\033[1;33m", "bold cyan": "\033[1;36m"},
}
_NO_COLOUR = "\033[0m"
# xterm's private modes, which all terminals of today know: 1049 the alternate screen, 25 the
# cursor, 7 to wrap a line that is too long.
_ENTER = "\033[?1049h\033[?25l\033[?7l"
_LEAVE = "\033[?7h\033[?25h\033[?1049l"
_HOME, _EMPTY_LINE, _EMPTY_REST = "\033[H", "\033[2K", "\033[J"
# What a shell says of a program that a signal ended.
_ENDED_BY = 128
READER_GONE = _ENDED_BY + signal.SIGPIPE

Coloured = tuple[str, str]
"""A text and the name of its colour, empty for none."""


def write(stream: TextIO | None, text: str) -> bool:
    """Writes at once; False where nobody reads it any more, which must not stop what is being
    done."""
    if stream is None:
        return False
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        # What the stream still holds would fail again at the end, as exit status 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


def print_lines(stream: TextIO | None, lines: Iterable[Coloured], indent: int = 0) -> bool:
    """Prints lines, whatever is in them; False where nobody reads them. `indent`: where on a
    terminal a line that is too wide goes on, so that a table stays one."""
    if stream is None:
        return False
    coloured = wants_colour(stream)
    columns = _size(stream)[0] if indent and is_screen(stream) else 0
    painted = [
        _painted(line, colour if coloured else "")
        for text, colour in lines
        for line in _folded(safe(text, stream), columns, indent)
    ]
    return write(stream, "".join(f"{line}\n" for line in painted))


# In fewer columns words would stand below each other.
_NARROWEST = 20


def _folded(text: str, columns: int, indent: int) -> list[str]:
    if columns - indent < _NARROWEST:
        return [text]
    # A word that is too long stays whole, so that it can be copied.
    wrapper = textwrap.TextWrapper(
        columns,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(text) or [text]


def _size(stream: TextIO) -> tuple[int, int]:
    """Columns and rows of a terminal."""
    with suppress(OSError):
        columns, rows = os.get_terminal_size(stream.fileno())
        if columns > 0 and rows > 0:
            return columns, rows
    return 80, 24


def is_screen(stream: TextIO | None) -> bool:
    """Whether it is a terminal that can be drawn on."""
    return stream is not None and stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def wants_colour(stream: TextIO | None) -> bool:
    """no-color.org: with NO_COLOR set, to whatever, nobody wants any."""
    return is_screen(stream) and not os.environ.get("NO_COLOR")


def safe(text: str, stream: TextIO) -> str:
    """A rule may hold any character, and a terminal obeys some of them, or has no others."""
    printable = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
    encoding = stream.encoding or "ascii"
    return printable.encode(encoding, "backslashreplace").decode(encoding)


def can_print(text: str, stream: TextIO | None) -> bool:
    """Whether all of it is in the stream's encoding."""
    return stream is not None and safe(text, stream) == text


def _painted(text: str, colour: str) -> str:
    return f"{_COLOURS[colour]}{text}{_NO_COLOUR}" if colour else text


def cut(text: str, columns: int) -> str:
    """The beginning of a text that is too wide, and a mark that it was."""
    if sum(map(_columns_of, text)) <= columns:
        return text
    kept, room = "", columns - 1
    for one in text:
        room -= _columns_of(one)
        if room < 0:
            break
        kept += one
    return f"{kept}>"


def _columns_of(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Watch:
    """A stream that is written to until somebody has seen enough: Ctrl-C, SIGTERM, or a reader who
    is gone. A context manager.

    With `drawing` the stream is a terminal, and its screen becomes what it was at the end, and
    while the process is stopped by Ctrl-Z.
    """

    def __init__(self, stream: TextIO, *, drawing: bool) -> None:
        self._stream = stream
        self._drawing = drawing
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._poll.register(stream.fileno(), 0)  # only that its other end is gone

    def __enter__(self) -> Watch:
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._listen(signal.SIGINT, signal.SIGTERM, signal.SIGWINCH)
        if self._drawing:
            self._listen(signal.SIGTSTP)
            write(self._stream, _ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawing:
            write(self._stream, _LEAVE)
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def _listen(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            # What a shell started in the background ignores Ctrl-C, and goes on doing so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    def wait(self, seconds: float) -> int | None:
        """Until then, or until the terminal has another size. The exit status if it is the end."""
        for descriptor, _ in self._poll.poll(seconds * 1000):
            if descriptor != self._reader:
                return READER_GONE
            heard = os.read(self._reader, 4096)
            for number in (signal.SIGINT, signal.SIGTERM):
                if number in heard:
                    return _ENDED_BY + number
            if signal.SIGTSTP in heard:
                self._sleep()
        return None

    def _sleep(self) -> None:
        write(self._stream, _LEAVE)
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # returns after SIGCONT
        signal.signal(signal.SIGTSTP, handler)
        write(self._stream, _ENTER)

    def draw(self, lines: Sequence[Coloured]) -> bool:
        """Puts lines in place of what is on the screen, cut at its width and its height; False
        where nobody sees them."""
        columns, rows = _size(self._stream)
        if len(lines) > rows:
            hidden = len(lines) - rows + 1
            lines = [*lines[: rows - 1], (f"{hidden} more lines; this window is too low", "")]
        coloured = wants_colour(self._stream)
        painted = [
            _painted(cut(safe(text, self._stream), columns), colour if coloured else "")
            for text, colour in lines
        ]
        drawn = "\n".join(f"{_EMPTY_LINE}{line}" for line in painted)
        rest = f"\n{_EMPTY_REST}" if len(lines) < rows else ""
        return write(self._stream, f"{_HOME}{drawn}{rest}")
