"""The journal's entries: one id for each kind of event, and nobody forgets to explain one."""

from __future__ import annotations

import re

import pytest

from snatd.host import journal
from tests import logged
from tests.logged import CATALOG, CODE, NOT_SHOWN

PROJECT = CODE.parent
EVENTS = logged.events()


def events_in_the_code() -> set[str]:
    return set(EVENTS)


def entries() -> dict[str, str]:
    """The catalog: text by id."""
    _, *parts = re.split(r"^-- (\w+)\n", CATALOG.read_text(), flags=re.MULTILINE)
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


@pytest.mark.parametrize("event", EVENTS)
def test_an_entry_names_only_fields_that_the_event_always_has_once(event: str) -> None:
    kind = EVENTS[event]
    for name in re.findall(r"@(\w+)@", entries()[journal.message_id(event)]):
        key = name.removeprefix("SNATD_").lower()
        if key.removesuffix("_text") in journal._ABSENT:
            assert key.endswith("_text"), f"{name} may be there several times, or not at all"
            assert key.removesuffix("_text") in kind.always, name
        else:
            assert key in kind.always, name
            assert not kind.may_be_none_or_several(key), name


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("whole", [True, False], ids=["several", "none"])
def test_an_entry_shows_all_that_there_is(event: str, whole: bool) -> None:
    sample = EVENTS[event].sample(event, whole=whole)
    there = dict(line.split("=", 1) for line in fields(event=event, **sample))
    text = entries()[journal.message_id(event)]
    told = re.sub(r"@(\w+)@", lambda name: there[name[1]], text)
    for key in (sample.keys() & journal._ABSENT.keys()) - NOT_SHOWN.get(event, set()):
        absent = journal._ABSENT[key]
        expected = f"first-{event}-{key} | second-{event}-{key}" if whole else absent
        assert expected in told, key
    assert "SNATD_" not in told
    assert "None" not in told


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


def test_what_is_not_there_has_no_field_and_is_not_in_the_message() -> None:
    lines = fields(event="rule_narrowed", rule=None, removed=["a", "b"], writer=None)
    assert lines[0] == "MESSAGE=rule_narrowed: removed=a | b"
    assert [line for line in lines if line.startswith("SNATD_")] == [
        "SNATD_EVENT=rule_narrowed",
        "SNATD_REMOVED=a",
        "SNATD_REMOVED=b",
        "SNATD_REMOVED_TEXT=a | b",
        "SNATD_RULE_TEXT=none",
        "SNATD_WRITER_TEXT=not known",
    ]


def test_journald_would_throw_away_an_entry_of_too_many_fields() -> None:
    lines = fields(event="can_snat", what=[f"rule {number}" for number in range(5000)])
    assert len(lines) < 1000
    assert "SNATD_WHAT=rule 0" in lines


def test_counts_are_read_by_a_person() -> None:
    assert "MESSAGE=summary: events=nft 3, start 1" in fields(
        event="summary", events={"nft": 3, "start": 1}
    )
