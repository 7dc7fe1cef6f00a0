"""The checks of `doctor` on the way of packets through this node.

Each reads what it is about and asks `core`. Which other programs write what is not looked at here.
"""

from __future__ import annotations

from collections.abc import Callable

from snatd.core import docker, passage, routes, sizes, way
from snatd.core.finding import Finding, Severity
from snatd.core.model import Address, Family, Hold, Lease
from snatd.core.networks import subtract
from snatd.core.packet import Hook
from snatd.core.passage import Rules
from snatd.core.surroundings import UNICAST, Device, Hop
from snatd.examined import Examined, Found, Reached, first_container
from snatd.kernel.hooks import FORWARD, INPUT, NAT, PREROUTING, has_kube_proxy
from snatd.kernel.sysctls import read_counter, read_number, read_sysctl, read_table

# Of a look at connections, of which a part will do.
_CONNECTIONS_S = 3.0
# Routes that are asked of the kernel one by one, 1 ms each.
_MOST_ROUTES = 32


def _lease(examined: Examined) -> Found:
    if examined.node is None:
        return
    if isinstance(examined.node.lease, Hold):
        yield way.no_lease(examined.node.lease)
        return
    holds = [one.reason for one in examined.view.wanted.values() if isinstance(one, Hold)]
    for reason in dict.fromkeys(holds):
        yield way.undecided(reason)


def _bridge(examined: Examined) -> Found:
    node = examined.node
    if node is None or not isinstance(node.lease, Lease):
        return
    found = () if examined.by_cni else examined.programs
    dockerds = [one.pid for one in found if docker.is_daemon(one)]
    idle = None if dockerds or examined.by_cni else examined.tools.find("dockerd")
    for family, lease in node.lease.families:
        if not node.has(family):
            yield way.family_off(lease, read_sysctl(way.SWITCHED_OFF_EVERYWHERE))
            continue
        key = way.SWITCHED_OFF.get(family)
        names = [link.name for link in node.links] if key else []
        off = {key.format(name): read_sysctl(key.format(name)) for name in names if key}
        yield from way.bridge(lease, node.links, examined.devices, off, dockerds, idle)


def _forwarding(examined: Examined) -> Found:
    reached = {one.leased.family: one for one in examined.reached}
    for leased in examined.leased:
        keys = way.FORWARDING[leased.family]
        value, here = read_sysctl(keys.all), reached.get(leased.family)
        own = keys.device or keys.instead
        of_device = {one: read_sysctl(own.format(one)) for one in (here.coming_in if here else ())}
        if value is not None:
            routes_there = here.around.routes if here else ()
            yield from way.forwarding(leased, value, of_device, routes_there)


def _sizes(examined: Examined) -> Found:
    if not examined.reached or examined.node is None:
        return
    first = examined.reached[0]
    bridge = first.around.device(first.bridge)
    lease = examined.node.lease
    if bridge is None or not isinstance(lease, Lease):
        return
    names = {hop.device for one in examined.reached for hop in one.there} - {first.bridge}
    devices = first.around.devices
    out = tuple(one for one in devices if one.name in names)
    ports = sizes.on_bridge(devices, bridge.name)
    yield from sizes.sizes(sizes.Sizes(lease.mtu, bridge, ports, out, devices))


def _routes(examined: Examined) -> Found:
    assert examined.node is not None or not examined.reached
    for one in examined.reached:
        links = examined.node.links if examined.node else ()
        yield from routes.routes(one.leased, one.around, links)


def _ask(destination: Address, source: Address | None = None, came_in: str = "") -> way.Asked:
    from snatd.kernel.links import find_route

    words = [str(destination)]
    words += ["from", str(source)] if source else []
    words += ["iif", came_in] if came_in else []
    found = find_route(destination, source, came_in=came_in)
    if found is None:
        return way.Asked(" ".join(words), None)
    gateway = found.next_hop if found.next_hop != destination else None
    return way.Asked(" ".join(words), found.device, gateway)


def _policy(examined: Examined) -> Found:
    for one in examined.reached:
        if one.tells:
            asked = [_ask(one.spare)]
            asked += [
                _ask(one.spare, first_container(leg.networks[0]), leg.device) for leg in one.legs
            ]
            elsewhere = list(way.to_containers(one.leased, asked, one.around))
            yield from elsewhere
            if not elsewhere:
                yield from way.to_nodes(one.leased, _asked_of(one), one.around)


def _asked_of(one: Reached) -> list[tuple[Hop, way.Asked]]:
    asked = []
    for hop in one.there[:_MOST_ROUTES]:
        destination = first_container(subtract((hop.destination,), one.leased.subnet)[0])
        led = one.around.route(destination)
        if hop.kind == UNICAST and led is not None and led.destination == hop.destination:
            asked.append((hop, _ask(destination, one.spare, one.bridge)))
    return asked


def _reverse_path(examined: Examined) -> Found:
    for one in examined.reached:
        key = way.RP_FILTER.get(one.leased.family)
        if key is None or not one.tells:
            continue
        usable = [hop for hop in one.there if hop.kind == UNICAST]
        others = []
        for hop, device, met in way.aside(usable, one.around, one.bridge)[:_MOST_ROUTES]:
            checks = {name: read_sysctl(name) for name in map(key.format, ("all", device))}
            refused = _ask(one.spare, first_container(hop.destination), device).device is None
            others.append(way.Aside(hop, device, met, checks, refused))
        dropped = read_counter("TcpExt", "IPReversePathFilter")
        yield from way.reverse_path(one.leased, others, dropped)


def _rules(examined: Examined) -> Found:
    for one in examined.reached:
        hooks = examined.hooks(one.leased.family, PREROUTING, FORWARD)
        asked = _asked_rules(examined, one, hooks)
        yield from passage.dropped(asked, one.legs)
        yield from passage.direct_routing(asked, one.legs)
        bridge = one.around.device(one.bridge)
        key = way.BRIDGE_CALLS[one.leased.family]
        asks = bridge is not None and one.leased.family in bridge.calls_iptables
        if bridge is not None and bridge.kind == "bridge" and (asks or read_sysctl(key) == "1"):
            nat = examined.hooks(one.leased.family, NAT)
            yield from passage.on_bridge(asked, nat, key)


def _asked_rules(examined: Examined, one: Reached, hooks: tuple[Hook, ...]) -> Rules:
    assert examined.node is not None
    types = examined.types(one.leased.family)
    return Rules(one.leased, one.bridge, one.spare, hooks, examined.node.iptables_is, types)


def _tunnels(examined: Examined) -> Found:
    for one in examined.reached:
        for device in _used_tunnels(one):
            assert device.vxlan is not None
            local = device.vxlan.local
            if local is None:
                continue
            family = Family.V4 if local.version == 4 else Family.V6
            hooks = examined.hooks(family, PREROUTING, INPUT)
            came_in = device.vxlan.lower or None
            ends = one.around.tunnel_ends
            yield from passage.tunnel(_asked_rules(examined, one, hooks), device, ends, came_in)


def _used_tunnels(one: Reached) -> list[Device]:
    used = {hop.device for hop in one.there}
    return [device for device in one.around.devices if device.vxlan and device.name in used]


def _connections(examined: Examined) -> Found:
    from snatd.kernel.conntrack import read_peers

    if examined.reached and examined.tools.find("conntrack") is None:
        yield Finding(
            "not_looked",
            Severity.INFO,
            "the connections could not be looked at",
            ("the command conntrack is missing",),
            "what is sent to other nodes in vain is not seen",
            ("apt-get install conntrack", "# Fedora, EL: dnf install conntrack-tools"),
        )
        return
    for one in examined.reached:
        peers, whole = read_peers(one.leased, examined.tools, _CONNECTIONS_S)
        yield from routes.strays(one.leased, peers, one.around)
        if not whole:
            yield Finding(
                "not_looked",
                Severity.INFO,
                "not all connections could be looked at",
                (f"`conntrack -L` was not done after {_CONNECTIONS_S:g} s",),
                "what is sent to other nodes in vain may not be seen",
                ("# nothing, if there are that many",),
            )


def _full(examined: Examined) -> Found:
    entries = read_number("net.netfilter.nf_conntrack_count")
    most = read_number(way.CONNECTION_LIMIT)
    table = read_table(way.CONNECTION_TABLE)
    if entries is not None and most:
        refused = {name: table.get(name, 0) for name in ("drop", "early_drop")}
        yield from way.connections_full(entries, most, refused)
    for one in examined.leased:
        table = read_table(way.NEIGHBOUR_TABLE[one.family])
        most = read_number(way.NEIGHBOUR_LIMIT[one.family])
        if table and most:
            refused = {"table_fulls": table.get("table_fulls", 0)}
            yield from way.neighbours_full(one.family, table["entries"], most, refused)


def _services(examined: Examined) -> Found:
    for one in examined.reached:
        bridge = one.around.device(one.bridge)
        if bridge is not None and has_kube_proxy(
            one.leased.family, examined.tools, examined.deadline
        ):
            value = read_sysctl(way.BRIDGE_CALLS[one.leased.family])
            yield from way.bridge_not_asking(one.leased, bridge, value)


# In the order in which one would look oneself.
CHECKS: tuple[Callable[[Examined], Found], ...] = (
    _lease,
    _bridge,
    _forwarding,
    _policy,
    _routes,
    _connections,
    _tunnels,
    _rules,
    _reverse_path,
    _sizes,
    _services,
    _full,
)
