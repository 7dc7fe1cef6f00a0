"""snatd.toml: the defaults, every key, every complaint."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from snatd.config import Config, from_table, load
from snatd.core.errors import ConfigError
from snatd.core.model import EgressPolicy, GuardPolicy, Policy
from tests.fakes import LEGACY, networks


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "snatd.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def complaints(table: dict[str, Any]) -> tuple[str, ...]:
    return from_table(table, "snatd.toml")[1]


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == Config()
    assert Config().policy == Policy()
    assert Config().mode == "enforce"
    assert str(Config().subnet_file) == "/run/flannel/subnet.env"
    assert Config().resync == 60.0


def test_every_key(tmp_path: Path) -> None:
    text = """
        mode = "observe"
        subnet_file = "/srv/subnet.env"
        networks = ["10.9.0.0/16", "fd00:9::/48"]
        exclude = ["10.9.1.0/24", "192.168.0.1/32"]
        egress = "keep"
        backend = "legacy"
        resync = 30
        runtime_dir = "/run/other"
        state_dir = "/srv/state"
        log_level = "debug"
        log_format = "json"
        guard = "off"
        masquerade_marks = ["0x4000", "8"]
        stale_flows = "udp"
        probe = "off"
        saved_rules = "/etc/iptables/rules.v4"
        metrics_textfile = "/srv/snatd.prom"
    """
    found = load(written(tmp_path, text))
    assert found == Config(
        mode="observe",
        subnet_file=Path("/srv/subnet.env"),
        networks=networks("10.9.0.0/16 fd00:9::/48"),
        exclude=networks("10.9.1.0/24 192.168.0.1/32"),
        egress="keep",
        backend="legacy",
        resync=30.0,
        runtime_dir=Path("/run/other"),
        state_dir=Path("/srv/state"),
        log_level="debug",
        log_format="json",
        guard="off",
        masquerade_marks=(0x4000, 8),
        stale_flows="udp",
        probe="off",
        saved_rules="/etc/iptables/rules.v4",
        metrics_textfile=Path("/srv/snatd.prom"),
    )
    assert all(getattr(found, one.name) != one.default for one in fields(Config))
    assert found.policy == Policy(
        found.networks, found.exclude, EgressPolicy.KEEP, LEGACY, GuardPolicy.OFF, (0x4000, 8)
    )


def test_all_complaints_come_at_once() -> None:
    found = complaints(
        {"mode": "off", "networks": ["x"], "typo": 1, "resync": "often", "backend": "nft"}
    )
    assert len(found) == 4
    assert [one.split(": ")[1] for one in found] == ["mode", "networks", "typo", "resync"]
    assert all(one.startswith("snatd.toml: ") for one in found)


def test_an_unknown_key_is_told_which_one_is_meant() -> None:
    (found,) = complaints({"network": ["10.0.0.0/8"]})
    assert found.endswith("network: unknown key; is networks meant?")
    (found,) = complaints({"colour": "red"})
    assert found.endswith("colour: unknown key; `man snatd.toml` has them all")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("mode", "off", "'enforce', 'observe'"),
        ("mode", True, "none of"),
        ("mode", ["enforce"], "none of"),
        ("egress", "yes", "none of"),
        ("backend", "iptables", "none of"),
        ("guard", "maybe", "none of"),
        ("log_level", 3, "none of"),
        ("log_format", "xml", "none of"),
        ("stale_flows", "delete", "none of"),
        ("probe", "", "none of"),
        ("subnet_file", "run/flannel", "absolute path"),
        ("subnet_file", "", "absolute path"),
        ("subnet_file", 1, "absolute path"),
        ("subnet_file", "/a\0b", "absolute path"),
        ("state_dir", ["/var"], "absolute path"),
        ("metrics_textfile", "x.prom", "absolute path"),
        ("metrics_textfile", "/etc/passwd", "does not end in .prom"),
        ("saved_rules", "on", "absolute path"),
        ("saved_rules", False, "absolute path"),
        ("networks", "10.0.0.0/8", "not a list"),
        ("networks", {"a": 1}, "not a list"),
        ("networks", [10], "CIDR in quotes"),
        ("networks", ["10.0.0.1/8"], "not a CIDR.*host bits"),
        ("networks", ["10.0.0.0/33"], "not a CIDR"),
        ("networks", ["cluster"], "not a CIDR"),
        ("networks", ["172.8.0.0"], "no prefix length"),
        ("networks", ["0.0.0.0/0"], "wider than /8"),
        ("networks", ["128.0.0.0/7"], "wider than /8"),
        ("networks", ["fc00::/7"], "wider than /16"),
        ("networks", ["fd00::%x -j ACCEPT -d /32"], "not a CIDR"),
        ("exclude", ["10.0.0.1/8"], "not a CIDR"),
        ("exclude", ["fd00::%eth0/64"], "not a CIDR"),
        ("masquerade_marks", "0x4000", "not a list"),
        ("masquerade_marks", [0x4000], "in quotes"),
        ("masquerade_marks", ["0x6000"], "one bit"),
        ("masquerade_marks", ["0"], "one bit"),
        ("masquerade_marks", ["0x100000000"], "one bit"),
        ("masquerade_marks", ["-1"], "one bit"),
        ("masquerade_marks", ["mark"], "one bit"),
        ("resync", 0.5, "from 1 to 3600"),
        ("resync", 3601, "from 1 to 3600"),
        ("resync", True, "number of seconds"),
        ("resync", "60", "number of seconds"),
        ("resync", float("nan"), "number of seconds"),
        ("resync", float("inf"), "number of seconds"),
        pytest.param("resync", 2**20000, "resync", id="resync-huge"),
    ],
)
def test_a_wrong_value_is_one_complaint(key: str, value: object, why: str) -> None:
    (complaint,) = complaints({key: value})
    assert complaint.startswith(f"snatd.toml: {key}: ")
    assert re.search(why, complaint)


def test_excluding_all_the_world_is_a_wish() -> None:
    assert from_table({"exclude": ["0.0.0.0/0"]}, "")[0].exclude == networks("0.0.0.0/0")


def test_the_bounds_belong_to_the_range() -> None:
    assert from_table({"resync": 1}, "")[0].resync == 1.0
    assert from_table({"resync": 3600.0}, "")[0].resync == 3600.0


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("mode = ", "not TOML"),
        ("mode: enforce", "not TOML"),
        ('mode = "enforce"\nmode = "observe"\n', "not TOML"),
        ("\ufeffmode = 1", "not TOML"),
        (b"# caf\xe9\n", "not UTF-8 at byte 5"),
        # Half a minute of tomllib's, if it were read.
        (b"a." * 40_000, "larger than 64 KiB"),
        ("networks = " + "[" * 50_000, "not TOML"),
        ("resync = " + "9" * 5000, "not TOML"),
    ],
)
def test_a_file_that_is_no_toml(content: str | bytes, why: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=why) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_named_file_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "missing.toml")


def test_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_a_complaint_is_one_line() -> None:
    # It ends up in STATUS=, where a line of its own would be a message of its own.
    (found,) = complaints({"a\nREADY=1": 1})
    assert "\n" not in found
