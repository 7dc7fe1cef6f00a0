"""Row 12: tools that are missing, hang, die, or print something else than they should."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Start
from tests.faults.watching import commands_in, most_memory_mib
from tests.kernel.test_packets import NARROW, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd


class Shims:
    """A folder that stands first on a node's PATH; a program in it comes before the true one."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        before = Path(node.host.environment()["PATH"].partition(":")[0])
        for link in before.iterdir():  # what `iptables` is stays as it is
            (folder / link.name).symlink_to(link.resolve())
        node.host.use_iptables(folder)

    def put(self, name: str, body: str) -> None:
        """The program is there whole, or not at all."""
        new = self.folder / ".new"
        new.write_text(f"#!/bin/sh\n{body}\n")
        new.chmod(0o755)
        new.rename(self.folder / name)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


@pytest.fixture
def shims(node: Node, tmp_path: Path) -> Shims:
    return Shims(node, tmp_path / "shims")


# What a tool may do instead of its work, and what is then told of one that reads.
FAULTS = {
    "sleep 600 & (trap '' TERM; sleep 600) & sleep 600": "did not answer within",
    "kill -9 $$": "killed by SIGKILL",
    "echo 'no such luck' >&2; exit 3": "failed (exit 3): no such luck",
    "exit 4": "no message",
    "exec <&-; sleep 0.1; exit 1": "exit 1",
    ":": "",
    "head -c 5000 /dev/urandom": "",
    # Its own output, cut.
    '/usr/sbin/"${0##*/}" "$@" | head -c 40': "",
}


@pytest.mark.long
@pytest.mark.parametrize("tool", ["nft", "iptables-nft", "iptables-nft-restore"])
def test_fault_12_a_broken_tool_is_told_and_recovered_from(
    nft_lab: Lab, node: Node, shims: Shims, start: Start, tool: str
) -> None:
    """Whatever it does: nothing is acted upon, nothing is left running, and all is over by itself
    when the tool works again."""
    snatd = start(node, resync=1, guard="on")
    until(lambda: snatd.status()["in_sync"], "in sync")
    writes = tool == "iptables-nft-restore"
    for body, told in FAULTS.items():
        if writes and body.startswith("/usr/sbin"):
            continue  # it would do its work
        says = told or "still not as planned" * writes
        shims.put(tool, body)
        node.host.run("/usr/sbin/nft", "delete", "table", "ip", "snatd")
        node.host.run("/usr/sbin/iptables-nft", *nat("-I"), *node.broad_rule)
        until(lambda: is_told(snatd, tool, says), f"{tool}: {body}", 25)  # noqa: B023
        there = node.host.run("/usr/sbin/iptables-nft", *nat("-S")).splitlines()[1:]
        ours, broad = f"-A POSTROUTING {NARROW}", f"-A POSTROUTING {' '.join(node.broad_rule)}"
        assert there in ([ours], [broad, ours]), "the repair, or nothing"
        shims.remove(tool)
        until(lambda: snatd.status()["in_sync"], f"the recovery from {body}", 30)
        assert rules(node) == [NARROW]
        until(lambda: not commands_in(node.host), "no child left")
    assert snatd.process.poll() is None
    promises_hold(nft_lab)


@pytest.mark.parametrize("tool", ["nft", "iptables-nft", "conntrack"])
def test_fault_12_a_tool_that_prints_without_an_end(
    nft_lab: Lab, node: Node, shims: Shims, start: Start, tool: str
) -> None:
    """It is cut off, before it takes the node's memory."""
    snatd = start(node, resync=1, guard="on")
    until(lambda: snatd.status()["in_sync"], "in sync")
    shims.put(tool, "exec cat /dev/zero")
    node.host.run("/usr/sbin/nft", "delete", "table", "ip", "snatd")
    node.host.run("/usr/sbin/iptables-nft", *nat("-I"), *node.broad_rule)
    if tool == "conntrack":
        snatd.wait_for("flows_unknown", within_s=30)
        assert "a line without an end" in str(snatd.events("flows_unknown"))
    else:
        until(lambda: is_told(snatd, tool, "MiB: not believed"), "it told", 30)
    until(lambda: not commands_in(node.host), "no child left", 20)
    shims.remove(tool)
    until(lambda: snatd.status()["in_sync"] and rules(node) == [NARROW], "the recovery", 30)
    assert most_memory_mib(snatd) < 200
    promises_hold(nft_lab)


def nat(option: str) -> tuple[str, ...]:
    return ("-t", "nat", option, "POSTROUTING")


def is_told(snatd: Snatd, tool: str, says: str) -> bool:
    status = snatd.status()
    if status["state"] != "degraded" or says not in status["headline"]:
        return False
    return tool in status["headline"] or "still not as planned" in status["headline"]


@pytest.mark.parametrize("program", ["nft", "xtables-nft-multi"])
def test_fault_12_a_missing_tool(nft_lab: Lab, node: Node, start: Start, program: str) -> None:
    snatd = start(node, resync=1, guard="on")
    until(lambda: snatd.status()["in_sync"], "in sync")
    for one in ("nft", "xtables-nft-multi"):
        shutil.copy(f"/usr/sbin/{one}", node.host.path(f"/run/{one}"))
    # Not executable, so nobody finds it.
    node.host.run("mount", "--bind", "/dev/null", f"/usr/sbin/{program}")
    node.host.run("/run/nft", "delete", "table", "ip", "snatd")
    node.host.run("/run/xtables-nft-multi", "iptables", *nat("-I"), *node.broad_rule)
    tool = "iptables-nft" if program == "xtables-nft-multi" else program
    until(lambda: f"{tool} is not installed" in snatd.status()["headline"], "it told", 20)
    node.host.run("umount", f"/usr/sbin/{program}")
    until(lambda: snatd.status()["in_sync"] and rules(node) == [NARROW], "the recovery", 30)
    promises_hold(nft_lab)
