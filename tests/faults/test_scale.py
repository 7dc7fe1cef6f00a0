"""Row 29: fifty thousand nat rules."""

from __future__ import annotations

import time

import pytest

from tests.faults.conftest import Measured, Start
from tests.faults.test_rules import settled
from tests.faults.watching import cpu_shares
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

MANY = "*nat\n:MANY - [0:0]\n{rules}COMMIT\n".format(
    rules="".join(
        f"-A MANY -d 10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32 -j RETURN\n" for n in range(50_000)
    )
)


def look_ms(node: Node, snatd: Snatd, count: int = 20) -> float:
    """What a pass that finds nothing to do costs, in CPU, its tools included. Each is made by
    writing the lease as it was."""
    before_s, passes = snatd.cpu_s(), snatd.status()["passes"]
    for _ in range(count):
        seen = snatd.status()["passes"]
        node.write_lease()
        until(lambda: snatd.status()["passes"] > seen, "a look", 20)  # noqa: B023
    until(lambda: snatd.status()["in_sync"], "in sync")
    return (snatd.cpu_s() - before_s) * 1000 / float(snatd.status()["passes"] - passes)


@pytest.mark.long
@pytest.mark.parametrize("command", ["nft", "legacy"])
def test_fault_29_fifty_thousand_rules(
    nft_lab: Lab, node: Node, start: Start, measured: Measured, command: str
) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule, command=f"iptables-{command}")
    snatd = start(node)
    settled(snatd)
    few_ms = look_ms(node, snatd)
    node.host.run(f"iptables-{command}-restore", "--noflush", stdin=MANY)
    until(lambda: snatd.status()["in_sync"], "in sync", 30)
    many_ms = look_ms(node, snatd)
    (share,) = cpu_shares([snatd], 10)
    began_s = time.monotonic()
    add(node, "-I", "POSTROUTING", *node.broad_rule, command=f"iptables-{command}")
    until(lambda: rules(node, f"iptables-{command}") == [NARROW], "the repair", 20)
    repair_ms = (time.monotonic() - began_s) * 1000
    measured(
        f"a look takes {few_ms:.0f} ms of a core at 1 rule, {many_ms:.0f} ms at 50,000 (20 each), "
        f"a repair {repair_ms:.0f} ms of time; idle {share:.2%} of a core over 10 s"
    )
    # nft lists one chain, whatever is in the others; ip_tables hands out the whole table.
    assert many_ms < (1.5 * few_ms + 10 if command == "nft" else few_ms + 1000)
    assert share < 0.05
    promises_hold(nft_lab)
