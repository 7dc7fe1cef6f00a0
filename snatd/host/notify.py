"""Speaks to systemd: readiness, reloads, STATUS, the watchdog. Silent where nobody listens."""

from __future__ import annotations

import os
import time
from typing import Any

import sdnotify


class Notifier:
    """The service's side of sd_notify(3). Never blocks: what the socket does not take now is said
    again later, the newest of each kind."""

    def __init__(self) -> None:
        self._notifier: Any = None
        self._owed: dict[str, str] = {}
        self._line = ""
        self._fed_s = 0.0
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(microseconds) / 1e6 if for_us and microseconds.isdecimal() else None
        """systemd's watchdog time-out for this process, None if it set none."""

    def status(self, text: str) -> None:
        """STATUS=, if it changed."""
        # A newline would begin another message.
        line = "STATUS=" + "".join(one if one.isprintable() else "?" for one in text)
        if line != self._line:
            self._line = line
            self._send(line)

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        # systemd 253's notify-reload wants the time; older ones ignore it.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self, now_s: float) -> None:
        """Feeds the watchdog, several times per time-out and not more often than that, and says
        what it still owes."""
        if self.watchdog_s is not None and now_s - self._fed_s >= self.watchdog_s / 8:
            self._fed_s = now_s
            self._send("WATCHDOG=1")
        elif self._owed:
            self._pay()

    def _send(self, message: str) -> None:
        # sdnotify encodes to latin-1: one odd character would lose it all.
        message = message.encode("ascii", "replace").decode("ascii")
        kind = message.partition("=")[0]
        self._owed.pop(kind, None)  # the newest goes last: READY=1 after RELOADING=1
        self._owed[kind] = message
        self._pay()

    def _pay(self) -> None:
        if not os.environ.get("NOTIFY_SOCKET"):
            self._owed.clear()
            return
        try:
            if self._notifier is None:
                self._notifier = sdnotify.SystemdNotifier(debug=True)
                self._notifier.socket.setblocking(False)
            for kind, message in tuple(self._owed.items()):
                self._notifier.notify(message)
                del self._owed[kind]
        except BlockingIOError:
            pass
        except OSError:
            # Nobody listens there. If somebody does again it is another socket, and what the last
            # one was told may never have been read.
            self._notifier = None
            if self._line:
                self._owed.setdefault("STATUS", self._line)
