"""From rules as `iptables -S` prints them to the language of `packet`. What it has no name for
becomes undecided, with its text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from snatd.core.errors import RuleError
from snatd.core.model import Backend, Family, Rule
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
    Flags,
    InState,
    Jump,
    Marked,
    Masquerade,
    Netmap,
    OfType,
    Ranges,
    SetMark,
    Snat,
    Step,
    Test,
    Unknown,
    Verdict,
    Within,
    addresses,
    merge,
)
from snatd.core.rules import Spec, Target, parse, tokens

# They leave what is known of the packet as it is and let it go on.
_PASSING = {
    *("LOG", "NFLOG", "ULOG", "TRACE", "AUDIT", "LED", "RATEEST", "ACCOUNT", "SECMARK", "TCPMSS"),
    *("CONNSECMARK", "DSCP", "TOS", "ECN", "TTL", "HL", "CLASSIFY", "CHECKSUM", "SET", "IDLETIMER"),
    *("TCPOPTSTRIP", "FLOWOFFLOAD"),
}
_PORTS = {"tcp", "udp", "udplite", "sctp", "dccp", "multiport"}
# Matches whose options each say something of their own; of any other all options go together.
_OPTIONS_APART = _PORTS | {"mark", "comment"}
_JUMP = re.compile(r"(?:^| )-[jg] (\S+)")
_ADDRESS = r"([0-9A-Fa-f.:]+)"
_BRACKETS, _SPAN = re.compile(r"\[(.*)\](?::.*)?\Z"), re.compile(rf"{_ADDRESS}(?:-{_ADDRESS})?\Z")


def compiled(
    chains: Mapping[str, Sequence[Rule]], names: Collection[str]
) -> dict[str, tuple[Step, ...]]:
    """Chains of a table. `names` are all of it: a target that is none of them is the kernel's."""
    return {
        name: tuple(step(number, rule.text, names) for number, rule in enumerate(rules, 1))
        for name, rules in chains.items()
    }


_TABLES = ("raw", "mangle", "nat", "filter", "security")


def iptables_of(table: str) -> tuple[str, str]:
    """The command to which a table belongs, by its name in a Hook, and what that calls it; "" twice
    where it is none of iptables'."""
    backend = Backend.LEGACY if table.startswith("legacy ") else Backend.NFT
    ip, _, name = table.removeprefix("legacy ").partition(" ")
    command = {"ip": Family.V4.command, "ip6": Family.V6.command}.get(ip)
    return (f"{command}-{backend.value}", name) if command and name in _TABLES else ("", "")


def targets(rules: Iterable[Rule]) -> tuple[str, ...]:
    """What rules may jump to: chains, the kernel's own targets, and words of a comment too."""
    found = (name for rule in rules for name in _JUMP.findall(rule.text))
    return tuple(dict.fromkeys(found))


def step(number: int, text: str, chains: Collection[str]) -> Step:
    """One rule."""
    try:
        spec = parse(text)
    except RuleError:
        return Step(number, text, (Unknown(),))
    action = _action(spec.target, chains) if spec.target else None
    return Step(number, text, (*_checks(spec), *([] if action is None else [action])))


def _checks(spec: Spec) -> Iterator[Check]:
    for option, side, prefix, negated in (
        ("-s", Field.SOURCE, spec.source, spec.source_negated),
        ("-d", Field.DESTINATION, spec.destination, spec.destination_negated),
    ):
        if prefix is not None:
            yield Check(
                f"{'! ' * negated}{option} {prefix}", Within(side, addresses((prefix,))), negated
            )
    if spec.out is not None:
        text = f"{'! ' * spec.out.negated}-o {spec.out.value}"
        yield Check(text, Device(True, (_pattern(spec.out.value),)), spec.out.negated)
    for module, options in _modules(spec.others):
        if module in _OPTIONS_APART:
            for option in options:
                yield _check(f"-m {module} {option}", module, option)
        elif module == "-p":
            yield _check(options[0], module, options[0])
        elif module == "addrtype" and not any("limit-iface" in one for one in options):
            for option in options:
                yield _check(f"-m addrtype {option}", module, option)
        elif module == "rpfilter":
            text = " ".join((f"-m {module}", *options))
            yield Check(text, CameRight(), "--invert" in options)
        else:
            text = " ".join((f"-m {module}", *options))
            yield _check(text, module, options[0] if len(options) == 1 else "")


def _modules(chunks: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each match with its options. `-p`, `-f` and the like stand before all matches."""
    module = ""
    options: list[str] = []
    for chunk in chunks:
        if chunk.startswith("-m "):
            if module:
                yield module, options
            module, options = tokens(chunk)[1].value, []
        elif module:
            options.append(chunk)
        else:
            yield "-p", [chunk]
    if module:
        yield module, options


def _check(text: str, module: str, option: str) -> Check:
    words = [token.value for token in tokens(option)]
    negated = bool(words) and words[0] == "!"
    words = words[negated:]
    try:
        what = _what(module, words[0], words[1]) if len(words) == 2 else None
        if len(words) == 3 and words[0] == "--tcp-flags":
            what = Flags(*(frozenset(one.split(",")) - {"NONE"} for one in words[1:]))
    except ValueError:
        what = None
    return Check(text, True if module == "comment" else what, negated and module != "comment")


def _pattern(name: str) -> str:
    return f"{name[:-1]}*" if name.endswith("+") else name


def _what(module: str, option: str, value: str) -> Test | None:
    """Raises ValueError where a value is not of the kind that its option wants."""
    match module, option.lstrip("-"):
        case "-p", "i":
            return Device(False, (_pattern(value),))
        case _, "p":
            return Within(Field.PROTOCOL, _protocol(value))
        case _, "dport" | "dports" if module in _PORTS:
            return Within(Field.DPORT, _ports(value))
        case _, "sport" | "sports" if module in _PORTS:
            return Within(Field.SPORT, _ports(value))
        case "mark", "mark":
            number, _, mask = value.partition("/")
            return Marked(int(mask, 0) if mask else ALL_BITS, (int(number, 0),))
        case "addrtype", "src-type" | "dst-type":
            side = Field.SOURCE if option.startswith("--src") else Field.DESTINATION
            return OfType(side, tuple(value.lower().split(",")))
        case ("conntrack", "ctstate") | ("state", "state"):
            return connection_state(value.split(","))
    return None


def connection_state(states: Collection[str]) -> InState:
    """By iptables' names or nft's."""
    return InState(frozenset(one.lower() for one in states))


def _protocol(name: str) -> Ranges:
    number = PROTOCOLS[name] if name in PROTOCOLS else int(name)
    return ((number, number),)


def _ports(text: str) -> Ranges:
    spans = [one.split(":") for one in text.split(",")]
    return merge((int(span[0]), int(span[-1])) for span in spans)


def _action(target: Target, chains: Collection[str]) -> Action | None:
    words = [token.value for token in tokens(target.options)]
    value = dict(pairwise(words))
    if target.name in chains:
        return Jump(target.name, target.goto)
    match target.name:
        case "ACCEPT" | "RETURN" | "DROP":
            return Verdict(target.name.lower())
        case "REJECT":
            return Verdict.DROP
        case "CT" if not {"--notrack", "--zone", "--zone-orig"} & set(words):
            return None
        case "MASQUERADE":
            return Masquerade()
        case "SNAT" if words.count("--to-source") == 1 and "--to-source" in value:
            return Snat(_span(value["--to-source"]))
        case "NETMAP" if "--to" in value:
            return _netmap(value["--to"])
        case "MARK":
            return _set_mark(value)
        case "CONNMARK":
            return LOSE_MARK if "--restore-mark" in words else None
    return None if target.name in _PASSING else Unknown()


def _span(text: str) -> tuple[int, int] | None:
    """The addresses of --to-source, whose ports stand behind brackets in IPv6."""
    inside = _BRACKETS.match(text)
    bare = inside.group(1) if inside else text.partition(":")[0] if "." in text else text
    found = _SPAN.match(bare)
    try:
        low, high = (network(one) for one in (found.group(1), found.group(2) or found.group(1)))  # type: ignore[union-attr]
    except (ValueError, AttributeError):
        return None
    return int(low.network_address), int(high.network_address)


def _netmap(text: str) -> Action:
    try:
        return Netmap(network(text))
    except ValueError:
        return Unknown()


def _set_mark(value: Mapping[str, str]) -> Action:
    for option in ("--set-xmark", "--set-mark"):
        if option in value:
            number, _, mask = value[option].partition("/")
            try:
                flip, gone = int(number, 0), int(mask, 0) if mask else ALL_BITS
            except ValueError:
                return LOSE_MARK
            if option == "--set-mark":
                gone |= flip
            return SetMark(~gone & ALL_BITS, flip)
    return LOSE_MARK
