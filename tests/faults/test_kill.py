"""Row 21: kill -9 at each system call of an apply, of the daemon and of the tools that write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import snatd
from tests.faults.conftest import Measured
from tests.kernel.test_packets import NARROW, promises_hold
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

PROJECT = Path(snatd.__file__).parents[1]
FOREIGN = ("-s 192.0.2.1/32 -j RETURN", "-s 192.0.2.2/32 -j RETURN")
# All of a write is followed call by call, from this much before it begins to this much behind.
AROUND = 60
# The rest, which reads and tells, in strides.
STRIDE = 16
TOOL_STRIDE = 4


@dataclass
class Killer:
    """The stepper on a node, and what the node is like after each of its runs."""

    node: Node
    folder: Path
    process: subprocess.Popen[str]

    def run(self, whom: str, number: int = -1) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{whom} {number}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def reset(self) -> None:
        """A broad rule between two of somebody else's, and nothing of snatd's."""
        rules = (FOREIGN[0], " ".join(self.node.broad_rule), FOREIGN[1])
        restore = "*nat\n:SNATD-POSTROUTING - [0:0]\n:POSTROUTING ACCEPT [0:0]\n"
        restore += "".join(f"-A POSTROUTING {rule}\n" for rule in rules)
        self.node.host.run("iptables-restore", "-w", "5", stdin=f"{restore}COMMIT\n")
        self.node.host.shell(
            "iptables -w 5 -t nat -X; nft delete table ip snatd 2>/dev/null || :;"
            f"rm -rf {self.folder}/state /run/snatd"
        )

    def rules(self) -> list[str]:
        listed = self.node.host.run("iptables", "-w", "5", "-t", "nat", "-S", "POSTROUTING")
        return [one.removeprefix("-A POSTROUTING ") for one in listed.splitlines()[1:]]

    def guard(self) -> str:
        return self.node.host.run("nft", "-s", "list", "table", "ip", "snatd", check=False)

    def handles(self) -> str:
        """Differs when any of it was written anew."""
        return self.node.host.run("nft", "-s", "-a", "list", "ruleset")


@contextmanager
def stepping(node: Node, folder: Path) -> Iterator[Killer]:
    with Snatd(node.host, folder) as snatd:
        process = subprocess.Popen(
            node.host.command(sys.executable, "-m", "tests.faults.stepper", str(snatd.config)),
            env=node.host.environment({"PYTHONPATH": str(PROJECT)}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "{}\n", "the stepper did not start"
            yield Killer(node, folder, process)
        finally:
            process.kill()
            process.wait()


def numbers(writes: list[int], last: int) -> list[int]:
    first_s, last_s = min(writes) - AROUND, max(writes) + AROUND
    return [n for n in range(1, last + 1) if first_s <= n <= last_s or n % STRIDE == 0]


@pytest.mark.long
def test_fault_21_kill_9_at_each_system_call(tmp_path: Path, measured: Measured) -> None:
    """Three sweeps at the same time, each in a lab of its own."""
    with (
        Lab("nft") as nft,
        Lab("legacy") as legacy,
        Lab("nft") as tools,
        ThreadPoolExecutor() as pool,
    ):
        sweeps = {
            "nft": pool.submit(kill_the_daemon, nft, tmp_path / "nft"),
            "legacy": pool.submit(kill_the_daemon, legacy, tmp_path / "legacy"),
            "tools": pool.submit(kill_the_tools, tools, tmp_path / "tools"),
        }
        for name, sweep in sweeps.items():
            measured(f"{name}: {sweep.result()}")


def kill_the_daemon(lab: Lab, folder: Path) -> str:
    """At each of its system calls around the writes, and at some of the rest."""
    node = lab.nodes[0]
    node.write_lease()
    with stepping(node, folder) as killer:
        killer.reset()
        old = killer.rules()
        whole = killer.run("tool")
        new, guard = killer.rules(), killer.guard()
        assert new == [FOREIGN[0], NARROW, FOREIGN[1]]
        assert "snat to ip saddr" in guard
        assert len(whole["writes"]) == 2, "the guard and the rules"
        steps = numbers(whole["writes"], whole["calls"])
        found = {(False, False): 0, (True, False): 0, (True, True): 0}
        for number in steps:
            killer.reset()
            where = f"killed at call {number} of {killer.run('daemon', number)}"
            rules, there = killer.rules(), killer.guard()
            assert rules in (old, new), where
            assert there in ("", guard), where
            state = (there == guard, rules == new)
            # Neither half, nor in another order: the guard stands before anything else is touched.
            assert state in found, where
            found[state] += 1
            check_next_start(killer, state, where)
            assert (killer.rules(), killer.guard()) == (new, guard), where
        # Each of the three was met: the steps lie where the writes are.
        assert min(found.values()) > 5, found
    promises_hold(lab)
    return f"{len(steps)} kills; before, between, behind the writes: {[*found.values()]}"


def check_next_start(killer: Killer, state: tuple[bool, bool], where: str) -> None:
    """It converges, writes only what was missing, and clears up."""
    before = killer.handles() if all(state) else ""
    again = killer.run("tool")
    assert again["ended"] == "ready", where
    assert len(again["writes"]) == state.count(False), where
    assert not before or killer.handles() == before, f"{where}: a needless write"
    run = killer.node.host.path("/run/snatd")
    assert sorted(os.listdir(run)) == ["snatd.lock", "status.json"], where
    assert json.loads((run / "status.json").read_text())["in_sync"], where
    assert os.listdir(killer.folder / "state") == ["replaced.json"], where
    replaced = json.loads((killer.folder / "state/replaced.json").read_text())["replaced"]
    broad = " ".join(killer.node.broad_rule)
    assert [one["rules"] for one in replaced] == [[{"text": broad, "copies": 1}]], where


def kill_the_tools(lab: Lab, folder: Path) -> str:
    """The tool that writes dies, and snatd goes on."""
    node = lab.nodes[0]
    node.write_lease()
    with stepping(node, folder) as killer:
        killer.reset()
        old = killer.rules()
        whole = killer.run("tool")
        new, guard = killer.rules(), killer.guard()
        steps = range(1, whole["tool_calls"] + 1, TOOL_STRIDE)
        assert len(steps) > 50
        written = 0
        for number in steps:
            killer.reset()
            where = f"killed at call {number} of {killer.run('tool', number)}"
            rules, there = killer.rules(), killer.guard()
            assert rules in (old, new), where
            assert there in ("", guard), where
            written += (rules, there) == (new, guard)
            assert killer.run("tool")["ended"] == "ready", where
            assert (killer.rules(), killer.guard()) == (new, guard), where
    promises_hold(lab)
    return f"{len(steps)} kills; in {written} of them all was written nevertheless"
