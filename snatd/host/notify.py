"""Speaks to systemd: readiness, reloads, STATUS, the watchdog. Silent where nobody listens."""

from __future__ import annotations

import os
import time

import sdnotify


class Notifier:
    """The service's side of sd_notify(3). Never blocks: a full socket drops the message."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        if self._notifier.socket is not None:
            self._notifier.socket.setblocking(False)
        self._status = ""
        self._fed_s = 0.0
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(microseconds) / 1e6 if for_us and microseconds.isdecimal() else None
        """systemd's watchdog time-out for this process, None if it set none."""

    def status(self, text: str) -> None:
        """STATUS=, if it changed."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def ready(self) -> None:
        self._send("READY=1")

    def reloading(self) -> None:
        # systemd 253's notify-reload wants the time; older ones ignore it.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self, now_s: float) -> None:
        """Feeds the watchdog, several times per time-out and not more often than that."""
        if self.watchdog_s is not None and now_s - self._fed_s >= self.watchdog_s / 8:
            self._fed_s = now_s
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        # sdnotify encodes to latin-1 and swallows the error: one odd character would lose it all.
        self._notifier.notify(message.encode("ascii", "replace").decode("ascii"))
