"""Reads the rules of either backend by `iptables-… -t nat -v -S CHAIN`. Creates nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendFailed, RuleError, StaleRuleset
from snatd.core.model import POSTROUTING, Backend, Family, Rule, Ruleset
from snatd.core.plan import Transaction
from snatd.core.rules import own_chains, own_jumps, parse_listing, parse_table
from snatd.kernel.tools import Tools

Parsed = TypeVar("Parsed")

# A listing is one snapshot of the kernel's and needs no lock. iptables-legacy takes it all the
# same, so its lock is pointed elsewhere: a rival who holds the true one cannot keep us from
# looking, and our look does not wake those who watch that file, us among them. Each process has an
# `environ` of its own, which only root may open; /dev/null any user could lock, for ever.
NO_LOCK = {"XTABLES_LOCKFILE": "/proc/self/environ"}


def read_ruleset(
    family: Family,
    backend: Backend,
    tools: Tools,
    deadline: Deadline,
    *,
    thorough: bool,
    meanwhile: Callable[[], None] | None = None,
) -> Ruleset:
    """POSTROUTING and the chains of ours that it jumps to; `thorough`: also those that nothing
    jumps to, at the cost of a listing of the whole table. `meanwhile` is done while the first tool
    runs.

    Otherwise only by the jump, because iptables-nft 1.8.9 has one message for a chain that does
    not exist and for one that it cannot print, and a chain of ours without a jump does nothing.
    """
    postrouting = _list(family, backend, tools, deadline, POSTROUTING, meanwhile)
    names = dict.fromkeys(own_jumps(postrouting))
    if thorough:
        whole = _trusted(_argv(family, backend, "-v"), tools, deadline, own_chains)
        names |= dict.fromkeys(whole)
    own = tuple((name, _list(family, backend, tools, deadline, name)) for name in names)
    return Ruleset(family, backend, postrouting, own)


def is_as_read(transaction: Transaction, tools: Tools, deadline: Deadline) -> Ruleset:
    """The rules that a transaction is about, if they are still as it was planned for.

    Raises StaleRuleset if they are not.
    """
    family, backend = transaction.family, transaction.backend
    actual = read_ruleset(family, backend, tools, deadline, thorough=False)
    own = dict(actual.own_chains)
    stale = StaleRuleset(f"{family.command}-{backend.value}: the rules changed meanwhile")
    for edit in transaction.edits:
        if edit.before is not None and edit.chain not in (POSTROUTING, *own):
            try:
                own[edit.chain] = _list(family, backend, tools, deadline, edit.chain)
            except BackendFailed:
                raise stale from None
    actual = replace(actual, own_chains=tuple(own.items()))
    if changed(transaction, actual):
        raise stale
    return actual


def changed(transaction: Transaction, actual: Ruleset) -> bool:
    """Whether one of the chains that a transaction is about is not as it was planned for."""
    edits = transaction.edits
    return any((actual.chain(one.chain) or ()) != (one.before or ()) for one in edits)


def list_chains(
    family: Family,
    backend: Backend,
    tools: Tools,
    deadline: Deadline,
    *chain: str,
    table: str = "nat",
) -> tuple[dict[str, tuple[Rule, ...]], dict[str, str]]:
    """One chain, or all of the table, without counters; and the policies of base chains."""
    argv = [*_argv(family, backend, table=table), *chain]
    return _trusted(argv, tools, deadline, parse_table)


def _argv(family: Family, backend: Backend, *verbose: str, table: str = "nat") -> list[str]:
    wait = ("-w", "1") if backend is Backend.LEGACY else ()
    return [f"{family.command}-{backend.value}", *wait, "-t", table, *verbose, "-S"]


def _list(
    family: Family,
    backend: Backend,
    tools: Tools,
    deadline: Deadline,
    chain: str,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[Rule, ...]:
    argv = [*_argv(family, backend, "-v"), chain]
    return _trusted(argv, tools, deadline, lambda output: parse_listing(output, chain), meanwhile)


def _trusted(
    argv: list[str],
    tools: Tools,
    deadline: Deadline,
    parser: Callable[[str], Parsed],
    meanwhile: Callable[[], None] | None = None,
) -> Parsed:
    output = tools.run(argv, deadline, environment=NO_LOCK, meanwhile=meanwhile)
    try:
        return parser(output)
    except RuleError as error:
        raise BackendFailed(f"`{' '.join(argv)}`: {error}") from None
