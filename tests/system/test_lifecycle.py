"""The Debian package from install to purge: boots, power cuts, upgrades under traffic, removal."""

from __future__ import annotations

from tests.lab.netns import until
from tests.system import boot
from tests.system.boot import RIGHT, answers, right_again_without_a_person, seen
from tests.system.conftest import NEXT, Packages, install
from tests.system.machine import Machine
from tests.system.node import BROAD, NARROW, NEIGHBOUR, NODE, Node


def test_boot_reboot_and_a_power_cut(off: Node) -> None:
    boot.prepare(off.machine.root)
    off.machine.start()
    right_again_without_a_person(off)
    off.machine.reboot()
    right_again_without_a_person(off)
    off.machine.power_cut()
    right_again_without_a_person(off)
    assert off.machine.run("snatd", "check").startswith("in sync")


def test_without_snatd_the_container_is_seen_as_the_node(bare: Node) -> None:
    """So that the test above can fail."""
    machine = bare.machine
    machine.power_off()
    boot.prepare(machine.root)
    machine.start()
    bare.connect_wire()
    machine.wait_until_up()
    until(lambda: (NEIGHBOUR, NODE) in answers(machine), "the problem")


def test_an_upgrade_under_traffic(off: Node, packages: Packages) -> None:
    machine = off.machine
    boot.prepare(machine.root)
    machine.start()
    off.connect_wire()
    machine.wait_until_up()
    until(lambda: NARROW in off.rules() and BROAD not in off.rules(), "the narrowed rule")
    pid = machine.show("snatd", "MainPID")
    # A rival puts its rule back as long as the upgrade lasts.
    machine.path("/root/rival").write_text(
        f"while iptables -w 5 -t nat -I POSTROUTING {BROAD}; do sleep 0.03; done\n"
    )
    rival = machine.popen("sh", "/root/rival")
    install(machine, packages.next_deb)
    rival.terminate()
    rival.wait(10)
    machine.try_to("pkill", "-f", "^sh /root/rival$")
    assert machine.run("snatd", "--version") == f"snatd {NEXT}\n"
    assert machine.show("snatd", "MainPID") not in (pid, "0")
    assert machine.event("started")["SNATD_VERSION"] == NEXT
    assert seen(machine) == RIGHT, "not one wrong source"
    assert sum(answers(machine).values()) > 200
    until(lambda: BROAD not in off.rules(), "the last repair", 60)
    assert machine.run("snatd", "check").startswith("in sync")


def test_an_upgrade_keeps_what_the_operator_chose(node: Node, packages: Packages) -> None:
    machine = node.machine
    file = machine.path("/etc/snatd/snatd.toml")
    file.write_text("# mine\nresync = 45\n")
    node.add_broad()
    node.wait_for_repair()
    machine.run("systemctl", "disable", "--now", "snatd")
    install(machine, packages.next_deb)
    assert machine.try_to("systemctl", "is-enabled", "snatd").stdout.strip() == "disabled"
    assert machine.show("snatd", "ActiveState") == "inactive"
    assert file.read_text() == "# mine\nresync = 45\n"
    assert node.rules() == [NARROW], "the rules stay, also where nobody looks after them"
    machine.run("systemctl", "enable", "--now", "snatd")
    assert machine.run("systemctl", "is-active", "snatd").strip() == "active"


def test_an_upgrade_leaves_the_rules(node: Node, packages: Packages) -> None:
    node.add_broad()
    node.wait_for_repair()
    before = node.machine.run("nft", "-s", "list", "ruleset")
    install(node.machine, packages.next_deb)
    assert node.machine.run("nft", "-s", "list", "ruleset") == before


def test_a_configuration_that_is_there_before_is_honoured(bare: Node, packages: Packages) -> None:
    machine = bare.machine
    machine.shell("mkdir /etc/snatd; echo 'mode = \"observe\"' >/etc/snatd/snatd.toml")
    bare.network()
    bare.lease()
    bare.add_broad()
    install(machine, packages.deb)
    assert machine.path("/etc/snatd/snatd.toml").read_text() == 'mode = "observe"\n'
    assert machine.path("/etc/snatd").is_dir()
    assert machine.run("ls", "-A", "/etc/snatd") == "snatd.toml\n"
    bare.wait_for_status("drift")
    assert bare.rules() == [BROAD], "observed, not changed"
    assert machine.event("would_change")["PRIORITY"] == "4"
    # The rollout of the README: look, then enforce, then reload.
    assert machine.try_to("snatd", "check", "--json").returncode == 1
    machine.path("/etc/snatd/snatd.toml").write_text('mode = "enforce"\n')
    machine.run("systemctl", "reload", "snatd")
    bare.wait_for_repair()
    install(machine, packages.next_deb)
    assert machine.path("/etc/snatd/snatd.toml").read_text() == 'mode = "enforce"\n'


def test_remove_reverts_and_purge_leaves_nothing(bare: Node, packages: Packages) -> None:
    machine = bare.machine
    before = files(machine)
    bare.network()
    bare.lease()
    bare.add_broad()
    tables = machine.run("nft", "-s", "list", "ruleset")
    install(machine, packages.deb)
    bare.wait_for_repair()
    assert "table ip snatd" in machine.run("nft", "list", "ruleset")
    machine.run("apt-get", "remove", "-y", "-q", "snatd")
    assert machine.run("nft", "-s", "list", "ruleset") == tables
    assert machine.path("/etc/snatd/snatd.toml").exists()
    assert machine.show("snatd", "ActiveState") == "inactive"
    machine.run("apt-get", "purge", "-y", "-q", "snatd")
    assert sorted(files(machine) - before) == []


def test_remove_reverts_also_with_a_broken_configuration(node: Node) -> None:
    node.add_broad()
    node.wait_for_repair()
    node.machine.path("/etc/snatd/snatd.toml").write_text("nonsense")
    node.machine.run("apt-get", "purge", "-y", "-q", "snatd")
    assert node.rules() == [BROAD]
    assert "snatd" not in node.machine.run("nft", "list", "ruleset")


# What any package leaves behind, and what other programs write all the time.
_NOT_OURS = (
    *(
        "/var/lib/dpkg/",
        "/var/log/",
        "/var/lib/apt/",
        "/var/cache/",
        "/root/",
        "/tmp/",
        "/var/tmp/",
    ),
    *("/var/lib/systemd/", "/etc/.pwd.lock", "/var/lib/private"),
)


def files(machine: Machine) -> set[str]:
    listed = machine.run("find", "/", "-xdev", "-not", "-path", "/proc/*").splitlines()
    run = machine.run("find", "/run", "-xdev", "-path", "*snatd*").splitlines()
    return {one for one in (*listed, *run) if not one.startswith(_NOT_OURS)} | set(run)


def test_a_circle_of_units_is_found_and_its_remedy_said(bare: Node, packages: Packages) -> None:
    """The common drop-in that has saved rules loaded after docker."""
    machine = bare.machine
    docker = machine.path("/etc/systemd/system/docker.service")
    docker.write_text("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n")
    drop_in = machine.path("/etc/systemd/system/netfilter-persistent.service.d/late.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Unit]\nAfter=docker.service\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "enable", "docker")
    said = install(machine, packages.deb)
    assert "snatd: the order of these units is a circle: " in said
    assert "netfilter-persistent.service" in said
    assert "systemctl edit snatd" in said
    drop_in.unlink()
    machine.run("systemctl", "daemon-reload")
    assert machine.run("/usr/libexec/snatd/check-order") == ""
