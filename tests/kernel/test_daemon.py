"""The real daemon as a process: what wakes it, what it says, what it survives."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import seen_by

Start = Callable[..., Snatd]


@pytest.fixture
def node(lab: Lab) -> Node:
    return lab.nodes[0]


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Iterator[Start]:
    """Starts daemons on the first node; ends them."""
    running: list[Snatd] = []

    def begin(**settings: object) -> Snatd:
        snatd = Snatd(lab.nodes[0].host, tmp_path / str(len(running)), **settings)
        running.append(snatd)
        return snatd.start()

    yield begin
    for snatd in running:
        snatd.close()
        log = snatd.log_path.read_text() if snatd.log_path.exists() else ""
        assert "Traceback" not in log, log


def test_fault_03_a_rule_put_back_is_narrowed_and_its_writer_named(
    lab: Lab, node: Node, start: Start, backend: str
) -> None:
    node.write_lease()
    snatd = start()
    until(lambda: rules(node) == [NARROW], "our rule")
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair", within_s=2)
    event = snatd.wait_for("rule_narrowed")[-1]
    assert event["removed"] == [f"-A POSTROUTING {' '.join(node.broad_rule)}"]
    assert (event["family"], event["backend"]) == ("ipv4", backend)
    if backend == "legacy":
        # Somebody who writes to nf_tables at the same time has not written this rule.
        node.host.shell(
            "nft add table ip other;"
            "nft add chain ip other p '{ type nat hook postrouting priority 200; }';"
            f"iptables -w 5 -t nat -I POSTROUTING {' '.join(node.broad_rule)}"
        )
        assert "writer" not in snatd.wait_for("rule_narrowed", 2)[-1]
    if backend == "nft":  # nf_tables tells who committed; ip_tables does not
        assert event["writer"].startswith("iptables (pid ")
    promises_hold(lab)


def _namesakes(folder: Path, **tools: str) -> None:
    """Copies of tools under other names, by which the kernel then calls them."""
    folder.mkdir()
    for name, tool in tools.items():
        path = shutil.which(tool)
        assert path is not None
        shutil.copy(path, folder / name)


def test_only_who_may_have_caused_a_repair_is_named(nft_lab: Lab, tmp_path: Path) -> None:
    """Four programs write at the same moment, and two of them did no harm."""
    node = nft_lab.nodes[0]
    node.write_lease()
    tools = tmp_path / "tools"
    _namesakes(tools, harmless4="nft", harmless6="nft", culprit="iptables-nft", vandal="nft")
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        snatd.start()
        until(lambda: "watch_started" in snatd.status()["last_pass"]["trigger"], "quiet")
        snatd.signal(signal.SIGSTOP)
        base = "{ type nat hook postrouting priority srcnat; }"
        rule = " ".join(node.broad_rule)
        node.host.shell(
            f"{tools}/harmless4 'add table ip other; add chain ip other post {base}'\n"
            f"{tools}/harmless6 'add table ip6 nat; add chain ip6 nat POSTROUTING {base};"
            " add rule ip6 nat POSTROUTING counter'\n"
            f"{tools}/culprit iptables -t nat -I POSTROUTING {rule}\n"
            f"{tools}/vandal delete table ip snatd\n"
        )
        snatd.signal(signal.SIGCONT)
        (narrowed,) = snatd.wait_for("rule_narrowed")
        written = snatd.wait_for("guard_written", 2)[-1]
        assert narrowed["writer_comm"] == ["culprit"]
        assert written["writer_comm"] == ["vandal"]

        def told() -> list[list[str]]:
            latest = snatd.status()["recent_repairs"][:2]
            return [[writer["comm"] for writer in one["writers"]] for one in latest]

        # What was repaired at the start, by nobody's doing, is in the status until then.
        until(lambda: told() == [["culprit"], ["vandal"]], "the same in the status")


def test_in_a_pid_namespace_our_own_writes_are_nobodys(nft_lab: Lab, tmp_path: Path) -> None:
    """The kernel names a writer by a pid that means nothing in a container."""
    node = nft_lab.nodes[0]
    node.write_lease()
    tools = tmp_path / "tools"
    _namesakes(tools, culprit="iptables-nft", vandal="nft")
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        nested = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
        snatd.program = (*nested, *snatd.program)
        snatd.start()
        for number in range(1, 11):
            node.host.run(f"{tools}/vandal", "delete", "table", "ip", "snatd")
            snatd.wait_for("guard_written", number + 1)
            insert = ("iptables", "-t", "nat", "-I", "POSTROUTING", *node.broad_rule)
            node.host.run(f"{tools}/culprit", *insert)
            snatd.wait_for("rule_narrowed", number)
        told = snatd.events()
        assert {one for event in told for one in event.get("writer_comm", ())} == {
            "culprit",
            "vandal",
        }
        # Our own are still a look, since they cannot be told from another's for certain.
        until(lambda: (snatd.status()["last_event"] or {})["source"] == "nft", "our own, heard")
        until(lambda: snatd.status()["last_event"]["writer"] is None, "our own, without a name")
        until(lambda: snatd.status()["repairs"] == 2 + 2 * 10, "none but what was undone")


def test_fault_04_our_rule_deleted_or_all_flushed_comes_back(node: Node, start: Start) -> None:
    node.write_lease()
    start()
    add(node, "-D", "POSTROUTING", *NARROW.split(" "))
    until(lambda: NARROW in all_rules(node), "our rule after -D")
    add(node, "-F")
    until(lambda: NARROW in all_rules(node), "our rule after -F")
    node.host.run("nft", "flush", "ruleset")
    until(lambda: NARROW in all_rules(node), "our rule after nft flush ruleset")


def all_rules(node: Node) -> list[str]:
    return rules(node, "iptables-nft") + rules(node, "iptables-legacy")


def test_it_waits_for_the_lease_and_for_the_bridge(node: Node, start: Start) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    node.host.run("ip", "addr", "del", "172.7.21.1/24", "dev", "docker0")
    snatd = start()
    assert snatd.status()["state"] == "waiting"
    assert "subnet.env: no such file" in snatd.status()["headline"]
    node.write_lease()
    until(lambda: "no device carries 172.7.21.1/24" in snatd.status()["headline"], "the bridge")
    assert rules(node) == [" ".join(node.broad_rule)]
    assert snatd.command("check").returncode == 3
    node.host.run("ip", "addr", "add", "172.7.21.1/24", "dev", "docker0")
    until(lambda: rules(node) == [NARROW], "the repair")
    assert "no device carries 172.7.21.1/24" in snatd.wait_for("hold_ended")[0]["was"][0]
    snatd.wait_for("rule_narrowed")
    names = [one["event"] for one in snatd.events()]
    assert names.index("hold_ended") < names.index("rule_narrowed"), "what it had waited for"


def test_fault_24_reload_takes_a_good_configuration_and_refuses_a_bad_one(
    node: Node, start: Start
) -> None:
    node.write_lease()
    snatd = start()
    snatd.write_config(networks=["not a network"], resync="soon")
    snatd.signal(signal.SIGHUP)
    refused = snatd.wait_for("configuration_refused")[0]
    assert len(refused["why"]) == 2
    snatd.wait_for_notification("new configuration refused")
    refusal = snatd.command("status")
    assert refusal.returncode == 1
    assert "new configuration refused" in refusal.stdout
    assert rules(node) == [NARROW]
    snatd.write_config(networks=["172.9.0.0/16"], resync=60)
    snatd.signal(signal.SIGHUP)
    until(lambda: any("SNATD-POSTROUTING" in one for one in rules(node)), "the new networks")
    snatd.wait_for("configuration_loaded")
    reloading = [one for one in snatd.notifications if one.startswith("RELOADING=1")]
    assert all("\nMONOTONIC_USEC=" in one for one in reloading)


def test_usr1_writes_the_status_and_logs_a_summary(node: Node, start: Start) -> None:
    node.write_lease()
    snatd = start()
    before = snatd.status()["written_at"]
    snatd.signal(signal.SIGUSR1)
    summary = snatd.wait_for("summary")[0]
    assert re.match(r"in sync since \d\d:\d\d:\d\d UTC - 172\.7\.21\.0/24", summary["status"])
    assert snatd.status()["written_at"] > before


def test_stop_leaves_the_rules_and_says_so(node: Node, start: Start) -> None:
    node.write_lease()
    snatd = start()
    assert snatd.stop() == 0
    snatd.wait_for("stopped")
    assert rules(node) == [NARROW]
    assert snatd.command("status").returncode == 3


def test_fault_23_one_daemon_a_node(start: Start) -> None:
    snatd = start()
    second = snatd.command("run")
    assert second.returncode == 1
    assert f"already running as pid {snatd.pid}" in second.stderr


def test_fault_21_kill_minus_nine_and_a_new_start_writes_nothing_needless(
    node: Node, start: Start
) -> None:
    node.write_lease()
    first = start()
    first.process.kill()
    first.process.wait()
    assert first.command("status").returncode == 3, "a dead daemon's word is not its word"
    again = start()
    assert again.status()["in_sync"]
    assert again.status()["repairs"] == 0


def test_observe_only_says_what_it_would_do(node: Node, start: Start) -> None:
    node.write_lease()
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd = start(mode="observe")
    assert any(NARROW in line for line in snatd.wait_for("would_change")[0]["what"])
    assert rules(node) == [" ".join(node.broad_rule)]
    assert snatd.command("status").returncode == 1


def test_observe_names_who_made_it_so(node: Node, start: Start, backend: str) -> None:
    node.write_lease()
    add(node, "-A", "POSTROUTING", *NARROW.split(" "))
    snatd = start(mode="observe", guard="off")
    assert snatd.status()["in_sync"]
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    (one,) = snatd.wait_for("would_change")
    if backend == "legacy":
        assert "writer" not in one, "the kernel does not say it"
    else:
        assert one["writer"].startswith("iptables (pid ")
        assert one["writer_comm"] == ["iptables"]
    add(node, "-D", "POSTROUTING", *node.broad_rule)
    (over,) = snatd.wait_for("in_sync")
    assert "writer" not in over


def test_silence_while_in_sync(node: Node, start: Start) -> None:
    node.write_lease()
    snatd = start(resync=1)
    snatd.wait_for("rule_added")
    said = len(snatd.events())
    passes = snatd.status()["passes"]
    until(lambda: snatd.status()["passes"] >= passes + 3, "three resyncs")
    assert len(snatd.events()) == said


def test_a_native_rule_in_the_nat_table_does_not_stop_the_other_backend(
    nft_lab: Lab, tmp_path: Path
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        node.host.run(
            "nft", "add", "rule", "ip", "nat", "POSTROUTING", "oifname", "x", "masquerade"
        )
        (failed,) = snatd.wait_for("backend_failed")
        assert "ipv4 nft" in failed["what"][0]
        assert "snatd check" in failed["hint"]
        until(lambda: snatd.status()["state"] == "degraded", "it in the status file")
        assert snatd.command("check").returncode == 4
        add(node, "-A", "POSTROUTING", *node.broad_rule, command="iptables-legacy")
        until(lambda: rules(node, "iptables-legacy") == [NARROW], "legacy's repair")
        # A configuration that makes it good says so as the table itself would.
        snatd.write_config(backend="legacy")
        snatd.signal(signal.SIGHUP)
        (recovered,) = snatd.wait_for("recovered")
        assert "is incompatible, use 'nft' tool" in recovered["was"][0]


@pytest.mark.parametrize("in_use", [True, False])
def test_fault_10_a_writer_without_the_lock_is_noticed(
    nft_lab: Lab, tmp_path: Path, in_use: bool
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        if in_use:
            foreign = ("-s", "1.2.3.4/32", "-j", "RETURN")
            add(node, "-A", "POSTROUTING", *foreign, command="iptables-legacy")
        snatd.start()
        until(lambda: snatd.status()["passes"] >= 2, "the look after the watches were set up")
        # Another lock file: what a program that knows nothing of the lock looks like. The second
        # time it comes right after the repair, with the very table that was there before it.
        for number in (1, 2):
            node.host.shell(
                "XTABLES_LOCKFILE=/dev/null iptables-legacy -t nat -I POSTROUTING "
                + " ".join(node.broad_rule)
            )
            event = snatd.wait_for("rule_narrowed", number, within_s=8)[-1]
            assert {"legacy-digest", "read_back"} & {*event["trigger"].split(",")}
        assert rules(node, "iptables-legacy").count(NARROW) == 1


def test_fault_08_a_held_lock_is_waited_for_and_its_holder_named(lab: Lab, tmp_path: Path) -> None:
    node = lab.nodes[0]
    node.write_lease()
    add(node, "-A", "POSTROUTING", *node.broad_rule, command="iptables-legacy")
    with Snatd(node.host, tmp_path) as snatd, node.host.path("/run/xtables.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert snatd.command("check").returncode == 1, "looking needs no lock"
        applied = snatd.command("apply")
        assert applied.returncode == 4
        assert f"/run/xtables.lock is held by pid {os.getpid()}" in applied.stdout
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert snatd.command("apply").returncode == 0


def _shim(folder: Path, name: str, body: str) -> None:
    """Puts another program in place of a tool, for this host only."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("exec sleep 600", "did not answer within"),
        ("kill -9 $$", "killed by SIGKILL"),
        ("echo garbage", "does not begin with its head line"),
        ("true", "does not begin with its head line"),
        ('printf -- "-P POSTROUTING ACCEPT\\n-A POSTROUTING -s 172"', "in the middle of a line"),
        ("echo '-P POSTROUTING ACCEPT'; exit 3", "exit 3"),
    ],
)
def test_fault_12_a_broken_tool_is_told_and_recovered_from(
    nft_lab: Lab, tmp_path: Path, body: str, says: str
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    folder = tmp_path / "shim"
    folder.mkdir()
    node.host.use_iptables(folder)
    with Snatd(node.host, tmp_path / "snatd", resync=1) as snatd:
        snatd.start()
        assert rules(node, "iptables-nft") == [NARROW]
        _shim(folder, "iptables-nft", body)
        until(lambda: snatd.status()["state"] == "degraded", "the broken tool", within_s=20)
        assert says in snatd.status()["headline"]
        (folder / "iptables-nft").unlink()
        until(lambda: snatd.status()["in_sync"], "the recovery", within_s=20)
        assert rules(node, "iptables-nft") == [NARROW]


def test_fault_12_the_watchdog_is_fed_while_idle_and_while_a_tool_hangs(
    nft_lab: Lab, tmp_path: Path
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    folder = tmp_path / "shim"
    folder.mkdir()
    node.host.use_iptables(folder)
    with Snatd(node.host, tmp_path / "snatd", resync=1) as snatd:
        snatd.start(WATCHDOG_USEC="2000000")
        snatd.wait_for_notification("WATCHDOG=1", within_s=2)
        _shim(folder, "iptables-nft", "exec sleep 600")
        until(lambda: snatd.status()["state"] == "degraded", "the hanging tool", within_s=20)
        snatd.notifications.clear()
        snatd.wait_for_notification("WATCHDOG=1", within_s=20)


def test_fault_07_a_fight_is_backed_off_and_told_once(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        end_s = time.monotonic() + 30
        while not snatd.events("fighting") and time.monotonic() < end_s:
            add(node, "-I", "POSTROUTING", *node.broad_rule)
        (fight,) = snatd.wait_for("fighting")
        # One name for all the pids that a script's commands have.
        assert fight["writer"].startswith("iptables (pid ")
        assert fight["writer"].count("(pid ") <= 2
        assert fight["repairs"] > 20, "those that are free were used up"
        assert 0 < fight["lasted_s"] < 31
        assert fight["guard"].startswith("in place: ")
        snatd.wait_for_notification("fighting with")
        assert snatd.command("status").returncode == 1
        lines = len(snatd.events("rule_narrowed"))
        assert lines < 60
        (peace,) = snatd.wait_for("fight_ended", within_s=40)
        assert peace["repairs"] >= fight["repairs"]
        assert peace["lasted_s"] > fight["lasted_s"]
        assert peace["writer"].startswith("iptables (pid ")
        assert rules(node) == [NARROW]


def test_fault_15_a_storm_of_foreign_rules_wakes_no_pass(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    storm = "*nat\n:KUBE-SVC - [0:0]\n" + "".join(
        f"-A KUBE-SVC -d 10.96.{number // 250}.{number % 250}/32 -j RETURN\n"
        for number in range(5000)
    )
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        until(lambda: snatd.status()["passes"] >= 2, "the look after the watches were set up")
        passes = snatd.status()["passes"]
        for _ in range(3):
            node.host.run("iptables-nft-restore", "--noflush", stdin=f"{storm}COMMIT\n")
        snatd.signal(signal.SIGUSR1)
        snatd.wait_for("summary")
        assert snatd.status()["passes"] <= passes + 1
        assert snatd.status()["in_sync"]


def test_fault_03_packets_are_right_through_a_hundred_rewrites(
    lab: Lab, node: Node, start: Start
) -> None:
    node.write_lease()
    start()
    neighbour = lab.nodes[1]
    for _ in range(10):
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: rules(node) == [NARROW], "the repair")
        assert seen_by(node.container, neighbour.container_address) == node.container_address


def test_fault_12_ready_comes_in_time_although_everything_hangs(
    nft_lab: Lab, tmp_path: Path
) -> None:
    """Other services wait for it at boot."""
    node = nft_lab.nodes[0]
    node.write_lease(v6=True)
    folder = tmp_path / "shim"
    for name in ("iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"):
        _shim(folder, name, "exec sleep 600")
    node.host.use_iptables(folder)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        started_s = time.monotonic()
        snatd.start()
        assert time.monotonic() - started_s < 12
        assert snatd.status()["state"] == "degraded"


def test_the_journal_gets_native_fields(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    folder = node.host.path("/run/systemd/journal")
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(f"{folder}/socket")
        journal.settimeout(10)
        with Snatd(node.host, tmp_path, log_format="journal") as snatd:
            snatd.start()
            fields: dict[str, str] = {}
            while fields.get("SNATD_EVENT") != "rule_narrowed":
                lines = journal.recv(65536).decode().splitlines()
                fields = dict(line.split("=", 1) for line in lines)
    assert fields["PRIORITY"] == "5"
    assert fields["SNATD_RULE"] == f"-A POSTROUTING {NARROW}"
    assert fields["SNATD_BACKEND"] == "nft"
    assert fields["SNATD_FAMILY"] == "ipv4"
    assert fields["MESSAGE"].startswith("rule_narrowed: ")


def test_fault_34_a_hostile_comment_forges_no_field(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    comment = "x\nSNATD_EVENT=forged\nMESSAGE=all is well\x1b[2J\n-A POSTROUTING -j MASQUERADE"
    rule = (*node.broad_rule[:-2], "-m", "comment", "--comment", comment, "-j", "MASQUERADE")
    add(node, "-A", "POSTROUTING", *rule)
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        until(lambda: NARROW in rules(node), "ours beside it")
        # Nobody can narrow a rule that no restore can name; and nobody calls that in sync.
        (failed,) = snatd.wait_for("backend_failed")
        assert "POSTROUTING rule 1 hides the addresses of 172.7.21.0/24" in failed["what"][0]
        by_hand = re.search("`(.*)`", failed["what"][0])
        assert by_hand is not None
        checked = snatd.command("check")
        assert (checked.returncode, checked.stdout.partition(":")[0]) == (4, "degraded")
        node.host.shell(by_hand[1])
        snatd.wait_for("recovered")
        until(lambda: snatd.status()["in_sync"], "what was said to do done")
        for event in snatd.events():
            assert "\n" not in str(event)
        assert "forged" not in [event["event"] for event in snatd.events()]
        assert all("\n" not in one.partition("=")[2] for one in snatd.notifications)


def test_fault_31_ipv6_switched_off_is_skipped_and_said_once(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease(v6=True)
    node.host.shell("echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    with Snatd(node.host, tmp_path, resync=1) as snatd:
        snatd.start()
        until(lambda: snatd.status()["passes"] >= 4, "some passes")
        assert len(snatd.events("ipv6_skipped")) == 1
        assert snatd.status()["in_sync"]
        assert [one["family"] for one in snatd.status()["families"]] == ["ipv4"]


def test_the_lock_is_taken_again_when_its_directory_is_removed(
    nft_lab: Lab, tmp_path: Path
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path, resync=1) as snatd:
        snatd.start()
        shutil.rmtree(node.host.path("/run/snatd"))
        snatd.wait_for("lock_restored")
        assert snatd.command("revert").returncode == 1
        assert snatd.command("run").returncode == 1


def test_a_new_runtime_dir_waits_for_a_restart(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        snatd.write_config(runtime_dir="/run/elsewhere")
        snatd.signal(signal.SIGHUP)
        snatd.wait_for("needs_restart")
        snatd.wait_for("configuration_loaded")
        assert not node.host.path("/run/elsewhere").exists()
        assert snatd.status()["in_sync"]


def test_a_reload_at_once_does_not_end_it(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path, log_format="json") as snatd:
        snatd.start()
        for _ in range(5):
            snatd.signal(signal.SIGHUP)
        snatd.wait_for("configuration_loaded")
        assert snatd.process.poll() is None


def test_fault_28_without_a_journal_the_log_goes_to_stderr(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path, log_format="journal") as snatd:
        snatd.start()
        until(lambda: "<5>rule_added: " in snatd.log_path.read_text(), "a line with a priority")
