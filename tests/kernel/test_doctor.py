"""`snatd doctor` on nodes that really have the fault, and on one that has none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.test_packets import applied
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd


@pytest.fixture
def node(nft_lab: Lab, tmp_path: Path) -> Node:
    """A healthy node: what snatd keeps is in place."""
    node = nft_lab.nodes[0]
    node.write_lease()
    applied(node, tmp_path)
    return node


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        yield snatd


def found(snatd: Snatd, exit_code: int = 1) -> dict[str, dict[str, Any]]:
    """The findings by name."""
    done = snatd.command("doctor", "--json")
    assert done.returncode == exit_code, done.stdout + done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)["findings"]}


def test_a_healthy_node(snatd: Snatd) -> None:
    done = snatd.command("doctor")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing found\n", "")


def test_forwarding_off(node: Node, snatd: Snatd) -> None:
    node.host.shell("echo 0 > /proc/sys/net/ipv4/ip_forward")
    one = found(snatd)["forwarding_off"]
    assert one["evidence"] == ["net.ipv4.ip_forward = 0"]
    node.host.shell(one["remedy"][0])
    assert found(snatd, 0) == {}
