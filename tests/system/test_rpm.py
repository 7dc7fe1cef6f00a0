"""The RPMs for Fedora and EL on a booted Debian, without Debian's own copies of what they bring.

That of EL 9 where there is a python3.11, the others where there is a newer one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.netns import until
from tests.system import boot
from tests.system.boot import RIGHT, right_again_without_a_person, seen
from tests.system.conftest import NEXT, NEXT_TOML, Packages, Rpms
from tests.system.machine import Machine
from tests.system.node import BROAD, NARROW, Node
from tests.system.test_packages import BUNDLED

FEDORA = "/usr/lib/systemd/system-preset/99-default.preset"


def rpm(machine: Machine, *words: str | Path) -> str:
    """--nodeps: the names of what it needs are those of Fedora, and there are Debian's."""
    names = [machine.copy(word)[0] if isinstance(word, Path) else word for word in words]
    return machine.run("rpm", "--nodeps", *names)


@pytest.fixture
def distribution(base: Path) -> str:
    return {"bookworm": "el9", "trixie": "fc43"}[base.name]


@pytest.fixture
def rpms(packages: Packages, distribution: str) -> Rpms:
    return packages.rpms[distribution]


@pytest.fixture
def fedora(bare: Node, distribution: str) -> Node:
    """A node that enables nothing by itself and has none of the bundled libraries."""
    bare.machine.path(FEDORA).write_text("disable *\n")
    bundled = " ".join(f"{name}*" for name in sorted(BUNDLED[distribution]))
    bare.machine.shell(
        f"cd /usr/lib/python3/dist-packages; rm -r {bundled} iptc python_iptables* libxtwrapper*"
    )
    return bare


def up(node: Node) -> None:
    node.network()
    node.lease()
    node.add_broad()
    node.machine.run("systemctl", "start", "snatd")
    node.wait_for_repair()


def test_install_upgrade_and_erase(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
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
    rpm(machine, "-U", rpms.next)
    assert machine.show("snatd", "MainPID") not in (pid, "0")
    assert machine.run("snatd", "--version") == f"snatd {NEXT}\n"
    assert machine.path("/etc/snatd/snatd.toml").read_text() == "# mine\n"
    assert machine.path("/etc/snatd/snatd.toml.rpmnew").read_text().endswith(NEXT_TOML)
    byte_code = "/usr/lib/snatd/snatd/__pycache__"
    assert machine.path(byte_code).is_dir(), "made by the Python that is there"
    until(lambda: fedora.rules() == [NARROW], "the rules as they were")
    fedora.promises_hold()
    said = rpm(machine, "-e", "snatd")
    assert fedora.rules() == [BROAD], said
    assert "snatd" not in machine.run("nft", "list", "ruleset")
    left = machine.run("find", "/", "-xdev", "-iname", "*snatd*", "-not", "-path", "/root/*")
    kept = ["/etc/snatd", "/etc/snatd/snatd.toml.rpmnew", "/etc/snatd/snatd.toml.rpmsave"]
    assert sorted(left.split()) == kept, "what was edited"


def test_legacy_tables_with_the_package_for_them(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
    up(fedora)
    fedora.add_broad("legacy")
    # Without it that table is said to be unreadable, and the guard holds all the same.
    fedora.wait_for_status("UTC - ipv4 legacy: ", 30)
    assert fedora.status_line().startswith("degraded since ")
    fedora.promises_hold()
    assert machine.event("backend_failed")["PRIORITY"] == "3"
    rpm(machine, "-U", rpms.legacy)
    until(lambda: NARROW in fedora.rules("legacy"), "the repair")
    fedora.promises_hold()
    # In whatever order they are named, the library is there when the rules are put back.
    said = rpm(machine, "-e", "snatd-legacy", "snatd")
    assert fedora.rules("legacy") == [BROAD], said


def test_an_upgrade_keeps_disabled_and_stopped(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
    machine.run("systemctl", "disable", "snatd")
    rpm(machine, "-U", rpms.next)
    assert machine.try_to("systemctl", "is-enabled", "snatd").stdout.strip() == "disabled"
    assert machine.show("snatd", "ActiveState") == "inactive"


def test_a_refused_configuration_is_told(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
    up(fedora)
    machine.path("/etc/snatd/snatd.toml").write_text("mode = 'watch'\n")
    said = rpm(machine, "-U", rpms.next)
    assert "snatd.toml: mode: 'watch' is none of 'enforce', 'observe'" in said
    assert "SNATD IS NOT RUNNING" in said
    assert machine.show("snatd", "ActiveState") == "failed"
    fedora.promises_hold()


def test_what_could_not_be_put_back_is_told_and_stays_known(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
    up(fedora)
    machine.run("nft", "add", "rule", "ip", "nat", "POSTROUTING", "ct", "mark", "set", "1")
    said = rpm(machine, "-e", "snatd")
    assert "snatd: NOT ALL WAS PUT BACK" in said
    assert "snatd: /var/lib/snatd stays" in said
    left = machine.run("ls", "-A", "/var/lib/snatd").split()
    assert left == ["not-reverted", "replaced.json"]


def test_the_backups_of_saved_rules_go_with_it(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
    saved = f"*nat\n-A POSTROUTING {BROAD}\nCOMMIT\n".replace("-j MASQ", "--jump MASQ")
    machine.path("/etc/sysconfig").mkdir()
    machine.path("/etc/sysconfig/iptables").write_text(saved)
    backup = machine.path("/etc/sysconfig/iptables.snatd-backup")
    up(fedora)
    until(backup.exists, "the backup", 30)
    said = rpm(machine, "-e", "snatd")
    assert (
        "iptables.snatd-backup goes with the package: the file as it was before snatd edited it\n"
        in said
    )
    assert "stays: the file" not in said
    assert BROAD in machine.path("/etc/sysconfig/iptables").read_text()
    assert not backup.exists()
    assert not machine.path("/var/lib/snatd").exists()


def test_a_site_may_preset_it_otherwise(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    machine.shell(
        "mkdir -p /etc/systemd/system-preset; "
        "echo 'disable snatd.service' >/etc/systemd/system-preset/50-site.preset"
    )
    rpm(machine, "-U", rpms.this)
    assert machine.try_to("systemctl", "is-enabled", "snatd").stdout.strip() == "disabled"


def test_a_configuration_that_is_there_before_is_honoured(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    machine.shell("mkdir /etc/snatd; echo 'mode = \"observe\"' >/etc/snatd/snatd.toml")
    rpm(machine, "-U", rpms.this)
    assert machine.path("/etc/snatd/snatd.toml").read_text() == 'mode = "observe"\n'


def test_reboot(fedora: Node, rpms: Rpms) -> None:
    machine = fedora.machine
    rpm(machine, "-U", rpms.this)
    boot.prepare(machine.root)
    machine.reboot()
    right_again_without_a_person(fedora)
    assert seen(machine) == RIGHT
