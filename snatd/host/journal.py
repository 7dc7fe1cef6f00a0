"""What happened, one event each: to the journal as native fields, or as JSON or text on stderr.

Never blocks: what cannot be written at once is dropped and counted. That is why the journal's
datagrams are sent from here and not by python-systemd, whose send waits for a stopped journald.
"""

from __future__ import annotations

import os
import select
import socket
from _blake2 import blake2b  # hashlib has the same, and loads OpenSSL: 3.5 MB
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

import structlog

_SOCKET = "/run/systemd/journal/socket"
# syslog(3) priorities. A repair is a notice: less than a warning, more than routine.
NOTICE = 5
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
# Larger datagrams need a memory file descriptor; nothing here is worth one. And journald throws an
# entry of more than 1024 fields away.
_LONGEST_FIELD_BYTES = 8192
_MOST_COPIES = 100

# What may be there several times or not at all, and what the catalog then shows of it: journalctl
# puts in one copy of a field, and the name of one that is not there.
_ABSENT = {
    **dict.fromkeys(("what", "why", "was", "removed", "added", "rule"), "none"),
    "writer": "not known",
}

Event = MutableMapping[str, Any]

dropped = Counter[str]()


def configure(log_format: str, level: str) -> None:
    """Sets up structlog for the whole process. `log_format` as in snatd.toml."""
    if log_format == "auto":
        log_format = "journal" if _stderr_is_the_journal() else "console"
    renderers: dict[str, tuple[list[Any], Callable[[str], None]]] = {
        "journal": ([_native], _send),
        "json": ([_time(), _for_text, structlog.processors.JSONRenderer()], _write),
        "console": ([_time(), _for_text, _console()], _write),
    }
    processors, write = renderers[log_format]
    structlog.configure(
        processors=[structlog.processors.add_log_level, _plain, *processors],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Logger(write),
        cache_logger_on_first_use=False,
    )


def logger() -> Any:
    """The logger: `.info("event_name", field=value)`. Events are stable snake_case names."""
    return structlog.get_logger()


class _Logger:
    """structlog's final logger: every level ends in one function."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = self.msg = write


def _stderr_is_the_journal() -> bool:
    """systemd.exec(5): $JOURNAL_STREAM is device and inode of the stream it connected."""
    status = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _time() -> Any:
    return structlog.processors.TimeStamper(fmt="iso", utc=True)


def _console() -> Any:
    return structlog.dev.ConsoleRenderer(colors=os.isatty(2), pad_event=0)


def _plain(_: Any, __: str, event: Event) -> Event:
    """Values as text and numbers. A name somebody chose may hold any byte; here it is escaped."""
    return {key: _escaped(value) for key, value in event.items()}


def _escaped(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_escaped(one) for one in value]
    if isinstance(value, dict):
        return {_escaped(key): _escaped(one) for key, one in value.items()}
    text = str(value)
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _for_text(_: Any, __: str, event: Event) -> Event:
    return {key: value for key, value in event.items() if key != "priority" and value is not None}


def _native(_: Any, __: str, event: Event) -> str:
    """The journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL), as text for `_send`.

    A field may be there several times, so that a search for any of its values finds it.
    SNATD_*_TEXT is for the catalog: always there, and all of it in one line.
    """
    name, level = event.pop("event"), event.pop("level")
    texts = {
        f"{key}_text": absent if event[key] is None else event[key]
        for key, absent in _ABSENT.items()
        if key in event
    }
    event = {key: value for key, value in event.items() if value is not None}
    fields = {
        "MESSAGE": f"{name}: {_sentence(event)}" if event else name,
        "PRIORITY": str(event.pop("priority", _PRIORITIES[level])),
        "SYSLOG_IDENTIFIER": "snatd",
        "MESSAGE_ID": message_id(name),
        "SNATD_EVENT": name,
    }
    if (duration_ms := event.pop("duration_ms", None)) is not None:
        # The journal's own times are in microseconds, and their names say so.
        event["duration_usec"] = round(duration_ms * 1000)
    lines = [f"{key}={value}" for key, value in fields.items()]
    for key, value in event.items():
        for one in value[:_MOST_COPIES] if isinstance(value, list) else (value,):
            lines.append(f"SNATD_{key.upper()}={_text(one)}")
    lines += [f"SNATD_{key.upper()}={_text(value)}" for key, value in texts.items()]
    return "".join(f"{line}\n" for line in lines)


def message_id(event: str) -> str:
    """The journal's name for a kind of event: `journalctl -x` finds its text by it. It follows from
    the event's name, so it is the same in every version; systemd/snatd.catalog holds them all."""
    return blake2b(f"snatd {event}".encode(), digest_size=16).hexdigest()


def _sentence(event: Event) -> str:
    """What a person reads. The parts of `writer` are there for programs."""
    return " ".join(
        f"{key}={_text(value)}"
        for key, value in event.items()
        if key != "priority" and not key.startswith("writer_")
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    text = " | ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text[:_LONGEST_FIELD_BYTES]


def _send(datagram: str) -> None:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.sendto(datagram.encode(), socket.MSG_DONTWAIT, _SOCKET)
    except (FileNotFoundError, ConnectionRefusedError):
        # No journal here: stderr it is, with the priority as systemd reads it (sd-daemon(3)).
        fields = dict(line.split("=", 1) for line in datagram.splitlines())
        _write(f"<{fields['PRIORITY']}>{fields['MESSAGE']}")
    except OSError:
        _drop()


def _write(line: str) -> None:
    # A pipe that polls writable takes at least PIPE_BUF bytes, so a chunk of that never blocks.
    data = line.encode("utf-8", "backslashreplace") + b"\n"
    try:
        for start in range(0, len(data), select.PIPE_BUF):
            if not select.select((), (2,), (), 0)[1]:
                _drop()
                return
            os.write(2, data[start : start + select.PIPE_BUF])
    except OSError:
        _drop()


def _drop() -> None:
    dropped["lines"] += 1
