"""The algebra of networks, against counting each address."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from hypothesis import given
from hypothesis import strategies as st

from snatd.core.desired import Desired, desired
from snatd.core.model import DirectRoute, Hold, Network, NodeState, Policy
from snatd.core.networks import contains, overlaps, subtract
from tests.fakes import DOCKER0, N, P, lease, node
from tests.fakes import V4 as FOUR


def within(network: IPv4Network, longest: int) -> st.SearchStrategy[Network]:
    """Any prefix inside of a network."""
    size = 2 ** (32 - network.prefixlen)

    @st.composite
    def strategy(draw: st.DrawFn) -> Network:
        prefix = draw(st.integers(network.prefixlen, longest))
        address = int(network.network_address) + draw(st.integers(0, size - 1))
        return IPv4Network((address, prefix), strict=False)

    return strategy()


SMALL = IPv4Network("10.0.0.0/27")
small = within(SMALL, 32)


def addresses(networks: Iterable[Network]) -> set[object]:
    return {address for network in networks for address in network}


def is_minimal(networks: tuple[Network, ...]) -> bool:
    """In order, apart, and no two that one prefix could say."""
    if list(networks) != sorted(networks, key=lambda one: int(one.network_address)):
        return False
    pairs = [(a, b) for n, a in enumerate(networks) for b in networks[n + 1 :]]
    return not any(
        overlaps(a, b) or (a.prefixlen == b.prefixlen and a.supernet() == b.supernet())
        for a, b in pairs
    )


@given(st.lists(small, max_size=5), small)
def test_subtract(networks: list[Network], hole: Network) -> None:
    left = subtract(networks, hole)
    assert addresses(left) == addresses(networks) - addresses([hole])
    assert is_minimal(left)


@given(small, small)
def test_contains_and_overlaps(one: Network, other: Network) -> None:
    a, b = addresses([one]), addresses([other])
    assert contains(one, other) is (b <= a)
    assert overlaps(one, other) is bool(a & b)


@given(small)
def test_other_versions_have_nothing_in_common(one: Network) -> None:
    six = IPv6Network("::/0")
    assert not contains(one, six)
    assert not contains(six, one)
    assert not overlaps(one, six)


inside_n = within(IPv4Network("172.7.0.0/16"), 32)
nearby = within(IPv4Network("172.6.0.0/15"), 32)
probes = st.integers(0, 2**17 - 1).map(lambda n: IPv4Address("172.6.0.0") + n)


@given(st.lists(nearby, max_size=3), st.lists(nearby, max_size=3), st.lists(probes, max_size=20))
def test_cut_outs_and_networks_make_up_the_cluster(
    excluded: list[Network], routes: list[Network], packets: list[IPv4Address]
) -> None:
    direct = tuple(DirectRoute(network, "eth0") for network in routes)
    state = NodeState(lease(), (DOCKER0,), direct)
    found = desired(FOUR, state, Policy(exclude=tuple(excluded)))
    if isinstance(found, Hold):
        left: tuple[Network, ...] = (N,)
        for network in excluded:
            left = subtract(left, network)
        assert left == ()
        return
    assert isinstance(found, Desired)
    assert is_minimal(found.networks)
    for packet in packets:
        kept = any(packet in network for network in found.networks)
        cut = any(packet in one.network for one in found.cut_outs)
        assert not (kept and cut)
        assert (packet in N) is (kept or (cut and packet in N))
    for one in found.cut_outs:
        assert not contains(P, one.network)
        assert not any(
            contains(other.network, one.network) for other in found.cut_outs if other != one
        )


@given(st.lists(inside_n, max_size=3))
def test_what_was_excluded_is_never_kept(excluded: list[Network]) -> None:
    found = desired(FOUR, node(), Policy(exclude=tuple(excluded)))
    if isinstance(found, Desired):
        for network in excluded:
            inside = contains(P, network)
            assert inside or not any(overlaps(network, one) for one in found.networks)
