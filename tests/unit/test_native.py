"""Native nft tables as nft 1.0.6 listed them (tests/unit/captured), and what they do."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address

import pytest

from snatd.core import native
from snatd.core.masquerade import DeviceAddress, masquerade_addresses
from snatd.core.model import Family
from snatd.core.networks import interface
from snatd.core.packet import ESTABLISHED, Check, Mark, Packet, holds
from snatd.core.trace import before_guard, rewriters
from snatd.core.writers import writer
from tests.unit.test_trace import CLUSTER, EGRESS, KUBE_MARK
from tests.unit.tracing import CAPTURED, NODE, PACKET, nft_hook, packet, traced, verdict

ZERO = str(NODE)
POD_5 = "172.7.21.5"


@pytest.mark.parametrize(
    ("name", "who", "neighbour", "outside"),
    [
        ("ip-docker-bridges", "Docker", ZERO, ZERO),
        ("inet-netavark", "netavark", ZERO, ZERO),
        ("ip-kube-proxy", "kube-proxy", "kept", "kept"),
        ("inet-firewalld", "firewalld", ZERO, ZERO),
        ("ip-io.systemd.nat", "systemd-networkd", ZERO, ZERO),
        ("ip-snatd", "snatd", "kept", "kept"),
    ],
)
def test_what_each_writer_does(name: str, who: str, neighbour: str, outside: str) -> None:
    hook = nft_hook(name)
    assert verdict(hook) == neighbour
    assert verdict(hook, of=EGRESS) == outside
    step = hook.chains[hook.chain][0]
    assert writer(hook.table, hook.chain, step.text) == who
    assert bool(rewriters([hook], CLUSTER)) is (neighbour != "kept")
    assert rewriters([hook, nft_hook("ip-snatd")], CLUSTER) == ()
    assert verdict(hook, nft_hook("ip-snatd")) == "kept"


def test_cni_asks_for_one_pod() -> None:
    hook = nft_hook("inet-cni_plugins_masquerade")
    assert verdict(hook, of=packet(POD_5)) == ZERO
    assert verdict(hook, of=packet(POD_5, "172.7.21.9")) == "kept"
    assert verdict(hook) == "kept"
    (may,) = rewriters([hook], CLUSTER)
    assert may.place is not None
    assert may.place.chain == "masq_checks"
    assert may.why == (may.place.step.text,)


def test_dockers_maps_ask_where_a_packet_came_in() -> None:
    hook = nft_hook("ip-docker-bridges")
    assert verdict(hook, of=packet(came_in="eth1")) == "kept"
    assert verdict(hook, of=packet(came_in=None)) == "may"
    assert verdict(hook, of=packet(out="docker0")) == "kept"


def test_kube_proxy_takes_its_mark_off() -> None:
    assert verdict(nft_hook("ip-kube-proxy"), of=packet(mark=KUBE_MARK)) == ZERO
    marked = packet(mark=KUBE_MARK)
    assert verdict(nft_hook("ip-kube-proxy"), nft_hook("ip-snatd"), of=marked) == ZERO


def test_firewalld_goes_by_the_device() -> None:
    hook = nft_hook("inet-firewalld")
    assert verdict(hook, of=packet(out="docker0")) == "kept"
    assert verdict(hook, of=packet(out="eth9")) == "kept"
    six = nft_hook("inet-firewalld", Family.V6)
    assert verdict(six, of=packet("fd00::1", "fd00::2")) == "kept"


def test_networkds_set_has_ranges() -> None:
    hook = nft_hook("ip-io.systemd.nat")
    assert verdict(hook, of=packet("10.0.0.9")) == ZERO
    assert verdict(hook, of=packet("10.0.0.10")) == "kept"


def test_our_guard_in_both_forms() -> None:
    (one, several) = (nft_hook("ip-snatd"), nft_hook("ip6-snatd", Family.V6))
    assert before_guard([one, several]) == ()
    (answer,) = traced(one).answers
    assert answer.kept
    assert answer.place is not None
    assert traced(one, of=packet(mark=KUBE_MARK)).answers[0].place is None
    assert traced(one, of=packet(destination="172.7.21.9")).answers[0].place is None
    for destination, bound in (
        ("fd00:7:22::2", True),
        ("fd00:9:1::1", True),
        ("fd00:9:5::1", False),
        ("fd00:7:21::3", False),
        ("2001:db8::1", False),
    ):
        (answer,) = traced(several, of=packet("fd00:7:21::2", destination)).answers
        assert (answer.place is not None) is bound, destination


def test_a_native_rule_in_the_table_of_iptables() -> None:
    hook = nft_hook("ip-nat")
    assert verdict(hook) == ZERO
    assert verdict(hook, of=packet("9.9.9.9")) == "kept"
    # What its matches ask for is not in the JSON.
    assert verdict(hook, of=packet("9.9.9.9", protocol=6, dport=80)) == "may"
    assert verdict(hook, of=packet("9.9.9.9", out="eth1")) == ZERO


V4_EXPECTED = [
    ('oifname { "a", "eth*" } return', True),
    ("oifname @ifs return", True),
    ("ct state established,related return", False),
    ("ct state new return", True),
    ("ct status dnat return", None),
    ("meta nfproto ipv6 return", False),
    ("meta l4proto { tcp, udp } return", True),
    ("ip protocol tcp return", False),
    ("ip6 nexthdr tcp return", False),
    ("tcp dport { 80, 443, 1000-2000 } return", False),
    ("udp dport != 53 return", True),
    ("ip daddr . tcp dport { 1.2.3.4 . 80 } return", None),
    ("meta mark & 0x00006000 != 0x00000000 return", False),
    ("meta mark { 0x00000001, 0x00000002 } return", False),
    ("fib daddr type local return", False),
    ("fib saddr type != local return", True),
    ("ip saddr 10.0.0.1-10.0.0.5 snat ip to 1.2.3.4", False),
    ("limit rate 1/second return", None),
    ("meta skuid 0 return", None),
    ("ip dscp lephb return", None),
    ("ip saddr & 0.0.0.255 == 0.0.0.5 return", None),
    ('iifname "docker0" return', True),
    ("snat ip prefix to ip saddr map { 172.7.21.0/24 : 10.0.0.0/24 }", None),
]


@pytest.mark.parametrize(("text", "expected"), V4_EXPECTED)
def test_a_match_of_nft(text: str, expected: bool | None) -> None:
    (step,) = [one for one in nft_hook("inet-odd").chains["post"] if one.text == text]
    results = {holds(one, PACKET, Mark()) for one in step.parts if isinstance(one, Check)}
    assert (False if False in results else None if None in results else True) is expected


FORWARDED = packet(untranslated=True, came_right=True)


@pytest.mark.parametrize(
    ("text", "of", "expected"),
    [
        ("ct status dnat accept", FORWARDED, False),
        ("ct status snat,dnat accept", FORWARDED, False),
        ("ct status != dnat accept", FORWARDED, True),
        ("ct status dnat accept", PACKET, None),
        ("ct status assured accept", FORWARDED, None),
        ("fib saddr . mark . iif oif missing drop", FORWARDED, False),
        ("fib saddr . iif oif exists accept", FORWARDED, True),
        ("fib saddr . iif oif 0 drop", FORWARDED, False),
        ("fib saddr . iif oif missing drop", PACKET, None),
        ('fib saddr . iif oif "lo" drop', FORWARDED, None),
        ("fib saddr oif missing drop", FORWARDED, None),
    ],
)
def test_a_match_of_nft_on_forward(text: str, of: Packet, expected: bool | None) -> None:
    shown = text.replace("iif oif missing", "mark . iif oif missing") if of is PACKET else text
    (step,) = [one for one in nft_hook("inet-fw").chains["forward"] if one.text == shown]
    (test,) = [one for one in step.parts if isinstance(one, Check)]
    assert holds(test, of, Mark()) is expected


def test_a_chain_of_nft_that_rejects() -> None:
    hook = nft_hook("inet-fw")
    assert hook.drops
    left = [step for step in hook.chains["forward"] if "reject" in step.text]
    assert verdict(replace(hook, drops=False, chains={"forward": tuple(left)})) == "dropped"
    for text in ("tcp option maxseg size set rt mtu", "ip dscp set cs1"):
        (step,) = [one for one in hook.chains["forward"] if text in one.text]
        assert all(isinstance(one, Check) for one in step.parts), step
    answer = packet(state=ESTABLISHED)
    assert verdict(hook, of=answer) == "kept"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "meta mark set meta mark | 0x00000010 return",
            "SetMark(keep=4294967279, flip=16, lost=0)",
        ),
        ("meta mark set ct mark return", "SetMark(keep=0, flip=0, lost=4294967295)"),
        ("snat ip to 1.2.3.4-1.2.3.9", "Snat(to=(16909060, 16909065))"),
        ("snat ip prefix to 10.0.0.0/24", "Netmap(network=IPv4Network('10.0.0.0/24'))"),
        ('log prefix "x" counter packets 0 bytes 0', ""),
        ("ip saddr set 1.2.3.4", "Unknown()"),
        ("ct mark set meta mark return", "<Verdict.RETURN: 'return'>"),
    ],
)
def test_an_action_of_nft(text: str, parts: str) -> None:
    (step,) = [one for one in nft_hook("inet-odd").chains["post"] if one.text == text]
    assert repr(step.parts[0] if step.parts else "").strip("'") == parts


@pytest.mark.parametrize(
    "expression",
    [
        {
            "match": {
                "op": "<",
                "left": {"payload": {"protocol": "tcp", "field": "dport"}},
                "right": 80,
            }
        },
        {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "eth\\*"}},
        {"match": {"op": "==", "left": {"meta": {"key": "oif"}}, "right": 7}},
        {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "@not_read"}},
        {"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": {"range": [1, 2]}}},
        {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "odd"}},
        {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": [{"|": ["new"]}]}},
        {
            "match": {
                "op": "==",
                "left": {"fib": {"result": "type", "flags": ["daddr"]}},
                "right": {"range": ["unspec", "local"]},
            }
        },
        {"match": {"op": "==", "left": "odd", "right": 1}},
        {"match": {"op": "in", "left": {"meta": {"key": "mark"}}, "right": [0, 1]}},
        {
            "match": {
                "op": "==",
                "left": {"payload": {"base": "th", "offset": 0, "len": 16}},
                "right": 1,
            }
        },
        {"xt": {"type": "match", "name": "set"}},
        {"vmap": {"key": {"meta": {"key": "mark"}}, "data": {"set": [[1, {"accept": None}]]}}},
        {"vmap": {"key": {"meta": {"key": "oifname"}}, "data": "@not_read"}},
        {"xt": None},
        {"xt": {"type": "target", "name": "NETMAP"}},
        {"snat": {"port": 5}},
        {"queue": {"num": 1}},
    ],
)
def test_what_has_no_name_here_is_undecided(expression: dict[str, object]) -> None:
    objects = [
        {"chain": {"name": "post", "prio": 1}},
        {"rule": {"chain": "post", "handle": 1, "expr": [expression, {"masquerade": None}]}},
    ]
    chains = native.compiled(Family.V4, native.listing(objects), {})
    hook = nft_hook("ip-snatd")
    other = type(hook)("ip x", "post", 1, chains)
    assert verdict(other, of=packet(out="eth0")) == "may"


def test_elements_with_a_comment_or_a_timeout() -> None:
    objects = json.loads((CAPTURED / "ip-io.systemd.nat.json").read_text())["nftables"]
    (named,) = [one["set"] for one in objects if "set" in one]
    named["elem"] = [{"elem": {"val": one, "comment": "x"}} for one in named["elem"]]
    chains = native.compiled(Family.V4, native.listing(objects), {})
    hook = type(nft_hook("ip-snatd"))("ip io.systemd.nat", "postrouting", 101, chains)
    assert verdict(hook) == ZERO
    assert hook.chains["postrouting"][0].text.startswith("(handle ")


def test_a_rule_is_shown_as_nft_writes_it() -> None:
    texts = [one.text for one in nft_hook("inet-netavark").chains["POSTROUTING"]]
    assert texts == [
        "meta mark & 0x00002000 == 0x00002000 masquerade",
        "ip saddr 172.7.21.0/24 jump nv_2f259bab_172_7_21_0_nm24",
    ]


def test_what_else_is_to_be_read() -> None:
    objects = json.loads((CAPTURED / "ip-docker-bridges.json").read_text())["nftables"]
    chains, sets = native.named(native.listing(objects))
    assert chains == {"nat-postrouting-in__docker0", "nat-postrouting-out__docker0"}
    assert sets == {("map", "nat-postrouting-in-jumps"), ("map", "nat-postrouting-out-jumps")}
    objects = json.loads((CAPTURED / "inet-odd.json").read_text())["nftables"]
    assert native.named(native.listing(objects))[1] == {("set", "ifs")}


def carried(*texts: str) -> list[DeviceAddress]:
    """`DEVICE ADDRESS/LENGTH [secondary|link|temporary]`, in the kernel's order."""
    found = []
    for text in texts:
        device, prefix, *flags = text.split(" ")
        one = interface(prefix)
        found.append(
            DeviceAddress(
                *(device, one.ip, one),
                universal="link" not in flags,
                second_choice="secondary" in flags,
                temporary="temporary" in flags,
            )
        )
    return found


@pytest.mark.parametrize(
    ("addresses", "next_hop", "expected"),
    [
        (["eth0 10.4.7.21/24"], "10.4.7.22", ["10.4.7.21"]),
        (["eth0 10.9.0.1/24", "eth0 10.4.7.21/24"], "10.4.7.22", ["10.4.7.21"]),
        (["eth0 10.9.0.1/24", "eth0 10.4.7.21/24"], "10.5.5.5", ["10.9.0.1"]),
        (["eth0 10.9.0.1/24", "eth0 10.4.7.21/24"], None, ["10.9.0.1", "10.4.7.21"]),
        (["eth0 10.4.7.21/24", "eth0 10.4.7.99/24 secondary"], None, ["10.4.7.21"]),
        (["eth0 10.4.7.99/32 link", "eth0 10.4.7.21/24"], "10.4.7.22", ["10.4.7.21"]),
        (["lo 127.0.0.1/8 link", "eth1 10.9.0.1/24"], "10.4.7.22", ["10.9.0.1"]),
        (["lo 10.7.7.7/32", "eth1 10.9.0.1/24"], "10.4.7.22", ["10.7.7.7"]),
        (["eth1 10.9.0.1/24", "eth2 10.8.0.1/24"], "10.4.7.22", ["10.9.0.1", "10.8.0.1"]),
        ([], "10.4.7.22", []),
        (["eth0 10.4.7.99/24 secondary"], "10.4.7.22", []),
    ],
)
def test_which_address_masquerade_takes(
    addresses: list[str], next_hop: str | None, expected: list[str]
) -> None:
    found = masquerade_addresses(
        Family.V4,
        "eth0",
        ip_address("203.0.113.9"),
        ip_address(next_hop) if next_hop else None,
        carried(*addresses),
    )
    assert list(map(str, found)) == expected


@pytest.mark.parametrize(
    ("addresses", "destination", "expected"),
    [
        (["eth0 fe80::1/64 link", "eth0 fd00:4::21/64"], "fd00:7::2", ["fd00:4::21"]),
        (["eth0 fd00:4::99/64", "eth0 fd00:4::21/64"], "fd00:7::2", ["fd00:4::99"]),
        (["eth0 fd00:4::99/64", "eth0 fd00:7::1/64"], "fd00:7::2", ["fd00:7::1"]),
        (["eth0 fd00:4::99/64 secondary", "eth0 fd00:4::21/64"], "fd00:7::2", ["fd00:4::21"]),
        (["eth0 fd00:4::99/64 secondary"], "fd00:7::2", ["fd00:4::99"]),
        (["eth0 fd00::1/64", "eth0 2001:db8::1/64"], "fd00:7::2", ["fd00::1", "2001:db8::1"]),
        (["eth0 fd00::1/64", "eth0 fd00::2/64 temporary"], "fd00:7::2", ["fd00::1", "fd00::2"]),
        (["eth1 fd00:9::1/64"], "fd00:7::2", ["fd00:9::1"]),
        (["eth0 fd00:9::1/64 secondary", "eth1 fd00:8::1/64"], "fd00:7::2", ["fd00:8::1"]),
        (["eth1 fd00:9::1/64", "eth2 fd00:8::1/64"], "fd00:7::2", ["fd00:9::1", "fd00:8::1"]),
        ([], "fd00:7::2", []),
    ],
)
def test_which_address_of_ipv6(addresses: list[str], destination: str, expected: list[str]) -> None:
    to = ip_address(destination)
    found = masquerade_addresses(Family.V6, "eth0", to, to, carried(*addresses))
    assert list(map(str, found)) == expected
