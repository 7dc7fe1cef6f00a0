"""The completions of the package, in the shells themselves, found by the program's name."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.netns import until
from tests.system.conftest import Packages
from tests.unit.test_documents import of_the_parser

# Tells a file what zsh is given to offer, and when that was all.
_ZSHRC = """
fpath=({vendor} $fpath)
autoload -Uz compinit
compinit -u -d {told}.dump
compadd() {{
    local -a offered
    if (( ${{@[(i)-[AOD]*]}} > $# )); then
        builtin compadd -A offered "$@"
        print -rl -- $offered >>{told}
    fi
    builtin compadd "$@"
}}
offer() {{ _main_complete; print that-is-all >>{told} }}
zle -C offer list-choices offer
bindkey '^T' offer
print ready >{told}
"""
_BASHRC = """
. /usr/share/bash-completion/bash_completion
bind -x '"\\C-t": printf "%s\\n" "$READLINE_LINE" >>{told}'
echo ready >{told}
"""


@pytest.fixture(scope="session")
def share(packages: Packages, work: Path) -> Path:
    """/usr/share of the package."""
    subprocess.run(["dpkg-deb", "-x", packages.deb, work / "unpacked"], check=True)
    return work / "unpacked" / "usr" / "share"


def environment(share: Path, folder: Path) -> dict[str, str]:
    path = f"{share.parent}/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    shell = {"HOME": str(folder), "ZDOTDIR": str(folder), "XDG_DATA_DIRS": f"{share}:/usr/share"}
    return {"PATH": path, "TERM": "vt100", "LC_ALL": "C.UTF-8", **shell}


@contextmanager
def typing(share: Path, folder: Path, keys: str, *argv: str) -> Iterator[None]:
    """A shell at a terminal that has told a file that it is ready, and gets these keys."""
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        argv,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(share, folder),
        cwd=folder,
        start_new_session=True,
    )
    try:
        until((folder / "told").exists, "the shell", 30)
        os.write(ours, keys.encode())
        yield
    finally:
        shell.kill()
        shell.wait(10)
        os.close(ours)
        os.close(theirs)


def told(folder: Path) -> list[str]:
    return (folder / "told").read_text().split("\n")[1:-1]


def zsh(share: Path, folder: Path, line: str) -> set[str]:
    vendor = share / "zsh" / "vendor-completions"
    (folder / ".zshrc").write_text(_ZSHRC.format(vendor=vendor, told=folder / "told"))
    (folder / "told").unlink(missing_ok=True)
    with typing(share, folder, f"{line}\x14", "zsh", "-d", "-i"):
        until(lambda: "that-is-all" in told(folder), f"what zsh offers for {line!r}", 30)
    return {*told(folder)} - {"that-is-all"}


def fish(share: Path, folder: Path, line: str) -> set[str]:
    done = subprocess.run(
        ["fish", "-c", 'complete -C "$argv[1]"', line],
        env=environment(share, folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return {one.partition("\t")[0] for one in done.stdout.splitlines()}


Shell = Callable[[Path, Path, str], set[str]]


@pytest.mark.parametrize("shell", [zsh, fish])
def test_what_is_offered(shell: Shell, share: Path, tmp_path: Path) -> None:
    known = of_the_parser()
    assert shell(share, tmp_path, "snatd ") - {"--help", "--version"} == {*known}
    assert shell(share, tmp_path, "snatd st") == {"status"}
    for name, options in known.items():
        assert shell(share, tmp_path, f"snatd {name} --") == options, name
    assert shell(share, tmp_path, "snatd flows --delete ") == {"udp", "all"}
    assert "lo" in shell(share, tmp_path, "snatd explain --out ")
    (tmp_path / "its.toml").touch()
    assert "its.toml" in shell(share, tmp_path, "snatd check --config ")


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("snatd sta", "snatd status "),
        ("snatd save --without", "snatd save --without-dynamic "),
        ("snatd flows --delete u", "snatd flows --delete udp "),
        ("snatd check --config it", "snatd check --config its.toml "),
    ],
)
def test_bash_completes(share: Path, tmp_path: Path, line: str, completed: str) -> None:
    (tmp_path / "its.toml").touch()
    (tmp_path / "bashrc").write_text(_BASHRC.format(told=tmp_path / "told"))
    with typing(share, tmp_path, f"{line}\t\x14", "bash", "--rcfile", "bashrc", "-i"):
        until(lambda: told(tmp_path), "the line", 30)
    assert told(tmp_path) == [completed]
