"""kube-proxy and flanneld rewrite and check their rules for a minute, and Docker its own.

No fight, no rule lost, and both right: service traffic that is marked is masqueraded, cluster
traffic and what leaves the cluster are as promised.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.kernel.test_packets import NARROW, rules
from tests.lab.netns import until
from tests.lab.network import OUTSIDE, Lab
from tests.lab.process import Snatd
from tests.lab.who import Seen, census, seen_by
from tests.others.installed import rules_of_others
from tests.others.kubernetes import (
    ADDRESSES,
    SELF,
    WEB,
    Flannel,
    FlannelNft,
    KubeProxy,
    KubeProxyNft,
    every,
)

MINUTE_S = 60


class Beside:
    """A node of its own, with snatd and these programs."""

    def __init__(self, lab: Lab, folder: Path, native: bool) -> None:
        self.lab = lab
        self.node, self.neighbour = lab.nodes
        self.snatd = Snatd(self.node.host, folder)
        self.node.write_lease(ipmasq=True)
        # As kubelet has it: else a bridge with nf-call-iptables drops what comes back the same way.
        self.node.host.run(*["ip", "link", "set", "veth0", "type", "bridge_slave", "hairpin", "on"])
        self.kube_proxy = (KubeProxyNft if native else KubeProxy)(self.node.host)
        self.kube_proxy.sync(0, full=True)
        self.flannel = (FlannelNft if native else Flannel)(self.node.host)
        self.others = rules_of_others(self.node.host)
        self.right = {
            self.neighbour.container_address: self.node.container_address,
            OUTSIDE: self.node.address,
            ADDRESSES[WEB]: self.node.container_address,
            # Marked: a port of the node's, and a service that leads back to its caller.
            self.node.address: self.node.address,
            ADDRESSES[SELF]: "172.7.21.1",
        }

    def docker(self, end_s: float) -> None:
        rule = " ".join(self.node.broad_rule)
        nat = "iptables -w 5 -t nat"
        for _ in every(20, end_s):
            self.node.host.shell(
                f"{nat} -C POSTROUTING {rule} 2>/dev/null || {nat} -I POSTROUTING {rule}"
            )

    def services(self, end_s: float) -> None:
        for turn in every(1, end_s):
            self.kube_proxy.sync(turn, full=turn % 30 == 0)

    def flanneld(self, end_s: float) -> None:
        for _ in every(5, end_s):
            self.flannel.ensure()

    def calls(self, end_s: float) -> Seen:
        def more(_: int) -> bool:
            time.sleep(0.02)
            return time.monotonic() < end_s

        return census(self.node.container, tuple(self.right), more, timeout_s=2)

    def all_is_right(self, seen: Seen) -> None:
        assert set(seen) == set(self.right.items()), seen
        assert {call: seen_by(self.node.container, call) for call in self.right} == self.right
        until(lambda: rules(self.node).count(NARROW) == 1, "the narrowed rule")
        self.kube_proxy.sync(0, full=True)
        assert rules_of_others(self.node.host) == self.others
        assert self.flannel.made == 1, "flanneld missed a rule"
        until(lambda: self.snatd.status()["in_sync"], "in sync")
        assert {one["level"] for one in self.snatd.events()} == {"info"}, self.snatd.events()
        assert len(self.snatd.events("rule_narrowed")) == MINUTE_S / 20
        assert self.snatd.stop() == 0


def test_a_minute_beside_kube_proxy_flanneld_and_docker(tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = [
            Beside(stack.enter_context(Lab(backend)), tmp_path / name, native)
            for name, backend, native in (
                ("nft", "nft", False),
                ("legacy", "legacy", False),
                ("native", "nft", True),
            )
        ]
        pool = stack.enter_context(ThreadPoolExecutor(4 * len(nodes)))
        for one in nodes:
            stack.enter_context(one.snatd).start()
        end_s = time.monotonic() + MINUTE_S
        calls = [pool.submit(one.calls, end_s) for one in nodes]
        writers = [
            pool.submit(write, end_s)
            for one in nodes
            for write in (one.docker, one.services, one.flanneld)
        ]
        for writer in writers:
            writer.result()
        for one, seen in zip(nodes, calls, strict=True):
            one.all_is_right(seen.result())
