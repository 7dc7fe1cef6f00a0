"""Whom to probe, from which address, how often, and what the answers prove."""

from __future__ import annotations

import ipaddress

import pytest

from snatd.core.proof import (
    Limiter,
    Probe,
    Route,
    conclusion,
    exit_code,
    neighbours,
    unused_address,
)
from tests.unit.test_flows import V4, V6, address, leased


def route(destination: str, hop: str) -> Route:
    return Route(ipaddress.ip_network(destination), hop)


def probe(seen_as: str | None, *, inside: bool = True) -> Probe:
    seen = address(seen_as) if seen_as else None
    return Probe(address("172.7.22.1"), inside, address("172.7.21.254"), seen)


KEPT, SNATED, UNKNOWN = probe("172.7.21.254"), probe("10.4.7.21"), probe(None)
OUTSIDE = probe("10.4.7.21", inside=False)


def test_one_neighbour_for_each_hop_into_the_networks() -> None:
    routes = [
        route("172.7.21.0/24", "docker0"),
        route("10.4.7.0/24", "eth0"),
        route("172.7.22.0/24", "10.4.7.22"),
        route("172.7.23.0/24", "10.4.7.22"),
        route("172.7.24.0/24", "172.7.24.0"),
        route("172.7.25.7/32", "10.4.7.25"),
        route("172.0.0.0/8", "vpn"),
    ]
    found = [str(one) for one in neighbours(routes, V4)]
    assert found == ["172.7.22.1", "172.7.24.1", "172.7.25.7"]


def test_a_route_for_all_leads_past_our_own_subnet() -> None:
    first = leased("172.7.0.0/24", "172.7.0.0/16")
    assert [str(one) for one in neighbours([route("172.7.0.0/16", "wg")], first)] == ["172.7.1.1"]
    assert [str(one) for one in neighbours([route("fd00:7::/32", "wg")], V6)] == ["fd00:7::1"]


def test_a_cut_out_is_no_neighbour() -> None:
    half = leased("172.7.21.0/24", "172.7.0.0/16", "172.7.0.0/17")
    routes = [route("172.7.200.0/24", "a"), route("172.7.22.0/24", "b")]
    assert [str(one) for one in neighbours(routes, half)] == ["172.7.22.1"]


def test_no_more_than_16() -> None:
    routes = [route(f"172.7.{number}.0/24", str(number)) for number in range(100)]
    assert len(neighbours(routes, V4)) == 16


def test_the_unused_address_is_far_from_those_that_are_given_out() -> None:
    used = {address("172.7.21.254"), address("172.7.21.252")}
    routes = [route("172.7.21.253/32", "veth1"), route("172.7.21.0/24", "docker0")]
    routes.append(route("172.7.0.0/16", "wg"))
    assert unused_address(V4.subnet, used, routes) == address("172.7.21.251")
    assert unused_address(V6.subnet, used, ()) == address("fd00:7:21:0:ffff:ffff:ffff:fffe")


@pytest.mark.parametrize(("length", "found"), [(30, "172.7.21.2"), (31, None), (32, None)])
def test_a_small_subnet(length: int, found: str | None) -> None:
    subnet = ipaddress.ip_network(f"172.7.21.0/{length}")
    assert unused_address(subnet, (), ()) == (address(found) if found else None)


def test_a_full_subnet() -> None:
    used = {address(f"172.7.21.{number}") for number in range(256)}
    assert unused_address(V4.subnet, used, ()) is None


def test_nobody_gets_two_a_minute() -> None:
    two = (address("172.7.22.1"), address("172.7.23.1"))
    limiter, due = Limiter().allow(two, 100.0)
    assert due == two
    limiter, due = limiter.allow((*two, address("172.7.24.1")), 159.9)
    assert due == (address("172.7.24.1"),)
    _, due = limiter.allow(two * 2, 160.0)
    assert due == two


def test_no_more_than_16_a_minute() -> None:
    many = [address(f"172.7.{number}.1") for number in range(30)]
    limiter, due = Limiter().allow(many[:10], 0.0)
    assert len(due) == 10
    limiter, due = limiter.allow(many, 1.0)
    assert len(due) == 6
    assert limiter.allow(many, 2.0) == (limiter, ())
    # What is forgotten frees its place.
    limiter, due = limiter.allow(many, 60.0)
    assert len(due) == 10
    assert len(limiter.sent) == 16


@pytest.mark.parametrize(
    ("probes", "status"),
    [
        ((), 3),
        ((KEPT,), 0),
        ((KEPT, KEPT), 0),
        ((KEPT, SNATED), 1),
        ((UNKNOWN, SNATED), 1),
        ((UNKNOWN,), 3),
        ((KEPT, UNKNOWN), 3),
        ((OUTSIDE,), 3),
        ((KEPT, OUTSIDE), 0),
    ],
)
def test_the_exit_status(probes: tuple[Probe, ...], status: int) -> None:
    assert exit_code(probes) == status


def test_kept_is_the_exact_sender() -> None:
    assert KEPT.kept is True
    assert probe("172.7.21.1").kept is False
    assert UNKNOWN.kept is None


def test_the_conclusion() -> None:
    assert conclusion((UNKNOWN, OUTSIDE)) == ("nothing is proved",)
    assert "keeps it" in conclusion((KEPT, UNKNOWN))[0]
    assert "is SNATed" in conclusion((KEPT, SNATED))[0]
