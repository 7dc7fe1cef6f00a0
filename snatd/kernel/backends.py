"""The homes of rules on this node, and which its `iptables` command writes to."""

from __future__ import annotations

import os
from collections.abc import Callable

from snatd.core.deadline import Deadline
from snatd.core.model import Backend, Family
from snatd.kernel.guard import GuardTable
from snatd.kernel.legacy import Digests, LegacyTables
from snatd.kernel.lock import XtablesLock
from snatd.kernel.nft import NftTables
from snatd.kernel.tools import Tools

Tables = GuardTable | NftTables | LegacyTables


def all_tables(
    tools: Tools, lock: XtablesLock, only: Backend | None, digests: Callable[[], Digests] = dict
) -> tuple[Tables, ...]:
    """The guards, then every backend of every family: in the order in which a plan goes through
    them. `only`: of the two homes of iptables rules, this one. `digests`: see LegacyTables."""
    tables: list[Tables] = [GuardTable(family, tools) for family in Family]
    for family in Family:
        tables += [NftTables(family, tools), LegacyTables(family, tools, lock, digests)]
    return tuple(
        one for one in tables if only in (None, one.backend) or one.backend is Backend.GUARD
    )


def iptables_is(tools: Tools, deadline: Deadline) -> Backend:
    """What `iptables` is; nft where there is no such command.

    By the program behind the link (alternatives on Debian and EL); where its name does not tell,
    by what `iptables -V` says.
    """
    path = tools.find("iptables")
    if path is None:
        return Backend.NFT
    program = os.path.basename(os.path.realpath(path))
    if "legacy" in program:
        return Backend.LEGACY
    if "nft" in program:
        return Backend.NFT
    return Backend.NFT if "nf_tables" in tools.run(["iptables", "-V"], deadline) else Backend.LEGACY
