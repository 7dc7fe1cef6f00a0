"""Whether the rules let packets of containers pass: prerouting, forward, and input for a tunnel's.

What becomes of a source address is `trace`'s to say; here it is only asked who drops. Pure.
"""

from __future__ import annotations

import enum
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network

from snatd.core.desired import Desired
from snatd.core.finding import Finding, Severity, some
from snatd.core.model import Address, Backend, Family, Network, join
from snatd.core.packet import (
    ESTABLISHED,
    NEW,
    PROTOCOLS,
    Check,
    Field,
    Hook,
    Jump,
    Packet,
    Ranges,
    Verdict,
    Within,
    addresses,
    covered,
)
from snatd.core.surroundings import Device, TunnelEnd
from snatd.core.trace import Place, Why, trace
from snatd.core.writers import by, writer
from snatd.core.xtables import iptables_of

# Neighbours' subnets that are looked at one by one where not all of them pass.
_MOST_SUBNETS = 16
_DOCKER_USER = "DOCKER-USER"
_ASKS_PORTS = re.compile(r"-p |port|l4proto|\b(tcp|udp|sctp)\b")
_NFT_ADDRESS = {Family.V4: "ip", Family.V6: "ip6"}


@dataclass(frozen=True)
class Leg:
    """Where other nodes' containers are, and the device by which their packets come and go."""

    device: str
    networks: tuple[Network, ...]


@dataclass(frozen=True)
class Rules:
    """What is asked of this node. `spare`: an address of the subnet that no container has, so that
    no rule is about it alone. `hooks`: on prerouting and forward."""

    leased: Desired
    bridge: str
    spare: Address
    hooks: tuple[Hook, ...]
    iptables_is: Backend
    types: tuple[tuple[str, Ranges], ...] = ()


class Fate(enum.Enum):
    PASSES = "passes"
    MAY = "may"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Judged:
    """What becomes of a packet: by which rules it is dropped, and on what that depends."""

    fate: Fate
    places: tuple[Place, ...] = ()
    why: Why = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The rules as their own tools print them."""
        depends = f"; it depends on {join([f'`{one}`' for one in self.why])}" if self.why else ""
        return tuple(f"{_text(one)}{depends}" for one in self.places)


def judge(hooks: Sequence[Hook], packet: Packet) -> Judged:
    found = trace(hooks, packet)
    dropped = [one for one in found.answers if one.dropped]
    if not dropped:
        return Judged(Fate.PASSES)
    places = tuple(one.place for one in dropped if one.place is not None)
    if len(dropped) == len(found.answers):
        return Judged(Fate.DROPPED, places)
    return Judged(Fate.MAY, places, found.undecided)


def judge_each(hooks: Sequence[Hook], packets: Mapping[str, Packet]) -> Judged:
    """Of packets of several protocols: dropped if all are. A firewall that lets pings through is
    one all the same, and one that lets a protocol through may be meant so."""
    each = {protocol: judge(hooks, packet) for protocol, packet in packets.items()}
    places = tuple(dict.fromkeys(place for one in each.values() for place in one.places))
    fates = {one.fate for one in each.values()}
    if len(fates) == 1 and Fate.MAY not in fates:
        return Judged(fates.pop(), places)
    why = [text for one in each.values() for text in one.why]
    why += [f"-p {name}" for name, one in each.items() if one.fate is Fate.DROPPED]
    return Judged(Fate.MAY, places, tuple(dict.fromkeys(why)))


@dataclass(frozen=True)
class _Loss:
    """Packets that do not pass, or may not."""

    packets: Mapping[str, Packet]
    source: Network
    destination: Network
    judged: Judged


@dataclass
class _Losses:
    """Of connections in one direction, over all legs."""

    hooks: tuple[Hook, ...]
    found: list[_Loss] = field(default_factory=list)

    def look(self, packet: Packet, source: Network, destination: Network) -> None:
        packets = {name: replace(packet, protocol=PROTOCOLS[name]) for name in ("tcp", "udp")}
        judged = judge_each(self.hooks, packets)
        if judged.fate is not Fate.PASSES:
            self.found.append(_Loss(packets, source, destination, judged))

    @property
    def certain(self) -> list[_Loss]:
        return [one for one in self.found if one.judged.fate is Fate.DROPPED]


def dropped(rules: Rules, legs: Sequence[Leg]) -> Iterator[Finding]:
    """Connections between containers here and on other nodes, their first packet and the answer."""
    inbound, outbound = _Losses(rules.hooks), _Losses(rules.hooks)
    for leg in legs:
        for state, losses in ((NEW, inbound), (ESTABLISHED, outbound)):
            _look(rules, leg, state, losses, to_containers=True)
        for state, losses in ((NEW, outbound), (ESTABLISHED, inbound)):
            _look(rules, leg, state, losses, to_containers=False)
    subnet = rules.leased.subnet
    if inbound.certain:
        yield Finding(
            "inbound_dropped",
            Severity.ERROR,
            f"calls from containers of other nodes to {subnet} are dropped",
            _evidence(inbound.certain),
            f"they come from {join(_others(inbound.certain, subnet))} and are forwarded to "
            f"{rules.bridge}, and no rule before accepts them and their answers",
            _accept(rules, inbound.certain, from_nodes=True),
        )
    elif inbound.found:
        yield Finding(
            "inbound_may_be_dropped",
            _doubtful(inbound.found),
            f"calls from containers of other nodes to {subnet} are dropped, or may be",
            _evidence(inbound.found),
            "it depends on what cannot be decided from outside, so only some of them may pass",
            _accept(rules, inbound.found, from_nodes=True),
        )
    if outbound.certain:
        yield Finding(
            "outbound_dropped",
            Severity.ERROR,
            f"calls of containers of {subnet} to other nodes are dropped",
            _evidence(outbound.certain),
            f"they go to {join(_others(outbound.certain, subnet))}, and no rule before accepts "
            "them and their answers",
            _accept(rules, outbound.certain),
        )
    elif outbound.found:
        yield Finding(
            "outbound_may_be_dropped",
            _doubtful(outbound.found),
            f"calls of containers of {subnet} to other nodes are dropped, or may be",
            _evidence(outbound.found),
            "it depends on what cannot be decided from outside, so only some of them may pass",
            _accept(rules, outbound.found),
        )


def _look(rules: Rules, leg: Leg, state: str, losses: _Losses, *, to_containers: bool) -> None:
    """First all packets together, which pass on most nodes; then one for each subnet."""
    subnet = rules.leased.subnet
    together = judge(rules.hooks, _packet(rules, leg, leg.networks, state, to_containers))
    if together.fate is Fate.PASSES:
        return
    for one in leg.networks[:_MOST_SUBNETS]:
        there, here = _host(one), ((int(rules.spare), int(rules.spare)),)
        source, destination = (there, here) if to_containers else (here, there)
        ends = (one, subnet) if to_containers else (subnet, one)
        packet = _packet(rules, leg, [one], state, to_containers)
        losses.look(replace(packet, source=source, destination=destination), *ends)


def _packet(
    rules: Rules, leg: Leg, other: Sequence[Network], state: str, to_containers: bool
) -> Packet:
    here, there = addresses((rules.leased.subnet,)), addresses(other)
    return Packet(
        family=rules.leased.family,
        source=there if to_containers else here,
        destination=here if to_containers else there,
        came_in=leg.device if to_containers else rules.bridge,
        out=rules.bridge if to_containers else leg.device,
        state=state,
        untranslated=True,
        came_right=True,
        types=rules.types,
    )


def _host(network: Network) -> Ranges:
    """One address that a container may have there."""
    number = int(network.network_address) + min(2, network.num_addresses - 1)
    return ((number, number),)


def _others(losses: Iterable[_Loss], subnet: Network) -> list[Network]:
    both = [end for one in losses for end in (one.source, one.destination) if end != subnet]
    return list(dict.fromkeys(both))


def _doubtful(losses: Iterable[_Loss]) -> Severity:
    """Rules about ports are somebody's firewall, which may be meant so."""
    whys = [one.judged.why for one in losses]
    meant = all(any(map(_ASKS_PORTS.search, why)) for why in whys)
    return Severity.INFO if meant else Severity.WARNING


def _evidence(losses: Iterable[_Loss]) -> tuple[str, ...]:
    return some(line for one in losses for line in one.judged.lines)


def _text(place: Place) -> str:
    rule = f": {place.step.text}" if place.step.number else ""
    return f"{place}{by(place.table, place.chain, place.step.text)}{rule}"


def _accept(rules: Rules, losses: Sequence[_Loss], *, from_nodes: bool = False) -> tuple[str, ...]:
    """What lets the packets pass, for each base chain that stops them. `from_nodes`: they may also
    come under a node's address, which the rule does not know."""
    subnet = rules.leased.subnet
    lines: dict[str, None] = {}
    for hook in rules.hooks:
        stopped = [one for one in losses if judge_each([hook], one.packets).fate is not Fate.PASSES]
        incoming = any(one.destination == subnet for one in stopped)
        outgoing = any(one.source == subnet for one in stopped)
        commands: dict[str, None] = {}
        for network in rules.leased.cluster:
            if incoming:
                commands[_accepting(rules, hook, network, subnet)] = None
            if outgoing:
                commands[_accepting(rules, hook, subnet, network)] = None
        lines |= commands
        if incoming and from_nodes:
            command = _accepting(rules, hook, "ADDRESS", subnet)
            lines[f"# a node without snatd comes under its own address; for each: {command}"] = None
        if stopped:
            lines |= dict.fromkeys(_lasting(rules, hook, tuple(commands)))
    return tuple(lines)


def _accepting(rules: Rules, hook: Hook, source: Network | str, destination: Network) -> str:
    """`source`: or a word in its place."""
    if command := _iptables(rules, hook):
        match = f"-s {source} -d {destination} -j ACCEPT"
        return _put_first(command, hook, _own_place(hook), match)
    ip = _NFT_ADDRESS[rules.leased.family]
    chain = [*hook.table.split(" ", 1), hook.chain]
    rule = f"{ip} saddr {_as_nft(source)} {ip} daddr {_as_nft(destination)} accept"
    insert = shlex.join(["nft", "insert", "rule", *chain, *rule.split(" ")])
    if _stands(hook, hook.chain, rule):
        # As in _put_first; nft deletes by handles only.
        listing = shlex.join(["nft", "-a", "list", "chain", *chain])
        handles = f"sed -n 's|^[[:space:]]*{rule} # handle ||p'"
        delete = shlex.join(["nft", "delete", "rule", *chain, "handle"])
        return f"{listing} | {handles} | xargs -rn1 {delete}; {insert}"
    listing = shlex.join(["nft", "list", "chain", *chain])
    return f"{listing} | grep -q '^[[:space:]]*{rule}$' || {insert}"


def _put_first(command: Sequence[str], hook: Hook, chain: str, match: str) -> str:
    """Several findings have the same remedy, and each may be typed twice: one rule comes of it. One
    that is there already stands too late, often behind the RETURN of DOCKER-USER, and is moved."""
    rule = [chain, *match.split(" ")]
    check, delete, insert = (shlex.join([*command, how, *rule]) for how in ("-C", "-D", "-I"))
    if _stands(hook, chain, match):
        return f"{delete} 2>/dev/null; {insert}"  # at a boot there is none
    return f"{check} 2>/dev/null || {insert}"


def _stands(hook: Hook, chain: str, text: str) -> bool:
    return any(step.text == text for step in hook.chains.get(chain, ()))


def _as_nft(network: Network | str) -> str:
    """nft lists a network of one address without its length."""
    if isinstance(network, str) or network.num_addresses > 1:
        return str(network)
    return str(network.network_address)


def _own_place(hook: Hook) -> str:
    """DOCKER-USER is where Docker leaves an operator's rules alone; but behind a rule that may end
    a packet's way it is of no use."""
    for step in hook.chains.get(hook.chain, ()):
        for action in step.parts:
            if isinstance(action, Jump) and action.chain == _DOCKER_USER:
                return _DOCKER_USER
            if not isinstance(action, Check) and action is not Verdict.ACCEPT:
                return hook.chain
    return hook.chain


def _iptables(rules: Rules, hook: Hook) -> list[str]:
    """The command that writes to a base chain of iptables' own; empty where it is none."""
    command, table = iptables_of(hook.table)
    if not command or hook.chain != hook.hook.upper():
        return []
    command = command.removesuffix(f"-{rules.iptables_is.value}")
    return [command, *([] if table == "filter" else ["-t", table])]


def _lasting(rules: Rules, hook: Hook, commands: Sequence[str]) -> tuple[str, ...]:
    """`commands`: what is typed there."""
    networks = join(rules.leased.cluster)
    if hook.table.endswith(" firewalld"):
        return (
            f"# to last: firewall-cmd --permanent --zone=trusted --add-source={networks}, and "
            "firewall-cmd --reload",
        )
    if any(one.startswith("ufw") for one in hook.chains):
        return (f"# to last: ufw route allow from {networks} to {rules.leased.subnet}, and back",)
    if _is_dockers(hook):
        return (_DIRECT_ROUTING,)
    if _iptables(rules, hook):
        if _own_place(hook) == _DOCKER_USER:
            return (
                "# to last over a boot: `systemctl edit docker`, [Service], and there:",
                *(f"# ExecStartPost=/bin/sh -c '{one}'" for one in commands),
            )
        return (
            "# to last over a boot: among the saved rules (man snatd, save), which Debian's "
            "iptables-persistent and EL's iptables-services load",
        )
    return ("# to last it has to be where this table is written",)


_DIRECT_ROUTING = (
    '# to last: "allow-direct-routing": true in /etc/docker/daemon.json (Docker 28.2), systemctl '
    "restart docker; in Docker 28.0 DOCKER_INSECURE_NO_IPTABLES_RAW=1 in its environment; or a "
    "network with com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected"
)


def _is_dockers(hook: Hook) -> bool:
    """Whether Docker refuses direct routing there: in its own table, or on prerouting."""
    steps = hook.chains[hook.chain] if hook.hook == "prerouting" else ()
    return hook.table.endswith(" docker-bridges") or any(
        writer(hook.table, hook.chain, one.text) == "Docker" for one in steps
    )


def direct_routing(rules: Rules, legs: Sequence[Leg]) -> Iterator[Finding]:
    """Docker 28 and newer drop what comes for a container from outside, each with a rule of its
    own, before anything else is asked."""
    hooks = [hook for hook in rules.hooks if _is_dockers(hook)]
    found: dict[str, None] = {}
    containers: dict[str, None] = {}
    stopping: dict[int, Hook] = {}
    for leg in legs:
        packet = _packet(rules, leg, leg.networks, NEW, to_containers=True)
        for hook in hooks:
            for place in judge([hook], packet).places:
                if writer(place.table, place.chain, place.step.text) != "Docker":
                    continue
                one = _as_asked(packet, place)
                (low, high), *more = one.destination
                if low == high and not more and judge([hook], one).fate is Fate.DROPPED:
                    found[_text(place)] = None
                    containers[str(one.address(low))] = None
                    stopping[id(hook)] = hook
    if found:
        commands = [
            _accepting(rules, hook, network, rules.leased.subnet)
            for hook in stopping.values()
            for network in rules.leased.cluster
        ]
        yield Finding(
            "direct_routing_dropped",
            Severity.ERROR,
            f"Docker drops what other nodes send to {join(list(containers))}",
            some(found),
            "since Docker 28 nobody but this node may use a container's own address; so calls to "
            "it are lost, and answers to its own calls, unless they are masqueraded",
            (*commands, _DIRECT_ROUTING),
        )


def _as_asked(packet: Packet, place: Place) -> Packet:
    """The part of a class of packets that a rule names, as far as it names one."""
    for part in place.step.parts:
        match part:
            case Check(_, Within(Field.DESTINATION, ranges), False):
                if covered(ranges, packet.destination):
                    packet = replace(packet, destination=ranges)
            case Check(_, Within(Field.PROTOCOL, ((number, _), *_)), False):
                packet = replace(packet, protocol=number)
            case Check(_, Within(Field.DPORT, ((number, _), *_)), False):
                packet = replace(packet, dport=number)
    return packet


def on_bridge(rules: Rules, nat: Sequence[Hook], key: str) -> Iterator[Finding]:
    """Between containers of this node, whose packets meet the rules too where bridges ask iptables
    (`key`: the sysctl by which they do). `nat`: on postrouting."""
    subnet = rules.leased.subnet
    spare = int(rules.spare)
    packet = replace(
        _packet(rules, Leg(rules.bridge, (subnet,)), [subnet], NEW, to_containers=True),
        source=((spare - 1, spare - 1),),
        destination=((spare, spare),),
    )
    losses = _Losses(rules.hooks)
    for state in (NEW, ESTABLISHED):
        losses.look(replace(packet, state=state), subnet, subnet)
    if losses.certain:
        meant = all(
            _is_icc(place, rules.bridge) for one in losses.found for place in one.judged.places
        )
        yield Finding(
            "bridge_dropped",
            Severity.INFO if meant else Severity.ERROR,
            f"what containers of {subnet} on this node send each other is dropped",
            (f"{key} = 1", *_evidence(losses.certain)),
            "bridges ask iptables here, and Docker was told so by --icc=false"
            if meant
            else "bridges ask iptables here, and no rule before accepts it",
            _accept(rules, losses.certain),
        )
    answers = trace(nat, replace(packet, untranslated=False)).answers
    hidden = [one for one in answers if not (one.kept or one.dropped)]
    if hidden and len(hidden) == len(answers):
        yield Finding(
            "bridge_snat",
            Severity.ERROR,
            f"containers of {subnet} on this node see each other under another address",
            (f"{key} = 1", *some(_text(one.place) for one in hidden if one.place)),
            "bridges ask iptables here, and the rule does not leave out what stays behind "
            f"{rules.bridge}",
            (
                f"# give the rule `! -o {rules.bridge}`, or, without kube-proxy:",
                shlex.join(["sysctl", "-w", f"{key}=0"]),
            ),
        )


def _is_icc(place: Place, bridge: str) -> bool:
    return place.step.text == f"-i {bridge} -o {bridge} -j DROP"


def tunnel(
    rules: Rules, device: Device, ends: Sequence[TunnelEnd], came_in: str | None
) -> Iterator[Finding]:
    """`rules.hooks`: on prerouting and input; `came_in`: the device beneath the tunnel."""
    if device.vxlan is None or device.vxlan.local is None:
        return
    local, port = device.vxlan.local, device.vxlan.port
    family = Family.V4 if local.version == 4 else Family.V6
    nodes = [one.node for one in ends if one.device == device.name]
    nodes = [one for one in dict.fromkeys(nodes) if one.version == local.version]
    lost: list[tuple[Address, Judged]] = []
    for node in nodes[:_MOST_SUBNETS]:
        packet = Packet(
            family=family,
            source=((int(node), int(node)),),
            destination=((int(local), int(local)),),
            came_in=came_in,
            out="",
            protocol=PROTOCOLS["udp"],
            dport=port,
            untranslated=True,
            came_right=True,
            types=rules.types,
        )
        judged = judge(rules.hooks, packet)
        if judged.fate is not Fate.PASSES:
            lost.append((node, judged))
    if not lost:
        return
    certain = any(judged.fate is Fate.DROPPED for _, judged in lost)
    udp = f"-p udp -m udp --dport {port}"
    commands = [
        _put_first(command, hook, hook.chain, f"-s {ip_network(node)} {udp} -j ACCEPT")
        for hook in rules.hooks
        if (command := _iptables(rules, hook))
        for node, _ in lost
    ]
    yield Finding(
        "tunnel_dropped",
        Severity.ERROR if certain else Severity.WARNING,
        f"what other nodes send through {device.name} is dropped{'' if certain else ', or may be'}",
        (
            f"{device.name}: UDP port {port} of {local}",
            *some(line for _, judged in lost for line in judged.lines),
        ),
        f"packets for containers of {rules.leased.subnet} come inside of these",
        (*commands, f"# UDP port {port} has to be open for {join([node for node, _ in lost])}"),
    )
