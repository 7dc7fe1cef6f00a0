"""Two nodes with a container each, host-gw routes between them, and a host outside.

                10.4.7.0/24  fd00:4:7::/64
   ┌──────────────┬──────────────────┬──────────────┐
.21│           .22│              .100│
 node 1         node 2            outside (203.0.113.9, 2001:db8::9)
 docker0        docker0           knows no way back to a container
 172.7.21.1     172.7.22.1
   │              │
 172.7.21.2     172.7.22.2        fd00:7:21::/64, fd00:7:22::/64
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.netns import Namespace
from tests.lab.who import WhoServer

OUTSIDE, OUTSIDE_V6 = "203.0.113.9", "2001:db8::9"
LAN_HOST = "10.4.7.100"


@dataclass
class Node:
    """A node and its one container. `pods` is the beginning of the node's container subnet."""

    number: int
    host: Namespace
    container: Namespace
    pods: str
    flanneld: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"10.4.7.{self.number}"

    @property
    def address_v6(self) -> str:
        return f"fd00:4:7::{self.number}"

    @property
    def subnet(self) -> str:
        return f"{self.pods}.{self.number}.0/24"

    @property
    def subnet_v6(self) -> str:
        return f"fd00:7:{self.number}::/64"

    @property
    def container_address(self) -> str:
        return f"{self.pods}.{self.number}.2"

    @property
    def container_v6(self) -> str:
        return f"fd00:7:{self.number}::2"

    @property
    def broad_rule(self) -> tuple[str, ...]:
        """What Docker writes, as words for iptables behind `-A POSTROUTING`."""
        return ("-s", self.subnet, "!", "-o", "docker0", "-j", "MASQUERADE")

    def write_lease(
        self,
        network: str = "172.7.0.0/16",
        *,
        ipmasq: bool = False,
        v6: bool = False,
        subnet: str | None = None,
        mtu: int = 1500,
    ) -> None:
        """Writes subnet.env, and sees to it that there is a flanneld."""
        gateway = subnet or f"{self.pods}.{self.number}.1/24"
        more = [f"FLANNEL_MTU={mtu}", f"FLANNEL_IPMASQ={'true' if ipmasq else 'false'}"]
        if v6:
            more = [
                "FLANNEL_IPV6_NETWORK=fd00:7::/32",
                f"FLANNEL_IPV6_SUBNET=fd00:7:{self.number}::1/64",
                *more,
            ]
        write_lease(self.host, network, gateway, more)
        if self.flanneld is None:
            self.flanneld = self.host.program("flanneld")


def write_lease(host: Namespace, network: str, gateway: str, more: Sequence[str]) -> None:
    """Writes subnet.env as flanneld does, another file in the same folder, then a rename."""
    lines = [f"FLANNEL_NETWORK={network}", f"FLANNEL_SUBNET={gateway}", *more]
    folder = host.path("/run/flannel")
    folder.mkdir(exist_ok=True)
    (folder / ".subnet.env").write_text("\n".join(lines) + "\n")
    (folder / ".subnet.env").rename(folder / "subnet.env")


class Lab:
    """The network. A context manager; everything is gone at its end."""

    def __init__(self, backend: str = "nft", pods: str = "172.7") -> None:
        _sweep()
        self._folder = tempfile.TemporaryDirectory(prefix=f"{_FOLDER}{os.getpid()}-")
        self.folder = Path(self._folder.name)
        self._hosts: list[Namespace] = []
        self._servers: list[WhoServer] = []
        self.lan = self._host()
        make_lan(self.lan)
        self.outside = self._on_lan(100)
        self.outside.shell(f"ip addr add {OUTSIDE}/32 dev lo; ip addr add {OUTSIDE_V6}/128 dev lo")
        self.nodes = tuple(self._node(number, pods, backend) for number in (21, 22))
        self._connect_subnets()
        self._servers.append(WhoServer(self.outside, OUTSIDE, OUTSIDE_V6, LAN_HOST))
        for node in self.nodes:
            addresses = (node.container_address, node.container_v6)
            self._servers.append(WhoServer(node.container, *addresses))

    def _host(self) -> Namespace:
        host = Namespace()
        self._hosts.append(host)
        return host

    def _on_lan(self, number: int) -> Namespace:
        host = self._host()
        plug(self.lan, host, number)
        return host

    def _node(self, number: int, pods: str, backend: str) -> Node:
        host, container = self._on_lan(number), self._host()
        node = Node(number, host, container, pods)
        host.use_iptables(_iptables_folder(self.folder, backend))
        host.shell(
            "echo 1 > /proc/sys/net/ipv4/ip_forward; "
            "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding; "
            "ip route add default via 10.4.7.100; ip -6 route add default via fd00:4:7::100; "
            f"ip link add docker0 type bridge {_NO_SNOOPING}; "
            f"ip addr add {pods}.{number}.1/24 dev docker0; "
            f"ip addr add fd00:7:{number}::1/64 dev docker0 nodad; ip link set docker0 up; "
            f"ip link add veth0 type veth peer name eth0 netns {container.pid}; "
            "ip link set veth0 master docker0 up"
        )
        container.shell(
            f"ip addr add {node.container_address}/24 dev eth0; "
            f"ip addr add {node.container_v6}/64 dev eth0 nodad; ip link set eth0 up; "
            f"ip route add default via {pods}.{number}.1; "
            f"ip -6 route add default via fd00:7:{number}::1"
        )
        return node

    def _connect_subnets(self) -> None:
        for node in self.nodes:
            for other in self.nodes:
                if other is not node:
                    node.host.shell(
                        f"ip route add {other.subnet} via {other.address}; "
                        f"ip -6 route add {other.subnet_v6} via {other.address_v6}"
                    )

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for host in self._hosts:
            host.close()
        self._folder.cleanup()


# The bridge would first learn who wants which multicast, and drop neighbour discovery meanwhile.
_NO_SNOOPING = "mcast_snooping 0"


def make_lan(lan: Namespace) -> None:
    lan.shell(f"ip link add br0 type bridge {_NO_SNOOPING}; ip link set br0 up")


def plug(lan: Namespace, host: Namespace, number: int) -> None:
    """Connects a host to the LAN, by its eth0."""
    lan.shell(
        f"ip link add v{number} type veth peer name eth0 netns {host.pid} && "
        f"ip link set v{number} master br0 up"
    )
    host.shell(
        f"ip addr add 10.4.7.{number}/24 dev eth0; "
        f"ip addr add fd00:4:7::{number}/64 dev eth0 nodad; ip link set eth0 up"
    )


_FOLDER = "snatd-lab-"


def _sweep() -> None:
    """Removes the folders of labs whose process was killed before it could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}[0-9]*-*"):
        pid = folder.name.removeprefix(_FOLDER).partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _iptables_folder(folder: Path, backend: str) -> Path:
    """Links that make `iptables` and its kin the ones of a backend, as update-alternatives does."""
    links = folder / f"iptables-{backend}"
    links.mkdir(exist_ok=True)
    for command in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            target = f"/usr/sbin/xtables-{backend}-multi"
            if not os.path.exists(target):
                raise AssertionError(f"{target} is missing: install the package iptables")
            link = links / f"{command}{suffix}"
            if not link.is_symlink():
                link.symlink_to(target)
    return links
