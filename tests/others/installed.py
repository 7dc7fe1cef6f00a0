"""A Debian tree on a node of the lab: its programs see its files, the node's network and /run."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Protocol

from tests.lab.groups import INTO_GROUPS, make_groups, start_reaper
from tests.lab.netns import Namespace, Net

_ROOT = "/mnt"  # of the tree, in the node's own mount namespace
_ENVIRONMENT = ("env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8")
_MOUNT = """
mkdir -p /run/changes/upper /run/changes/work
mount -t overlay -o "lowerdir=$1,upperdir=/run/changes/upper,workdir=/run/changes/work" overlay /mnt
for one in proc sys dev; do mount --rbind /$one /mnt/$one; done
mount --bind /run /mnt/run
# Pure cgroup v2, as on these Debians, also where the machine mixes the versions.
mount -t cgroup2 cgroup2 /mnt/sys/fs/cgroup
mkdir -p /mnt/var/lib/containers /mnt/var/lib/cni
mount -t tmpfs tmpfs /mnt/var/lib/containers
mount -t tmpfs tmpfs /mnt/var/lib/cni
chroot /mnt update-alternatives --quiet --set iptables "/usr/sbin/iptables-$2"
"""
_numbers = itertools.count(1)


class Installed:
    """What is started here is in control groups of its own, and ends with the test in any case."""

    def __init__(self, host: Namespace, tree: Path, backend: str) -> None:
        self.host = host
        host.run("sh", "-euc", _MOUNT, "sh", str(tree), backend)
        self._groups = make_groups(f"snatd-others-{os.getpid()}-{next(_numbers)}")
        self._reaper = start_reaper(self._groups)

    def _command(self, *argv: str) -> list[str]:
        inside = ("chroot", _ROOT, *_ENVIRONMENT, *argv)
        into = ("sh", "-euc", INTO_GROUPS, "sh", *map(str, self._groups), "--")
        return [*into, *self.host.command(*inside)]

    def run(self, *argv: str) -> str:
        """A command has to succeed and to say nothing on stderr. Returns what it printed."""
        done = subprocess.run(
            self._command(*argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), f"{argv}: {done}"
        return done.stdout

    def popen(self, *argv: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command(*argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def path(self, path: str) -> Path:
        return self.host.path(f"{_ROOT}{path}")

    def net(self, name: str) -> Net:
        """A network that `ip netns add` made here."""
        return Net(self.path(f"/run/netns/{name}"))

    def close(self) -> None:
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(30)


class Host(Protocol):
    def run(self, *argv: str) -> str: ...


def rules_of_others(host: Host) -> list[str]:
    """All rules and chains on a host but snatd's, by both backends of iptables and by nft."""
    found = []
    legacy = host.run("cat", "/proc/net/ip_tables_names").split()  # to list another would make it
    for command, tables in (("iptables-nft", _TABLES), ("iptables-legacy", sorted(legacy))):
        for table in tables:
            listed = host.run(command, "-w", "5", "-t", table, "-S").splitlines()
            found += [f"{command} {table} {line}" for line in listed if " snatd " not in line]
    # iptables-nft's tables were listed above.
    native = re.findall(r"^table .*?^}", host.run("nft", "-s", "list", "ruleset"), re.M | re.S)
    found += [_chains_in_order(one) for one in native if not _NO_NATIVE.match(one)]
    return [_CONTAINER.sub("ID", one) for one in found]


def _chains_in_order(table: str) -> str:
    """Which chain was made first means nothing, and differs after firewalld's restarts (2.3)."""
    head, _, body = table.partition("\n")
    return "\n".join((head, *sorted(body.removesuffix("}").strip("\n").split("\n\n")), "}"))


_TABLES = ("filter", "nat", "mangle")
_CONTAINER = re.compile(r"\b[0-9a-f]{64}\b")  # another one each time
_NO_NATIVE = re.compile(r"table ip6? (snatd|filter|nat|mangle) ")
