"""Docker 28 refuses other hosts: doctor names it, and what Docker documents opens it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.conftest import unpacked
from tests.docker.dockerd import call
from tests.docker.life import OPEN
from tests.docker.world import World
from tests.lab.process import Snatd

FINDING = "direct_routing_dropped"


@pytest.fixture
def world(work: Path) -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(dir=work))
    with World(unpacked("forky", work), folder, "nft", with_snatd=True) as world:
        yield world


def findings(snatd: Snatd) -> dict[str, list[str]]:
    return {one["name"]: one["evidence"] for one in snatd.json("doctor")["findings"]}


def test_doctor_names_what_docker_28_drops(world: World) -> None:
    node, neighbour = world.node, world.neighbour
    flags, options = OPEN
    world.start_neighbour(options=options)
    node.start()
    node.make_image()
    node.serve("caller")
    for snatd in world.snatds:
        snatd.start()
    assert "TimeoutError" in call(node.pid_of("caller"), world.web, 80)
    assert findings(world.snatds[1])[FINDING] == [
        f"ip raw PREROUTING rule 1 (as Docker writes it): -d {world.web}/32 ! -i docker0 -j DROP"
    ]
    own = node.address_of("caller")
    assert any(f"-d {own}/32" in one for one in findings(world.snatds[0])[FINDING])

    neighbour.remove("web")
    node.restart(*flags)
    neighbour.stop()
    world.start_neighbour(*flags, options=options)
    node.docker("start", "caller")
    assert FINDING not in findings(world.snatds[0])
    assert FINDING not in findings(world.snatds[1])
    begin = world.seen()
    assert call(node.pid_of("caller"), world.web, 80) == "yes"
    assert set(world.since(begin)[0]) == {own}


def test_the_commands_of_its_remedy_open_it_too(world: World) -> None:
    node = world.node
    world.start_neighbour(options=OPEN[1])
    node.start()
    node.make_image()
    node.serve("caller")
    for snatd, docker in zip(world.snatds, world.nodes, strict=True):
        snatd.start()
        (one,) = (one for one in snatd.json("doctor")["findings"] if one["name"] == FINDING)
        for command in one["remedy"]:
            docker.host.shell(command)
        assert FINDING not in findings(snatd)
    begin = world.seen()
    assert call(node.pid_of("caller"), world.web, 80) == "yes"
    assert set(world.since(begin)[0]) == {node.address_of("caller")}
