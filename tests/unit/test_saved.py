"""The text of a saved file: what becomes of which line, byte by byte."""

from __future__ import annotations

import pytest

from snatd.core.desired import Absent
from snatd.core.errors import RuleError
from snatd.core.model import Policy
from snatd.core.revert import Memory, remember
from snatd.core.saved import (
    Edited,
    bring_in_line,
    dynamic_chains,
    put_back,
    without_dynamic,
)
from tests.fakes import (
    BROAD,
    HAND_MADE,
    JUMP,
    NFT,
    OURS,
    V4,
    V6,
    N,
    P,
    egress,
    lease,
    link,
    networks,
    node,
)
from tests.fakes import wish as wish_of

CHAIN = (
    ":SNATD-POSTROUTING - [0:0]",
    "-A SNATD-POSTROUTING -d 172.7.0.0/17 -j RETURN",
    "-A SNATD-POSTROUTING -d 172.7.128.0/18 -j RETURN",
    "-A SNATD-POSTROUTING -j MASQUERADE",
)
CUT = wish_of(policy=Policy(exclude=networks("172.7.192.0/18")))
HEAD = ":PREROUTING ACCEPT [0:0]", ":POSTROUTING ACCEPT [3:180]"


def a(rule: str) -> str:
    return f"-A POSTROUTING {rule}"


def nat(*lines: str, newline: str = "\n") -> bytes:
    """A file with one nat section."""
    return newline.join(("# by hand", "*nat", *HEAD, *lines, "COMMIT", "")).encode(
        "utf-8", "surrogateescape"
    )


def after(content: bytes, wanted: object = None) -> bytes:
    """A file after an edit; a second edit changes nothing."""
    edited = bring_in_line(content, wanted or wish_of(), NFT)  # type: ignore[arg-type]
    again = bring_in_line(edited.content, wanted or wish_of(), NFT)  # type: ignore[arg-type]
    assert (again.content, again.transactions) == (edited.content, ())
    return edited.content


def test_what_is_not_understood_and_ours_goes() -> None:
    odd = "-A SNATD-POSTROUTING -s172.7.21.0/24 -j MASQUERADE"
    assert after(nat(CHAIN[0], odd, a("-j X"))) == nat(a("-j X"), a(OURS))
    odd = a("--sour 172.7.21.0/24 -m comment --comment snatd -j MASQUERADE")
    assert after(nat(odd, a("-j X"))) == nat(a("-j X"), a(OURS))


def test_bytes_that_are_not_utf8_in_a_target_are_no_bug() -> None:
    content = nat(CHAIN[0], a(JUMP)).replace(
        b"COMMIT", b"-A SNATD-POSTROUTING -j SNAT \xb3\nCOMMIT"
    )
    for wanted in (CUT, wish_of()):
        edited = bring_in_line(content, wanted, NFT)
        assert bring_in_line(edited.content, wanted, NFT).content == edited.content
    content = nat(a("-s 172.7.21.0/24 -j SNAT --to-source X")).replace(b"X", b"\xb3")
    assert b"-j SNAT --to-source \xb3" in bring_in_line(content, CUT, NFT).content


def test_of_two_comments_none_is_ours() -> None:
    line = a("-m comment --comment ops -s 10.1.0.0/24 -m comment --comment snatd -j MASQUERADE")
    assert after(nat(line, a(OURS))) == nat(line, a(OURS))
    assert put_back(nat(line), V4, NFT, [], P).content == nat(line)


OTHER, OTHER_OURS = (one.replace("docker0", "br-0") for one in (BROAD, OURS))
FOREIGN = "-s 172.7.21.5/32 -o eth1 -j SNAT --to-source 10.0.0.1"


@pytest.mark.parametrize(
    ("before", "then"),
    [
        ((a(FOREIGN), a(BROAD), a("-j X")), (a(FOREIGN), a(OURS), a("-j X"))),
        ((f"[7:420] {a(BROAD)}",), (f"[7:420] {a(OURS)}",)),
        ((a(BROAD), "", "# c", a(BROAD), a("-j X")), (a(OURS), "", "# c", a("-j X"))),
        ((a(BROAD), "# c", a(OTHER)), (a(OURS), "# c", a(OTHER_OURS))),
        ((a(OURS), a(BROAD)), (a(OURS),)),
        ((a(BROAD), a(OURS)), (a(OURS),)),
        ((a(HAND_MADE), a(BROAD)), (a(HAND_MADE),)),
        ((a(OURS.replace("172.7.0.0/16", "172.8.0.0/16")),), (a(OURS),)),
        ((a("-j X"), "# end"), (a("-j X"), a(OURS), "# end")),
        (("# nothing",), (a(OURS), "# nothing")),
        ((a(FOREIGN), "-A PREROUTING -j X"), (a(FOREIGN), a(OURS), "-A PREROUTING -j X")),
        ((CHAIN[0], a("-j X"), a(JUMP), *CHAIN[1:]), (a("-j X"), a(OURS))),
        ((CHAIN[0], a(OURS)), (a(OURS),)),
    ],
)
def test_what_becomes_of_a_file(before: tuple[str, ...], then: tuple[str, ...]) -> None:
    assert after(nat(*before)).decode() == nat(*then).decode()


def test_a_chain_is_declared_and_filled() -> None:
    for before in ((a(BROAD), a("-j X")), (CHAIN[0], a(JUMP), a("-j X"), CHAIN[3])):
        found = after(nat(*before), CUT).decode()
        assert found == nat(CHAIN[0], a(JUMP), a("-j X"), *CHAIN[1:]).decode()


@pytest.mark.parametrize(
    "form",
    [
        "-s 172.7.21.0/255.255.255.0 ! -o docker0 -j MASQUERADE",
        "-s 172.7.21.7/24 ! -o docker0 -j MASQUERADE",
        "--source 172.7.21.0/24 ! --out-interface docker0 --jump MASQUERADE",
        "-j MASQUERADE ! -o docker0 -s 172.7.21.0/24",
        '\t--src  "172.7.21.0/24"\t! -o "docker0"  -j "MASQUERADE" ',
    ],
)
def test_hand_written_forms(form: str) -> None:
    assert after(nat(a(form))) == nat(a(OURS))
    assert after(nat(a(form)).replace(b"-A ", b"--append ")) == nat(a(OURS))
    ours = form.replace("-j MASQ", "! -d 172.7.0.0/255.255.0.0 -m comment --comment snatd -j MASQ")
    if ours != form:
        assert after(nat(a(ours))) == nat(a(ours)), "right, in other words: not one byte changes"


def test_an_snat_keeps_its_options_in_whatever_form() -> None:
    line = "-j SNAT -s 172.7.21.0/24 --to 10.4.7.21 ! -o docker0 --random-fully"
    expected = OURS.replace("MASQUERADE", "SNAT --to-source 10.4.7.21 --random-fully")
    assert after(nat(a(line))) == nat(a(expected))


@pytest.mark.parametrize(
    "line",
    [
        a("-s 172.7.21.0/24 -o ! docker0 -j MASQUERADE"),
        a("-s172.7.21.0/24 -jMASQUERADE"),
        a("--sour 172.7.21.0/24 -j MASQUERADE"),
        a("-s 172.7.21/24 -j MASQUERADE"),
        a("-s 172.7.21.0/24,10.0.0.0/8 -j MASQUERADE"),
        a("-s 172.7.21.0/0.0.0.255 -j MASQUERADE"),
        a("-s 172.7.21.0/24 -s 172.7.21.0/24 -j MASQUERADE"),
        a("-s 172.7.21.0/24 -j SNAT -j MASQUERADE"),
        a('-s 172.7.21.0/24 -o "docker0 -j MASQUERADE"'),
        a('"-s" 172.7.21.0/24 -j MASQUERADE'),
        a('"-s" 172.7.21.0/24 -m comment --comment snatd -j MASQUERADE'),
        "-I POSTROUTING -s 172.7.21.0/24 -j MASQUERADE",
        "-s 172.7.21.0/24 -j MASQUERADE -A POSTROUTING",
        "-t nat -A POSTROUTING -s 172.7.21.0/24 -j MASQUERADE",
    ],
)
def test_what_is_not_certain_stays_and_is_said(line: str) -> None:
    edited = bring_in_line(nat(line), wish_of(), NFT)
    assert edited.content == nat(line)
    (doubt,) = edited.doubts
    assert doubt.startswith("line 5 may masquerade cluster traffic")
    assert line in doubt


@pytest.mark.parametrize(
    "line",
    [
        "-s 172.7.21.0/24 -p tcp -j MASQUERADE",
        "-s 172.7.21.0/24 -j MASQUERADE -p tcp --to-ports 1-9",
        "-s 172.7.21.0/24 -m mark --mark 0x1 -j MASQUERADE",
        "-s 172.7.21.5/32 -j MASQUERADE",
        "-d 172.7.21.0/24 -o docker0 -j MASQUERADE",
        '-s 172.7.21.0/24 -m comment --comment "-p tcp" -p udp -j MASQUERADE',
    ],
)
def test_a_foreign_rule_is_no_doubt_and_stays(line: str) -> None:
    edited = bring_in_line(nat(a(line)), wish_of(), NFT)
    assert edited.content == nat(a(line), a(OURS))
    assert edited.doubts == ()


def test_every_other_byte_stays() -> None:
    odd = (
        b"# \xff\xfe\x00 not UTF-8\r\n\n*raw\n:OUTPUT ACCEPT\n-A OUTPUT -s 172.7.21.0/24 -j X\n"
        b"COMMIT\n \t\n*nat\n# one\n:POSTROUTING ACCEPT\n[1:2] -A POSTROUTING -m comment --comment "
        b'"\\" \\\\ \xff -j MASQUERADE" -j ACCEPT\n' + a(BROAD).encode() + b"\n\nCOMMIT\n# last \r"
    )
    assert after(odd) == odd.replace(BROAD.encode(), OURS.encode())


def test_crlf_stays_crlf() -> None:
    assert after(nat(a(BROAD), a("-j X"), newline="\r\n")) == nat(
        a(OURS), a("-j X"), newline="\r\n"
    )
    assert after(nat(newline="\r\n"), CUT).count(b"\r\n") == after(nat(), CUT).count(b"\n")


@pytest.mark.parametrize("content", [b"", b"*filter\nCOMMIT\n", b"# *nat\n", b"\n\n"])
def test_without_a_nat_section_it_gets_none(content: bytes) -> None:
    assert after(content) == content


def test_of_several_sections_each_is_narrowed_and_the_last_gets_what_is_missing() -> None:
    assert after(nat(a(BROAD)) + nat("# x")) == nat(a(OURS)) + nat(a(OURS), "# x")
    assert after(nat("# x") + nat(a(BROAD))) == nat("# x") + nat(a(OURS))


def test_egress_policies() -> None:
    ipmasq = node(lease(ipmasq=True))
    assert after(nat(), wish_of(policy=egress("keep"))) == nat()
    assert after(nat(), wish_of(ipmasq)) == nat(), "flannel makes it at its start"
    assert after(nat(), wish_of(ipmasq, egress("ensure"))) == nat(a(OURS))
    assert after(nat(a(BROAD)), wish_of(policy=egress("keep"))) == nat(a(OURS))


def test_a_family_that_is_not_leased_keeps_nothing_of_ours() -> None:
    assert after(nat(CHAIN[0], a(JUMP), a("-j X"), *CHAIN[1:]), Absent(V4)) == nat(a("-j X"))
    unsure = Absent(V4, certain=False)
    assert after(nat(a(OURS)), unsure) == nat(a(OURS))


def test_ipv6_is_the_same() -> None:
    of = node(
        lease("fd00:7:21::1/64", "fd00:7::/32", V6),
        link(3, "docker0", "fd00:7:21::1/64"),
        routes="",
    )
    broad = a("-s fd00:7:21:0::/64 ! -o docker0 -j MASQUERADE")
    found = after(nat(broad), wish_of(of, family=V6))
    assert found == nat(a(OURS.replace(str(P), "fd00:7:21::/64").replace(str(N), "fd00:7::/32")))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"*filter\nCOMMIT\n*nat\n-A POSTROUTING -j X\n", "line 3: the table nat has no COMMIT"),
        (nat(a('-m comment --comment "two'), 'lines" -j X'), "line 5: a quote that is not closed"),
        (nat(a('-o a"b -j X')), "line 5: a quote"),
        (nat(CHAIN[0], "-A X -j SNATD-POSTROUTING"), "line 6: jumps to SNATD-POSTROUTING"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(content: bytes, why: str) -> None:
    with pytest.raises(RuleError, match=why):
        bring_in_line(content, wish_of(), NFT)


def test_a_chain_of_ours_that_somebody_else_uses_stays() -> None:
    theirs = a("-s 10.1.1.0/24 -j SNATD-POSTROUTING")
    assert after(nat(*CHAIN, a(JUMP), theirs)) == nat(*CHAIN, a(OURS), theirs)
    assert put_back(nat(*CHAIN, theirs), V4, NFT, [], P).content == nat(*CHAIN, theirs)


def reverted(edited: Edited, memory: Memory | None = None) -> bytes:
    for one in edited.transactions:
        memory = remember(one, P, memory)
    return put_back(edited.content, V4, NFT, [memory] if memory else [], P).content


@pytest.mark.parametrize(
    "lines",
    [
        (a(BROAD), a("-j X")),
        (a("-j X"), a(BROAD), a(BROAD), a("-j Y")),
        (f"[1:2] {a(BROAD)}",),
        (a("-j X"),),
        (a(HAND_MADE),),
    ],
)
@pytest.mark.parametrize("wanted", [wish_of(), CUT])
def test_revert_gives_the_file_as_it_was(lines: tuple[str, ...], wanted: object) -> None:
    content = nat(*lines)
    edited = bring_in_line(content, wanted, NFT)  # type: ignore[arg-type]
    assert reverted(edited) == content
    assert put_back(content, V4, NFT, [], P).content == content


def test_revert_without_a_memory_guesses_the_shape() -> None:
    assert put_back(nat(a(OURS), a("-j X")), V4, NFT, [], P).content == nat(a(BROAD), a("-j X"))


DUMP = b"""\
*nat
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
:DOCKERISH - [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -m comment --comment "-j DOCKER" -j MASQUERADE
-A POSTROUTING -g KUBE-SERVICES
-A DOCKER -i docker0 -j RETURN
-A DOCKER-USER -j RETURN
-A DOCKERISH -j ACCEPT
-A DOCKER-USER -j NETAVARK_FORWARD
-A POSTROUTING -o a"b -j DOCKER
COMMIT
"""


def test_dynamic_chains() -> None:
    assert dynamic_chains(DUMP) == ("DOCKER", "KUBE-SERVICES")
    kept = without_dynamic(DUMP).decode().splitlines()
    gone = [line for line in DUMP.decode().splitlines() if line not in kept]
    assert gone == [
        ":DOCKER - [0:0]",
        ":KUBE-SERVICES - [0:0]",
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A POSTROUTING -g KUBE-SERVICES",
        "-A DOCKER -i docker0 -j RETURN",
        "-A DOCKER-USER -j NETAVARK_FORWARD",
    ]
