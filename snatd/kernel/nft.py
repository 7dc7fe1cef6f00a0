"""iptables rules that live in nf_tables: read by `iptables-nft -S`, written by one restore.

`iptables-nft-restore` takes no lock and checks no generation, and `-D n` resolves n when it runs,
so nothing is removed by number: what goes is named by its full text. A number only says where to
insert; a wrong one costs order, which the caller reads back and puts right.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendFailed, Illegible
from snatd.core.model import POSTROUTING, Backend, Family, Ruleset
from snatd.core.plan import ChainEdit, Transaction
from snatd.kernel.listing import is_as_read, read_ruleset
from snatd.kernel.snapshot import has_table
from snatd.kernel.tools import Tools


class NftTables:
    """One family's nat table as the iptables-nft tools see it."""

    backend = Backend.NFT

    def __init__(self, family: Family, tools: Tools) -> None:
        self.family = family
        self._tools = tools

    def read(self, deadline: Deadline, *, thorough: bool = False) -> Ruleset:
        """Creates nothing. About 2 ms a chain, whatever the size of the table; 0.05 ms where there
        is no table.

        A native rule in the table makes iptables-nft print nothing ("incompatible, use 'nft'
        tool"): Illegible, and the caller goes on.
        """
        if self._is_legacy_node():
            return Ruleset(self.family, self.backend)
        # Without the tool it could not be written either, which a pass shall say at once.
        if self._tools.find(f"{self.family.command}-nft") and not has_table(self.family, "nat"):
            return Ruleset(self.family, self.backend)
        try:
            return read_ruleset(self.family, self.backend, self._tools, deadline, thorough=thorough)
        except BackendFailed as error:
            if "use 'nft' tool" in str(error):
                raise Illegible(str(error)) from None
            raise

    def _is_legacy_node(self) -> bool:
        """Whether the node has legacy tools only, and so no rules made by the others. A tool that
        is merely missing says nothing about the rules."""
        if self._tools.find(f"{self.family.command}-nft") is not None:
            return False
        path = self._tools.find(self.family.command)
        return path is not None and "legacy" in os.path.basename(os.path.realpath(path))

    def apply(self, transaction: Transaction, deadline: Deadline) -> None:
        """Writes a transaction: all of it or, with StaleRuleset or BackendFailed, nothing."""
        argv = [f"{self.family.command}-nft-restore", "--noflush", "--counters"]
        try:
            self._tools.run(argv, deadline, stdin=restore_script(transaction))
        except BackendFailed:
            # The message differs from version to version; whether the rules are still those that
            # were read does not.
            is_as_read(transaction, self._tools, deadline)
            raise


def restore_script(transaction: Transaction) -> str:
    """The input for `iptables-restore --noflush --counters`.

    Chains of ours are written whole before the rules that jump to them, and deleted after.
    """
    lines = ["*nat"]
    base = [edit for edit in transaction.edits if edit.chain == POSTROUTING]
    own = [edit for edit in transaction.edits if edit.chain != POSTROUTING]
    for edit in own:
        if edit.after is not None:
            lines.append(f":{edit.chain} - [0:0]")
            lines += [f"-A {edit.chain} {rule.text}" for rule in edit.after]
    for edit in base:
        lines += _edit_lines(edit)
    for edit in own:
        if edit.after is None:
            lines += [f"-F {edit.chain}", f"-X {edit.chain}"]
    return "\n".join([*lines, "COMMIT", ""])


def _edit_lines(edit: ChainEdit) -> Iterator[str]:
    before, after = edit.before or (), edit.after or ()
    # `-D` takes the first of equal rules. Where only some copies go, all go and the others return.
    touched = edit.touched
    for text, copies in Counter(rule.text for rule in before if rule.text in touched).items():
        yield from [f"-D {edit.chain} {text}"] * copies
    last = max((n for n, rule in enumerate(after) if rule.text not in touched), default=-1)
    for number, rule in enumerate(after):
        if rule.text not in touched:
            continue
        prefix = f"[{rule.counters.packets}:{rule.counters.bytes}] " if rule.counters else ""
        # Behind the last rule that stays, appending says the same and needs no number.
        where = f"-A {edit.chain}" if number > last else f"-I {edit.chain} {number + 1}"
        yield f"{prefix}{where} {rule.text}"
