"""podman with netavark, on a network that is the node's flannel subnet."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.lab.netns import Net, Place, until
from tests.lab.network import OUTSIDE, Lab
from tests.lab.process import Snatd
from tests.lab.who import PORT, WhoServer, census, seen_by, seen_by_udp
from tests.others.installed import Installed, rules_of_others

IMAGE = """
mkdir -p /image/bin
ln /bin/busybox /image/bin/sleep
tar -C /image -c . | podman --log-level error import -q - image >/run/image
"""


class Podman:
    def __init__(self, programs: Installed, driver: str) -> None:
        self.programs = programs
        settings = programs.path("/etc/containers/containers.conf")
        settings.write_text(f'[network]\nfirewall_driver = "{driver}"\n')
        programs.run("sh", "-euc", IMAGE)

    def run(self, *words: str) -> str:
        return self.programs.run("podman", *words).strip()

    def network(self) -> None:
        subnet = ("--subnet", "172.7.21.0/24", "--gateway", "172.7.21.1")
        self.run("network", "create", "--disable-dns", *subnet, "flannel")

    def start(self, name: str, address: str, *words: str) -> Net:
        options = ("--name", name, "--network", "flannel", "--ip", address, "--cgroups=disabled")
        self.run("run", "-d", *options, *words, "image", "/bin/sleep", "3600")
        pid = self.run("inspect", "-f", "{{.State.Pid}}", name)
        return Net(Path(f"/proc/{pid}/ns/net"))

    def remove(self, name: str) -> None:
        self.run("rm", "-f", "-t", "0", name)


CASES = (
    ("trixie", "nftables", "nft"),
    ("trixie", "iptables", "nft"),
    ("trixie", "iptables", "legacy"),
    ("forky", "nftables", "nft"),
)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Path, str, str]:
    suite, driver, backend = request.param
    return request.getfixturevalue(suite), driver, backend


@pytest.fixture
def lab(case: tuple[Path, str, str]) -> Iterator[Lab]:
    with Lab(case[2]) as lab:
        lab.nodes[0].host.run("ip", "link", "del", "docker0")
        lab.nodes[0].write_lease()
        yield lab


@pytest.fixture
def podman(lab: Lab, case: tuple[Path, str, str]) -> Iterator[Podman]:
    tree, driver, backend = case
    programs = Installed(lab.nodes[0].host, tree, backend)
    try:
        yield Podman(programs, driver)
    finally:
        programs.close()


def calls_are_right(lab: Lab, container: Net, address: str) -> None:
    node, neighbour = lab.nodes
    for call in (seen_by, seen_by_udp):
        assert call(container, neighbour.container_address) == address
        assert call(container, OUTSIDE) == node.address


def published(lab: Lab, one: Net, two: Net) -> dict[str, str | None]:
    """As whom the published port of `one` is called at the node's address."""
    node, neighbour = lab.nodes
    callers: dict[str, Place] = {
        "outside": lab.outside,
        "another node's container": neighbour.container,
        "a container of this node": two,
    }
    with closing(WhoServer(one, "172.7.21.2")):
        return {name: seen_by(place, node.address) for name, place in callers.items()}


def come_and_go(podman: Podman) -> None:
    """Each removes netavark's rules of a container and writes them again."""
    for _ in range(5):
        podman.start("two", "172.7.21.3")
        podman.remove("two")


def test_podman(lab: Lab, podman: Podman, tmp_path: Path) -> None:
    node, neighbour = lab.nodes
    port = ("-p", f"{PORT}:{PORT}")
    podman.network()

    # Without snatd: the problem, and the rules as netavark wants them.
    one = podman.start("one", "172.7.21.2", *port)
    assert seen_by(one, neighbour.container_address) == node.address
    with_one = rules_of_others(node.host)
    two = podman.start("two", "172.7.21.3")
    calls = published(lab, one, two)
    # netavark marks what comes from its own network, to be masqueraded.
    assert calls == {
        "outside": "10.4.7.100",
        "another node's container": neighbour.container_address,
        "a container of this node": "172.7.21.1",
    }
    podman.remove("one")
    podman.remove("two")
    with_none = rules_of_others(node.host)
    assert "172.7.21." in str(with_one)
    assert "172.7.21." not in str(with_none)

    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        one = podman.start("one", "172.7.21.2", *port)
        calls_are_right(lab, one, "172.7.21.2")
        until(lambda: snatd.status()["in_sync"], "the bridge found")
        assert rules_of_others(node.host) == with_one

        with ThreadPoolExecutor() as pool:
            coming = pool.submit(come_and_go, podman)
            places = (neighbour.container_address, OUTSIDE)
            seen = census(one, places, lambda _: not coming.done(), first_port=20000)
            coming.result()
        assert set(seen) == {(places[0], "172.7.21.2"), (places[1], node.address)}, seen
        two = podman.start("two", "172.7.21.3")
        calls_are_right(lab, two, "172.7.21.3")
        assert published(lab, one, two) == calls

        podman.remove("one")
        podman.remove("two")
        assert rules_of_others(node.host) == with_none
        assert {one["level"] for one in snatd.events()} == {"info"}, snatd.events()
        assert snatd.stop() == 0

    # The guard stays, and so the address.
    one = podman.start("one", "172.7.21.2", *port)
    calls_are_right(lab, one, "172.7.21.2")
    assert rules_of_others(node.host) == with_one
    podman.remove("one")
