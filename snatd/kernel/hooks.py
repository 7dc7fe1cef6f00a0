"""Reads the base chains of a kind, by default all that could rewrite a source on nat postrouting:
legacy, iptables-nft, native nft.

Creates no table and no chain. Does not decide what the rules do; that is `trace`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from snatd.core import native, xtables
from snatd.core.deadline import Deadline
from snatd.core.errors import BackendFailed
from snatd.core.model import Backend, Family, Rule
from snatd.core.packet import Hook, Step
from snatd.kernel import peek
from snatd.kernel.listing import list_chains
from snatd.kernel.snapshot import is_dormant
from snatd.kernel.tools import Tools

# Chain by chain (3 ms each, however large the table) up to here, then the whole of it: 0.5 s and
# 100 MiB of nft's memory for 20,000 native rules (nft 1.0.6; `list chains` 3 ms).
_CHAINS_ONE_BY_ONE = 24
_NFT_FAMILIES = {Family.V4: ("ip", "inet"), Family.V6: ("ip6", "inet")}
# nft reads its arguments as one line of its language, in which a name that is no word of it could
# be anything, another command too. The kernel takes any bytes.
_WORD = re.compile(r"[A-Za-z_.][A-Za-z0-9_/.-]*")

_Chains = dict[str, tuple[Step, ...]]


class _NotAWord(BackendFailed):
    """A table, chain or set has a name that nft cannot be given."""


@dataclass(frozen=True)
class Kind:
    """Base chains of a type on a hook. `tables`: iptables' own there, with their priorities."""

    type: str
    hook: str
    tables: Mapping[str, int]

    @property
    def chain(self) -> str:
        """What iptables calls it."""
        return self.hook.upper()


_FILTERS = {"mangle": -150, "filter": 0, "security": 50}
NAT = Kind("nat", "postrouting", {"nat": 100})
DNAT = Kind("nat", "prerouting", {"nat": -100})
PREROUTING = Kind("filter", "prerouting", {"raw": -300, "mangle": -150})
INPUT, FORWARD = Kind("filter", "input", _FILTERS), Kind("filter", "forward", _FILTERS)


@dataclass(frozen=True)
class Hooks:
    """One family's base chains of a kind; `unread`: what could not be looked at, and so is not
    among them."""

    family: Family
    hooks: tuple[Hook, ...] = ()
    unread: tuple[str, ...] = ()


def read_hooks(family: Family, tools: Tools, deadline: Deadline, kind: Kind = NAT) -> Hooks:
    """Takes 3 ms for each call of a tool: one for iptables' tables, two for each native chain.
    Raises what Tools.run does; a missing nft is not an error but `unread`."""
    hooks: list[Hook] = []
    legacy = peek.listed_tables(family)
    for table in kind.tables:
        if table in legacy and (kind is not NAT or peek.entries(family)):
            hooks.append(_whole(kind, table, family, Backend.LEGACY, tools, deadline))
    if tools.find("nft") is None:
        if tools.find(f"{family.command}-nft") is not None:
            hooks += [
                _whole(kind, one, family, Backend.NFT, tools, deadline) for one in kind.tables
            ]
        lacking = f"{kind.type} tables that iptables does not show are not known"
        return Hooks(family, tuple(hooks), (f"nft is not installed: {lacking}",))
    with _known_shape():
        all_chains = [
            one["chain"]
            for one in _json(["list", "chains"], tools, deadline)
            if "chain" in one and one["chain"]["family"] in _NFT_FAMILIES[family]
        ]
        bases = [
            one
            for one in all_chains
            if (one.get("type"), one.get("hook")) == (kind.type, kind.hook)
        ]
        unread: list[str] = []
        for base in bases:
            where = (base["family"], base["table"])
            if is_dormant(*where):
                continue
            names = {one["name"] for one in all_chains if (one["family"], one["table"]) == where}
            reader = _NftTable(kind, family, *where, frozenset(names), tools, deadline)
            try:
                chains = reader.reachable(base["name"])
            except _NotAWord as error:
                unread.append(f"{kind.type} chain {' '.join(where)} {base['name']}: {error}")
                continue
            drops = base.get("policy") == "drop"
            hooks.append(
                Hook(" ".join(where), base["name"], int(base["prio"]), chains, drops, kind.hook)
            )
    return Hooks(family, tuple(hooks), tuple(unread))


@contextmanager
def _known_shape() -> Iterator[None]:
    """JSON of another shape than nft's ends here, as BackendFailed."""
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BackendFailed(f"nft printed JSON of a shape that is not known: {error!r}") from None


def has_kube_proxy(family: Family, tools: Tools, deadline: Deadline) -> bool:
    """Whether kube-proxy has rules here, in whichever of its modes. Raises as read_hooks does."""
    chain, ip = "KUBE-SERVICES", _NFT_FAMILIES[family][0]
    if peek.entries(family):
        rules, _ = list_chains(family, Backend.LEGACY, tools, deadline)
        if chain in rules:
            return True
    if tools.find("nft") is None:
        return False
    with _known_shape():
        chains = [one.get("chain", {}) for one in _json(["list", "chains"], tools, deadline)]
        return any(
            one.get("family") == ip
            and (one["table"] == "kube-proxy" or (one["table"], one["name"]) == ("nat", chain))
            for one in chains
        )


def _whole(
    kind: Kind, table: str, family: Family, backend: Backend, tools: Tools, deadline: Deadline
) -> Hook:
    """A table of iptables. The tool reads all of a legacy table at once anyway."""
    rules, policies = list_chains(family, backend, tools, deadline, table=table)
    where = f"{'legacy ' * (backend is Backend.LEGACY)}{_NFT_FAMILIES[family][0]} {table}"
    names, todo = set[str](), [kind.chain]
    while todo:
        if (name := todo.pop()) in rules and name not in names:
            names.add(name)
            todo += xtables.targets(rules[name])
    chains = xtables.compiled({name: rules[name] for name in names}, rules)
    drops = policies.get(kind.chain) == "DROP"
    return Hook(where, kind.chain, kind.tables[table], chains, drops, kind.hook)


@dataclass
class _NftTable:
    """One nft table, read from a base chain on. `names`: of all its chains."""

    kind: Kind
    family: Family
    nft_family: str
    name: str
    names: frozenset[str]
    tools: Tools
    deadline: Deadline
    chains: _Chains = field(default_factory=dict)
    listed: dict[str, tuple[Rule, ...]] = field(default_factory=dict)
    """All chains of iptables' table, once there are many to be read."""

    def reachable(self, base: str) -> _Chains:
        # What iptables-nft wrote it also prints, with everything that nft's JSON leaves out.
        by_iptables = (
            self.nft_family == _NFT_FAMILIES[self.family][0]
            and base == self.kind.chain
            and self.name in self.kind.tables
            and self.tools.find(f"{self.family.command}-nft") is not None
        )
        todo = [base]
        while todo:
            name = todo.pop()
            if name in self.chains or name not in self.names:
                continue
            several = len(self.chains) >= _CHAINS_ONE_BY_ONE
            todo += self._by_iptables(name, several) if by_iptables else self._by_nft(name, several)
        return self.chains

    def _by_iptables(self, name: str, everything: bool) -> Sequence[str]:
        """Reads a chain, or all, and returns what it jumps to. A native rule in one makes
        iptables-nft refuse it ("incompatible"): then nft reads it."""
        if name.startswith("-"):  # to iptables it would be an option
            return self._by_nft(name, everything=False)
        try:
            if everything and not self.listed:
                self.listed = self._list()
            rules = (self.listed or self._list(name))[name]
        except BackendFailed:
            return self._by_nft(name, everything)
        except KeyError:  # removed since the chains were listed: stays unread
            return ()
        self.chains |= xtables.compiled({name: rules}, self.names)
        return xtables.targets(rules)

    def _list(self, *chain: str) -> dict[str, tuple[Rule, ...]]:
        rules, _ = list_chains(
            self.family, Backend.NFT, self.tools, self.deadline, *chain, table=self.name
        )
        return rules

    def _by_nft(self, name: str, everything: bool) -> Sequence[str]:
        what = ["table", self.nft_family, self.name]
        if not everything:
            what = ["chain", *what[1:], name]
        objects = _json(["list", *what], self.tools, self.deadline)
        chains, sets = native.named(native.listing(objects))
        read: set[tuple[str, str]] = set()
        while not everything and (more := sets - read):
            for kind, one in more:
                argv = ["list", kind, self.nft_family, self.name, one]
                objects += _json(argv, self.tools, self.deadline)
            read |= more
            chains, sets = native.named(native.listing(objects))
        texts = native.texts(_nft(["list", *what], self.tools, self.deadline, "-a"))
        compiled = native.compiled(self.family, native.listing(objects), texts)
        self.chains |= {one: steps for one, steps in compiled.items() if one not in self.chains}
        return list(chains)


def _json(words: Sequence[str], tools: Tools, deadline: Deadline) -> list[Any]:
    output = _nft(words, tools, deadline, "-j")
    try:
        return list(json.loads(output)["nftables"])
    except (ValueError, KeyError, TypeError):
        what = " ".join(words)
        raise BackendFailed(f"`nft -j {what}` printed something other than JSON") from None


def _nft(words: Sequence[str], tools: Tools, deadline: Deadline, option: str = "-s") -> str:
    """Raises what Tools.run does, and _NotAWord before anything is run."""
    for one in words:
        if not _WORD.fullmatch(one):
            raise _NotAWord(f"nft cannot be asked for {one!r}: rename it")
    return tools.run(["nft", option, *words], deadline)
