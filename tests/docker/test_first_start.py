"""The first start of Docker on a node where snatd waits for it already, as at a boot."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.docker.conftest import unpacked
from tests.docker.world import ENOUGH, World


@pytest.mark.parametrize("backend", ["nft", "legacy"])
def test_the_first_call_ever_is_right(work: Path, backend: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=work))
    with World(unpacked("bookworm", work), folder, backend, with_snatd=True) as world:
        for snatd in world.snatds:
            snatd.start()
            assert snatd.command("check").returncode == 3, "waiting for a bridge"
        world.start_neighbour()
        world.node.start()
        with world.step("first start"):
            world.start_caller()
        step = world.steps["first start"]
        assert set(step.called_by) == {world.node.address_of("caller")}
        assert (set(step.outside), step.bare) == ({world.node.address}, 0)
        assert step.outside[world.node.address] >= ENOUGH
        assert all(snatd.command("check").returncode == 0 for snatd in world.snatds)
        assert all(node.narrowed() for node in world.nodes)
