"""`snatd status`: prints the daemon's word, once or again and again. What it says is `told`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from snatd import told
from snatd.core.word import Life, Word
from snatd.host import terminal
from snatd.host.status import SCHEMA, StatusFile
from snatd.report import SEPARATOR

_DOT = " \u00b7 "


def status(runtime_dir: Path, *, as_json: bool, every_s: float | None) -> int:
    """Prints what the daemon in charge of `runtime_dir` says, and returns the exit status; with
    `every_s` when it says something else, until somebody ends it."""
    file = StatusFile(runtime_dir)
    if every_s is not None and sys.stdout is not None:
        return _watch(file, every_s, as_json=as_json)
    shown = _Shown(file.word())
    if as_json:
        shown.print_json(indent=2)
    else:
        shown.print_lines()
    return shown.exit_code


class _Shown:
    """A word in all its forms."""

    def __init__(self, word: Word) -> None:
        separator = _DOT if terminal.can_print(_DOT, sys.stdout) else SEPARATOR
        try:
            self.exit_code = told.exit_code(word)
            lines = told.lines(word, separator)
        except told.NOT_WHOLE as error:
            # The schema's number is right, and the rest is not.
            why = f"not a whole status file of snatd's: {error!r}"
            life = Life.UNREADABLE if word.counts else word.life
            word = replace(word, life=life, document=None, why=why)
            self.exit_code = told.exit_code(word)
            lines = told.lines(word, separator)
        self._word = word
        self.lines = [(line.text, line.colour) for line in lines]
        self._indent = max(line.indent for line in lines)

    def print_lines(self) -> bool:
        return terminal.print_lines(sys.stdout, self.lines, self._indent)

    def print_json(self, indent: int | None = None) -> bool:
        document = told.document(self._word, SCHEMA)
        return terminal.write(sys.stdout, json.dumps(document, indent=indent) + "\n")


def _watch(file: StatusFile, every_s: float, *, as_json: bool) -> int:
    """On a terminal in place, with ages that go on; elsewhere each word once, below the others."""
    drawing = not as_json and terminal.is_screen(sys.stdout)
    printed: object = None
    with terminal.Watch(sys.stdout, drawing=drawing) as watch:
        while True:
            word = file.word()
            news = (file.identity, word.life, word.pid)
            shown = _Shown(word)
            seen = True
            if drawing:
                seen = watch.draw(shown.lines)
            elif news != printed:
                if printed is not None and not as_json:
                    terminal.write(sys.stdout, "\n")
                seen = shown.print_json() if as_json else shown.print_lines()
                printed = news
            if not seen:
                return terminal.READER_GONE
            if (ended := watch.wait(every_s)) is not None:
                return ended
