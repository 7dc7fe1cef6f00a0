"""What a node needs to come up by itself: its network, a flanneld and a docker that begin late.

Stubs of the two, in the order and about the time of the real ones: flanneld writes subnet.env when
snatd runs already, and docker, half a second later (the real one takes longer), makes the bridge, a
container and the broad rule; within a millisecond of that the container calls, and goes on calling.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.lab.netns import until
from tests.system.machine import Machine
from tests.system.node import (
    BRIDGE,
    BROAD,
    CONTAINER,
    LEASE,
    NARROW,
    NEIGHBOUR,
    NODE,
    OUTSIDE,
    OWN_NETWORK,
    Node,
)

ANSWERS = "/run/answers"

_FILES = {
    "/etc/systemd/system/own-network.service": """\
[Unit]
After=network-pre.target
Before=network.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -eu /usr/local/lib/own-network
[Install]
WantedBy=multi-user.target
""",
    "/usr/local/lib/own-network": OWN_NETWORK,
    "/etc/systemd/system/flanneld.service": """\
[Unit]
After=own-network.service snatd.service
Before=docker.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -eu /usr/local/lib/flanneld
[Install]
WantedBy=multi-user.target
""",
    "/usr/local/lib/flanneld": f"""\
test ! -e /run/flannel/subnet.env
mkdir -p /run/flannel
printf '{LEASE}' >/run/flannel/.new
mv /run/flannel/.new /run/flannel/subnet.env
""",
    "/etc/systemd/system/docker.service": """\
[Unit]
After=flanneld.service
[Service]
Type=notify
NotifyAccess=all
ExecStart=/bin/sh -eu /usr/local/lib/docker
[Install]
WantedBy=multi-user.target
""",
    "/usr/local/lib/docker": f"""\
sleep 0.5
{BRIDGE}
ip netns add container
ip link add veth0 type veth peer name eth0 netns container
ip link set veth0 master docker0 up
ip -n container addr add 172.7.21.2/24 dev eth0
ip -n container link set eth0 up
ip -n container route add default via 172.7.21.1
mkfifo /run/go
nsenter --net=/run/netns/container /usr/bin/python3 -I /usr/local/lib/container &
exec 3>/run/go
iptables -w 5 -t nat -I POSTROUTING {BROAD}
echo >&3
systemd-notify --ready
wait
""",
    "/usr/local/lib/container": f"""\
import socket
port = 20000
open("/run/go").readline()
with open("{ANSWERS}", "w", buffering=1) as answers:
    while True:
        for destination in "{NEIGHBOUR}", "{OUTSIDE}":
            port = port + 1 if port < 60000 else 20000
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
                caller.settimeout(0.3)
                caller.bind(("", port))
                try:
                    caller.sendto(b"who", (destination, 8080))
                    answers.write(destination + " " + caller.recv(64).decode() + "\\n")
                except OSError:
                    pass
""",
}


def prepare(root: Path) -> None:
    """Puts all of it into the tree of a machine that is off, and has it started at boot."""
    for name, content in _FILES.items():
        file = root / name.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    for unit in ("own-network", "flanneld", "docker"):
        (wants / f"{unit}.service").symlink_to(f"/etc/systemd/system/{unit}.service")


# What the container may see of the world: itself elsewhere in the cluster, the node outside.
RIGHT = {(NEIGHBOUR, CONTAINER), (OUTSIDE, NODE)}


def answers(machine: Machine) -> Counter[tuple[str, ...]]:
    file = machine.path(ANSWERS)
    text = file.read_text() if file.exists() else ""
    return Counter(tuple(line.split()) for line in text.splitlines())


def seen(machine: Machine, more: int = 40) -> set[tuple[str, ...]]:
    """What the container was called, from its first packet on until so many more of each kind."""
    before = answers(machine)
    until(
        lambda: (
            all(answers(machine)[one] >= before[one] + more for one in RIGHT)
            or set(answers(machine)) - RIGHT
        ),
        f"{more} more answers; so far {answers(machine)}",
        20,
    )
    return set(answers(machine))


def right_again_without_a_person(node: Node) -> None:
    machine = node.machine
    node.connect_wire()
    machine.wait_until_up()
    until(lambda: machine.path(ANSWERS).exists(), "the container")
    assert seen(machine) == RIGHT, "from the first packet on"
    until(lambda: NARROW in node.rules() and BROAD not in node.rules(), "the narrowed rule")
    began = {
        unit: int(machine.show(unit, "ExecMainStartTimestampMonotonic"))
        for unit in ("snatd", "flanneld", "docker")
    }
    assert 0 < began["snatd"] < began["flanneld"] < began["docker"]
    assert machine.run("journalctl", "-b", "-q", "-o", "cat", "SNATD_EVENT=holding")
