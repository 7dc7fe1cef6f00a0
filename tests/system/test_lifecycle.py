"""The Debian package from install to purge: boots, power cuts, upgrades under traffic, removal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import time

from tests.lab.netns import until
from tests.system import boot
from tests.system.boot import RIGHT, answers, right_again_without_a_person, seen
from tests.system.conftest import NEXT, Packages, install
from tests.system.machine import Machine
from tests.system.node import BROAD, NARROW, NEIGHBOUR, NODE, Node


def test_fault_21_boot_reboot_and_a_power_cut(off: Node) -> None:
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


def test_fault_32_an_upgrade_under_traffic(off: Node, packages: Packages) -> None:
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


def test_an_upgrade_keeps_a_daemon_stopped_that_was_stopped(node: Node, packages: Packages) -> None:
    machine = node.machine
    machine.run("systemctl", "stop", "snatd")
    install(machine, packages.next_deb)
    assert machine.run("systemctl", "is-enabled", "snatd").strip() == "enabled"
    assert machine.show("snatd", "ActiveState") == "inactive"
    assert not machine.path("/run/snatd-stopped").exists()
    # Installed after a removal it starts, as it does the first time.
    machine.run("apt-get", "remove", "-y", "-q", "snatd")
    install(machine, packages.next_deb)
    assert machine.show("snatd", "ActiveState") == "active"


def test_a_site_may_forbid_that_packages_start_anything(bare: Node, packages: Packages) -> None:
    machine = bare.machine
    policy = machine.path("/usr/sbin/policy-rc.d")
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    install(machine, packages.deb)
    assert machine.show("snatd", "ActiveState") == "inactive"


def test_a_refused_configuration_is_told_and_does_not_break_apt(
    node: Node, packages: Packages
) -> None:
    machine = node.machine
    node.add_broad()
    node.wait_for_repair()
    file = machine.path("/etc/snatd/snatd.toml")
    file.write_text("mode = 'watch'\nresync = 0\n")
    said = install(machine, packages.next_deb)
    assert machine.run("dpkg-query", "-W", "-f", "${db:Status-Abbrev}", "snatd") == "ii "
    assert machine.show("snatd", "ActiveState") == "failed"
    assert f"snatd: {FILE}: mode: 'watch' is none of 'enforce', 'observe'\n" in said
    assert f"snatd: {FILE}: resync: 0 is not a number of seconds from 1 to 3600\n" in said
    assert "snatd: SNATD IS NOT RUNNING: it does not start with this configuration." in said
    assert node.rules() == [NARROW]
    node.promises_hold()
    # What has failed is not what was stopped by hand: with a good file an upgrade starts it.
    file.write_text("mode = 'enforce'\n")
    said = machine.run("dpkg", "-i", *machine.copy(packages.deb))
    assert "NOT RUNNING" not in said
    assert machine.show("snatd", "ActiveState") == "active"


def test_fault_32_an_upgrade_leaves_the_rules(node: Node, packages: Packages) -> None:
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
    assert machine.run("ls", "-A", "/etc/snatd") == "snatd.toml\nsnatd.toml.dpkg-dist\n"
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
    assert not machine.path("/run/snatd").exists()
    assert not machine.path("/var/lib/snatd").exists(), "nothing is to be remembered"
    machine.run("apt-get", "purge", "-y", "-q", "snatd")
    assert sorted(files(machine) - before) == []


def test_remove_reverts_also_with_a_broken_configuration(node: Node) -> None:
    node.add_broad()
    node.wait_for_repair()
    node.machine.path("/etc/snatd/snatd.toml").write_text("nonsense")
    node.machine.run("apt-get", "purge", "-y", "-q", "snatd")
    assert node.rules() == [BROAD]
    assert "snatd" not in node.machine.run("nft", "list", "ruleset")


FILE = "/etc/snatd/snatd.toml"


def remove(machine: Machine, *options: str) -> str:
    return machine.run("apt-get", *(options or ("remove",)), "-y", "-q", "snatd")


def test_a_removal_waits_for_the_lock_and_writes_no_colours(node: Node) -> None:
    machine = node.machine
    node.add_broad("legacy")
    node.wait_for_repair("legacy")
    holder = machine.popen("flock", "--no-fork", "/run/xtables.lock", "sleep", "infinity")
    held = ("flock", "--nonblock", "/run/xtables.lock", "true")
    until(lambda: machine.try_to(*held).returncode == 1, "the lock held")
    ours, theirs = pty.openpty()
    removal = subprocess.Popen(
        machine.command("apt-get", "remove", "-y", "-q", "snatd"), stdin=theirs, stdout=theirs
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    said = b""

    def hears(text: bytes) -> bool:
        """True at the end too, when the other side is closed."""
        nonlocal said
        try:
            said += os.read(ours, 65536)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return text in said

    until(lambda: hears(b"snatd: tries again: ipv4 legacy: /run/xtables.lock is held by"), "it")
    # Longer than any one look at the lock.
    time.sleep(7)
    assert removal.poll() is None
    machine.run("pkill", "--exact", "sleep")
    holder.wait(10)
    until(lambda: hears(b"what is never said"), "the end", 30)
    assert removal.wait(30) == 0
    assert f"+ -A POSTROUTING {BROAD}".encode() in said
    assert b"\x1b[3" not in said
    assert b"NOT ALL" not in said
    assert node.rules("legacy") == [BROAD]
    os.close(ours)


def test_what_could_not_be_put_back_is_told_and_stays_known(node: Node, packages: Packages) -> None:
    machine = node.machine
    node.add_broad()
    node.wait_for_repair()
    # A native rule, for which iptables-nft cannot read the table.
    machine.run("nft", "add", "rule", "ip", "nat", "POSTROUTING", "ct", "mark", "set", "1")
    assert "incompatible" in machine.try_to("iptables-nft", "-t", "nat", "-S").stdout
    said = remove(machine)
    assert "not reverted: ipv4 nft" in said
    assert "snatd: NOT ALL WAS PUT BACK" in said
    for tool in (
        "iptables-nft",
        "iptables-legacy",
        "ip6tables-nft",
        "ip6tables-legacy",
        "nft list",
    ):
        assert tool in said
    said = remove(machine, "purge")
    assert "snatd: /var/lib/snatd stays" in said
    left = machine.run("ls", "-A", "/var/lib/snatd").split()
    assert left == ["not-reverted", "replaced.json"]
    assert not machine.path("/etc/snatd").exists()
    # What was said: install it again, and try again.
    listed = machine.run("nft", "-a", "list", "chain", "ip", "nat", "POSTROUTING")
    handle = re.search(r"ct mark set .*# handle (\d+)", listed)
    assert handle is not None
    machine.run("nft", "delete", "rule", "ip", "nat", "POSTROUTING", "handle", handle[1])
    install(machine, packages.deb)
    machine.run("systemctl", "stop", "snatd")
    machine.run("snatd", "revert")
    assert node.rules() == [BROAD]
    remove(machine, "purge")
    assert not machine.path("/var/lib/snatd").exists()


def test_an_apply_that_waits_is_told_no_by_a_removal(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    machine.run("systemctl", "stop", "snatd")
    node.add_broad()
    machine.run("nft", "delete", "table", "ip", "snatd")
    waiting = machine.popen("snatd", "apply", "--confirm", "3600")
    until(lambda: machine.path("/run/snatd/confirm.sock").exists(), "apply")
    until(lambda: node.rules() == [NARROW], "what it does")
    said = remove(machine)
    assert "snatd: told the `apply --confirm` that waits as pid" in said
    assert "NOT ALL" not in said
    assert waiting.wait(10) == 1
    assert node.rules() == [BROAD]
    assert "snatd" not in machine.run("nft", "list", "ruleset")


def test_a_guard_that_cannot_be_removed_is_told(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    machine.run("mv", "/usr/sbin/nft", "/usr/sbin/away")
    said = remove(machine)
    machine.run("mv", "/usr/sbin/away", "/usr/sbin/nft")
    assert "ipv4 guard: not looked for, since nft is not installed" in said
    remedy = "nft delete table ip snatd"
    assert f"`{remedy}` removes it" in said
    machine.run(*remedy.split())


def test_a_purge_takes_the_backups_of_saved_rules_along(off: Node) -> None:
    """One is like its file again, one is not, and one is of a file that the node names itself."""
    saved = f"*nat\n-A POSTROUTING {BROAD}\nCOMMIT\n"
    by_hand = saved.replace("-j MASQUERADE", "--jump MASQUERADE")
    off.boot()
    machine = off.machine
    for folder, text in (("/etc/iptables", saved), ("/etc/sysconfig", by_hand), ("/srv", by_hand)):
        machine.path(folder).mkdir(exist_ok=True)
        name = "rules.v4" if folder != "/etc/sysconfig" else "iptables"
        machine.path(f"{folder}/{name}").write_text(text)
    machine.run("systemctl", "restart", "snatd")  # that it may write to the new folders
    off.network()
    off.lease()
    paths = ["/etc/iptables/rules.v4", "/etc/sysconfig/iptables", "/srv/rules.v4"]
    backups = [machine.path(f"{one}.snatd-backup") for one in paths]
    until(lambda: backups[0].exists() and backups[1].exists(), "the backups", 30)
    machine.path(FILE).write_text("saved_rules = '/srv/rules.v4'\nstate_dir = '/srv/state'\n")
    machine.run("systemctl", "stop", "snatd")
    machine.run("snatd", "save")
    assert backups[2].exists()
    # The other two are no longer looked after; as they were they are put back by hand.
    machine.path(paths[0]).write_text(saved)
    said = remove(machine)
    assert (
        f"{paths[1]}.snatd-backup stays until a purge: the file as it was before snatd edited it"
        in said
    )
    assert said.count("before snatd") == 2, "of the other one too, once each"
    assert [one.exists() for one in backups] == [False, True, True]
    assert BROAD in machine.path("/srv/rules.v4").read_text()
    remove(machine, "purge")
    assert [one.exists() for one in backups] == [False, False, False]
    assert machine.run("ls", "-A", "/srv/state") == ""
    assert not machine.path("/var/lib/snatd").exists()


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
    (circle,) = re.findall("^snatd: the order of these units is a circle: (.*)", said, re.M)
    assert {"docker.service", "netfilter-persistent.service"} <= {*circle.split()}
    assert f"systemctl cat {circle.strip()} | grep -E '^(# /|After=)'\n" in said
    check_order = "/usr/libexec/snatd/check-order"
    assert machine.try_to(check_order).returncode == 1
    # What an editor would do, without a terminal.
    assert "systemctl edit --full snatd " in said
    own = "/etc/systemd/system/snatd.service"
    machine.shell(f"systemctl cat snatd | sed /^After=/d >{own}; systemctl daemon-reload")
    assert machine.run(check_order) == ""
    machine.run("rm", own)
    drop_in.unlink()
    machine.run("systemctl", "daemon-reload")
    assert machine.run(check_order) == ""
