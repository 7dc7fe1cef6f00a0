"""The unit of a process by its control groups, and its parent where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snatd.kernel import origin


@pytest.mark.parametrize(
    ("groups", "unit"),
    [
        ("0::/system.slice/docker.service\n", "docker.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", "session-3.scope"),
        ("0::/system.slice/snatd.service/child\n", "snatd.service"),
        ("4:memory:/x.service\n1:name=systemd:/system.slice/k3s.service\n0::/\n", "k3s.service"),
        ("1:name=systemd:/\n0::/system.slice/cri-o.service\n", "cri-o.service"),
        ("4:memory:/system.slice/docker.service\n", None),
        ("0::/kubepods/burstable/pod12/34\n", None),
        ("0::/a\x1b[2J.service\n", "a?[2J.service"),
        ("", None),
        ("nonsense\n0\n0:\n", None),
    ],
)
def test_the_innermost_unit(groups: str, unit: str | None) -> None:
    assert origin.innermost_unit(groups) == unit


def process(proc: Path, pid: int, stat: bytes, groups: str = "0::/\n") -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_bytes(stat)
    (folder / "cgroup").write_text(groups)


def test_a_process_of_a_unit(tmp_path: Path) -> None:
    process(tmp_path, 812, b"812 (iptables-nft) R 700 1 1", "0::/system.slice/docker.service\n")
    assert origin.of(812, b"iptables-nft", tmp_path) == "docker.service"


def test_without_a_unit_its_parent(tmp_path: Path) -> None:
    process(tmp_path, 700, b"700 (kube proxy) S 1 1 1")
    process(tmp_path, 812, b"812 (a) b (c) R 700 1 1")
    assert origin.of(812, b"a) b (c", tmp_path) == "kube?proxy"


def test_who_is_gone_or_another_by_now_is_not_known(tmp_path: Path) -> None:
    process(tmp_path, 812, b"812 (sleep) R 700 1 1", "0::/system.slice/cron.service\n")
    assert origin.of(812, b"iptables-nft", tmp_path) is None
    assert origin.of(813, b"iptables-nft", tmp_path) is None
    process(tmp_path, 814, b"", "")
    assert origin.of(814, b"iptables-nft", tmp_path) is None


def test_the_kernels_pids_are_those_of_the_initial_namespace(tmp_path: Path) -> None:
    initial = os.readlink("/proc/self/ns/pid") == "pid:[4026531836]"
    assert origin.pids_are_the_kernels() == initial
    assert not origin.pids_are_the_kernels(tmp_path), "without /proc nobody knows"
