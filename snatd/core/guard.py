"""The guard: a small nft table whose nat chain gives cluster traffic its own address first.

A connection that has a NAT binding is skipped by every later nat chain, so whoever writes whatever
rule, in nf_tables or ip_tables, comes too late. Pure: reads what `nft -j` printed, plans, and makes
the script for `nft -f`; who runs nft is `kernel.guard`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import or_
from typing import Any

from snatd.core.desired import Absent, Desired
from snatd.core.errors import RuleError
from snatd.core.model import (
    POSTROUTING,
    Backend,
    Counters,
    Family,
    GuardPolicy,
    Network,
    Policy,
    Rule,
    Ruleset,
)
from snatd.core.plan import ChainEdit, Change, Reason, Transaction

TABLE = "snatd"
CHAIN = "postrouting"
# All nat chains run in the kernel's one nat hook, at 100; their own priority only orders them
# there, and -199 is the first that it takes. Marks set before are seen.
PRIORITY = -199

# At most 128 characters (nft 1.0).
_COMMENT = (
    "cluster traffic keeps its source address; kept by snatd, removed by `snatd revert`; "
    "see `snatd explain` and man snatd"
)
_RULE_COMMENT = "snatd"


def guard_rules(wanted: Desired, marks: Iterable[int]) -> tuple[Rule, ...]:
    """The table for one family, as nft's own `add` takes it: the chain, a RETURN for each cut-out
    and a rule for each network.

    The destination is compared with the subnet and not the interface with the bridge: so it stands
    before the bridge does, and hairpin traffic (a container to itself by a service) is left alone.

    No sets: the elements of one that is replaced go before the last packet that is looking for
    them. Replaced in a loop, `ip daddr { N, M }` left up to 10 of 50,000 connections without a
    guard, single prefixes 0 of 250,000 (6.18).
    """
    table = _TABLES[wanted.family]
    head = f"{table} {TABLE} {CHAIN}"
    # nft calls the header as it calls the family.
    source, destination = f"{table} saddr", f"{table} daddr"
    mask = reduce(or_, marks, 0)
    unmarked = f" meta mark & {mask:#x} == 0" if mask else ""
    return (
        Rule(f"chain {head} {{ type nat hook postrouting priority {PRIORITY}; policy accept; }}"),
        *(
            Rule(f"rule {head} {destination} {_prefix(cut_out.network)} return")
            for cut_out in wanted.cut_outs
        ),
        *(
            Rule(
                f"rule {head} {source} {_prefix(wanted.subnet)} {destination} {_prefix(network)} "
                f"{destination} != {_prefix(wanted.subnet)}{unmarked} counter snat to {source}"
            )
            for network in wanted.cluster
        ),
    )


_TABLES = {Family.V4: "ip", Family.V6: "ip6"}


def _prefix(network: Network) -> str:
    """As nft prints it: a single address without its length."""
    whole = network.prefixlen == network.max_prefixlen
    return str(network.network_address if whole else network)


def plan_guard(wanted: Desired | Absent, actual: Ruleset, policy: Policy) -> Transaction | None:
    """What makes the guard of a family right; None where it is."""
    if isinstance(wanted, Absent):
        if not wanted.certain:
            return None
        after: tuple[Rule, ...] = ()
        reason = Reason(
            Change.GUARD_REMOVED, f"flannel leases no {wanted.family.value} subnet to this node"
        )
    elif policy.guard is GuardPolicy.OFF:
        after, reason = (), Reason(Change.GUARD_REMOVED, 'guard is "off" in snatd.toml')
    else:
        after = guard_rules(wanted, policy.masquerade_marks)
        why = f"no rule shall hide the addresses of {wanted.subnet} from {wanted.inside}"
        reason = Reason(Change.GUARD_WRITTEN, why)
    return _replacing(actual, after, reason)


def without_guard(actual: Ruleset) -> Transaction | None:
    """What takes the guard away; None where there is none."""
    return _replacing(actual, (), Reason(Change.UNDONE, "nothing of snatd's stays"))


def _replacing(actual: Ruleset, after: tuple[Rule, ...], reason: Reason) -> Transaction | None:
    if actual.postrouting == after:
        return None
    edit = ChainEdit(POSTROUTING, actual.postrouting, after)
    return Transaction(actual.family, Backend.GUARD, (edit,), (reason,))


def guard_script(transaction: Transaction) -> str:
    """The input for `nft -f`. One transaction of the kernel's: there is no instant without a guard.

    Where the chain is right its rules are replaced inside it, which a packet sees at once or not
    at all. Of a chain that is deleted and made anew there are two for a moment, and a packet that
    goes from the one to the other could meet both empty.
    """
    table = f"{_TABLES[transaction.family]} {TABLE}"
    (edit,) = transaction.edits
    before, after = edit.before or (), edit.after or ()
    if not after:
        return f"add table {table}\ndelete table {table}\n"
    chain, *rules = (rule.text for rule in after)
    lines = [f'add table {table} {{ comment "{_COMMENT}"; }}']
    if before and [rule.text for rule in before if not rule.text.startswith("rule ")] != [chain]:
        lines += [f"delete table {table}", lines[0]]
    lines += [f"add {chain}", f"flush chain {table} {CHAIN}"]
    lines += [f'add {rule} comment "{_RULE_COMMENT}"' for rule in rules]
    return "\n".join([*lines, ""])


def parse_guard(output: str) -> tuple[Rule, ...]:
    """What `nft -j list table` printed, in the words of `guard_rules`. Raises RuleError.

    Without handles and comments (nft 1.0.6 leaves the table's out); counters ride along. What
    snatd never writes is shown as nft's JSON, which only has to differ.
    """
    try:
        objects = json.loads(output)["nftables"]
        return tuple(_objects(objects))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RuleError(f"not nft's JSON: {error!r}") from None


def _objects(objects: list[dict[str, Any]]) -> Iterator[Rule]:
    for one in objects:
        ((kind, what),) = one.items()
        if kind == "metainfo":
            continue
        if kind == "table":
            if "flags" in what:  # dormant: none of its rules is asked. nft 1.0.6 garbles the word.
                yield Rule(f"table {what['family']} {what['name']} with flags")
            continue
        head = f"{what['family']} {what['table']}"
        if kind == "chain":
            hook = ""
            if "hook" in what:
                hook = (
                    f" {{ type {what['type']} hook {what['hook']} priority {what['prio']};"
                    f" policy {what['policy']}; }}"
                )
            yield Rule(f"chain {head} {what['name']}{hook}")
        elif kind == "rule":
            words = [_statement(part) for part in what["expr"]]
            yield Rule(f"rule {head} {what['chain']} {' '.join(words)}", _counters(what["expr"]))
        else:
            yield Rule(f"{kind} {head} {_json(what)}")


def _counters(statements: list[dict[str, Any]]) -> Counters | None:
    found = [part["counter"] for part in statements if "counter" in part]
    return Counters(int(found[0]["packets"]), int(found[0]["bytes"])) if found else None


def _statement(statement: dict[str, Any]) -> str:
    match statement:
        case {
            "match": {
                "op": "==",
                "left": {"meta": {"key": "mark"}} as mark,
                "right": {"prefix": {"addr": int(bits), "len": int(length)}},
            }
        }:
            # What nft makes of a mask of the highest bits (1.0.6).
            return f"{_value(mark)} & {2**32 - 2 ** (32 - length):#x} == {bits}"
        case {"match": {"op": str(op), "left": left, "right": right}}:
            # nft leaves "==" out where the left side is a plain field.
            masked = isinstance(left, dict) and "&" in left
            return f"{_value(left)} {'' if op == '==' and not masked else op + ' '}{_value(right)}"
        case {"counter": _}:
            return "counter"
        case {"return": None} | {"accept": None} | {"drop": None} | {"masquerade": None}:
            return next(iter(statement))
        case {"snat": {"addr": address, **rest}} if not rest:
            return f"snat to {_value(address)}"
    return _json(statement)


def _value(value: Any) -> str:
    match value:
        case {"payload": {"protocol": str(protocol), "field": str(field)}}:
            return f"{protocol} {field}"
        case {"meta": {"key": str(key)}}:
            return f"meta {key}"
        case {"&": [left, int(mask)]}:
            return f"{_value(left)} & {mask:#x}"
        case {"prefix": {"addr": str(address), "len": int(length)}}:
            return f"{address}/{length}"
        case str() | int():
            return str(value)
    return _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
