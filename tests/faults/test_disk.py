"""Row 26: disks that are full or read-only. Enforcement goes on; no file is ever half."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from snatd.report import EXIT_WAITING
from tests.faults.conftest import Start
from tests.faults.test_rules import settled
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd


def small_disk(node: Node, path: Path | str, options: str = "size=64k") -> None:
    node.host.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path))


def fill(node: Node, path: Path | str, name: str = "filler") -> Path:
    """Not a byte is left; the file to remove for that to end."""
    filler = f"{path}/{name}"
    node.host.run("dd", "if=/dev/zero", f"of={filler}", "bs=4k", check=False)
    return node.host.path(filler)


def repaired(node: Node, *match: str) -> None:
    add(node, "-I", "POSTROUTING", *match, *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair")


ANOTHER = ("-m", "comment", "--comment", "another")


FULL = "No space left on device"
READ_ONLY = "Read-only file system"


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
def test_fault_26_state_dir(
    nft_lab: Lab, node: Node, start: Start, tmp_path: Path, fault: str
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    small_disk(node, state)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd = start(node, state_dir=str(state))
    settled(snatd)
    memory = node.host.path(str(state / "replaced.json"))
    before = memory.read_bytes()
    if fault == FULL:
        filler = fill(node, state)
    else:
        node.host.run("mount", "-o", "remount,ro", str(state))
    repaired(node, *ANOTHER)
    (told,) = snatd.wait_for("state_not_kept")
    assert fault in told["what"]
    assert memory.read_bytes() == before, "the old one, whole"
    assert sorted(os.listdir(memory.parent)) in (["replaced.json"], ["filler", "replaced.json"])
    promises_hold(nft_lab)
    assert no_room(snatd) == [f"snatd cannot write to {state}"]
    if fault == FULL:
        filler.unlink()
    else:
        node.host.run("mount", "-o", "remount,rw", str(state))
    assert no_room(snatd) == []
    repaired(node, *ANOTHER)
    until(lambda: memory.read_bytes() != before, "the new one")
    assert len(json.loads(memory.read_bytes())["replaced"][-1]["rules"]) == 2


def no_room(snatd: Snatd) -> list[str]:
    """What doctor says of full disks."""
    findings = json.loads(snatd.command("doctor", "--json").stdout)["findings"]
    return [one["says"] for one in findings if one["name"] == "no_room"]


def test_fault_26_no_space_in_run(nft_lab: Lab, node: Node, start: Start) -> None:
    """An old word would be taken for a new one, so there is none; a start needs no space either."""
    snatd = start(node)
    settled(snatd)
    node.host.run("mount", "-o", "remount,size=256k", "/run")
    snatd.signal(signal.SIGSTOP)
    filler = fill(node, "/run")
    # The room that the old one leaves shall not do for the new one.
    node.host.path("/run/snatd/status.json").write_text("{}")
    fill(node, "/run", "filler2")
    snatd.signal(signal.SIGCONT)
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair")
    (told,) = snatd.wait_for("status_not_written")
    assert told["what"] == f"/run/snatd/status.json: {FULL}"
    assert os.listdir(node.host.path("/run/snatd")) == ["snatd.lock"]
    shown = snatd.command("status")
    assert (shown.returncode, shown.stderr) == (EXIT_WAITING, "")
    assert shown.stdout.startswith(f"no word yet: pid {snatd.pid} holds the lock")
    assert "cannot write its status file" in shown.stdout
    assert no_room(snatd) == ["snatd cannot write to /run/snatd"]
    snatd.stop()
    snatd.start()
    repaired(node)
    promises_hold(nft_lab)
    filler.unlink()
    snatd.signal(signal.SIGUSR1)
    until(lambda: snatd.status()["pid"] == snatd.pid, "the new one")
    assert "already running as pid" in snatd.command("run").stderr


def test_fault_26_the_lock_cannot_be_made_again(nft_lab: Lab, node: Node, start: Start) -> None:
    """Its directory is removed, and what is there instead lets no other be made."""
    snatd = start(node, resync=1)
    settled(snatd)
    runtime_dir = node.host.path("/run/snatd")
    node.host.shell("rm -r /run/snatd; touch /run/snatd")
    repaired(node)
    passes = len(snatd.events())
    promises_hold(nft_lab)
    snatd.wait_for("status_not_written")
    assert snatd.process.poll() is None
    runtime_dir.unlink()
    snatd.wait_for("lock_restored")
    assert "already running as pid" in snatd.command("run").stderr
    assert len(snatd.events()) < passes + 10


SAVED = "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n*nat\n:POSTROUTING ACCEPT [0:0]\n{rule}COMMIT\n"


@pytest.mark.parametrize("fault", [FULL, READ_ONLY])
def test_fault_26_a_saved_file(
    nft_lab: Lab, node: Node, start: Start, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "iptables"
    folder.mkdir()
    small_disk(node, folder)
    path = node.host.path(str(folder / "rules.v4"))
    old = SAVED.format(rule=f"-A POSTROUTING {' '.join(node.broad_rule)}\n")
    path.write_text(old)
    if fault == FULL:
        filler = fill(node, folder)
    else:
        node.host.run("mount", "-o", "remount,ro", str(folder))
    snatd = start(node, saved_rules=str(folder / "rules.v4"), resync=1)
    (told,) = snatd.wait_for("saved_rules_left_alone")
    assert fault in str(told["what"])
    assert path.read_text() == old
    left = ["not written"]
    until(lambda: [one["state"] for one in snatd.status()["saved_rules"]] == left, "it told")
    repaired(node)
    promises_hold(nft_lab)
    if fault == FULL:
        filler.unlink()
    else:
        node.host.run("mount", "-o", "remount,rw", str(folder))
    done = snatd.command("save")
    assert done.returncode == 0, done.stdout
    assert path.read_text() == SAVED.format(rule=f"-A POSTROUTING {NARROW}\n")
    assert (path.parent / "rules.v4.snatd-backup").read_text() == old
