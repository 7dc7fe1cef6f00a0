"""Watches two files by inotify (watchdog): subnet.env and the xtables lock.

watchdog's threads do one thing here: write one byte to the wake pipe. What changed is found out by
the pass that follows.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import ObservedWatch

# Its threads complain on stderr when they are stopped in the middle of an event, in their own form.
# What matters of it, a watch that is gone, is found by `rearm`.
logging.getLogger("watchdog").addHandler(logging.NullHandler())
logging.getLogger("watchdog").propagate = False

# Reading a file opens and closes it, and our own reading must not wake us.
_CONTENT = frozenset({"created", "modified", "moved", "deleted", "closed"})
# iptables opens its lock, never writes to it, and closes it when done. watchdog reports a close
# without writing from 5.0 on; before, the digest poll of the legacy tables is all there is.
_RELEASE = frozenset({"closed", "closed_no_write", "created", "deleted", "moved"})


class _Handler(FileSystemEventHandler):
    def __init__(self, path: Path, kinds: frozenset[str], wake: Callable[[], None]) -> None:
        self._path = str(path)
        self._kinds = kinds
        self._wake = wake

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in self._kinds:
            return
        for name in (event.src_path, getattr(event, "dest_path", "")):
            path = os.fsdecode(name) if name else ""
            # The file itself, or a directory on the way to it that came or went.
            if path and (self._path == path or self._path.startswith(path + "/")):
                self._wake()
                return


@dataclass
class _Armed:
    """A watch on the nearest directory that exists, and which directory that was."""

    watch: ObservedWatch
    directory: Path
    identity: tuple[int, int]


class FileWatch:
    """The watches on the files that matter. `rearm` at each pass: directories come and go."""

    def __init__(self) -> None:
        """Raises OSError where inotify has no instance left."""
        self._observer = Observer()
        self._targets: dict[Path, _Handler] = {}
        self._armed: dict[Path, _Armed] = {}

    def add(self, path: Path, wake: Callable[[], None], *, release: bool = False) -> None:
        """Calls `wake` (on a thread of watchdog's) after the file's content changed, or with
        `release` after somebody closed it."""
        self._targets[path] = _Handler(path, _RELEASE if release else _CONTENT, wake)

    def start(self) -> None:
        """Starts the threads. Raises OSError where inotify has no instance left, or where there can
        be no thread."""
        try:
            self._observer.start()
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, str(error)) from None

    def rearm(self, resting: Collection[Path] = ()) -> tuple[str, ...]:
        """Puts each watch where its file is now, and takes off those of `resting`; returns what
        could not be watched, and why.

        watchdog does not notice that a watched directory was removed and made again: its emitter
        dies and the observer stays "alive". So the directory's identity is compared instead.
        """
        problems = []
        for path, handler in self._targets.items():
            try:
                if path in resting:
                    self._disarm(path, handler)
                else:
                    self._rearm(path, handler)
            except (OSError, RuntimeError) as error:
                why = getattr(error, "strerror", None) or error
                problems.append(f"{path} cannot be watched: {why}")
        return tuple(problems)

    def _rearm(self, path: Path, handler: _Handler) -> None:
        directory = path.parent
        while not directory.is_dir():
            directory = directory.parent
        status = directory.stat()
        identity = (status.st_dev, status.st_ino)
        armed = self._armed.get(path)
        if armed and (armed.directory, armed.identity) == (directory, identity):
            return
        self._disarm(path, handler)
        watch = self._observer.schedule(handler, str(directory), recursive=False)
        self._armed[path] = _Armed(watch, directory, identity)

    def _disarm(self, path: Path, handler: _Handler) -> None:
        armed = self._armed.pop(path, None)
        if armed:
            self._observer.remove_handler_for_watch(handler, armed.watch)
            if not any(other.watch == armed.watch for other in self._armed.values()):
                self._observer.unschedule(armed.watch)

    def stop(self) -> None:
        """Ends the threads; waits for them at most a second, they are daemons."""
        self._observer.stop()
        if self._observer.is_alive():
            self._observer.join(1.0)
