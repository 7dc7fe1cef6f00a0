"""`apply --confirm` waits here for a key or for `snatd confirm`; silence means no."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snatd.core.errors import NotPermitted
from snatd.host.files import make_directory


def _path(runtime_dir: Path) -> Path:
    return runtime_dir / "confirm.sock"


class Confirmation:
    """Opened before anything is changed, so that a path that cannot be used is known in time, and
    so that a hang-up in the middle of the change does not end the process with half of it done."""

    def __init__(self, runtime_dir: Path) -> None:
        self._path = _path(runtime_dir)
        make_directory(runtime_dir)
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(1)
        self._ended, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def wait(self, seconds: float) -> bool:
        """Whether somebody confirmed in time. A hang-up or any other end counts as no, at once."""
        with suppress(OSError):
            print(
                f"press a key, or `snatd confirm` elsewhere, within {seconds:g} s", file=sys.stderr
            )
        end_s = time.monotonic() + seconds
        sources: list[int | socket.socket] = [self._ended, self._socket]
        # Only a person at a terminal presses keys: a pipe's content is meant for somebody else, and
        # a descriptor 0 that was closed is another file by now.
        if os.isatty(0):
            sources.append(0)
        with _single_keys():
            while (left_s := end_s - time.monotonic()) > 0:
                ready = select.select(sources, (), (), left_s)[0]
                if self._ended in ready:
                    return False
                if self._socket in ready:
                    with self._socket.accept()[0] as peer, suppress(OSError):
                        peer.sendall(b"ok")
                    return True
                if 0 in ready:
                    return _key()  # none: the terminal is gone
        return False

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


def confirm(runtime_dir: Path) -> bool:
    """Tells a waiting `apply --confirm` that all is well; False where none waits.

    Raises NotPermitted where one waits for somebody else.
    """
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.settimeout(5.0)
        try:
            waiting.connect(str(_path(runtime_dir)))
            return waiting.recv(2) == b"ok"
        except PermissionError:
            raise NotPermitted("only root may confirm: run it by sudo") from None
        except OSError:
            return False


def decline(pid: str) -> bool:
    """Tells the `apply --confirm` that is this process no, and that it shall put everything back
    at once; False where the process is something else."""
    if not waits(pid):
        return False
    try:
        os.kill(int(pid), signal.SIGTERM)
    except OSError:
        return False
    return True


def waits(pid: str) -> bool:
    """Whether this process is an `apply --confirm`."""
    try:
        return b"--confirm" in Path(f"/proc/{int(pid)}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False


def _key() -> bool:
    try:
        return bool(os.read(0, 1))
    except OSError:
        return False


@contextmanager
def _single_keys() -> Iterator[None]:
    """A key counts without Enter; signals keep their keys."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty.setcbreak(0)
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, before)
