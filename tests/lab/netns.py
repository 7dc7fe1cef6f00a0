"""Network and mount namespaces that vanish with the process that made them, however it ends.

A namespace lives as long as the process in it, and that process is killed by the kernel when its
parent dies (PR_SET_PDEATHSIG). So nothing has a name, nothing collides and nothing is left over.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000


# In front of a command: the kernel kills it when its parent is gone, however that ended.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")

_UNSHARE = ("unshare", "--net", "--mount", "--propagation", "private")

# Makes a tree the root of a mount namespace. The files of `$2` are in it under the same name.
_INTO_TREE = """
cd "$1"
mkdir -p old "./$2"
mount --bind "$2" "./$2"
mount --rbind /proc proc
mount -t sysfs sysfs sys
mount --rbind /sys/fs/cgroup sys/fs/cgroup
mount --rbind /dev dev
pivot_root . old
umount --lazy /old
cd /
exec sleep infinity
"""


def until(condition: Callable[[], Any], what: str, within_s: float = 30.0) -> Any:
    """Waits for a condition, never for a time. Returns what it gave; fails loudly at the end."""
    end_s = time.monotonic() + within_s
    while not (result := condition()):
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {within_s:g} s: {what}")
        time.sleep(0.003)
    return result


class Namespace:
    """A host: a network namespace, and a mount namespace with a /run of its own.

    `root` is a mounted tree that all of it runs in, else the machine's; `shared` a folder of the
    machine's that is there too.
    """

    def __init__(self, root: Path | None = None, shared: Path | None = None) -> None:
        into = ["sh", "-euc", _INTO_TREE, "sh", str(root), str(shared)]
        self._holder = subprocess.Popen(
            [*DIE_WITH_PARENT, *_UNSHARE, *(into if root else ["sleep", "infinity"])],
            start_new_session=True,
        )
        self.pid = self._holder.pid
        self._environment: dict[str, str] = {}
        self._programs: list[subprocess.Popen[bytes]] = []
        until(self._is_up, "a namespace of its own")
        assert _netns(self.pid) != _netns(os.getpid()), "unshare gave no namespace"
        # An address is good at once: nobody else here could have it (duplicate address detection).
        self.shell(
            "mount -t tmpfs tmpfs /run; mkdir /run/flannel; ip link set lo up; "
            # What runs here must not find the machine's own saved rules, nor write its settings.
            "for one in /etc/iptables /etc/sysconfig /etc/sysctl.d /etc/modules-load.d; do "
            "if [ -d $one ]; then mount -t tmpfs tmpfs $one; fi; done; "
            "for one in all default; do echo 0 > /proc/sys/net/ipv6/conf/$one/accept_dad; done"
        )

    def _is_up(self) -> bool:
        if self._holder.poll() is not None:
            raise AssertionError("`unshare --net --mount` failed: are you root?")
        return _comm(self.pid) == "sleep"

    def use_iptables(self, folder: Path) -> None:
        """Puts a folder of commands first on the PATH of everything that runs here."""
        self._environment["PATH"] = f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin"

    def command(self, *argv: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "--", *argv]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, **self._environment, **(extra or {})}

    def run(
        self, *argv: str, stdin: str | None = None, check: bool = True, timeout_s: float = 60
    ) -> str:
        """Runs a command here and returns what it printed."""
        done = subprocess.run(
            self.command(*argv),
            input=stdin,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"`{' '.join(argv)}`: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def shell(self, script: str) -> str:
        return self.run("sh", "-euc", script)

    def popen(self, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
        """Starts a command here; it dies with this process."""
        options.setdefault("env", self.environment())
        command = [*DIE_WITH_PARENT, *self.command(*argv)]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)

    def program(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A program of some name that does nothing; it ends with this host."""
        file = self.path(f"/run/programs/{name}")
        file.parent.mkdir(exist_ok=True)
        file.write_text("#!/usr/bin/python3 -IS\nimport signal\nsignal.pause()\n")
        file.chmod(0o755)
        program = self.popen(f"/run/programs/{name}", *arguments)
        self._programs.append(program)
        until(lambda: _comm(program.pid) == name[:15], f"{name} runs")
        return program

    def path(self, path: str) -> Path:
        """A file of this host, as seen from outside."""
        return Path(f"/proc/{self.pid}/root{path}")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread's network is this host's for a while; sockets made here stay here."""
        with network_of(self.pid):
            yield

    def close(self) -> None:
        for one in (*self._programs, self._holder):
            one.kill()
            one.wait()


class Place(Protocol):
    """Where sockets can be made: a host, or a network that another program made."""

    def entered(self) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Net:
    """A network by its file."""

    path: Path

    @contextmanager
    def entered(self) -> Iterator[None]:
        with open(f"/proc/{os.getpid()}/task/{_thread_id()}/ns/net") as home:
            _enter(self.path)
            try:
                yield
            finally:
                _set(home.fileno())


def network_of(pid: int) -> AbstractContextManager[None]:
    """The same as `entered`, with a process' network."""
    return Net(Path(f"/proc/{pid}/ns/net")).entered()


def _thread_id() -> int:
    return threading.get_native_id()


def _enter(path: Path) -> None:
    with path.open() as there:
        _set(there.fileno())


def _set(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _netns(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")
