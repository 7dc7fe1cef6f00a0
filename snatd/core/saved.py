"""The text of a saved rules file, as `iptables-save` writes and `iptables-restore` reads it.

`plan` and `revert` decide, as for a live table; a line that they leave alone stays byte for byte.
Raises RuleError, with the line, where a file cannot be read for certain.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from itertools import pairwise

from snatd.core.desired import Absent, Desired
from snatd.core.errors import RuleError
from snatd.core.model import (
    OWN_CHAIN_PREFIX,
    POSTROUTING,
    Backend,
    Counters,
    Family,
    Network,
    Rule,
    Ruleset,
)
from snatd.core.plan import ChainEdit, Transaction, plan
from snatd.core.revert import Memory, revert
from snatd.core.rules import SNAT_TARGETS, Spec, Token, is_ours, parse, quote

# iptables-restore 1.8 reads line by line. A word ends at a blank, a tab or its closing quote; what
# other than a blank follows that quote, or a quote inside a word, it reads in ways of its own.
_WORD = re.compile(r'[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^ \t"]+))(?=[ \t]|\Z)')
_COUNTERS = re.compile(r"\[([0-9]{1,20}):([0-9]{1,20})\][ \t]*")
_NETMASK = re.compile(r"([0-9.]+)/([0-9]+\.[0-9.]+)\Z")

# The forms in which a hand-written file may say what iptables-save says in one.
_SHORT = {
    **{"--append": "-A", "--new-chain": "-N", "--match": "-m", "--jump": "-j", "--goto": "-g"},
    **{"--source": "-s", "--src": "-s", "--destination": "-d", "--dst": "-d"},
    "--out-interface": "-o",
}
_BARE_VALUE = {"-s", "-d", "-o", "-m", "-j", "-g"}
_ONE_VALUE = {*_BARE_VALUE, "--comment"}
_TARGET_OPTIONS = {
    *("--random", "--random-fully", "--persistent"),
    *("--to-source", "--to", "--to-ports"),
}

# Their owners make them anew at every start. DOCKER-USER is Docker's in name only: what it holds
# is the operator's.
_DYNAMIC = re.compile(r"DOCKER(?!-USER\Z)(?:[-_].*)?\Z|(?:KUBE|CNI|FLANNEL|NETAVARK)[-_]")


@dataclass(frozen=True)
class Edited:
    """A file after an edit. `doubts`: lines that may hide containers, and were not understood."""

    content: bytes
    transactions: tuple[Transaction, ...] = ()
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass
class _Section:
    """A *nat section: line numbers from `head` (`*nat`) to `end` (`COMMIT`), and what they say."""

    head: int
    end: int
    chains: dict[str, list[tuple[int, Rule]]] = field(default_factory=lambda: {POSTROUTING: []})
    declared: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    last_declaration: int = 0
    last_command: int = 0
    doubts: list[str] = field(default_factory=list)

    def ruleset(self, family: Family, backend: Backend) -> Ruleset:
        rules = {name: tuple(rule for _, rule in lines) for name, lines in self.chains.items()}
        postrouting = rules.pop(POSTROUTING)
        return Ruleset(family, backend, postrouting, tuple(rules.items()))


Decide = Callable[[Ruleset, bool, bool], Iterable[Transaction]]


def bring_in_line(content: bytes, wanted: Desired | Absent, backend: Backend) -> Edited:
    """The file as it should be. `backend` is the one that it will be loaded into.

    Nothing is added where flannel makes the egress rule itself, nor where a line that could not be
    understood may be it. Of several *nat sections each load flushes what the one before gave, so a
    rule that is missing comes to the last.
    """

    def decide(ruleset: Ruleset, last: bool, doubtful: bool) -> Iterable[Transaction]:
        one = wanted
        if isinstance(one, Desired):
            add = one.add_egress and last and not (doubtful or one.flannel_egress_counts)
            one = replace(one, add_egress=add)
        return plan(one, {backend: ruleset}, backend)

    subnet = wanted.subnet if isinstance(wanted, Desired) else None
    return _edit(content, wanted.family, backend, subnet, decide)


def put_back(
    content: bytes,
    family: Family,
    backend: Backend,
    memories: Sequence[Memory],
    today: Network | None,
) -> Edited:
    """The file without anything of ours, and with what ours stand for; see `revert`."""

    def decide(ruleset: Ruleset, last: bool, _: bool) -> Iterable[Transaction]:
        if last or any(is_ours(rule) for rule in ruleset.postrouting):
            yield revert(ruleset, memories, today)

    return _edit(content, family, backend, None, decide)


def _edit(
    content: bytes, family: Family, backend: Backend, subnet: Network | None, decide: Decide
) -> Edited:
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    sections = [_read(lines, head, end, subnet) for head, end in _sections(lines)]
    edits = _Edits(lines)
    transactions = []
    for section in sections:
        ruleset = section.ruleset(family, backend)
        for one in decide(ruleset, section is sections[-1], bool(section.doubts)):
            if one.edits:
                transactions.append(one)
                for edit in one.edits:
                    edits.apply(edit, section)
                edits.check(section)
    removed, added = edits.difference()
    doubts = tuple(doubt for section in sections for doubt in section.doubts)
    return Edited(edits.content(), tuple(transactions), removed, added, doubts)


def _sections(lines: Sequence[str]) -> Iterator[tuple[int, int]]:
    """First and last line of each *nat section."""
    table, head = "", 0
    for number, line in enumerate(lines):
        text = line.removesuffix("\r")
        if not table and text.startswith("*"):
            table, head = text[1:].strip(" \t") or "*", number
        elif table and text == "COMMIT":
            if table == "nat":
                yield head, number
            table = ""
    if table == "nat":
        raise RuleError(f"line {head + 1}: the table nat has no COMMIT")


def _read(lines: Sequence[str], head: int, end: int, subnet: Network | None) -> _Section:
    section = _Section(head, end, last_declaration=head, last_command=head)
    for number in range(head + 1, end):
        text = lines[number].removesuffix("\r")
        if not text or text.startswith("#"):
            continue
        section.last_command = number
        if text.startswith(":"):
            section.last_declaration = number
            _declare(section, re.split(r"[ \t]", text[1:], maxsplit=1)[0], number)
            continue
        prefix = _COUNTERS.match(text)
        counters = Counters(int(prefix[1]), int(prefix[2])) if prefix else None
        try:
            words = _words(text[prefix.end() if prefix else 0 :])
        except RuleError as error:
            raise RuleError(f"line {number + 1}: {error}") from None
        verb = _SHORT.get(words[0].raw, words[0].raw) if words else ""
        chain = words[1].value if len(words) > 1 else ""
        watched = verb == "-A" and _is_watched(chain)
        # Most lines of a large file are of other chains.
        spec = _spec(words[2:]) if watched or POSTROUTING in text else None
        if verb == "-N":
            _declare(section, chain, number)
        elif watched:
            # A newline makes a rule foreign to `plan` and `revert`, whatever else it says.
            rule = Rule(str(spec) if spec else f"\n{text}", counters)
            section.chains.setdefault(chain, []).append((number, rule))
        # A chain of ours goes or is written anew, whatever it holds; a rule of ours as well.
        ours = watched and (chain != POSTROUTING or (spec is not None and spec.owned))
        if subnet and not ours and _may_hide(text, verb, spec, subnet):
            section.doubts.append(
                f"line {number + 1} may masquerade cluster traffic, and is left as it is since "
                f"snatd cannot read it for certain; write it as iptables-save does: {text}"
            )
    return section


def _declare(section: _Section, chain: str, number: int) -> None:
    if chain.startswith(OWN_CHAIN_PREFIX):
        section.chains.setdefault(chain, [])
        section.declared[chain].append(number)


def _is_watched(chain: str) -> bool:
    return chain == POSTROUTING or chain.startswith(OWN_CHAIN_PREFIX)


def _words(text: str) -> tuple[Token, ...]:
    if '"' not in text:
        return tuple(Token(word, word) for word in text.replace("\t", " ").split(" ") if word)
    found, position, end = [], 0, len(text.rstrip(" \t"))
    while position < end:
        match = _WORD.match(text, position)
        if match is None:
            raise RuleError(f"a quote that is not closed, or inside a word: {text[position:][:60]}")
        quoted = match[2] is None
        value = re.sub(r"\\(.)", r"\1", match[1]) if quoted else match[2]
        found.append(Token(match[0].lstrip(" \t"), value))
        position = match.end()
    return tuple(found)


def _spec(words: Sequence[Token]) -> Spec | None:
    """What a rule says, in iptables-save's order and forms; None where that is not certain."""
    matches: list[str] = []
    target: list[str] = []
    queue = list(words)
    while queue:
        negation = ["!"] * (queue[0].raw == "!")
        del queue[: len(negation)]
        option = _SHORT.get(queue[0].raw, queue[0].raw) if queue else ""
        if not option.startswith("-") or (negation and option in ("-j", "-g")):
            return None
        size = 1
        while size < len(queue) and (
            size == 1 if option in _ONE_VALUE else not _opens_option(queue[size])
        ):
            size += 1
        values, queue = queue[1:size], queue[size:]
        if option in ("-j", "-g") and values:
            if not {"-j", "-g"}.isdisjoint(target):
                return None
            target[:0] = [option, values[0].value]
        elif target and option in _TARGET_OPTIONS:
            option = "--to-source" if option == "--to" else option
            target += [option, *(one.raw for one in values)]
        else:
            matches += [*negation, option, *(_value(option, one) for one in values)]
        if option in _BARE_VALUE and any(re.search(r'[\s"]', one.value) for one in values):
            return None
    with suppress(RuleError):
        return parse(" ".join([*matches, *target]))
    return None


def _opens_option(token: Token) -> bool:
    return not token.quoted and (token.raw == "!" or token.raw.startswith("-"))


def _value(option: str, token: Token) -> str:
    if option in ("-s", "-d"):
        return _network(token.value)
    if option == "--comment":
        return quote(token.value)
    return token.value if option in _ONE_VALUE else token.raw


def _network(value: str) -> str:
    """iptables takes netmasks, and masks host bits away."""
    mask = _NETMASK.match(value)
    with suppress(ValueError):
        if mask:
            bits = f"{int(ip_network(mask[2]).network_address):032b}"
            if "01" in bits:
                return value  # parse refuses it
            value = f"{mask[1]}/{bits.count('1')}"
        return str(ip_network(value, strict=False))
    return value


def _may_hide(text: str, verb: str, spec: Spec | None, subnet: Network) -> bool:
    """Whether a line names our subnet and a target that rewrites sources, and what it says is not
    certain: by its options, or by another verb than -A."""
    named = (POSTROUTING, str(subnet.network_address).removesuffix(".0"))
    if not all(one in text for one in named) or not any(one in text for one in SNAT_TARGETS):
        return False
    certain = spec is not None and spec.target and (spec.source or spec.destination)
    return verb != "-A" or not certain


class _Edits:
    """What happens to the lines of a file. Numbers are those of the file as it was."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines
        self._gone: set[int] = set()
        self._behind: dict[int, list[str]] = defaultdict(list)

    def apply(self, edit: ChainEdit, section: _Section) -> None:
        there = section.chains.get(edit.chain, [])
        if edit.after is None:
            self._gone.update(number for number, _ in there)
            self._gone.update(section.declared[edit.chain])
            return
        if edit.before is None:
            self._insert(section.last_declaration, f":{edit.chain} - [0:0]")
        # `plan` and `revert` hand on the very rules that stay, so they are known by identity: the
        # text alone would not tell one copy from another.
        numbers = {id(rule): number for number, rule in there}
        stay = {numbers[id(rule)] for rule in edit.after if id(rule) in numbers}
        gone = [number for number, _ in there if number not in stay]
        self._gone.update(gone)
        above, new = section.head, list[Rule]()
        for rule in (*edit.after, None):
            below = section.end if rule is None else numbers.get(id(rule))
            if below is None:
                new += [rule] if rule else []
                continue
            holes = [number for number in gone if above < number < below]
            if not holes:
                first = above == section.head
                holes = [(section.last_command if rule is None else below - 1) if first else above]
            for position, one in enumerate(new):
                self._insert(holes[min(position, len(holes) - 1)], _line(edit.chain, one))
            above, new = below, []

    def _insert(self, behind: int, text: str) -> None:
        ending = "\r" if self._lines[behind].endswith("\r") else ""
        self._behind[behind].append(text + ending)

    def check(self, section: _Section) -> None:
        """Raises where a line that stays jumps to a chain that goes: the file would not load, and
        `iptables-nft-restore --test` would not notice."""
        for chain, numbers in section.declared.items():
            if not self._gone.issuperset(numbers):
                continue
            jump = re.compile(
                rf"[ \t](?:-j|-g|--jump|--goto)[ \t]+{re.escape(chain)}(?:[ \t\r]|\Z)"
            )
            for number in range(section.head, section.end):
                if number not in self._gone and jump.search(self._lines[number]):
                    raise RuleError(f"line {number + 1}: jumps to {chain}, which has to go")

    def difference(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The lines that go and those that come, in order."""
        added = (one for place in sorted(self._behind) for one in self._behind[place])
        removed = (self._lines[number] for number in sorted(self._gone))
        return _shown(removed), _shown(added)

    def content(self) -> bytes:
        result = []
        for number, line in enumerate(self._lines):
            result += [line] * (number not in self._gone) + self._behind.get(number, [])
        return "\n".join(result).encode("utf-8", "surrogateescape")


def _line(chain: str, rule: Rule) -> str:
    counters = rule.counters
    prefix = f"[{counters.packets}:{counters.bytes}] " if counters else ""
    return f"{prefix}-A {chain} {rule.text}"


def _shown(lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(line.removesuffix("\r") for line in lines)


def dynamic_chains(content: bytes) -> tuple[str, ...]:
    """The chains in what `iptables-save` printed that a saved file would freeze."""
    text = content.decode("utf-8", "surrogateescape")
    names = (line[1:].split(" ")[0] for line in text.split("\n") if line.startswith(":"))
    return tuple(dict.fromkeys(name for name in names if _DYNAMIC.match(name)))


def without_dynamic(content: bytes) -> bytes:
    """What `iptables-save` printed, without these chains and the rules that jump to them."""
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    kept = [line for line in lines if not _is_dynamic(line)]
    return "\n".join(kept).encode("utf-8", "surrogateescape")


def _is_dynamic(line: str) -> bool:
    if line.startswith(":"):
        return bool(_DYNAMIC.match(line[1:].split(" ", 1)[0]))
    if not line.startswith(("-A ", "[")):
        return False
    try:
        words = _words(line)
    except RuleError:
        return False
    after = {one.raw: two.value for one, two in pairwise(words)}
    return any(_DYNAMIC.match(after.get(option, "")) for option in ("-A", "-j", "-g"))
