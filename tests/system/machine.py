"""A machine: a real systemd, booted by systemd-nspawn on an overlay of a tree.

Its processes are in control groups of its own, and a reaper that outlives a crashed test run kills
what is in them. Its mounts are in the test run's own mount namespace and go with that. Its network
is its own; one veth leads into a namespace of the lab.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.lab.groups import INTO_GROUPS, make_groups, start_reaper
from tests.lab.mounts import overlay
from tests.lab.netns import Namespace, until

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NSPAWN = Path("/run/systemd/nspawn")
_numbers = itertools.count(1)

_REBOOT = 133


class Machine:
    """Boots on `lower`; `wire` is where the other end of its eth0 is, under that name too."""

    def __init__(self, lower: Sequence[Path], folder: Path, wire: Namespace) -> None:
        self.name = f"snatd-test-{os.getpid()}-{next(_numbers)}"
        self.folder = folder
        self.wire = wire
        self.root = overlay(lower, folder)
        # Else a host name lookup of sudo and friends waits, and the journal is lost at a power cut.
        (self.root / "var/log/journal").mkdir(parents=True, exist_ok=True)
        self.groups = make_groups(self.name)
        self._reaper = start_reaper(self.groups)
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._console = folder / "console"
        self.pid = 0

    def start(self) -> Machine:
        """Boots, and returns when the kernel's part is done and systemd begins; see `boot`."""
        notify = self.folder / "notify"
        notify.unlink(missing_ok=True)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
            self._console.open("ab") as console,
        ):
            ear.bind(str(notify))
            ear.settimeout(0.1)
            self._nspawn = subprocess.Popen(
                ["sh", "-euc", INTO_GROUPS, "sh", *map(str, self.groups), "--", *self._command()],
                env={"PATH": _PATH, "NOTIFY_SOCKET": str(notify), **_environment()},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
            self._ear = ear.dup()
        until(lambda: self._heard("X_NSPAWN_LEADER_PID="), f"{self.name}: a leader", 30)
        return self

    def boot(self) -> Machine:
        """Boots, and waits until systemd has started all that it wants."""
        self.start()
        self.wait_until_up()
        return self

    def wait_until_up(self) -> None:
        until(lambda: self._heard("READY=1"), f"{self.name}: READY", 60)
        self._ear.close()

    def _command(self) -> list[str]:
        return [
            *("nsenter", "-t", str(self.wire.pid), "-n", "--"),
            *("systemd-nspawn", "--quiet", "--boot", "-D", str(self.root), "-M", self.name),
            *("--register=no", "--keep-unit", "--private-network", "--console=pipe"),
            *("--notify-ready=yes", "--resolv-conf=off", "--timezone=off"),
            "--network-veth-extra=wire:eth0",
        ]

    def _heard(self, text: str) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"{self.name} did not boot: {self._console.read_text()[-3000:]}")
        try:
            said = self._ear.recv(4096).decode()
        except TimeoutError:
            return False
        for line in said.splitlines():
            if line.startswith("X_NSPAWN_LEADER_PID="):
                self.pid = int(line.partition("=")[2])
        return text in said

    def command(self, *argv: str) -> list[str]:
        environment = (
            "env",
            "-i",
            f"PATH={_PATH}",
            "LC_ALL=C.UTF-8",
            "DEBIAN_FRONTEND=noninteractive",
        )
        return ["nsenter", "-t", str(self.pid), "-a", "--", *environment, *argv]

    def try_to(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs a command as root; output and errors together in `stdout`."""
        return subprocess.run(
            self.command(*argv),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    def run(self, *argv: str, stdin: str | None = None) -> str:
        done = self.try_to(*argv, stdin=stdin)
        assert done.returncode == 0, f"`{' '.join(argv)}`: exit {done.returncode}: {done.stdout}"
        return done.stdout

    def shell(self, script: str) -> str:
        return self.run("sh", "-euc", script)

    def popen(self, *argv: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *self.command(*argv)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def path(self, path: str) -> Path:
        """A file of the machine, seen from outside while it runs (its /run too)."""
        return Path(f"/proc/{self.pid}/root{path}")

    def copy(self, *files: Path) -> list[str]:
        """Puts files into its /root, and returns their names there."""
        for file in files:
            shutil.copy(file, self.path("/root"))
        return [f"/root/{file.name}" for file in files]

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", name, unit).strip()

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries, oldest first. With matches that nothing fits, empty."""
        done = self.try_to("journalctl", "--no-pager", "-q", "-o", "json", *matches)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def event(self, name: str, within_s: float = 10.0) -> dict[str, Any]:
        """The newest entry of one kind, waited for."""
        found = until(
            lambda: self.journal("-b", f"SNATD_EVENT={name}"), f"{name} in the journal", within_s
        )
        return dict(found[-1])

    def reboot(self) -> None:
        """`systemctl reboot`, and on until it begins again; see `wait_until_up`."""
        self.try_to("systemctl", "reboot")
        assert self._ended() == _REBOOT, self._console.read_text()[-3000:]
        self.start()

    def power_cut(self) -> None:
        """Everything dies at once; then it begins again."""
        os.kill(self.pid, signal.SIGKILL)
        self._ended()
        self.start()

    def power_off(self) -> None:
        self.try_to("systemctl", "poweroff")
        assert self._ended() == 0, self._console.read_text()[-3000:]

    def _ended(self) -> int:
        assert self._nspawn is not None
        return self._nspawn.wait(60)

    def close(self) -> None:
        """Ends it at once, whatever it does, and leaves nothing."""
        assert self._reaper.stdin is not None
        self._reaper.stdin.close()
        self._reaper.wait(30)
        if self._nspawn is not None:
            with suppress(ProcessLookupError):
                self._nspawn.kill()
            self._nspawn.wait(10)
        # What systemd-nspawn leaves where it is killed.
        root = os.stat(self.root)
        with suppress(FileNotFoundError):
            (_NSPAWN / "propagate" / self.name).rmdir()
        (_NSPAWN / "locks" / f"inode-{root.st_dev}:{root.st_ino}").unlink(missing_ok=True)
        subprocess.run(["umount", "--lazy", str(self.root)], check=False, capture_output=True)


def _environment() -> dict[str, str]:
    # Pure cgroup v2, as on a real Debian 12, also where the host mixes the versions.
    return {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1", "LC_ALL": "C"}
