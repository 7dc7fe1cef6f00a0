"""What a plan makes of POSTROUTING: the chain before and after, as `iptables -S` prints them."""

from __future__ import annotations

import pytest

from snatd.core.desired import Absent, Desired
from snatd.core.mend import misplaced, undone
from snatd.core.model import POSTROUTING, Backend, Counters, Policy, Rule, Ruleset
from snatd.core.plan import (
    ChainEdit,
    Change,
    Transaction,
    applied,
    chain_name,
    plan,
)
from snatd.core.revert import revert
from snatd.core.rules import Target
from snatd.kernel.nft import restore_script
from tests.fakes import (
    BROAD,
    ETH0,
    FLANNEL1,
    IPTABLES,
    JUMP,
    LEGACY,
    LO,
    NFT,
    OURS,
    V6,
    after,
    each_line,
    egress,
    lease,
    link,
    listed,
    networks,
    node,
    plans,
    restored,
    shown,
    texts,
    wish,
)

# What real nodes hold and snatd leaves as it is: nat POSTROUTING and the jumps in it.
ALONE = """
    -A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
    -A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
    -A POSTROUTING -j NETAVARK-HOSTPORT-MASQ
    -A POSTROUTING -j LIBVIRT_PRT
    -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
    -A POSTROUTING -s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
    -A POSTROUTING -o docker0 -m addrtype --src-type LOCAL -j MASQUERADE
    -A POSTROUTING ! -s 172.7.0.0/16 -d 172.7.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE
    -A POSTROUTING -s 172.7.0.0/16 -d 172.7.0.0/16 -m comment --comment "flanneld masq" -j RETURN
    -A POSTROUTING -s 172.7.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
    -A POSTROUTING -s 172.7.21.5/32 -m comment --comment "name: \\"cbr0\\" id: \\"d3ad\\"" -j CNI-0123
    -A POSTROUTING -s 172.7.21.0/24 -j NETAVARK-1D8721804F16F
    -A POSTROUTING -s 172.7.21.5/32 -j SNAT --to-source 192.168.33.77
    -A POSTROUTING -s 172.7.21.0/25 -j MASQUERADE
    -A POSTROUTING -s 172.7.0.0/16 -o eth0 -j SNAT --to-source 192.168.33.10
    -A POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
    -A POSTROUTING -o eth0 -j MASQUERADE
    -A POSTROUTING -j MASQUERADE
    -A POSTROUTING ! -s 172.7.21.0/24 ! -o docker0 -j MASQUERADE
    -A POSTROUTING -s 172.7.22.0/24 ! -o docker0 -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -p tcp -m tcp --dport 80 -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -m mark --mark 0x1 -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -m set --match-set sites dst -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -d 10.0.0.0/8 -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 ! -d 10.0.0.0/8 -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -j RETURN
    -A POSTROUTING -s 172.7.21.0/24 -j ACCEPT
    -A POSTROUTING -s 172.7.21.0/24 -g MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -m comment --comment snatd2
    -A POSTROUTING -s 172.7.21.0/24 -o a"b -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/255.0.255.0 -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -m odd --unknown "to us" -j MASQUERADE
    -A POSTROUTING -s 172.7.21.0/24 -m comment --comment one -m comment --comment two -j MASQUERADE
"""  # noqa: E501
ALONE = "\n".join(ALONE.split("\n    "))

S = "-A POSTROUTING -s 172.7.21.0/24"
MARK = "-m comment --comment snatd"

# name: before, after
ONE_NETWORK = {
    "Docker's rule is narrowed in its place, with its counters": (
        f"""
        -A POSTROUTING -j FIRST
        [7:420] {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
        f"""
        -A POSTROUTING -j FIRST
        [7:420] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
    ),
    "a rule for another bridge keeps its interface, and is no egress rule": (
        f"""
        {S} ! -o br-0123456789ab -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o br-0123456789ab {MARK} -j MASQUERADE
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "Docker 1.1's rule": (
        f"""
        {S} ! -d 172.7.21.0/24 -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 {MARK} -j MASQUERADE
        """,
    ),
    "an operator's rule for the whole subnet": (
        f"""
        {S} -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 {MARK} -j MASQUERADE
        """,
    ),
    "a comment of somebody else's goes with the rule": (
        f"""
        {S} ! -o docker0 -m comment --comment "ours, says ops" -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "SNAT keeps its address and options": (
        f"""
        {S} ! -o docker0 -j SNAT --to-source 192.168.33.10 --random-fully --persistent
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} """
        """-j SNAT --to-source 192.168.33.10 --random-fully --persistent
        """,
    ),
    "MASQUERADE keeps its options": (
        f"""
        {S} ! -o docker0 -j MASQUERADE --random-fully
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE --random-fully
        """,
    ),
    "further copies go, and the first one's counters stay": (
        f"""
        [1:60] {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -j BETWEEN
        [2:120] {S} ! -o docker0 -j MASQUERADE
        [3:180] {S} ! -o docker0 -j MASQUERADE
        """,
        f"""
        [1:60] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j BETWEEN
        """,
    ),
    "where ours is there the broad one goes, and ours stays in its place": (
        f"""
        [9:540] {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -j FIRST
        [1:60] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        {S} ! -o docker0 -j MASQUERADE
        """,
        f"""
        -A POSTROUTING -j FIRST
        [1:60] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
    ),
    "ours twice is ours once, the first": (
        f"""
        [1:60] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j BETWEEN
        [2:120] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
        f"""
        [1:60] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j BETWEEN
        """,
    ),
    "a hand-made rule of the same meaning stays byte for byte": (
        f"""
        [5:300] {S} ! -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE
        """,
        f"""
        [5:300] {S} ! -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE
        """,
    ),
    "a hand-made rule with a wider exception stays too": (
        f"""
        {S} ! -d 172.0.0.0/8 -m comment --comment "by ops" -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.0.0.0/8 -m comment --comment "by ops" -j MASQUERADE
        """,
    ),
    "beside a hand-made rule the broad one only goes": (
        f"""
        {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -j FIRST
        {S} ! -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE
        """,
        f"""
        -A POSTROUTING -j FIRST
        {S} ! -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE
        """,
    ),
    "-o eth0 is narrowed but is not the egress rule": (
        f"""
        {S} -o eth0 -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
        f"""
        {S} ! -d 172.7.0.0/16 -o eth0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "ours is appended where there is none": (
        """
        -A POSTROUTING -s 172.7.21.5/32 -j SNAT --to-source 192.168.33.77
        """,
        f"""
        -A POSTROUTING -s 172.7.21.5/32 -j SNAT --to-source 192.168.33.77
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "ours is made in an empty chain": (
        "",
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "ours of an older lease hands its place, target and counters on": (
        f"""
        -A POSTROUTING -j FIRST
        [4:240] -A POSTROUTING -s 172.7.9.0/24 ! -d 172.7.0.0/16 ! -o docker0 {MARK} """
        """-j SNAT --to-source 192.168.33.10
        -A POSTROUTING -j LAST
        """,
        f"""
        -A POSTROUTING -j FIRST
        [4:240] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j SNAT --to-source 192.168.33.10
        -A POSTROUTING -j LAST
        """,
    ),
    "ours of an older lease goes where Docker has put its new rule": (
        f"""
        {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -j FIRST
        -A POSTROUTING -s 172.7.9.0/24 ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j FIRST
        """,
    ),
    "several of ours of older leases become one": (
        f"""
        -A POSTROUTING -s 172.7.8.0/24 ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -s 172.7.9.0/24 ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "ours for a network of yesterday is rewritten in its place": (
        f"""
        -A POSTROUTING -j FIRST
        [4:240] {S} ! -d 172.6.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
        f"""
        -A POSTROUTING -j FIRST
        [4:240] {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
    ),
    "a chain of ours goes when one network is left": (
        f"""
        -A POSTROUTING -j FIRST
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        -A POSTROUTING -j LAST
        -A SNATD-POSTROUTING -d 172.6.0.0/16 -j RETURN
        -A SNATD-POSTROUTING -d 172.8.0.0/16 -j RETURN
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
        f"""
        -A POSTROUTING -j FIRST
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
    ),
    "a rule with our comment that says nothing we say goes": (
        f"""
        {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -p tcp {MARK} -j ACCEPT
        -A POSTROUTING {MARK}
        """,
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
    "two broad rules of different shape each become one of ours": (
        f"""
        {S} -o eth1 -j SNAT --to-source 10.9.9.9
        {S} ! -o docker0 -j MASQUERADE
        """,
        f"""
        {S} ! -d 172.7.0.0/16 -o eth1 {MARK} -j SNAT --to-source 10.9.9.9
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
        """,
    ),
}


@pytest.mark.parametrize("backend", IPTABLES)
@pytest.mark.parametrize(("before", "expected"), ONE_NETWORK.values(), ids=ONE_NETWORK)
def test_one_network(before: str, expected: str, backend: Backend) -> None:
    found = after(wish(), listed(before, backend=backend), iptables_is=backend)
    assert each_line(shown(found)) == each_line(shown(listed(expected)))


TWO = wish(node(lease(inside="172.7.0.0/16 10.9.0.0/16")))
RETURNS = """
        -A SNATD-POSTROUTING -d 10.9.0.0/16 -j RETURN
        -A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN"""
SNAT = "SNAT --to-source 192.168.33.10"
SNAT_CHAIN = chain_name(Target("SNAT", "--to-source 192.168.33.10"))

SEVERAL_NETWORKS = {
    "Docker's rule becomes a jump in its place": (
        f"""
        -A POSTROUTING -j FIRST
        [7:420] {S} ! -o docker0 -j MASQUERADE
        -A POSTROUTING -j LAST
        """,
        f"""
        -A POSTROUTING -j FIRST
        [7:420] {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        -A POSTROUTING -j LAST
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "ours is appended where there is none": (
        """
        -A POSTROUTING -j FIRST
        """,
        f"""
        -A POSTROUTING -j FIRST
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "the chain exists already and the broad rule only goes": (
        f"""
        {S} ! -o docker0 -j MASQUERADE
        [1:60] {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        [1:60] -A SNATD-POSTROUTING -j MASQUERADE
        """,
        f"""
        [1:60] {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        [1:60] -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "a chain emptied by a rival is filled again": (
        f"""
        [1:60] {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        -A POSTROUTING -j LAST
        -N SNATD-POSTROUTING
        """,
        f"""
        [1:60] {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        -A POSTROUTING -j LAST
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "a chain that lost a RETURN gets it back": (
        f"""
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        -A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
        f"""
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "a SNAT target has a chain of its own": (
        f"""
        {S} -o eth1 -j MASQUERADE
        {S} ! -o docker0 -j {SNAT}
        """,
        f"""
        {S} -o eth1 {MARK} -j SNATD-POSTROUTING
        {S} ! -o docker0 {MARK} -j {SNAT_CHAIN}
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        {RETURNS.replace("SNATD-POSTROUTING", SNAT_CHAIN)}
        -A {SNAT_CHAIN} -j {SNAT}
        """,
    ),
    "two rules of one target share a chain": (
        f"""
        {S} -o eth1 -j MASQUERADE
        {S} ! -o docker0 -j MASQUERADE
        """,
        f"""
        {S} -o eth1 {MARK} -j SNATD-POSTROUTING
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "a narrowed rule of yesterday becomes the jump": (
        f"""
        -A POSTROUTING -j FIRST
        {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j {SNAT}
        -A POSTROUTING -j LAST
        """,
        f"""
        -A POSTROUTING -j FIRST
        {S} ! -o docker0 {MARK} -j {SNAT_CHAIN}
        -A POSTROUTING -j LAST
        {RETURNS.replace("SNATD-POSTROUTING", SNAT_CHAIN)}
        -A {SNAT_CHAIN} -j {SNAT}
        """,
    ),
    "an emptied SNAT chain cannot be told any more, so plain egress comes": (
        f"""
        {S} ! -o docker0 {MARK} -j {SNAT_CHAIN}
        -A POSTROUTING -j LAST
        -N {SNAT_CHAIN}
        """,
        f"""
        -A POSTROUTING -j LAST
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
    "a hand-made rule that leaves one network out is a broad one": (
        f"""
        {S} ! -d 172.7.0.0/16 ! -o docker0 -j MASQUERADE
        """,
        f"""
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        {RETURNS}
        -A SNATD-POSTROUTING -j MASQUERADE
        """,
    ),
}


@pytest.mark.parametrize("backend", IPTABLES)
@pytest.mark.parametrize(("before", "expected"), SEVERAL_NETWORKS.values(), ids=SEVERAL_NETWORKS)
def test_several_networks(before: str, expected: str, backend: Backend) -> None:
    found = after(TWO, listed(before, backend=backend), iptables_is=backend)
    assert each_line(shown(found)) == each_line(shown(listed(expected)))
    assert {name for name, _ in found.own_chains} == {
        name for name, _ in listed(expected).own_chains
    }


def test_foreign_rules_are_left_alone() -> None:
    alone = listed(ALONE)
    assert len(alone.postrouting) == 33
    found = after(wish(), alone)
    assert texts(found.postrouting[:-1]) == texts(alone.postrouting)
    assert found.postrouting[-1].text == OURS
    assert plans(wish(policy=egress("keep")), alone) == ()


def test_foreign_rules_are_left_alone_around_a_broad_one() -> None:
    alone = listed(ALONE).postrouting
    for place in (0, 7, len(alone)):
        mixed = (*alone[:place], Rule(BROAD), *alone[place:])
        found = after(wish(), Ruleset(wish().family, NFT, mixed))
        assert texts(found.postrouting) == texts((*alone[:place], Rule(OURS), *alone[place:]))


def test_a_foreign_rule_whose_comment_spans_lines_is_left_alone() -> None:
    # A restore is read line by line and could not name it.
    rule = Rule('-s 172.7.21.0/24 -m comment --comment "two\nlines" -j MASQUERADE')
    ruleset = Ruleset(wish().family, NFT, (rule,))
    assert plans(wish(policy=egress("keep")), ruleset) == ()


@pytest.mark.parametrize(
    "text",
    [
        '-m helper --helper "x\n-F POSTROUTING" -m comment --comment snatd -j ACCEPT',
        '-s 172.7.21.0/24 -m comment --comment snatd -j NFLOG --nflog-prefix "x\n-F POSTROUTING\n"',
    ],
)
def test_a_rule_that_claims_to_be_ours_injects_nothing_into_a_restore(text: str) -> None:
    ruleset = Ruleset(wish().family, NFT, (Rule(text),))
    leaving = plans(Absent(wish().family), ruleset)
    for transaction in (*plans(wish(), ruleset), *leaving, revert(ruleset, (), None)):
        # Read line by line, as iptables-restore does, the script says what the plan says.
        assert restored(ruleset, restore_script(transaction)) == applied(ruleset, transaction)


@pytest.mark.parametrize(
    "rule",
    [
        '-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG',
        '-s 172.7.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" '
        "-j MASQUERADE --random-fully",
        "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
    ],
)
def test_flannels_rule_is_the_egress_where_it_keeps_one(rule: str) -> None:
    ruleset = listed(f"-A POSTROUTING {rule}")
    keeps = wish(node(lease(ipmasq=True)))
    assert plans(keeps, ruleset) == ()
    assert texts(after(wish(), ruleset).postrouting) == [rule, OURS]
    ensured = wish(node(lease(ipmasq=True)), egress("ensure"))
    assert texts(after(ensured, ruleset).postrouting) == [rule, OURS]


@pytest.mark.parametrize(
    "rule",
    [
        "-s 172.6.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -o eth0 -m mark --mark 0x1 -j MASQUERADE",
        "-s 172.7.0.0/16 -j MASQUERADE",
        "-s 172.7.0.0/16 -d 224.0.0.0/4 -j MASQUERADE",
        "! -s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j RETURN",
    ],
)
def test_what_is_not_flannels_rule_is_no_egress(rule: str) -> None:
    keeps = wish(node(lease(ipmasq=True)))
    found = after(keeps, listed(f"-A POSTROUTING {rule}"))
    assert texts(found.postrouting) == [rule, OURS]


def test_a_network_of_the_operators_makes_no_rule_flannels() -> None:
    keeps = wish(node(lease(ipmasq=True)), Policy(networks=networks("10.9.0.0/16")))
    ruleset = listed("-A POSTROUTING -s 10.9.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE")
    assert plans(keeps, ruleset) != ()


def test_keep_adds_nothing_but_narrows() -> None:
    keep = wish(policy=egress("keep"))
    assert plans(keep, listed("")) == ()
    assert texts(after(keep, listed(f"-A POSTROUTING {BROAD}")).postrouting) == [OURS]


def test_without_a_bridge_nothing_is_touched() -> None:
    waiting = wish(node(None, LO, ETH0, FLANNEL1))
    assert plans(waiting, listed(f"-A POSTROUTING {BROAD}")) == ()


def test_a_bridge_of_another_name() -> None:
    other = wish(node(None, LO, ETH0, link(3, "br-0123456789ab", "172.7.21.1/24")))
    found = after(other, listed("-A POSTROUTING -s 172.7.21.0/24 ! -o docker0 -j MASQUERADE"))
    assert texts(found.postrouting) == [OURS, OURS.replace("docker0", "br-0123456789ab")]


def test_both_backends_are_narrowed() -> None:
    nft = listed(f"-A POSTROUTING {BROAD}")
    legacy = listed(f"-A POSTROUTING {BROAD}", backend=LEGACY)
    found = plans(wish(), nft, legacy)
    assert [one.backend for one in found] == [NFT, LEGACY]
    assert [
        texts(applied(a, b).postrouting) for a, b in zip((nft, legacy), found, strict=True)
    ] == [
        [OURS],
        [OURS],
    ]


@pytest.mark.parametrize("present", [BROAD, OURS, OURS.replace(f" {MARK}", "")])
def test_egress_in_one_backend_is_enough(present: str) -> None:
    legacy = listed(f"-A POSTROUTING {present}", backend=LEGACY)
    assert all(one.backend is LEGACY for one in plans(wish(), listed(""), legacy))


def test_ours_of_an_older_lease_goes_where_another_backend_has_the_egress() -> None:
    stale = listed(f"-A POSTROUTING {OURS.replace('172.7.21.0', '172.7.9.0')}")
    legacy = listed(f"-A POSTROUTING {OURS}", backend=LEGACY)
    (found,) = plans(wish(), stale, legacy)
    assert (found.backend, found.added) == (NFT, ())
    assert applied(stale, found).postrouting == ()


@pytest.mark.parametrize("backend", IPTABLES)
def test_egress_goes_to_the_backend_of_the_iptables_command(backend: Backend) -> None:
    empty = (listed(""), listed("", backend=LEGACY))
    (found,) = plans(wish(), *empty, iptables_is=backend)
    assert (found.backend, found.added) == (backend, (f"-A POSTROUTING {OURS}",))


def test_a_backend_that_was_not_read_gets_nothing() -> None:
    assert plans(wish(), listed(""), iptables_is=LEGACY) == ()


def test_ipv6_is_the_same() -> None:
    six = node(lease("fd00:7:21::1/64", "fd00:7::/32", V6), LO, link(6, "cni0", "fd00:7:21::1/64"))
    broad = listed("-A POSTROUTING -s fd00:7:21::/64 ! -o cni0 -j MASQUERADE", V6)
    assert texts(after(wish(six, family=V6), broad).postrouting) == [
        "-s fd00:7:21::/64 ! -d fd00:7::/32 ! -o cni0 -m comment --comment snatd -j MASQUERADE"
    ]


STALE = f"""
    -A POSTROUTING -j FIRST
    {S} ! -d 172.7.0.0/16 ! -o docker0 {MARK} -j MASQUERADE
    {S} ! -o docker0 -j MASQUERADE
    -A POSTROUTING -s 172.7.9.0/24 ! -o docker0 {MARK} -j SNATD-POSTROUTING
    -A SNATD-POSTROUTING -j MASQUERADE
"""


def test_of_a_family_that_is_not_leased_ours_goes_and_nothing_else() -> None:
    found = after(Absent(wish().family), listed(STALE))
    assert texts(found.postrouting) == ["-j FIRST", BROAD]
    assert found.own_chains == ()
    assert plans(Absent(wish().family), listed("-A POSTROUTING -j FIRST")) == ()


@pytest.mark.parametrize("backend", IPTABLES)
@pytest.mark.parametrize("wanted", [wish(), Absent(wish().family)])
def test_a_chain_of_ours_that_somebody_else_uses_stays(
    wanted: Desired | Absent, backend: Backend
) -> None:
    """The kernel deletes no chain that a rule jumps to, and so would refuse all the rest too."""
    theirs = ("-s 10.1.1.0/24 -j SNATD-POSTROUTING", "-s 10.1.2.0/24 -g SNATD-POSTROUTING")
    before = listed(
        f"""
        {S} ! -o docker0 {MARK} -j SNATD-POSTROUTING
        -A POSTROUTING {theirs[0]}
        -A POSTROUTING {theirs[1]}
        -A SNATD-POSTROUTING -j MASQUERADE
        -A SNATD-SNAT-01234567 -j SNAT --to-source 10.4.7.21
        """,
        backend=backend,
    )
    found = after(wanted, before, iptables_is=backend)
    assert [text for text in texts(found.postrouting) if text != OURS] == list(theirs)
    assert found.own_chains == (("SNATD-POSTROUTING", (Rule("-j MASQUERADE"),)),)


def test_of_a_family_that_may_be_leased_nothing_goes() -> None:
    assert plans(Absent(wish().family, certain=False), listed(STALE)) == ()


def reasons(ruleset: Ruleset) -> set[Change]:
    return {reason.change for one in plans(wish(), ruleset) for reason in one.reasons}


def test_a_plan_says_what_it_is_for() -> None:
    assert reasons(listed(f"-A POSTROUTING {BROAD}")) == {Change.NARROWED}
    assert reasons(listed("")) == {Change.ADDED}
    assert reasons(listed(f"{S} ! -d 10.0.0.0/8 {MARK} -j MASQUERADE")) == {Change.STALE}
    assert reasons(listed(f"-A POSTROUTING {OURS}\n-A POSTROUTING {OURS}")) == {Change.STALE}
    emptied = listed(f"{S} ! -o docker0 {MARK} -j SNATD-POSTROUTING\n-N SNATD-POSTROUTING")
    (chain,) = plans(TWO, emptied)
    assert {reason.change for reason in chain.reasons} == {Change.CHAIN}


def test_a_transaction_lists_what_goes_and_what_comes() -> None:
    (found,) = plans(wish(), listed(f"-A POSTROUTING {BROAD}\n-A POSTROUTING {BROAD}"))
    assert found.removed == (f"-A POSTROUTING {BROAD}",) * 2
    assert found.added == (f"-A POSTROUTING {OURS}",)


def test_each_reason_of_a_transaction_has_the_rules_that_it_is_about() -> None:
    stale = f"{S} ! -d 10.0.0.0/8 {MARK} -j MASQUERADE"
    (found,) = plans(wish(), listed(f"{stale}\n-A POSTROUTING {BROAD}"))
    assert {one.change: found.removed_for(one) for one in found.reasons} == {
        Change.NARROWED: (f"-A POSTROUTING {BROAD}",),
        Change.STALE: (stale,),
    }


def test_a_new_rule_names_the_one_whose_target_it_takes() -> None:
    (found,) = plans(wish(), listed(f"{S} -j {SNAT}"))
    (rule,) = found.edits[0].added
    assert rule.like == (POSTROUTING, f"-s 172.7.21.0/24 -j {SNAT}")
    (found,) = plans(TWO, listed(f"{S} -j {SNAT}"))
    chain = next(edit for edit in found.edits if edit.chain == SNAT_CHAIN)
    assert chain.after is not None
    assert chain.after[-1].like == (POSTROUTING, f"-s 172.7.21.0/24 -j {SNAT}")


def test_the_name_of_a_chain_fits_the_kernel() -> None:
    for options in ("", "--to-source 192.168.33.10", "--random-fully"):
        for name in ("MASQUERADE", "SNAT"):
            assert len(chain_name(Target(name, options))) <= 28
    assert chain_name(Target("MASQUERADE")) == "SNATD-POSTROUTING"
    assert chain_name(Target("SNAT", "A")) != chain_name(Target("SNAT", "B"))


def moved(transaction: Transaction, actual: Ruleset) -> list[str]:
    """The chain after what puts a misplaced rule right was written."""
    fix = misplaced(transaction, actual)
    assert fix is not None
    return texts(restored(actual, restore_script(fix)).postrouting)


def chain(*rules: str) -> Ruleset:
    return Ruleset(wish().family, NFT, tuple(map(Rule, rules)))


def narrowing(ruleset: Ruleset) -> Transaction:
    (found,) = plan(wish(), {NFT: ruleset}, NFT)
    return found


def test_a_rule_that_went_where_it_was_meant_to_go_is_left_there() -> None:
    before = chain("-j A", BROAD, "-j B")
    assert misplaced(narrowing(before), chain("-j A", OURS, "-j B")) is None
    assert misplaced(narrowing(before), chain("-j RIVAL", "-j A", OURS, "-j B")) is None
    assert misplaced(narrowing(before), chain("-j A", "-j RIVAL", OURS, "-j B")) is None
    assert misplaced(narrowing(before), chain("-j A", OURS)) is None
    assert misplaced(narrowing(before), chain("-j A", "-j B")) is None


def test_a_rule_that_a_rivals_insert_pushed_before_another_is_moved_behind_it() -> None:
    before = chain("-j A", BROAD, "-j B")
    assert moved(narrowing(before), chain("-j RIVAL", OURS, "-j A", "-j B")) == [
        "-j RIVAL",
        "-j A",
        OURS,
        "-j B",
    ]


def test_a_rule_that_a_rivals_removal_pushed_behind_another_is_moved_before_it() -> None:
    before = chain("-j A", BROAD, "-j B", "-j C")
    assert moved(narrowing(before), chain("-j B", OURS, "-j C")) == [OURS, "-j B", "-j C"]


def test_a_rule_is_moved_beside_copies_of_foreign_rules_too() -> None:
    before = chain("-j A", BROAD, "-j B", "-j TWICE", "-j TWICE")
    there = chain("-j RIVAL", OURS, "-j A", "-j B", "-j TWICE", "-j TWICE")
    assert moved(narrowing(before), there) == [
        "-j RIVAL",
        "-j A",
        OURS,
        "-j B",
        "-j TWICE",
        "-j TWICE",
    ]


def test_copies_of_a_foreign_rule_on_both_sides_move_nothing() -> None:
    before = chain("-j A", BROAD, "-j A", "-j B")
    assert misplaced(narrowing(before), chain("-j A", OURS, "-j A", "-j B")) is None
    before = chain("-j A", "-j B", "-j A", BROAD, "-j C")
    assert misplaced(narrowing(before), chain("-j A", "-j B", "-j A", OURS, "-j C")) is None


def test_what_a_rival_put_into_another_order_is_not_ours_to_move() -> None:
    before = chain("-j A", "-j B", BROAD)
    fix = misplaced(narrowing(before), chain("-j B", "-j A", OURS))
    assert fix is None or fix.edits[0].before != fix.edits[0].after


def test_a_transaction_is_undone_to_the_byte() -> None:
    for before in (
        chain("-j A", BROAD, "-j B"),
        chain(BROAD, BROAD, "-j A", OURS),
        chain("-j A"),
        chain(BROAD, f"-s 172.7.21.0/24 -j {SNAT}", "-j A"),
    ):
        transaction = narrowing(before)
        now = applied(before, transaction)
        assert texts(applied(now, undone(transaction, now)).postrouting) == texts(
            before.postrouting
        )


def test_undoing_leaves_what_others_wrote_since() -> None:
    transaction = narrowing(chain("-j A", BROAD, "-j B"))
    now = chain("-j NEW", "-j A", OURS, "-j NEWER")
    assert texts(applied(now, undone(transaction, now)).postrouting) == [
        "-j NEW",
        "-j A",
        BROAD,
        "-j NEWER",
    ]


def test_undoing_keeps_the_counters_and_takes_the_target_back() -> None:
    before = listed(f"[7:420] {S} -j {SNAT}")
    transaction = narrowing(before)
    undo = undone(transaction, applied(before, transaction))
    (rule,) = undo.edits[0].added
    assert rule.counters == Counters(7, 420)
    assert rule.like == (POSTROUTING, transaction.edits[0].added[0].text)
    assert undo.reasons[0].change is Change.UNDONE


def test_undoing_takes_our_chain_away_again() -> None:
    before = listed(f"{S} ! -o docker0 -j MASQUERADE")
    (transaction,) = plans(TWO, before)
    now = applied(before, transaction)
    assert applied(now, undone(transaction, now)) == before


def test_an_edit_counts_copies() -> None:
    one, two = Rule("-j A"), Rule("-j B")
    edit = ChainEdit(POSTROUTING, (one, two, one), (two, one, two))
    assert (edit.removed, edit.added) == ((one,), (two,))


def test_a_rule_appended_to_our_chain_by_a_rival_costs_neither_place_nor_target() -> None:
    ruleset = listed(
        f"""
        [7:420] -A POSTROUTING {JUMP}
        -A POSTROUTING -j A
        -A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN
        -A SNATD-POSTROUTING -d 10.9.0.0/16 -j RETURN
        -A SNATD-POSTROUTING -j MASQUERADE
        -A SNATD-POSTROUTING -j A
        """
    )
    wanted = wish(policy=Policy(networks=networks("10.9.0.0/16")))
    assert shown(after(wanted, ruleset))[:2] == shown(ruleset)[:2]
