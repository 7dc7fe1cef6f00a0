"""What nft prints as JSON may have another shape than known: an error of that backend, no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from snatd.core.errors import BackendFailed
from snatd.core.model import Family
from snatd.core.packet import Packet, Unknown
from snatd.core.trace import trace
from snatd.kernel.hooks import read_hooks
from snatd.kernel.tools import Tools
from tests.fakes import FAR_AWAY

CHAIN = {
    **{"family": "ip", "table": "theirs", "name": "post", "handle": 1},
    **{"type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"},
}
WHERE = {"family": "ip", "table": "theirs", "chain": "post", "handle": 2}


@dataclass
class Nft(Tools):
    """nft that prints one document whatever it is asked, but of sets."""

    document: Any = None

    def find(self, name: str) -> str | None:
        return f"/usr/sbin/{name}"

    def run(self, argv: Sequence[str], *_: Any, **__: Any) -> str:
        return json.dumps({"nftables": [] if "set" in argv else self.document})


@pytest.mark.parametrize(
    "document",
    [
        [1],
        [{"chain": 1}],
        [{"chain": {**CHAIN, "prio": "srcnat"}}],
        [{"chain": CHAIN}, {"rule": {**WHERE, "chain": []}}],
        [{"chain": CHAIN}, {"rule": WHERE}],
        [{"chain": CHAIN}, {"rule": {**WHERE, "expr": 1}}],
        [{"chain": CHAIN}, {"rule": {**WHERE, "expr": [1]}}],
        [{"chain": CHAIN}, {"rule": {**WHERE, "expr": [{"jump": {}}]}}],
    ],
)
def test_another_shape(document: Any) -> None:
    with pytest.raises(BackendFailed, match="nft printed"):
        read_hooks(Family.V4, Nft(document=document), FAR_AWAY)


@pytest.mark.parametrize(
    "statement",
    [{}, {"snat": {"addr": "@pool"}}, {"snat": {"addr": {"range": ["10.0.0.1"]}}}, {"snat": 1}],
)
def test_a_statement_that_is_not_understood_may_do_anything(statement: Any) -> None:
    document = [{"chain": CHAIN}, {"rule": {**WHERE, "expr": [statement]}}]
    (hook,) = read_hooks(Family.V4, Nft(document=document), FAR_AWAY).hooks
    (step,) = hook.chains["post"]
    assert step.parts == (Unknown(),)


def test_a_translation_of_the_other_family_does_nothing() -> None:
    """As nft 1.0.6 prints `snat ip6 to fd00::1` in an inet table, without a test of the family."""
    inet = {"family": "inet"}
    for kind, family in (("ip6", Family.V4), ("ip", Family.V6)):
        statement = {"snat": {"family": kind, "addr": "fd00::1" if kind == "ip6" else "10.0.0.1"}}
        document = [
            {"chain": CHAIN | inet},
            {"rule": {**WHERE, **inet, "expr": [statement]}},
        ]
        (hook,) = read_hooks(family, Nft(document=document), FAR_AWAY).hooks
        (answer,) = trace([hook], Packet(family, ((1, 1),), ((2, 2),))).answers
        assert answer.kept
