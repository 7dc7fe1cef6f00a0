"""The real `snatd` as a process on a node of the lab, and what it says."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.lab.netns import Namespace, until

SNATD = str(Path(sys.executable).with_name("snatd"))


class Snatd:
    """`snatd run` on a host. Its log is JSON lines in a file; its notifications are received."""

    def __init__(self, host: Namespace, folder: Path, **settings: Any) -> None:
        self.host = host
        self.folder = folder
        self.program: tuple[str, ...] = (SNATD,)
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "snatd.toml"
        self.settings = {"state_dir": str(folder / "state"), "log_format": "json", **settings}
        self.write_config()
        self.log_path = folder / "log"
        self.notifications: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(folder / "notify"))

    def write_config(self, **settings: Any) -> None:
        """JSON's strings, numbers and lists are TOML's too."""
        self.settings |= settings
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.settings.items()]
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, **environment: str) -> Snatd:
        """Starts the daemon and waits for READY=1."""
        self.notifications.clear()
        extra = {"NOTIFY_SOCKET": str(self.folder / "notify"), **environment}
        with self.log_path.open("ab") as log:
            self._process = self.host.popen(
                *self.program,
                "run",
                "--config",
                str(self.config),
                stderr=log,
                env=self.host.environment(extra),
            )
        self.wait_for_notification("READY=1", within_s=30)
        return self

    def wait_for_notification(self, text: str, within_s: float = 30.0) -> None:
        def there() -> bool:
            while True:
                try:
                    self.notifications.append(self._notify.recv(65536).decode())
                except BlockingIOError:
                    break
            if self.process.poll() is not None:
                raise AssertionError(f"snatd ended: {self.log_path.read_text()}")
            return any(text in one for one in self.notifications)

        until(there, f"notification {text!r}", within_s)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another `snatd` command with the same configuration."""
        return subprocess.run(
            self.host.command(
                *self.program, arguments[0], "--config", str(self.config), *arguments[1:]
            ),
            env=self.host.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def json(self, *arguments: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.command(*arguments, "--json").stdout)
        return document

    def status(self) -> dict[str, Any]:
        """The status file, read directly: cheap enough to be polled."""
        return dict(json.loads(self.host.path("/run/snatd/status.json").read_text()))

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """What it logged so far, all events or those of one name."""
        # The last line may be half-written.
        whole = self.log_path.read_text().split("\n")[:-1]
        found = [json.loads(line) for line in whole]
        return [one for one in found if name in (None, one["event"])]

    def wait_for(self, name: str, count: int = 1, within_s: float = 30.0) -> list[dict[str, Any]]:
        until(lambda: len(self.events(name)) >= count, f"{count} x {name}", within_s)
        return self.events(name)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.process.wait(10)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._notify.close()

    def cpu_s(self) -> float:
        """CPU seconds of the process and of the children that it has waited for."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(int(field) for field in fields[11:15]) / 100

    def __enter__(self) -> Snatd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stopwatch_ms(since_s: float) -> float:
    return (time.monotonic() - since_s) * 1000
