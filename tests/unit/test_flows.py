"""Lines that conntrack 1.4.7 printed on kernel 6.18, and what they are taken for."""

from __future__ import annotations

import ipaddress
import random
from dataclasses import replace

import pytest

from snatd.core.desired import Desired
from snatd.core.errors import FlowError
from snatd.core.flows import Flow, FlowKey, Ids, Verdict, one_in, parse_flow, to_delete, verdict
from snatd.core.model import Family
from snatd.flows import flow_document, flow_lines

MARKS = 0x6000


def leased(subnet: str, cluster: str, *networks: str) -> Desired:
    family = Family.V6 if ":" in subnet else Family.V4
    kept = tuple(ipaddress.ip_network(one) for one in networks or (cluster,))
    whole = (ipaddress.ip_network(cluster),)
    return Desired(
        family, ipaddress.ip_network(subnet), kept, whole, whole, (), "docker0", True, False
    )


V4 = leased("172.7.21.0/24", "172.7.0.0/16")
V6 = leased("fd00:7:21::/64", "fd00:7::/32")

UDP = (
    "udp      17 29 src=172.7.21.2 dst=172.7.22.2 sport=46917 dport=8080 src=172.7.22.2 "
    "dst=10.4.7.21 sport=8080 dport=46917 mark=0 use=1 id=2225118840"
)
SERVICE = (
    "tcp      6 119 TIME_WAIT src=172.7.21.2 dst=10.96.0.1 sport=52084 dport=8080 src=172.7.22.2 "
    "dst=10.4.7.21 sport=8080 dport=52084 [ASSURED] mark=0 use=1 id=3038093188"
)
CAPTURED = {
    "udp": UDP,
    "udp, timestamps and counters": (
        "udp      17 29 src=172.7.21.2 dst=172.7.22.2 sport=43931 dport=8080 packets=1 bytes=31 "
        "src=172.7.22.2 dst=10.4.7.21 sport=8080 dport=43931 packets=1 bytes=37 mark=0 "
        "delta-time=7 use=1 id=2550804727"
    ),
    "tcp": (
        "tcp      6 119 TIME_WAIT src=172.7.21.2 dst=172.7.22.2 sport=49306 dport=8080 "
        "src=172.7.22.2 dst=10.4.7.21 sport=8080 dport=49306 [ASSURED] mark=0 use=1 id=17672878"
    ),
    "icmp": (
        "icmp     1 29 src=172.7.21.2 dst=172.7.22.2 type=8 code=0 id=77 src=172.7.22.2 "
        "dst=10.4.7.21 type=0 code=0 id=77 mark=0 use=1 id=409473137"
    ),
    "icmpv6": (
        "icmpv6   58 29 src=fd00:7:21::2 dst=fd00:7:22::2 type=128 code=0 id=78 src=fd00:7:22::2 "
        "dst=fd00:4:7::21 type=129 code=0 id=78 mark=0 use=1 id=222684636"
    ),
    "gre": (
        "gre      47 29 src=172.7.21.2 dst=172.7.22.2 srckey=0x0 dstkey=0x4d [UNREPLIED] "
        "src=172.7.22.2 dst=10.4.7.21 srckey=0x4d dstkey=0x0 mark=0 use=1 id=4200348378"
    ),
    "sctp": (
        "sctp     132 599 ESTABLISHED src=172.7.21.2 dst=172.7.22.2 sport=5 dport=6 [UNREPLIED] "
        "src=172.7.22.2 dst=10.4.7.21 sport=6 dport=5 mark=0 use=1 id=3915553005"
    ),
    "a protocol without a name": (
        "unknown  50 599 src=172.7.21.2 dst=172.7.22.2 [UNREPLIED] src=172.7.22.2 dst=10.4.7.21 "
        "mark=0 use=1 id=709196377"
    ),
    "without a timeout": (
        "udp      17 src=172.7.21.2 dst=172.7.22.2 sport=5 dport=6 src=172.7.22.2 dst=10.4.7.21 "
        "sport=6 dport=5 [HW_OFFLOAD] mark=0 use=3 id=5"
    ),
}


def at(flow: Flow) -> Desired:
    return V6 if flow.key.source.version == 6 else V4


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


@pytest.mark.parametrize("line", CAPTURED.values(), ids=CAPTURED)
def test_what_was_captured_is_wrong(line: str) -> None:
    flow = parse_flow(line)
    assert verdict(flow, at(flow), MARKS) is Verdict.WRONG
    assert str(flow.seen_as) in ("10.4.7.21", "fd00:4:7::21")
    assert flow.id == int(line.rpartition("=")[2])


def test_the_key_is_the_whole_original_tuple() -> None:
    one, other = address("172.7.21.2"), address("172.7.22.2")
    keys = {name: parse_flow(line).key for name, line in CAPTURED.items()}
    assert keys["udp"] == FlowKey(17, one, other, 46917, 8080)
    assert keys["icmp"] == FlowKey(1, one, other, icmp=(8, 0, 77))
    assert keys["icmpv6"].icmp == (128, 0, 78)
    assert keys["gre"] == FlowKey(47, one, other, 0, 0x4D)
    assert keys["sctp"] == FlowKey(132, one, other, 5, 6)
    assert keys["a protocol without a name"] == FlowKey(50, one, other)


def test_times() -> None:
    flow = parse_flow(CAPTURED["udp, timestamps and counters"])
    assert (flow.timeout_s, flow.age_s) == (29, 7)
    assert parse_flow(UDP).age_s is None
    assert parse_flow(CAPTURED["without a timeout"]).timeout_s is None


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (UDP.replace("src=172.7.21.2", "src=172.7.23.2"), "another node's subnet"),
        (UDP.replace("172.7.22.2", "172.7.21.9"), "inside the subnet"),
        (UDP.replace("172.7.22.2", "203.0.113.9"), "egress"),
        (SERVICE, "a service address outside the networks"),
        (SERVICE.replace("10.96.0.1", "172.7.96.1"), "a service address inside the networks"),
        (UDP.replace("sport=8080 dport=46917", "sport=53 dport=46917"), "another port answers"),
        (UDP.replace("mark=0", f"mark={0x4000}"), "kube-proxy's mark was saved"),
        (UDP.replace("mark=0", f"mark={0x2001}"), "a host port's mark was saved"),
        (UDP.replace("mark=0", "mark=0 zone=7"), "a zone"),
        (UDP.replace("dport=8080 ", "dport=8080 zone-orig=7 "), "a zone of one direction"),
    ],
)
def test_near_misses_are_foreign(line: str, why: str) -> None:
    assert verdict(parse_flow(line), V4, MARKS) is Verdict.FOREIGN, why


def test_a_cut_out_is_not_among_the_networks() -> None:
    halves = leased("172.7.21.0/24", "172.7.0.0/16", "172.7.128.0/17")
    assert verdict(parse_flow(UDP), halves, MARKS) is Verdict.FOREIGN


def test_kept_is_the_same_address_whatever_the_port() -> None:
    kept = UDP.replace("dst=10.4.7.21", "dst=172.7.21.2")
    assert verdict(parse_flow(kept), V4, MARKS) is Verdict.KEPT
    assert verdict(parse_flow(kept.replace("dport=46917 mark", "dport=1 mark")), V4, 0) is (
        Verdict.KEPT
    )
    # Another address of the same subnet is not the sender's.
    other = UDP.replace("dst=10.4.7.21", "dst=172.7.21.1")
    assert verdict(parse_flow(other), V4, MARKS) is Verdict.WRONG


def test_another_bit_of_the_mark_means_nothing() -> None:
    flow = replace(parse_flow(UDP), mark=0x1)
    assert verdict(flow, V4, MARKS) is Verdict.WRONG


@pytest.mark.parametrize(
    "line",
    [
        "",
        "conntrack v1.4.7 (conntrack-tools): 1 flow entries have been shown.",
        UDP.partition(" src=172.7.22.2")[0],
        UDP.replace("id=2225118840", ""),
        UDP.replace("id=2225118840", "id="),
        UDP.replace("172.7.21.2", "172.7.21.256"),
        UDP.replace("172.7.21.2", "nobody"),
        UDP.replace("sport=46917", "sport=many"),
        UDP.replace("sport=46917", "sport=65536"),
        UDP.replace("sport=46917", "sport=-1"),
        UDP.replace("      17 ", "      256 "),
        UDP.replace("id=2225118840", f"id={2**32}"),
        CAPTURED["icmp"].replace("code=0", "code=256"),
        UDP.replace("udp      17 29", "udp"),
        CAPTURED["icmp"].replace("type=8 ", ""),
        "ipv4     2 " + UDP,
        "\\xff" + UDP,
    ],
)
def test_what_cannot_be_read_is_an_error(line: str) -> None:
    with pytest.raises(FlowError, match="conntrack printed"):
        parse_flow(line)


@pytest.mark.parametrize(
    ("policy", "deleted"),
    [("off", set()), ("report", set()), ("udp", {"udp"}), ("all", {"udp", "tcp", "icmp", "sctp"})],
)
def test_the_policy(policy: str, deleted: set[str]) -> None:
    flows = {name: parse_flow(CAPTURED[name]) for name in ("udp", "tcp", "icmp", "sctp")}
    assert {name for name, flow in flows.items() if to_delete(flow, policy)} == deleted


def test_ids() -> None:
    ids = Ids()
    for one in (0, 7, 2**32 - 1, 4096, 8192):
        ids.add(one)
    assert len(ids) == 5
    assert all(one in ids for one in (0, 7, 2**32 - 1, 4096, 8192))
    assert not any(one in ids for one in (1, 4103, 2**32 - 2))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (0, 1),
        (65_536, 1),
        (65_537, 2),
        (131_072, 2),
        (131_073, 4),
        (260_000, 4),
        (262_144, 4),
        (1_000_000, 16),
    ],
)
def test_of_large_tables_a_sample_is_counted(entries: int, expected: int) -> None:
    """At most 65,536 of any table, in which there are more of them than fit into so much memory."""
    assert one_in(entries) == expected
    assert entries / expected <= 65_536
    chance = random.Random(7)
    some = [chance.randrange(2**32) for _ in range(20_000)]
    counted = sum(Ids(expected).counted(one) for one in some)
    assert counted * expected == pytest.approx(20_000, rel=0.2)


def test_a_flow_as_json() -> None:
    assert flow_document(parse_flow(CAPTURED["icmpv6"])) == {
        "family": "ipv6",
        "protocol": "icmpv6",
        "source": "fd00:7:21::2",
        "source_port": None,
        "destination": "fd00:7:22::2",
        "destination_port": None,
        "icmp": {"type": 128, "code": 0, "id": 78},
        "state": None,
        "seen_as": "fd00:4:7::21",
        "timeout_s": 29,
        "age_s": None,
    }


def test_a_table_of_flows() -> None:
    flows = [parse_flow(CAPTURED[name]) for name in ("udp", "icmpv6")]
    assert flow_lines(flows) == (
        "PROTOCOL  SOURCE            DESTINATION      SEEN AS       ENDS IN",
        "udp       172.7.21.2:46917  172.7.22.2:8080  10.4.7.21     29 s",
        "icmpv6    fd00:7:21::2      fd00:7:22::2     fd00:4:7::21  29 s",
    )
    aged = flow_lines([replace(flows[0], age_s=90)])
    assert aged[0].endswith("ENDS IN  AGE")
    assert aged[1].endswith("29 s     90 s")
    tcp = replace(parse_flow(CAPTURED["tcp"]), timeout_s=431999)
    assert [line.split()[1] for line in flow_lines([tcp])] == ["STATE", "TIME_WAIT"]
    assert flow_lines([tcp])[1].endswith("5 d")
