"""snatd.toml of the Debian package: never asked about, never lost, whatever it is at an upgrade.

Nobody answers dpkg here, and it is told nothing by options.
"""

from __future__ import annotations

import json

import pytest

import snatd
from tests.lab.netns import until
from tests.system.conftest import NEXT_TOML, Packages, install
from tests.system.machine import Machine
from tests.system.node import Node

FILE = "/etc/snatd/snatd.toml"
ELSEWHERE = "/srv/snatd.toml"
OBSERVE = 'mode = "observe"\n'

# What may have become of the file, and what is at its path then.
STATES = {
    "unedited": "",
    "edited": f"echo '{OBSERVE}' >{FILE}",
    "deleted": f"rm {FILE}",
    "deleted with its folder": "rm -r /etc/snatd",
    "symlink": f"echo '{OBSERVE}' >{ELSEWHERE}; ln -sf {ELSEWHERE} {FILE}",
    "symlink to what was shipped": f"mv {FILE} {ELSEWHERE}; ln -s {ELSEWHERE} {FILE}",
    "dangling": f"ln -sf /srv/nowhere/snatd.toml {FILE}",
}


def dpkg(machine: Machine, *words: str) -> str:
    """With neither a terminal nor an answer nor an option."""
    return machine.run("env", "-u", "DEBIAN_FRONTEND", "dpkg", *words)


def there(machine: Machine) -> list[str]:
    """All of /etc/snatd: kind, name and target of each, and what can be read of them."""
    if not machine.path("/etc/snatd").exists():
        return []
    listed = machine.shell("cd /etc/snatd; find . -mindepth 1 -printf '%y %P %l\\n' | sort")
    readable = f"for one in {FILE} {ELSEWHERE}; do [ ! -f $one ] || md5sum $one; done"
    return (listed + machine.shell(readable)).splitlines()


def beside(machine: Machine) -> str:
    file = machine.path(f"{FILE}.dpkg-dist")
    return file.read_text() if file.exists() else ""


def assert_gone(machine: Machine) -> None:
    assert not machine.path("/etc/snatd").exists()
    assert not machine.path("/var/lib/snatd").exists()
    assert "snatd" not in machine.run("dpkg-divert", "--list")


@pytest.mark.parametrize("state", STATES)
def test_an_upgrade_keeps_it_as_it_is(bare: Node, packages: Packages, state: str) -> None:
    machine = bare.machine
    # As in an image: the service is not what this is about, and four restarts take their time.
    machine.run("mv", "/run/systemd/system", "/run/systemd/off")
    deb, next_deb = machine.copy(packages.deb, packages.next_deb)
    dpkg(machine, "-i", deb)
    shipped = machine.path(FILE).read_text()
    machine.shell(STATES[state] or "true")
    before = there(machine)
    # There and back: each time what is shipped has changed.
    for package, brought in ((next_deb, shipped.rstrip("\n") + NEXT_TOML), (deb, shipped)):
        dpkg(machine, "-i", package)
        assert machine.run("dpkg-query", "-W", "-f", "${db:Status-Abbrev}", "snatd") == "ii "
        if state == "unedited":
            assert machine.path(FILE).read_text() == brought
            assert beside(machine) == ""
            continue
        assert beside(machine) == brought, "so that one sees what is new"
        machine.path(f"{FILE}.dpkg-dist").rename(machine.path("/root/kept"))
        if "folder" in state:
            machine.path("/etc/snatd").rmdir()
        assert there(machine) == before, "and no .dpkg-new"
        machine.path("/etc/snatd").mkdir(exist_ok=True)
        machine.path("/root/kept").rename(machine.path(f"{FILE}.dpkg-dist"))
    # Removed and installed again, with something else shipped: the same.
    dpkg(machine, "-r", "snatd")
    dpkg(machine, "-i", next_deb)
    if state == "unedited":
        assert machine.path(FILE).read_text() == shipped.rstrip("\n") + NEXT_TOML
    else:
        assert beside(machine) == shipped.rstrip("\n") + NEXT_TOML
        assert [one for one in there(machine) if "dpkg-dist" not in one] == before
    elsewhere = machine.path(ELSEWHERE).exists()
    dpkg(machine, "-P", "snatd")
    assert_gone(machine)
    assert machine.path(ELSEWHERE).exists() == elsewhere


@pytest.mark.parametrize("state", ["edited", "symlink", "dangling"])
def test_what_was_there_before_the_package_stays(
    bare: Node, packages: Packages, state: str
) -> None:
    machine = bare.machine
    machine.shell(f"mkdir /etc/snatd; {STATES[state]}")
    before = there(machine)
    deb, next_deb = machine.copy(packages.deb, packages.next_deb)
    for package in (deb, next_deb):
        dpkg(machine, "-i", package)
        assert [one for one in there(machine) if "dpkg-dist" not in one] == before
    assert "#next = 1" in beside(machine)
    dpkg(machine, "-P", "snatd")
    assert_gone(machine)


def test_who_takes_over_what_is_shipped_gets_the_next_one(bare: Node, packages: Packages) -> None:
    machine = bare.machine
    install(machine, packages.deb)
    shipped = machine.path(FILE).read_text()
    machine.path(FILE).write_text(OBSERVE)
    said = install(machine, packages.next_deb)
    assert f"snatd: {FILE} is this node's own and stays as it is" in said
    machine.shell(f"mv {FILE}.dpkg-dist {FILE}")
    dpkg(machine, "-i", *machine.copy(packages.deb))
    assert machine.path(FILE).read_text() == shipped
    assert machine.run("ls", "-A", "/etc/snatd") == "snatd.toml\n"
    assert "snatd" not in machine.run("dpkg-divert", "--list")


def test_an_administrators_own_diversion_is_left_alone(bare: Node, packages: Packages) -> None:
    machine = bare.machine
    words = ("--local", "--no-rename", "--divert", "/root/shipped", "--add", FILE)
    machine.run("dpkg-divert", *words)
    machine.shell(f"mkdir /etc/snatd; echo '{OBSERVE}' >{FILE}")
    before = there(machine)
    deb, next_deb = machine.copy(packages.deb, packages.next_deb)
    for package in (deb, next_deb):
        dpkg(machine, "-i", package)
        assert there(machine) == before
    assert "#next = 1" in machine.path("/root/shipped").read_text()
    dpkg(machine, "-P", "snatd")
    assert f"local diversion of {FILE} to /root/shipped" in machine.run("dpkg-divert", "--list")


def mode(machine: Machine) -> str:
    status = machine.path("/run/snatd/status.json")
    until(status.exists, "the status file")
    return str(json.loads(status.read_text())["mode"])


def test_a_power_cut_in_the_middle_of_an_upgrade(bare: Node, packages: Packages) -> None:
    """Between preinst and postinst the daemon may start: with the node's own file."""
    machine = bare.machine
    install(machine, packages.deb)
    machine.path(FILE).write_text(OBSERVE)
    machine.run("systemctl", "restart", "snatd")
    dpkg(machine, "--unpack", *machine.copy(packages.next_deb))
    machine.run("sync")
    machine.power_cut()
    machine.wait_until_up()
    assert machine.show("snatd", "ActiveState") == "active"
    assert (machine.path(FILE).read_text(), mode(machine)) == (OBSERVE, "observe")
    dpkg(machine, "--configure", "-a")
    assert (machine.path(FILE).read_text(), mode(machine)) == (OBSERVE, "observe")
    assert machine.run("ls", "-A", "/etc/snatd") == "snatd.toml\nsnatd.toml.dpkg-dist\n"


@pytest.mark.parametrize("installed_before", [False, True])
def test_an_unpacking_that_fails(bare: Node, packages: Packages, installed_before: bool) -> None:
    """Another package owns one of its files: dpkg goes back after preinst."""
    machine = bare.machine
    deb, next_deb = machine.copy(packages.deb, packages.next_deb)
    if installed_before:
        dpkg(machine, "-i", deb)
    machine.shell(f"mkdir -p /etc/snatd; echo '{OBSERVE}' >{FILE}")
    machine.shell(
        "mkdir -p /root/other/DEBIAN /root/other/usr/share/man/man8; cd /root/other; "
        "printf 'Package: other\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@x.invalid>\\n"
        "Description: x\\n' >DEBIAN/control; : >usr/share/man/man8/snatd.8.gz; "
        "dpkg-deb -b . /root/other.deb; dpkg -i --force-overwrite /root/other.deb"
    )
    failed = machine.try_to("dpkg", "-i", next_deb)
    assert failed.returncode != 0
    assert "trying to overwrite" in failed.stdout
    assert machine.path(FILE).read_text().strip() == OBSERVE.strip()
    if installed_before:
        assert machine.run("snatd", "--version") == f"snatd {snatd.__version__}\n"
    else:
        assert machine.run("ls", "-A", "/etc/snatd") == "snatd.toml\n"
        assert "snatd" not in machine.run("dpkg-divert", "--list")
    dpkg(machine, "-P", "other")
    dpkg(machine, "-i", next_deb)
    assert machine.path(FILE).read_text().strip() == OBSERVE.strip()
    assert "#next = 1" in beside(machine)


def test_a_postinst_that_fails_is_run_again(bare: Node, packages: Packages) -> None:
    machine = bare.machine
    install(machine, packages.deb)
    machine.path(FILE).write_text(OBSERVE)
    broken = machine.path("/usr/local/bin/py3compile")
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert machine.try_to("dpkg", "-i", *machine.copy(packages.next_deb)).returncode != 0
    assert machine.path(FILE).read_text() == OBSERVE
    broken.unlink()
    dpkg(machine, "--configure", "-a")
    assert (machine.path(FILE).read_text(), mode(machine)) == (OBSERVE, "observe")
    assert "#next = 1" in beside(machine)
