"""The saved rules through boots and everything that their own service does: Debian's real
netfilter-persistent, and a unit that does what iptables.service does on Fedora and EL.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.netns import until
from tests.system import boot
from tests.system.boot import RIGHT, answers, right_again_without_a_person
from tests.system.machine import Machine
from tests.system.node import BROAD, NARROW, NEIGHBOUR, NODE, Node

# What iptables-save never writes, and nobody shall touch.
HEAD = """\
# The site's own. Do not edit by hand!
*filter
:INPUT ACCEPT [12:3456]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]

-A INPUT -i lo -m comment --comment "it's \\"ours\\"" -j ACCEPT
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN
"""
TAIL = """\
# the end
COMMIT
"""
FOREIGN = "-s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN"
SAVED = f"{HEAD}[7:420] -A POSTROUTING {BROAD}\n{TAIL}"

# iptables-services' script: load; and at a stop flush all tables and delete their chains.
_LIKE_EL = """\
[Unit]
Before=network-pre.target
Wants=network-pre.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'iptables-restore < /etc/sysconfig/iptables'
ExecReload=/bin/sh -c 'iptables-restore < /etc/sysconfig/iptables'
ExecStop=/bin/sh -eu /usr/local/lib/iptables-stop
"""
_STOP = "for one in raw mangle nat filter; do iptables -t $one -F; iptables -t $one -X; done\n"


def _install(root: Path, loader: str) -> str:
    """The file that a service loads at boot, and the service where Debian has none."""
    path = "/etc/iptables/rules.v4"
    if loader == "iptables":
        path = "/etc/sysconfig/iptables"
        units = root / "etc/systemd/system"
        # Debian's netfilter-persistent has this name too, as an absolute link: never through it.
        for one in units.rglob("*"):
            if one.is_symlink() and one.readlink().name == "netfilter-persistent.service":
                one.unlink()
        with (units / "iptables.service").open("x") as unit:
            unit.write(_LIKE_EL)
        (root / "usr/local/lib/iptables-stop").write_text(_STOP)
        wants = units / "multi-user.target.wants"
        wants.mkdir(exist_ok=True)
        (wants / "iptables.service").symlink_to("/etc/systemd/system/iptables.service")
    file = root / path.lstrip("/")
    file.parent.mkdir(exist_ok=True)
    file.write_text(SAVED)
    file.chmod(0o640)
    return path


def assert_right_from_now_on(machine: Machine) -> None:
    """Who flushes the nat table takes the egress away until it is loaded again, or repaired."""
    before = answers(machine)
    until(lambda: all(answers(machine)[one] >= before[one] + 40 for one in RIGHT), "answers", 20)
    assert set(answers(machine) - before) == RIGHT


@pytest.mark.parametrize("loader", ["netfilter-persistent", "iptables"])
def test_the_saved_rules_through_all_that_their_service_does(off: Node, loader: str) -> None:
    machine = off.machine
    path = _install(machine.root, loader)
    boot.prepare(machine.root)
    machine.start()
    right_again_without_a_person(off)
    assert FOREIGN in off.rules(), "the file was loaded"

    def file() -> str:
        return machine.path(path).read_text()

    written = machine.event("saved_rules_written", 20)
    assert written["MESSAGE"].startswith(f"saved_rules_written: what={path} ")
    head, line, tail = file().partition(f"[7:420] -A POSTROUTING {NARROW}\n")
    assert (head, tail) == (HEAD, TAIL), "every other byte is as it was"
    assert line
    assert machine.path(f"{path}.snatd-backup").read_text() == SAVED
    assert machine.path(path).stat().st_mode & 0o777 == 0o640

    verbs = ["restart", "reload", "stop", "start"]
    if machine.show(loader, "CanReload") != "yes":
        verbs.remove("reload")
    for verb in verbs:
        machine.run("systemctl", verb, loader)
        until(lambda: NARROW in off.rules() and BROAD not in off.rules(), f"right after {verb}")
        assert_right_from_now_on(machine)
        assert (NEIGHBOUR, NODE) not in answers(machine), f"not one wrong source through {verb}"
        if loader == "netfilter-persistent":
            assert set(answers(machine)) == RIGHT, "it never takes the egress away"
    assert machine.run("snatd", "check").startswith("in sync")
    # The old file comes back from somewhere, and is loaded.
    machine.path(path).write_text(SAVED)
    machine.run("systemctl", "restart", loader)
    until(lambda: NARROW in off.rules() and BROAD not in off.rules(), "right again")
    until(lambda: NARROW in file() and f" {BROAD}" not in file(), "the file in line again", 60)
    before = file()
    machine.reboot()
    right_again_without_a_person(off)
    assert FOREIGN in off.rules(), "the file was loaded"
    assert file() == before, "a file that is in line is not written again"
    machine.run("systemctl", "stop", "snatd")
    machine.run("snatd", "revert")
    assert file() == SAVED
