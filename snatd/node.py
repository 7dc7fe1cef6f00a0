"""Wires the edges of this node for `daemon` and `cli`. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.errors import NotPermitted
from snatd.core.model import Backend, Lease, Network, NodeState
from snatd.core.plan import Transaction
from snatd.host.flannel import read_lease
from snatd.host.memory import MemoryFile
from snatd.kernel.backends import all_tables, iptables_is
from snatd.kernel.legacy import Digests
from snatd.kernel.lock import XtablesLock
from snatd.kernel.snapshot import has_ipv6, read_links
from snatd.kernel.tools import Tools
from snatd.reconcile import Edges

_CAP_NET_ADMIN = 12


def require_permission() -> None:
    """Raises NotPermitted without CAP_NET_ADMIN, which even reading a table needs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff" and not int(value, 16) >> _CAP_NET_ADMIN & 1:
            raise NotPermitted("reading nat tables needs CAP_NET_ADMIN: run it as root, by sudo")


def open_edges(
    config: Config,
    tools: Tools,
    complain: Callable[[str], None] = lambda _: None,
    lock: XtablesLock | None = None,
    digests: Callable[[], Digests] = dict,
) -> Edges:
    """The real edges. `complain` hears when what `revert` needs cannot be kept. `lock`, `digests`:
    of a process that opens edges more than once, and that watches the legacy tables."""

    def read_node(deadline: Deadline) -> NodeState:
        lease = read_lease(config.subnet_file)
        leased = lease.families if isinstance(lease, Lease) else ()
        links, routes = read_links([family for family, _ in leased])
        return NodeState(lease, links, routes, has_ipv6(), iptables_is(tools, deadline))

    memory_file = MemoryFile(config.state_dir)

    def keep(transaction: Transaction, subnet: Network | None) -> None:
        if subnet is not None and transaction.backend is not Backend.GUARD:
            memory_file.keep(transaction, subnet, complain)

    every = all_tables(tools, lock or XtablesLock(), config.policy.backend, digests)
    return Edges(read_node, every, keep)
