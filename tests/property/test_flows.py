"""No line of a listing breaks the reader of connections, nor makes it name what no key can hold."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from snatd.core.errors import FlowError
from snatd.core.flows import Ids, parse_flow, to_delete, verdict
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


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.integers(0, 2**32 - 1))
def test_ids_are_a_set(members: list[int], one: int) -> None:
    ids = Ids()
    for member in members:
        ids.add(member)
    assert all(member in ids for member in members)
    assert (one in ids) == (one in members)
