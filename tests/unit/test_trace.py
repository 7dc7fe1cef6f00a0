"""Who would SNAT this packet: each test and action, forks and merges, every writer's rules."""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from snatd.core.model import Family, Policy
from snatd.core.packet import (
    ALL_BITS,
    ESTABLISHED,
    Check,
    Device,
    Field,
    Hook,
    Mark,
    Marked,
    OfType,
    Packet,
    SetMark,
    Step,
    Within,
    address_types,
    addresses,
    covered,
    holds,
    merge,
)
from snatd.core.trace import before_guard, cluster_packets, rewriters
from snatd.core.writers import writer
from tests.fakes import wish
from tests.unit.tracing import (
    NODE,
    PACKET,
    SECOND,
    nft_hook,
    packet,
    traced,
    verdict,
    xtables_hook,
)

EGRESS = packet(destination="203.0.113.9")
KUBE_MARK, HOSTPORT_MARK = Mark(0x4000), Mark(0x2000)


@pytest.mark.parametrize(
    ("some", "within", "expected"),
    [
        (((5, 5),), ((1, 4), (6, 9)), False),
        (((5, 5),), ((1, 5), (7, 9)), True),
        (((5, 6),), ((1, 5), (7, 9)), None),
        (((4, 8),), ((5, 6),), None),
        (((1, 9),), ((1, 9),), True),
        (((1, 1), (9, 9)), ((1, 1),), None),
        (((1, 1), (9, 9)), ((1, 1), (8, 20)), True),
        (((0, 9),), (), False),
        (((6, 6),), ((1, 5),), False),
        (((0, 0),), ((1, 5),), False),
        (((0, 1),), ((1, 5),), None),
        (None, ((1, 5),), None),
        (None, (), False),
    ],
)
def test_whether_numbers_lie_in_ranges(
    some: tuple[tuple[int, int], ...] | None,
    within: tuple[tuple[int, int], ...],
    expected: bool | None,
) -> None:
    assert covered(some, within) is expected


def test_neighbouring_ranges_are_one() -> None:
    assert merge([(5, 6), (1, 2), (3, 4), (9, 9), (9, 12)]) == ((1, 6), (9, 12))


OUT_OF = packet(out=None, not_out=("docker0", "cni0"))
HALF_KNOWN = Mark(0x4000, 0x6000)


@pytest.mark.parametrize(
    ("what", "mark", "expected"),
    [
        (Marked(0x4000, (0x4000,)), HALF_KNOWN, True),
        (Marked(0x2000, (0x2000,)), HALF_KNOWN, False),
        (Marked(0x6000, (0x4000,)), HALF_KNOWN, True),
        (Marked(0x7000, (0x4000,)), HALF_KNOWN, None),
        (Marked(0x7000, (0x2000, 0x3000)), HALF_KNOWN, False),
        (Marked(0x7000, (0x2000, 0x5000)), HALF_KNOWN, None),
        (Marked(ALL_BITS, (0,)), Mark(0, 0), None),
        (Marked(0, (0,)), Mark(0, 0), True),
        (Marked(0x4000, (0x4001,)), Mark(0x4001), False),
    ],
)
def test_a_mark_is_known_bit_by_bit(what: Marked, mark: Mark, expected: bool | None) -> None:
    assert holds(Check("", what), PACKET, mark) is expected
    opposite = None if expected is None else not expected
    assert holds(Check("", what, negated=True), PACKET, mark) is opposite


@pytest.mark.parametrize(
    ("action", "before", "after"),
    [
        (SetMark(0, 5), Mark(1, 1), Mark(5)),
        (SetMark(ALL_BITS, 0x4000), Mark(0x4001), Mark(1)),
        (SetMark(ALL_BITS, 0x4000), Mark(0, 0), Mark(0, 0)),
        (SetMark(0xFFFFBFFF, 0x4000), Mark(0, 0), Mark(0x4000, 0x4000)),
        (SetMark(0x1), Mark(0x3, 0x3), Mark(0x1, ALL_BITS)),
        (SetMark(lost=ALL_BITS), Mark(5), Mark(0, 0)),
    ],
)
def test_what_becomes_of_a_mark(action: SetMark, before: Mark, after: Mark) -> None:
    assert action.of(before) == after


@pytest.mark.parametrize(
    ("out", "names", "known", "unknown"),
    [
        (True, ("eth0",), True, None),
        (True, ("eth*",), True, None),
        (True, ("docker0",), False, False),
        (True, ("docker0", "cni0"), False, False),
        (True, ("docker*",), False, None),
        (True, ("e", "eth00", "eth"), False, None),
        (True, ("*",), True, None),
        (False, ("docker0",), True, None),
        (False, ("docker",), False, None),
    ],
)
def test_a_device(out: bool, names: tuple[str, ...], known: bool, unknown: bool | None) -> None:
    test = Check("", Device(out, names))
    assert holds(test, PACKET, Mark()) is known
    assert (
        holds(test, packet(out=None, not_out=("docker0", "cni0"), came_in=None), Mark()) is unknown
    )


def test_a_packet_of_the_nodes_own_came_in_nowhere() -> None:
    own = packet(came_in="")
    assert holds(Check("", Device(False, ("lo", "eth*"))), own, Mark()) is False


@pytest.mark.parametrize(
    ("destination", "kind", "expected"),
    [
        ("10.4.7.21", "local", True),
        ("10.4.7.22", "local", False),
        ("127.9.9.9", "local", True),
        ("10.4.7.0/24", "local", None),
        ("10.4.7.22", "unicast", True),
        ("10.4.7.21", "unicast", False),
        ("224.0.0.1", "unicast", False),
        ("224.0.0.1", "multicast", True),
        ("255.255.255.255", "broadcast", True),
        ("10.4.7.255", "broadcast", True),
        ("255.255.255.254", "unicast", True),
        ("10.4.7.22", "blackhole", None),
        ("fd00::1", "unicast", None),
    ],
)
def test_the_type_of_an_address(destination: str, kind: str, expected: bool | None) -> None:
    family = Family.V6 if ":" in destination else Family.V4
    types = PACKET.types if family is Family.V4 else address_types(family, [])
    of = packet(destination=destination, types=types)
    assert holds(Check("", OfType(Field.DESTINATION, (kind,))), of, Mark()) is expected


def test_several_types_are_one_or_another() -> None:
    both = Check("", OfType(Field.DESTINATION, ("local", "unicast")))
    assert holds(both, packet(destination="10.4.7.21"), Mark()) is True
    assert holds(both, packet(destination="224.0.0.1"), Mark()) is False
    odd = Check("", OfType(Field.DESTINATION, ("local", "throw")))
    assert holds(odd, packet(destination="10.4.7.22"), Mark()) is None


MATCHES = [
    ("-s 172.7.21.0/24", True),
    ("! -s 172.7.21.0/24", False),
    ("-s 172.7.21.3/32", False),
    ("-d 172.7.22.2/32", True),
    ("! -d 224.0.0.0/4", True),
    ("-o eth0", True),
    ("-o eth+", True),
    ("! -o eth+", False),
    ("! -o docker0", True),
    ("-p udp", True),
    ("! -p tcp", True),
    ("-p 17", True),
    ("-p tcp", False),
    ("-p udp -m udp --dport 5000", True),
    ("-p udp -m udp ! --dport 5000", False),
    ("-p udp -m udp --dport 4000:5000", True),
    ("-p udp -m udp --dport 5001:65535", False),
    ("-p udp -m udp --sport 4000", True),
    ("-p udp -m multiport --dports 80,4999:5000", True),
    ("-p udp -m multiport ! --dports 80,5000", False),
    ("-p udp -m multiport --sports 80", False),
    ("-p udp -m multiport --ports 5000", None),
    ("-m mark --mark 0x0", True),
    ("-m mark --mark 0x4000/0x4000", False),
    ("-m mark ! --mark 0x4000/0x4000", True),
    ("-m addrtype --dst-type LOCAL", False),
    ("-m addrtype ! --dst-type LOCAL", True),
    ("-m addrtype --src-type UNICAST,LOCAL", True),
    ("-m addrtype --src-type LOCAL --limit-iface-out", None),
    ("-m addrtype --src-type LOCAL ! --dst-type LOCAL", False),
    ("-m conntrack --ctstate NEW,RELATED", True),
    ("-m conntrack ! --ctstate NEW", False),
    ("-m conntrack --ctstate RELATED,ESTABLISHED", False),
    ("-m conntrack --ctstate DNAT", None),
    ("-m conntrack --ctstate NEW --ctdir ORIGINAL", None),
    ("-m state --state NEW", True),
    ("-m set --match-set KUBE src", None),
    ("-m set ! --match-set KUBE src,src", None),
    ("-m physdev --physdev-is-bridged", None),
    ("-m socket", None),
    ("-f", None),
    ('-m comment --comment "! -s 10.0.0.0/8 -j RETURN"', True),
    ("-m comment --comment a -m comment --comment b", True),
    ("-p udp -m udp --dport 5000 -m owner --uid-owner 0", None),
    ("-i docker0", True),
    ("-i dock+", True),
    ("! -i docker0", False),
    ("-i eth0 -o eth0", False),
    ("-m rpfilter --validmark --invert", None),
    ("-p udp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", None),
]


@pytest.mark.parametrize(("match", "expected"), MATCHES)
def test_a_match_of_iptables(match: str, expected: bool | None) -> None:
    seen = verdict(xtables_hook(f"POSTROUTING {match} -j MASQUERADE"))
    assert seen == {True: str(NODE), False: "kept", None: "may"}[expected]


ANSWER = packet(state=ESTABLISHED, protocol=6, untranslated=True)
FIRST = packet(protocol=6, untranslated=True, came_right=True)
WRONG = packet(protocol=6, came_right=False)


@pytest.mark.parametrize(
    ("match", "of", "expected"),
    [
        ("-m conntrack --ctstate RELATED,ESTABLISHED", ANSWER, True),
        ("-m conntrack --ctstate NEW", ANSWER, False),
        ("-m state --state INVALID", ANSWER, False),
        ("-m conntrack --ctstate DNAT", FIRST, False),
        ("-m conntrack --ctstate NEW,DNAT", FIRST, True),
        ("-m conntrack --ctstate SNAT,DNAT", PACKET, None),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", FIRST, True),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN", FIRST, False),
        ("-p tcp -m tcp --tcp-flags SYN,FIN NONE", FIRST, False),
        ("-p tcp -m tcp --tcp-flags FIN,RST NONE", FIRST, True),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN", ANSWER, None),
        ("-m rpfilter --validmark --invert", FIRST, False),
        ("-m rpfilter --validmark --invert", WRONG, True),
        ("-m rpfilter --loose", FIRST, True),
    ],
)
def test_a_match_about_the_connection(match: str, of: Packet, expected: bool | None) -> None:
    seen = verdict(xtables_hook(f"POSTROUTING {match} -j MASQUERADE"), of=of)
    assert seen == {True: str(NODE), False: "kept", None: "may"}[expected]


def test_prerouting_comes_before_forward_whatever_their_priorities() -> None:
    """A mark that is set on the way in is seen on the way through."""
    mark = replace(xtables_hook("POSTROUTING -j MARK --set-xmark 0x1/0xffffffff"), priority=50)
    drop = xtables_hook("POSTROUTING -m mark --mark 0x1 -j DROP", priority=-50)
    way = (replace(mark, hook="prerouting"), replace(drop, hook="forward"))
    assert verdict(*way) == verdict(*reversed(way)) == "dropped"
    assert verdict(replace(mark, hook="forward"), replace(drop, hook="prerouting")) == "kept"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("-j MASQUERADE", str(NODE)),
        ("-j MASQUERADE --to-ports 1024-2048 --random", str(NODE)),
        ("-j SNAT --to-source 10.4.7.99", str(SECOND)),
        ("-j SNAT --to-source 10.4.7.99:1000-2000 --random", str(SECOND)),
        ("-j SNAT --to-source 10.4.7.99-10.4.7.99", str(SECOND)),
        ("-j SNAT --to-source 10.4.7.98-10.4.7.99", "may"),
        ("-j SNAT --to-source 10.4.7.98 --to-source 10.4.7.99", "may"),
        ("-j SNAT --to-source 172.7.21.2", "kept"),
        ("-j SNAT --to-source nonsense", "may"),
        ("-j SNAT --to-source", "may"),
        ("-j SNAT --random", "may"),
        ("-j MARK --set-xmark nonsense/x\n-j SNAT --to-source 10.4.7.99", str(SECOND)),
        ("-j NETMAP --to 10.88.1.0/24", "10.88.1.2"),
        ("-j NETMAP --to 10.88.1.7/32", "10.88.1.7"),
        ("-j NETMAP --to 172.7.21.0/24", "kept"),
        ("-j NETMAP --to nonsense", "may"),
        ("-j ACCEPT", "kept"),
        ("-j RETURN", "kept"),
        ("-j DROP", "dropped"),
        ("-j REJECT --reject-with icmp-port-unreachable", "dropped"),
        ("-j LOG --log-prefix x", "later"),
        ("-j TCPMSS --clamp-mss-to-pmtu", "later"),
        ("-j CT --helper ftp", "later"),
        ("-j CT --notrack", "may"),
        ("-j CONNMARK --save-mark", "later"),
        ("-m comment --comment counted", "later"),
        ("-j NFQUEUE --queue-num 0", "may"),
        ("-j MARK --set-xmark 0x1/0xffffffff", "later"),
    ],
)
def test_a_target_of_iptables(target: str, expected: str) -> None:
    later = xtables_hook(f"POSTROUTING {target}\n-j SNAT --to-source 1.1.1.1")
    assert verdict(later) == {"later": "1.1.1.1"}.get(expected, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fd00::9", "fd00::9"),
        ("[fd00::9]:1000-2000", "fd00::9"),
        ("fd00::9-fd00::9", "fd00::9"),
        ("[fd00::8-fd00::9]:1-2", "may"),
    ],
)
def test_an_address_of_ipv6_may_stand_in_brackets(text: str, expected: str) -> None:
    six = packet("fd00:7:21::2", "fd00:7:22::2")
    assert verdict(xtables_hook(f"-j SNAT --to-source {text}"), of=six) == expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        # RETURN in a chain protects from nothing that follows the jump.
        ("C -j RETURN\n-j C\n-j MASQUERADE", str(NODE)),
        ("-j RETURN\n-j MASQUERADE", "kept"),
        ("C -j ACCEPT\n-j C\n-j MASQUERADE", "kept"),
        # What a goto returns to is the caller of its caller.
        ("C -g D\nC -j ACCEPT\nD -p tcp\n-j C\n-j MASQUERADE", str(NODE)),
        ("C -p tcp\n-g C\n-j MASQUERADE", "kept"),
        ("C -j D\nC -j ACCEPT\nD -p tcp\n-j C\n-j MASQUERADE", "kept"),
        # The first binding wins.
        ("-j SNAT --to-source 10.4.7.99\n-j MASQUERADE", str(SECOND)),
        # A mark that is set here is asked for here.
        (
            "-j MARK --set-xmark 0x4000/0x4000\n-m mark --mark 0x4000/0x4000 -j MASQUERADE",
            str(NODE),
        ),
        (
            "C -j MARK --set-xmark 0x1/0xffffffff\n-j C\n-m mark ! --mark 0x1 -j MASQUERADE",
            "kept",
        ),
        (
            "-j CONNMARK --restore-mark\n-m mark --mark 0x1 -j MASQUERADE",
            "may",
        ),
        ("-j MARK --and-mark 0x1\n-m mark --mark 0x1 -j MASQUERADE", "may"),
        # Undecided, but it comes to the same.
        (
            "C -j RETURN\n-m set --match-set X src -j C\n-j MASQUERADE",
            str(NODE),
        ),
        (
            "-m set --match-set X src -j MASQUERADE\n-j MASQUERADE",
            str(NODE),
        ),
        ("-m set --match-set X src -j ACCEPT", "kept"),
        ("-m set --match-set X src -j ACCEPT\n-j MASQUERADE", "may"),
        (
            "C -j ACCEPT\n-m set --match-set X src -g C\n-j MASQUERADE",
            "may",
        ),
        (
            "-m set --match-set X src -j MARK --set-xmark 0x1/0x1\n"
            "-m mark --mark 0x1/0x1 -j SNAT --to-source 10.4.7.99\n"
            "-m mark --mark 0x0/0x1 -j SNAT --to-source 10.4.7.99",
            str(SECOND),
        ),
        # A rule that cannot be read may do anything.
        ("-s 10.0.0.0/255.0.255.0 -j RETURN\n-j MASQUERADE", "may"),
    ],
)
def test_chains(rules: str, expected: str) -> None:
    assert verdict(xtables_hook(rules)) == expected


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("--set-xmark 0x4000/0x4000", 0x1, 0x4001),
        ("--set-xmark 0x4000/0x0", 0x4001, 0x1),
        ("--set-xmark 0x1/0xffffffff", 0x4000, 0x1),
        ("--set-xmark 0x0/0x4000", 0x4001, 0x1),
        ("--set-mark 0x2/0x1", 0x7, 0x6),
        ("--set-mark 0x2", 0x7, 0x2),
    ],
)
def test_a_mark_as_iptables_sets_it(option: str, before: int, after: int) -> None:
    rules = f"-j MARK {option}\n-m mark --mark {after:#x} -j MASQUERADE"
    assert verdict(xtables_hook(rules), of=packet(mark=Mark(before))) == str(NODE)


def test_an_accept_does_not_stop_the_next_hook() -> None:
    first = xtables_hook("-j ACCEPT", "ip a", 50)
    mark = xtables_hook("-j MARK --set-xmark 0x1/0x1", "ip b", 60)
    last = xtables_hook("-m mark --mark 0x1/0x1 -j MASQUERADE")
    assert verdict(last, mark, first) == str(NODE)
    assert verdict(last, first) == "kept"


def test_an_own_address_binds_too() -> None:
    keep = xtables_hook("-j SNAT --to-source 172.7.21.2", "ip a", 50)
    found = traced(xtables_hook("-j MASQUERADE"), keep)
    assert found.answer is not None
    assert found.answer.kept
    assert str(found.answer.place) == "ip a POSTROUTING rule 1"
    assert [hook.table for hook, _ in found.ways] == ["ip a"]


def test_the_order_of_equal_priorities_cannot_be_seen() -> None:
    masquerade = xtables_hook("-j MASQUERADE")
    other = xtables_hook("-j SNAT --to-source 10.4.7.99", "legacy ip nat")
    assert verdict(masquerade, other) == "may"
    (why,) = traced(masquerade, other).undecided
    assert (
        why
        == "which at priority 100 is asked first of ip nat POSTROUTING, legacy ip nat POSTROUTING"
    )
    same = xtables_hook("-j MASQUERADE", "legacy ip nat")
    assert verdict(masquerade, same) == str(NODE)
    passing = xtables_hook("-j ACCEPT", "legacy ip nat")
    assert verdict(masquerade, *[passing] * 9) == str(NODE)
    assert verdict(*[passing] * 9) == "kept"
    assert verdict(masquerade, *[other] * 9) == "may"


def test_a_mark_of_one_may_matter_to_the_other() -> None:
    mark = xtables_hook("-j MARK --set-xmark 0x1/0x1")
    asks = xtables_hook("-m mark --mark 0x1/0x1 -j MASQUERADE", "legacy ip nat")
    assert verdict(mark, asks) == verdict(asks, mark) == "may"


def test_many_marks_become_one_that_is_half_known() -> None:
    rules = [
        f"-m set --match-set X src -j MARK --set-xmark {1 << bit:#x}/{1 << bit:#x}"
        for bit in range(20)
    ]
    asks = "-m mark --mark {} -j MASQUERADE"
    assert verdict(xtables_hook("\n".join([*rules, asks.format("0x0/0x1000000")]))) == str(NODE)
    assert verdict(xtables_hook("\n".join([*rules, asks.format("0x80000/0x80000")]))) == "may"


def test_a_masquerade_without_an_address_drops() -> None:
    assert verdict(xtables_hook("-j MASQUERADE"), masquerade=()) == "dropped"
    assert verdict(xtables_hook("-j MASQUERADE"), masquerade=(NODE, SECOND)) == "may"
    assert verdict(xtables_hook("-j MASQUERADE"), masquerade=None) == "may"


def test_a_policy_may_drop() -> None:
    hook = Hook("ip x", "post", 0, {"post": ()}, drops=True)
    assert verdict(hook) == "dropped"
    accepting = xtables_hook("-j ACCEPT")
    assert verdict(Hook("ip x", "POSTROUTING", 0, accepting.chains, drops=True)) == "kept"


def test_a_chain_that_was_not_read_may_do_anything() -> None:
    hook = xtables_hook("C -j RETURN\n-j C")
    cut = Hook("ip nat", "POSTROUTING", 100, {"POSTROUTING": hook.chains["POSTROUTING"]})
    assert verdict(cut) == "may"


def test_a_loop_ends() -> None:
    assert verdict(xtables_hook("C -j D\nD -j C\n-j C")) == "may"


@pytest.mark.parametrize("match", ["", "-m set --match-set X src "])
def test_a_chain_of_fifty_thousand_rules(match: str) -> None:
    (step,) = xtables_hook(f"POSTROUTING {match}-s 172.7.21.3 -j ACCEPT").chains["POSTROUTING"]
    (other,) = xtables_hook(f"POSTROUTING {match}-j MARK --set-xmark 0x1/0x1").chains["POSTROUTING"]
    (last,) = xtables_hook("-j MASQUERADE").chains["POSTROUTING"]
    chain = (*(Step(n, one.text, one.parts) for n in range(25_000) for one in (step, other)), last)
    began_s = time.process_time()
    assert verdict(Hook("ip nat", "POSTROUTING", 100, {"POSTROUTING": chain})) == str(NODE)
    assert time.process_time() - began_s < 5


def test_jumps_that_multiply_cost_no_more_than_their_rules() -> None:
    rules = [
        f"C{n} -j C{n + 1}\nC{n} -m set --match-set X src -j C{n + 1}\n" * 4 for n in range(16)
    ]
    hook = xtables_hook("\n".join([*rules, "C16 -p tcp", "-j C0", "-j MASQUERADE"]))
    assert verdict(hook) == str(NODE)


FLANNEL = """
    -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
    FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
    FLANNEL-POSTRTG -s {0} -d 172.7.0.0/16 -m comment --comment "flanneld masq" -j RETURN
    FLANNEL-POSTRTG -s 172.7.0.0/16 -d {0} -m comment --comment "flanneld masq" -j RETURN
    FLANNEL-POSTRTG ! -s 172.7.0.0/16 -d {0} -m comment --comment "flanneld masq" -j RETURN
    FLANNEL-POSTRTG -s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully
    FLANNEL-POSTRTG ! -s 172.7.0.0/16 -d 172.7.0.0/16 -j MASQUERADE --random-fully
"""
CNI = """
    -s 172.7.21.2/32 -m comment --comment "name: \\"cbr0\\" id: \\"ab\\"" -j CNI-0123
    CNI-0123 -d 172.7.21.0/24 -m comment --comment "name: \\"cbr0\\" id: \\"ab\\"" -j ACCEPT
    CNI-0123 ! -d 224.0.0.0/4 -m comment --comment "name: \\"cbr0\\" id: \\"ab\\"" -j MASQUERADE
"""
NETAVARK = """
    -s 172.7.21.0/24 -j NETAVARK-1D87
    NETAVARK-1D87 -d 172.7.21.0/24 -j ACCEPT
    NETAVARK-1D87 ! -d 224.0.0.0/4 -j MASQUERADE
"""
KUBE = """
    -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
    KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
    KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
    KUBE-POSTROUTING -m comment --comment "service traffic requiring SNAT" -j MASQUERADE
"""
AGENT = """
    -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
    IP-MASQ-AGENT -d 10.0.0.0/8 -j RETURN
    IP-MASQ-AGENT -j MASQUERADE
"""
FIREWALLD = """
    -j POSTROUTING_ZONES
    POSTROUTING_ZONES -o eth0 -g POST_public
    POSTROUTING_ZONES -g POST_public
    POST_public -j POST_public_allow
    POST_public_allow ! -o lo -j MASQUERADE
"""
HAIRPIN = "-s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE"
# Rules, who wrote the first of them, what a neighbour sees, and what the world outside.
WRITERS = [
    ("-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE", "Docker", NODE, NODE),
    ("-s 172.7.21.0/24 ! -o br-0123456789ab -j MASQUERADE", "Docker", NODE, NODE),
    ("-s 172.7.21.0/24 ! -d 172.7.21.0/24 -j MASQUERADE", "Docker", NODE, NODE),
    (
        "-s 172.7.21.0/24 ! -o docker0 -j SNAT --to-source 10.4.7.99",
        "Docker",
        SECOND,
        SECOND,
    ),
    (
        "-s 172.7.21.0/24 ! -d 172.7.0.0/16 ! -o docker0 -m comment --comment snatd -j MASQUERADE",
        *("snatd", "kept", NODE),
    ),
    (CNI, "CNI bridge", NODE, NODE),
    (NETAVARK, "netavark", NODE, NODE),
    (
        '-s 172.7.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE\n'
        "-s 172.7.0.0/16 -d 172.7.0.0/16 -j RETURN",
        *("flannel", NODE, NODE),
    ),
    (FLANNEL.format("172.7.21.0/24"), "flannel", "kept", NODE),
    (FLANNEL.format("172.7.9.0/24"), "flannel", NODE, NODE),
    (AGENT, "ip-masq-agent", NODE, NODE),
    ("-o eth0 -j MASQUERADE", "unknown", NODE, NODE),
    ("-s 172.7.21.0/24 -j MASQUERADE", "unknown", NODE, NODE),
    ("-j MASQUERADE", "unknown", NODE, NODE),
    (
        "-s 172.7.0.0/16 -o eth0 -j SNAT --to-source 10.4.7.99",
        "unknown",
        SECOND,
        SECOND,
    ),
    (FIREWALLD, "firewalld", NODE, NODE),
    (KUBE, "kube-proxy", "kept", "kept"),
    (
        "CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE\n-j CNI-HOSTPORT-MASQ",
        "CNI bridge",
        "kept",
        "kept",
    ),
    (HAIRPIN, "Docker", "kept", "kept"),
    ("-o docker0 -m addrtype --src-type LOCAL -j MASQUERADE", "Docker", "kept", "kept"),
    (
        "LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE\n-j LIBVIRT_PRT",
        "libvirt",
        "kept",
        "kept",
    ),
    (
        '! -s 172.7.0.0/16 -d 172.7.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE',
        "flannel",
        "kept",
        "kept",
    ),
]


@pytest.mark.parametrize(("rules", "who", "neighbour", "outside"), WRITERS)
def test_what_each_writer_does(rules: str, who: str, neighbour: object, outside: object) -> None:
    hook = xtables_hook(rules)
    assert verdict(hook) == str(neighbour)
    assert verdict(hook, of=EGRESS) == str(outside)
    assert writer("ip nat", "POSTROUTING", hook.chains["POSTROUTING"][0].text) == who
    guard = nft_hook("ip-snatd")
    assert verdict(hook, guard) == "kept"
    assert verdict(hook, guard, of=EGRESS) == str(outside)


@pytest.mark.parametrize("guarded", [False, True])
def test_marked_traffic_is_masqueraded_guard_or_not(guarded: bool) -> None:
    guard = [nft_hook("ip-snatd")] if guarded else []
    assert verdict(xtables_hook(KUBE), *guard, of=packet(mark=KUBE_MARK)) == str(NODE)
    portmap = xtables_hook(
        "CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE\n-j CNI-HOSTPORT-MASQ"
    )
    assert verdict(portmap, *guard, of=packet(mark=HOSTPORT_MARK)) == str(NODE)


MASQUERADE_MARKS = 0x6000
CLUSTER = cluster_packets(wish(), MASQUERADE_MARKS, PACKET.types)


@pytest.mark.parametrize(("rules", "_who", "neighbour", "_outside"), WRITERS)
def test_who_can_rewrite_cluster_traffic(
    rules: str, _who: str, neighbour: object, _outside: object
) -> None:
    hook = xtables_hook(rules)
    found = rewriters([hook], CLUSTER)
    assert bool(found) is (neighbour != "kept")
    assert rewriters([hook, nft_hook("ip-snatd")], CLUSTER) == ()


def test_a_rule_that_may_is_named_with_what_it_depends_on() -> None:
    hook = xtables_hook(
        "-s 172.7.21.5 -p tcp -m tcp --dport 80 -m set --match-set X dst -j MASQUERADE\n"
        "-o docker0 -j MASQUERADE\n"
        "-m mark --mark 0x8000/0x8000 -j MASQUERADE\n"
        "-s 172.7.22.0/24 -j MASQUERADE"
    )
    found = rewriters([hook], CLUSTER)
    assert [one.place.step.number for one in found if one.place] == [1, 3]
    assert found[0].why == (
        "-s 172.7.21.5/32",
        "-p tcp",
        "-m tcp --dport 80",
        "-m set --match-set X dst",
    )
    assert found[1].why == ("-m mark --mark 0x8000/0x8000",)


def test_nobody_on_an_empty_node() -> None:
    assert rewriters([], CLUSTER) == ()


def test_the_class_is_what_promise_one_is_about() -> None:
    for packets in CLUSTER:
        assert packets.source == addresses([ip_network("172.7.21.0/24")])
        assert packets.mark == Mark(0, 0x6000)
        assert covered(packets.destination, addresses([ip_network("172.7.21.0/24")])) is False
        assert covered(packets.destination, addresses([ip_network("172.7.0.0/16")])) is True
        assert packets.not_out == ("docker0",)
    whole = sum(high - low + 1 for one in CLUSTER for low, high in one.destination)
    assert whole == 2**16 - 2**8


def test_rules_that_share_the_work_let_nothing_through() -> None:
    """Our own chain for several networks: each RETURN holds for a part of the packets only."""
    several = wish(policy=Policy(networks=(ip_network("10.200.0.0/16"),)))
    hook = xtables_hook(
        """
        -s 172.7.21.0/24 ! -o docker0 -m comment --comment snatd -j SNATD-POSTROUTING
        SNATD-POSTROUTING -d 10.200.0.0/16 -j RETURN
        SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN
        SNATD-POSTROUTING -j MASQUERADE
        """
    )
    packets = cluster_packets(several, MASQUERADE_MARKS, PACKET.types)
    assert rewriters([hook], packets) == ()
    wider = wish(policy=Policy(networks=(ip_network("10.200.0.0/15"),)))
    (found,) = rewriters([hook], cluster_packets(wider, 0))
    assert found.place is not None
    assert found.place.step.text == "-j MASQUERADE"


def test_who_is_asked_before_the_guard() -> None:
    early = xtables_hook("-j ACCEPT", "ip early", -199)
    late = xtables_hook("-j ACCEPT", "ip late", -198)
    assert before_guard([early, late, nft_hook("ip-snatd")]) == (early,)


def test_an_address_is_one() -> None:
    assert PACKET.exact_source == ip_address("172.7.21.2")
    assert packet("172.7.21.0/31").exact_source is None
    assert holds(Check("", Within(Field.SPORT, ((4000, 4000),))), PACKET, Mark()) is True
