"""Rows 23 to 25 and 27: the process itself, its clock, and what the kernel denies it."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.faults.conftest import Start
from tests.faults.test_events import injected
from tests.faults.test_lease import sparse
from tests.faults.test_rules import settled
from tests.faults.watching import longest_silence_s
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import SNATD, Snatd


def test_fault_23_four_starts_at_once(node: Node, tmp_path: Path) -> None:
    """One runs, and each other one says which."""
    settings = tmp_path / "snatd.toml"
    settings.write_text(f'state_dir = "{tmp_path}"\n')
    argv = (SNATD, "run", "--config", str(settings))
    daemons = [node.host.popen(*argv, stderr=subprocess.PIPE) for _ in range(4)]
    try:
        until(lambda: sum(one.poll() is None for one in daemons) == 1, "one that stays", 30)
        (winner,) = (one for one in daemons if one.poll() is None)
        for one in daemons:
            if one is not winner:
                said = one.communicate()[1].decode()
                assert f"already running as pid {winner.pid} " in said
                assert one.returncode == 1
        until(lambda: rules(node) == [NARROW], "its work")
    finally:
        for one in daemons:
            one.kill()
            one.wait()


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a directory": (Path.mkdir, "not a regular file"),
    "a gigabyte": (sparse, "larger than"),
    "a symlink loop": (lambda path: path.symlink_to(path), "Too many levels"),
    "nothing": (lambda _: None, "no such file"),
    "a bad escape": (lambda path: path.write_text('mode = "\\x1b[2J"\n'), "not TOML"),
    "not UTF-8": (lambda path: path.write_bytes(b"mode = '\xff'\n"), "not UTF-8"),
    "a forged line": (lambda path: path.write_text('"a\\nMAINPID=1" = 1\n'), "unknown key"),
}


def test_fault_24_a_configuration_that_is_none(nft_lab: Lab, node: Node, start: Start) -> None:
    """The old one stays in force, STATUS says why, and no reload blocks."""
    snatd = start(node, {"WATCHDOG_USEC": "4000000"}, networks=["10.99.0.0/16"])
    settled(snatd)
    good = snatd.config.read_text()
    for number, (name, (make, says)) in enumerate(NO_FILES.items(), 1):
        snatd.config.unlink()
        make(snatd.config)
        snatd.notifications.clear()
        snatd.signal(signal.SIGHUP)
        snatd.wait_for("configuration_refused", number)
        # What is heard before it may be of the file before.
        snatd.wait_for_notification(says)
        status = [one for one in snatd.notifications if says in one][-1]
        assert "STATUS=new configuration refused at " in status, name
        assert status.isprintable(), name
        until(lambda: says in str(snatd.status()["configuration_refused"]), name)  # noqa: B023
        node.host.run("nft", "delete", "table", "ip", "snatd")
        until(lambda: "10.99.0.0/16" in guard(node), f"the old one in force: {name}")
        if snatd.config.is_dir() and not snatd.config.is_symlink():
            snatd.config.rmdir()
        snatd.config.unlink(missing_ok=True)
        snatd.config.write_text(good)
    snatd.signal(signal.SIGHUP)
    snatd.wait_for("configuration_loaded")
    until(lambda: snatd.status()["configuration_refused"] is None, "the good one")
    promises_hold(nft_lab)


def guard(node: Node) -> str:
    return node.host.run("nft", "list", "table", "ip", "snatd", check=False)


# The wall clock of a process, off by the seconds in a file. libfaketime 0.9.10 breaks sleeping.
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(clock, now);
    FILE *file = clock == CLOCK_REALTIME ? fopen(getenv("CLOCK_OFF_BY"), "r") : NULL;
    long seconds;
    if (file != NULL) {
        if (fscanf(file, "%ld", &seconds) == 1)
            now->tv_sec += seconds;
        fclose(file);
    }
    return done;
}
"""


def test_fault_25_the_clock_jumps_by_a_day(
    nft_lab: Lab, node: Node, start: Start, tmp_path: Path
) -> None:
    library, clock = tmp_path / "clock.so", tmp_path / "clock"
    argv = ("gcc", "-shared", "-fPIC", "-x", "c", "-", "-ldl", "-o", str(library))
    subprocess.run(argv, input=CLOCK, text=True, check=True)
    clock.write_text("0")
    environment = {"LD_PRELOAD": str(library), "CLOCK_OFF_BY": str(clock)}
    snatd = start(node, environment | {"WATCHDOG_USEC": "2000000"}, resync=1)
    settled(snatd)
    told = len(snatd.events())
    for off_by_s in (86400, -86400):
        (tmp_path / "new").write_text(str(off_by_s))
        (tmp_path / "new").rename(clock)
        passes, began_s = snatd.status()["passes"], time.monotonic()
        assert longest_silence_s(snatd, 1.5) < 1.5
        assert 0 < snatd.status()["passes"] - passes <= time.monotonic() - began_s + 1
        written_s = datetime.fromisoformat(snatd.status()["written_at"]).timestamp()
        assert abs(written_s - time.time() - off_by_s) < 60, "the fault was none"
    assert len(snatd.events()) == told
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair", 2)
    promises_hold(nft_lab)


@contextmanager
def limited(snatd: Snatd, what: int, soft: int) -> Iterator[None]:
    """A lower limit for a running daemon, for a while."""
    before = resource.prlimit(snatd.pid, what)
    resource.prlimit(snatd.pid, what, (soft, before[1]))
    try:
        yield
    finally:
        resource.prlimit(snatd.pid, what, before)


def survives(snatd: Snatd, node: Node) -> None:
    """What a daemon does as soon as the kernel gives it again what it needs."""
    assert snatd.process.poll() is None, snatd.log_path.read_text()
    word = node.host.path("/run/snatd/status.json")  # there is none while it cannot be written

    def in_sync() -> bool:
        return word.exists() and snatd.status()["in_sync"] and rules(node) == [NARROW]

    until(in_sync, "the recovery", 40)
    assert snatd.process.poll() is None, snatd.log_path.read_text()


@pytest.mark.parametrize("warm", [True, False])
def test_fault_27_no_file_descriptors(nft_lab: Lab, node: Node, start: Start, warm: bool) -> None:
    """Warm: it has done all that it does at least once. Else what it imports later is missing."""
    snatd = start(node, {"WATCHDOG_USEC": "4000000"}, resync=1)
    if warm:
        settled(snatd)
        until(lambda: snatd.status()["suspects"], "the first look at the connections")
    with limited(snatd, resource.RLIMIT_NOFILE, 3):
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        assert longest_silence_s(snatd, 3) < 3
        promises_hold(nft_lab)
        assert snatd.process.poll() is None, snatd.log_path.read_text()
    survives(snatd, node)
    promises_hold(nft_lab)


def test_fault_27_no_processes(nft_lab: Lab, node: Node, start: Start, tmp_path: Path) -> None:
    snatd = start(node, {"WATCHDOG_USEC": "4000000"}, resync=1)
    settled(snatd)
    forks = "fork,vfork,clone,clone3"
    with injected(snatd, f"{forks}:error=EAGAIN", tmp_path):
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: snatd.status()["state"] == "degraded", "it told")
        assert "cannot be started now" in snatd.status()["headline"]
        assert longest_silence_s(snatd, 3) < 3
        promises_hold(nft_lab)
    survives(snatd, node)
    promises_hold(nft_lab)


@pytest.mark.parametrize("spare_kib", [0, 64, 1024, 8192])
def test_fault_27_no_memory(nft_lab: Lab, node: Node, start: Start, spare_kib: int) -> None:
    """The address space of the daemon may not grow (nor that of its children be as large)."""
    snatd = start(node, {"WATCHDOG_USEC": "4000000"}, resync=1)
    settled(snatd)
    pages = int(Path(f"/proc/{snatd.pid}/statm").read_text().split()[0])
    with limited(snatd, resource.RLIMIT_AS, pages * resource.getpagesize() + (spare_kib << 10)):
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        assert longest_silence_s(snatd, 3) < 3
        promises_hold(nft_lab)
    survives(snatd, node)
    promises_hold(nft_lab)
