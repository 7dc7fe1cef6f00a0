"""Why a container's packets may not find their way through this node's settings and devices. Pure.

Says nothing of source addresses (that is `trace`), of routes to other nodes (`routes`), of sizes
(`sizes`) and of rules (`passage`).
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from snatd.core.desired import Desired
from snatd.core.docker import DEFAULT_BRIDGE
from snatd.core.finding import Finding, Severity
from snatd.core.model import Address, Family, FamilyLease, Hold, Interface, Link, count, join
from snatd.core.networks import contains
from snatd.core.surroundings import Device, Hop, Neighbour, Surroundings

SYSCTL_FILE = "/etc/sysctl.d/90-containers.conf"


@dataclass(frozen=True)
class Forwarding:
    """A family's sysctls. `device`: of one by which packets come in, that says no by itself;
    `instead`: one that says yes for it although `all` says no (Linux 6.17)."""

    all: str
    device: str = ""
    instead: str = ""


FORWARDING = {
    Family.V4: Forwarding("net.ipv4.ip_forward", device="net/ipv4/conf/{}/forwarding"),
    Family.V6: Forwarding(
        "net.ipv6.conf.all.forwarding", instead="net/ipv6/conf/{}/force_forwarding"
    ),
}
# The families that check whether a packet came in where one to its source would leave.
RP_FILTER = {Family.V4: "net/ipv4/conf/{}/rp_filter"}
SWITCHED_OFF = {Family.V6: "net/ipv6/conf/{}/disable_ipv6"}
SWITCHED_OFF_EVERYWHERE = "net.ipv6.conf.all.disable_ipv6"
BRIDGE_CALLS = {
    Family.V4: "net.bridge.bridge-nf-call-iptables",
    Family.V6: "net.bridge.bridge-nf-call-ip6tables",
}
_STRICT = 1


def set_to(key: str, value: object) -> tuple[str, str]:
    """The commands that set a sysctl, now and at each boot."""
    line = shlex.quote(f"{key} = {value}")
    return (
        shlex.join(["sysctl", "-w", f"{key}={value}"]),
        f"grep -qsxF {line} {SYSCTL_FILE} || echo {line} >> {SYSCTL_FILE}",
    )


def forwarding(
    leased: Desired, value: str, of_device: Mapping[str, str | None], routes: Sequence[Hop] = ()
) -> Iterator[Finding]:
    """`value`: of the family's sysctl; `of_device`: of the one of each device by which the packets
    come in. `routes`: of the main table."""
    keys = FORWARDING[leased.family]
    forced = bool(keys.instead) and set(of_device.values()) == {"1"}
    if value == "0" and not forced:
        # A router does not listen to advertisements, unless it is told to.
        learned = [one.device for one in routes if "proto ra" in one.flags]
        listen = [
            command
            for device in dict.fromkeys(learned)
            for command in set_to(f"net/ipv6/conf/{device}/accept_ra", 2)
        ]
        yield Finding(
            "forwarding_off",
            Severity.ERROR,
            f"this node forwards no {leased.family.value} packets",
            (f"{keys.all} = {value}",),
            f"what a container of {leased.subnet} sends to another node ends here, and so does "
            "what is sent to it",
            (*listen, *set_to(keys.all, 1)),
        )
        return
    off = [
        keys.device.format(name) for name, one in of_device.items() if keys.device and one == "0"
    ]
    if off:
        yield Finding(
            "forwarding_off_device",
            Severity.ERROR,
            f"this node forwards nothing that comes in by {count(len(off), 'device')} on the way",
            tuple(f"{key} = 0" for key in off),
            f"traffic between containers of {leased.subnet} and other nodes ends there",
            tuple(command for key in off for command in set_to(key, 1)),
        )


_USUAL_BRIDGES = (DEFAULT_BRIDGE, "cni0")


def bridge(
    lease: FamilyLease,
    links: Sequence[Link],
    devices: Sequence[Device],
    switched_off: Mapping[str, str | None],
    dockerds: Sequence[int] = (),
    idle: str | None = None,
) -> Iterator[Finding]:
    """Which device carries FLANNEL_SUBNET's address, and whether that can be. `switched_off`: the
    sysctl of each device that keeps the family from it. `dockerds`: the pids of those from which
    the bridge should be; `idle`: where there is one that does not run."""
    gateway, version = lease.gateway, lease.gateway.version
    carriers = [link.name for link in links if gateway in link.addresses]
    busy = Counter(one.master for one in devices)
    if len(carriers) > 1:
        # The one that has containers, if that tells.
        first, *more = sorted(carriers, key=lambda name: -busy[name])
        yield Finding(
            "subnet_on_two_devices",
            Severity.ERROR,
            f"{gateway} is on {count(len(carriers), 'device')}",
            tuple(f"{name} carries {gateway}" for name in carriers),
            "the node sends what is meant for a container to one of them, also where the "
            "container is behind the other",
            (
                *(f"ip addr del {gateway} dev {shlex.quote(name)}" for name in more),
                f"# if the containers are behind {first}; else from there",
            ),
        )
        return
    states = {one.name: one for one in devices}
    if carriers:
        device = states.get(carriers[0])
        if device is not None and not device.up:
            yield Finding(
                "bridge_down",
                Severity.ERROR,
                f"{device.name} is switched off",
                (f"{device.name} carries {gateway} and is not up",),
                f"no container of {lease.subnet} reaches anybody, or is reached",
                (f"ip link set {shlex.quote(device.name)} up",),
            )
        return
    # The family's own addresses; the link-local one of IPv6 is always there.
    instead = {
        link.name: [
            one for one in link.addresses if one.version == version and not one.ip.is_link_local
        ]
        for link in links
    }
    wrong = [
        name
        for name, some in instead.items()
        # CNI's ptp gives each veth the address alone, and wants no bridge.
        if any(one.ip == gateway.ip and one.network.num_addresses > 1 for one in some)
    ]
    wrong += [one for one in _USUAL_BRIDGES if one in instead and one not in wrong]
    if not wrong:
        yield _no_bridge(gateway, dockerds, idle)
        return
    name = wrong[0]
    off = [key for key, value in switched_off.items() if f"/{name}/" in key and value == "1"]
    by_docker = name == DEFAULT_BRIDGE and bool(dockerds)
    yield _elsewhere(gateway, name, instead[name], off, busy=name in busy, by_docker=by_docker)


def _no_bridge(gateway: Interface, dockerds: Sequence[int], idle: str | None) -> Finding:
    said = f"FLANNEL_SUBNET says {gateway}; there is no {' or '.join(_USUAL_BRIDGES)}"
    why = (
        "the rule for what leaves the node waits for the container bridge, which comes with the "
        "first container or with Docker"
    )
    if not dockerds:
        nothing = "# nothing, if there are no containers yet"
        says = f"no device carries {gateway} yet"
        stopped = (f"{idle} is installed, and does not run",) if idle else ()
        remedy = ("# if Docker makes it: systemctl start docker",) if idle else (nothing,)
        severity = Severity.WARNING if idle else Severity.INFO
        return Finding("no_bridge", severity, says, (said, *stopped), why, remedy)
    run = [f"dockerd (pid {one}) runs, which makes docker0 when it starts" for one in dockerds]
    return Finding(
        "no_bridge",
        Severity.WARNING,
        f"no device carries {gateway}",
        (said, *run),
        why,
        ("systemctl restart docker", "# if it has no other bridge (--bridge)"),
    )


def _elsewhere(
    gateway: Interface,
    name: str,
    carried: Sequence[Interface],
    off: Sequence[str],
    *,
    busy: bool,
    by_docker: bool,
) -> Finding:
    """`carried`: what the device has instead; `off`: the sysctls that keep the family from it;
    `busy`: it has containers; `by_docker`: a dockerd that runs gives them their addresses."""
    said = join(carried) if carried else f"no address of IPv{gateway.version}"
    cut_off = bool(carried) or gateway.version == 4
    why = "its containers get no address of the family that flannel leased"
    if carried:
        why = "its containers get addresses to which no other node has a route"
    elif cut_off:
        why = "its containers have no gateway, so none of them reaches another node or is reached"
    return Finding(
        "bridge_elsewhere",
        Severity.ERROR if busy and cut_off else Severity.WARNING,
        f"{name} does not carry the address that flannel leased",
        (f"FLANNEL_SUBNET says {gateway}", f"{name} carries {said}", *(f"{k} = 1" for k in off)),
        why,
        (
            *(command for key in off for command in set_to(key, 0)),
            *_address(name, gateway, carried, by_docker=by_docker),
        ),
    )


def _address(
    name: str, gateway: Interface, carried: Sequence[Interface], *, by_docker: bool
) -> tuple[str, ...]:
    key = "bip" if gateway.version == 4 else "bip6"
    told = f'"{key}": "{gateway}" in /etc/docker/daemon.json, systemctl restart docker'
    anew = "# containers with another address have to be made anew"
    if by_docker and carried:
        # An address moved under a dockerd: it goes on with the old subnet, and with its gateway,
        # which nobody has then (20.10).
        return (f"# {told}", anew)
    device = shlex.quote(name)
    commands = (
        f"ip addr replace {gateway} dev {device}",
        *(f"ip addr del {one} dev {device}" for one in carried),
    )
    return (*commands, *((f"# to last: {told}",) if name == DEFAULT_BRIDGE else ()), anew)


@dataclass(frozen=True)
class Asked:
    """What the kernel answers: by which device, and to whom, a packet would go on; None where it
    would not. `question`: as words for `ip route get`."""

    question: str
    device: str | None
    gateway: Address | None = None

    def __str__(self) -> str:
        if self.device is None:
            return f"ip route get {self.question}: no way"
        via = f" via {self.gateway}" if self.gateway else ""
        return f"ip route get {self.question}:{via} dev {self.device}"


def to_containers(
    leased: Desired, asked: Sequence[Asked], around: Surroundings
) -> Iterator[Finding]:
    """`asked`: where packets for a container of ours would go. It should be the bridge."""
    wrong = [one for one in asked if one.device not in (leased.bridge, None)]
    if wrong:
        lines = [one for one in around.routes if contains(leased.subnet, one.destination)]
        lines = [one for one in lines if one.device != leased.bridge]
        yield Finding(
            "subnet_goes_elsewhere",
            Severity.ERROR,
            f"packets for containers of {leased.subnet} leave by another device than "
            f"{leased.bridge}",
            (*map(str, wrong), *map(str, lines[:_MOST]), *around.rules[:_MOST]),
            "they do not arrive",
            tuple(f"{ip(leased)} route del {shlex.join(one.words)}" for one in lines[:_MOST])
            or _own_route(leased, around)
            or _main_table_first(leased, around),
        )


def _own_route(leased: Desired, around: Surroundings) -> tuple[str, ...]:
    """What adds the subnet's own route, if it is missing."""
    if any(one.destination == leased.subnet for one in around.routes):
        return ()
    return (f"{ip(leased)} route add {leased.subnet} dev {shlex.quote(str(leased.bridge))}",)


def to_nodes(
    leased: Desired, asked: Sequence[tuple[Hop, Asked]], around: Surroundings
) -> Iterator[Finding]:
    """`asked`: for routes of the main table where packets of a container would really go."""
    wrong = [
        (hop, answer)
        for hop, answer in asked
        if (answer.device, answer.gateway)
        not in [
            (one.device, one.gateway) for one in around.routes if one.destination == hop.destination
        ]
    ]
    if not wrong or not around.rules:
        return
    evidence = [f"{hop}, but {answer}" for hop, answer in wrong[:_MOST]]
    yield Finding(
        "route_not_followed",
        Severity.ERROR,
        f"the routes to other nodes are not those that containers of {leased.subnet} follow",
        (*evidence, *around.rules[:_MOST]),
        "a policy rule sends their packets elsewhere, where nobody knows the containers",
        _main_table_first(leased, around),
    )


def _main_table_first(leased: Desired, around: Surroundings) -> tuple[str, ...]:
    """All routes but the default one are asked before the first policy rule."""
    first = min((int(one.partition(":")[0]) for one in around.rules), default=32766)
    return tuple(
        f"{ip(leased)} rule add to {network} lookup main suppress_prefixlength 0 "
        f"priority {max(1, first - 1)}"
        for network in leased.cluster
    )


def ip(leased: Desired) -> str:
    """The command for one family."""
    return f"ip -{leased.family.version}"


_MOST = 4


@dataclass(frozen=True)
class Aside:
    """A device that is not the one of a route to another node, and on which there are neighbours:
    his packets may come in there. `met`: the node itself, if he was met there. `checks`: the values
    of rp_filter by key; `refused`: whether the kernel refuses such packets."""

    hop: Hop
    device: str
    met: Neighbour | None
    checks: Mapping[str, str | None]
    refused: bool

    @property
    def bites(self) -> bool:
        return self.refused and max(int(one or 0) for one in self.checks.values()) == _STRICT


def aside(
    routes: Sequence[Hop], around: Surroundings, bridge_name: str
) -> tuple[tuple[Hop, str, Neighbour | None], ...]:
    """For each device but the bridge the first route that leads elsewhere, one whose gateway was
    met there if there is any."""
    by_gateway = {hop.gateway: hop for hop in reversed(routes)}
    found: dict[str, tuple[Hop, str, Neighbour | None]] = {}
    for one in around.neighbours:
        if not one.answers or one.device == bridge_name or one.address.is_multicast:
            continue
        behind = by_gateway.get(one.address)
        if behind is not None and behind.device != one.device:
            found[one.device] = (behind, one.device, one)
        elif one.device not in found:
            for hop in routes:
                if hop.device != one.device:
                    found[one.device] = (hop, one.device, None)
                    break
    return tuple(found.values())


def reverse_path(leased: Desired, others: Sequence[Aside], dropped: int) -> Iterator[Finding]:
    """`dropped`: how many packets this namespace has dropped for that since it began. From whom
    they came is not known."""
    bitten = [one for one in others if one.bites and (one.met or dropped)]
    if not bitten:
        return
    met = [one for one in bitten if one.met]
    evidence: dict[str, None] = {}
    for one in (met or bitten)[:_MOST]:
        evidence[f"route {one.hop}"] = None
        if one.met:
            evidence[f"neighbour {one.met}"] = None
        evidence |= dict.fromkeys(f"{key} = {value}" for key, value in one.checks.items())
    if dropped:
        evidence[f"TcpExt IPReversePathFilter = {dropped} in /proc/net/netstat"] = None
    devices = [one.device for one in met or bitten]
    keys = [RP_FILTER[leased.family].format(device) for device in devices]
    severity = Severity.ERROR if dropped else Severity.WARNING
    yield Finding(
        "reverse_path_filter",
        severity if met else Severity.INFO,
        f"packets of other nodes' containers are dropped if they come in by {join(devices)}",
        tuple(evidence),
        "the route back to them leaves by another device, and rp_filter is strict: of the two "
        "values the higher one counts",
        tuple(command for key in keys for command in set_to(key, 2)),
    )


_NEARLY = 0.9


def _fullness(entries: int, most: int, refused: bool) -> Severity | None:
    """None where a table is not full, and never was."""
    if entries >= most * _NEARLY:
        return Severity.ERROR if entries >= most else Severity.WARNING
    return Severity.INFO if refused else None


def _counted(key: str, entries: int, most: int, refused: Mapping[str, int], path: str) -> list[str]:
    some = [f"{name} = {number} in /proc/net/{path}" for name, number in refused.items() if number]
    return [f"{entries} entries, {key} = {most}", *some]


CONNECTION_LIMIT = "net.netfilter.nf_conntrack_max"
CONNECTION_TABLE = "stat/nf_conntrack"


def connections_full(entries: int, most: int, refused: Mapping[str, int]) -> Iterator[Finding]:
    """`refused`: counters of connections that were ended early to make room, or dropped, for which
    the kernel has other reasons too."""
    if severity := _fullness(entries, most, any(refused.values())):
        yield Finding(
            "connections_full",
            severity,
            "the table of connections may have been full once"
            if severity is Severity.INFO
            else "the table of connections is full, or nearly",
            tuple(_counted(CONNECTION_LIMIT, entries, most, refused, CONNECTION_TABLE)),
            "while it is full, the first packet of a new connection is dropped (`nf_conntrack: "
            "table full, dropping packet` in the kernel's log)",
            set_to(CONNECTION_LIMIT, most * 2),
        )


NEIGHBOUR_TABLE = {Family.V4: "stat/arp_cache", Family.V6: "stat/ndisc_cache"}
NEIGHBOUR_LIMIT = {
    Family.V4: "net.ipv4.neigh.default.gc_thresh3",
    Family.V6: "net.ipv6.neigh.default.gc_thresh3",
}


def neighbours_full(
    family: Family, entries: int, most: int, refused: Mapping[str, int]
) -> Iterator[Finding]:
    """Each container and each node on the same link takes an entry."""
    key = NEIGHBOUR_LIMIT[family]
    if severity := _fullness(entries, most, any(refused.values())):
        yield Finding(
            "neighbours_full",
            severity,
            f"the table of {family.value} neighbours was full once"
            if severity is Severity.INFO
            else f"the table of {family.value} neighbours is full, or nearly",
            tuple(_counted(key, entries, most, refused, NEIGHBOUR_TABLE[family])),
            "while it is full, containers and nodes that are not in it cannot be reached "
            "(`neighbour table overflow` in the kernel's log)",
            set_to(key, most * 2),
        )


def bridge_not_asking(leased: Desired, device: Device, value: str | None) -> Iterator[Finding]:
    """On a node with kube-proxy. `value`: of the family's sysctl in BRIDGE_CALLS, None without."""
    if value == "1" or device.kind != "bridge" or leased.family in device.calls_iptables:
        return
    key = BRIDGE_CALLS[leased.family]
    load = () if value is not None else ("modprobe br_netfilter",)
    lasting = (
        () if value is not None else ("echo br_netfilter > /etc/modules-load.d/containers.conf",)
    )
    yield Finding(
        "bridge_not_asking",
        Severity.WARNING,
        f"kube-proxy's rules do not see what containers behind {device.name} send to each other",
        (f"{key} = {value}" if value is not None else f"{key}: no such sysctl",),
        "where a service sends a container to another one on this node, the answer keeps the "
        "other's own address, and the first one drops it",
        (*load, *set_to(key, 1), *lasting),
    )


def family_off(lease: FamilyLease, value: str | None) -> Finding:
    """`value`: of the sysctl that switches the family off everywhere, None without."""
    key = SWITCHED_OFF_EVERYWHERE
    return Finding(
        "family_off",
        Severity.INFO,
        f"flannel leased {lease.subnet}, and this kernel does not speak IPv{lease.subnet.version}",
        (f"{key} = {value}" if value else f"{key}: no such sysctl",),
        "no container has such an address",
        ("# nothing, if that is meant so",),
    )


def undecided(reason: str) -> Finding:
    return Finding(
        "undecided",
        Severity.ERROR,
        "snatd cannot tell which addresses to keep",
        (reason,),
        "so it changes nothing, and a broad rule stays",
        ("# as it says; then `snatd check`",),
    )


def no_lease(hold: Hold) -> Finding:
    return Finding(
        "no_lease",
        Severity.ERROR,
        "what flannel leased to this node is not known",
        (hold.reason,),
        "guard and rules that are there stay, and nothing is mended meanwhile; doctor cannot look "
        "at the containers' way",
        ("# the reason says how to mend it",)
        if hold.explained
        else ("systemctl status flanneld", "# or `subnet_file` in snatd.toml names another place"),
    )
