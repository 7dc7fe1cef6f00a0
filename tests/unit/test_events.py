"""Netlink messages, built here byte by byte: which of them are a reason to look, and whose."""

from __future__ import annotations

import errno
import struct

import pytest

from snatd.core.model import Backend, Family
from snatd.kernel import events
from snatd.kernel.events import (
    _GENERATION,
    Event,
    LinkEar,
    NftEar,
    Writer,
    _is_link_local,
    _is_relevant,
    _printable,
    who_wrote,
)
from snatd.kernel.messages import messages
from tests.fakes import NFT, V4, V6

NEW_TABLE, DEL_TABLE, NEW_CHAIN, NEW_RULE, DEL_RULE, NEW_SET, NEW_GENERATION = 0, 2, 3, 6, 8, 9, 15
NFTABLES = 10
PID = 4711


def attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding


def text(kind: int, value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return attribute(kind, raw + b"\0")


def message(kind: int, body: bytes, port: int = 99) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0x0C00, 0x01020304, port) + body


def nftables(kind: int, *attributes: bytes, family: int = 2, port: int = 99) -> bytes:
    head = struct.pack("=BBH", family, 0, 0x0700)
    return message(NFTABLES << 8 | kind, head + b"".join(attributes), port)


def rule(table: str, chain: str, kind: int = NEW_RULE, family: int = 2) -> bytes:
    handle = attribute(3, struct.pack(">Q", 17))
    return nftables(kind, text(1, table), text(2, chain), handle, family=family)


def chain(table: str, name: str, of_type: str | None = None) -> bytes:
    kind = () if of_type is None else (attribute(4, bytes(16)), text(7, of_type))
    return nftables(NEW_CHAIN, text(1, table), text(3, name), *kind)


def table(name: str, kind: int) -> bytes:
    return nftables(kind, text(1, name), attribute(2, bytes(4)))


def generation(
    pid: int = PID, name: str | bytes = "iptables-nft-re", port: int | None = None
) -> bytes:
    """`port` is what the process counts itself as: the same, outside of a pid namespace."""
    number = attribute(1, struct.pack(">I", 12))
    writer = (attribute(2, struct.pack(">I", pid)), text(3, name))
    return nftables(NEW_GENERATION, number, *writer, port=pid if port is None else port)


@pytest.mark.parametrize(
    "datagram",
    [
        rule("nat", "POSTROUTING"),
        rule("nat", "POSTROUTING", DEL_RULE),
        rule("nat", "SNATD-POSTROUTING"),
        rule("nat", "SNATD-SNAT-01234567", DEL_RULE),
        rule("snatd", "postrouting", DEL_RULE),
        table("snatd", NEW_TABLE),
        table("filter", DEL_TABLE),
        table("docker-bridges", DEL_TABLE),
        chain("docker-bridges", "nat-postrouting", "nat"),
        chain("nat", "POSTROUTING", "nat"),
        chain("nat", "KUBE-X") + rule("nat", "SNATD-X"),
        rule("nat", "KUBE-SVC-X") + rule("nat", "POSTROUTING"),
    ],
)
def test_what_is_a_reason_to_look(datagram: bytes) -> None:
    assert _is_relevant(datagram)


@pytest.mark.parametrize(
    "datagram",
    [
        rule("nat", "PREROUTING"),
        rule("nat", "KUBE-SVC-ABCDEF"),
        rule("nat", "CNI-0123456789"),
        rule("nat", "POSTROUTING2"),
        rule("filter", "POSTROUTING"),
        rule("snatd2", "postrouting"),
        rule("mysnatd", "postrouting"),
        chain("nat", "KUBE-SVC-ABCDEF"),
        chain("filter", "INPUT", "filter"),
        table("filter", NEW_TABLE),
        generation(),
        b"",
        b"\x02\x0a",
    ],
)
def test_what_is_none(datagram: bytes) -> None:
    assert not _is_relevant(datagram)


def test_a_commit_names_its_writer() -> None:
    found = _GENERATION.search(rule("nat", "POSTROUTING") + generation(PID, "dockerd"))
    assert found is not None
    assert (int.from_bytes(found[1], "big"), found[2]) == (PID, b"dockerd")


@pytest.mark.parametrize("pid", [1, 10, 0x0A0A0A0A, 0x00030008, 2**31 - 1])
def test_any_pid_is_read(pid: int) -> None:
    found = _GENERATION.search(generation(pid, "x"))
    assert found is not None
    assert int.from_bytes(found[1], "big") == pid


def nft_ear(*own_pids: int, nested: bool = False) -> NftEar:
    """An ear without a socket."""
    ear = NftEar.__new__(NftEar)
    ear._own_pids = own_pids
    ear._nested = nested
    ear._pending = None
    return ear


def heard(ear: NftEar, *datagrams: bytes) -> list[Event]:
    return [event for datagram in datagrams for event in ear._heard(datagram)]


def test_a_commit_of_anothers_is_heard_once() -> None:
    batch = (rule("nat", "POSTROUTING"), rule("nat", "POSTROUTING"), generation())
    writer = Writer(PID, "iptables-nft-re")
    event = Event("nft", writer, frozenset({(V4, NFT)}))
    assert heard(nft_ear(), *batch) == [event]
    assert heard(nft_ear(), b"".join(batch)) == [event]
    assert str(writer) == "iptables-nft-re (pid 4711)"


def test_a_commit_of_ours_is_not_heard() -> None:
    assert heard(nft_ear(1, PID), rule("nat", "POSTROUTING"), generation()) == []


def test_what_was_ours_does_not_stick_to_the_next_commit() -> None:
    ear = nft_ear(PID)
    assert heard(ear, rule("nat", "POSTROUTING"), generation()) == []
    assert heard(ear, rule("nat", "KUBE-SVC-X"), generation(5)) == []


def test_a_commit_of_nothing_that_matters_is_not_heard() -> None:
    assert heard(nft_ear(), rule("nat", "KUBE-SVC-X"), generation()) == []


def test_each_commit_has_its_own_writer() -> None:
    ear = nft_ear()
    first = heard(ear, rule("nat", "POSTROUTING"), generation(5, "a"))
    second = heard(ear, rule("nat", "POSTROUTING"), generation(6, "b"))
    assert [str(event.writer) for event in first + second] == ["a (pid 5)", "b (pid 6)"]


GUARD = Backend.GUARD


@pytest.mark.parametrize(
    ("messages", "wrote"),
    [
        ((rule("nat", "POSTROUTING"),), {(V4, NFT)}),
        ((rule("nat", "POSTROUTING", DEL_RULE, family=10),), {(V6, NFT)}),
        ((rule("nat", "SNATD-POSTROUTING"),), {(V4, NFT)}),
        ((rule("snatd", "postrouting", DEL_RULE, family=10),), {(V6, GUARD)}),
        ((table("snatd", DEL_TABLE),), {(V4, GUARD)}),
        ((rule("nat", "POSTROUTING"), table("snatd", DEL_TABLE)), {(V4, NFT), (V4, GUARD)}),
        # A reason to look, and no cause of a repair of ours.
        ((chain("other", "post", "nat"),), set()),
        ((chain("nat", "POSTROUTING", "nat"),), set()),
        ((table("filter", DEL_TABLE),), set()),
        ((rule("nat", "POSTROUTING", family=1),), set()),
        ((nftables(NEW_SET, text(1, "nat"), text(2, "POSTROUTING")),), set()),
        ((rule("nat", "KUBE-X"), chain("other", "post", "nat")), set()),
    ],
)
def test_a_commit_tells_what_it_may_have_caused(
    messages: tuple[bytes, ...], wrote: set[tuple[Family, Backend]]
) -> None:
    expected = Event("nft", Writer(PID, "iptables-nft-re"), frozenset(wrote))
    assert heard(nft_ear(), *messages, generation()) == [expected]
    assert heard(nft_ear(), b"".join(messages), generation()) == [expected]


def test_what_was_written_does_not_stick_to_the_next_commit() -> None:
    commits = [rule("nat", "POSTROUTING"), generation(5, "culprit")]
    commits += [chain("other", "post", "nat"), generation(6, "innocent")]
    writers = {one.writer: one.wrote for one in heard(nft_ear(), *commits) if one.writer}
    assert [str(one) for one in who_wrote(writers, V4, NFT)] == ["culprit (pid 5)"]
    assert who_wrote(writers, V6, NFT) == who_wrote(writers, V4, GUARD) == ()


def test_after_an_overflow_nobody_is_blamed_for_what_was_heard_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ear = nft_ear()
    ear._socket = None  # type: ignore[assignment]
    arrived = (rule("nat", "POSTROUTING"), None, rule("nat", "KUBE-X"), generation(6, "innocent"))
    monkeypatch.setattr(events, "_datagrams", lambda _: iter(arrived))
    assert list(ear.events()) == [Event("nft", overflow=True)]


NAMESAKE = 4242


@pytest.mark.parametrize("port", [PID, 0xFFFFEF00])
def test_in_a_pid_namespace_our_own_commit_is_a_look_without_a_name(port: int) -> None:
    """The kernel's own pid is another number there; the port is ours, or where it was taken by
    somebody, none that a process can have."""
    batch = (rule("nat", "POSTROUTING"), generation(90001, port=port))
    assert heard(nft_ear(PID, nested=True), *batch) == [Event("nft")]


def test_in_a_pid_namespace_a_rival_whom_the_kernel_counts_as_we_count_ours_is_heard() -> None:
    batch = (rule("nat", "POSTROUTING"), generation(PID, "rival", port=NAMESAKE))
    (event,) = heard(nft_ear(PID, nested=True), *batch)
    assert event == Event("nft", Writer(PID, "rival"), frozenset({(V4, NFT)}))


def test_outside_a_rival_in_a_container_that_counts_itself_as_ours_is_heard() -> None:
    batch = (rule("nat", "POSTROUTING"), generation(NAMESAKE, "rival", port=PID))
    (event,) = heard(nft_ear(PID), *batch)
    assert event.writer == Writer(NAMESAKE, "rival")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"dockerd", "dockerd"),
        (b"evil\nMAINPID=1", "evil?MAINPID=1"),
        (b"\x1b[31mred", "?[31mred"),
        (b"two words", "two?words"),
        (b"\xff\xfe", "??"),
        (b"caf\xc3\xa9", "caf??"),
        (b"", "?"),
        (b"x" * 40, "x" * 16),
    ],
)
def test_a_hostile_name_is_harmless(name: bytes, shown: str) -> None:
    assert _printable(name) == shown
    (event,) = heard(nft_ear(), rule("nat", "POSTROUTING"), generation(PID, name))
    assert event.writer == Writer(PID, shown)


@pytest.mark.parametrize(
    ("of", "program"),
    [
        (None, "iptables"),
        ("docker.service", "iptables of docker.service"),
        ("user@1000.service", "iptables of user@1000.service"),
        ("bash", "iptables"),
        ("session-17.scope", "iptables"),
        ("docker-0123456789abcdef.scope", "iptables"),
        ("run-r0123456789abcdef.service", "iptables"),
    ],
)
def test_a_program_is_named_alike_each_time(of: str | None, program: str) -> None:
    assert Writer(PID, "iptables", of).program == program


class Overflown:
    """A socket of which the kernel dropped something."""

    def __init__(self) -> None:
        self._answers = [errno.ENOBUFS, errno.EAGAIN]

    def recv(self, _: int) -> bytes:
        number = self._answers.pop(0)
        raise OSError(number, "")


def test_an_overflow_is_an_event_that_says_so() -> None:
    nft, link = nft_ear(), link_ear(3)
    for ear in (nft, link):
        ear._socket = Overflown()  # type: ignore[assignment]
    assert list(nft.events()) == [Event("nft", overflow=True)]
    assert list(link.events()) == [Event("link", overflow=True)]


LINK_NEW, LINK_DEL, ADDRESS_NEW, ROUTE_NEW, ROUTE_DEL, NEIGHBOUR_NEW = 16, 17, 20, 24, 25, 28
INET, INET6 = 2, 10
MAIN, LOCAL = 254, 255
UNICAST, BROADCAST = 1, 3
GLOBAL_SCOPE, LINK_SCOPE = 0, 253


def link_body(index: int, name: str = "docker0") -> bytes:
    return struct.pack("=BBHiII", 0, 0, 1, index, 0, 0) + text(3, name)


def address_body(family: int, scope: int) -> bytes:
    return struct.pack("=BBBBi", family, 24, 0, scope, 3) + attribute(1, bytes(4))


def route_body(family: int, destination: bytes, where: int = MAIN, kind: int = UNICAST) -> bytes:
    head = struct.pack("=BBBBBBBBI", family, 24, 0, 0, where, 2, 253, kind, 0)
    oif = attribute(4, struct.pack("=i", 3))
    return head + attribute(15, struct.pack("=I", where)) + attribute(1, destination) + oif


FE80 = b"\xfe\x80" + bytes(14)
LAN4, LAN6 = b"\xc0\xa8\x21\x00", b"\xfd\x00" + bytes(14)


def link_ear(index: int, name: bytes = b"docker0") -> LinkEar:
    """An ear without a socket, for a node with one bridge."""
    ear = LinkEar.__new__(LinkEar)
    ear.bridges = {index: name}
    return ear


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (LINK_NEW, link_body(3, "cni0")),
        (LINK_DEL, link_body(3)),
        (ADDRESS_NEW, address_body(INET, GLOBAL_SCOPE)),
        (ADDRESS_NEW, address_body(INET, LINK_SCOPE)),
        (ADDRESS_NEW, address_body(INET6, GLOBAL_SCOPE)),
        (ROUTE_NEW, route_body(INET, LAN4)),
        (ROUTE_DEL, route_body(INET, LAN4)),
        (ROUTE_NEW, route_body(INET, b"\xfe\x80\x00\x00")),
        (ROUTE_NEW, route_body(INET6, LAN6)),
    ],
)
def test_what_concerns_the_cut_outs_or_the_bridge(kind: int, body: bytes) -> None:
    assert link_ear(3)._concerns(kind, body)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (LINK_NEW, link_body(3)),
        (LINK_NEW, link_body(4, "cni0")),
        (LINK_DEL, link_body(4)),
        (ADDRESS_NEW, address_body(INET6, LINK_SCOPE)),
        (ROUTE_NEW, route_body(INET, LAN4, where=LOCAL)),
        (ROUTE_NEW, route_body(INET, LAN4, kind=BROADCAST)),
        (ROUTE_NEW, route_body(INET6, FE80)),
        (ROUTE_NEW, route_body(INET6, b"\xff" + bytes(15))),
        (NEIGHBOUR_NEW, bytes(40)),
        (LINK_NEW, b""),
        (LINK_NEW, link_body(3)[:4]),
    ],
)
def test_what_concerns_nothing(kind: int, body: bytes) -> None:
    assert not link_ear(3)._concerns(kind, body)


def test_a_datagram_is_taken_apart() -> None:
    datagram = message(LINK_NEW, link_body(3)) + message(ADDRESS_NEW, address_body(INET, 0))
    assert list(messages(datagram)) == [
        (LINK_NEW, link_body(3)),
        (ADDRESS_NEW, address_body(INET, 0)),
    ]


def test_messages_are_padded_to_four() -> None:
    odd = message(1, b"abcde")
    assert list(messages(odd + bytes(3) + message(2, b""))) == [(1, b"abcde"), (2, b"")]


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_message_shorter_than_its_head_ends_the_datagram(length: int) -> None:
    assert list(messages(struct.pack("=IHHII", length, 1, 0, 0, 0) * 3)) == []


def test_a_message_cut_off_ends_the_datagram() -> None:
    assert list(messages(message(1, b"abcd")[:18])) == [(1, b"ab")]
    assert list(messages(b"\x10\0\0")) == []


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (attribute(1, FE80), True),
        (attribute(15, bytes(4)) + attribute(1, FE80), True),
        (attribute(1, b"\xff\x02" + bytes(14)), True),
        (attribute(1, LAN6), False),
        (attribute(1, b"\xff\xff\xff\xff"), False),
        (attribute(5, FE80), False),
        (b"", False),
        (bytes(64), False),
        (struct.pack("=HH", 0, 1) + FE80, False),
    ],
)
def test_link_local_routes(attributes: bytes, expected: bool) -> None:
    assert _is_link_local(attributes) is expected
