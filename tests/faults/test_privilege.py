"""Who may do what: the files that snatd makes, those that it believes, and what it gives up."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Start
from tests.faults.test_rules import settled
from tests.faults.test_tools import Shims
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import Namespace, until
from tests.lab.network import Lab, Node
from tests.lab.process import SNATD, Snatd

NOBODY = 65534
_NET_ADMIN_AND_RAW = 1 << 12 | 1 << 13


def as_nobody(host: Namespace, *argv: str) -> subprocess.CompletedProcess[str]:
    command = host.command("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    return subprocess.run(
        [*command, *argv], capture_output=True, text=True, timeout=20, check=False
    )


def capabilities(status: str) -> dict[str, int]:
    lines = [line.split(":\t") for line in status.splitlines() if line.startswith("Cap")]
    return {name: int(value, 16) for name, value in lines}


def test_it_drops_what_it_does_not_need(
    lab: Lab, start: Start, tmp_path: Path, backend: str
) -> None:
    """For itself and for the tools that it starts; and all goes on as before."""
    node = lab.nodes[0]
    node.write_lease()
    shims, seen = Shims(node, tmp_path / "shims"), tmp_path / "seen"
    tool = f"iptables-{backend}"
    put = f"cat /proc/self/status >{seen}.$$; mv {seen}.$$ {seen}"  # never half of it to read
    shims.put(tool, f'{put}; exec /usr/sbin/{tool} "$@"')
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    snatd = start(node)
    settled(snatd)
    for status in (Path(f"/proc/{snatd.pid}/status").read_text(), seen.read_text()):
        found = capabilities(status)
        assert (found["CapInh"], found["CapAmb"]) == (0, 0)
        assert {found[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {_NET_ADMIN_AND_RAW}
        assert "NoNewPrivs:\t1" in status
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: rules(node) == [NARROW], "the repair")
    until(lambda: snatd.status()["flows"], "the list of connections")
    assert snatd.events("flows_unknown") == []
    promises_hold(lab)


def test_nobody_else_writes_or_locks_its_files(node: Node, tmp_path: Path) -> None:
    """Whatever the umask is that it is started under."""
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    with Snatd(node.host, tmp_path) as snatd:
        snatd.program = ("sh", "-c", 'umask 0; exec "$@"', "sh", SNATD)
        snatd.start()
        settled(snatd)
        nobody_else(node, snatd)


def nobody_else(node: Node, snatd: Snatd) -> None:
    run = Path("/run/snatd")
    modes = {
        run: 0o755,
        run / "status.json": 0o644,
        run / "snatd.lock": 0o600,
        snatd.folder / "state": 0o755,
        snatd.folder / "state" / "replaced.json": 0o600,
    }
    for path, mode in modes.items():
        status = node.host.path(str(path)).stat()
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (mode, 0, 0), path
    for script in (
        "echo x >/run/snatd/status.json",
        "echo x >/run/snatd/snatd.lock",
        "mv /run/snatd/status.json /run/snatd/x",
        "flock --nonblock /run/snatd/snatd.lock true",
        "flock --nonblock --shared /run/snatd/snatd.lock true",
        "rm -f /run/snatd/snatd.lock",
        f"kill {snatd.pid}",
    ):
        assert as_nobody(node.host, "sh", "-c", script).returncode != 0, script
    assert as_nobody(node.host, "cat", "/run/snatd/status.json").returncode == 0
    # A lock of an older version, which anybody could take, is one no more.
    snatd.stop()
    node.host.path("/run/snatd/snatd.lock").chmod(0o666)
    snatd.start()
    assert as_nobody(node.host, "flock", "-n", "/run/snatd/snatd.lock", "true").returncode != 0


def test_nobody_else_keeps_it_from_looking(nft_lab: Lab, node: Node, start: Start) -> None:
    """Any user may lock whatever file he can open."""
    write = ("-A", "POSTROUTING", "-s", "192.0.2.1/32", "-j", "RETURN")
    add(node, *write, command="iptables-legacy")
    command = ("setpriv", f"--reuid={NOBODY}", "--clear-groups", "flock", "--no-fork")
    locks = [
        node.host.popen(*command, path, "sleep", "600")
        for path in ("/dev/null", "/run", "/run/flannel/subnet.env")
    ]
    try:
        until(lambda: all(_sleeps(one.pid) for one in locks), "the locks")
        snatd = start(node)
        settled(snatd)
        add(node, "-I", "POSTROUTING", *node.broad_rule, command="iptables-legacy")
        until(lambda: NARROW in rules(node, "iptables-legacy"), "the repair")
        assert snatd.events("backend_failed") == []
    finally:
        for one in locks:
            one.kill()
            one.wait()
    promises_hold(nft_lab)


def _sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text() == "sleep\n"


@pytest.mark.parametrize("name", ["snatd.lock", "status.json", ".status.json.snatd-{pid}"])
def test_a_symlink_in_run_is_not_followed(node: Node, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o666)
    folder = node.host.path("/run/snatd")
    folder.mkdir()
    # The daemon's pid is that of the shell that becomes it.
    script = f'ln -s {victim} /run/snatd/$(echo {name.replace("{pid}", "$$")}); exec "$@"'
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        snatd.program = ("sh", "-euc", script, "sh", SNATD)
        if name == "snatd.lock":
            done = snatd.command("run")
            assert done.returncode == 78
            assert "runtime_dir: /run/snatd/snatd.lock: Too many levels" in done.stderr
        else:
            snatd.start()
            settled(snatd)
            assert not (folder / "status.json").is_symlink()
    assert (victim.read_text(), victim.stat().st_mode & 0o777) == ("precious", 0o666)


def test_a_symlink_in_state_dir_is_not_followed(node: Node, tmp_path: Path) -> None:
    """Neither to be written nor to be believed: what it says `revert` would put into the kernel."""
    victim = tmp_path / "victim"
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        add(node, "-A", "POSTROUTING", *node.broad_rule)
        assert snatd.command("apply").returncode == 0
        memory = snatd.folder / "state" / "replaced.json"
        forged = memory.read_text().replace("! -o docker0 -j MASQUERADE", "-j ACCEPT")
        victim.write_text(forged)
        memory.unlink()
        memory.symlink_to(victim)
        reverted = snatd.command("revert")
        assert "what was there before snatd is not known" in reverted.stderr
        assert rules(node) == [" ".join(node.broad_rule)]
        assert snatd.command("apply").returncode == 0
        assert not memory.is_symlink()
    assert victim.read_text() == forged


@pytest.mark.parametrize("owner", [0, NOBODY])
def test_a_memory_that_others_can_write_is_not_believed(
    node: Node, tmp_path: Path, owner: int
) -> None:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        add(node, "-A", "POSTROUTING", *node.broad_rule)
        assert snatd.command("apply").returncode == 0
        memory = snatd.folder / "state" / "replaced.json"
        memory.write_text(memory.read_text().replace("! -o docker0 -j MASQUERADE", "-j ACCEPT"))
        os.chown(memory, owner, 0)
        memory.chmod(0o600 if owner else 0o666)
        reverted = snatd.command("revert")
        assert f"{memory} is not believed: {memory} " in reverted.stderr
        assert rules(node) == [" ".join(node.broad_rule)]


# How others come to decide what a configuration says; `path` is the file, in a folder of its own.
def _chowned(path: Path) -> None:
    os.chown(path, NOBODY, 0)


def _in_their_folder(path: Path) -> None:
    os.chown(path.parent, NOBODY, 0)


def _of_their_group(path: Path) -> None:
    os.chown(path, 0, NOBODY)
    path.chmod(0o664)


def _behind_their_link(path: Path) -> None:
    theirs = path.parent / "theirs"
    theirs.mkdir()
    (theirs / "link").symlink_to(path.rename(path.parent / "true"))
    path.symlink_to(theirs / "link")
    os.chown(theirs, NOBODY, 0)


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "writable": (lambda path: path.chmod(0o646), "{path} can be written by others (mode 0646)"),
    "of their group": (_of_their_group, "{path} can be written by others (mode 0664)"),
    "theirs": (_chowned, "{path} belongs to uid 65534"),
    "in an open folder": (
        lambda path: path.parent.chmod(0o777),
        "{path.parent} can be written by others (mode 0777)",
    ),
    "in their folder": (_in_their_folder, "{path.parent} belongs to uid 65534"),
    "behind their link": (_behind_their_link, "{path.parent}/theirs belongs to uid 65534"),
}


def test_a_configuration_that_others_can_write_is_refused(
    nft_lab: Lab, node: Node, tmp_path: Path
) -> None:
    """By each command, and by a reload: then the old one stays in force."""
    snatd = Snatd(node.host, tmp_path / "snatd")
    good = snatd.config.read_text()
    with snatd:
        snatd.start()
        settled(snatd)
        for number, (how, (make, says)) in enumerate(OTHERS.items(), 1):
            folder = tmp_path / str(number)
            folder.mkdir()
            path = folder / "snatd.toml"
            path.write_text(f"{good}networks = ['10.0.0.0/8']\n")
            make(path)
            done = check(snatd, path)
            why = f"{path}: not read, since others decide what it says, and root does it: "
            why += says.format(path=path)
            assert (done.returncode, done.stderr) == (78, f"snatd: {why}\n"), how
        # The last one in place of the daemon's.
        snatd.config.unlink()
        snatd.config.symlink_to(path)
        snatd.signal(signal.SIGHUP)
        (refused,) = snatd.wait_for("configuration_refused")
        assert "theirs belongs to uid 65534" in refused["why"][0]
        snatd.wait_for_notification("STATUS=new configuration refused at ")
        for command in ("run", "apply", "revert"):
            assert snatd.command(command).returncode == 78
        assert snatd.process.poll() is None
        assert rules(node) == [NARROW]
    promises_hold(nft_lab)


def check(snatd: Snatd, path: Path) -> subprocess.CompletedProcess[str]:
    argv = snatd.host.command(SNATD, "check", "--config", str(path))
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_runtime_dir_that_others_can_write_is_refused(
    node: Node, tmp_path: Path, mode: int
) -> None:
    folder = node.host.path("/run/theirs")
    folder.mkdir()
    os.chown(folder, 0, NOBODY)
    folder.chmod(mode)
    with Snatd(node.host, tmp_path, runtime_dir="/run/theirs") as snatd:
        done = snatd.command("run")
        assert done.returncode == 78
        assert f"runtime_dir: /run/theirs can be written by others (mode {mode:04o})" in done.stderr
        assert list(folder.iterdir()) == []


def test_only_root_confirms(node: Node, tmp_path: Path) -> None:
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    with Snatd(node.host, tmp_path) as snatd:
        argv = (SNATD, "apply", "--config", str(snatd.config), "--confirm", "60")
        waiting = node.host.popen("sh", "-c", 'umask 0; exec "$@"', "sh", *argv)
        socket = node.host.path("/run/snatd/confirm.sock")
        until(lambda: rules(node) == [NARROW] and socket.exists(), "it waits")
        status = socket.stat()
        assert (status.st_mode & 0o777, status.st_uid) == (0o600, 0)
        code = "import socket; socket.socket(socket.AF_UNIX).connect('/run/snatd/confirm.sock')"
        done = as_nobody(node.host, "/usr/bin/python3", "-c", code)
        assert "PermissionError" in done.stderr
        waiting.terminate()
        waiting.wait(20)
        assert rules(node) == [" ".join(node.broad_rule)]
