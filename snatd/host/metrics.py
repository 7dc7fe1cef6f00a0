"""Metrics in Prometheus' text format, and the file in which the node exporter's textfile collector
finds them. Does not know what is counted.

Not by prometheus_client: its import takes 3.3 MiB (0.16) to 3.7 MiB (0.26) and 27 ms beyond what
the daemon has (medians of 20), most of it for a web server. All of this takes 0.1 MiB.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snatd.core.errors import ConfigError
from snatd.host import files

PREFIX = "snatd_"
# Prometheus asks every 15 s or so: more often would be for nobody.
_SHORTEST_S = 1.0


@dataclass(frozen=True)
class Sample:
    """A number. `suffix`: what histograms and summaries have behind their name."""

    value: float
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""


@dataclass(frozen=True)
class Metric:
    """`name` without the prefix; `kind` as in a TYPE line."""

    kind: str
    name: str
    help: str
    samples: tuple[Sample, ...]


def render(metrics: Iterable[Metric]) -> bytes:
    """As version 0.0.4 of the text format wants it. What has no sample is left out."""
    lines: list[str] = []
    for one in metrics:
        if one.samples:
            name = PREFIX + one.name
            lines += [f"# HELP {name} {one.help}", f"# TYPE {name} {one.kind}"]
            lines += [f"{name}{it.suffix}{_braced(it.labels)} {it.value}" for it in one.samples]
    # A label may hold all of UTF-8, but a lone surrogate is none.
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")


def _braced(labels: tuple[tuple[str, str], ...]) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class MetricsFile:
    """The file. None as its path: there is none, and nothing is ever written.

    It stays when the daemon ends: who watches a time of the last pass that grows old is told, who
    watches series that are gone is not. `due_s`: when the loop shall offer again what came too soon
    after the last write. `problem`: why it could not be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.due_s: float | None = None
        self.problem = ""
        self._free_s = 0.0

    def check(self) -> None:
        """Raises ConfigError where it cannot be written, with what to do about it."""
        if self.path is None:
            return
        try:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(self.path).st_mode):
                    raise ConfigError((f"metrics_textfile: {_shown(self.path)}: {_NO_FILE}",))
            files.sweep(self.path)
            files.try_out(self.path)
        except OSError as error:
            folder = _shown(self.path.parent)
            first = _FIRST.get(error.errno or 0, "").format(folder=folder)
            raise ConfigError(
                (
                    f"metrics_textfile: {_shown(self.path)} cannot be written: {error.strerror}: "
                    f"{first}snatd.service may write there only after `systemctl edit snatd` "
                    f"with the lines `[Service]` and `ReadWritePaths={folder}`, and "
                    "`systemctl restart snatd`",
                )
            ) from None

    def offer(self, now_s: float, metrics: Callable[[], Iterable[Metric]]) -> None:
        """Replaces the file, by rename; if it was a moment ago, sets `due_s` and leaves it.

        Some 4 kB into the page cache: it waits for no disk.
        """
        if self.path is None:
            return
        if now_s < self._free_s:
            self.due_s = self._free_s
            return
        self.due_s, self._free_s = None, now_s + _SHORTEST_S
        try:
            files.write_whole(self.path, render(metrics()))
            self.problem = ""
        except OSError as error:
            self.problem = f"{_shown(self.path)}: {error.strerror}"

    def is_due(self, now_s: float) -> bool:
        return self.due_s is not None and now_s >= self.due_s

    def remove(self) -> None:
        """For good. Of two files with the same metrics the node exporter (1.5, 1.9) takes the one
        whose name comes first, and that may be the old one. Raises OSError."""
        if self.path is not None:
            with suppress(FileNotFoundError):
                if stat.S_ISREG(os.lstat(self.path).st_mode):
                    self.path.unlink()


_NO_FILE = "there is something else than a regular file, or a symlink: name the file itself"
_FIRST = {
    errno.ENOENT: "make the directory {folder}, or install the node exporter that reads it; ",
    errno.EACCES: "root must own {folder}, since snatd.service has no CAP_DAC_OVERRIDE; ",
}


def _shown(path: Path) -> str:
    """For one line of STATUS and the log."""
    return ascii(str(path))[1:-1]
