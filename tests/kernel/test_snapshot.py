"""What each pass asks the kernel, against what pyroute2 and nft say of the same."""

from __future__ import annotations

import ipaddress
import socket
from ipaddress import ip_interface, ip_network

import pytest

from snatd.core.errors import BackendBusy, BackendFailed
from snatd.core.model import DirectRoute, Family
from snatd.kernel import snapshot
from snatd.kernel.messages import HEADER
from snatd.kernel.netlink import IPRoute
from snatd.kernel.snapshot import has_table, read_links
from tests.lab.netns import Namespace

_ROUTES = """
ip link add one type veth peer name two
ip addr add 10.1.0.1/24 dev one
ip addr add 10.9.9.9 peer 10.9.9.10/32 dev one
ip addr add fd00:1::1/64 dev one nodad
ip link set one up; ip link set two up
ip route add 10.2.0.0/16 via 10.1.0.2
ip route add 10.3.0.0/16 dev one
ip route add 10.4.0.0/16 nexthop via 10.1.0.3 nexthop via 10.1.0.4
ip route add 10.5.0.0/16 dev one table 100
ip route add 10.6.0.0/16 dev one table 1000
ip route add blackhole 10.7.0.0/16
ip route add default via 10.1.0.2
ip route add 10.8.0.0/16 via inet6 fd00:1::2 dev one
ip -6 route add fd00:2::/64 dev one
ip -6 route add fd00:3::/64 via fd00:1::2
"""


def test_devices_with_their_addresses_are_those_of_pyroute2(host: Namespace) -> None:
    host.shell(_ROUTES)
    with host.entered():
        links, _ = read_links(list(Family))
        with IPRoute() as netlink:
            names = {one["index"]: one.get_attr("IFLA_IFNAME") for one in netlink.get_links()}
            told = {
                (names[one["index"]], one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS"))
                for one in netlink.get_addr()
            }
    assert {link.index: link.name for link in links} == names
    assert {(link.name, str(one.ip)) for link in links for one in link.addresses} == told
    (one,) = (link for link in links if link.name == "one")
    assert {ip_interface("10.1.0.1/24"), ip_interface("fd00:1::1/64")} <= set(one.addresses)
    # Of a point-to-point link ours, with the peer's length.
    assert ip_interface("10.9.9.9/32") in one.addresses


def test_direct_routes_are_unicast_in_the_main_table_and_without_a_gateway(host: Namespace) -> None:
    host.shell(_ROUTES)
    v4 = {"10.1.0.0/24", "10.3.0.0/16", "10.9.9.10/32"}
    v6 = {"fd00:1::/64", "fd00:2::/64"}
    with host.entered():
        for families, expected in (
            ([Family.V4], v4),
            ([Family.V6], v6),
            (list(Family), v4 | v6),
            ([], set()),
        ):
            _, routes = read_links(families)
            assert set(routes) == {DirectRoute(ip_network(one), "one") for one in expected}


def test_many_addresses_come_in_several_pieces(host: Namespace) -> None:
    base = int(ipaddress.ip_address("10.100.0.0"))
    wanted = {ipaddress.ip_interface((base + number, 32)) for number in range(1, 2001)}
    host.run("ip", "-batch", "-", stdin="".join(f"addr add {one} dev lo\n" for one in wanted))
    with host.entered():
        links, _ = read_links([Family.V4])
    (lo,) = (link for link in links if link.name == "lo")
    assert wanted <= set(lo.addresses)


def test_a_table_is_there_in_its_family_only(host: Namespace) -> None:
    with host.entered():
        assert not any(has_table(family, "nat") for family in Family)
        host.run("nft", "add", "table", "ip", "nat")
        assert has_table(Family.V4, "nat")
        assert not has_table(Family.V6, "nat")
        assert not has_table(Family.V4, "na")
        assert not has_table(Family.V4, "natt")
        host.run("nft", "delete", "table", "ip", "nat")
        host.run("nft", "add", "table", "ip6", "nat")
        assert [has_table(family, "nat") for family in Family] == [False, True]
    assert host.run("nft", "list", "tables").split() == ["table", "ip6", "nat"]


class _Answers:
    """A socket that gives what it was given, and then nothing more."""

    def __init__(self, *datagrams: bytes) -> None:
        self._datagrams = list(datagrams)

    def recv(self, _: int) -> bytes:
        if not self._datagrams:
            raise TimeoutError("timed out")
        return self._datagrams.pop(0)

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _message(kind: int, body: bytes = b"", flags: int = 2) -> bytes:
    return HEADER.pack(HEADER.size + len(body), kind, flags, 0, 0) + body


_DONE = _message(3, bytes(4))
_INTERRUPTED = _message(20, bytes(8), flags=0x12)


def _answering(monkeypatch: pytest.MonkeyPatch, *answers: _Answers) -> None:
    left = iter(answers)
    monkeypatch.setattr(snapshot, "_asking", lambda *_: next(left))


def test_what_changed_under_a_dump_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = _Answers(_DONE)
    _answering(monkeypatch, _Answers(_INTERRUPTED), _Answers(_INTERRUPTED), addresses)
    links, routes = read_links([])
    assert {link.name for link in links} == {name for _, name in socket.if_nameindex()}
    assert not any(link.addresses for link in links)
    assert routes == ()
    _answering(monkeypatch, *(_Answers(_INTERRUPTED) for _ in range(20)))
    with pytest.raises(BackendBusy, match="changes all the time"):
        read_links([])


def test_a_dump_that_is_refused_or_does_not_end_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _answering(monkeypatch, _Answers(_message(2, (-1).to_bytes(4, "little", signed=True))))
    with pytest.raises(BackendFailed, match="Operation not permitted"):
        read_links([])
    _answering(monkeypatch, _Answers())
    with pytest.raises(BackendBusy, match="timed out"):
        read_links([])
    _answering(monkeypatch, _Answers(b""))
    with pytest.raises(BackendBusy, match="in the middle"):
        read_links([])


@pytest.mark.parametrize("error", [-1, -22, -95])
def test_where_the_kernel_cannot_say_the_tools_are_asked(
    monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    _answering(monkeypatch, _Answers(_message(2, error.to_bytes(4, "little", signed=True))))
    assert has_table(Family.V4, "nat")
    _answering(monkeypatch, _Answers())
    assert has_table(Family.V4, "nat")
    _answering(monkeypatch, _Answers(_message(2, (-2).to_bytes(4, "little", signed=True))))
    assert not has_table(Family.V4, "nat")
