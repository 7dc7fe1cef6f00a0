"""Runs snatd again and again in forks of one process, and kills it at a system call of its choice.

`python -m tests.faults.stepper CONFIG` on a host. Each line of stdin is `daemon N`: kill snatd at
its N-th system call; or `tool N`: kill a tool that writes at its N-th, and let snatd go on. With -1
nobody is killed. A run ends with READY=1. Each answer is a line of JSON. Forked, snatd is ready
after 0.1 s and not after 0.5 s.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long

# linux/ptrace.h
_TRACEME, _CONTINUE, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 7, 24, 0x4200, 0x420E
_SYSGOOD, _FORK, _VFORK, _CLONE, _EXEC = 0x1, 0x2, 0x4, 0x8, 0x10
_EXITKILL = 0x100000
_EVENT_EXEC = 4
_CALL = signal.SIGTRAP | 0x80
_ENTRY = 1
_WALL = 0x40000000
# Of a syscall's info: op, then behind arch and two pointers its number and six arguments.
_INFO_BYTES, _NUMBER_AT = 88, 24

_MACHINE = os.uname().machine
_SETSOCKOPT = {"x86_64": 54, "aarch64": 208}[_MACHINE]
_SENDTO = {"x86_64": 44, "aarch64": 206}[_MACHINE]
# IPT_SO_SET_REPLACE and IP6T_SO_SET_REPLACE: what a legacy table is written by.
_REPLACES = {(socket.IPPROTO_IP, 64), (socket.IPPROTO_IPV6, 64)}


@dataclass
class Run:
    """One run: how many system calls snatd made and the tools that write, at which of snatd's own
    each write began, and how it ended."""

    calls: int = 0
    tool_calls: int = 0
    writes: list[int] = field(default_factory=list)
    ended: str = ""


class Stepper:
    def __init__(self, config: str) -> None:
        self._config = config
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._ear.bind(f"{config}.notify")
        os.environ["NOTIFY_SOCKET"] = f"{config}.notify"
        # What snatd imports in a pass, it has.
        import iptc  # noqa: F401

        import snatd.cli
        import snatd.daemon
        import snatd.kernel.conntrack
        import snatd.kernel.links
        import snatd.kernel.privilege  # noqa: F401

    def run(self, whom: str, number: int) -> Run:
        """Until READY=1, or until whoever is to be killed is dead."""
        while self._heard():
            pass
        snatd = os.fork()
        if snatd == 0:
            _child(self._config)
        os.waitpid(snatd, 0)
        follow = 0 if whom == "daemon" else _FORK | _VFORK | _CLONE | _EXEC
        _ptrace(_SETOPTIONS, snatd, _SYSGOOD | _EXITKILL | follow)
        run, tools, last = Run(), set[int](), 0
        _go_on(snatd, _SYSCALL)
        while True:
            pid, status = os.waitpid(-1, _WALL)
            if not os.WIFSTOPPED(status):
                tools.discard(pid)
                if pid == snatd:
                    run.ended = run.ended or f"by itself: {status}"
                    _reap()
                    return run
                continue
            stop, deliver = os.WSTOPSIG(status), 0
            if stop == _CALL and _is_entry(pid):
                call, level, option = _call(pid)
                if pid == snatd:
                    run.calls, last = run.calls + 1, call
                    if call == _SETSOCKOPT and (level, option) in _REPLACES:
                        run.writes.append(run.calls)
                else:
                    run.tool_calls += 1
                if number == (run.calls if whom == "daemon" else run.tool_calls):
                    os.kill(pid, signal.SIGKILL)
                    run.ended, number = "killed", -1
                    continue
            elif stop == _CALL:
                if pid == snatd and last == _SENDTO and self._is_ready():
                    run.ended = run.ended or "ready"
                    os.kill(snatd, signal.SIGKILL)
            elif stop == signal.SIGTRAP and status >> 16 == _EVENT_EXEC and _writes(pid):
                run.writes.append(run.calls)
                if whom == "tool":
                    tools.add(pid)
            elif stop not in (signal.SIGTRAP, signal.SIGSTOP):
                deliver = stop
            # Of the tools only those that write are followed call by call.
            _go_on(pid, _SYSCALL if pid == snatd or pid in tools else _CONTINUE, deliver)

    def _is_ready(self) -> bool:
        while message := self._heard():
            if "READY=1" in message:
                return True
        return False

    def _heard(self) -> str:
        try:
            return self._ear.recv(65536).decode()
        except BlockingIOError:
            return ""


def _child(config: str) -> None:
    """The daemon. Never returns."""
    try:
        _ptrace(_TRACEME, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        from snatd.cli import main

        os._exit(main(["run", "--config", config]))
    finally:
        os._exit(99)


def _ptrace(request: int, pid: int, data: int, address: int = 0) -> int:
    done = int(_libc.ptrace(request, pid, address, data))
    if done < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request}")
    return done


def _go_on(pid: int, how: int, deliver: int = 0) -> None:
    with suppress(ProcessLookupError):  # killed meanwhile
        _ptrace(how, pid, deliver)


def _info(pid: int) -> bytes:
    buffer = ctypes.create_string_buffer(_INFO_BYTES)
    _ptrace(_GET_SYSCALL_INFO, pid, ctypes.addressof(buffer), _INFO_BYTES)
    return buffer.raw


def _is_entry(pid: int) -> bool:
    return _info(pid)[0] == _ENTRY


def _call(pid: int) -> tuple[int, int, int]:
    """A system call at its entry: its number, its second and its third argument."""
    number, _, second, third = struct.unpack_from("=4Q", _info(pid), _NUMBER_AT)
    return number, second, third


def _writes(pid: int) -> bool:
    """Whether a tool is one that changes rules."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return words[0].endswith(b"-restore") or b"-f" in words[1:2]


def _reap() -> None:
    """Waits until the tools of a killed snatd have ended as well."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, _WALL)
            if os.WIFSTOPPED(status):
                _go_on(pid, _CONTINUE)


def main(config: str) -> None:
    # Orphans become ours, and are waited for.
    _libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    stepper = Stepper(config)
    print("{}", flush=True)
    for line in sys.stdin:
        whom, number = line.split()
        answer: dict[str, Any] = vars(stepper.run(whom, int(number)))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
