"""No line of a listing breaks the reader of connections, nor makes it name what no key can hold."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from snatd.core.desired import Desired
from snatd.core.errors import FlowError
from snatd.core.flows import Ids, Kept, Verdict, parse_flow, to_delete, verdict
from tests.property.test_parsers import mutated
from tests.unit.test_flows import CAPTURED, V4, V6


@given(st.text() | mutated(*CAPTURED.values()))
def test_a_line(line: str) -> None:
    with suppress(FlowError):
        flow = parse_flow(line)
        for one in (V4, V6):
            verdict(flow, one, 0x6000)
        to_delete(flow, "udp")
        Ids().add(flow.identity)
        key = flow.key
        assert 0 <= key.protocol < 256
        for port in (key.source_port, key.destination_port):
            assert port is None or 0 <= port < 65536


PLAIN = (
    "udp      17 29 src=172.7.21.2 dst=172.7.22.2 sport=46917 dport=8080 src=172.7.22.2 "
    "dst=172.7.21.2 sport=8080 dport=46917 [ASSURED] mark=0 use=1 id=225118840",
    "tcp      6 119 TIME_WAIT src=fd00:7:21::2 dst=fd00:7:22::2 sport=1 dport=2 "
    "src=fd00:7:22::2 dst=fd00:7:21::2 sport=2 dport=1 [ASSURED] use=1 id=17672878",
    "tcp      6 119 SYN_SENT src=172.7.21.2 dst=172.7.22.2 sport=1 dport=2 [UNREPLIED] "
    "src=172.7.22.2 dst=172.7.21.2 sport=2 dport=1 mark=0 use=1 id=17672878",
)


@given(st.sampled_from(PLAIN) | mutated(*PLAIN, *CAPTURED.values()), st.sampled_from([V4, V6]))
def test_what_is_surely_kept_is_kept(line: str, desired: Desired) -> None:
    identity = Kept(desired).identity(line)
    if identity is not None:
        flow = parse_flow(line)
        assert verdict(flow, desired, 0xFFFFFFFF) is Verdict.KEPT
        assert flow.identity == identity


def test_plain_flows_are_told_without_parsing() -> None:
    told = [[Kept(one).identity(line) is not None for line in PLAIN] for one in (V4, V6)]
    assert told == [[True, False, True], [False, True, False]]


# Of one row, and alike: one lies across two others.
_ALIKE = st.tuples(*[st.sampled_from((0, 1))] * 3).map(lambda of: int.from_bytes(of, "big") << 12)
_IDS = st.integers(0, 2**32 - 1) | _ALIKE


@given(st.lists(_IDS, max_size=50), _IDS)
def test_ids_are_a_set(members: list[int], one: int) -> None:
    ids = Ids()
    for member in members:
        ids.add(member)
    assert all(member in ids for member in members)
    assert (one in ids) == (one in members)
