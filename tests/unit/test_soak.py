"""That the soak would see what it looks for, and what it tells then."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from snatd.core.model import Backend, Family
from tests.lab.netns import Namespace
from tests.soak.deeds import Op
from tests.soak.model import Table, difference, parse
from tests.soak.report import Size, growth
from tests.soak.rivals import Restore
from tests.soak.rounds import make_round, shortened
from tests.soak.rules import V4, broads, foreign, is_ours, stale

OURS = "-s 172.7.21.0/24 ! -d 172.7.0.0/16 -m comment --comment snatd -j MASQUERADE"


@pytest.mark.parametrize(
    ("actual", "says"),
    [
        (["a", "b", "c"], ""),
        ([OURS, "a", OURS, "b", "c", OURS], ""),
        (["a", "c"], "rule 2 is 'c', expected 'b'"),
        (["a", "b"], "lost: 'c'"),
        (["b", "a", "c"], "rule 1 is 'b', expected 'a'"),
        (["a", "b", "b", "c"], "rule 3 is 'b', expected 'c'"),
        (["a", "b", "c", "d"], "rule 4 is 'd', expected 'nothing more'"),
        (["a", "B", "c"], "rule 2 is 'B', expected 'b'"),
    ],
)
def test_a_rule_that_is_lost_moved_or_changed_is_seen(actual: list[str], says: str) -> None:
    assert difference(["a", "b", "c"], actual, is_ours) == says


def test_a_table_knows_its_chains() -> None:
    table = Table(is_ours, {"POSTROUTING": ["-j X"], "X": ["a"]})
    right = {"POSTROUTING": [OURS, "-j X"], "X": ["a"], "SNATD-POSTROUTING": ["-j MASQUERADE"]}
    assert table.difference(right) == ""
    assert table.difference({"POSTROUTING": ["-j X"]}) == "chain X is gone"
    assert "nobody made: ['Y']" in table.difference({**right, "Y": []})
    assert table.difference({**right, "X": []}) == "X: lost: 'a'"
    table.frozen = True
    assert "is '-s 172" in table.difference(right)


def test_a_listing_with_a_newline_in_a_string() -> None:
    listing = '-P INPUT ACCEPT\n-P POSTROUTING ACCEPT\n-N X\n-A POSTROUTING -m "a\n-A \\"" -j X\n'
    assert parse(listing) == {"POSTROUTING": ['-m "a\n-A \\"" -j X'], "X": []}


def test_whose_rules_are() -> None:
    broad = broads(V4, "172.7.21.0/24")
    for number in range(1000):
        rule = foreign(V4, number)
        assert not is_ours(rule)
        assert rule not in broad
    assert is_ours(stale(V4, 0))
    assert is_ours(stale(V4, 1))


OPS = tuple(Op("nft", "add", number) for number in range(100))


@pytest.mark.parametrize("needed", [(3,), (97,), (0, 99), (12, 13, 60)])
def test_a_sequence_is_shortened_to_what_it_takes(needed: tuple[int, ...]) -> None:
    def fails(ops: Sequence[Op]) -> bool:
        return {OPS[one] for one in needed} <= set(ops)

    assert shortened(OPS, fails, time.monotonic() + 60) == tuple(OPS[one] for one in needed)
    assert shortened(OPS, fails, time.monotonic()) == OPS


def test_a_seed_gives_the_same_round() -> None:
    assert make_round("33-1", 50) == make_round("33-1", 50)
    assert make_round("33-1", 50) != make_round("33-2", 50)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([Size(50_000, 14, 0)] * 50, ""),
        ([Size(40_000 + min(number, 20) * 500, 14, 0) for number in range(50)], ""),
        ([Size(40_000 + number * 200, 14, 0) for number in range(50)], "KiB of memory"),
        ([Size(50_000, 14 + number // 10, 0) for number in range(50)], "descriptors"),
        ([Size(50_000, 14, number // 10) for number in range(50)], "children"),
    ],
)
def test_what_grows_is_seen(sizes: list[Size], says: str) -> None:
    assert says in growth(sizes)
    assert bool(says) == bool(growth(sizes))


def test_a_writer_that_ends_without_a_word_has_failed() -> None:
    host = Namespace()
    try:
        rival = Restore(host, Backend.NFT, Family.V4)
        rival._argv = ["sh", "-c", "read line"]
        assert rival.commit("-A POSTROUTING -j ACCEPT") == "it ended without a word"
        rival.close()
    finally:
        host.close()
