"""One command on a host of the lab with nothing before it, timed from both sides."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass

from tests.lab.netns import Namespace
from tests.lab.network import Node

NO_LOCK = "/dev/null"


@dataclass(frozen=True)
class Span:
    """Points of the monotonic clock: before the child was made, and after it was waited for."""

    before_s: float
    after_s: float

    @property
    def took_ms(self) -> float:
        return (self.after_s - self.before_s) * 1000


def run(host: Namespace, *argv: str, stdin: str = "", lock: str | None = None) -> Span:
    """By this thread's stay in the host's network, since `nsenter` would be timed as well.

    The files are then ours, so the host's lock (or `lock`) is named.
    """
    lock_path = lock or str(host.path("/run/xtables.lock"))
    environment = host.environment({"XTABLES_LOCKFILE": lock_path})
    with host.entered():
        before_s = time.monotonic()
        child = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
        )
        child.communicate(stdin.encode())
        after_s = time.monotonic()
    if child.returncode != 0:
        raise AssertionError(f"`{' '.join(argv)}`: exit {child.returncode}")
    return Span(before_s, after_s)


def insert_broad(node: Node, lock: str | None = None) -> Span:
    """What Docker does at each start."""
    words = ("-w", "-t", "nat", "-I", "POSTROUTING", "1", *node.broad_rule)
    return run(node.host, "iptables", *words, lock=lock)


def only_broad(node: Node) -> None:
    """The state of a node that snatd has never seen."""
    run(node.host, "iptables", "-w", "-t", "nat", "-F", "POSTROUTING")
    insert_broad(node)


def nft_floor_ms(node: Node) -> float:
    """The least that a repair on nft can be: one restore that deletes a rule and inserts one."""
    rule = " ".join(node.broad_rule)
    script = f"*nat\n-D POSTROUTING {rule}\n-I POSTROUTING 1 {rule}\nCOMMIT\n"
    return run(node.host, "iptables-nft-restore", "--noflush", stdin=script).took_ms


def legacy_floor_ms(node: Node) -> float:
    """The least on legacy by the node's tools: a deletion and an insertion."""
    words = ("iptables-legacy", "-w", "-t", "nat")
    deleted = run(node.host, *words, "-D", "POSTROUTING", *node.broad_rule)
    inserted = run(node.host, *words, "-I", "POSTROUTING", "1", *node.broad_rule)
    return deleted.took_ms + inserted.took_ms
