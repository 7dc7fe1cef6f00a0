"""The installed service on a booted systemd: what it is ordered by, says, survives and may do."""

from __future__ import annotations

import json
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest

import snatd
from snatd.host import journal
from tests import logged
from tests.lab.netns import until
from tests.logged import NOT_SHOWN
from tests.system.machine import Machine
from tests.system.node import BROAD, NARROW, Node

AFTER = {
    *("network-pre.target", "iptables.service", "ip6tables.service", "nftables.service"),
    *("netfilter-persistent.service", "firewalld.service"),
}
BEFORE = {
    *("docker.service", "containerd.service", "crio.service", "cri-docker.service"),
    *("podman.service", "kubelet.service", "k3s.service", "k3s-agent.service"),
    *("rke2-server.service", "rke2-agent.service", "nomad.service"),
}


def test_it_is_enabled_active_and_in_order(off: Node) -> None:
    off.boot()
    machine = off.machine
    assert machine.run("systemctl", "is-enabled", "snatd").strip() == "enabled"
    assert machine.run("systemctl", "is-active", "snatd").strip() == "active"
    for order, units in (("After", AFTER), ("Before", BEFORE)):
        # Debian's iptables.service is another name of netfilter-persistent.service.
        names = {machine.show(unit, "Id") for unit in units}
        assert {*machine.show("snatd", order).split()} >= names
    assert machine.run("stat", "-c", "%a %U %G", "/run/xtables.lock") == "600 root root\n"
    assert machine.run("systemctl", "--failed", "--plain", "--no-legend") == ""
    off.wait_for_status("UTC - /run/flannel/subnet.env: no such file")
    assert off.status_line().startswith("waiting since ")


def test_it_is_confined_and_verify_is_silent(off: Node) -> None:
    off.boot()
    machine = off.machine
    machine.run("systemd-analyze", "security", "--threshold=19", "snatd.service")
    assert machine.try_to("man", "--version").returncode == 127, "so it has to do without"
    assert machine.run("systemd-analyze", "verify", "--man=no", "snatd.service") == ""
    assert machine.run("/usr/libexec/snatd/check-order") == ""
    status = Path(f"/proc/{machine.pid}/root/proc/{machine.show('snatd', 'MainPID')}/status")
    capabilities = re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)$", status.read_text(), re.MULTILINE)
    assert {int(one, 16) for one in capabilities} == {1 << 12 | 1 << 13}  # NET_ADMIN, NET_RAW


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_a_broad_rule_is_narrowed_and_the_journal_tells_of_it(node: Node, backend: str) -> None:
    machine = node.machine
    node.wait_for_status("UTC - 172.7.21.0/24 keeps its address towards the rest of 172.7.0.0/16")
    assert node.status_line().startswith("in sync since ")
    if backend == "legacy":
        machine.run("update-alternatives", "--set", "iptables", "/usr/sbin/iptables-legacy")
        node.iptables("-F", "POSTROUTING", backend="nft")
    node.add_broad(backend)
    node.wait_for_repair(backend)
    node.promises_hold()
    entry = machine.event("rule_narrowed")
    assert entry["_SYSTEMD_UNIT"] == "snatd.service"
    assert entry["MESSAGE_ID"] == journal.message_id("rule_narrowed")
    assert entry["PRIORITY"] == "5"
    assert (entry["SNATD_FAMILY"], entry["SNATD_BACKEND"]) == ("ipv4", backend)
    assert entry["SNATD_REMOVED"] == f"-A POSTROUTING {BROAD}"
    assert int(entry["SNATD_DURATION_USEC"]) > 0
    assert entry["SNATD_TRIGGER"]
    if backend == "nft":
        # The kernel counts pids in its own way, not in the machine's; the name is the same.
        assert "iptables-nft" in entry["SNATD_WRITER_COMM"]
        assert entry["SNATD_WRITER_PID"]
        assert "iptables-nft (pid " in entry["MESSAGE"]
    told = machine.run("journalctl", "-x", "-b", "SNATD_EVENT=rule_narrowed", "--no-pager")
    assert "A rule that hid the addresses of containers was narrowed" in told
    assert f"    -A POSTROUTING {BROAD}" in told
    assert '"ip-masq": false' in told
    assert "snatd: " not in machine.run("snatd", "check")
    assert "in sync" in machine.run("systemctl", "status", "snatd")


_SAY = """
import json, sys
from snatd.host import journal

journal.configure("journal", "info")
for event, fields in json.load(sys.stdin):
    journal.logger().info(event, **fields)
"""


def test_journalctl_explains_each_kind_of_event_whole(off: Node) -> None:
    """With two of all that there may be several of, and with none of it: the real journalctl puts
    in one copy of a field, and the name of one that is not there."""
    off.boot()
    machine = off.machine
    kinds = logged.events()
    for whole in (True, False):
        samples = [(event, kind.sample(event, whole=whole)) for event, kind in kinds.items()]
        machine.run("python3", "-c", _SAY, stdin=json.dumps(samples))
    for event, kind in kinds.items():
        found = f"SNATD_EVENT={event}", "_COMM=python3"
        until(partial(there_are, 2, machine, *found), f"two of {event}")
        several, none = explained(off, *found)
        for text in (several, none):
            assert re.findall(r"SNATD_\w+|@\w*@|\bNone\b", text) == [], text
            assert text.startswith("Subject: ")
            assert len(text) > 100
        shown = kind.always & journal._ABSENT.keys() - NOT_SHOWN.get(event, set())
        for key in shown:
            assert f"first-{event}-{key} | second-{event}-{key}" in several, several
            assert "first-" not in none


def there_are(number: int, machine: Machine, *matches: str) -> bool:
    return len(machine.journal("-b", *matches)) == number


def explained(node: Node, *matches: str) -> list[str]:
    """What the catalog has to say of each entry."""
    told = node.machine.run("journalctl", "-x", "-b", "-q", "--no-pager", *matches)
    texts: list[list[str]] = []
    for line in told.splitlines():
        if not line.startswith("░░"):
            texts.append([])
        else:
            texts[-1].append(line.removeprefix("░░").strip())
    return ["\n".join(text) for text in texts]


def test_the_fields_of_a_repair_are_native_and_right(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    before = len(machine.journal("-b", "SNATD_EVENT=rule_narrowed"))
    machine.run("systemctl", "stop", "snatd")
    # Two copies of the broad rule, and ours is there: one that goes is not the only one.
    node.add_broad()
    node.add_broad()
    machine.run("systemctl", "start", "snatd")
    node.wait_for_repair()
    entries = machine.journal("-b", "SNATD_EVENT=rule_narrowed")
    assert len(entries) == before + 1
    fields = {name: value for name, value in entries[-1].items() if name.startswith("SNATD_")}
    duration_us = int(fields.pop("SNATD_DURATION_USEC"))
    assert 1000 < duration_us < 10_000_000
    assert fields == {
        "SNATD_EVENT": "rule_narrowed",
        "SNATD_FAMILY": "ipv4",
        "SNATD_BACKEND": "nft",
        # Of equal fields the journal keeps one, and the text has all.
        "SNATD_REMOVED": f"-A POSTROUTING {BROAD}",
        "SNATD_REMOVED_TEXT": " | ".join([f"-A POSTROUTING {BROAD}"] * 2),
        "SNATD_RULE_TEXT": "none",
        "SNATD_WHY": "it hides the addresses of 172.7.21.0/24 from 172.7.0.0/16",
        "SNATD_WHY_TEXT": "it hides the addresses of 172.7.21.0/24 from 172.7.0.0/16",
        "SNATD_TRIGGER": "start",
        "SNATD_WRITER_TEXT": "not known",
    }
    assert entries[-1]["PRIORITY"] == "5"
    assert entries[-1]["MESSAGE_ID"] == journal.message_id("rule_narrowed")
    assert entries[-1]["SYSLOG_IDENTIFIER"] == "snatd"
    (told,) = explained(node, "SNATD_EVENT=rule_narrowed", f"_PID={entries[-1]['_PID']}")
    assert " | ".join([f"-A POSTROUTING {BROAD}"] * 2) in told


def test_in_a_machine_of_its_own_it_names_the_rival_and_never_itself(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    for number in range(1, 6):
        machine.run("nft", "delete", "table", "ip", "snatd")
        node.add_broad()
        node.wait_for_repair()
        until(partial(there_are, number, machine, "SNATD_EVENT=rule_narrowed"), "the entry")
    last = machine.event("rule_narrowed")
    assert last["SNATD_WRITER_COMM"] == "iptables-nft"
    assert int(last["SNATD_WRITER_PID"]) > 0
    entries = machine.journal("-b", "-u", "snatd")
    assert "iptables-nft-re" not in {one.get("SNATD_WRITER_COMM") for one in entries}


def test_started_and_stopped_are_told_and_a_stop_leaves_the_rules(node: Node) -> None:
    node.add_broad()
    node.wait_for_repair()
    machine = node.machine
    machine.run("systemctl", "stop", "snatd")
    assert node.rules() == [NARROW]
    node.promises_hold()
    assert machine.event("stopped")["PRIORITY"] == "6"
    told = machine.run("journalctl", "-x", "-b", "SNATD_EVENT=stopped", "--no-pager")
    assert "snatd has stopped and left its rules in place" in told
    # The guard is in the kernel, and does not need the daemon.
    node.add_broad()
    node.promises_hold()


def test_fault_22_a_hang_ends_in_a_restart_by_the_watchdog(off: Node) -> None:
    drop_in = off.machine.root / "etc/systemd/system/snatd.service.d/fast.conf"
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\nRestartSec=100ms\n")
    off.boot()
    off.network()
    off.lease()
    machine = off.machine
    off.wait_for_status("in sync")
    pid = machine.show("snatd", "MainPID")
    machine.run("kill", "-STOP", pid)
    off.add_broad()
    off.promises_hold()
    until(lambda: machine.show("snatd", "MainPID") not in (pid, "0"), "another process", 20)
    off.wait_for_repair()
    off.promises_hold()
    assert machine.show("snatd", "NRestarts") == "1"
    assert machine.journal("-b", "-u", "snatd", "--grep=Watchdog timeout")


def test_fault_21_a_kill_ends_in_a_restart(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    pid = machine.show("snatd", "MainPID")
    machine.run("kill", "-KILL", pid)
    node.add_broad()
    node.promises_hold()
    until(lambda: machine.show("snatd", "ActiveState") == "active", "active again", 20)
    node.wait_for_repair()
    assert machine.show("snatd", "NRestarts") == "1"


def test_fault_24_a_broken_file_keeps_the_old_configuration_and_says_so(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    file = machine.path("/etc/snatd/snatd.toml")
    file.write_text("mode = 'watch'\n")
    machine.run("systemctl", "reload", "snatd")
    node.wait_for_status("UTC, the old one is in force - ")
    assert node.status_line().startswith("new configuration refused at ")
    entry = machine.event("configuration_refused")
    assert entry["PRIORITY"] == "3"
    assert "'watch' is none of 'enforce', 'observe'" in entry["SNATD_WHY"]
    node.add_broad()
    node.wait_for_repair()
    file.write_text("resync = 30\n")
    machine.run("systemctl", "reload", "snatd")
    until(lambda: node.status_line().startswith("in sync"), "the good configuration")
    assert machine.show("snatd", "NRestarts") == "0"
    # A restart with a broken one ends, and is not tried again.
    file.write_text("mode = 'watch'\n")
    assert machine.try_to("systemctl", "restart", "snatd").returncode != 0
    assert machine.show("snatd", "ExecMainStatus") == "78"
    assert machine.show("snatd", "ActiveState") == "failed"
    assert machine.show("snatd", "NRestarts") == "0"
    assert node.rules() == [NARROW]


def test_it_is_reloaded_without_the_program_kill(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    machine.run("rm", "/usr/bin/kill")
    machine.run("systemctl", "reload", "snatd")
    machine.event("configuration_loaded")
    assert machine.show("snatd", "NRestarts") == "0"


@pytest.mark.parametrize("read_only", [False, True])
def test_directories_that_are_missing(off: Node, read_only: bool) -> None:
    off.boot()
    off.network()
    machine = off.machine
    machine.run("systemctl", "stop", "snatd")
    machine.run("rm", "-r", "/var/lib/snatd", "/etc/snatd")
    if read_only:
        for one in ("/var/lib", "/etc"):
            machine.shell(f"mount --bind {one} {one}; mount -o remount,ro,bind {one}")
    machine.run("systemctl", "start", "snatd")
    off.add_broad()
    off.lease()
    off.wait_for_repair()
    off.promises_hold()
    assert machine.show("snatd", "NRestarts") == "0"
    assert machine.path("/var/lib/snatd/replaced.json").exists() is not read_only
    if read_only:
        assert "Read-only file system" in machine.event("state_not_kept")["MESSAGE"]


def test_fault_09_the_lock_file_removed_and_made_again(node: Node) -> None:
    """A bind of the one file would go on pointing to the one that was removed."""
    machine = node.machine
    node.iptables("-A", "POSTROUTING", "-s", "192.0.2.1", "-j", "ACCEPT", backend="legacy")
    machine.run("systemctl", "restart", "snatd")
    node.wait_for_status("in sync")
    # Removed, and snatd is the first to want it.
    machine.run("rm", "/run/xtables.lock")
    add_without_lock(node)
    until(lambda: BROAD not in rules_without_lock(node), "a repair after the lock was removed", 20)
    assert machine.run("stat", "-c", "%a %U", "/run/xtables.lock") == "600 root\n"
    # Removed, and another program makes it again.
    machine.run("rm", "/run/xtables.lock")
    node.add_broad("legacy")
    until(lambda: BROAD not in node.rules("legacy"), "a repair after the lock was made again")
    # It is the new lock that snatd takes: who holds it keeps snatd from writing, and is named.
    holder = machine.popen("flock", "--no-fork", "/run/xtables.lock", "sleep", "infinity")
    held = ("flock", "--nonblock", "/run/xtables.lock", "true")
    until(lambda: machine.try_to(*held).returncode == 1, "the lock held")
    add_without_lock(node)
    node.wait_for_status("/run/xtables.lock is held by pid", 30)
    assert BROAD in rules_without_lock(node)
    machine.run("pkill", "--exact", "sleep")
    holder.wait(10)
    until(lambda: BROAD not in node.rules("legacy"), "the repair after the lock is free", 40)


def add_without_lock(node: Node) -> None:
    command = ("env", "XTABLES_LOCKFILE=/run/other.lock", "iptables-legacy", "-t", "nat")
    node.machine.run(*command, "-A", "POSTROUTING", *BROAD.split())


def rules_without_lock(node: Node) -> list[str]:
    command = ("env", "XTABLES_LOCKFILE=/run/other.lock", "iptables-legacy", "-t", "nat")
    listed = node.machine.run(*command, "-S", "POSTROUTING").splitlines()
    return [one.removeprefix("-A POSTROUTING ") for one in listed]


def test_saved_rules_are_there_when_it_looks(off: Node) -> None:
    """The real netfilter-persistent loads a broad rule at boot, and snatd comes after it."""
    root = off.machine.root
    (root / "etc/iptables").mkdir(exist_ok=True)
    (root / "etc/iptables/rules.v4").write_text(f"*nat\n-A POSTROUTING {BROAD}\nCOMMIT\n")
    off.boot()
    machine = off.machine
    assert machine.show("netfilter-persistent", "ActiveState") == "active"
    loaded, started = (
        int(machine.show(unit, name))
        for unit, name in (
            ("netfilter-persistent", "ActiveEnterTimestampMonotonic"),
            ("snatd", "ExecMainStartTimestampMonotonic"),
        )
    )
    assert 0 < loaded <= started
    assert off.rules() == [BROAD], "without a lease nothing is touched"
    off.network()
    off.lease()
    off.wait_for_repair()
    off.promises_hold()


def test_the_writer_is_found_under_the_units_own_confinement(node: Node) -> None:
    """A root process of another unit, with all capabilities, seen from inside a unit like ours."""
    machine = node.machine
    machine.run("systemd-run", "--unit=rival", "sleep", "infinity")
    pid = machine.show("rival", "MainPID")
    unit = machine.run("systemctl", "cat", "snatd")
    script = (
        "from snatd.kernel import origin\n"
        f"print(origin.of({pid}, b'sleep'))\n"
        "print('hidepid=invisible' in open('/proc/self/mountinfo').read())\n"
    )
    machine.path("/etc/ask.py").write_text(script)
    asking = re.sub(r"^ExecStart=.*$", "ExecStart=/usr/bin/python3 /etc/ask.py", unit, flags=re.M)
    asking = re.sub(r"^(Type|NotifyAccess|Watchdog|Restart|ExecReload).*$", "", asking, flags=re.M)
    machine.path("/run/systemd/system/asking.service").write_text(asking)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "asking")
    until(lambda: len(said_by(node, "asking.service")) == 2, "an answer")
    assert said_by(node, "asking.service") == ["rival.service", "True"]


def said_by(node: Node, unit: str) -> list[str]:
    return [one["MESSAGE"] for one in node.machine.journal("-b", f"_SYSTEMD_UNIT={unit}")]


def test_what_it_sends_and_lists_works_under_its_confinement(node: Node) -> None:
    """The datagram to a neighbour, its entry in conntrack, and the list of connections."""
    machine = node.machine
    machine.run("ip", "route", "add", "172.7.22.0/24", "via", "10.4.7.22")
    node.add_broad()
    node.wait_for_repair()
    status = machine.path("/run/snatd/status.json")
    until(lambda: '"kept": true' in status.read_text(), "a probe that was kept", 20)
    assert not machine.journal("-b", "SNATD_EVENT=flows_unknown")
    assert not machine.journal("-b", "SNATD_EVENT=not_kept")
    warnings = machine.journal("-b", "-u", "snatd", "-p", "warning")
    assert [one["MESSAGE"] for one in warnings] == []


def test_fault_07_a_rival_is_fought_with_patience_and_one_line(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    machine.path("/root/rival.sh").write_text(
        f"while iptables-nft -w 5 -t nat -I POSTROUTING {BROAD}; do sleep 0.02; done\n"
    )
    machine.run("systemd-run", "--unit=rival", "sh", "/root/rival.sh")
    node.wait_for_status("fighting with iptables-nft", 60)
    before = cpu_s(node)
    node.promises_hold()
    entries = machine.journal("-b", "SNATD_EVENT=fighting")
    assert [one["PRIORITY"] for one in entries] == ["4"]
    assert int(entries[0]["SNATD_REPAIRS"]) > 20
    assert float(entries[0]["SNATD_LASTED_S"]) > 0
    assert entries[0]["SNATD_WRITER"].startswith("iptables-nft (pid ")
    (told,) = explained(node, "SNATD_EVENT=fighting")
    assert f"{entries[0]['SNATD_REPAIRS']} repairs within {entries[0]['SNATD_LASTED_S']} s" in told
    assert "The guard table meanwhile: in place" in told
    assert len(machine.journal("-b", "SNATD_EVENT=rule_narrowed")) < 60
    assert cpu_s(node) - before < 5
    machine.run("systemctl", "stop", "rival")
    peace = machine.event("fight_ended", 20)
    assert int(peace["SNATD_REPAIRS"]) >= int(entries[0]["SNATD_REPAIRS"])


def cpu_s(node: Node) -> float:
    return int(node.machine.show("snatd", "CPUUsageNSec")) / 1e9


def test_status_is_for_everybody(node: Node) -> None:
    node.wait_for_status("in sync")
    line = node.machine.run(
        "setpriv", "--reuid=65534", "--clear-groups", "snatd", "status", "--json"
    )
    assert json.loads(line)["running"] is True


def test_the_version_is_said_in_one_place(off: Node) -> None:
    off.boot()
    assert off.machine.run("snatd", "--version") == f"snatd {snatd.__version__}\n"
    assert off.machine.run("dpkg-query", "-W", "-f", "${Version}", "snatd") == snatd.__version__


def test_the_manual_renders_without_a_warning() -> None:
    for page in (Path(snatd.__file__).parents[1] / "packaging" / "man").iterdir():
        done = subprocess.run(
            ["man", "--warnings", "-l", str(page)],
            capture_output=True,
            text=True,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
            check=True,
        )
        assert done.stderr == ""
        assert "snatd" in done.stdout
