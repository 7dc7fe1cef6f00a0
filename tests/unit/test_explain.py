"""What `snatd explain` prints, word for word."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address

import pytest

from snatd.core.model import Family
from snatd.core.packet import Hook, Mark
from snatd.core.writers import writer
from snatd.explain import Explanation, Question, document, lines
from snatd.kernel.hooks import Hooks
from tests.unit.test_trace import CNI, KUBE
from tests.unit.tracing import PACKET, nft_hook, packet, traced, xtables_hook

BROAD = "-s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"
ASKED = Question(ip_address("172.7.21.2"), ip_address("172.7.22.2"), protocol=17, dport=5000)


def told(*hooks: Hook, mark: int = 0, unread: tuple[str, ...] = ()) -> Explanation:
    trace = traced(*hooks, of=packet(mark=Mark(mark)))
    question = replace(ASKED, mark=mark)
    read = Hooks(Family.V4, hooks, unread)
    return Explanation(question, "eth0", ip_address("10.4.7.22"), read, trace)


def printed(explanation: Explanation) -> str:
    return "\n".join(lines(explanation))


def test_the_guard_keeps_it() -> None:
    assert printed(told(xtables_hook(BROAD), nft_hook("ip-snatd"))) == (
        "172.7.21.2 to 172.7.22.2 by eth0, next hop 10.4.7.22, mark 0x0\n"
        "ip snatd postrouting, priority -199\n"
        "  postrouting 1 (snatd): ip saddr 172.7.21.0/24 ip daddr 172.7.0.0/16 "
        "ip daddr != 172.7.21.0/24 meta mark & 0x00006000 == 0x00000000 "
        'counter packets 0 bytes 0 snat to ip saddr comment "snatd"\n'
        "ip nat POSTROUTING, priority 100: not asked, the source is bound\n"
        "172.7.22.2 sees 172.7.21.2 (guard)"
    )


def test_docker_hides_it() -> None:
    assert printed(told(xtables_hook(f"{KUBE}\n{BROAD}"))) == (
        "172.7.21.2 to 172.7.22.2 by eth0, next hop 10.4.7.22, mark 0x0\n"
        "ip nat POSTROUTING, priority 100\n"
        '  POSTROUTING 1 (kube-proxy): -m comment --comment "kubernetes postrouting rules" '
        "-j KUBE-POSTROUTING\n"
        "    KUBE-POSTROUTING 1 (kube-proxy): -m mark ! --mark 0x4000/0x4000 -j RETURN\n"
        f"  POSTROUTING 2 (as Docker writes it): {BROAD}\n"
        "172.7.22.2 sees 10.4.7.21 (as Docker writes it, ip nat POSTROUTING rule 2)"
    )


def test_nothing_changes_it() -> None:
    shown = printed(told(xtables_hook("-o docker0 -j MASQUERADE"), unread=("nft is missing",)))
    assert shown == (
        "172.7.21.2 to 172.7.22.2 by eth0, next hop 10.4.7.22, mark 0x0\n"
        "ip nat POSTROUTING, priority 100: no rule\n"
        "note: nft is missing\n"
        "172.7.22.2 sees 172.7.21.2 (no rule changes it)"
    )


def test_what_it_depends_on() -> None:
    explanation = told(xtables_hook(f"-m set --match-set X dst -j ACCEPT\n{BROAD}"))
    assert printed(explanation).splitlines()[2:] == [
        "  POSTROUTING 1: -m set --match-set X dst -j ACCEPT  [only if: -m set --match-set X dst]",
        f"  POSTROUTING 2 (as Docker writes it): {BROAD}",
        "172.7.22.2 may see 10.4.7.21 or 172.7.21.2: depends on `-m set --match-set X dst`",
    ]
    found = document(explanation)
    assert (found["source"], found["kept"], found["decided_by"]) == (None, None, None)
    assert found["undecided"] == ["-m set --match-set X dst"]
    assert [(one["source"], one["kept"], one["depends_on"]) for one in found["may"]] == [
        ("10.4.7.21", False, []),
        ("172.7.21.2", True, ["-m set --match-set X dst"]),
    ]


def test_which_is_asked_first() -> None:
    other = xtables_hook("-j SNAT --to-source 10.4.7.98-10.4.7.99", "legacy ip nat")
    assert printed(told(xtables_hook(BROAD), other)).splitlines()[-1] == (
        "172.7.22.2 may see 10.4.7.21 or another address: depends on which at priority 100 is "
        "asked first of ip nat POSTROUTING, legacy ip nat POSTROUTING"
    )


def test_what_was_not_said_is_noted() -> None:
    hook = xtables_hook(f"-p tcp -j ACCEPT\n{BROAD}")
    trace = traced(hook, of=replace(PACKET, protocol=None, dport=None))
    question = replace(ASKED, protocol=None, dport=None)
    shown = printed(Explanation(question, "eth0", None, Hooks(Family.V4, (hook,)), trace))
    assert "\nnote: --proto and --dport were not given; a rule that asks for" in shown


def test_dropped() -> None:
    drop = nft_hook("ip-snatd")
    hook = Hook("ip x", "post", 0, {"post": ()}, drops=True)
    last = printed(told(hook)).splitlines()[-1]
    assert last == "172.7.22.2 sees nothing: dropped (ip x post policy drop)"
    assert document(told(hook))["dropped"] is True
    assert document(told(drop))["dropped"] is False


def test_as_json() -> None:
    found = document(told(xtables_hook(CNI), mark=0x10))
    assert json.loads(json.dumps(found)) == found
    assert found["source"] == "10.4.7.21"
    assert found["kept"] is False
    assert found["decided_by"] == {
        "table": "ip nat",
        "chain": "CNI-0123",
        "rule": 2,
        "text": found["path"][0]["rules"][1]["text"],
        "writer": "CNI bridge",
    }
    (way,) = found["path"]
    assert [(one["chain"], one["rule"], one["depth"]) for one in way["rules"]] == [
        ("POSTROUTING", 1, 0),
        ("CNI-0123", 2, 1),
    ]
    assert (found["out"], found["next_hop"], found["mark"]) == ("eth0", "10.4.7.22", 16)
    assert (found["undecided"], found["may"], found["unread"]) == ([], [], [])


@pytest.mark.parametrize(
    ("table", "chain", "text", "who"),
    [
        ("ip snatd", "postrouting", "masquerade", "snatd"),
        ("ip nat", "SNATD-POSTROUTING", "-j MASQUERADE", "snatd"),
        ("inet firewalld", "x", "masquerade", "firewalld"),
        ("ip nat", "POSTROUTING", "-s 10.0.0.0/8 ! -o eth0 -j MASQUERADE", "unknown"),
        ("ip nat", "POSTROUTING", "-s 10.0.0.0/8 ! -o docker01 -j MASQUERADE", "unknown"),
        ("ip nat", "POSTROUTING", "-m comment --comment snatd2 -j MASQUERADE", "unknown"),
        ("ip nat", "POSTROUTING", '-m comment --comment "not snatd" -j MASQUERADE', "unknown"),
        ("ip nat", "POSTROUTING", "-j CNI-HOSTPORT-MASQ", "CNI bridge"),
        ("ip nat", "POSTROUTING", "-g POST_public", "firewalld"),
        ("ip mine", "post", "jump KUBE-POSTROUTING", "kube-proxy"),
        ("ip mine", "post", "masquerade", "unknown"),
    ],
)
def test_who_wrote_it(table: str, chain: str, text: str, who: str) -> None:
    assert writer(table, chain, text) == who
