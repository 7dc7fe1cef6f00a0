"""What `snatd status` says: the daemon's word and whether it counts, as lines, as JSON and as an
exit status. Prints nothing, and asks no clock.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from snatd.core.model import count, join
from snatd.core.word import Life, Word, units_in
from snatd.report import (
    EXIT_DRIFT,
    EXIT_FAILING,
    EXIT_OK,
    EXIT_WAITING,
    SEPARATOR,
    clock,
    duration,
    plain,
)

# What is raised for a document that is not whole.
NOT_WHOLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)

# In mode observe there may be much to change; `snatd check` shows all of it.
_PLANNED = 8


@dataclass(frozen=True)
class Line:
    """`colour`: green, yellow, red or none. `indent`: where its text begins, behind a label."""

    text: str
    colour: str = ""
    indent: int = 0


@dataclass(frozen=True)
class _Row:
    label: str
    text: str
    colour: str = ""


def exit_code(word: Word) -> int:
    """Raises NOT_WHOLE."""
    if not word.counts:
        gone = word.life in (Life.GONE, Life.ABSENT, Life.STARTING)
        return EXIT_WAITING if gone else EXIT_FAILING
    said = _said(word)
    well = said["in_sync"] and not said["fights"]["now"] and not said["configuration_refused"]
    return EXIT_OK if well else EXIT_DRIFT


def document(word: Word, schema: int) -> dict[str, Any]:
    """As JSON. A word that does not count is a member of its own, so that nobody takes its
    `in_sync` for what is."""
    age_s = None if word.age_s is None else round(word.age_s, 3)
    life = {"running": word.life.runs, "stale": word.life.is_stale, "age_s": age_s}
    if word.counts:
        return life | _said(word)
    status = SEPARATOR.join(_why_not(word))
    return {"schema": schema, **life, "status": status, "last_word": word.document}


def lines(word: Word, separator: str = SEPARATOR) -> tuple[Line, ...]:
    """For a person: a headline, whose parts the separator joins, and a table. Raises NOT_WHOLE."""
    if word.counts:
        said = _said(word)
        head = Line(separator.join(said["told"]), _colour(said))
        rows = [*_troubles(said), *_table(word, said, _now(word, said))]
    else:
        unsure = word.life in (Life.STARTING, Life.ELSEWHERE)
        head = Line(separator.join(_why_not(word)), "yellow" if unsure else "red")
        rows = [*_last_word(word, separator), _Row("to do", _way_out(word))]
    width = max(len(row.label) for row in rows)
    above = ["", *(row.label for row in rows)]
    table = [
        # A label stands only where the row above has another.
        Line(
            f"{'' if row.label == label else row.label:{width}}  {row.text}".rstrip(),
            row.colour,
            width + 2,
        )
        for row, label in zip(rows, above, strict=False)
    ]
    return (head, *table)


def _said(word: Word) -> dict[str, Any]:
    assert word.document is not None, "a word that counts has been understood"
    return word.document


def _now(word: Word, said: dict[str, Any]) -> datetime:
    """By the clock of the times in the document. Whoever sets the node's clock makes none older."""
    return datetime.fromisoformat(said["written_at"]) + timedelta(seconds=word.age_s or 0)


def _why_not(word: Word) -> tuple[str, ...]:
    """The headline where the word does not count."""
    when = "of unknown age" if word.age_s is None else f"{duration(word.age_s)} ago"
    last = f"last word {when}, pid {word.pid}"
    return {
        Life.SILENT: (f"not answering: {last}", "it is stuck, or cannot write its status file"),
        Life.STOPPED: (f"not answering: {last}", "its process was stopped by a signal (SIGSTOP)"),
        Life.UNSEEN_SILENT: (
            f"not answering, or not running: {last}",
            "its process cannot be seen from here",
        ),
        Life.GONE: (f"not running: {last}", "it was killed, or it crashed"),
        Life.ABSENT: (
            f"not running: there is no {word.why}",
            "it was stopped or killed, never started, or fails at each start",
        ),
        Life.STARTING: (
            f"no word yet: pid {word.pid} holds the lock",
            "snatd is starting or cannot write its status file, or `snatd revert` or `snatd apply "
            "--confirm` is at work",
        ),
        Life.ELSEWHERE: (
            "it cannot be told from here whether snatd runs",
            "the status file is of another container, or of before the last boot",
        ),
        Life.UNREADABLE: ("the status file cannot be understood", word.why),
    }[word.life]


def _way_out(word: Word) -> str:
    return {
        Life.SILENT: f"look at `journalctl -u snatd` and /proc/{word.pid}/stack, "
        "then `systemctl restart snatd`",
        Life.STOPPED: f"`kill -CONT {word.pid}` lets it go on",
        Life.UNSEEN_SILENT: "ask outside of this container, or as root",
        Life.GONE: "`systemctl start snatd`, if systemd does not in some seconds; `journalctl -u "
        "snatd` says how it ended. Guard and rules stay meanwhile; what somebody writes to them is "
        "not repaired",
        Life.ABSENT: "`snatd check` says whether its configuration will do, and `journalctl -u "
        "snatd` why it does not stay; then `systemctl start snatd`",
        Life.STARTING: "ask again in some seconds; `systemctl status snatd` says more",
        Life.ELSEWHERE: "ask where the daemon runs",
        Life.UNREADABLE: "`systemctl restart snatd` writes it anew",
    }[word.life]


def _last_word(word: Word, separator: str) -> Iterator[_Row]:
    if word.document is None:
        if word.why and word.life is Life.GONE:
            yield _Row("last word", word.why)
        return
    said, now = word.document, _now(word, word.document)
    date = said["written_at"][:19].replace("T", " ")
    yield _Row("last word", f"{date} UTC")
    yield _Row("it said", separator.join(said["told"]))
    yield from _repairs(said, now)


def _colour(said: dict[str, Any]) -> str:
    if said["fights"]["now"]:
        return "red"
    if said["configuration_refused"]:
        return "yellow"
    doubt = any(one["rules"] for one in said["suspects"])
    doubt = doubt or any(one["changed_since"] for one in said["flows"])
    if said["state"] == "in sync":
        return "yellow" if doubt else "green"
    return "red" if said["state"] == "degraded" else "yellow"


def _troubles(said: dict[str, Any]) -> Iterator[_Row]:
    """What is wrong, as far as the headline does not say it, and what to do about it."""
    head = " ".join(said["told"])
    for text in (*(one["message"] for one in said["problems"]), *said["proof"]["wrong"]):
        if plain(text) not in head:
            yield _Row("problem", text, "red")
    for reason in said["waiting_for"]:
        if plain(reason) not in head:
            yield _Row("waiting", reason, "yellow")
    refused = said["configuration_refused"]
    for why in refused["why"] if refused else ():
        yield _Row("refused", why, "yellow")
    planned = [line for one in said["plan"] for line in _changes(one["remove"], one["add"])]
    for line in planned[:_PLANNED]:
        yield _Row("planned", line.text, line.colour)
    if len(planned) > _PLANNED:
        yield _Row("planned", f"and {len(planned) - _PLANNED} more: `snatd check`")
    if refused:
        # What keeps it from a file may be its unit.
        restart = any("systemctl restart snatd" in why for why in refused["why"])
        then = "systemctl restart snatd" if restart else "systemctl reload snatd"
        yield _Row("to do", f"mend the configuration{restart * ' as it says'}, then `{then}`")
    if fight := said["fights"]["now"]:
        where = [f"systemctl status {shlex.quote(unit)}" for unit in units_in(fight["with"])]
        looks = join([f"`{one}`" for one in (*where, "journalctl -x SNATD_EVENT=fighting")])
        yield _Row("to do", f"keep that program from it: {looks}")
    elif said["state"] in _WAYS_OUT:
        yield _Row("to do", _WAYS_OUT[said["state"]])


_WAYS_OUT = {
    "drift": 'set `mode = "enforce"` in the configuration, then `systemctl reload snatd`',
    "waiting": "`snatd doctor` says what to do; snatd goes on as soon as that is there",
    "degraded": "`journalctl -x -u snatd` explains it, `snatd check` looks again",
}


def _changes(
    removed: list[str], added: list[str], more_removed: int = 0, more_added: int = 0
) -> list[Line]:
    return [
        *(Line(f"- {rule}", "red") for rule in removed),
        *([Line(f"- and {more_removed} more", "red")] if more_removed else ()),
        *(Line(f"+ {rule}", "green") for rule in added),
        *([Line(f"+ and {more_added} more", "green")] if more_added else ()),
    ]


def _table(word: Word, said: dict[str, Any], now: datetime) -> Iterator[_Row]:
    for one in said["families"]:
        inside = join(one["networks"], len(one["networks"]))
        on = one["bridge"] or "no bridge yet"
        yield _Row("node", f"{one['subnet']} on {on}, in {inside}")
        for cut in one["cut_outs"]:
            yield _Row("cut out", f"{cut['network']} ({cut['why']})")
    empty = []
    for one in said["rulesets"]:
        label = f"{one['family']} {one['backend']}"
        if not one["postrouting_rules"]:
            empty.append(label)
            continue
        yield _Row(label, f"{count(one['postrouting_rules'], 'rule')} in POSTROUTING")
        for rule in one["ours"]:
            yield _Row(label, rule)
    if empty:
        yield _Row("no rules", f"in POSTROUTING of {join(empty)}")
    leased = [one["family"] for one in said["families"]]
    for one in said["guard"]:
        says = f"not in place: {one['why_not']}"
        colour = "" if one["why_not"] == "off" else "yellow"
        if one["in_place"]:
            # A nat chain sees the first packet of a connection only.
            before = "" if one["family"] in leased else " for the lease before"
            says, colour = f"in place{before}, kept the address of {_connections(one)}", ""
            if (fight := said["fights"]["now"]) and fight["guard_undone"]:
                says, colour = f"undone again and again; at the last look {says}", "red"
        yield _Row(f"{one['family']} guard", says, colour)
    yield from _suspects(said)
    yield from _proof(said, now)
    yield from _repairs(said, now)
    yield from _fights(said, now)
    yield from _flows(said, now)
    for one in said["saved_rules"]:
        why = f": {one['why']}" if one["why"] else ""
        colour = "yellow" if one["state"] in ("left alone", "not written") else ""
        yield _Row("saved rules", f"{one['path']}: {one['state']}{why}", colour)
    events = join([f"{source} {number}" for source, number in said["events"].items()], 12)
    last = said["last_event"]
    by = f" by {last['writer']}" if last and last["writer"] else ""
    heard = f"; last {last['source']} {_when(last['at'], now)}{by}" if last else ""
    yield _Row("events", f"{events}{heard}")
    if last_pass := said["last_pass"]:
        took = f"{last_pass['duration_ms']} ms, because of {last_pass['trigger']}"
        number = f"{said['passes']} in all"
        yield _Row("last pass", f"{_when(last_pass['at'], now)}, {took}; {number}")
    unseen = ", not seen from here" if word.life is Life.UNSEEN else ""
    version = f"version {said['version']}, mode {said['mode']}"
    started = f"started {_when(said['started_at'], now)}"
    yield _Row("daemon", f"pid {said['pid']}{unseen}, {version}, {started}")
    yield _Row("now", f"{now.isoformat()[:19].replace('T', ' ')}; all times are UTC")


def _connections(guard: dict[str, Any]) -> str:
    return count(guard["connections"] or 0, "connection")


def _suspects(said: dict[str, Any]) -> Iterator[_Row]:
    for one in said["suspects"]:
        family = one["family"]
        if one["none"]:
            yield _Row("suspects", f"{family}: none on this node can SNAT unmarked cluster traffic")
        for rule in one["rules"]:
            yield _Row("suspects", f"{family}: can SNAT cluster traffic: {rule}", "yellow")
        for hook in one["before_guard"]:
            text = f"asked before the guard, or may be: nat chain {hook}"
            yield _Row("suspects", f"{family}: {text}", "yellow")
        for why in one["unknown"]:
            text = f"not known whether one can SNAT cluster traffic: {why}"
            yield _Row("suspects", f"{family}: {text}", "yellow")


def _proof(said: dict[str, Any], now: datetime) -> Iterator[_Row]:
    proof = said["proof"]
    if proof["probed_at"]:
        kept = [probe["kept"] for probe in proof["probes"] if probe["inside"]]
        says = (
            f"{count(len(kept), 'datagram')} to neighbours: {kept.count(True)} kept, "
            f"{kept.count(False)} SNATed, {kept.count(None)} without an answer"
        )
        proved = ", proved" if proof["proved_at"] else ""
        yield _Row("proof", f"{_when(proof['probed_at'], now)}, {says}{proved}")


def _repairs(said: dict[str, Any], now: datetime) -> Iterator[_Row]:
    """How many, and the last ones: when, what, where and by whose doing."""
    recent = said["recent_repairs"]
    last = f", last {_ago(recent[0]['at'], now)}" if recent else ""
    yield _Row("repairs", f"{said['repairs'] or 'none'}{last}")
    told = [
        (
            _clock(one["at"], now),
            join(one["changes"]),
            f"{one['family']} {one['backend']}",
            _by(one),
        )
        for one in recent
    ]
    widths = [max(map(len, column)) for column in zip(*told, strict=True)]
    for number, parts in enumerate(told):
        row = "  ".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True))
        yield _Row("repairs", row)
        if number == 0:
            one = recent[0]
            # Whoever reads what was written before an update finds no such counts.
            more = (one.get("more_removed", 0), one.get("more_added", 0))
            for line in _changes(one["removed"], one["added"], *more):
                yield _Row("repairs", f"  {line.text}", line.colour)


def _by(repair: dict[str, Any]) -> str:
    who = [
        f"{one['comm']} (pid {one['pid']}){' of ' + one['of'] if one['of'] else ''}"
        for one in repair["writers"]
    ]
    return f"by {join(who)}" if who else f"because of {repair['trigger']}"


def _fights(said: dict[str, Any], now: datetime) -> Iterator[_Row]:
    fights = said["fights"]
    if fight := fights["now"]:
        repairs = count(fight["repairs"], "repair")
        since = _when(fight["since"], now)
        yield _Row("fights", f"now with {fight['with']} since {since}, {repairs}", "red")
    if fight := fights["last"]:
        lasted_s = _seconds(fight["since"], datetime.fromisoformat(fight["ended_at"]))
        lasted = f"lasted {duration(lasted_s)}, {count(fight['repairs'], 'repair')}"
        when = _when(fight["since"], now)
        yield _Row("fights", f"{fights['count']}, last with {fight['with']}, {when}, {lasted}")
    if not fights["count"]:
        yield _Row("fights", "none")


def _flows(said: dict[str, Any], now: datetime) -> Iterator[_Row]:
    for one in said["flows"]:
        if one["since"] is None:
            continue  # not counted yet
        about = "about " if one["kept_since"] and one["kept_one_in"] > 1 else ""
        news = f"{about}{one['kept_since']} kept, {one['changed_since']} changed"
        stale = f"{one['stale']} wrong since before, {one['deleted']} deleted"
        hint = ": `snatd flows`" if one["stale"] else ""
        text = f"{one['family']}: {news} since {_when(one['since'], now)}; {stale}{hint}"
        yield _Row("flows", text, "yellow" if one["stale"] or one["changed_since"] else "")


def _clock(at: str, now: datetime) -> str:
    return clock(at, now.isoformat())


def _when(at: str, now: datetime) -> str:
    ago = _ago(at, now)
    return f"{_clock(at, now)} ({ago})" if ago else _clock(at, now)


def _ago(at: str, now: datetime) -> str:
    """Empty where somebody set the clock back since."""
    seconds = _seconds(at, now)
    return f"{duration(seconds)} ago" if seconds >= 0 else ""


def _seconds(at: str, until: datetime) -> float:
    return (until - datetime.fromisoformat(at)).total_seconds()
