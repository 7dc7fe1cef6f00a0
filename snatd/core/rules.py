"""The language of `iptables -S`: from text to `Rule`, from `Rule` to its meaning and back.

Raises nothing but `RuleError`. Does not decide what a rule is worth; that is `plan`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from snatd.core.errors import RuleError
from snatd.core.model import OWN_CHAIN_PREFIX, OWN_COMMENT, Counters, Network, Rule
from snatd.core.networks import network

# iptables prints a string bare only if it consists of these (xtables_save_string, 1.4 to 1.8.13).
_BARE = re.compile(r"[-_0-9A-Za-z]+\Z")
# An interface is printed raw, whatever its name holds, and a quote in it would open a string when
# the line is read back by iptables-restore. Such a rule is never written, only left alone.
_DEVICE = re.compile(r"[^\s\"'\\!-][^\s\"'\\]*\Z")

_BARE_WORD = re.compile(r"[^ \n]+")

# iptables-restore reads lines of at most 10 kB; what is longer here is a string that never closes.
_LONGEST_LINE = 65536

_LONGEST_COUNTER = 20  # 2^64

SNAT_TARGETS = ("MASQUERADE", "SNAT")


@dataclass(frozen=True)
class Token:
    """One word of a rule: `raw` as printed, `value` without quotes and escapes."""

    raw: str
    value: str

    @property
    def quoted(self) -> bool:
        return self.raw.startswith('"')


@dataclass(frozen=True)
class Match:
    """A value and whether it is negated."""

    value: str
    negated: bool = False


@dataclass(frozen=True)
class Target:
    """`-j NAME options`, or `-g` if `goto`. `options` is text as printed."""

    name: str
    options: str = ""
    goto: bool = False

    def __str__(self) -> str:
        return (
            f"{'-g' if self.goto else '-j'} {self.name}{' ' + self.options if self.options else ''}"
        )


@dataclass(frozen=True)
class Spec:
    """What a rule says. `others` holds every match that snatd has no name for, as printed."""

    source: Network | None = None
    source_negated: bool = False
    destination: Network | None = None
    destination_negated: bool = False
    out: Match | None = None
    comment: str | None = None
    others: tuple[str, ...] = ()
    target: Target | None = None

    def __str__(self) -> str:
        """In the order in which every iptables prints its options."""
        words: list[str] = []
        for option, prefix, negated in (
            ("-s", self.source, self.source_negated),
            ("-d", self.destination, self.destination_negated),
        ):
            if prefix is not None:
                words += ["!"] * negated + [option, str(prefix)]
        if self.out is not None:
            words += ["!"] * self.out.negated + ["-o", self.out.value]
        words += self.others
        if self.comment is not None:
            words += ["-m comment --comment", quote(self.comment)]
        if self.target is not None:
            words.append(str(self.target))
        return " ".join(words)

    @property
    def owned(self) -> bool:
        return self.comment == OWN_COMMENT


def quote(text: str) -> str:
    """A string as iptables prints it."""
    if _BARE.match(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'")
    return f'"{escaped}"'


def tokens(line: str) -> tuple[Token, ...]:
    """The words of one rule. A quote opens a string only at a word's start, as printed."""
    return tuple(_words(line, 0, len(line)))


def _words(text: str, start: int, end: int) -> Iterator[Token]:
    position, after_device_option = start, False
    while position < end:
        if text[position] == " ":
            position += 1
            continue
        if text[position] == '"' and not after_device_option:
            stop = _string_end(text, position, end)
            value = re.sub(r"\\(.)", r"\1", text[position + 1 : stop - 1], flags=re.DOTALL)
        else:
            stop = text.find(" ", position, end)
            stop = end if stop < 0 else stop
            value = text[position:stop]
        token = Token(text[position:stop], value)
        after_device_option = token.raw in ("-i", "-o")
        yield token
        position = stop


def _string_end(text: str, start: int, end: int) -> int:
    position = start + 1
    while position < end:
        if text[position] == "\\":
            position += 1
        elif text[position] == '"':
            return position + 1
        position += 1
    raise RuleError(f"a string is not closed: {text[start : start + 60]!r}")


def names_one_device(name: str) -> bool:
    """Whether `-o NAME` means the device of that name and no other: a `+` at the end means all that
    begin like it, and some names no restore can read."""
    return _DEVICE.match(name) is not None and not name.endswith("+")


def parse(text: str, *, any_device: bool = False) -> Spec:
    """The meaning of a rule's text. Raises RuleError where it cannot be told for certain, and
    without `any_device` where no restore could name it."""
    words = list(tokens(text))
    fields: dict[str, object] = {}
    others: list[str] = []
    comments: list[str] = []
    negated, position = False, 0

    def take() -> Token:
        nonlocal position
        if position >= len(words):
            raise RuleError(f"an option lacks its value: {text!r}")
        position += 1
        return words[position - 1]

    def once(name: str, value: object) -> None:
        if name in fields:
            raise RuleError(f"{name} is given twice: {text!r}")
        fields[name] = value

    while position < len(words):
        word = take()
        if word.raw == "!":
            negated = True
            continue
        match word.raw:
            case "-s":
                once("source", _network(take().value))
                fields["source_negated"] = negated
            case "-d":
                once("destination", _network(take().value))
                fields["destination_negated"] = negated
            case "-o":
                once("out", Match(_device(take().value, any_device), negated))
            case "-m" if position < len(words) and words[position].raw == "comment":
                take()
            case "--comment":
                comments.append(take().value)
            case "-j" | "-g":
                name = take().value
                options = " ".join(token.raw for token in words[position:])
                position = len(words)
                once("target", Target(name, options, word.raw == "-g"))
            case _:
                chunk = ["!"] * negated + [word.raw]
                while position < len(words) and not _opens_option(words[position]):
                    chunk.append(take().raw)
                others.append(" ".join(chunk))
        negated = False
    if len(comments) == 1:
        fields["comment"] = comments[0]
    else:
        # A rule may carry two comments. Then none of them is "the whole comment".
        others += [f"-m comment --comment {quote(one)}" for one in comments]
    return Spec(others=tuple(others), **fields)  # type: ignore[arg-type]


def _opens_option(token: Token) -> bool:
    return not token.quoted and (token.raw == "!" or token.raw.startswith("-"))


def _device(value: str, any_device: bool) -> str:
    if not (any_device or _DEVICE.match(value)):
        raise RuleError(f"{value!r} is an interface that a restore could not name")
    return value


def _network(value: str) -> Network:
    try:
        return network(value)
    except ValueError as error:
        raise RuleError(f"{value!r} is not a network: {error}") from None


def parse_listing(output: str, chain: str) -> tuple[Rule, ...]:
    """The rules that `iptables -t nat -v -S CHAIN` printed, in order, with their counters.

    Raises RuleError where the output is not whole: no head line, a foreign chain, a cut last line.
    A comment may contain newlines, so the text is read word by word and not line by line.
    """
    if output and not output.endswith("\n"):
        raise RuleError(f"the listing of {chain} ends in the middle of a line")
    lines = list(_logical_lines(output))
    if not lines or lines[0].split(" ")[:2] not in (["-P", chain], ["-N", chain]):
        raise RuleError(f"the listing of {chain} does not begin with its head line")
    return tuple(_listed_rule(line, chain) for line in lines[1:])


# What iptables-nft (1.8.9) prints before a whole table in which somebody has a base chain of his
# own; and also, with the same listing, where a commit came into its reading.
_OTHER_BASE_CHAINS = re.compile(r"# Table `\S+' contains incompatible base-chains, .*")


def parse_table(output: str) -> tuple[dict[str, tuple[Rule, ...]], dict[str, str]]:
    """The chains that `iptables -t nat -S` printed, or `-S CHAIN`, and the policies of base chains.

    Raises RuleError where the output is not whole.
    """
    if not output.endswith("\n"):
        raise RuleError("the listing of the table is empty or ends in the middle of a line")
    chains: dict[str, list[Rule]] = {}
    policies: dict[str, str] = {}
    for line in _logical_lines(output):
        option, name, rest = (*line.split(" ", 2), "", "")[:3]
        if option == "-A" and name in chains:
            chains[name].append(Rule(rest))
        elif option in ("-N", "-P") and name:
            chains[name] = []
            if option == "-P":
                policies[name] = rest
        elif not _OTHER_BASE_CHAINS.fullmatch(line):
            raise RuleError(f"not a line of a listing: {line[:80]!r}")
    return {name: tuple(rules) for name, rules in chains.items()}, policies


def _logical_lines(output: str) -> Iterator[str]:
    start = 0
    while (end := _line_end(output, start)) >= 0:
        yield output[start:end]
        start = end + 1


def _line_end(text: str, start: int) -> int:
    """The newline that ends a line, and is not one of a string's; -1 where there is none."""
    end = text.find("\n", start)
    if end < 0 or text.find('"', start, end) < 0:
        return end
    position, after_device_option = start, False
    while position < len(text) and text[position] != "\n":
        if text[position] == " ":
            position += 1
        elif text[position] == '"' and not after_device_option:
            position = _string_end(text, position, min(len(text), start + _LONGEST_LINE))
        else:
            word = _BARE_WORD.match(text, position)
            assert word is not None
            after_device_option = word[0] in ("-i", "-o")
            position = word.end()
    if position >= len(text):
        raise RuleError(f"a line has no end: {text[start : start + 60]!r}")
    return position


def _listed_rule(line: str, chain: str) -> Rule:
    words = list(tokens(line))
    if len(words) < 2 or words[0].raw != "-A" or words[1].raw != chain:
        raise RuleError(f"not a rule of {chain}: {line[:80]!r}")
    counters = None
    # `-c PACKETS BYTES` stands right before the target, or last where there is none.
    for position in range(len(words) - 3, 1, -1):
        if words[position].raw == "-c" and _numbers(words[position + 1 : position + 3]):
            counters = Counters(_count(words[position + 1].raw), _count(words[position + 2].raw))
            del words[position : position + 3]
            break
    return Rule(" ".join(word.raw for word in words[2:]), counters)


def _numbers(words: list[Token]) -> bool:
    return len(words) == 2 and all(re.fullmatch("[0-9]+", word.raw) for word in words)


def _count(digits: str) -> int:
    if len(digits) > _LONGEST_COUNTER:
        raise RuleError(f"a counter of {len(digits)} digits")
    return int(digits)


def is_ours(rule: Rule) -> bool:
    """Whether a rule's whole comment is ours.

    What cannot be read is foreign, and so is what no restore could name: a string over two lines.
    """
    if "\n" in rule.text:
        return False
    try:
        return parse(rule.text).owned
    except RuleError:
        return False


def own_jumps(postrouting: tuple[Rule, ...]) -> tuple[str, ...]:
    """The chains of ours that rules of ours jump to, each once."""
    found: dict[str, None] = {}
    for rule in postrouting:
        if OWN_CHAIN_PREFIX not in rule.text:
            continue
        with suppress(RuleError):
            spec = parse(rule.text)
            if spec.owned and spec.target and spec.target.name.startswith(OWN_CHAIN_PREFIX):
                found[spec.target.name] = None
    return tuple(found)


def own_chains(listing: str) -> tuple[str, ...]:
    """The chains of ours in a listing of the whole table. Raises RuleError where it is cut."""
    head = f"-N {OWN_CHAIN_PREFIX}"
    lines = [line for line in _logical_lines(listing) if line.startswith(head)]
    return tuple(line.split(" ")[1] for line in lines)
