"""What `revert` needs, on disk: written whole, and half of it is none."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from snatd.core.model import Rule, Ruleset
from snatd.core.plan import plan
from snatd.core.revert import Memory
from snatd.host.memory import MemoryDamaged, MemoryFile
from tests.fakes import BROAD, LEGACY, NFT, V4, V6, N, P, networks, wish

(P6,) = networks("fd00:7:21::/64")
ODD = '-s 172.7.21.0/24 -m comment --comment "it\\\'s \\"odd\\" \u2028\udcff" -j MASQUERADE'
ALL = {
    (V4, NFT, P): Memory(P, ((BROAD, 2), (ODD, 1))),
    (V4, NFT, N): Memory(N, ((BROAD, 1),)),
    (V4, LEGACY, P): Memory(P),
    (V6, NFT, P6): Memory(P6, (("-s fd00:7:21::/64 -j MASQUERADE", 64),)),
}


def test_what_is_stored_is_loaded(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path / "a" / "b")
    assert memory.load() == {}
    memory.store(ALL)
    assert MemoryFile(tmp_path / "a" / "b").load() == ALL
    memory.store({})
    assert memory.load() == {}


def test_only_root_may_read_it_and_it_says_its_schema(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path)
    memory.store(ALL)
    assert stat.S_IMODE(memory.path.stat().st_mode) == 0o600
    assert json.loads(memory.path.read_bytes())["schema"] == 1
    assert [one.name for one in tmp_path.iterdir()] == ["replaced.json"]


def test_it_is_forgotten(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path)
    memory.forget()
    memory.store(ALL)
    memory.forget()
    assert memory.load() == {}


def test_where_it_cannot_be_stored_the_old_one_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    memory = MemoryFile(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        memory.store(ALL)


def entry(**changes: object) -> bytes:
    """A file of one entry with a few of its values changed."""
    rule = {"text": BROAD, "copies": 1}
    one = {"family": "ipv4", "backend": "nft", "subnet": str(P), "rules": [rule]} | changes
    return json.dumps({"schema": 1, "replaced": [one]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"1",
        b'"schema"',
        b"{}",
        b'{"schema": 1}',
        b'{"schema": 2, "replaced": []}',
        b'{"schema": 1, "replaced": 7}',
        b'{"schema": 1, "replaced": [7]}',
        b"\xff\xfe",
        b"\0" * 100,
        b"[" * 100_000,
        entry(family="ipx"),
        entry(backend="pf"),
        entry(subnet="172.7.21.1/24"),
        entry(subnet="nowhere"),
        entry(subnet=None),
        entry(rules=None),
        entry(rules=[{"text": BROAD}]),
        entry(rules=[{"text": BROAD, "copies": 0}]),
        entry(rules=[{"text": BROAD, "copies": -1}]),
        entry(rules=[{"text": BROAD, "copies": 65}]),
        entry(rules=[{"text": BROAD, "copies": "many"}]),
        entry(rules=[{"text": BROAD, "copies": float("inf")}]),
        entry(rules=[{"text": "-j A\n-F POSTROUTING", "copies": 1}]),
    ],
)
def test_half_a_memory_is_none_and_told(content: bytes, tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path)
    memory.path.write_bytes(content)
    with pytest.raises(MemoryDamaged, match=r"replaced\.json is damaged"):
        memory.load()
    assert memory.path.read_bytes() == content


def test_where_ours_is_added_what_others_stand_for_is_gone(tmp_path: Path) -> None:
    """In both backends of the family, and on disk."""
    memory = MemoryFile(tmp_path)
    memory.store(ALL)
    wanted = wish()
    (added,) = plan(wanted, {NFT: Ruleset(V4, NFT)}, NFT)
    memory.keep(added, P, pytest.fail)
    now = memory.load()
    assert now[V4, NFT, P] == replace(ALL[V4, NFT, P], gone=frozenset({BROAD, ODD}))
    assert {key: now[key] for key in ALL if key[1:] != (NFT, P)} == {
        key: ALL[key] for key in ALL if key[1:] != (NFT, P)
    }
    replaced = Ruleset(V4, NFT, (Rule(BROAD),))
    (narrowed,) = plan(wanted, {NFT: replaced}, NFT)
    memory.keep(narrowed, P, pytest.fail)
    assert memory.load()[V4, NFT, P].gone == {ODD}


def test_it_does_not_grow_without_end(tmp_path: Path) -> None:
    subnets = networks(" ".join(f"10.0.{number}.0/24" for number in range(200)))
    memory = MemoryFile(tmp_path)
    memory.store({(V4, NFT, subnet): Memory(subnet) for subnet in subnets})
    assert [subnet for _, _, subnet in memory.load()] == list(subnets[-64:])


def test_the_entry_above_is_a_good_one(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path)
    memory.path.write_bytes(entry())
    assert memory.load() == {(V4, NFT, P): Memory(P, ((BROAD, 1),))}


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    memory = MemoryFile(tmp_path)
    memory.path.mkdir()
    with pytest.raises(OSError, match=r"replaced\.json"):
        memory.load()
