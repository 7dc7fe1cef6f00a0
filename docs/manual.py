"""`make manual`: the lists in the man pages, from the README's tables, the parser and the code.

Tests compare those tables with the program, and the man pages with what this makes of them. Writes
between the comments `from ...` and `end` and nowhere else.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from snatd.arguments import parser
from tests import logged

_ROOT = Path(__file__).parents[1]
_MAN = _ROOT / "packaging" / "man"
PAGES = (_MAN / "snatd.8", _MAN / "snatd.toml.5")


def main() -> int:
    """Brings the pages up to date."""
    for page in PAGES:
        page.write_text(renewed(page.read_text()))
    return 0


def renewed(page: str) -> str:
    """A page with its lists made anew. Raises KeyError for a list that nobody can make."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}\n{_LISTS[found[2]]()}{found[3]}"

    return re.sub(r'(?ms)^(\.\\" from ([^\n]*))\n.*?^(\.\\" end)$', block, page)


def rows(heading: str) -> Iterator[tuple[str, ...]]:
    """The cells of the tables in the README whose first line begins with some cells."""
    readme = (_ROOT / "README.md").read_text()
    for table in re.findall(rf"(?m)^{re.escape(heading)}.*\n\|[-|]+\|\n((?:\|.*\n)+)", readme):
        for line in table.splitlines():
            yield tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])


def _keys() -> str:
    return "".join(
        _item(f"Ic {_code(key)}", f"{meaning} Default: {default}.")
        for key, default, meaning in rows("| key |")
    )


def _events() -> str:
    kinds, items = logged.events(), ""
    for cell, level, meaning in rows("| event |"):
        names = re.findall("`([^`]+)`", cell)
        fields = {name: ", ".join(f"`{one}`" for one in kinds[name].all) for name in names}
        first = fields.pop(names[0])
        others = "".join(f"; of `{name}`: {its}" for name, its in fields.items() if its != first)
        items += _item(f"Ic {' , '.join(names)}", level, f"{meaning} Fields: {first}{others}.")
    return items


def _metrics() -> str:
    return "".join(
        _item(f"Li {_code(name)}" + (f" Brq {_code(labels)}" if labels else ""), kind, meaning)
        for name, kind, labels, meaning in rows("| metric |")
    )


def _exits() -> str:
    (commands,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return "".join(
        _item(f"Li {name}", (command.epilog or "").replace("\n", " ").partition(": ")[2] + ".")
        for name, command in commands.choices.items()
    )


_LISTS = {
    "the README's keys": _keys,
    "the README's events and the code": _events,
    "the README's metrics": _metrics,
    "the parser's exit statuses": _exits,
}


def _item(head: str, *cells: str) -> str:
    """An item of a list. The cells in front of the last are short, and stand before it."""
    *short, text = cells
    return f".It {head}\n{_roff(''.join(f'({one}) ' for one in short) + text)}\n"


def _code(cell: str) -> str:
    return cell.replace("`", "")


def _roff(markdown: str) -> str:
    """A line of Markdown in roff, each sentence on a line of its own as its readers want it."""
    text = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", markdown).replace("\\|", "|")
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", text)
    sentences = re.split(r"(?<=[.;:]) (?=[A-Z])", text)
    lines = [
        line
        for one in sentences
        for line in textwrap.wrap(one, 100, break_long_words=False, break_on_hyphens=False)
    ]
    return "\n".join(f"\\&{line}" if line[:1] in {".", "'"} else line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
