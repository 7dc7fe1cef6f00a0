"""Somebody flushes Docker's rules: doctor names it, and its remedy brings them back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.docker.conftest import unpacked
from tests.docker.world import World


@pytest.mark.parametrize(
    ("suite", "backend"), [("bookworm", "nft"), ("bookworm", "legacy"), ("forky", "nft")]
)
def test_flushed_rules_are_named(work: Path, suite: str, backend: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=work))
    with World(unpacked(suite, work), folder, backend, with_snatd=True) as world:
        node, (snatd, _) = world.node, world.snatds
        node.start()
        snatd.start()

        def told() -> list[str]:
            found = snatd.json("doctor")["findings"]
            return [
                line
                for one in found
                if one["name"] == "docker_rules_gone"
                for line in one["evidence"][1:]
            ]

        assert told() == []
        node.host.shell("iptables -F FORWARD")
        assert told() == ["nothing in FORWARD leads to a chain of Docker's"]
        node.host.shell("iptables -t nat -F")
        assert told()[1:] == ["nothing in nat PREROUTING leads to a chain of Docker's"]
        node.restart()
        assert told() == []
