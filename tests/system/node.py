"""A machine as a node of a flannel network, with a container, and the rest of the world behind it.

172.7.21.2  container ── docker0 ─ machine ─ eth0 10.4.7.21
                                              │
                               wire 10.4.7.22: 172.7.22.2 (a container elsewhere),
                                               203.0.113.9 (outside)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.lab.netns import Namespace, until
from tests.lab.who import WhoServer, seen_by
from tests.system.machine import Machine

NODE, CONTAINER = "10.4.7.21", "172.7.21.2"
NEIGHBOUR, OUTSIDE = "172.7.22.2", "203.0.113.9"
BROAD = "-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"
NARROW = "-s 172.7.21.0/24 ! -d 172.7.0.0/16 ! -o docker0 -m comment --comment snatd -j MASQUERADE"
LEASE = "FLANNEL_NETWORK=172.7.0.0/16\nFLANNEL_SUBNET=172.7.21.1/24\nFLANNEL_IPMASQ=false\n"

OWN_NETWORK = """
ip addr add 10.4.7.21/24 dev eth0
ip link set eth0 up
ip route add default via 10.4.7.22
echo 1 >/proc/sys/net/ipv4/ip_forward
"""
BRIDGE = """
ip link add docker0 type bridge mcast_snooping 0
ip addr add 172.7.21.1/24 dev docker0
ip link set docker0 up
"""
_WIRE = """
ip addr add 10.4.7.22/24 dev wire
ip link set wire up
ip route add 172.7.21.0/24 via 10.4.7.21
"""


class Node:
    """One node, its container and what answers on the wire."""

    def __init__(self, lower: Sequence[Path], folder: Path) -> None:
        self.wire = Namespace()
        self.wire.shell(f"ip addr add {NEIGHBOUR}/32 dev lo; ip addr add {OUTSIDE}/32 dev lo")
        self.server = WhoServer(self.wire, NEIGHBOUR, OUTSIDE)
        self.container = Namespace()
        self.machine = Machine(lower, folder, self.wire)

    def start(self) -> None:
        """Boots as far as a wire; the machine's own files do the rest, or `network`."""
        self.machine.start()
        self.connect_wire()

    def connect_wire(self) -> None:
        """The veth goes with the machine's network, so after each boot there is another one."""
        until(lambda: "wire" in self.wire.run("ip", "-br", "link"), "the wire")
        self.wire.shell(_WIRE)

    def boot(self) -> None:
        self.start()
        self.machine.wait_until_up()

    def network(self) -> None:
        """The node's network and a container on it. Goes with a reboot."""
        machine = self.machine
        machine.shell(OWN_NETWORK + BRIDGE)
        self.container.run(
            *("ip", "link", "add", "eth0", "type", "veth"),
            *("peer", "name", "veth0", "netns", str(machine.pid)),
        )
        machine.shell("ip link set veth0 master docker0 up")
        self.container.shell(
            f"ip addr add {CONTAINER}/24 dev eth0; ip link set eth0 up; "
            "ip route add default via 172.7.21.1"
        )

    def lease(self) -> None:
        """As flanneld writes it."""
        self.machine.shell(
            f"mkdir -p /run/flannel; printf '{LEASE}' >/run/flannel/.new; "
            "mv /run/flannel/.new /run/flannel/subnet.env"
        )

    def iptables(self, *words: str, backend: str = "nft") -> str:
        return self.machine.run(f"iptables-{backend}", "-w", "5", "-t", "nat", *words)

    def add_broad(self, backend: str = "nft") -> None:
        self.iptables("-I", "POSTROUTING", *BROAD.split(), backend=backend)

    def rules(self, backend: str = "nft") -> list[str]:
        listed = self.iptables("-S", "POSTROUTING", backend=backend).splitlines()
        return [one.removeprefix("-A POSTROUTING ") for one in listed if one.startswith("-A")]

    def wait_for_repair(self, backend: str = "nft", within_s: float = 10.0) -> None:
        until(lambda: self.rules(backend) == [NARROW], f"{backend}: the narrowed rule", within_s)

    def status_line(self) -> str:
        return self.machine.show("snatd", "StatusText")

    def wait_for_status(self, text: str, within_s: float = 10.0) -> None:
        until(lambda: text in self.status_line(), f"STATUS with {text!r}", within_s)

    def promises_hold(self) -> None:
        """Promises 1 and 2, as the called side sees them."""
        assert seen_by(self.container, NEIGHBOUR) == CONTAINER
        assert seen_by(self.container, OUTSIDE) == NODE

    def close(self) -> None:
        self.machine.close()
        self.server.close()
        self.container.close()
        self.wire.close()
