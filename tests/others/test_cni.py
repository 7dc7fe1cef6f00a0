"""The CNI plugin `bridge` with ipMasq, as flannel's plugin calls it: 250 pods come and go.

It writes one or two rules and a chain a pod, once, and its delete needs them as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.lab.netns import Net, until
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import census, seen_by, seen_by_udp
from tests.others.installed import Installed, rules_of_others

PODS = 250
# What flannel's plugin hands on where FLANNEL_IPMASQ is false.
CONFIGURATION = {
    "cniVersion": "1.0.0",
    "name": "cbr0",
    "type": "bridge",
    "bridge": "cni0",
    "mtu": 1500,
    "isGateway": True,
    "hairpinMode": True,
    "ipMasq": True,
    "ipam": {
        "type": "host-local",
        "subnet": "172.7.21.0/24",
        "routes": [{"dst": "172.7.0.0/16"}, {"dst": "0.0.0.0/0"}],
    },
}
# $1: ADD or DEL, $2: the pod. Two at once, as a kubelet does. A file a pod says that it is done.
_CALL = """
export CNI_COMMAND=$1 CNI_CONTAINERID=pod$2 CNI_NETNS=/run/netns/pod$2 CNI_IFNAME=eth0
export CNI_PATH=/usr/lib/cni
if /usr/lib/cni/bridge </run/cni.json >/run/pods/$2.part; then
    mv /run/pods/$2.part /run/pods/$1-$2
else
    echo "$1 $2:"; cat /run/pods/$2.part
fi 2>&1
"""


@dataclass(frozen=True)
class Case:
    suite: str
    masquerade: str
    backend: str


CASES = (
    Case("trixie", "iptables", "nft"),
    Case("trixie", "iptables", "legacy"),
    Case("forky", "iptables", "nft"),
    Case("forky", "nftables", "nft"),
)


class Pods:
    """Networks without anything in them, and the plugin that makes pods of them."""

    def __init__(self, programs: Installed, configuration: dict[str, object]) -> None:
        self.programs = programs
        programs.path("/run/cni.json").write_text(json.dumps(configuration))
        programs.path("/run/call").write_text(_CALL)
        programs.path("/run/pods").mkdir()
        programs.run("sh", "-euc", f"for n in $(seq {PODS}); do ip netns add pod$n; done")

    def all(self, command: str, number: int) -> Iterator[int]:
        """Does it with so many, and yields each when it is done."""
        calls = self.programs.popen(
            "sh", "-euc", f"seq {number} | xargs -P 2 -I % sh /run/call {command} %"
        )
        try:
            for pod in range(1, number + 1):
                done = self.programs.path(f"/run/pods/{command}-{pod}").exists
                until(partial(lambda done: done() or calls.poll() is not None, done), command, 60)
                assert done(), calls.communicate()
                yield pod
            assert calls.communicate(timeout=30)[0] == ""
        finally:
            calls.kill()

    def one(self, command: str, pod: int) -> None:
        assert self.programs.run("sh", "/run/call", command, str(pod)) == ""

    def net(self, pod: int) -> Net:
        return self.programs.net(f"pod{pod}")

    def address(self, pod: int) -> str:
        done = self.programs.path(f"/run/pods/ADD-{pod}")
        return str(json.loads(done.read_text())["ips"][0]["address"]).removesuffix("/24")


@pytest.fixture(params=CASES, ids=lambda case: f"{case.suite}-{case.masquerade}-{case.backend}")
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def lab(case: Case, request: pytest.FixtureRequest) -> Iterator[Lab]:
    request.getfixturevalue(case.suite)  # is mounted before there is a node to mount it on
    with Lab(case.backend) as lab:
        lab.nodes[0].host.run("ip", "link", "del", "docker0")
        lab.nodes[0].write_lease()
        yield lab


@pytest.fixture
def pods(case: Case, lab: Lab, request: pytest.FixtureRequest) -> Iterator[Pods]:
    tree: Path = request.getfixturevalue(case.suite)
    with closing(Installed(lab.nodes[0].host, tree, case.backend)) as programs:
        if case.masquerade == "nftables":
            # With a command iptables the plugin also deletes rules by it that it never made, and
            # then each DEL fails, without snatd too ("Chain 'CNI-...' does not exist").
            programs.run("sh", "-euc", "rm /usr/sbin/iptables /usr/sbin/ip6tables")
            yield Pods(programs, CONFIGURATION | {"ipMasqBackend": "nftables"})
        else:
            yield Pods(programs, CONFIGURATION)


def add_rules_of_others(node: Node) -> None:
    node.host.shell(
        """
        iptables -w 5 -t nat -A POSTROUTING -s 10.9.0.0/16 -o eth0 -j SNAT --to-source 10.4.7.21
        iptables -w 5 -t nat -A POSTROUTING -p tcp -m tcp --dport 25 -j RETURN
        iptables -w 5 -t nat -N KUBE-MARK-MASQ
        iptables -w 5 -t nat -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
        iptables -w 5 -t nat -A PREROUTING -d 10.4.7.21 -p tcp -m tcp --dport 81 -j KUBE-MARK-MASQ
        """
    )


def test_250_pods_come_and_go(lab: Lab, pods: Pods, tmp_path: Path) -> None:
    node, neighbour = lab.nodes
    places = (neighbour.container_address, OUTSIDE)
    add_rules_of_others(node)

    # Without snatd: the problem, and what the plugin itself leaves.
    pods.one("ADD", 1)
    assert seen_by(pods.net(1), places[0]) == node.address
    pods.one("DEL", 1)
    before = rules_of_others(node.host)
    pods.programs.path("/run/pods/ADD-1").unlink()
    pods.programs.path("/run/pods/DEL-1").unlink()

    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        for pod in pods.all("ADD", PODS):
            # At once, and while the next ones are added.
            assert seen_by(pods.net(pod), places[0]) == pods.address(pod), pod
            assert seen_by(pods.net(pod), OUTSIDE) == node.address, pod
        assert len({pods.address(pod) for pod in range(1, PODS + 1)}) == PODS
        for pod in range(1, PODS + 1):
            assert seen_by_udp(pods.net(pod), places[0]) == pods.address(pod), pod
            assert seen_by_udp(pods.net(pod), OUTSIDE) == node.address, pod
        assert rules_of_others(node.host) != before
        until(lambda: snatd.status()["in_sync"], "in sync")

        right = {(places[0], pods.address(PODS)): 1, (OUTSIDE, node.address): 1}
        for pod in pods.all("DEL", PODS - 1):
            last = pods.net(PODS)
            assert census(last, places, lambda n: n < 1, first_port=20000 + pod) == right, pod
        pods.one("DEL", PODS)
        assert rules_of_others(node.host) == before
        assert node.host.run("ip", "-br", "link", "show", "master", "cni0") == ""
        assert {one["level"] for one in snatd.events()} == {"info"}, snatd.events()
        assert snatd.stop() == 0
