"""The real daemon's file of metrics, as Prometheus' own tool reads it; what is packaged with it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.kernel.test_packets import NARROW, add, rules
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd
from tests.lab.prometheus import DASHBOARD, RULES, promtool, values
from tests.lab.who import seen_by, seen_by_udp

FOLDER = "/run/collector"
Start = Callable[..., Snatd]


@pytest.fixture
def node(lab: Lab) -> Node:
    return prepared(lab)


def prepared(lab: Lab) -> Node:
    node = lab.nodes[0]
    node.write_lease()
    node.host.path(FOLDER).mkdir()
    return node


@pytest.fixture
def start(lab: Lab, tmp_path: Path) -> Iterator[Start]:
    """Starts daemons on the first node; ends them."""
    running: list[Snatd] = []

    def begin(**settings: object) -> Snatd:
        snatd = daemon(lab.nodes[0], tmp_path / str(len(running)), **settings)
        running.append(snatd)
        return snatd.start()

    yield begin
    for snatd in running:
        snatd.close()


def daemon(node: Node, folder: Path, **settings: object) -> Snatd:
    return Snatd(node.host, folder, metrics_textfile=f"{FOLDER}/snatd.prom", **settings)


def file(node: Node) -> Path:
    return node.host.path(f"{FOLDER}/snatd.prom")


def metrics(node: Node) -> dict[str, float]:
    return values(file(node).read_bytes())


def metric(node: Node, name: str) -> float:
    """One value, without asking promtool each time; 0 where the series is not there yet."""
    found = re.findall(rf"^snatd_{re.escape(name)} (.*)$", file(node).read_text(), re.MULTILINE)
    return float(found[0]) if found else 0.0


def settle(snatd: Snatd) -> None:
    until(lambda: snatd.status()["passes"] >= 2, "the look after the watches were set up")


def repaired(snatd: Snatd, before: int) -> bool:
    return bool(snatd.status()["repairs"] > before)


def test_a_rivals_rule_and_its_repair(lab: Lab, node: Node, start: Start, backend: str) -> None:
    snatd = start()
    settle(snatd)
    before = metrics(node)
    assert before["snatd_in_sync"] == 1
    assert file(node).stat().st_mode & 0o777 == 0o644
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair")
    writer = "iptables" if backend == "nft" else "unknown"
    mended = f'repairs_total{{family="ipv4",backend="{backend}",writer="{writer}"}}'
    until(lambda: metric(node, mended) > before.get(f"snatd_{mended}", 0), "the repair in the file")
    found = metrics(node)
    assert found[f"snatd_{mended}"] == before.get(f"snatd_{mended}", 0) + 1
    for name in ("drift_seen_total", "repair_seconds_count"):
        assert found[f"snatd_{name}"] == before[f"snatd_{name}"] + 1
    assert 0 < found["snatd_repair_seconds_sum"] - before["snatd_repair_seconds_sum"] < 3
    # A release of the lock is heard of by watchdog 5 and newer.
    lock = "xtables_lock" if int(version("watchdog").split(".")[0]) >= 5 else "legacy-digest"
    source = "nft" if backend == "nft" else lock
    heard = f'snatd_events_total{{source="{source}"}}'
    assert found[heard] > before[heard]
    assert found["snatd_pass_seconds_count"] == snatd.status()["passes"]
    assert abs(found["snatd_last_pass_timestamp_seconds"] - time.time()) < 10
    locked = found["snatd_lock_wait_seconds_count"] - before["snatd_lock_wait_seconds_count"]
    assert (locked > 0) is (backend == "legacy")
    # A new connection passes the guard; the next pass reads its counter.
    container, neighbour = node.container, lab.nodes[1]
    assert seen_by(container, neighbour.container_address) == node.container_address
    snatd.signal(signal.SIGHUP)
    kept = 'guard_connections_total{family="ipv4"}'
    until(lambda: metric(node, kept) > found[f"snatd_{kept}"], "the connection that it kept")


def test_it_outlives_the_daemon_and_the_next_begins_anew(node: Node, start: Start) -> None:
    first = start()
    settle(first)
    for number in range(1, 4):
        before = first.status()["repairs"]
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(partial(repaired, first, before), f"repair {number}")
    passes = first.status()["passes"]
    assert first.stop() == 0
    stopped = metrics(node)
    assert stopped["snatd_pass_seconds_count"] >= passes, "what was put off is written at the end"
    assert stopped["snatd_in_sync"] == 1, "its last word"
    again = start()
    settle(again)
    assert (
        metric(node, "last_pass_timestamp_seconds") > stopped["snatd_last_pass_timestamp_seconds"]
    )
    assert metric(node, "drift_seen_total") == 0
    again.process.kill()
    again.process.wait()
    killed = metrics(node)
    left = node.host.path(f"{FOLDER}/.snatd.prom.snatd-{2**22 + 1}")  # no such pid
    left.write_text("half of a file")
    third = start()
    settle(third)
    until(lambda: metrics(node) != killed, "another file")
    assert os.listdir(left.parent) == ["snatd.prom"]


def test_observe_counts_what_it_sees_once(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    with daemon(node, tmp_path, mode="observe", guard="off", probe="off", resync=1) as snatd:
        snatd.start()
        until(lambda: metric(node, "pass_seconds_count") >= 4, "some passes")
        found = metrics(node)
        assert (found["snatd_in_sync"], found["snatd_drift_seen_total"]) == (0, 1)
        assert found["snatd_repair_seconds_count"] == 0
        assert not any(series.startswith("snatd_repairs_total") for series in found)
        # Nobody's repair but an operator's; then it comes back.
        by_hand = f"*nat\n-F POSTROUTING\n-A POSTROUTING {NARROW}\nCOMMIT\n"
        node.host.run("iptables-restore", "--noflush", stdin=by_hand)
        until(lambda: metric(node, "in_sync") == 1, "the rule by hand")
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: metric(node, "in_sync") == 0, "the drift")
        assert metric(node, "drift_seen_total") == 2


def test_fault_34_a_hostile_program_forges_no_metric(nft_lab: Lab, tmp_path: Path) -> None:
    """The kernel calls it by the name of its file: any 15 bytes but NUL and slash."""
    node = prepared(nft_lab)
    name = b'x"} 1\nz\\n \xff\xfe{'
    rival = tmp_path / os.fsdecode(name)
    shutil.copy("/usr/sbin/xtables-nft-multi", rival)
    with daemon(node, tmp_path / "snatd") as snatd:
        snatd.start()
        settle(snatd)
        node.host.run(str(rival), "iptables", "-t", "nat", "-I", "POSTROUTING", *node.broad_rule)
        # Bytes that are harmful anywhere are "?" since they were heard; the others are escaped.
        mended = r'repairs_total{family="ipv4",backend="nft",writer="x\"}?1?z\\n???{"}'
        until(lambda: metric(node, mended) == 1, "its repair")
        assert metrics(node)[f"snatd_{mended}"] == 1


def test_a_held_lock_is_waited_for_and_counted(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    add(node, "-A", "POSTROUTING", *NARROW.split(" "), command="iptables-legacy")
    with daemon(node, tmp_path) as snatd, node.host.path("/run/xtables.lock").open() as lock:
        snatd.start()
        settle(snatd)
        assert metrics(node)["snatd_lock_wait_seconds_sum"] < 0.5
        fcntl.flock(lock, fcntl.LOCK_EX)
        broad = " ".join(node.broad_rule)
        node.host.shell(f"XTABLES_LOCKFILE=/dev/null iptables-legacy -t nat -I POSTROUTING {broad}")
        until(lambda: metric(node, "lock_wait_seconds_sum") > 2, "the wait", within_s=20)
        found = metrics(node)
        assert (found["snatd_problems"], found["snatd_in_sync"]) == (1, 0)
        fcntl.flock(lock, fcntl.LOCK_UN)
        until(lambda: metric(node, "in_sync") == 1, "the repair", within_s=20)
        # Since the rival's write, not since the pass that succeeded.
        assert metric(node, "repair_seconds_sum") > 2


def test_waiting_for_the_lease_is_a_hold(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    node.host.path("/run/flannel/subnet.env").unlink()
    with daemon(node, tmp_path) as snatd:
        snatd.start()
        found = metrics(node)
        assert (found["snatd_in_sync"], found["snatd_holds"], found["snatd_problems"]) == (0, 1, 0)
        node.write_lease()
        until(lambda: metric(node, "in_sync") == 1, "the lease")
        assert metric(node, "holds") == 0


def test_connections_that_are_wrong_since_before(nft_lab: Lab, tmp_path: Path) -> None:
    node, neighbour = prepared(nft_lab), nft_lab.nodes[1]
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert seen_by_udp(node.container, neighbour.container_address) == node.address
    with daemon(node, tmp_path) as snatd:
        snatd.start()
        until(lambda: metric(node, 'stale_flows{family="ipv4"}') > 0, "the one from before")
        flows = {one["family"]: one["stale"] for one in snatd.status()["flows"]}
        assert metrics(node)['snatd_stale_flows{family="ipv4"}'] == flows["ipv4"]


def test_the_guard_deleted_and_written_anew_counts_on(nft_lab: Lab, tmp_path: Path) -> None:
    node, neighbour = prepared(nft_lab), nft_lab.nodes[1]
    kept = 'guard_connections_total{family="ipv4"}'

    def connect() -> None:
        for _ in range(3):
            seen = seen_by(node.container, neighbour.container_address)
            assert seen == node.container_address

    with daemon(node, tmp_path, probe="off", resync=1) as snatd:
        snatd.start()
        settle(snatd)
        connect()
        until(lambda: metric(node, kept) == 3, "three connections")
        written = 'repairs_total{family="ipv4",backend="guard",writer="nft"}'
        node.host.run("nft", "delete", "table", "ip", "snatd")
        until(lambda: metric(node, written) == 1, "the guard written anew")
        assert metric(node, kept) == 3
        connect()
        until(lambda: metric(node, kept) == 6, "three more")
        # Another daemon: what the kernel counted before it is not its own.
        snatd.stop()
        snatd.start()
        assert metric(node, kept) == 0
        connect()
        until(lambda: metric(node, kept) == 3, "three of its own")


def test_a_fight_is_counted_and_writes_no_more_than_a_file_a_second(
    nft_lab: Lab, tmp_path: Path
) -> None:
    node = prepared(nft_lab)
    with daemon(node, tmp_path) as snatd:
        snatd.start()
        settle(snatd)
        assert (metric(node, "fighting"), metric(node, "fights_total")) == (0, 0)
        began_s = time.monotonic()
        files = set()
        while not snatd.events("fighting") and time.monotonic() < began_s + 30:
            add(node, "-I", "POSTROUTING", *node.broad_rule)
            files.add(file(node).stat().st_mtime_ns)
        assert len(files) <= time.monotonic() - began_s + 2
        until(lambda: metric(node, "fighting") == 1, "the fight in the file")
        assert metric(node, "pass_seconds_count") > 15, "it was no storm"
        assert metrics(node)["snatd_fights_total"] == 1
        until(lambda: metric(node, "fighting") == 0, "peace in the file", within_s=40)
        until(
            lambda: metric(node, "pass_seconds_count") == snatd.status()["passes"], "the last pass"
        )
        repairs = sum(
            value for name, value in metrics(node).items() if name.startswith("snatd_repairs_total")
        )
        assert repairs == snatd.status()["repairs"]


def test_what_was_put_off_is_written_without_another_reason(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    with daemon(node, tmp_path, probe="off", stale_flows="off") as snatd:
        snatd.start()
        settle(snatd)
        until(lambda: time.time() - file(node).stat().st_mtime > 1.2, "a second of quiet")
        quiet = file(node).stat().st_mtime_ns
        snatd.signal(signal.SIGUSR1)
        snatd.wait_for("summary")
        first = file(node).stat().st_mtime_ns
        assert first > quiet, "the first one at once"
        snatd.signal(signal.SIGUSR1)
        snatd.wait_for("summary", 2)
        until(lambda: file(node).stat().st_mtime_ns > first, "the second one", within_s=3)
        assert file(node).stat().st_mtime_ns - first > 0.9e9


def test_an_overflow_of_events_is_counted(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    storm = "".join(
        f"-A KUBE-SVC -d 10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32 -j RETURN\n"
        for number in range(60_000)
    )
    with daemon(node, tmp_path) as snatd:
        snatd.start()
        settle(snatd)
        snatd.signal(signal.SIGSTOP)
        for _ in range(3):
            node.host.run(
                "iptables-nft-restore",
                "--noflush",
                stdin=f"*nat\n:KUBE-SVC - [0:0]\n{storm}COMMIT\n",
            )
        snatd.signal(signal.SIGCONT)
        until(lambda: metric(node, "event_overflow_total") > 0, "the overflow")
        assert metrics(node)["snatd_in_sync"] == 1


def ends_with_78(node: Node, folder: Path, path: str) -> str:
    """What a daemon with that path says, and that it ends."""
    with Snatd(node.host, folder / Path(path).name, metrics_textfile=path) as snatd:
        done = snatd.command("run")
    assert done.returncode == 78, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"snatd: metrics_textfile: {path}")
    return line


def test_a_path_that_cannot_be_written_ends_it_with_the_remedy(
    nft_lab: Lab, tmp_path: Path
) -> None:
    node = prepared(nft_lab)
    node.host.shell(
        f"mount -t tmpfs -o ro tmpfs {FOLDER}; mkdir /run/other; cd /run/other; "
        "mkdir directory.prom; ln -s elsewhere link.prom"
    )
    line = ends_with_78(node, tmp_path, f"{FOLDER}/snatd.prom")
    assert "Read-only file system" in line
    assert (
        f"`systemctl edit snatd` with the lines `[Service]` and `ReadWritePaths={FOLDER}`" in line
    )
    assert "make the directory" in ends_with_78(node, tmp_path, "/run/missing/missing.prom")
    for name in ("directory", "link"):
        line = ends_with_78(node, tmp_path, f"/run/other/{name}.prom")
        assert "something else than a regular file" in line
    assert not node.host.path("/run/other/elsewhere").exists()
    assert NARROW not in rules(node), "it ended before it touched anything"


def test_a_reload_refuses_such_a_path_and_moves_to_a_good_one(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    with daemon(node, tmp_path, resync=1) as snatd:
        snatd.start()
        snatd.write_config(metrics_textfile="/run/missing/snatd.prom")
        snatd.signal(signal.SIGHUP)
        (refused,) = snatd.wait_for("configuration_refused")
        assert "`ReadWritePaths=/run/missing`" in refused["why"][0]
        snatd.wait_for_notification("new configuration refused at ")
        to_do = "mend the configuration as it says, then `systemctl restart snatd`"
        until(lambda: to_do in snatd.command("status").stdout, "what is to be done")
        assert '"systemctl restart snatd"' in snatd.command("doctor", "--json").stdout
        passes = metric(node, "pass_seconds_count")
        until(lambda: metric(node, "pass_seconds_count") > passes, "the old file, written on")
        node.host.path("/run/missing").mkdir()
        snatd.signal(signal.SIGHUP)
        other = node.host.path("/run/missing/snatd.prom")
        until(other.exists, "the new file")
        assert not file(node).exists(), "the node exporter might take the old one"
        assert values(other.read_bytes())["snatd_repair_seconds_count"] == 1, "it counts on"
        del snatd.settings["metrics_textfile"]
        snatd.write_config()
        snatd.signal(signal.SIGHUP)
        until(lambda: not other.exists(), "no file")


def test_a_full_disk_is_told_once_and_changes_nothing_else(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    node.host.shell(f"mount -t tmpfs -o size=64k tmpfs {FOLDER}")
    with daemon(node, tmp_path, resync=1) as snatd:
        snatd.start()
        settle(snatd)
        node.host.shell(f"cat /dev/zero >{FOLDER}/fill 2>/dev/null || true")
        old = file(node).read_bytes()
        snatd.wait_for("metrics_not_written")
        snatd.wait_for_notification(f" - metrics not written: {FOLDER}/snatd.prom: No space left")
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: rules(node) == [NARROW], "the repair")
        passes = snatd.status()["passes"]
        until(lambda: snatd.status()["passes"] >= passes + 3, "some passes")
        assert snatd.status()["metrics_problem"].endswith("No space left on device")
        assert len(snatd.events("metrics_not_written")) == 1
        assert file(node).read_bytes() == old, "the old one is whole"
        node.host.path(f"{FOLDER}/fill").unlink()
        snatd.wait_for("metrics_written")
        until(lambda: metric(node, "drift_seen_total") > 0, "the new one")
        assert os.listdir(node.host.path(FOLDER)) == ["snatd.prom"]


def test_revert_removes_it(nft_lab: Lab, tmp_path: Path) -> None:
    node = prepared(nft_lab)
    with daemon(node, tmp_path) as snatd:
        snatd.start()
        assert snatd.command("revert").returncode == 1
        assert file(node).exists()
        snatd.stop()
        reverted = snatd.command("revert")
        assert reverted.returncode == 0, reverted.stderr
        assert os.listdir(node.host.path(FOLDER)) == []


def test_the_alert_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", RULES)
    assert "SUCCESS" in promtool("test", "rules", RULES.with_suffix(".test.yml"))


def test_the_dashboards_queries_are_some(tmp_path: Path) -> None:
    """As rules, which promtool parses. YAML takes JSON."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(queries) > 10
    each = [
        {"record": f"test:query{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    rules_file = tmp_path / "queries.yml"
    rules_file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": each}]}))
    assert f"{len(queries)} rules found" in promtool("check", "rules", rules_file)
