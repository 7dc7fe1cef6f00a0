"""Children: all of what they print or an error, in bounded time and memory."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendBusy, BackendFailed, GaveWay
from snatd.kernel.tools import Tools
from tests.lab.netns import until


def run(script: str, stdin: str = "", within_s: float = 10.0) -> str:
    return Tools().run(["sh", "-c", script], Deadline(time.monotonic() + within_s), stdin)


def test_more_than_a_pipe_holds_in_both_directions_at_once() -> None:
    rules = "-A POSTROUTING -s 192.0.2.1/32 -j RETURN\n" * 50_000
    assert run("tee /dev/stderr", rules) == rules


def test_bytes_that_are_no_text_come_through() -> None:
    assert run(r"printf '\377\0x'") == "\udcff\0x"


def test_who_reads_nothing_is_judged_by_how_it_ends() -> None:
    rules = "x" * 10**6
    assert run("exec <&-; sleep 0.1; echo done", rules) == "done\n"
    with pytest.raises(BackendFailed, match=r"failed \(exit 3\): why"):
        run("exec <&-; echo why >&2; exit 3", rules)


def test_what_iptables_warns_of_does_not_hide_what_it_means() -> None:
    with pytest.raises(BackendFailed, match=r"failed \(exit 1\): what it means$"):
        run("echo '# Warning: iptables-legacy tables present' >&2; echo what it means >&2; exit 1")


@pytest.mark.parametrize(
    "script",
    [
        "exec sleep 60",
        "exec >&- 2>&-; exec sleep 60",  # its pipes are closed, and it is still there
        "sleep 60 & echo whole",  # it has ended, and somebody else has its pipes
    ],
)
def test_who_does_not_end_is_ended(script: str, tmp_path: Path) -> None:
    """With all that it started."""
    began_s = time.monotonic()
    with pytest.raises(BackendBusy, match="did not answer within"):
        run(f"echo $$ >{tmp_path}/group; {script}", "x" * 10**6, within_s=0.5)
    assert time.monotonic() - began_s < 5
    group = int((tmp_path / "group").read_text())
    until(lambda: not alive(group), "an end of the group")


def test_what_gives_way_is_ended_when_there_is_something_to_read() -> None:
    reader, writer = os.pipe()
    tools = Tools(gives_way_to=reader)
    deadline = Deadline(time.monotonic() + 30)
    assert tools.run(["echo", "whole"], deadline) == "whole\n", "nothing is to be read"
    os.write(writer, b"x")
    with pytest.raises(GaveWay):
        tools.run(["sleep", "60"], deadline)
    assert deadline.at_s - time.monotonic() > 20
    assert not alive(tools.own_pids[-1])
    os.close(reader)
    os.close(writer)


def alive(group: int) -> bool:
    """A killed orphan is a zombie until whoever adopts it asks for it."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_output_without_an_end_is_an_error(stream: str) -> None:
    with pytest.raises(BackendFailed, match="printed more than 64 MiB"):
        run(f"exec cat /dev/zero {stream}", within_s=30)
