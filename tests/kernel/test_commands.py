"""The commands of an operator: what they print, what they return, what they put back."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.test_packets import NARROW, add, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import SNATD, Snatd

SNAT_OPTIONS = "--to-source 10.4.7.21 --random-fully --persistent"


@pytest.fixture
def node(lab: Lab) -> Node:
    lab.nodes[0].write_lease()
    return lab.nodes[0]


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path) as snatd:
        yield snatd


def broad(node: Node) -> str:
    return " ".join(node.broad_rule)


def test_check_prints_the_difference_and_changes_nothing(
    node: Node, snatd: Snatd, backend: str
) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    done = snatd.command("check")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert f"ipv4 {backend}:" in lines
    assert f"- -A POSTROUTING {broad(node)}" in lines
    assert f"+ -A POSTROUTING {NARROW}" in lines
    assert any(line.startswith("  because it hides the addresses") for line in lines)
    assert rules(node) == [broad(node)]
    document = snatd.json("check")
    assert document["in_sync"] is False
    assert [one["backend"] for one in document["plan"]] == ["guard", backend]


def test_check_creates_no_table(node: Node, snatd: Snatd) -> None:
    for _ in range(2):
        assert snatd.command("check").returncode == 1
    assert node.host.run("nft", "list", "ruleset") == ""
    for name in ("ip_tables_names", "ip6_tables_names"):
        assert node.host.run("cat", f"/proc/net/{name}") == ""


def test_apply_says_what_it_did_and_is_done(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    done = snatd.command("apply")
    assert done.returncode == 0
    assert f"+ -A POSTROUTING {NARROW}" in done.stdout
    again = snatd.json("apply")
    assert again["applied"] == []
    assert again["in_sync"] is True


def test_apply_beside_the_daemon(snatd: Snatd) -> None:
    snatd.start()
    assert snatd.command("apply").returncode == 0


@pytest.mark.parametrize("copies", [1, 3])
def test_revert_puts_back_text_place_and_copies(node: Node, snatd: Snatd, copies: int) -> None:
    add(node, "-A", "POSTROUTING", "-s", "1.2.3.4/32", "-j", "RETURN")
    for _ in range(copies):
        add(node, "-A", "POSTROUTING", *node.broad_rule)
    add(node, "-A", "POSTROUTING", "-s", "5.6.7.8/32", "-j", "RETURN")
    before = rules(node)
    assert snatd.command("apply").returncode == 0
    assert rules(node) != before
    done = snatd.command("revert")
    assert done.returncode == 0, done.stderr
    assert rules(node) == before
    assert not (snatd.folder / "state" / "replaced.json").exists()


def test_revert_puts_back_an_snat_with_its_options(node: Node, snatd: Snatd) -> None:
    rule = f"-s {node.subnet} ! -o docker0 -j SNAT {SNAT_OPTIONS}"
    add(node, "-A", "POSTROUTING", *rule.split(" "))
    assert snatd.command("apply").returncode == 0
    snatd.write_config(networks=["192.168.0.0/16"])
    assert snatd.command("apply").returncode == 0
    assert snatd.command("revert").returncode == 0
    assert rules(node) == [rule]
    assert "SNATD-" not in node.host.run("iptables", "-w", "5", "-t", "nat", "-S")


def test_revert_where_there_was_none_leaves_none(node: Node, snatd: Snatd) -> None:
    assert snatd.command("apply").returncode == 0
    assert rules(node) == [NARROW]
    assert snatd.json("revert")["problems"] == []
    assert rules(node) == []
    assert snatd.command("revert").stdout == "nothing of snatd's is here\n"


def test_revert_without_a_memory_does_not_take_the_egress_away(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply").returncode == 0
    (snatd.folder / "state" / "replaced.json").write_text("{")
    assert snatd.command("revert").returncode == 0
    assert rules(node) == [broad(node)]


def test_revert_does_not_replay_a_memory_of_another_subnet(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply").returncode == 0
    node.write_lease("172.9.0.0/16", subnet="172.9.3.1/24")
    assert snatd.command("revert").returncode == 0
    assert rules(node) == []


def test_revert_removes_a_chain_that_nothing_jumps_to(node: Node, snatd: Snatd) -> None:
    snatd.write_config(networks=["192.168.0.0/16"])
    assert snatd.command("apply").returncode == 0
    add(node, "-F", "POSTROUTING")
    # Something of another owner, so that the table stays in use.
    add(node, "-A", "POSTROUTING", "-s", "1.2.3.4/32", "-j", "RETURN")
    assert snatd.command("revert").returncode == 0
    assert "SNATD-" not in node.host.run("iptables", "-w", "5", "-t", "nat", "-S")


def test_revert_refuses_while_the_daemon_runs(node: Node, snatd: Snatd) -> None:
    snatd.start()
    done = snatd.command("revert")
    assert done.returncode == 1
    assert f"pid {snatd.pid}" in done.stderr
    assert rules(node) == [NARROW]


def _applying(snatd: Snatd, seconds: int, **options: object) -> subprocess.Popen[bytes]:
    arguments = ("apply", "--config", str(snatd.config), "--confirm", str(seconds))
    return snatd.host.popen(SNATD, *arguments, stderr=subprocess.PIPE, **options)


def test_an_unconfirmed_apply_is_put_back(node: Node, snatd: Snatd) -> None:
    before = [broad(node), "-s 1.2.3.4/32 -j RETURN", broad(node)]
    for rule in before:
        add(node, "-A", "POSTROUTING", *rule.split(" "))
    done = snatd.command("apply", "--confirm", "1")
    assert done.returncode == 1
    assert "not confirmed" in done.stderr
    assert rules(node) == before


def test_an_unconfirmed_apply_leaves_no_memory(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply", "--confirm", "1").returncode == 1
    add(node, "-D", "POSTROUTING", *node.broad_rule)
    assert snatd.command("revert").returncode == 0
    assert rules(node) == []


def test_what_cannot_be_put_back_is_said(nft_lab: Lab, tmp_path: Path) -> None:
    """A tool that breaks while somebody thinks about it."""
    node = nft_lab.nodes[0]
    node.write_lease()
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    folder = tmp_path / "shim"
    folder.mkdir()
    node.host.use_iptables(folder)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        process = _applying(snatd, 60)
        stderr = process.stderr
        assert stderr is not None
        until(lambda: b"press a key" in stderr.readline(), "it")
        broken = folder / "iptables-nft-restore"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(0o755)
        process.send_signal(signal.SIGHUP)
        said = stderr.read().decode()
        assert process.wait(10) == 4
        assert "NOT put back" in said
        assert "everything is as it was" not in said
        broken.unlink()
        assert rules(node) == [NARROW]


def test_revert_tells_an_apply_that_waits_no(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    before = node.host.run("nft", "-s", "list", "ruleset")
    process = _applying(snatd, 3600)
    stderr = process.stderr
    assert stderr is not None
    until(lambda: b"press a key" in stderr.readline(), "it")
    done = snatd.command("revert")
    assert done.returncode == 0, done.stderr
    assert f"told the `apply --confirm` that waits as pid {process.pid}" in done.stderr
    assert process.wait(10) == 1
    assert b"everything is as it was before" in stderr.read()
    assert rules(node) == [broad(node)]
    assert node.host.run("nft", "-s", "list", "ruleset") == before


def test_revert_waits_for_the_lock(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule, command="iptables-legacy")
    with node.host.path("/run/xtables.lock").open() as lock:
        assert snatd.command("apply").returncode == 0
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Longer than any one look at it.
        threading.Timer(8, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        done = snatd.command("revert")
        assert done.returncode == 0, done.stderr
        said = "tries again: ipv4 legacy: /run/xtables.lock is held by pid"
        assert done.stderr.count(said) == 1
        assert rules(node, "iptables-legacy") == [broad(node)]


def test_observe_writes_nothing_by_hand_either(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd.write_config(mode="observe")
    done = snatd.command("apply")
    assert done.returncode == 1
    assert f"+ -A POSTROUTING {NARROW}" in done.stdout
    assert rules(node) == [broad(node)]


def test_a_confirmed_apply_stays(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("confirm").returncode == 1, "nothing waits yet"
    process = _applying(snatd, 30)
    until(node.host.path("/run/snatd/confirm.sock").exists, "something to confirm")
    refused = snatd.command("run")
    assert refused.returncode == 1
    assert f"snatd is already running as pid {process.pid} (" in refused.stderr
    assert "): it is an `apply --confirm` that waits: `snatd confirm`, or" in refused.stderr
    until(lambda: snatd.command("confirm").returncode == 0, "something to confirm")
    assert process.wait(10) == 0
    assert rules(node) == [NARROW]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_lost_terminal_counts_as_no(node: Node, snatd: Snatd, number: signal.Signals) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    process = _applying(snatd, 60)
    stderr = process.stderr
    assert stderr is not None
    until(lambda: b"press a key" in stderr.readline(), "it")
    process.send_signal(number)
    assert process.wait(10) == 1
    assert rules(node) == [broad(node)]


def test_a_key_confirms(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    ours, theirs = pty.openpty()
    command = [SNATD, "apply", "--config", str(snatd.config), "--confirm", "60"]
    process = subprocess.Popen(
        node.host.command(*command),
        env=node.host.environment(),
        stdin=theirs,
        stderr=subprocess.PIPE,
    )
    stderr = process.stderr
    assert stderr is not None
    until(lambda: b"press a key" in stderr.readline(), "it")
    os.write(ours, b"y")
    assert process.wait(10) == 0
    assert rules(node) == [NARROW]
    os.close(ours)
    os.close(theirs)


def test_confirm_is_refused_beside_the_daemon(snatd: Snatd) -> None:
    snatd.start()
    done = snatd.command("apply", "--confirm", "5")
    assert done.returncode == 1
    assert "stop it first" in done.stderr


def test_a_wrong_configuration_is_told_whole(snatd: Snatd) -> None:
    snatd.config.write_text('mode = "enforced"\nexclude = ["10.0.0.1/8"]\nspeed = 1\n')
    for command in ("run", "check", "apply", "revert"):
        done = snatd.command(command)
        assert done.returncode == 78
        lines = done.stderr.splitlines()
        assert len(lines) == 3
        assert all(str(snatd.config) in line for line in lines)


def test_a_named_file_that_is_missing_is_a_mistake(snatd: Snatd) -> None:
    snatd.config.unlink()
    done = snatd.command("check")
    assert done.returncode == 78
    assert "no such file" in done.stderr


def test_without_permission_it_says_so(node: Node, snatd: Snatd) -> None:
    def unprivileged(command: str) -> subprocess.CompletedProcess[str]:
        argv = node.host.command("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
        argv += ["--reuid", "0", "--clear-groups", SNATD, command, "--config", str(snatd.config)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)

    for command in ("check", "apply", "run", "revert"):
        done = unprivileged(command)
        assert done.returncode == 77, done.stderr
        assert "CAP_NET_ADMIN" in done.stderr


def test_status_needs_no_permission_and_neither_library(node: Node, snatd: Snatd) -> None:
    snatd.start()
    runtime_dir = node.host.path("/run/snatd")
    assert runtime_dir.stat().st_mode & 0o777 == 0o755
    assert (runtime_dir / "status.json").stat().st_mode & 0o777 == 0o644
    script = (
        "import sys\nfrom snatd.cli import main\n"
        f"code = main(['status', '--json', '--config', {str(snatd.config)!r}])\n"
        "assert not {'pyroute2', 'iptc'} & set(sys.modules)\nsys.exit(code)"
    )
    # Not another user: the checkout may lie where only root can look.
    no_capabilities = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    argv = node.host.command(*no_capabilities, sys.executable, "-c", script)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["running"] is True
    assert document["in_sync"] is True
    assert document["families"][0]["bridge"] == "docker0"
    for key in ("since", "repairs", "last_event", "last_pass", "rulesets", "pid", "schema"):
        assert key in document


def test_help_helps() -> None:
    done = subprocess.run([SNATD, "--help"], capture_output=True, text=True, check=True)
    for command in ("run", "check", "apply", "confirm", "status", "revert"):
        assert command in done.stdout
        one = subprocess.run([SNATD, command, "--help"], capture_output=True, text=True, check=True)
        assert "--config PATH" in one.stdout
        assert "exit status:" in one.stdout


def test_status_is_fast_enough_to_be_a_probe(snatd: Snatd) -> None:
    snatd.start()
    started_s = time.monotonic()
    assert snatd.command("status").returncode == 0
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("redirection", ["<&-", "< /etc/hostname", "2>&1 | true", "2> /dev/full"])
def test_only_a_person_confirms(node: Node, snatd: Snatd, redirection: str) -> None:
    """Not a pipe's content, not a closed descriptor; and a lost stderr does not skip the wait."""
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    node.host.run(
        "bash",
        "-c",
        f"{SNATD} apply --config {snatd.config} --confirm 1 {redirection}",
        check=False,
    )
    assert rules(node) == [broad(node)]


@pytest.mark.parametrize("redirection", ["> /dev/full", ">&-", "2>&-", "| true"])
def test_an_output_that_is_gone_stops_nothing(node: Node, snatd: Snatd, redirection: str) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    script = f"set -o pipefail; {SNATD} apply --config {snatd.config} {redirection}"
    node.host.run("bash", "-c", script)
    assert rules(node) == [NARROW]


def test_an_error_is_json_too(snatd: Snatd) -> None:
    snatd.write_config(mode="enforced")
    document = snatd.json("check")
    assert document["error"]["exit"] == 78
    assert "mode" in document["error"]["messages"][0]


def test_revert_knows_what_it_replaced_before_another_lease(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply").returncode == 0
    node.host.run("ip", "addr", "add", "172.9.3.1/24", "dev", "docker0")
    node.write_lease("172.9.0.0/16", subnet="172.9.3.1/24")
    assert snatd.command("apply").returncode == 0
    node.write_lease()
    assert snatd.command("apply").returncode == 0
    assert snatd.command("revert").returncode == 0
    assert rules(node) == [broad(node)]


def test_a_damaged_memory_is_told_and_kept(node: Node, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply").returncode == 0
    memory = snatd.folder / "state" / "replaced.json"
    memory.write_text("{")
    done = snatd.command("revert")
    assert "is damaged" in done.stderr
    assert "not remembered" in done.stdout
    assert memory.read_text() == "{"
    assert rules(node) == [broad(node)]


def test_fault_12_a_missing_tool_is_not_an_empty_table(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    hidden = tmp_path / "sbin"
    hidden.mkdir()
    for tool in Path("/usr/sbin").glob("ip*"):
        if "nft" not in os.path.basename(os.path.realpath(tool)):
            (hidden / tool.name).symlink_to(os.path.realpath(tool))
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        bind = f"mkdir /run/real && mount --bind /usr/sbin /run/real && mount --bind {hidden} "
        # The links lead to the programs where they are now.
        for link in hidden.iterdir():
            target = os.path.realpath(link).replace("/usr/sbin", "/run/real")
            link.unlink()
            link.symlink_to(target)
        node.host.shell(f"{bind} /usr/sbin")
        done = snatd.command("check")
        assert done.returncode == 4, done.stdout
        assert "iptables-nft is not installed" in done.stdout
        reverted = snatd.command("revert")
        assert reverted.returncode == 4
        assert "nothing of snatd's" not in reverted.stdout
