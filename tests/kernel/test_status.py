"""`snatd status` of the real daemon: what it did and by whose doing, and whether it lives."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snatd.core.word import Life
from snatd.host.status import StatusFile, path_in
from tests.kernel.test_packets import NARROW, add, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import SNATD, Snatd
from tests.unit.test_documents import documented_keys, keys


@pytest.fixture
def node(nft_lab: Lab) -> Node:
    nft_lab.nodes[0].write_lease()
    return nft_lab.nodes[0]


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        yield snatd
    assert "Traceback" not in snatd.log_path.read_text()


def row(shown: str, label: str) -> str:
    """What stands behind a label, and all that goes on with it."""
    lines = shown.splitlines()
    (first,) = [number for number, line in enumerate(lines) if line.startswith(f"{label}  ")]
    rest = []
    for line in lines[first + 1 :]:
        if not line.startswith("  "):
            break
        rest.append(line.strip())
    return "\n".join([lines[first].removeprefix(label).strip(), *rest])


def word(node: Node) -> Life:
    """As `snatd status` judges it; in this process, so it may be asked often."""
    return StatusFile(node.host.path("/run/snatd")).word().life


def test_who_did_it_what_and_when(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd.start()
    # iptables by another name, which waits for more to restore and so is there to be looked at.
    rule = " ".join(node.broad_rule)
    script = (
        "ln -s /usr/sbin/xtables-nft-multi /run/dockerd; mkfifo /run/rules; exec 3<>/run/rules; "
        f"printf '*nat\\n-I POSTROUTING {rule}\\nCOMMIT\\n' >&3; "
        "exec -a iptables-restore /run/dockerd --noflush <&3"
    )
    rival = node.host.popen("bash", "-euc", script)
    snatd.wait_for("rule_narrowed", 2)
    rival.kill()
    rival.wait()
    until(lambda: snatd.status()["repairs"] == 3, "the repair in the status file")
    shown = snatd.command("status")
    assert shown.returncode == 0
    last, *_ = snatd.status()["recent_repairs"]
    assert shown.stdout.startswith(
        f"in sync since {last['at'][11:19]} UTC \u00b7 172.7.21.0/24 keeps its address "
        "towards the rest of 172.7.0.0/16\n"
    )
    count, told, removed, *earlier = row(shown.stdout, "repairs").splitlines()
    assert count.startswith("3, last ")
    (writer,) = last["writers"]
    assert writer["comm"] == "dockerd"
    assert writer["of"], "its unit, or its parent"
    by = f"by dockerd (pid {writer['pid']}) of {writer['of']}"
    assert told == f"{last['at'][11:19]}  rule_narrowed  ipv4 nft    {by}"
    assert removed == f"- -A POSTROUTING {rule}"
    assert [line.split("  ", 1)[1].strip() for line in earlier] == [
        "rule_narrowed  ipv4 nft    because of start",
        "guard_written  ipv4 guard  because of start",
    ]
    assert row(shown.stdout, "ipv4 nft") == f"1 rule in POSTROUTING\n-A POSTROUTING {NARROW}"
    assert by in row(shown.stdout, "events")
    assert row(shown.stdout, "fights") == "none"


def test_a_daemon_that_was_stopped_by_a_signal_does_not_answer(node: Node, snatd: Snatd) -> None:
    snatd.start()
    snatd.signal(signal.SIGSTOP)
    until(lambda: word(node) is Life.STOPPED, "the stop")
    shown = snatd.command("status")
    assert shown.returncode == 4
    assert shown.stdout.startswith("not answering: last word ")
    assert f", pid {snatd.pid} \u00b7 its process was stopped by a signal" in shown.stdout
    assert row(shown.stdout, "it said").startswith("in sync since")
    assert row(shown.stdout, "to do") == f"`kill -CONT {snatd.pid}` lets it go on"
    found = snatd.json("status")
    assert (found["running"], found["stale"]) == (True, True)
    assert "in_sync" not in found
    assert found["last_word"]["in_sync"] is True
    snatd.signal(signal.SIGCONT)
    until(lambda: word(node) is Life.ANSWERS, "its going on")
    assert snatd.command("status").returncode == 0


_PTRACE_SEIZE, _PTRACE_INTERRUPT, _PTRACE_DETACH = 0x4206, 0x4207, 17


@contextmanager
def stuck(pid: int) -> Iterator[None]:
    """A process that does nothing any more, though no signal stopped it: its main thread is held
    by a tracer. The kernel lets it go when this process ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ptrace(request: int) -> None:
        if libc.ptrace(request, pid, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")

    ptrace(_PTRACE_SEIZE)
    ptrace(_PTRACE_INTERRUPT)
    os.waitpid(pid, 0)
    try:
        yield
    finally:
        ptrace(_PTRACE_DETACH)


def test_a_daemon_that_hangs_is_found_by_its_age(node: Node, snatd: Snatd) -> None:
    assert snatd.start().status()["longest_silence_s"] == 90, "resync, a pass, 10 s to spare"
    snatd.stop()
    snatd.write_config(resync=1)
    snatd.start(WATCHDOG_USEC="2000000")
    limit_s = snatd.status()["longest_silence_s"]
    assert limit_s == pytest.approx(11.8), "a pass takes no more than its share of the watchdog"
    with stuck(snatd.pid):
        until(lambda: word(node) is not Life.ANSWERS, "its silence", within_s=limit_s + 10)
        shown = snatd.command("status")
        assert shown.returncode == 4
        assert shown.stdout.startswith("not answering: last word 1")
        assert f" s ago, pid {snatd.pid} \u00b7 " in shown.stdout
        assert "it is stuck, or cannot write its status file" in shown.stdout
        age_s = snatd.json("status")["age_s"]
        assert limit_s < age_s < limit_s + 10
    until(lambda: word(node) is Life.ANSWERS, "its going on")
    assert snatd.command("status").returncode == 0


def test_a_busy_daemon_is_not_said_to_hang(node: Node, tmp_path: Path) -> None:
    """Every tool hangs, so a pass takes as long as it may."""
    shims = tmp_path / "bin"
    shims.mkdir()
    node.host.use_iptables(shims)
    lives: set[Life] = set()
    with Snatd(node.host, tmp_path / "snatd", resync=1) as snatd:
        snatd.start()
        for name in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy", "nft"):
            (shims / name).write_text("#!/bin/sh\nexec sleep 600\n")
            (shims / name).chmod(0o755)

        def it_has_said_so() -> bool:
            lives.add(word(node))
            return bool(snatd.status()["state"] == "degraded")

        until(it_has_said_so, "the end of the pass", within_s=40)
        # Three tools, 2 to 3 s each: IPv6 has no table, so nothing is asked of that.
        assert snatd.status()["last_pass"]["duration_ms"] > 6_000
    assert lives == {Life.ANSWERS}


@pytest.mark.usefixtures("node")
def test_a_daemon_that_was_killed(snatd: Snatd) -> None:
    snatd.start()
    said = snatd.status()
    snatd.process.kill()
    snatd.process.wait()
    shown = snatd.command("status")
    assert shown.returncode == 3
    head, last, it_said, *_ = shown.stdout.splitlines()
    assert head.startswith("not running: last word ")
    assert head.endswith(f", pid {snatd.pid} \u00b7 it was killed, or it crashed")
    assert last.endswith(f"{said['written_at'][:19].replace('T', ' ')} UTC")
    assert it_said.endswith(" \u00b7 ".join(said["told"]))
    assert "`systemctl start snatd`" in row(shown.stdout, "to do")
    found = snatd.json("status")
    assert (found["running"], found["stale"]) == (False, True)
    assert found["last_word"] == said
    snatd.start()
    assert snatd.command("status").returncode == 0


def test_a_daemon_that_was_stopped_in_order(node: Node, snatd: Snatd) -> None:
    snatd.start()
    assert snatd.stop() == 0
    shown = snatd.command("status")
    assert shown.returncode == 3
    assert shown.stdout.startswith("not running: there is no /run/snatd/status.json")
    assert "`systemctl start snatd`" in shown.stdout
    assert rules(node) == [NARROW]


def test_a_daemon_that_has_not_said_anything_yet(node: Node, tmp_path: Path) -> None:
    """Its first pass waits for a tool that hangs."""
    shims = tmp_path / "bin"
    shims.mkdir()
    (shims / "iptables-nft").write_text(f"#!/bin/sh\n: > {tmp_path}/asked; exec sleep 600\n")
    (shims / "iptables-nft").chmod(0o755)
    node.host.use_iptables(shims)
    snatd = Snatd(node.host, tmp_path / "snatd")
    process = node.host.popen(
        SNATD, "run", "--config", str(snatd.config), stderr=subprocess.DEVNULL
    )
    try:
        until((tmp_path / "asked").exists, "its first look")
        shown = snatd.command("status")
        assert shown.returncode == 3
        assert shown.stdout.startswith(f"no word yet: pid {process.pid} holds the lock")
        until(lambda: word(node) is Life.ANSWERS, "its first word", within_s=15)
    finally:
        process.kill()
        process.wait()
        snatd.close()


def test_from_another_pid_namespace_it_is_neither_dead_nor_certain(
    node: Node, snatd: Snatd
) -> None:
    """As in a container with the node's /run."""
    snatd.start()
    elsewhere = ("unshare", "--pid", "--fork", "--mount-proc")
    asked = node.host.command(*elsewhere, SNATD, "status", "--config", str(snatd.config))

    def status(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*asked, *more], capture_output=True, text=True, timeout=30, check=False
        )

    shown = status()
    assert shown.returncode == 0, shown.stdout
    assert f"pid {snatd.pid}, not seen from here" in row(shown.stdout, "daemon")
    assert json.loads(status("--json").stdout)["running"] is None
    snatd.process.kill()
    snatd.process.wait()
    assert status().returncode == 0, "it lived a moment ago, and no more is known"
    file = path_in(node.host.path("/run/snatd"))
    said = json.loads(file.read_text())
    # As the same file is when so much time has gone by.
    said["written_monotonic_s"] -= said["longest_silence_s"]
    said["written_boottime_s"] -= said["longest_silence_s"]
    file.write_text(json.dumps(said))
    shown = status()
    assert shown.returncode == 4
    assert shown.stdout.startswith("not answering, or not running: last word 9")


def test_who_may_not_see_the_process_does_not_take_it_for_dead(node: Node, snatd: Snatd) -> None:
    """A /proc that hides other people's processes. Root without capabilities and not in root's
    group is such a person, and may read a checkout that only root may."""
    snatd.start()
    nobody = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    group = ("--regid", "65534", "--clear-groups")
    script = (
        "mount -t proc -o hidepid=invisible proc /proc; "
        f"exec setpriv {' '.join(group)} {' '.join(nobody[1:])} sh -c "
        f"'test ! -e /proc/{snatd.pid} && exec {SNATD} status --config {snatd.config}'"
    )
    hidden = node.host.command("unshare", "--mount", "sh", "-euc", script)
    shown = subprocess.run(hidden, capture_output=True, text=True, timeout=30, check=False)
    assert shown.returncode == 0, shown
    assert "not seen from here" in row(shown.stdout, "daemon")
    snatd.process.kill()
    snatd.process.wait()
    shown = subprocess.run(hidden, capture_output=True, text=True, timeout=30, check=False)
    assert shown.returncode == 3, "signals tell that nobody has that number"


def test_a_status_file_of_another_version(node: Node, snatd: Snatd) -> None:
    snatd.start()
    file = path_in(node.host.path("/run/snatd"))
    snatd.signal(signal.SIGSTOP)  # so that it does not write it again
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 3}))
    shown = snatd.command("status")
    assert shown.returncode == 4
    assert "cannot be understood \u00b7 of schema 3, and this snatd reads 2" in shown.stdout
    assert "`systemctl restart snatd`" in row(shown.stdout, "to do")


def test_a_watch_shows_a_repair_when_it_comes(node: Node, snatd: Snatd) -> None:
    snatd.start()
    until(lambda: snatd.status()["passes"] >= 2, "the look after the watches were set up")
    arguments = ("status", "--config", str(snatd.config), "--watch", "--json")
    watch = node.host.popen(SNATD, *arguments, stdout=subprocess.PIPE)
    assert watch.stdout is not None
    try:
        first = json.loads(watch.stdout.readline())
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        shown = first
        while shown["repairs"] == first["repairs"]:
            shown = json.loads(watch.stdout.readline())
        assert shown["recent_repairs"][0]["writers"][0]["comm"] == "iptables"
        snatd.process.kill()
        snatd.process.wait()
        while shown["running"]:
            shown = json.loads(watch.stdout.readline())
        assert shown["last_word"]["in_sync"] is True
    finally:
        watch.kill()
        watch.wait()


def test_every_key_is_in_the_manual_and_no_other(node: Node, snatd: Snatd, tmp_path: Path) -> None:
    """One daemon through all that puts a key into its document."""
    saved = tmp_path / "rules.v4"
    saved.write_text(f"*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING {NARROW}\nCOMMIT\n")
    found: set[str] = set()

    def status() -> dict[str, Any]:
        document = snatd.json("status")
        found.update(keys(document))
        return document

    def tells(what: str, key: str, within_s: float = 10.0) -> None:
        until(lambda: status()[key], what, within_s)

    snatd.write_config(exclude=["172.7.192.0/18"], saved_rules=str(saved))
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd.start()
    until(lambda: status()["proof"]["probes"] and status()["flows"], "the evidence")
    tells("a saved file", "saved_rules")
    snatd.write_config(mode="nonsense")
    snatd.signal(signal.SIGHUP)
    tells("the refused configuration", "configuration_refused")
    snatd.write_config(mode="enforce", exclude=[])
    snatd.signal(signal.SIGHUP)
    snatd.wait_for("configuration_loaded")
    while not snatd.events("fighting"):
        add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: status()["fights"]["now"], "the fight")
    shown = snatd.command("status")
    assert shown.returncode == 1
    assert shown.stdout.startswith("fighting with iptables (pid ")
    assert "now with iptables (pid " in row(shown.stdout, "fights")
    snatd.wait_for("fight_ended", within_s=40)
    fight = status()["fights"]["last"]
    assert fight["with"].startswith("iptables (pid ")
    assert fight["repairs"] >= 1
    assert row(snatd.command("status").stdout, "fights").startswith("1, last with iptables (pid ")
    snatd.write_config(mode="observe")
    snatd.signal(signal.SIGHUP)
    snatd.wait_for("configuration_loaded", 2)
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    tells("the plan", "plan")
    node.host.run("nft", "add", "rule", "ip", "nat", "POSTROUTING", "oifname", "x", "masquerade")
    tells("the problem", "problems")
    snatd.process.kill()
    snatd.process.wait()
    last = status()["last_word"]
    found = {key for key in found if not key.startswith("last_word.")}
    assert set(keys(last)) <= found
    assert found == documented_keys()
