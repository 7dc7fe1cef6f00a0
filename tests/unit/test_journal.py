"""The journal's entries: one id for each kind of event, and nobody forgets to explain one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import snatd
from snatd.core.plan import Change
from snatd.host import journal

CODE = Path(snatd.__file__).parent
PROJECT = CODE.parent
LEVELS = {"debug", "info", "warning", "error", "say", "_say"}


def events_in_the_code() -> set[str]:
    """Every name that is logged: a literal first argument of a log call, `over=`, and the changes,
    whose names are their values. What is undone is undone by commands, which do not log."""
    found = {change.value for change in Change if change is not Change.UNDONE}
    for path in CODE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                if call.func.attr in LEVELS and call.args:
                    found |= set(literal(call.args[0]))
                found |= {
                    name
                    for keyword in call.keywords
                    if keyword.arg == "over"
                    for name in literal(keyword.value)
                }
    return found


def literal(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def entries() -> dict[str, str]:
    """The catalog: text by id."""
    text = (PROJECT / "systemd" / "snatd.catalog").read_text()
    _, *parts = re.split(r"^-- (\w+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_each_event_has_an_entry_in_the_catalog_and_no_entry_is_of_none() -> None:
    ids = {journal.message_id(name): name for name in events_in_the_code()}
    catalog = entries()
    assert len(ids) > 25
    assert {ids[one] for one in ids if one not in catalog} == set(), "events without an entry"
    assert {catalog[one] for one in catalog if one not in ids} == set(), "entries without an event"


def test_each_event_is_in_the_readme() -> None:
    table = (PROJECT / "README.md").read_text().partition("| event | level |")[2].partition("\n\n")
    described = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table[0], re.M))))
    assert described == events_in_the_code()


def test_an_entry_has_a_subject_and_says_what_to_do() -> None:
    for text in entries().values():
        head, _, body = text.partition("\n\n")
        assert re.match(r"Subject: .{10,80}\nDefined-By: snatd\n", head + "\n"), text
        assert body.strip(), text
        assert max(map(len, text.splitlines())) <= 110, text
        assert text.isascii()


def test_a_message_id_never_changes() -> None:
    assert journal.message_id("rule_narrowed") == "80f5f203f8a25649f307b6db8cf1d174"
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in entries())


def fields(**event: object) -> list[str]:
    return journal._native(None, "", {"level": "info", **event}).splitlines()


def test_lists_become_repeated_fields_and_times_microseconds() -> None:
    lines = fields(
        event="rule_narrowed",
        writer="a (pid 1), b (pid 2)",
        writer_pid=[1, 2],
        duration_ms=12.34,
        priority=journal.NOTICE,
    )
    assert {"SNATD_WRITER_PID=1", "SNATD_WRITER_PID=2", "SNATD_DURATION_USEC=12340"} <= {*lines}
    assert "PRIORITY=5" in lines
    assert f"MESSAGE_ID={journal.message_id('rule_narrowed')}" in lines
    assert lines[0] == "MESSAGE=rule_narrowed: writer=a (pid 1), b (pid 2) duration_ms=12.34"
