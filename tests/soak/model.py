"""What the rivals know of their own rules, and how a listing compares with that. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

POSTROUTING = "POSTROUTING"

Passing = Callable[[str], bool]


@dataclass
class Table:
    """The chains of one nat table and the rules in them, in order.

    `passing` tells what snatd may change, which is not kept here. While snatd has to leave
    everything alone (`frozen`) nothing passes: all that was there when that began is kept too.
    """

    passing: Passing
    chains: dict[str, list[str]] = field(default_factory=lambda: {POSTROUTING: []})
    frozen: bool = False

    def is_kept(self, rule: str) -> bool:
        return self.frozen or not self.passing(rule)

    def insert(self, chain: str, place: int, rule: str) -> None:
        if self.is_kept(rule):
            self.chains[chain].insert(place, rule)

    def append(self, chain: str, rule: str) -> None:
        self.insert(chain, len(self.chains[chain]), rule)

    def remove(self, chain: str, rule: str) -> None:
        """As `-D` does, which takes the first of equal rules."""
        if self.is_kept(rule):
            rules = self.chains[chain]
            assert rule in rules, f"{chain}: {rule!r} was removed, and is none of {rules}"
            rules.remove(rule)

    def flush(self) -> None:
        self.chains = {POSTROUTING: []}

    def unused(self) -> list[str]:
        """The rivals' chains that no rule jumps to."""
        rules = [rule for rules in self.chains.values() for rule in rules]
        return [
            name
            for name in self.chains
            if name != POSTROUTING and not any(rule.endswith(f" -j {name}") for rule in rules)
        ]

    def difference(self, actual: dict[str, list[str]]) -> str:
        """What is not as it should be; empty where all is."""
        for chain, rules in self.chains.items():
            if chain not in actual:
                return f"chain {chain} is gone"
            told = difference(rules, actual[chain], lambda rule: not self.is_kept(rule))
            if told:
                return f"{chain}: {told}"
        extra = [name for name in actual if name not in self.chains and not is_own_chain(name)]
        return f"chains that nobody made: {extra}" if extra else ""


def is_own_chain(name: str) -> bool:
    return name.startswith("SNATD-")


def difference(expected: Sequence[str], actual: Sequence[str], passing: Passing) -> str:
    """Where a chain differs from what was expected, but for rules that may stand anywhere."""
    place = 0
    for number, rule in enumerate(actual, 1):
        if place < len(expected) and rule == expected[place]:
            place += 1
        elif not passing(rule):
            wanted = expected[place] if place < len(expected) else "nothing more"
            return f"rule {number} is {rule!r}, expected {wanted!r}"
    return f"lost: {expected[place]!r}" if place < len(expected) else ""


# A line of `-S`: a string in it may hold newlines.
_LINE = re.compile(r'((?:[^"\n]|"(?:[^"\\]|\\.)*")*)\n', re.DOTALL)


def parse(listing: str) -> dict[str, list[str]]:
    """The chains that `iptables -t nat -S` printed, without the ones of other hooks."""
    chains: dict[str, list[str]] = {}
    for line in _LINE.findall(listing):
        option, name, *rest = line.split(" ", 2)
        if option in ("-P", "-N"):
            chains[name] = []
        else:
            assert option == "-A", line
            chains[name].append("".join(rest))
    return {name: rules for name, rules in chains.items() if name not in _OTHER_HOOKS or rules}


_OTHER_HOOKS = ("PREROUTING", "INPUT", "OUTPUT")
