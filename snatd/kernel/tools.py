"""Runs the node's own command line tools: with a deadline, without a shell, output apart.

Does not know what any tool prints.
"""

from __future__ import annotations

import math
import os
import select
import selectors
import shutil
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendBusy, BackendFailed, GaveWay

# A service's PATH has these; an operator's `su` on Debian may not.
SEARCH_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

_LONGEST_DYING_S = 1.0
_MOST_UNDYING = 4
# nft's JSON of 50,000 rules is 15 MB.
_LARGEST_OUTPUT_BYTES = 64 << 20
# Nothing waits longer than this for a call that gives way; most take 3 ms.
_UNDISTURBED_S = 0.02


@dataclass
class Tools:
    """Starts children and remembers their pids, so that our own writes are known as ours."""

    own_pids: deque[int] = field(default_factory=lambda: deque(maxlen=512))
    gives_way_to: int | None = None
    """A descriptor: if there is something to read, `run` ends a child that takes longer than most
    do, and raises GaveWay."""
    _undying: ClassVar[list[subprocess.Popen[bytes]]] = []
    """Killed, and still there: a process ends only when what it waits for in the kernel is over."""

    def find(self, name: str) -> str | None:
        """The absolute path of a tool: by PATH first, then where distributions put it."""
        return shutil.which(name) or shutil.which(name, path=SEARCH_PATH)

    def run(
        self,
        argv: Sequence[str],
        deadline: Deadline,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> str:
        """What a tool printed. Blocks up to the deadline, then kills its whole process group.

        Raises BackendBusy on a time-out, on exit 4 (iptables: another holds the lock) and where no
        process could be made; BackendFailed on any other exit but 0, when the output is thrown away
        since it may be cut (iptables prints half a list before it fails on an unknown extension),
        and on output without an end; GaveWay, where `gives_way_to` says when.
        """
        limit_s = deadline.remaining_s(time.monotonic())
        child = self.start(argv, stdin=bool(stdin), environment=environment)
        try:
            if meanwhile is not None:
                meanwhile()
            out, err = _talk(child, os.fsencode(stdin), limit_s, self.gives_way_to)
        except subprocess.TimeoutExpired:
            what = " ".join(argv)
            raise BackendBusy(f"`{what}` did not answer within {limit_s:.1f} s") from None
        except OverflowError:
            what, size = " ".join(argv), _LARGEST_OUTPUT_BYTES >> 20
            raise BackendFailed(f"`{what}` printed more than {size} MiB: not believed") from None
        finally:
            self.end(child)
        check_exit(argv, child.returncode, err)
        return os.fsdecode(out)

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """A running child, to be read by the caller and given to `end`, whatever comes.

        Raises BackendFailed where it is not installed, BackendBusy where no process can be made, or
        too many that were killed have not ended.
        """
        self._undying[:] = [one for one in self._undying if one.poll() is None]
        if len(self._undying) >= _MOST_UNDYING:
            pids = " ".join(str(one.pid) for one in self._undying)
            raise BackendBusy(f"{argv[0]} is not started: pids {pids} were killed and do not end")
        path = self.find(argv[0])
        if path is None:
            raise BackendFailed(f"{argv[0]} is not installed, or not in PATH or {SEARCH_PATH}")
        try:
            child = subprocess.Popen(
                [path, *argv[1:]],
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={"PATH": SEARCH_PATH, **os.environ, "LC_ALL": "C", **(environment or {})},
                start_new_session=True,
            )
        except (OSError, MemoryError) as error:
            why = getattr(error, "strerror", None) or "no memory"
            if isinstance(error, PermissionError | FileNotFoundError):
                raise BackendFailed(f"{path} cannot be run: {why}") from None
            raise BackendBusy(f"{path} cannot be started now: {why}") from None
        self.own_pids.append(child.pid)
        return child

    @staticmethod
    def end(child: subprocess.Popen[bytes]) -> None:
        """Kills the child's process group if its end was not seen yet, and closes what led to it.

        Waits at most a second: one that hangs in the kernel is asked for again by the next start.
        """
        # As long as nobody has asked for its end, no other process or group has its number.
        if child.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            try:
                child.wait(_LONGEST_DYING_S)
            except subprocess.TimeoutExpired:
                Tools._undying.append(child)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def _talk(
    child: subprocess.Popen[bytes], stdin: bytes, limit_s: float, gives_way_to: int | None
) -> tuple[bytes, bytes]:
    """Popen.communicate, which would take all of an output that never ends into memory."""
    began_s = time.monotonic()
    end_s = began_s + limit_s
    listens_s = math.inf if gives_way_to is None else began_s + _UNDISTURBED_S
    assert child.stdout is not None
    assert child.stderr is not None
    said = {child.stdout.fileno(): bytearray(), child.stderr.fileno(): bytearray()}
    unsaid = memoryview(stdin)
    # Unlike epoll's it needs no descriptor of its own.
    with selectors.PollSelector() as pipes:
        for descriptor in said:
            pipes.register(descriptor, selectors.EVENT_READ)
        if child.stdin is not None:
            pipes.register(child.stdin, selectors.EVENT_WRITE)
        while set(pipes.get_map()) - {gives_way_to}:
            now_s = time.monotonic()
            if gives_way_to is not None and now_s >= listens_s:
                pipes.register(gives_way_to, selectors.EVENT_READ)
                listens_s = math.inf
            ready = pipes.select(max(0.0, min(end_s, listens_s) - now_s))
            if time.monotonic() >= end_s:
                raise subprocess.TimeoutExpired(child.args, limit_s)
            if any(key.fd == gives_way_to for key, _ in ready):
                raise GaveWay("something else is to be read")
            for key, _ in ready:
                if key.fd in said:
                    if not _read_some(key.fd, said[key.fd]):
                        pipes.unregister(key.fd)
                    continue
                unsaid = _write_some(key.fd, unsaid)
                if not unsaid and child.stdin is not None:
                    pipes.unregister(child.stdin)
                    child.stdin.close()
    _hear_of_end(child, max(0.0, end_s - time.monotonic()))
    child.wait(max(0.0, end_s - time.monotonic()))
    out, err = said.values()
    return bytes(out), bytes(err)


def _hear_of_end(child: subprocess.Popen[bytes], limit_s: float) -> None:
    """Before 3.15 Popen.wait looks every 0.5 ms and longer whether it has come: 0.7 ms lost with
    each tool. A pidfd tells at once."""
    with suppress(OSError):  # no descriptor left: then as Python does it
        descriptor = os.pidfd_open(child.pid)
        try:
            end = select.poll()
            end.register(descriptor, select.POLLIN)
            end.poll(limit_s * 1000)
        finally:
            os.close(descriptor)


def _read_some(descriptor: int, into: bytearray) -> bool:
    """False at the end. Raises OverflowError where there seems to be none."""
    chunk = os.read(descriptor, 1 << 16)
    into += chunk
    if len(into) > _LARGEST_OUTPUT_BYTES:
        into.clear()  # a traceback may hold it for long
        raise OverflowError
    return bool(chunk)


def _write_some(descriptor: int, data: memoryview) -> memoryview:
    """What is left to write; nothing where nobody reads it any more."""
    try:
        # A pipe that polls writable takes as much without blocking.
        return data[os.write(descriptor, data[: select.PIPE_BUF]) :]
    except BrokenPipeError:
        return data[:0]


def check_exit(argv: Sequence[str], returncode: int, err: bytes) -> None:
    """Raises what another exit status than 0 means: BackendBusy for 4, BackendFailed else."""
    if returncode == 0:
        return
    what = " ".join(argv)
    # nft underlines what it means with a line of ^, which means nothing in one line, and what
    # iptables warns of (`# Warning: iptables-legacy tables present`) would hide what it means.
    lines = err.decode(errors="replace").splitlines()
    words = " ".join(line for line in lines if not line.startswith("# Warning")).split()
    said = " ".join(word for word in words if word.strip("^")) or "no message"
    if returncode == 4:
        raise BackendBusy(f"`{what}`: {said}")
    raise BackendFailed(f"`{what}` failed ({_exit(returncode)}): {said}")


def _exit(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit {returncode}"
