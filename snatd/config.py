"""The only reader of configuration: TOML in, one `Config` value or every complaint at once out."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from snatd.core import networks
from snatd.core.errors import ConfigError
from snatd.core.model import (
    SHORTEST_PREFIX,
    Backend,
    EgressPolicy,
    Family,
    GuardPolicy,
    Network,
    Policy,
)
from snatd.host.files import FileRefused, open_to_others, read_bounded

DEFAULT_PATH = Path("/etc/snatd/snatd.toml")

# The time that tomllib takes for a key grows with the square of its dots: 10 s for this many bytes
# of one key, and an hour for a megabyte (3.11).
LARGEST_FILE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Config:
    """Every key of snatd.toml with its default. What a key means is in README.md."""

    mode: str = "enforce"
    subnet_file: Path = Path("/run/flannel/subnet.env")
    networks: tuple[Network, ...] = ()
    exclude: tuple[Network, ...] = ()
    egress: str = "auto"
    backend: str = "auto"
    resync: float = 60.0
    runtime_dir: Path = Path("/run/snatd")
    state_dir: Path = Path("/var/lib/snatd")
    log_level: str = "info"
    log_format: str = "auto"
    guard: str = "auto"
    masquerade_marks: tuple[int, ...] = (0x4000, 0x2000)
    stale_flows: str = "report"
    probe: str = "repair"
    saved_rules: str = "auto"
    metrics_textfile: Path | None = None

    @property
    def policy(self) -> Policy:
        backend = None if self.backend == "auto" else Backend(self.backend)
        return Policy(
            self.networks,
            self.exclude,
            EgressPolicy(self.egress),
            backend,
            GuardPolicy(self.guard),
            self.masquerade_marks,
        )

    @property
    def marks(self) -> int:
        """The bits of `masquerade_marks` together."""
        return reduce(or_, self.masquerade_marks, 0)


_CHOICES = {
    "mode": ("enforce", "observe"),
    "egress": ("auto", "ensure", "keep"),
    "backend": ("auto", "legacy", "nft"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("auto", "journal", "json", "console"),
    "guard": ("auto", "on", "off"),
    "stale_flows": ("off", "report", "udp", "all"),
    "probe": ("repair", "resync", "off"),
}
_PATHS = ("subnet_file", "runtime_dir", "state_dir")
_RESYNC_S = (1.0, 3600.0)


def load(path: Path | None = None) -> Config:
    """Reads the file, or the default one if it exists. Raises ConfigError with all complaints."""
    settings, complaints = read(path)
    if complaints:
        raise ConfigError(complaints)
    return settings


def read(path: Path | None = None) -> tuple[Config, tuple[str, ...]]:
    """What the file says as far as that can be, the defaults for the rest, and all complaints:
    for those who look, and do nothing by it. Raises ConfigError only for a named file that is
    missing."""
    named = path is not None
    path = path or DEFAULT_PATH
    try:
        if why := open_to_others(path):
            why = f"{path}: not read, since others decide what it says, and root does it: {why}"
            return Config(), (why,)
        raw = read_bounded(path, LARGEST_FILE_BYTES)
    except FileNotFoundError:
        if named:
            raise ConfigError((f"{path}: no such file, but --config names it",)) from None
        return Config(), ()
    except OSError as error:
        return Config(), (f"{path}: cannot be read: {error.strerror}",)
    except FileRefused as error:
        return Config(), (f"{path}: cannot be read: {error}",)
    try:
        table = tomllib.loads(raw.decode())
    except UnicodeDecodeError as error:
        return Config(), (f"{path}: not UTF-8 at byte {error.start}",)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a bare ValueError
        return Config(), (f"{path}: not TOML: {error}",)
    return from_table(table, str(path))


def from_table(table: dict[str, Any], where: str) -> tuple[Config, tuple[str, ...]]:
    """A configuration of what is right in a parsed table, and the complaints about the rest, each
    of which `where` begins."""
    complaints: list[str] = []
    values: dict[str, Any] = {}
    known = [one.name for one in fields(Config)]
    for key, value in table.items():
        if key not in known:
            from difflib import get_close_matches  # 2 ms that no start without a mistake takes

            meant = get_close_matches(key, known, 1)
            help_ = f"is {meant[0]} meant?" if meant else "`man snatd.toml` has them all"
            complaints.append(f"{where}: {_shown(key)}: unknown key; {help_}")
            continue
        try:
            values[key] = _value(key, value)
        except ValueError as error:
            complaints.append(f"{where}: {key}: {error}")
    return Config(**values), tuple(complaints)


def _shown(key: str) -> str:
    return key if key.isprintable() else repr(key)


def _value(key: str, value: Any) -> Any:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ValueError(f"{value!r} is none of {', '.join(map(repr, _CHOICES[key]))}")
        return value
    if key in _PATHS:
        return _path(value)
    if key == "metrics_textfile":
        return _prom_path(value)
    if key == "saved_rules":
        return value if value in ("auto", "off") else str(_path(value))
    if key in ("networks", "exclude"):
        return _each(value, lambda one: _network(one, cluster=key == "networks"))
    if key == "masquerade_marks":
        return _each(value, _mark)
    return _seconds(value)


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError(f"{value!r} is not an absolute path")
    return Path(value)


def _prom_path(value: Any) -> Path:
    path = _path(value)
    if not path.name.endswith(".prom"):
        raise ValueError(f"{value!r} does not end in .prom: the node exporter would not read it")
    return path


def _each(value: Any, one: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return tuple(one(item) for item in value)


def _network(value: Any, *, cluster: bool) -> Network:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a CIDR in quotes")
    try:
        network = networks.network(value)
    except ValueError as error:
        raise ValueError(f"not a CIDR: {error}") from None
    if cluster and "/" not in value:
        raise ValueError(f"{value!r} has no prefix length, as 172.7.0.0/16 has")
    family = Family.V4 if network.version == 4 else Family.V6
    if cluster and network.prefixlen < SHORTEST_PREFIX[family]:
        raise ValueError(
            f"{network} is wider than /{SHORTEST_PREFIX[family]}: "
            "that would exempt much of the world from masquerading"
        )
    return network


def _mark(value: Any) -> int:
    try:
        mark = int(value, 0) if isinstance(value, str) else None
    except ValueError:
        mark = None
    if mark is None or not 0 < mark < 2**32 or mark & (mark - 1):
        raise ValueError(f'{value!r} is not one bit of a packet mark in quotes, like "0x4000"')
    return mark


def _seconds(value: Any) -> float:
    low, high = _RESYNC_S
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{value!r} is not a number of seconds from {low:g} to {high:g}")
    return float(value)
