"""What the daemon tells: a datagram's fate counts for more than what the rules say."""

from __future__ import annotations

from collections import Counter
from typing import Any

from snatd.facts import Facts
from snatd.reconcile import Pass, View
from tests.fakes import V4, wish
from tests.unit.test_report import PROBLEM


def facts(view: View | None = None, **proof: Any) -> Facts:
    found = Facts()
    found.passed(Pass(view or View(wanted={V4: wish()})), Counter(), {}, 0.01)
    found.evidence = {"proof": {"wrong": [], "proved_at": None, **proof}}
    return found


def test_proved_is_said_with_its_time() -> None:
    found = facts(proved_at="2026-01-02T03:04:05.678+00:00")
    assert found.headline() == (
        "in sync: 172.7.21.0/24 keeps its address inside 172.7.0.0/16; "
        "proved at 03:04:05 UTC; 0 repairs"
    )
    assert found.document("enforce")["in_sync"] is True


def test_a_snated_datagram_is_degraded() -> None:
    found = facts(wrong=["172.7.22.1 sees 10.4.7.21 (caf\u00e9)"])
    assert found.headline() == (
        "degraded: the rules are in sync, but 172.7.22.1 sees 10.4.7.21 (caf\\xe9); 0 repairs"
    )
    document = found.document("enforce")
    assert (document["state"], document["in_sync"]) == ("degraded", False)


def test_a_problem_with_the_rules_comes_first() -> None:
    found = facts(View(problems=(PROBLEM,)), wrong=["172.7.22.1 sees 10.4.7.21"])
    assert found.headline().startswith("degraded: ipv4 nft: table")


def test_metrics_that_cannot_be_written_are_said() -> None:
    found = facts()
    found.evidence["metrics_problem"] = "/x/snatd.prom: No space left on device"
    assert found.headline() == (
        "in sync: 172.7.21.0/24 keeps its address inside 172.7.0.0/16; "
        "metrics not written: /x/snatd.prom: No space left on device; 0 repairs"
    )
    assert found.document("enforce")["in_sync"] is True
