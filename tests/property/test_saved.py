"""Any saved file that iptables-restore could take: only our lines differ, and once is enough."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from snatd.core.desired import Desired
from snatd.core.errors import RuleError
from snatd.core.model import Policy
from snatd.core.revert import Memory, remember
from snatd.core.saved import bring_in_line, put_back
from tests.fakes import (
    BROAD,
    HAND_MADE,
    JUMP,
    NFT,
    OURS,
    V4,
    P,
    egress,
    lease,
    networks,
    node,
    wish,
)

ODD = st.binary(max_size=12).map(
    lambda octets: octets.replace(b"\n", b"").replace(b"\\", b"").replace(b'"', b"")
)
COMMENTS = ODD.map(lambda text: b'-m comment --comment "' + text + b'\\" \\\\ it\'s"')
WISHES = st.sampled_from(
    [
        wish(),
        wish(policy=egress("keep")),
        wish(policy=Policy(exclude=networks("172.7.192.0/18"))),
        wish(policy=Policy(networks=networks("10.99.0.0/16"))),
        wish(node(lease(ipmasq=True))),
    ]
)
# What is ours to change, in every form; `edited` may take these away and nothing else.
MINE = [
    BROAD,
    BROAD.replace("! -o docker0 ", ""),
    BROAD.replace("docker0", "br-1234567890ab"),
    BROAD.replace("MASQUERADE", "SNAT --to-source 10.4.7.21 --persistent"),
    "-j MASQUERADE --source 172.7.21.0/255.255.255.0",
    '-s "172.7.21.99/24"\t-m comment --comment "old" -j MASQUERADE ! --out-interface docker0',
    BROAD.replace("-j", "-m comment --comment old -j"),
    OURS,
    OURS.replace("172.7.0.0/16", "172.8.0.0/16"),
    JUMP,
    JUMP.replace("172.7.21.0", "172.9.3.0"),
]
OWN_CHAIN = [
    ":SNATD-POSTROUTING - [0:0]",
    "-A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN",
    "-A SNATD-POSTROUTING -j MASQUERADE",
]
PREFIXES = st.sampled_from(["", "", "[0:0] ", "[12:345] ", "[18446744073709551615:1]\t"])
MINE_LINES = st.one_of(
    st.tuples(PREFIXES, st.sampled_from(MINE)).map(
        lambda two: f"{two[0]}-A POSTROUTING {two[1]}".encode()
    ),
    st.sampled_from(OWN_CHAIN).map(str.encode),
)
FOREIGN = st.sampled_from(
    [
        HAND_MADE.replace("172.7.0.0/16", "0.0.0.0/0"),
        "-s 172.7.21.5/32 -j MASQUERADE",
        "-s 172.7.21.0/24 -p tcp -j MASQUERADE",
        "-j MASQUERADE -s 172.7.21.0/24 -m mark --mark 0x1",
        "-s 172.7.21.0/24 -j SNATED",
        "-s 172.7.21.0/24,10.0.0.0/8 -j MASQUERADE",
        "-s172.7.21.0/24 -jMASQUERADE",
        "-o eth0 -j MASQUERADE",
        "-j KUBE-POSTROUTING",
        "-s 172.7.0.0/16 -j RETURN",
    ]
)
FOREIGN_LINES = st.one_of(
    ODD.map(lambda text: b"#" + text),
    st.sampled_from([b"", b":SNATED - [0:0]", b"-A PREROUTING -j X", b"-N OTHER", b"-F", b"\t-Z"]),
    st.tuples(PREFIXES, st.sampled_from(["-A", "-I", "--append"]), FOREIGN).map(
        lambda three: f"{three[0]}{three[1]} POSTROUTING {three[2]}".encode()
    ),
    st.tuples(COMMENTS, FOREIGN).map(
        lambda two: b"-A POSTROUTING " + two[0] + b" " + two[1].encode()
    ),
    st.tuples(st.sampled_from(MINE[:4]), COMMENTS).map(
        lambda two: b"-A OTHER " + two[1] + b" " + two[0].encode()
    ),
)
SECTIONS = st.tuples(
    st.sampled_from([b"nat", b"nat", b"nat", b"filter", b"mangle"]),
    st.lists(st.one_of(FOREIGN_LINES, MINE_LINES), max_size=10),
    st.lists(ODD.map(lambda text: b"# between " + text), max_size=2),
).map(lambda three: [b"*" + three[0], *three[1], b"COMMIT", *three[2]])
FILES = st.tuples(
    st.lists(SECTIONS, max_size=3), st.sampled_from([b"\n", b"\r\n"]), st.booleans()
).map(
    lambda three: (
        three[1].join(line for section in three[0] for line in section) + three[1] * three[2]
    )
)


def is_mine(line: bytes) -> bool:
    """Whether a line may go or come, told in another way than by the product's."""
    text = line.decode("utf-8", "surrogateescape").removesuffix("\r")
    bare = text.partition("] ")[2] if text.startswith("[") and "] " in text else text
    bare = bare.partition("]\t")[2] if bare.startswith("[") else bare
    known = {f"-A POSTROUTING {one}" for one in MINE} | set(OWN_CHAIN)
    return bare in known or "SNATD-" in bare or "--comment snatd" in bare


@settings(max_examples=500)
@given(FILES, WISHES)
def test_only_our_lines_differ_and_twice_is_once(content: bytes, wanted: Desired) -> None:
    try:
        edited = bring_in_line(content, wanted, NFT)
    except RuleError:
        return
    before, after = content.split(b"\n"), edited.content.split(b"\n")
    assert [one for one in before if not is_mine(one)] == [one for one in after if not is_mine(one)]
    assert content.endswith(b"\n") == edited.content.endswith(b"\n")
    again = bring_in_line(edited.content, wanted, NFT)
    assert (again.content, again.transactions, again.removed) == (edited.content, (), ())
    assert (edited.content == content) == (not edited.transactions)


@settings(max_examples=500)
@given(FILES, WISHES)
def test_revert_leaves_nothing_of_ours_and_nobody_elses_line_differs(
    content: bytes, wanted: Desired
) -> None:
    memory: Memory | None = None
    try:
        edited = bring_in_line(content, wanted, NFT)
        for one in edited.transactions:
            memory = remember(one, P, memory)
        back = put_back(edited.content, V4, NFT, [memory] if memory else [], P).content
    except RuleError:
        return
    lines = [[one for one in text.split(b"\n") if not is_mine(one)] for text in (content, back)]
    assert lines[0] == lines[1]
    nat = b"\n".join(part.partition(b"COMMIT")[0] for part in back.split(b"*nat")[1:])
    assert b"--comment snatd" not in nat
    assert b":SNATD-" not in nat


@given(st.binary(max_size=300), WISHES)
def test_whatever_bytes_it_is_given(content: bytes, wanted: Desired) -> None:
    with suppress(RuleError):
        assert bring_in_line(content, wanted, NFT).content.startswith(content[:1])
