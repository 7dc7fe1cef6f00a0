"""One command on a host of the lab with nothing before it, timed from both sides; and the floors:
the least work that could do what snatd does."""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.bench.figures import Figure
from tests.lab.netns import Namespace
from tests.lab.network import Node

NO_LOCK = "/dev/null"
_SIOCSIFMTU = 0x8922


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


def flush_and_add_broad(node: Node) -> Span:
    """What a firewall's reload does: everybody's rule is gone, and Docker's is back."""
    script = f"*nat\n-F POSTROUTING\n-A POSTROUTING {' '.join(node.broad_rule)}\nCOMMIT\n"
    return run(node.host, "iptables-restore", "--noflush", stdin=script)


def only_broad(node: Node) -> None:
    """The state of a node that snatd has never seen, as far as POSTROUTING goes."""
    run(node.host, "iptables", "-w", "-t", "nat", "-F", "POSTROUTING")
    insert_broad(node)


def nft_floor_ms(node: Node) -> float:
    """The least that a repair on nft can be: one restore that deletes a rule and inserts one."""
    rule = " ".join(node.broad_rule)
    script = f"*nat\n-D POSTROUTING {rule}\n-I POSTROUTING 1 {rule}\nCOMMIT\n"
    return run(node.host, "iptables-nft-restore", "--noflush", stdin=script).took_ms


def legacy_floor_ms(node: Node) -> float:
    """What one change of a table of this size costs the iptables command. It is undone untimed."""
    words = ("iptables-legacy", "-w", "-t", "nat")
    deleted = run(node.host, *words, "-D", "POSTROUTING", *node.broad_rule)
    run(node.host, *words, "-I", "POSTROUTING", "1", *node.broad_rule)
    return deleted.took_ms


_LISTENER = """
import socket, time
ear = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
ear.bind((0, 1))  # RTNLGRP_LINK
print("listening", flush=True)
while True:
    ear.recv(65536)
    print(time.monotonic(), flush=True)
"""


def wake_ups(host: Namespace, count: int) -> Figure:
    """From before a system call that makes the kernel tell of a change, to a waiting process that
    has heard of it."""
    host.shell("ip link add wake0 type veth peer name wake1")
    listener = host.popen(sys.executable, "-c", _LISTENER, stdout=subprocess.PIPE)
    assert listener.stdout is not None
    assert listener.stdout.readline() == b"listening\n"
    change = _mtu_changer(host, "wake0")
    took_ms = []
    for number in range(count):
        time.sleep(0.01)
        before_s = time.monotonic()
        change(1400 + number % 2)
        took_ms.append((float(listener.stdout.readline()) - before_s) * 1000)
    listener.kill()
    listener.wait()
    host.shell("ip link del wake0")
    return Figure("floor: bare event to process wake-up", "ms", tuple(took_ms))


def _mtu_changer(host: Namespace, device: str) -> Callable[[int], None]:
    with host.entered():
        control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def change(mtu: int) -> None:
        fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si12x", device.encode(), mtu))

    return change
