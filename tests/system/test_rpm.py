"""The RPM on a booted Debian, without Debian's own copies of what it brings along."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.netns import until
from tests.system import boot
from tests.system.boot import RIGHT, right_again_without_a_person, seen
from tests.system.conftest import NEXT, Packages
from tests.system.machine import Machine
from tests.system.node import BROAD, NARROW, Node

FEDORA = "/usr/lib/systemd/system-preset/99-default.preset"


def rpm(machine: Machine, *words: str | Path) -> str:
    """--nodeps: the names of what it needs are those of Fedora, and there are Debian's."""
    names = [machine.copy(word)[0] if isinstance(word, Path) else word for word in words]
    return machine.run("rpm", "--nodeps", *names)


@pytest.fixture
def fedora(bare: Node) -> Node:
    """A node that enables nothing by itself and has none of the bundled libraries."""
    bare.machine.path(FEDORA).write_text("disable *\n")
    bare.machine.shell(
        "cd /usr/lib/python3/dist-packages; "
        "rm -r structlog* sdnotify* watchdog* pyroute2* iptc python_iptables* libxtwrapper*"
    )
    return bare


def up(node: Node) -> None:
    node.network()
    node.lease()
    node.add_broad()
    node.machine.run("systemctl", "start", "snatd")
    node.wait_for_repair()


def test_install_upgrade_and_erase(fedora: Node, packages: Packages) -> None:
    machine = fedora.machine
    rpm(machine, "-U", packages.rpm)
    assert machine.run("systemctl", "is-enabled", "snatd").strip() == "enabled"
    assert machine.show("snatd", "ActiveState") == "inactive", "started by a person or a boot"
    assert machine.run("stat", "-c", "%a", "/run/xtables.lock") == "600\n"
    assert machine.run("systemd-analyze", "verify", "--man=no", "snatd.service") == ""
    up(fedora)
    fedora.promises_hold()
    told = machine.run("journalctl", "-x", "-b", "SNATD_EVENT=rule_narrowed", "--no-pager")
    assert "A rule that hid the addresses of containers was narrowed" in told
    machine.path("/etc/snatd/snatd.toml").write_text("# mine\n")
    pid = machine.show("snatd", "MainPID")
    rpm(machine, "-U", packages.next_rpm)
    assert machine.show("snatd", "MainPID") not in (pid, "0")
    assert machine.run("snatd", "--version") == f"snatd {NEXT}\n"
    assert machine.path("/etc/snatd/snatd.toml").read_text() == "# mine\n"
    until(lambda: fedora.rules() == [NARROW], "the rules as they were")
    fedora.promises_hold()
    said = rpm(machine, "-e", "snatd")
    assert fedora.rules() == [BROAD], said
    assert "snatd" not in machine.run("nft", "list", "ruleset")
    left = machine.run("find", "/", "-xdev", "-iname", "*snatd*", "-not", "-path", "/root/*")
    assert left.split() == ["/etc/snatd", "/etc/snatd/snatd.toml.rpmsave"], "what was edited"


def test_legacy_tables_with_the_package_for_them(fedora: Node, packages: Packages) -> None:
    machine = fedora.machine
    rpm(machine, "-U", packages.rpm)
    up(fedora)
    fedora.add_broad("legacy")
    # Without it that table is said to be unreadable, and the guard holds all the same.
    fedora.wait_for_status("UTC - ipv4 legacy: ", 30)
    assert fedora.status_line().startswith("degraded since ")
    fedora.promises_hold()
    assert machine.event("backend_failed")["PRIORITY"] == "3"
    rpm(machine, "-U", packages.legacy_rpm)
    machine.run("systemctl", "restart", "snatd")
    until(lambda: NARROW in fedora.rules("legacy"), "the repair")
    fedora.promises_hold()


def test_an_upgrade_keeps_disabled_and_stopped(fedora: Node, packages: Packages) -> None:
    machine = fedora.machine
    rpm(machine, "-U", packages.rpm)
    machine.run("systemctl", "disable", "snatd")
    rpm(machine, "-U", packages.next_rpm)
    assert machine.try_to("systemctl", "is-enabled", "snatd").stdout.strip() == "disabled"
    assert machine.show("snatd", "ActiveState") == "inactive"


def test_a_site_may_preset_it_otherwise(fedora: Node, packages: Packages) -> None:
    machine = fedora.machine
    machine.shell(
        "mkdir -p /etc/systemd/system-preset; "
        "echo 'disable snatd.service' >/etc/systemd/system-preset/50-site.preset"
    )
    rpm(machine, "-U", packages.rpm)
    assert machine.try_to("systemctl", "is-enabled", "snatd").stdout.strip() == "disabled"


def test_a_configuration_that_is_there_before_is_honoured(fedora: Node, packages: Packages) -> None:
    machine = fedora.machine
    machine.shell("mkdir /etc/snatd; echo 'mode = \"observe\"' >/etc/snatd/snatd.toml")
    rpm(machine, "-U", packages.rpm)
    assert machine.path("/etc/snatd/snatd.toml").read_text() == 'mode = "observe"\n'


def test_reboot(fedora: Node, packages: Packages) -> None:
    machine = fedora.machine
    rpm(machine, "-U", packages.rpm)
    boot.prepare(machine.root)
    machine.reboot()
    right_again_without_a_person(fedora)
    assert seen(machine) == RIGHT
