"""The nft table `snatd` of one family: read by `nft -j`, written by one `nft -f`.

Touches no other table. What belongs into it is decided in `core.guard`.
"""

from __future__ import annotations

import time

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendFailed, RuleError
from snatd.core.guard import TABLE, guard_script, parse_guard
from snatd.core.model import Backend, Family, Rule, Ruleset
from snatd.core.plan import Transaction
from snatd.kernel.snapshot import has_table, is_dormant
from snatd.kernel.tools import Tools

# 3 ms whatever else is there. A hanging nft shall leave the other backends their part of a pass.
_LONGEST_CALL_S = 2.0


class GuardTable:
    """One family's guard."""

    backend = Backend.GUARD

    def __init__(self, family: Family, tools: Tools) -> None:
        self.family = family
        self._tools = tools

    def read(self, deadline: Deadline, *, thorough: bool = False) -> Ruleset:  # noqa: ARG002
        """Empty where the table does not exist. Creates nothing."""
        # Without nft it could not be written either, which a pass shall say at once.
        if self._tools.find("nft") and not has_table(self.family, TABLE):
            return Ruleset(self.family, self.backend)
        argv = ["nft", "-j", "list", "table", _TABLES[self.family], TABLE]
        try:
            output = self._tools.run(argv, _sooner(deadline))
        except BackendFailed as error:
            if _ABSENT in str(error):
                return Ruleset(self.family, self.backend)
            raise
        try:
            return Ruleset(self.family, self.backend, parse_guard(output))
        except RuleError as error:
            if not is_dormant(_TABLES[self.family], TABLE):
                raise BackendFailed(f"`{' '.join(argv)}`: {error}") from None
            return Ruleset(self.family, self.backend, (Rule("table with flags"),))

    def apply(self, transaction: Transaction, deadline: Deadline) -> None:
        """Replaces the table whole, or raises and changes nothing. The table is ours alone, so
        there is nothing in it that a rival could lose, and nothing to compare."""
        self._tools.run(["nft", "-f", "-"], _sooner(deadline), stdin=guard_script(transaction))


_TABLES = {Family.V4: "ip", Family.V6: "ip6"}
# nft 0.9 to 1.1 print strerror(ENOENT) for the table. A missing library says 127, not 1.
_ABSENT = "(exit 1): Error: No such file or directory"


def _sooner(deadline: Deadline) -> Deadline:
    return Deadline(min(deadline.at_s, time.monotonic() + _LONGEST_CALL_S))
