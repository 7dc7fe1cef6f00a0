"""The saved rules files: what the node's own tools make of them, and what survives them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendFailed
from snatd.core.model import Backend, Family
from snatd.core.saved import Edited
from snatd.host.saved_rules import SavedFile, State, rewrite
from snatd.kernel.restore import check_restore
from snatd.kernel.tools import Tools
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import Namespace, until
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import SNATD, Snatd
from tests.lab.who import seen_by

BROAD = "-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"
OLD = """\
# kept by hand since 2015
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
[5:300] -A INPUT -s 192.0.2.0/24 -m comment --comment "don't \\"-j\\" \\\\ ask" -j DROP
COMMIT

*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -s 172.7.21.9/32 -d 198.51.100.0/24 -j RETURN
{broad}-A POSTROUTING -o lo -j ACCEPT
# the end
COMMIT
"""
NEW = OLD.format(broad=f"-A POSTROUTING {NARROW}\n")
V6_BROAD = "-s fd00:7:21::/64 ! -o docker0 -j MASQUERADE"
V6_NARROW = (
    "-s fd00:7:21::/64 ! -d fd00:7::/32 ! -o docker0 -m comment --comment snatd -j MASQUERADE"
)
OLD = OLD.format(broad=f"-A POSTROUTING {BROAD}\n")
V6_OLD = f"*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING {V6_BROAD}\nCOMMIT\n"
FAR_AWAY = Deadline(1e12)


@pytest.fixture
def node(lab: Lab) -> Node:
    """A node with an /etc of its own."""
    node = lab.nodes[0]
    node.host.shell("cp -a /etc /run/etc; mount --bind /run/etc /etc; rm -rf /etc/iptables")
    node.host.shell("mkdir /etc/iptables; rm -rf /etc/sysconfig")
    # As after a boot: who loaded the file brought its legacy tables into being.
    for command in ("iptables", "ip6tables"):
        node.host.shell(f"{command} -t filter -S; {command} -t nat -S")
    node.write_lease()
    return node


@pytest.fixture
def v4(node: Node) -> Path:
    """The file that netfilter-persistent loads."""
    path = node.host.path("/etc/iptables/rules.v4")
    path.write_text(OLD)
    return path


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path, resync=1) as snatd:
        yield snatd
        log = snatd.log_path.read_text() if snatd.log_path.exists() else ""
        assert "Traceback" not in log, log


def load(node: Node, path: str = "/etc/iptables/rules.v4", command: str = "iptables") -> None:
    """What iptables.service and netfilter-persistent do."""
    node.host.shell(f"{command}-restore < {path}")


@pytest.mark.usefixtures("v4")
def test_the_problem(lab: Lab, node: Node) -> None:
    load(node)
    assert seen_by(node.container, lab.nodes[1].container_address) == node.address


def test_the_file_gives_the_promised_packets(lab: Lab, node: Node, v4: Path, snatd: Snatd) -> None:
    node.write_lease(v6=True)
    v6 = node.host.path("/etc/iptables/rules.v6")
    v6.write_text(V6_OLD)
    done = snatd.command("save")
    assert done.returncode == 0, done.stderr
    assert f"- -A POSTROUTING {BROAD}\n+ -A POSTROUTING {NARROW}\n" in done.stdout
    assert v4.read_text() == NEW
    assert v6.read_text() == V6_OLD.replace(V6_BROAD, V6_NARROW)
    load(node)
    load(node, "/etc/iptables/rules.v6", "ip6tables")
    assert NARROW in rules(node)
    promises_hold(lab, v6=True)
    assert seen_by(node.container, OUTSIDE) == node.address
    assert node.host.path("/etc/iptables/rules.v4.snatd-backup").read_text() == OLD
    again = snatd.json("save")
    assert [one["state"] for one in again["saved_rules"]] == ["in line", "in line"]


@pytest.mark.usefixtures("v4")
def test_cut_outs_need_a_chain_and_load(lab: Lab, node: Node, snatd: Snatd) -> None:
    snatd.write_config(exclude=["172.7.192.0/18"])
    assert snatd.command("save").returncode == 0
    load(node)
    assert "-A SNATD-POSTROUTING -j MASQUERADE" in node.host.run("iptables-save", "-t", "nat")
    promises_hold(lab)
    assert snatd.command("check").returncode == 1, "the guard is missing, and nothing else"
    assert {one["backend"] for one in snatd.json("check")["plan"]} == {"guard"}


def test_a_saved_file_without_one_gets_ours(lab: Lab, node: Node, v4: Path, snatd: Snatd) -> None:
    v4.write_text(OLD.replace(f"-A POSTROUTING {BROAD}\n", ""))
    assert snatd.command("save").returncode == 0
    load(node)
    promises_hold(lab)
    assert snatd.command("revert").returncode == 0
    assert v4.read_text() == OLD.replace(f"-A POSTROUTING {BROAD}\n", "")


def test_dry_run_and_mode_observe_change_nothing(v4: Path, snatd: Snatd) -> None:
    before = v4.stat().st_ctime_ns
    done = snatd.command("save", "--dry-run")
    assert (done.returncode, f"+ -A POSTROUTING {NARROW}" in done.stdout) == (1, True)
    snatd.write_config(mode="observe")
    assert snatd.command("save").returncode == 1
    assert (v4.read_text(), v4.stat().st_ctime_ns) == (OLD, before)
    assert os.listdir(v4.parent) == ["rules.v4"]


def test_waiting_touches_no_file(node: Node, v4: Path, snatd: Snatd) -> None:
    node.host.path("/run/flannel/subnet.env").unlink()
    assert snatd.command("save").returncode == 3
    assert v4.read_text() == OLD


def test_revert_puts_the_file_back(node: Node, v4: Path, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply").returncode == 0
    assert snatd.command("save").returncode == 0
    assert v4.read_text() == NEW
    done = snatd.command("revert")
    assert done.returncode == 0, done.stderr
    assert "/etc/iptables/rules.v4, written" in done.stdout
    assert v4.read_text() == OLD
    assert rules(node) == [BROAD]
    assert os.listdir(snatd.folder / "state") == []
    assert os.listdir(v4.parent) == ["rules.v4"], "a backup that says the same is of no use"


def test_revert_leaves_a_backup_that_differs_and_names_it(v4: Path, snatd: Snatd) -> None:
    v4.write_text(OLD.replace("-j MASQUERADE", "--jump MASQUERADE"))
    assert snatd.command("save").returncode == 0
    backup = "/etc/iptables/rules.v4.snatd-backup"
    assert (
        f"{backup} stays: the file as it was before snatd edited it\n"
        in snatd.command("revert").stdout
    )
    assert snatd.json("revert")["backups"] == [backup]
    assert v4.read_text() == OLD
    assert "--jump" in v4.with_name("rules.v4.snatd-backup").read_text()


@pytest.mark.parametrize("had_one", [True, False])
def test_revert_of_a_file_that_the_operator_saved_from_the_kernel(
    node: Node, v4: Path, snatd: Snatd, had_one: bool
) -> None:
    if had_one:
        add(node, "-A", "POSTROUTING", *node.broad_rule)
    assert snatd.command("apply").returncode == 0
    node.host.shell("iptables-save > /etc/iptables/rules.v4")
    assert NARROW in v4.read_text()
    assert snatd.json("save")["saved_rules"][0]["state"] == "in line"
    assert snatd.command("revert").returncode == 0
    assert NARROW not in v4.read_text()
    assert (f"-A POSTROUTING {BROAD}\n" in v4.read_text()) == had_one


def test_the_files_of_iptables_services_behind_a_symlink(node: Node, snatd: Snatd) -> None:
    node.write_lease(v6=True)
    folder = node.host.path("/etc/sysconfig")
    folder.mkdir()
    (folder / "ip6tables").write_text(V6_OLD)
    (folder / "real").write_text(OLD)
    (folder / "iptables").symlink_to("real")
    snatd.start()
    until(lambda: (folder / "real").read_text() == NEW, "the real file")
    until(lambda: V6_NARROW in (folder / "ip6tables").read_text(), "that of IPv6")
    assert (folder / "iptables").is_symlink()
    assert sorted(os.listdir(folder)) == [
        *("ip6tables", "ip6tables.snatd-backup", "iptables", "real", "real.snatd-backup")
    ]


def test_full_is_the_runbooks_step(node: Node, v4: Path, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    add(node, "-N", "DOCKER")
    add(node, "-A", "DOCKER", "-i", "docker0", "-j", "RETURN")
    add(node, "-A", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "DOCKER")
    add(node, "-N", "KUBE-SVC-X")
    done = snatd.command("save", "--full")
    assert done.returncode == 0, done.stderr
    assert "freezes chains" in done.stderr
    assert "DOCKER, KUBE-SVC-X" in done.stderr
    assert "-A DOCKER -i docker0 -j RETURN\n" in v4.read_text()
    assert f"-A POSTROUTING {NARROW}\n" in v4.read_text()
    assert snatd.command("save", "--full", "--without-dynamic").returncode == 0
    text = v4.read_text()
    assert "DOCKER" not in text
    assert "KUBE" not in text
    assert f"-A POSTROUTING {NARROW}\n" in text
    load(node)
    assert rules(node) == [NARROW]


@pytest.mark.parametrize("before", ["", "*filter\n:MINE - [0:0]\nCOMMIT\n"])
def test_full_shows_what_comes_in_its_order(
    node: Node, v4: Path, snatd: Snatd, before: str
) -> None:
    """Each table whole, with its own `:INPUT` and `COMMIT`."""
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    node.host.run("iptables", "-w", "5", "-N", "MINE")
    node.host.run("iptables", "-w", "5", "-A", "MINE", "-s", "192.0.2.1", "-j", "DROP")
    v4.write_text(before)
    done = snatd.command("save", "--full", "--dry-run")
    assert done.returncode == 1, done.stderr
    _, *shown = done.stdout.splitlines()
    assert snatd.command("save", "--full").returncode == 0
    comes = [one for one in v4.read_text().splitlines() if not one.startswith("#")]
    if before:
        filters = comes.index("*filter")
        for line in before.splitlines():
            del comes[comes.index(line, filters)]
    # Some versions count what a policy let pass.
    assert uncounted(shown) == uncounted(f"+ {one}" for one in comes)


def uncounted(lines: Iterable[str]) -> list[str]:
    return [re.sub(r"\[\d+:\d+\]", "[]", one) for one in lines]


def test_full_invents_no_file(node: Node, snatd: Snatd) -> None:
    done = snatd.command("save", "--full")
    assert done.returncode == 4
    assert "/etc/iptables/rules.v4" in done.stderr
    assert os.listdir(node.host.path("/etc/iptables")) == []
    assert snatd.command("save").returncode == 0
    assert snatd.command("save", "--without-dynamic").returncode == 2


def state(snatd: Snatd) -> tuple[str, str]:
    """What the daemon says of its one file."""
    found = snatd.status().get("saved_rules") or [{"state": "", "why": ""}]
    return found[0]["state"], found[0]["why"]


def test_the_daemon_brings_the_file_in_line(lab: Lab, node: Node, v4: Path, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd.start()
    until(lambda: v4.read_text() == NEW, "the file")
    (event,) = snatd.wait_for("saved_rules_written")
    assert event["removed"] == [f"-A POSTROUTING {BROAD}"]
    assert event["added"] == [f"-A POSTROUTING {NARROW}"]
    until(lambda: state(snatd)[0] == "in line", "the next look")
    assert "saved rules  /etc/iptables/rules.v4: in line" in snatd.command("status").stdout
    # Somebody restores an old save, file and rules.
    v4.write_text(OLD)
    load(node)
    until(lambda: NARROW in rules(node) and v4.read_text() == NEW, "both again")
    promises_hold(lab)
    until(lambda: len(snatd.events("saved_rules_written")) == 2, "another event")
    assert node.host.path("/etc/iptables/rules.v4.snatd-backup").read_text() == OLD
    # What the unit does at a restart: between flush and repair there is no wrong rule any more.
    load(node)
    assert NARROW in rules(node)
    assert sorted(os.listdir(v4.parent)) == ["rules.v4", "rules.v4.snatd-backup"]


def test_it_needs_no_more_than_the_service_is_given(node: Node, v4: Path, snatd: Snatd) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    v4.write_text(OLD.partition("COMMIT\n\n")[2])
    snatd.program = ("setpriv", "--bounding-set=-all,+net_admin,+net_raw", SNATD)
    snatd.start()
    until(lambda: NARROW in v4.read_text(), "the file")
    until(lambda: state(snatd)[0] in ("written", "in line"), "the word of it")


def test_a_file_that_names_tables_nobody_uses_is_for_save_by_hand(
    node: Node, v4: Path, snatd: Snatd, backend: str
) -> None:
    v4.write_text(OLD.replace("*filter", "*security"))
    snatd.start()
    if backend == "nft":  # where a test makes no table
        until(lambda: state(snatd)[0] in ("written", "in line"), "the file")
        return
    until(lambda: state(snatd)[0] == "left alone", "the look")
    assert "run `snatd save` as root" in state(snatd)[1]
    assert snatd.command("save").returncode == 0
    assert f"-A POSTROUTING {NARROW}\n" in v4.read_text()
    assert "security" not in node.host.run("cat", "/proc/net/ip_tables_names")


def test_the_daemon_looks_no_more_often_than_needed(v4: Path, snatd: Snatd) -> None:
    snatd.start()
    until(lambda: state(snatd)[0] == "in line", "the second look")
    read_at = v4.stat().st_atime_ns
    passes = snatd.status()["passes"]
    until(lambda: snatd.status()["passes"] > passes + 2, "more passes")
    assert v4.stat().st_atime_ns == read_at, "tmpfs keeps the time of each read"


@pytest.mark.parametrize("setting", ["off", "observe"])
def test_the_daemon_keeps_its_hands_off(v4: Path, snatd: Snatd, setting: str) -> None:
    snatd.write_config(**({"saved_rules": "off"} if setting == "off" else {"mode": setting}))
    snatd.start()
    until(lambda: snatd.status()["passes"] > 2, "some passes")
    assert v4.read_text() == OLD
    assert snatd.status()["saved_rules"] == []


def test_a_configured_path(node: Node, v4: Path, snatd: Snatd) -> None:
    node.write_lease(v6=True)
    other = node.host.path("/etc/my rules.v6")
    other.write_text(V6_OLD)
    snatd.write_config(saved_rules="/etc/my rules.v6")
    snatd.start()
    until(lambda: V6_NARROW in other.read_text(), "the configured file")
    assert v4.read_text() == OLD
    snatd.write_config(saved_rules="/etc/missing")
    snatd.signal(signal.SIGHUP)
    until(lambda: state(snatd)[0] == "left alone", "the missing one")
    assert "no such file" in state(snatd)[1]
    assert not node.host.path("/etc/missing").exists()


def break_owner(_: Node, v4: Path) -> None:
    os.chown(v4, 12345, 0)


def break_text(_: Node, v4: Path) -> None:
    v4.write_text(OLD.replace("-o lo -j ACCEPT", "-o lo -j NO_SUCH_TARGET --at all"))


def break_quote(_: Node, v4: Path) -> None:
    v4.write_text(OLD.replace("-o lo", '-m comment --comment "two\nlines" -o lo'))


def break_kind(_: Node, v4: Path) -> None:
    v4.unlink()
    os.mkfifo(v4)


def break_size(_: Node, v4: Path) -> None:
    with v4.open("ab") as file:
        file.truncate(17 << 20)


def break_mount(node: Node, _: Path) -> None:
    node.host.shell("mount --bind /etc/iptables /etc/iptables")
    node.host.shell("mount -o remount,ro,bind /etc/iptables")


def break_disk(node: Node, v4: Path) -> None:
    node.host.shell("mount -t tmpfs -o size=8k tmpfs /etc/iptables")
    v4.write_text(OLD)
    node.host.run("dd", "if=/dev/zero", "of=/etc/iptables/ballast", "bs=4k", check=False)


Break = Callable[[Node, Path], None]


@pytest.mark.parametrize(
    ("break_it", "state_is", "why"),
    [
        (break_owner, "left alone", "belongs to uid 12345"),
        (break_text, "left alone", "line: 14"),
        (break_quote, "left alone", "line: 1"),
        (break_kind, "left alone", "not a regular file"),
        (break_size, "left alone", "larger than 16 MiB"),
        (break_mount, "not written", "Read-only file system, or made after"),
        (break_disk, "not written", "No space left on device"),
    ],
)
def test_what_cannot_be_written_is_said_and_the_node_goes_on(
    lab: Lab, node: Node, v4: Path, snatd: Snatd, break_it: Break, state_is: str, why: str
) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    break_it(node, v4)
    names = sorted(os.listdir(v4.parent))
    before = v4.read_bytes() if v4.is_file() else b""
    snatd.start()
    until(lambda: state(snatd)[0] == state_is, "the look")
    assert why in state(snatd)[1]
    assert snatd.status()["state"] == "in sync"
    assert f"saved rules /etc/iptables/rules.v4 {state_is}" in snatd.status()["status"]
    promises_hold(lab)
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair")
    assert len(snatd.events("saved_rules_left_alone")) == 1
    assert snatd.command("save").returncode == 4
    assert sorted(os.listdir(v4.parent)) == names, "nothing is left beside it"
    assert (v4.read_bytes() if v4.is_file() else b"") == before
    # Mended, it is brought in line without a restart.
    node.host.run("umount", "/etc/iptables", check=False)
    v4.unlink()
    v4.write_text(OLD)
    snatd.signal(signal.SIGHUP)
    until(lambda: v4.read_text() == NEW, "the file that was mended")


def test_a_held_lock_is_none_of_its_business(node: Node, v4: Path, snatd: Snatd) -> None:
    load(node)
    holder = node.host.popen("flock", "/run/xtables.lock", "sh", "-c", "echo; exec sleep 60",
                             stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    assert snatd.command("save").returncode == 0
    holder.kill()
    holder.wait()
    assert v4.read_text() == NEW


def kernel_state(host: Namespace) -> tuple[str, ...]:
    names = (f"cat /proc/net/{one}_tables_names" for one in ("ip", "ip6"))
    legacy = "iptables-legacy-save -c; ip6tables-legacy-save -c"
    listed = tuple(host.shell(one) for one in names)
    rules = (
        [line for line in host.shell(legacy).splitlines() if line[:1] != "#"] if any(listed) else []
    )
    return (host.run("nft", "-a", "list", "ruleset"), *listed, *rules)


@pytest.mark.parametrize("tables", [Backend.NFT, Backend.LEGACY])
@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("used", [False, True])
def test_the_test_changes_nothing(
    host: Namespace, tables: Backend, family: Family, used: bool, tmp_path: Path
) -> None:
    command = f"{family.command}-{tables.value}"
    if used:
        host.run(command, "-t", "nat", "-A", "POSTROUTING", "-o", "lo", "-j", "MASQUERADE")
        host.run(command, "-t", "filter", "-N", "MINE")
    good = b"*filter\n:INPUT DROP [7:8]\n-A INPUT -j DROP\nCOMMIT\n*nat\n-F\n-Z\n:X - [0:0]\n"
    good += b"-A POSTROUTING -j MASQUERADE\nCOMMIT\n*mangle\n-P OUTPUT DROP\nCOMMIT\n"
    before = kernel_state(host)
    heard = tmp_path / "heard"
    with heard.open("wb") as file:
        monitor = host.popen("nft", "monitor", stdout=file)

    def marked(name: str) -> str:
        """What was heard when a table of this name came and went."""
        host.run("nft", f"add table inet {name}; delete table inet {name}")
        return heard.read_text() if f"delete table inet {name}" in heard.read_text() else ""

    until(lambda: marked("first"), "the monitor")
    with host.entered():
        check_restore(family, tables, good, Tools(), FAR_AWAY)
        check_restore(family, tables, b"", Tools(), FAR_AWAY)
        with pytest.raises(BackendFailed, match=r"line: 2\Z"):
            check_restore(family, tables, b"*nat\n-A POSTROUTING -x\nCOMMIT\n", Tools(), FAR_AWAY)
    until(lambda: marked("last"), "the end")
    monitor.kill()
    monitor.wait()
    foreign = [line for line in heard.read_text().splitlines() if "generation" not in line]
    assert {line.split(" ")[-1] for line in foreign} == {"first", "last"}
    assert kernel_state(host) == before


CUT_SCRIPT = """
import os, sys
from pathlib import Path
from snatd.core.model import Family
from snatd.core.saved import Edited
from snatd.host.saved_rules import SavedFile, rewrite
def edit(content):
    return Edited(content.replace(b"old", b"new"), removed=("old",))
os.access("/marker", 0)
found = rewrite(SavedFile(Family.V4, Path(sys.argv[1])), edit, lambda _: None, lambda _: None)
os.access("/marker", 0)
print(found.state.name)
"""
_NOT_OF_FILES = {"rt_sigaction", "rt_sigprocmask", "mmap", "munmap", "brk", "futex", "access"}


def rewrite_under_strace(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = ("strace", "-qq", *options, sys.executable, "-c", CUT_SCRIPT, str(path))
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def all_new(content: bytes) -> Edited:
    return Edited(content.replace(b"old", b"new"))


def old_file(folder: Path) -> Path:
    """A saved file with all that has to be kept; a killed process left something beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / "rules.v4"
    path.write_bytes(b"old\n" * 5000)
    path.chmod(0o640)
    os.setxattr(path, "security.note", b"kept")
    (folder / ".rules.v4.snatd-4194305").write_bytes(b"half")
    return path


def steps(path: Path, log: Path) -> list[tuple[str, int]]:
    """Each system call of a rewrite, as its name and how many of that name there were before."""
    assert rewrite_under_strace(path, "-o", str(log)).stdout == "WRITTEN\n"
    names = [line.partition("(")[0] for line in log.read_text().splitlines()]
    marks = [n for n, line in enumerate(log.read_text().splitlines()) if '"/marker"' in line]
    seen = Counter(names[: marks[0]])
    found = []
    for name in names[marks[0] + 1 : marks[1]]:
        seen[name] += 1
        found.append((name, seen[name]))
    return [one for one in found if one[0] not in _NOT_OF_FILES]


@pytest.mark.parametrize("fault", ["signal=KILL", "error=EIO"])
def test_fault_21_the_power_may_be_cut_at_any_system_call(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "iptables"
    calls = steps(old_file(folder), tmp_path / "log")
    assert len(calls) > 40
    # Python 3.14 links by linkat.
    names = {name.replace("linkat", "link") for name, _ in calls}
    assert {"rename", "fsync", "link", "fchmod", "fsetxattr"} <= names
    for name, number in calls:
        path = old_file(folder)
        old, new = path.read_bytes(), path.read_bytes().replace(b"old", b"new")
        done = rewrite_under_strace(path, "-e", f"inject={name}:{fault}:when={number}")
        where = f"{name} number {number}: {done.stderr}"
        assert path.read_bytes() in (old, new), where
        backup = path.with_name("rules.v4.snatd-backup")
        assert not backup.exists() or backup.read_bytes() == old, where
        if fault != "signal=KILL":
            assert done.returncode == 0, where
        # Next time all of it is done, and nothing is left over.
        again = rewrite(SavedFile(Family.V4, path), all_new, lambda _: None, lambda _: None)
        assert again.state in (State.WRITTEN, State.IN_LINE), where
        assert path.read_bytes() == new, where
        assert backup.read_bytes() == old, where
        assert sorted(os.listdir(folder)) == ["rules.v4", "rules.v4.snatd-backup"], where
        for one in (path, backup):
            assert os.getxattr(one, "security.note") == b"kept", where
            assert one.stat().st_mode & 0o7777 == 0o640, where


def test_a_confined_service_says_what_it_cannot_test(host: Namespace) -> None:
    content = b"*nat\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n"
    code = (
        "import sys; from snatd.kernel.restore import *\n"
        f"check_restore(Family.V4, Backend.LEGACY, {content!r}, Tools(), Deadline(1e12))"
    )
    argv = ("setpriv", "--bounding-set", "-sys_admin", Path(SNATD).with_name("python"), "-c", code)
    done = subprocess.run(
        host.command(*map(str, argv)), capture_output=True, text=True, check=False
    )
    assert "run `snatd save` as root" in done.stderr
    assert host.run("cat", "/proc/net/ip_tables_names") == ""
