"""Programs that write nat rules as fast as the kernel takes them: many transactions a process."""

from __future__ import annotations

import ctypes
import os
import pty
import re
import select
import subprocess
import time
import tty
from collections.abc import Sequence
from contextlib import suppress

from snatd.core.model import Backend, Family
from tests.lab.netns import Namespace

_LONGEST_S = 20.0


class Restore:
    """`iptables-restore --noflush` of one backend and family, which commits at each COMMIT.

    It echoes comments, so each transaction ends in one that tells that it is through. It ends at
    the first error, and the next transaction starts another.
    """

    def __init__(self, host: Namespace, backend: Backend, family: Family) -> None:
        self._host = host
        # Without a number: `-w 15` waits by alarm(15), and leaves that on when it has the lock
        # (1.8.9). So 15 s after its last transaction it ends, without a word.
        wait = ["-w"] if backend is Backend.LEGACY else []
        self._argv = [f"{family.command}-{backend.value}-restore", "--noflush", "-v", *wait]
        self._process: subprocess.Popen[bytes] | None = None
        self._output = -1
        self._number = 0

    def _start(self) -> subprocess.Popen[bytes]:
        # On a terminal each line of output comes at once.
        self._output, theirs = pty.openpty()
        tty.setraw(theirs)
        process = subprocess.Popen(
            self._host.command(*self._argv),
            stdin=subprocess.PIPE,
            stdout=theirs,
            stderr=theirs,
            env=self._host.environment(),
            bufsize=0,
        )
        os.close(theirs)
        self._process = process
        return process

    def commit(self, *lines: str) -> str:
        """One transaction. What the tool said where it failed, and then nothing was changed."""
        process = self._process or self._start()
        self._number += 1
        done = f"# done {self._number}\n"
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # why it ended, its output tells
            process.stdin.write("\n".join(("*nat", *lines, "COMMIT", done)).encode())
        said = ""
        end_s = time.monotonic() + _LONGEST_S
        while not said.endswith(done):
            ready, _, _ = select.select([self._output], [], [], max(0.0, end_s - time.monotonic()))
            assert ready, f"{self._argv} did not answer within {_LONGEST_S} s"
            try:
                said += os.read(self._output, 65536).decode(errors="replace")
            except OSError:
                # The other end of the terminal is gone, on a busy machine before the kernel passed
                # its last words on: no words are no success.
                self.close()
                return said or "it ended without a word"
        return ""

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            os.close(self._output)
            self._process = None


_STATELESS, _HANDLES, _ECHO = 1 << 2, 1 << 3, 1 << 5


class Nft:
    """nft as a library, in a host's network: what nftables' own program is made of."""

    def __init__(self, host: Namespace) -> None:
        library = ctypes.CDLL("libnftables.so.1")
        library.nft_ctx_new.restype = ctypes.c_void_p
        for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, name).restype = ctypes.c_char_p
        with host.entered():
            self._context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_output(self._context)
        library.nft_ctx_buffer_error(self._context)
        self._library = library
        self._flags(_HANDLES | _STATELESS)

    def _flags(self, flags: int) -> None:
        self._library.nft_ctx_output_set_flags(self._context, flags)

    def run(self, *commands: str) -> str:
        """One transaction. What nft said where it failed, and then nothing was changed."""
        script = "\n".join(commands).encode()
        if self._library.nft_run_cmd_from_buffer(self._context, script) == 0:
            return ""
        return self._said("error") or "failed"

    def show(self, *words: str) -> str:
        """What `nft -s -a list …` prints; empty where there is no such thing."""
        failed = self.run(f"list {' '.join(words)}")
        return "" if failed else self._said("output")

    def rules(self, nft_family: str, table: str, chain: str) -> list[tuple[str, int]]:
        """A chain's rules as printed, with their handles."""
        printed = self.show("chain", nft_family, table, chain)
        found = re.findall(r"^\t\t(.*) # handle (\d+)$", printed, re.MULTILINE)
        return [(text, int(handle)) for text, handle in found]

    def added(self, command: str) -> int | None:
        """The handle of a new rule; None where it could not be added."""
        self._flags(_HANDLES | _ECHO)
        failed = self.run(command)
        self._flags(_HANDLES | _STATELESS)
        found = None if failed else re.search(r"# handle (\d+)", self._said("output"))
        return int(found[1]) if found else None

    def _said(self, which: str) -> str:
        buffer = getattr(self._library, f"nft_ctx_get_{which}_buffer")(self._context)
        return str(buffer.decode(errors="replace"))

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)


def once(host: Namespace, tool: str, lines: Sequence[str]) -> str:
    """One transaction by a process of its own. What it said where it failed."""
    done = subprocess.run(
        host.command(*tool.split(" ")),
        input="\n".join((*lines, "")).encode(),
        env=host.environment(),
        capture_output=True,
        timeout=_LONGEST_S,
        check=False,
    )
    return "" if done.returncode == 0 else done.stderr.decode(errors="replace") or "failed"
