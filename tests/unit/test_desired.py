"""From the node to what should hold: networks, cut-outs, the bridge, and when to hold."""

from __future__ import annotations

import pytest

from snatd.core.desired import Absent, CutOut, Desired, desired, find_bridge, needs_nat
from snatd.core.model import EgressPolicy, FamilyLease, Hold, Lease, NodeState, Policy
from snatd.core.networks import subtract
from tests.fakes import (
    DOCKER0,
    ETH0,
    FLANNEL1,
    LO,
    V4,
    V6,
    N,
    P,
    egress,
    lease,
    link,
    networks,
    node,
    wish,
)

WIDE = lease("10.42.3.1/24", "10.0.0.0/8")
CNI0 = link(5, "cni0", "10.42.3.1/24")


def wide(*links: str, routes: str = "", policy: Policy | None = None) -> Desired:
    """A node whose cluster network is 10/8. `links`: `NAME ADDRESS...`."""
    others = [link(9 + n, *one.split(" ", 1)) for n, one in enumerate(links)]
    return wish(node(WIDE, LO, CNI0, *others, routes=f"{routes} 10.42.3.0/24@cni0"), policy)


def cut(of: Desired) -> list[str]:
    return [f"{one.network} {one.why}" for one in of.cut_outs]


def test_the_plain_node() -> None:
    assert wish() == Desired(
        family=V4,
        subnet=P,
        networks=(N,),
        cluster=(N,),
        flannel_networks=(N,),
        cut_outs=(),
        bridge="docker0",
        add_egress=True,
        flannel_egress_counts=False,
    )


def test_an_unknown_lease_holds() -> None:
    hold = Hold("subnet.env: no such file")
    assert desired(V4, NodeState(hold), Policy()) is hold


def test_a_lease_without_any_network_that_contains_the_subnet_holds() -> None:
    # flannel before v0.5.3 wrote no FLANNEL_NETWORK.
    found = desired(V4, node(lease(inside="")), Policy())
    assert isinstance(found, Hold)
    assert "172.7.21.0/24" in found.reason
    assert "networks" in found.reason


def test_the_operator_names_the_network_that_flannel_did_not() -> None:
    found = wish(node(lease(inside="")), Policy(networks=networks("172.7.0.0/16")))
    assert (found.networks, found.flannel_networks) == ((N,), ())


def test_networks_add_and_collapse() -> None:
    more = networks("172.6.0.0/16 10.1.0.0/16 172.7.4.0/24 fd00::/8")
    found = wish(policy=Policy(networks=more))
    assert found.networks == networks("10.1.0.0/16 172.6.0.0/15")
    assert found.cluster == found.networks
    assert found.flannel_networks == (N,)


def test_a_lan_inside_the_network_is_cut_out() -> None:
    found = wide("eth0 10.1.2.3/16", routes="10.1.0.0/16@eth0")
    assert cut(found) == ["10.1.0.0/16 directly connected on eth0"]
    assert found.networks == subtract(networks("10.0.0.0/8"), *networks("10.1.0.0/16"))
    assert found.cluster == networks("10.0.0.0/8")


def test_an_address_without_a_direct_route_is_cut_out_alone() -> None:
    assert cut(wide("wg0 10.9.8.7/32")) == ["10.9.8.7/32 this node's own address on wg0"]


def test_cut_outs_come_widest_first_and_none_inside_another() -> None:
    found = wide(
        "eth0 10.1.2.3/16",
        "eth1 10.8.0.1/30",
        routes="10.1.2.0/24@eth0 10.1.0.0/16@eth0 10.8.0.0/30@eth1",
        policy=Policy(exclude=networks("10.200.0.0/14 10.201.7.0/24")),
    )
    assert cut(found) == [
        "10.200.0.0/14 exclude",
        "10.1.0.0/16 directly connected on eth0",
        "10.8.0.0/30 directly connected on eth1",
    ]


def test_what_lies_outside_the_networks_is_no_cut_out() -> None:
    assert cut(wide("eth0 192.168.33.10/24", routes="192.168.33.0/24@eth0")) == []


@pytest.mark.parametrize("prefix", ["10.0.0.0/8", "0.0.0.0/0", "8.0.0.0/5"])
def test_a_direct_prefix_over_the_whole_network_says_nothing(prefix: str) -> None:
    assert cut(wide(routes=f"{prefix}@eth0")) == []


def test_exclude_over_the_whole_network_holds() -> None:
    found = desired(V4, node(), Policy(exclude=networks("172.0.0.0/8")))
    assert isinstance(found, Hold)
    assert "exclude" in found.reason


def test_exclude_takes_one_of_several_networks_whole() -> None:
    policy = Policy(networks=networks("10.1.0.0/16"), exclude=networks("10.0.0.0/8"))
    assert wish(policy=policy).networks == (N,)


def test_exclude_of_another_family_says_nothing() -> None:
    assert cut(wish(policy=Policy(exclude=networks("fd00::/8")))) == []


def test_flannels_devices_are_no_cut_outs() -> None:
    found = wide(
        "flannel.1 10.42.3.0/32",
        "flannel-wg 10.99.0.1/16",
        "tunl7 10.42.3.9/32 10.98.0.1/32",
        routes="10.43.0.0/16@flannel0 10.98.0.0/16@tunl7 10.44.0.0/16@flannel.1",
    )
    # flannel0 has no link here, so its route is a stranger's.
    assert cut(found) == ["10.43.0.0/16 directly connected on flannel0"]


def test_service_addresses_are_no_cut_outs() -> None:
    assert cut(wide("kube-ipvs0 10.96.0.1/32 10.96.0.10/32")) == []


def test_what_lies_inside_the_subnet_is_no_cut_out() -> None:
    assert cut(wide("dummy1 10.5.5.5/32", routes="10.42.3.128/25@dummy1")) == [
        "10.5.5.5/32 this node's own address on dummy1"
    ]


def test_a_bridge_that_is_not_there_holds_only_the_bridge() -> None:
    found = wish(node(None, LO, ETH0, FLANNEL1))
    assert isinstance(found.bridge, Hold)
    assert "172.7.21.1/24" in found.bridge.reason
    assert found.networks == (N,)


@pytest.mark.parametrize(
    ("links", "bridge"),
    [
        ((LO, FLANNEL1, DOCKER0), "docker0"),
        ((DOCKER0, FLANNEL1), "docker0"),
        ((link(3, "br-0123456789ab", "10.0.0.1/24 172.7.21.1/24"),), "br-0123456789ab"),
        ((link(8, "late", "172.7.21.1/24"), link(2, "early", "172.7.21.1/24")), "early"),
    ],
)
def test_the_bridge_carries_the_very_address(links: tuple[object, ...], bridge: str) -> None:
    assert find_bridge(_family_lease(), links) == bridge  # type: ignore[arg-type]


def test_an_address_with_another_prefix_is_named() -> None:
    found = find_bridge(_family_lease(), (link(3, "docker0", "172.7.21.1/16"),))
    assert isinstance(found, Hold)
    assert "docker0 carries 172.7.21.1/16" in found.reason


def _family_lease() -> FamilyLease:
    found = lease().of(V4)
    assert found is not None
    return found


V6_LEASE = lease("fd00:7:21::1/64", "fd00:7::/32", V6)
CNI6 = link(6, "cni0", "fe80::1/64 fd00:7:21::1/64")
GLOBAL_LEASE = lease("2001:cafe:42::1/64", "2001:cafe:42::/56", V6)


def test_a_family_that_is_not_leased_is_absent() -> None:
    assert desired(V6, node(), Policy()) == Absent(V6)
    assert desired(V4, node(V6_LEASE, CNI6), Policy()) == Absent(V4)


def test_a_family_that_a_cut_off_file_does_not_name_is_absent_for_all_we_know() -> None:
    assert desired(V6, node(lease(whole=False)), Policy()) == Absent(V6, certain=False)


def test_without_ipv6_the_family_is_absent() -> None:
    assert isinstance(desired(V6, node(V6_LEASE, CNI6, ipv6=False), Policy()), Absent)
    assert isinstance(desired(V4, node(ipv6=False), Policy()), Desired)


def test_both_families_at_once() -> None:
    both = Lease((*lease().families, *V6_LEASE.families), whole=True)
    state = node(both, DOCKER0, CNI6)
    assert wish(state).bridge == "docker0"
    assert wish(state, family=V6).bridge == "cni0"


@pytest.mark.parametrize(
    ("of", "policy", "added"),
    [
        (V6_LEASE, "auto", True),
        (GLOBAL_LEASE, "auto", False),
        (GLOBAL_LEASE, "ensure", True),
        (V6_LEASE, "keep", False),
    ],
)
def test_ipv6_egress_is_added_where_hosts_outside_could_not_answer(
    of: Lease, policy: str, added: bool
) -> None:
    assert wish(node(of, CNI6), egress(policy), V6).add_egress is added


@pytest.mark.parametrize(("policy", "added"), [("auto", True), ("ensure", True), ("keep", False)])
def test_ipv4_egress(policy: str, added: bool) -> None:
    assert wish(policy=egress(policy)).add_egress is added


@pytest.mark.parametrize(
    ("ipmasq", "policy", "counts"),
    [
        (True, EgressPolicy.AUTO, True),
        (True, EgressPolicy.ENSURE, False),
        (False, EgressPolicy.AUTO, False),
    ],
)
def test_flannels_rule_counts_where_it_keeps_one(
    ipmasq: bool, policy: EgressPolicy, counts: bool
) -> None:
    found = wish(node(lease(ipmasq=ipmasq)), Policy(egress=policy))
    assert found.flannel_egress_counts is counts


def test_unique_local_addresses_need_nat() -> None:
    answers = [needs_nat(one) for one in networks("8.8.8.0/24 fd00::/64 fc00::/7 2001:db8::/32")]
    assert answers == [True, True, True, False]


def test_several_networks_of_flannels() -> None:
    # flannel v0.21 to v0.24 wrote comma lists.
    found = wish(node(lease(inside="172.7.0.0/16 192.168.0.0/16")))
    assert [str(one) for one in found.networks] == [
        "172.7.0.0/16",
        *map(str, subtract(networks("192.168.0.0/16"), *networks("192.168.33.0/24"))),
    ]
    assert found.cut_outs == (CutOut(networks("192.168.33.0/24")[0], "directly connected on eth0"),)


def test_a_hole_leaves_the_rest_as_few_prefixes() -> None:
    left = subtract(networks("10.0.0.0/30 10.9.0.0/24"), *networks("10.0.0.1/32"))
    assert left == networks("10.0.0.0/32 10.0.0.2/31 10.9.0.0/24")
