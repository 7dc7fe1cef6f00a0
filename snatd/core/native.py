"""From `nft -j list …` to the language of `packet`, as far as the writers of nat rules go. What it
has no name for becomes undecided."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snatd.core.model import Family
from snatd.core.networks import network
from snatd.core.packet import (
    ALL_BITS,
    LOSE_MARK,
    PROTOCOLS,
    Action,
    CameRight,
    Check,
    Device,
    Field,
    Jump,
    Keep,
    Marked,
    Masquerade,
    Netmap,
    OfType,
    Range,
    SetMark,
    Snat,
    Step,
    Test,
    Unknown,
    Verdict,
    Within,
    merge,
)
from snatd.core.xtables import connection_state

_FIELDS = {
    "saddr": Field.SOURCE,
    "daddr": Field.DESTINATION,
    "sport": Field.SPORT,
    "dport": Field.DPORT,
}
_PAYLOADS = {"ip": Family.V4, "ip6": Family.V6}
_NFPROTO = {"ipv4": Family.V4, "ipv6": Family.V6, "ip": Family.V4, "ip6": Family.V6}
_NO_EFFECT = {"counter", "log", "notrack", "xt match comment", "last"}
_NO_EFFECT |= {"flow", "ct helper", "ct timeout", "ct expectation", "secmark", "dup"}
# Statements that stop the rule in some cases.
_MAY_STOP = {"limit", "quota", "ct count", "set", "xt match"}


_NOTHING: tuple[str, Any] = ("", None)


class _Unnamed(ValueError):
    """An expression that this language has no name for."""


# That, or what another shape of JSON makes of us.
_NOT_NAMED = (AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Listing:
    """What `nft -j list` printed: rules by chain, elements of sets and maps by `@name`."""

    rules: Mapping[str, Sequence[Mapping[str, Any]]]
    elements: Mapping[str, Sequence[Any]]


def listing(objects: Sequence[Mapping[str, Any]]) -> Listing:
    rules: dict[str, list[Mapping[str, Any]]] = {}
    elements: dict[str, Sequence[Any]] = {}
    for one in objects:
        if chain := one.get("chain"):
            rules.setdefault(chain["name"], [])
        elif rule := one.get("rule"):
            rules.setdefault(rule["chain"], []).append(rule)
        elif named := one.get("set") or one.get("map"):
            elements[f"@{named['name']}"] = named.get("elem", ())
    return Listing(rules, elements)


def texts(output: str) -> dict[int, str]:
    """The rules of `nft -a list …` by their handles, each as nft prints it."""
    found = re.findall(r"^\t\t(.*) # handle ([0-9]+)$", output, re.MULTILINE)
    return {int(handle): text.strip() for text, handle in found}


def compiled(
    family: Family, read: Listing, shown: Mapping[int, str]
) -> dict[str, tuple[Step, ...]]:
    """The chains of one table as packets of a family meet them."""
    chains = {}
    for name, rules in read.rules.items():
        steps: list[Step] = []
        for number, rule in enumerate(rules, 1):
            text = shown.get(rule["handle"], f"(handle {rule['handle']})")
            steps += _Compiler(family, read.elements, text).steps(number, rule["expr"])
        chains[name] = tuple(steps)
    return chains


def named(read: Listing) -> tuple[set[str], set[tuple[str, str]]]:
    """The chains that are jumped to, and the sets and maps that are asked, as ("set", NAME)."""
    chains: set[str] = set()
    sets: set[tuple[str, str]] = set()

    def look(value: Any, kind: str = "set") -> None:
        if isinstance(value, str) and value.startswith("@"):
            sets.add((kind, value[1:]))
        elif isinstance(value, dict):
            for key, inner in value.items():
                if key in ("jump", "goto"):
                    chains.add(inner["target"])
                else:
                    look(inner, "map" if key == "data" else "set")
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    for rules in read.rules.values():
        for rule in rules:
            look(rule["expr"])
    for elements in read.elements.values():
        look(list(elements))
    return chains, sets


@dataclass(frozen=True)
class _Compiler:
    family: Family
    elements: Mapping[str, Sequence[Any]]
    text: str

    def steps(self, number: int, expressions: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
        """One rule is one step; a verdict map at its end makes one of each of its elements."""
        parts: list[Check | Action] = []
        for expression in expressions:
            kind, value = next(iter(expression.items()), _NOTHING)
            if kind == "vmap":
                for pattern, verdict in self._verdicts(value):
                    ((name, argument),) = verdict.items()
                    test = self._check(value["key"], "==", pattern)
                    yield Step(number, self.text, (*parts, *test, _verdict(name, argument)))
                return
            try:
                parts += self._parts(kind, value)
            except _NOT_NAMED:
                parts.append(Unknown())
        yield Step(number, self.text, tuple(parts))

    def _verdicts(self, value: Mapping[str, Any]) -> Sequence[Any]:
        data = value["data"]
        if "meta" in value["key"] and value["key"]["meta"]["key"] == "mark":
            data = None  # a jump may change the mark, and then match again
        pairs = self.elements.get(data) if isinstance(data, str) else data and data.get("set")
        if pairs is None or not all(isinstance(one, list) for one in pairs):
            return [({"unknown": self.text}, {"unknown": None})]
        return pairs

    def _parts(self, kind: str, value: Any) -> Sequence[Check | Action]:
        if kind == "xt":
            kind = f"xt {(value or {}).get('type')}"
            kind += f" {value['name']}" if "comment" in str(value) else ""
        if kind in _NO_EFFECT:
            return ()
        if kind in _MAY_STOP:
            return (Check(self.text, None),)
        if kind == "match":
            return self._check(value["left"], value["op"], value["right"])
        if kind == "xt target" and value["name"] == "MASQUERADE":
            return (Masquerade(),)
        if kind == "xt target" and value["name"] in ("SNAT", "MARK"):
            return (Snat(None) if value["name"] == "SNAT" else LOSE_MARK,)
        if kind == "mangle" and value["key"] == {"meta": {"key": "mark"}}:
            return (_mark(value["value"]),)
        if kind == "mangle" and _leaves_what_is_known(value["key"]):
            return ()
        if kind == "snat" and _NFPROTO.get(value.get("family"), self.family) is not self.family:
            # In an inet table a translation of one family passes packets of the other on.
            return (Check(self.text, False),)
        if kind == "snat" and "map" in value.get("addr", ()):
            # What is not in the map goes on.
            return (Check(self.text, None), Snat(None))
        return (_verdict(kind, value),)

    def _check(self, left: Any, operator: str, right: Any) -> Sequence[Check]:
        try:
            checks = tuple(self._named(left, operator, right))
        except _NOT_NAMED:
            return (Check(self.text, None),)
        return checks

    def _named(self, left: Mapping[str, Any], operator: str, right: Any) -> Iterator[Check]:
        """A match as tests. Raises _Unnamed, or what the shape of the JSON makes of it."""
        ((kind, key),) = left.items()
        negated = operator == "!="
        values = self._values(right)
        if operator not in ("==", "!=", "in"):
            raise _Unnamed
        if kind == "ct" and key["key"] in ("state", "status"):
            yield Check(self.text, connection_state(values), negated)
            return
        if kind == "fib" and key["result"] in ("oif", "oifname") and "saddr" in key["flags"]:
            # `exists` is true in JSON; `missing` is false or device 0.
            if "iif" not in key["flags"] or values not in ([True], [False], ["0"]):
                raise _Unnamed
            yield Check(self.text, CameRight(), negated == (values == [True]))
            return
        if operator == "in":
            raise _Unnamed
        if kind == "payload":
            yield from self._payload(key["protocol"], key["field"], values, negated)
            return
        yield Check(self.text, self._what(kind, key, values), negated)

    def _what(self, kind: str, key: Any, values: list[Any]) -> Test | bool:
        match kind, key:
            case "meta", {"key": "oifname" | "oif" | "iifname" | "iif" as device}:
                if any(not isinstance(one, str) or "\\" in one for one in values):
                    raise _Unnamed
                return Device(device.startswith("o"), tuple(values))
            case "meta", {"key": "l4proto"}:
                return Within(Field.PROTOCOL, merge(map(_protocol, values)))
            case "meta", {"key": "nfproto" | "protocol"}:
                return any(_NFPROTO[one] is self.family for one in values)
            case "meta", {"key": "mark"} if isinstance(values[0], dict):
                # What nft makes of a mask of the highest bits (1.0.6).
                ((prefix,),) = [one.values() for one in values]
                return Marked(
                    ALL_BITS << (32 - prefix["len"]) & ALL_BITS, (_number(prefix["addr"]),)
                )
            case "meta", {"key": "mark"}:
                return Marked(ALL_BITS, tuple(map(_number, values)))
            case "&", [{"meta": {"key": "mark"}}, int(mask)]:
                return Marked(mask, tuple(map(_number, values)))
            case "fib", {"result": "type", "flags": ["saddr" | "daddr" as side]}:
                if any(not isinstance(one, str) for one in values):
                    raise _Unnamed
                return OfType(_FIELDS[side], tuple(values))
        raise _Unnamed

    def _payload(
        self, protocol: str, field: str, values: list[Any], negated: bool
    ) -> Iterator[Check]:
        if protocol in _PAYLOADS:
            if _PAYLOADS[protocol] is not self.family:
                # In an inet table nft puts a test of the family in front.
                yield Check(self.text, False)
            elif field == "protocol":
                yield Check(
                    self.text, Within(Field.PROTOCOL, merge(map(_protocol, values))), negated
                )
            elif field in ("saddr", "daddr"):
                yield Check(self.text, Within(_FIELDS[field], merge(map(_span, values))), negated)
            else:
                raise _Unnamed
        elif field in ("sport", "dport") and (protocol == "th" or protocol in PROTOCOLS):
            if protocol != "th":
                yield Check(self.text, Within(Field.PROTOCOL, (_protocol(protocol),)))
            yield Check(self.text, Within(_FIELDS[field], merge(map(_port, values))), negated)
        else:
            raise _Unnamed

    def _values(self, right: Any) -> list[Any]:
        """The elements of a set, named or not, or the one value."""
        if isinstance(right, str) and right.startswith("@"):
            right = {"set": self.elements[right]}
        if isinstance(right, dict) and "set" in right:
            right = right["set"]
        some = right if isinstance(right, list | tuple) else [right]
        return [
            one["elem"]["val"] if isinstance(one, dict) and "elem" in one else one for one in some
        ]


def _leaves_what_is_known(key: Mapping[str, Any]) -> bool:
    """Whether nothing that a packet is described by is changed with this."""
    field = key.get("payload", {}).get("field")
    return key.keys() <= {"meta", "ct", "tcp option"} or field in ("dscp", "ecn", "ttl", "hoplimit")


def _verdict(kind: str, value: Any) -> Action:
    match kind, value:
        case "reject", _:
            return Verdict.DROP
        case "accept" | "drop" | "return", _:
            return Verdict(kind)
        case "jump" | "goto", {"target": chain}:
            return Jump(chain, kind == "goto")
        case "masquerade", _:
            return Masquerade()
        case "snat", {"addr": {"payload": {"protocol": "ip" | "ip6", "field": "saddr"}}}:
            return Keep()
        case "snat", {"addr": {"prefix": prefix}, "flags": flags} if "netmap" in flags:
            return Netmap(network(f"{prefix['addr']}/{prefix['len']}"))
        case "snat", {"addr": str() | {"range": _} | {"prefix": _} as target}:
            return Snat(_span(target))
    return Unknown()


def _mark(value: Any) -> SetMark:
    match value:
        case int(number):
            return SetMark(0, number)
        case {"^": [{"meta": {"key": "mark"}}, int(number)]}:
            return SetMark(ALL_BITS, number)
        case {"|": [{"meta": {"key": "mark"}}, int(number)]}:
            return SetMark(~number & ALL_BITS, number)
        case {"&": [{"meta": {"key": "mark"}}, int(number)]}:
            return SetMark(number)
    return LOSE_MARK


def _span(value: Any) -> Range:
    match value:
        case str():
            only = int(network(value).network_address)
            return only, only
        case {"prefix": {"addr": address, "len": length}}:
            whole = network(f"{address}/{length}")
            return int(whole.network_address), int(whole.broadcast_address)
        case {"range": [low, high]}:
            return _span(low)[0], _span(high)[1]
    raise _Unnamed


def _port(value: Any) -> Range:
    match value:
        case int():
            return value, value
        case {"range": [int(low), int(high)]}:
            return low, high
    raise _Unnamed


def _protocol(value: Any) -> Range:
    number = PROTOCOLS[value] if value in PROTOCOLS else int(value)
    return number, number


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise _Unnamed
    return value
