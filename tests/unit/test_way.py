"""The checks of the packets' way: when each speaks, how gravely, and with what remedy.

What the kernel and packets say to the same is tests/kernel/test_doctor.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from snatd.core import passage, routes, sizes, way
from snatd.core.finding import Finding, Severity, in_order
from snatd.core.model import Backend, Family, FamilyLease, Hold
from snatd.core.packet import Hook
from snatd.core.passage import Leg, Rules
from snatd.core.routes import Peer, best, peer
from snatd.core.surroundings import Device, Hop, Neighbour, Surroundings, TunnelEnd, Vxlan, into
from snatd.kernel.sysctls import read_counter, read_number, read_sysctl, read_table
from tests.fakes import ETH0, V4, V6, lease, link, networks, node, wish
from tests.unit.tracing import xtables_hook

WISH = wish()
WISH_V6 = wish(
    node(lease("fd00:7:21::1/64", "fd00:7::/32", V6), link(3, "docker0", "fd00:7:21::1/64")),
    family=V6,
)


def names(found: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(one.name, one.severity.value) for one in found]


def hop(text: str) -> Hop:
    """From what `ip route` prints."""
    words = text.split()
    kind = words.pop(0) if words[0] in ("unreachable", "blackhole", "prohibit") else "unicast"
    fields: dict[str, Any] = {"destination": ip_network(words.pop(0).replace("default", "0/0"))}
    for name, field, read in (
        ("via", "gateway", ip_address),
        ("dev", "device", str),
        ("metric", "metric", int),
    ):
        if name in words:
            at = words.index(name)
            fields[field] = read(words[at + 1])
            del words[at : at + 2]
    return Hop(kind=kind, flags=(" ".join(words),) if words else (), **fields)


DEFAULT = Hop(ip_network("0.0.0.0/0"), device="eth0", gateway=ip_address("192.168.33.1"))
OTHER = hop("172.7.22.0/24 via 192.168.33.11 dev eth0")


def around(*hops: str | Hop, **fields: Any) -> Surroundings:
    made = tuple(hop(one) if isinstance(one, str) else one for one in hops)
    return Surroundings(routes=(DEFAULT, *made), **fields)


def test_the_gravest_comes_first_and_each_once() -> None:
    some = [
        Finding("a", severity, "says", (), "why", ())
        for severity in (Severity.INFO, Severity.WARNING, Severity.ERROR, Severity.INFO)
    ]
    assert names(in_order(tuple(some))) == [("a", "error"), ("a", "warning"), ("a", "info")]


@pytest.mark.parametrize(
    "text",
    [
        "172.7.22.0/24 via 10.4.7.22 dev eth0 metric 5 onlink",
        "unreachable 172.7.22.0/24",
        "172.7.22.0/24 dev eth0 linkdown",
    ],
)
def test_a_route_reads_as_ip_prints_it(text: str) -> None:
    assert str(hop(text)) == text


def test_the_longest_prefix_wins_and_of_these_the_least_metric() -> None:
    wide, near = "172.7.0.0/16 dev wg0", "172.7.22.0/24 via 10.4.7.22 dev eth0 metric 9"
    nearer = "172.7.22.0/24 via 10.4.7.23 dev eth0 metric 3"
    here = around(wide, near, nearer)
    assert str(here.route(ip_address("172.7.22.2"))) == nearer
    assert str(here.route(ip_address("172.7.23.2"))) == wide
    assert here.route(ip_address("9.9.9.9")) is DEFAULT
    assert here.route(ip_address("fd00::1")) is None


def test_which_routes_lead_into_the_networks() -> None:
    inside = ["172.7.22.0/24 dev eth0", "172.7.0.0/16 dev wg0", "172.0.0.0/8 dev eth1"]
    outside = ["172.7.21.0/24 dev docker0", "172.7.21.5/32 dev veth5", "10.0.0.0/8 dev eth0"]
    found = into(around(*inside, *outside).routes, WISH.networks, WISH.subnet)
    assert list(map(str, found)) == inside


HOSTILE = "eth0;reboot $(id)"


def test_a_hostile_name_stays_one_word() -> None:
    """Device names may hold anything but a slash, a colon and white space; more is tried here."""
    for command in way.set_to(f"net/ipv4/conf/{HOSTILE}/rp_filter", 2):
        words = shlex.split(command)
        assert any(HOSTILE in one for one in words)
        assert "reboot" not in words
    here = around(devices=(Device(HOSTILE, up=False),))
    down = replace(here, devices=(Device(f"flannel{HOSTILE}", up=False),))
    (found,) = routes._overlay_down(WISH, down)
    assert shlex.split(found.remedy[0])[3] == f"flannel{HOSTILE}"


def test_forwarding_on_is_silent() -> None:
    assert list(way.forwarding(WISH, "1", {"eth0": "1", "docker0": None})) == []
    assert list(way.forwarding(WISH_V6, "1", {"eth0": "0"})) == []


def test_a_router_is_told_to_listen_to_advertisements_first() -> None:
    learned = Hop(ip_network("::/0"), device="eth0", flags=("proto ra",))
    (found,) = way.forwarding(WISH_V6, "0", {"eth0": "0"}, (learned,))
    assert found.remedy[0] == "sysctl -w net/ipv6/conf/eth0/accept_ra=2"
    assert found.remedy[2] == "sysctl -w net.ipv6.conf.all.forwarding=1"


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ("docker0=172.7.21.1/24", []),
        ("cni0=172.7.21.1/24 docker0=172.17.0.1/16", []),
        ("eth0=10.0.0.1/8", [("no_bridge", "info")]),
        ("veth1=172.7.21.1/32", [("no_bridge", "info")]),
        ("docker0=172.17.0.1/16", [("bridge_elsewhere", "error")]),
        ("cni0=172.17.0.1/16", [("bridge_elsewhere", "warning")]),
        ("docker0=", [("bridge_elsewhere", "error")]),
        ("cni0=", [("bridge_elsewhere", "warning")]),
        ("docker0=fe80::1/64", [("bridge_elsewhere", "error")]),
        ("br0=172.7.21.1/16", [("bridge_elsewhere", "error")]),
        ("docker0=172.7.21.1/24 cni0=172.7.21.1/24", [("subnet_on_two_devices", "error")]),
    ],
)
def test_who_carries_the_address(links: str, expected: list[tuple[str, str]]) -> None:
    made = []
    for index, one in enumerate(links.split(" ")):
        name, _, address = one.partition("=")
        made.append(link(index, name, address))
    of = FamilyLease(ip_interface("172.7.21.1/24"), networks("172.7.0.0/16"))
    ports = [Device("v1", master="docker0"), Device("v2", master="br0")]
    assert names(way.bridge(of, made, ports, {})) == expected


def test_a_bridge_that_docker_lost() -> None:
    of = FamilyLease(ip_interface("172.7.21.1/24"), networks("172.7.0.0/16"))
    (found,) = way.bridge(of, [link(1, "eth0", "10.0.0.1/8")], [], {}, [65])
    assert (found.name, found.severity) == ("no_bridge", Severity.WARNING)
    assert "dockerd (pid 65) runs" in found.evidence[1]
    assert found.remedy[0] == "systemctl restart docker"


def test_a_lease_that_is_not_believed_says_itself_what_to_do() -> None:
    assert way.no_lease(Hold("x: read it", explained=True)).remedy[0][0] == "#"
    assert way.no_lease(Hold("x: no such file")).remedy[0] == "systemctl status flanneld"


def test_of_two_devices_the_one_with_containers_keeps_the_address() -> None:
    of = FamilyLease(ip_interface("172.7.21.1/24"), ())
    links = [link(3, "docker0", "172.7.21.1/24"), link(4, "cni0", "172.7.21.1/24")]
    (found,) = way.bridge(of, links, [Device("v1", master="cni0")], {})
    assert found.remedy[0] == "ip addr del 172.7.21.1/24 dev docker0"


@pytest.mark.parametrize(
    ("entries", "refused", "expected"),
    [
        (0, 0, []),
        (899, 0, []),
        (900, 0, ["warning"]),
        (999, 7, ["warning"]),
        (1000, 0, ["error"]),
        (1024, 0, ["error"]),
        (5, 1, ["info"]),
    ],
)
def test_how_full_a_table_is(entries: int, refused: int, expected: list[str]) -> None:
    for found, key, path in (
        (
            list(way.connections_full(entries, 1000, {"drop": 0, "early_drop": refused})),
            "net.netfilter.nf_conntrack_max",
            "early_drop = {} in /proc/net/stat/nf_conntrack",
        ),
        (
            list(way.neighbours_full(V6, entries, 1000, {"table_fulls": refused})),
            "net.ipv6.neigh.default.gc_thresh3",
            "table_fulls = {} in /proc/net/stat/ndisc_cache",
        ),
    ):
        assert [one.severity.value for one in found] == expected
        for one in found:
            counted = [path.format(refused)] if refused else []
            assert list(one.evidence) == [f"{entries} entries, {key} = 1000", *counted]
            assert one.remedy[0] == f"sysctl -w {key}=2000"


def asked(device: str | None, gateway: str = "") -> way.Asked:
    return way.Asked("172.7.22.2", device, ip_address(gateway) if gateway else None)


def test_the_kernels_answer_is_compared_with_all_hops_of_a_route() -> None:
    two = [hop(f"172.7.22.0/24 via 192.168.33.{one} dev eth0") for one in (11, 12)]
    here = around(*two, rules=("100: from 172.7.21.0/24 lookup 5",))
    for answer, wrong in (
        (asked("eth0", "192.168.33.12"), False),
        (asked("eth0", "192.168.33.1"), True),
        (asked(None), True),
    ):
        found = list(way.to_nodes(WISH, [(two[0], answer)], here))
        assert names(found) == [("route_not_followed", "error")] * wrong
    # Without a policy rule an ICMP redirect or a change meanwhile is the reason.
    assert list(way.to_nodes(WISH, [(two[0], asked("eth1"))], replace(here, rules=()))) == []


@pytest.mark.parametrize(("device", "wrong"), [("docker0", 0), (None, 0), ("eth0", 1)])
def test_where_packets_for_containers_go(device: str | None, wrong: int) -> None:
    """Where the kernel would not forward at all, something else is wrong."""
    found = list(way.to_containers(WISH, [asked(device)], around("172.7.21.0/24 dev docker0")))
    assert names(found) == [("subnet_goes_elsewhere", "error")] * wrong


def test_the_remedy_stands_before_the_first_policy_rule() -> None:
    here = around(OTHER, rules=("100: from all lookup 5", "7: iif eth0 lookup 6"))
    (found,) = way.to_nodes(WISH, [(OTHER, asked("eth1"))], here)
    assert found.remedy == (
        "ip -4 rule add to 172.7.0.0/16 lookup main suppress_prefixlength 0 priority 6",
    )


def aside(value: str, *, refused: bool = True, met: bool = True) -> way.Aside:
    there = Neighbour(ip_address("192.168.33.11"), "eth1", "STALE", "02::1") if met else None
    checks = {"net/ipv4/conf/all/rp_filter": "0", "net/ipv4/conf/eth1/rp_filter": value}
    return way.Aside(OTHER, "eth1", there, checks, refused)


@pytest.mark.parametrize(
    ("one", "dropped", "expected"),
    [
        (aside("1"), 0, ["warning"]),
        (aside("1"), 3, ["error"]),
        (aside("1", met=False), 3, ["info"]),
        (aside("1", met=False), 0, []),
        (aside("2"), 3, []),
        (aside("0"), 3, []),
        (aside("1", refused=False), 3, []),
    ],
)
def test_the_reverse_path_filter(one: way.Aside, dropped: int, expected: list[str]) -> None:
    found = list(way.reverse_path(WISH, [one], dropped))
    assert [one.severity.value for one in found] == expected
    for one_found in found:
        assert one_found.remedy[0] == "sysctl -w net/ipv4/conf/eth1/rp_filter=2"


def test_who_was_met_aside() -> None:
    there = [
        Neighbour(ip_address(address), device, state)
        for address, device, state in (
            ("192.168.33.11", "eth0", "REACHABLE"),
            ("10.0.0.9", "eth1", "STALE"),
            ("192.168.33.11", "eth1", "STALE"),
            ("192.168.33.11", "eth2", "FAILED"),
            ("172.7.21.2", "docker0", "REACHABLE"),
            ("224.0.0.22", "eth3", "NOARP"),
        )
    ]
    (one,) = way.aside([OTHER], around(OTHER, neighbours=tuple(there)), "docker0")
    assert one == (OTHER, "eth1", there[2])


ASKS = frozenset({V4})


@pytest.mark.parametrize(
    ("device", "value", "speaks"),
    [
        (Device("docker0", "bridge"), "0", True),
        (Device("docker0", "bridge"), None, True),
        (Device("docker0", "bridge"), "1", False),
        (Device("docker0", "bridge", calls_iptables=ASKS), "0", False),
        (Device("docker0", "veth"), "0", False),
    ],
)
def test_whether_the_bridge_asks(device: Device, value: str | None, speaks: bool) -> None:
    found = list(way.bridge_not_asking(WISH, device, value))
    assert names(found) == [("bridge_not_asking", "warning")] * speaks
    assert all(("modprobe br_netfilter" in one.remedy) is (value is None) for one in found)


def of_routes(here: Surroundings) -> list[tuple[str, str]]:
    return names(routes.routes(WISH, here, [replace(ETH0, name="eth0")]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unreachable 172.7.22.0/24", [("route_refuses", "error")]),
        ("blackhole 172.7.22.9/32", [("route_refuses", "error")]),
        ("prohibit 172.7.128.0/17", [("route_refuses", "info")]),
        ("unreachable 172.7.0.0/16", []),
        ("unreachable 172.0.0.0/8", []),
        ("blackhole 172.7.21.0/24", [("no_routes", "info")]),
        ("10.0.0.0/8 dev eth0", [("no_routes", "info")]),
        ("172.7.22.0/24 via 192.168.33.11 dev eth0", []),
        ("172.7.22.0/24 via 192.168.33.11 dev eth0 linkdown", [("route_dead", "error")]),
        ("172.7.22.0/24 via 192.168.33.11 dev eth0 dead", [("route_dead", "error")]),
        ("172.7.22.0/24 via 10.9.9.9 dev eth0 onlink", [("gateway_off_link", "warning")]),
        ("172.7.22.0/24 via 172.7.22.0 dev flannel.1 onlink", []),
        ("172.7.0.0/16 dev flannel-wg", []),
    ],
)
def test_a_route_into_the_networks(text: str, expected: list[tuple[str, str]]) -> None:
    assert of_routes(around(text)) == expected


def test_a_summary_around_a_nodes_route_is_no_fault() -> None:
    assert of_routes(around(OTHER, "blackhole 172.7.16.0/20")) == []


@pytest.mark.parametrize(
    ("state", "age_s", "expected"),
    [
        ("REACHABLE", 1, []),
        ("STALE", 900, []),
        ("INCOMPLETE", 1, [("gateway_silent", "error")]),
        ("FAILED", 59, [("gateway_silent", "error")]),
        ("FAILED", 61, [("gateway_silent", "info")]),
    ],
)
def test_a_gateway(state: str, age_s: float, expected: list[tuple[str, str]]) -> None:
    one = Neighbour(ip_address("192.168.33.11"), "eth0", state, "", age_s)
    assert of_routes(around(OTHER, neighbours=(one,))) == expected
    elsewhere = replace(one, device="eth1")
    assert of_routes(around(OTHER, neighbours=(elsewhere,))) == []


def test_a_gateway_that_answers_is_on_the_link() -> None:
    here = around("172.7.22.0/24 via 10.9.9.9 dev eth0 onlink")
    met = Neighbour(ip_address("10.9.9.9"), "eth0", "STALE", "02::1")
    assert of_routes(replace(here, neighbours=(met,))) == []


MAC = "02:00:00:00:00:22"


def tunnel(*, asks: bool = False) -> Surroundings:
    """Complete."""
    vxlan = Vxlan(8472, ip_address("192.168.33.10"), "eth0", asks)
    return around(
        "172.7.22.0/24 via 172.7.22.0 dev flannel.1 onlink",
        devices=(Device("flannel.1", "vxlan", 1450, vxlan=vxlan),),
        neighbours=(Neighbour(ip_address("172.7.22.0"), "flannel.1", "PERMANENT", MAC),),
        tunnel_ends=(TunnelEnd("flannel.1", MAC, ip_address("192.168.33.11")),),
    )


@pytest.mark.parametrize(
    ("without", "expected"),
    [
        ({}, []),
        ({"neighbours": ()}, [("tunnel_incomplete", "error")]),
        ({"tunnel_ends": ()}, [("tunnel_incomplete", "error")]),
        ({"routes": (DEFAULT,)}, [("route_missing", "error"), ("no_routes", "info")]),
        (
            {"routes": (DEFAULT,), "neighbours": ()},
            [("tunnel_incomplete", "error"), ("no_routes", "info")],
        ),
        ({"routes": (DEFAULT,), "neighbours": (), "tunnel_ends": ()}, [("no_routes", "info")]),
    ],
)
def test_what_flannel_makes_for_a_node(
    without: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert of_routes(replace(tunnel(), **without)) == expected
    assert "tunnel_incomplete" not in dict(of_routes(replace(tunnel(asks=True), **without)))


def test_the_tunnel_of_the_other_family_is_left_to_it() -> None:
    six = Vxlan(8472, ip_address("fd00::10"), "eth0")
    here = tunnel()
    more = TunnelEnd("flannel-v6.1", "02:00:00:00:00:66", ip_address("fd00::11"))
    here = replace(
        here,
        devices=(*here.devices, Device("flannel-v6.1", "vxlan", vxlan=six)),
        tunnel_ends=(*here.tunnel_ends, more),
    )
    assert of_routes(here) == []


LINES = [
    (
        "tcp      6 119 SYN_SENT src=172.7.21.2 dst=172.7.23.2 sport=1 dport=80 [UNREPLIED] "
        "src=172.7.23.2 dst=172.7.21.2 sport=80 dport=1 mark=0 use=1 id=5",
        True,
        False,
    ),
    (
        "tcp      6 431999 ESTABLISHED src=172.7.21.2 dst=172.7.23.2 sport=1 dport=80 "
        "src=172.7.23.2 dst=172.7.21.2 sport=80 dport=1 [ASSURED] mark=0 use=1 id=5",
        True,
        True,
    ),
    (
        "udp      17 29 src=172.7.21.2 dst=172.7.23.2 sport=1 dport=514 [UNREPLIED] "
        "src=172.7.23.2 dst=172.7.21.2 sport=514 dport=1 mark=0 use=1 id=5",
        True,
        None,
    ),
    (
        "tcp      6 59 SYN_RECV src=172.7.23.2 dst=172.7.21.2 sport=1 dport=80 "
        "src=172.7.21.2 dst=172.7.23.2 sport=80 dport=1 mark=0 use=1 id=5",
        False,
        False,
    ),
    (
        "tcp      6 431999 ESTABLISHED src=172.7.23.2 dst=172.7.21.2 sport=1 dport=80 "
        "src=172.7.21.2 dst=172.7.23.2 sport=80 dport=1 [ASSURED] mark=0 use=1 id=5",
        False,
        True,
    ),
]


@pytest.mark.parametrize(("line", "outbound", "answers"), LINES)
def test_a_connection_tells_of_a_peer(line: str, outbound: bool, answers: bool | None) -> None:
    one = peer(line, outbound=outbound)
    assert one is not None
    assert (str(one.address), one.answers) == ("172.7.23.2", answers)
    assert "  " not in one.line


def test_an_inbound_datagram_tells_nothing() -> None:
    line = "udp 17 29 src=172.7.23.2 dst=172.7.21.2 sport=1 dport=53 src=172.7.21.2 dst=1.1.1.1 "
    assert peer(line, outbound=False) is None
    with pytest.raises(ValueError, match="no connection"):
        peer("conntrack v1.4.7 (conntrack-tools)", outbound=True)


def test_of_several_connections_the_answered_one_counts() -> None:
    there = ip_address("172.7.23.2")
    unsure, lost, good = (Peer(there, one, str(one)) for one in (None, False, True))
    assert best(best(None, unsure), lost) is lost
    assert best(best(None, lost), unsure) is lost
    assert best(lost, good) is good
    assert best(good, lost) is good


@pytest.mark.parametrize(
    ("hops", "address", "answers", "expected"),
    [
        ([OTHER], "172.7.23.2", False, ["error"]),
        ([OTHER], "172.7.23.2", None, ["error"]),
        ([OTHER], "172.7.23.2", True, []),
        ([OTHER], "172.7.22.2", False, ["info"]),
        ([OTHER], "172.7.22.2", None, []),
        ([OTHER], "172.7.22.2", True, []),
        ([OTHER], "9.9.9.9", False, []),
        ([], "172.7.23.2", False, ["warning"]),
        ([], "172.7.23.2", None, []),
        (["172.0.0.0/8 via 192.168.33.9 dev eth0"], "172.7.23.2", False, ["error"]),
        (["172.7.0.0/16 dev flannel-wg"], "172.7.23.2", False, ["info"]),
        ([OTHER, "unreachable 172.7.23.0/24"], "172.7.23.2", False, []),
    ],
)
def test_who_is_talked_to_in_vain(
    hops: list[str | Hop], address: str, answers: bool | None, expected: list[str]
) -> None:
    here = around(*hops)
    found = list(routes.strays(WISH, [Peer(ip_address(address), answers, "line")], here))
    assert [one.severity.value for one in found] == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([False, False], [("subnet_silent", "warning")]),
        ([False, None], [("subnet_silent", "info")]),
        ([False, True, False], []),
    ],
)
def test_nobody_answers_behind_a_route(
    answers: list[bool | None], expected: list[tuple[str, str]]
) -> None:
    peers = [Peer(ip_address(f"172.7.22.{n}"), one, "line") for n, one in enumerate(answers, 2)]
    assert names(routes.strays(WISH, peers, around(OTHER))) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([False], ["no_way_back"]),
        ([False, None], ["no_way_back"]),
        ([None], []),
        ([False, True], []),
        ([True], []),
    ],
)
@pytest.mark.parametrize("hops", [[OTHER], [OTHER, "10.9.0.0/16 via 192.168.33.9 dev eth0"]])
def test_nobody_answers_in_an_exempted_network(
    hops: list[str], answers: list[bool | None], expected: list[str]
) -> None:
    exempted = networks("172.7.0.0/16 10.9.0.0/16")
    leased = replace(WISH, networks=exempted, cluster=exempted)
    peers = [Peer(ip_address(f"10.9.0.{n}"), one, "line") for n, one in enumerate(answers)]
    found = list(routes.strays(leased, peers, around(*hops)))
    assert [one.name for one in found] == expected


BRIDGE = Device("docker0", "bridge", 1450)


def port(mtu: int, inner: int | None) -> Device:
    return Device("veth0", "veth", mtu, master="docker0", inner_mtu=inner)


@pytest.mark.parametrize(
    ("bridge", "veth", "inner", "expected"),
    [
        (1450, 1450, 1450, []),
        (1450, 1450, None, []),
        (1400, 1400, 1400, []),
        (1400, 1450, 1450, []),
        (1450, 1400, None, ["mtu_differs_on_bridge"]),
        (1450, 1450, 1400, ["mtu_differs_on_bridge"]),
        (1450, 1500, 1450, []),
        (1450, 1400, 1450, ["mtu_differs_on_bridge"]),
        (1500, 1500, 1500, ["mtu_above_flannel"]),
        (1450, 1500, 1500, ["mtu_above_flannel"]),
        (1400, 1400, 1450, ["mtu_differs_on_bridge"]),
        (1500, 1500, None, ["mtu_above_flannel"]),
    ],
)
def test_sizes(bridge: int, veth: int, inner: int | None, expected: list[str]) -> None:
    out = (Device("flannel.1", "vxlan", 1450, vxlan=Vxlan(8472)),)
    read = sizes.Sizes(1450, replace(BRIDGE, mtu=bridge), (port(veth, inner),), out)
    assert [one.name for one in sizes.sizes(read)] == expected


@pytest.mark.parametrize(
    ("out", "severity"),
    [
        ((), Severity.WARNING),
        ((1500,), Severity.INFO),
        ((9000, 1500), Severity.INFO),
        ((1500, 1499), Severity.WARNING),
    ],
)
def test_what_only_flannel_calls_too_large(out: tuple[int, ...], severity: Severity) -> None:
    """With host-gw the device may take more than FLANNEL_MTU: nothing is lost on this node."""
    ways = tuple(Device(f"eth{number}", mtu=mtu) for number, mtu in enumerate(out))
    read = sizes.Sizes(1450, replace(BRIDGE, mtu=1500), (port(1500, 1500),), ways)
    (found,) = [one for one in sizes.sizes(read) if one.name == "mtu_above_flannel"]
    assert (found.severity, "FLANNEL_MTU=1450" in found.evidence) == (severity, True)
    assert ("eth0 has mtu 1500" in found.evidence) == (out == (1500,))


def test_a_bridge_without_containers_says_nothing_of_sizes() -> None:
    read = sizes.Sizes(1450, replace(BRIDGE, mtu=1500), (), (Device("flannel.1", mtu=1450),))
    assert list(sizes.sizes(read)) == []


def test_no_size_is_known_without_a_route_and_without_flannels_word() -> None:
    read = sizes.Sizes(None, replace(BRIDGE, mtu=9000), (port(9000, 9000),), ())
    assert list(sizes.sizes(read)) == []


def test_a_tunnel_over_ipv6_needs_more() -> None:
    vxlan = Vxlan(8472, ip_address("fd00::10"), "eth0")
    out, lower = Device("flannel.1", "vxlan", 1450, vxlan=vxlan), Device("eth0", mtu=1500)
    (found,) = sizes.sizes(sizes.Sizes(1450, BRIDGE, (), (out,), (out, lower)))
    assert found.name == "mtu_of_tunnel"
    assert found.remedy[0] == "ip link set flannel.1 mtu 1430"


def many_lines(number: int) -> Sequence[str]:
    lost = tuple(replace(port(1400, 1400), name=f"veth{one}") for one in range(number))
    (found,) = sizes._between(sizes.Sizes(1450, BRIDGE, lost, ()))
    return found.evidence


def test_of_many_containers_only_some_are_shown() -> None:
    assert len(many_lines(4)) == 5
    assert many_lines(200)[-1] == "and 196 more"


FORWARD = Rules(WISH, "docker0", ip_address("172.7.21.254"), (), Backend.NFT)
LEG = Leg("eth0", networks("172.7.22.0/24 172.7.23.0/24"))


def chain(
    rules: str, policy: str = "DROP", table: str = "ip filter", hook: str = "forward"
) -> Hook:
    """A base chain of iptables from lines `CHAIN RULE`; its own ones are called FORWARD."""
    lines = [line.removeprefix("FORWARD ") for line in rules.splitlines()]
    made = xtables_hook("\n".join(lines), table, 0)
    chains = {hook.upper(): made.chains["POSTROUTING"], **made.chains}
    return replace(made, chain=hook.upper(), chains=chains, drops=policy == "DROP", hook=hook)


def judged(*hooks: Hook, leg: Leg = LEG) -> list[tuple[str, str]]:
    return names(passage.dropped(replace(FORWARD, hooks=hooks), [leg]))


K3S = """FORWARD -m comment --comment "kube-router netpol" -j KUBE-ROUTER-FORWARD
FORWARD -m conntrack --ctstate NEW -m comment --comment lb -j KUBE-PROXY-FIREWALL
FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
KUBE-ROUTER-FORWARD -d 172.7.21.7/32 -m comment --comment "to pod" -j KUBE-POD-FW-1
KUBE-ROUTER-FORWARD -s 172.7.21.7/32 -m comment --comment "from pod" -j KUBE-POD-FW-1
KUBE-ROUTER-FORWARD -m mark --mark 0x20000/0x20000 -j ACCEPT
KUBE-POD-FW-1 -m conntrack --ctstate INVALID -j DROP
KUBE-POD-FW-1 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
KUBE-POD-FW-1 -m set --match-set KUBE-SRC src -j MARK --set-xmark 0x10000/0x10000
KUBE-POD-FW-1 -m mark ! --mark 0x10000/0x10000 -j REJECT --reject-with icmp-port-unreachable
KUBE-POD-FW-1 -j MARK --set-xmark 0x20000/0x20000
KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
KUBE-PROXY-FIREWALL -d 1.2.3.4/32 -p tcp -m tcp --dport 80 -j DROP
FLANNEL-FWD -s 172.7.0.0/16 -j ACCEPT
FLANNEL-FWD -d 172.7.0.0/16 -j ACCEPT"""


@pytest.mark.parametrize(
    ("rules", "policy", "expected"),
    [
        ("", "ACCEPT", []),
        ("", "DROP", [("inbound_dropped", "error"), ("outbound_dropped", "error")]),
        ("FORWARD -j ACCEPT", "DROP", []),
        ("FORWARD -s 172.7.0.0/16 -j ACCEPT", "DROP", []),
        ("FORWARD -d 172.7.21.0/24 -j ACCEPT", "DROP", [
            ("inbound_dropped", "error"), ("outbound_dropped", "error"),
        ]),
        ("FORWARD -i eth0 -o docker0 -j DROP", "ACCEPT", [
            ("inbound_dropped", "error"), ("outbound_dropped", "error"),
        ]),
        ("FORWARD -i eth0 -o docker0 -m conntrack --ctstate NEW -j DROP", "ACCEPT", [
            ("inbound_dropped", "error"),
        ]),
        ("FORWARD -i eth1 -j DROP", "ACCEPT", []),
        ("FORWARD -s 172.7.21.5/32 -j DROP", "ACCEPT", []),
        ("FORWARD -s 172.7.23.0/24 -j DROP", "ACCEPT", [
            ("inbound_dropped", "error"), ("outbound_dropped", "error"),
        ]),
        ("FORWARD -m set --match-set blocked src -j DROP", "ACCEPT", [
            ("inbound_may_be_dropped", "warning"), ("outbound_may_be_dropped", "warning"),
        ]),
        ("FORWARD -p tcp -m tcp --dport 25 -j DROP", "ACCEPT", [
            ("inbound_may_be_dropped", "info"), ("outbound_may_be_dropped", "info"),
        ]),
        ("FORWARD -p udp -j DROP", "ACCEPT", [
            ("inbound_may_be_dropped", "info"), ("outbound_may_be_dropped", "info"),
        ]),
        ("FORWARD -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m conntrack --ctstate NEW "
         "-j DROP", "ACCEPT", []),
        ("FORWARD -m rpfilter --invert -j DROP", "ACCEPT", []),
        ("FORWARD -p icmp -j ACCEPT", "DROP", [
            ("inbound_dropped", "error"), ("outbound_dropped", "error"),
        ]),
        (K3S, "DROP", []),
        (K3S, "ACCEPT", []),
    ],
)  # fmt: skip
def test_what_forward_lets_through(
    rules: str, policy: str, expected: list[tuple[str, str]]
) -> None:
    assert judged(chain(rules, policy)) == expected


def test_an_accept_does_not_stop_another_chain() -> None:
    accepts = chain("FORWARD -j ACCEPT")
    drops = chain("FORWARD -s 172.7.22.0/24 -j DROP", "ACCEPT", "ip mangle")
    assert ("inbound_dropped", "error") in judged(accepts, drops)


@pytest.mark.parametrize(
    ("table", "hook", "family", "iptables_is", "expected"),
    [
        ("ip filter", "forward", V4, Backend.NFT, "iptables -C FORWARD -s"),
        ("ip filter", "forward", V4, Backend.LEGACY, "iptables-nft -C FORWARD -s"),
        ("legacy ip filter", "forward", V4, Backend.NFT, "iptables-legacy -C FORWARD -s"),
        ("legacy ip filter", "forward", V4, Backend.LEGACY, "iptables -C FORWARD -s"),
        ("ip raw", "prerouting", V4, Backend.NFT, "iptables -t raw -C PREROUTING -s"),
        ("ip6 mangle", "forward", V6, Backend.NFT, "ip6tables -t mangle -C FORWARD -s"),
        ("inet filter", "forward", V4, Backend.NFT, "nft list chain inet filter FORWARD | grep"),
        ("ip6 own", "forward", V6, Backend.NFT, "nft list chain ip6 own FORWARD | grep"),
    ],
)
def test_who_writes_the_remedy(
    table: str, hook: str, family: Family, iptables_is: Backend, expected: str
) -> None:
    leased = WISH if family is V4 else WISH_V6
    leg = LEG if family is V4 else Leg("eth0", networks("fd00:7:22::/64"))
    spare = leased.subnet[-2]
    drops = chain("", "DROP", table, hook)
    rules = Rules(leased, "docker0", spare, (drops,), iptables_is)
    found = next(passage.dropped(rules, [leg]))
    assert found.remedy[0].startswith(expected), found.remedy
    there, _, puts = found.remedy[0].partition(" || ")
    assert puts.startswith(
        expected.removesuffix(" | grep")
        .replace(" list chain ", " insert rule ")
        .replace("-C", "-I")
    )
    assert "ACCEPT" in there.upper()


def test_a_chain_with_a_hostile_name_stays_one_word() -> None:
    drops = replace(chain("", "DROP", "inet fw"), chain="a; reboot", chains={"a; reboot": ()})
    found = next(passage.dropped(replace(FORWARD, hooks=(drops,)), [LEG]))
    assert shlex.split(found.remedy[0]).count("a; reboot") == 2


def test_docker_29_drops_for_a_whole_subnet() -> None:
    """Then it is not about one container, and every packet shows it."""
    raw = chain("FORWARD -d 172.7.21.0/24 ! -i docker0 -j DROP", "ACCEPT", "ip raw", "prerouting")
    asked_rules = replace(FORWARD, hooks=(raw,))
    assert list(passage.direct_routing(asked_rules, [LEG])) == []
    found = next(passage.dropped(asked_rules, [LEG]))
    assert (found.name, "allow-direct-routing" in found.remedy[-1]) == ("inbound_dropped", True)


def test_a_container_that_an_operator_cut_off_is_not_dockers_doing() -> None:
    raw = chain("FORWARD -d 172.7.21.5/32 -j DROP", "ACCEPT", "ip raw", "prerouting")
    assert list(passage.direct_routing(replace(FORWARD, hooks=(raw,)), [LEG])) == []


def test_many_containers_are_not_all_shown() -> None:
    rules = "\n".join(f"FORWARD -d 172.7.21.{n}/32 ! -i docker0 -j DROP" for n in range(2, 100))
    raw = chain(rules, "ACCEPT", "ip raw", "prerouting")
    (found,) = passage.direct_routing(replace(FORWARD, hooks=(raw,)), [LEG])
    assert found.evidence[-1] == "and 94 more"
    assert found.says.endswith("172.7.21.2, 172.7.21.3, 172.7.21.4, 172.7.21.5, 94 more")


def test_settings_are_read_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "net/ipv4/conf/eth0.7").mkdir(parents=True)
    (tmp_path / "net/ipv4/conf/eth0.7/rp_filter").write_text("2\n")
    (tmp_path / "net/ipv4/ip_forward").write_text("1\n")
    assert read_sysctl("net.ipv4.ip_forward", root=tmp_path) == "1"
    assert read_sysctl("net/ipv4/conf/eth0.7/rp_filter", root=tmp_path) == "2"
    assert read_number("net.ipv4.ip_forward", root=tmp_path) == 1
    assert read_sysctl("net.ipv4.missing", root=tmp_path) is None
    assert read_number("net.ipv4.missing", root=tmp_path) is None


def test_counters_of_all_processors_are_added(tmp_path: Path) -> None:
    (tmp_path / "stat").mkdir()
    (tmp_path / "stat/arp_cache").write_text(
        "entries  allocs   table_fulls\n0000000f 00000010 00000001\n0000000f 00000001 0000000a\n"
    )
    assert read_table("stat/arp_cache", root=tmp_path) == {
        "entries": 15,
        "allocs": 17,
        "table_fulls": 11,
    }
    assert read_table("stat/missing", root=tmp_path) == {}
    (tmp_path / "stat/odd").write_text("entries\nnonsense\n")
    assert read_table("stat/odd", root=tmp_path) == {}
    (tmp_path / "netstat").write_text(
        "TcpExt: SyncookiesSent IPReversePathFilter\nTcpExt: 5 7\nIpExt: InNoRoutes\nIpExt: 9\n"
    )
    assert read_counter("TcpExt", "IPReversePathFilter", root=tmp_path) == 7
    assert read_counter("IpExt", "InNoRoutes", root=tmp_path) == 9
    assert read_counter("TcpExt", "Missing", root=tmp_path) == 0
    assert read_counter("TcpExt", "IPReversePathFilter", root=tmp_path / "no") == 0


def test_the_machines_own_counters_can_be_read() -> None:
    """They exist in the first network namespace only, so no lonely host has them."""
    for family in Family:
        assert read_table(way.NEIGHBOUR_TABLE[family]).get("entries", 0) >= 0
    assert set(read_table(way.CONNECTION_TABLE)) >= {"drop", "early_drop"}
