"""The guard as text: what is written, what is read back, and when it is written again."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from snatd.core.desired import Absent, CutOut
from snatd.core.errors import RuleError
from snatd.core.guard import guard_rules, guard_script, parse_guard, plan_guard, without_guard
from snatd.core.model import Backend, Counters, GuardPolicy, Hold, Policy, Rule, Ruleset
from snatd.core.plan import Change
from tests.fakes import ETH0, LO, V4, V6, each_line, lease, networks, node, texts, wish

EMPTY = Ruleset(V4, Backend.GUARD)
MARKS = (0x4000, 0x2000)
CHAIN = "chain ip snatd postrouting { type nat hook postrouting priority -199; policy accept; }"
RULE = (
    "rule ip snatd postrouting ip saddr 172.7.21.0/24 ip daddr 172.7.0.0/16"
    " ip daddr != 172.7.21.0/24 meta mark & 0x6000 == 0 counter snat to ip saddr"
)


def guarded(*lines: str) -> Ruleset:
    return replace(EMPTY, postrouting=tuple(map(Rule, lines)))


def test_one_network() -> None:
    assert texts(guard_rules(wish(), MARKS)) == [CHAIN, RULE]


def test_several_networks_and_cut_outs() -> None:
    wanted = replace(
        wish(),
        cluster=networks("10.0.0.0/8 172.7.0.0/16"),
        cut_outs=(
            CutOut(ip_network("10.4.7.0/24"), "directly connected on eth0"),
            CutOut(ip_network("10.9.9.9/32"), "exclude"),
        ),
    )
    assert each_line(texts(guard_rules(wanted, ()))) == each_line(
        [
            CHAIN,
            "rule ip snatd postrouting ip daddr 10.4.7.0/24 return",
            "rule ip snatd postrouting ip daddr 10.9.9.9 return",
            "rule ip snatd postrouting ip saddr 172.7.21.0/24 ip daddr 10.0.0.0/8"
            " ip daddr != 172.7.21.0/24 counter snat to ip saddr",
            "rule ip snatd postrouting ip saddr 172.7.21.0/24 ip daddr 172.7.0.0/16"
            " ip daddr != 172.7.21.0/24 counter snat to ip saddr",
        ]
    )


def test_ipv6_is_the_same_with_another_family() -> None:
    wanted = wish(node(lease("fd00:7:21::1/64", "fd00:7::/32", V6)), family=V6)
    assert texts(guard_rules(wanted, (0x4000,))) == [
        CHAIN.replace("chain ip ", "chain ip6 "),
        "rule ip6 snatd postrouting ip6 saddr fd00:7:21::/64 ip6 daddr fd00:7::/32"
        " ip6 daddr != fd00:7:21::/64 meta mark & 0x4000 == 0 counter snat to ip6 saddr",
    ]


def script(before: Ruleset, *, ends: bool = False) -> str:
    transaction = without_guard(before) if ends else plan_guard(wish(), before, Policy())
    assert transaction is not None
    assert transaction.backend is Backend.GUARD
    return guard_script(transaction)


ADD_TABLE = (
    'add table ip snatd { comment "cluster traffic keeps its source address; kept by snatd, '
    'removed by `snatd revert`; see `snatd explain` and man snatd"; }'
)
WRITE = f'add {CHAIN}\nflush chain ip snatd postrouting\nadd {RULE} comment "snatd"\n'


def test_the_script_of_a_new_one() -> None:
    assert script(EMPTY) == f"{ADD_TABLE}\n{WRITE}"


def test_a_right_chain_is_never_deleted() -> None:
    assert script(guarded(CHAIN, "rule ip snatd postrouting masquerade")) == (
        f"{ADD_TABLE}\n{WRITE}"
    )


@pytest.mark.parametrize(
    "before",
    [
        (CHAIN.replace("-199", "100"), RULE),
        (CHAIN, "chain ip snatd extra", RULE),
        (CHAIN, "set ip snatd {}", RULE),
        (RULE,),
    ],
)
def test_a_wrong_chain_goes_in_the_same_transaction(before: tuple[str, ...]) -> None:
    assert script(guarded(*before)) == (f"{ADD_TABLE}\ndelete table ip snatd\n{ADD_TABLE}\n{WRITE}")


def test_the_script_of_its_end() -> None:
    assert script(guarded(CHAIN, RULE), ends=True) == "add table ip snatd\ndelete table ip snatd\n"
    assert without_guard(EMPTY) is None


# What nft 1.0.6 prints.
META = {"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5"}}
TABLE = {"table": {"family": "ip", "name": "snatd", "handle": 2}}
JSON_CHAIN = {
    "chain": {
        "family": "ip",
        "table": "snatd",
        "name": "postrouting",
        "handle": 1,
        "type": "nat",
        "hook": "postrouting",
        "prio": -199,
        "policy": "accept",
    }
}


def payload(field: str) -> dict[str, Any]:
    return {"payload": {"protocol": "ip", "field": field}}


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def prefix(address: str, length: int) -> dict[str, Any]:
    return {"prefix": {"addr": address, "len": length}}


MARK = {"meta": {"key": "mark"}}
STATEMENTS = [
    match(payload("saddr"), prefix("172.7.21.0", 24)),
    match(payload("daddr"), prefix("172.7.0.0", 16)),
    match(payload("daddr"), prefix("172.7.21.0", 24), "!="),
    match({"&": [MARK, 0x6000]}, 0),
    {"counter": {"packets": 3, "bytes": 180}},
    {"snat": {"addr": payload("saddr")}},
]


def printed(*statements: dict[str, Any], **more: Any) -> str:
    rule = {"family": "ip", "table": "snatd", "chain": "postrouting", "handle": 4, **more}
    return json.dumps(
        {"nftables": [META, TABLE, JSON_CHAIN, {"rule": {**rule, "expr": list(statements)}}]}
    )


def read(output: str) -> Ruleset:
    return replace(EMPTY, postrouting=parse_guard(output))


def test_what_nft_prints_is_what_was_written() -> None:
    found = read(printed(*STATEMENTS, comment="snatd"))
    assert texts(found.postrouting) == [CHAIN, RULE]
    assert found.postrouting[1].counters == Counters(3, 180)
    assert plan_guard(wish(), found, Policy()) is None


@pytest.mark.parametrize(
    "changed",
    [
        [*STATEMENTS[1:]],
        [*STATEMENTS[:-1]],
        [*STATEMENTS[:-1], {"masquerade": None}],
        [*STATEMENTS[:-1], {"snat": {"addr": "10.4.7.21"}}],
        [*STATEMENTS[:-1], {"snat": {"addr": payload("saddr"), "flags": "random"}}],
        [STATEMENTS[0], match(payload("daddr"), prefix("172.0.0.0", 8)), *STATEMENTS[2:]],
        [match(payload("saddr"), {"set": [prefix("172.7.21.0", 24)]}), *STATEMENTS[1:]],
        [*STATEMENTS[:3], match({"&": [MARK, 0x2000]}, 0), *STATEMENTS[4:]],
        [{"limit": {"rate": 1, "per": "day"}}, *STATEMENTS],
    ],
)
def test_anything_else_is_written_again(changed: list[dict[str, Any]]) -> None:
    found = read(printed(*changed))
    transaction = plan_guard(wish(), found, Policy())
    assert transaction is not None
    assert transaction.added == (f"add {RULE}",)
    assert [reason.change for reason in transaction.reasons] == [Change.GUARD_WRITTEN]


def test_a_dormant_table_is_none() -> None:
    """Its rules are there, and the kernel does not ask them."""
    output = printed(*STATEMENTS).replace('"handle": 2}', '"handle": 2, "flags": "dormant"}')
    before = read(output)
    transaction = plan_guard(wish(), before, Policy())
    assert transaction is not None
    assert guard_script(transaction).splitlines()[1] == "delete table ip snatd"


def test_a_mask_of_the_highest_bits_is_printed_as_a_prefix() -> None:
    highest = match(MARK, prefix("", 1))
    highest["match"]["right"] = {"prefix": {"addr": 0, "len": 1}}
    found = read(printed(*STATEMENTS[:3], highest, *STATEMENTS[4:]))
    assert plan_guard(wish(), found, Policy(masquerade_marks=(2**31,))) is None


@pytest.mark.parametrize(
    "output",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"nftables": null}',
        '{"nftables": [1]}',
        '{"nftables": [{}]}',
        '{"nftables": [{"chain": {}}]}',
        '{"nftables": [{"rule": {"family": "ip", "table": "snatd", "chain": "x", "expr": [3]}}]}',
        "[" * 100_000,
    ],
)
def test_what_is_not_nfts_json_is_an_error(output: str) -> None:
    with pytest.raises(RuleError):
        parse_guard(output)


def test_no_lease_in_a_family_ends_it() -> None:
    there = guarded(CHAIN, RULE)
    transaction = plan_guard(Absent(V4), there, Policy())
    assert transaction is not None
    assert transaction.removed == (f"add {CHAIN}", f"add {RULE}")
    assert plan_guard(Absent(V4, certain=False), there, Policy()) is None
    assert plan_guard(Absent(V4), EMPTY, Policy()) is None


def test_off_ends_it() -> None:
    off = Policy(guard=GuardPolicy.OFF)
    transaction = plan_guard(wish(), guarded(CHAIN, RULE), off)
    assert transaction is not None
    assert transaction.added == ()
    assert plan_guard(wish(), EMPTY, off) is None


def test_it_needs_no_bridge() -> None:
    unbridged = wish(node(None, LO, ETH0))
    assert isinstance(unbridged.bridge, Hold)
    transaction = plan_guard(unbridged, EMPTY, Policy())
    assert transaction is not None
    assert transaction.added == (f"add {CHAIN}", f"add {RULE}")
