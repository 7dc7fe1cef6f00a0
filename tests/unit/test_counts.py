"""What is counted of passes, events and repairs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from snatd import report
from snatd.core.guard import guard_rules, plan_guard
from snatd.core.model import Backend, Counters, Family, Policy, Rule, Ruleset
from snatd.core.plan import Transaction
from snatd.counts import METRICS, Counts
from snatd.host.metrics import Metric, render
from snatd.reconcile import Pass, View
from tests.fakes import BROAD, LEGACY, NFT, OURS, V4, V6, listed, plans, wish

REPAIR = plans(wish(), listed(f"-A POSTROUTING {BROAD}"))[0]
LEGACY_REPAIR = plans(wish(), listed(f"-A POSTROUTING {BROAD}", V4, LEGACY))[0]
REPAIR_V6 = replace(REPAIR, family=V6)


def document(**more: Any) -> dict[str, Any]:
    """As the daemon's status has it."""
    rest: dict[str, Any] = {"fights": {"now": None}, "events": {}, "flows": []}
    return report.document(View()) | rest | more


def values(counts: Counts, of: dict[str, Any] | None = None) -> dict[str, float]:
    text = render(counts.metrics(of or document(), 60.0, (3, 0.5))).decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {series.removeprefix("snatd_"): float(value) for series, _, value in lines}


def after(
    *applied: Transaction,
    counts: Counts | None = None,
    left: tuple[Transaction, ...] = (),
    writers: tuple[str, ...] = (),
    begun_s: float = 100.0,
    took_s: float = 0.02,
    enforce: bool = True,
    rulesets: tuple[Ruleset, ...] = (),
) -> Counts:
    """Counts after a pass."""
    counts = counts or Counts()
    counts.begun(begun_s)
    done = Pass(View(plan=left, rulesets=rulesets), applied)
    by = dict.fromkeys(applied, writers)
    counts.passed(done, by, took_s, begun_s + took_s, enforce=enforce)
    return counts


def each_with_a_sample() -> tuple[Metric, ...]:
    """All metrics, of a daemon that has seen something of everything."""
    counts = after(REPAIR, writers=("nft",), rulesets=(guard(1),))
    flows = [{"family": "ipv4", "stale": 1, "since": "2026-01-02T03:04:05+00:00"}]
    return counts.metrics(document(flows=flows), 60.0, (0, 0.0))


def repairs(counts: Counts) -> dict[str, float]:
    return {
        series.removeprefix("repairs_total"): value
        for series, value in values(counts).items()
        if series.startswith("repairs_total")
    }


def test_at_first_everything_is_there_and_nothing_counted() -> None:
    found = values(Counts())
    assert found["build_info" + '{version="0.1.0"}'] == 1
    zero = ("drift_seen_total", "fights_total", "event_overflow_total", "repair_seconds_count")
    assert [found[name] for name in zero] == [0, 0, 0, 0]
    assert found['events_total{source="nft"}'] == 0
    assert (found["lock_wait_seconds_count"], found["lock_wait_seconds_sum"]) == (3, 0.5)
    assert found["resync_seconds"] == 60


def test_the_state_is_that_of_the_status() -> None:
    flows = [
        {"family": "ipv4", "stale": 7, "since": "2026-01-02T03:04:05+00:00"},
        {"family": "ipv6", "stale": 0, "since": None},
    ]
    of = document(
        in_sync=False,
        waiting_for=["a", "b"],
        problems=[{}],
        fights={"now": {"with": "somebody"}},
        flows=flows,
        events={"nft": 4, "reload": 1},
    )
    found = values(Counts(), of)
    assert (found["in_sync"], found["holds"], found["problems"]) == (0, 2, 1)
    assert found["fighting"] == 1
    assert found['stale_flows{family="ipv4"}'] == 7
    assert 'stale_flows{family="ipv6"}' not in found, "not counted yet"
    assert found['events_total{source="nft"}'] == 4
    assert found['events_total{source="reload"}'] == 1
    calm = values(Counts(), document(in_sync=True))
    assert (calm["in_sync"], calm["holds"], calm["problems"], calm["fighting"]) == (1, 0, 0, 0)


def test_every_metric_has_its_line_in_the_catalogue() -> None:
    found = each_with_a_sample()
    assert [one.name for one in found] == [name for name, _, _ in METRICS]
    assert all(one.samples for one in found)


def test_a_repair_is_counted_with_who_wrote_before() -> None:
    counts = after(REPAIR, writers=("iptables of docker.service",))
    assert repairs(counts) == {
        '{family="ipv4",backend="nft",writer="iptables of docker.service"}': 1
    }
    # What a quick rival undid before it was read back is one repair, as in the status.
    after(REPAIR, REPAIR, counts=counts, writers=("iptables of docker.service",))
    assert sum(repairs(counts).values()) == 2


def test_nobody_wrote_to_a_legacy_table_as_far_as_the_kernel_tells() -> None:
    counts = after(REPAIR, LEGACY_REPAIR, writers=("nft",))
    assert repairs(counts) == {
        '{family="ipv4",backend="legacy",writer="unknown"}': 1,
        '{family="ipv4",backend="nft",writer="nft"}': 1,
    }


@pytest.mark.parametrize(
    ("writers", "who"), [((), "unknown"), (("a",), "a"), (("a", "b"), "several")]
)
def test_who_it_was(writers: tuple[str, ...], who: str) -> None:
    counts = after(REPAIR, writers=writers)
    assert repairs(counts) == {f'{{family="ipv4",backend="nft",writer="{who}"}}': 1}


def test_a_program_that_calls_itself_another_each_time_makes_no_series_without_end() -> None:
    counts = Counts()
    for number in range(100):
        after(REPAIR, counts=counts, writers=(f"rival{number}",))
        after(REPAIR_V6, counts=counts, writers=(f"rival{number}",))
    found = repairs(counts)
    assert len(found) == 2 * 21
    assert found['{family="ipv4",backend="nft",writer="other"}'] == 80
    assert sum(found.values()) == 200
    after(REPAIR, counts=counts, writers=("rival3",))
    assert repairs(counts)['{family="ipv4",backend="nft",writer="rival3"}'] == 2


def test_drift_that_stays_is_seen_once() -> None:
    counts = Counts()
    for _ in range(3):
        after(left=(REPAIR,), counts=counts, enforce=False)
    assert values(counts)["drift_seen_total"] == 1
    after(left=(REPAIR, LEGACY_REPAIR), counts=counts, enforce=False)
    assert values(counts)["drift_seen_total"] == 2
    after(counts=counts)
    after(left=(REPAIR,), counts=counts)
    assert values(counts)["drift_seen_total"] == 3
    after(REPAIR, counts=counts)
    assert values(counts)["drift_seen_total"] == 3, "what was seen before is repaired now"
    after(REPAIR, counts=counts)
    assert values(counts)["drift_seen_total"] == 4
    assert repairs(counts).popitem()[1] == 2


def test_passes() -> None:
    found = values(after(took_s=2.0, counts=after(took_s=0.5)))
    assert (found["pass_seconds_count"], found["pass_seconds_sum"]) == (2, 2.5)
    assert found["last_pass_timestamp_seconds"] > 1.7e9


def took(counts: Counts) -> tuple[float, float]:
    found = values(counts)
    return found["repair_seconds_count"], found["repair_seconds_sum"]


def test_a_repair_takes_from_the_first_event_to_the_read_back() -> None:
    counts = Counts()
    counts.heard(98.0, overflow=False)
    counts.heard(99.0, overflow=False)
    after(REPAIR, counts=counts)
    assert took(counts) == (1, 2.02)
    # An event during a pass belongs to the next one.
    counts.begun(200.0)
    counts.heard(200.1, overflow=False)
    counts.passed(Pass(View(), (REPAIR,)), {}, 0.5, 200.5, enforce=True)
    assert took(counts) == (2, 2.52)
    after(REPAIR, counts=counts, begun_s=201.0)
    assert took(counts) == (3, 3.44)


def test_where_nothing_was_heard_it_takes_from_the_look_that_found_it() -> None:
    assert took(after(REPAIR)) == (1, 0.02)


def test_an_event_after_which_nothing_was_wrong_begins_no_repair() -> None:
    counts = Counts()
    counts.heard(1.0, overflow=False)
    after(counts=counts)
    assert took(counts) == (0, 0)
    after(REPAIR, counts=counts, begun_s=300.0)
    assert took(counts) == (1, 0.02)


def test_a_repair_of_several_passes_counts_from_the_first() -> None:
    counts = Counts()
    counts.heard(99.0, overflow=False)
    after(left=(REPAIR,), counts=counts)
    after(REPAIR, left=(REPAIR,), counts=counts, begun_s=101.0)
    assert took(counts) == (0, 0)
    after(REPAIR, counts=counts, begun_s=102.0)
    assert took(counts) == (1, 3.02)


def test_what_was_only_looked_at_was_not_being_repaired() -> None:
    counts = Counts()
    counts.heard(1.0, overflow=False)
    after(left=(REPAIR,), counts=counts, enforce=False)
    after(REPAIR, counts=counts, begun_s=500.0)
    assert took(counts) == (1, 0.02)


def test_the_buckets() -> None:
    counts = Counts()
    for took_s in (0.004, 0.005, 0.006, 0.02, 59.0, 61.0):
        after(REPAIR, counts=counts, took_s=took_s, begun_s=0.0)
    found = values(counts)
    limits = ("0.005", "0.01", "0.025", "0.5", "30", "60", "+Inf")
    numbers = [found[f'repair_seconds_bucket{{le="{limit}"}}'] for limit in limits]
    assert numbers == [2, 3, 4, 4, 4, 5, 6]


def test_an_overflow_is_counted_beside_its_event() -> None:
    counts = Counts()
    counts.heard(1.0, overflow=True)
    counts.heard(2.0, overflow=False)
    assert values(counts)["event_overflow_total"] == 1


def guard(packets: int, family: Family = V4) -> Ruleset:
    """A guard of two rules that have seen so many between them."""
    chain, rule = guard_rules(wish(), (0x4000,))
    counted = replace(rule, counters=Counters(packets, 0))
    more = Rule("rule ip snatd postrouting x", Counters(0, 0))
    return Ruleset(family, Backend.GUARD, (chain, counted, more))


def guarded(counts: Counts) -> float:
    return values(counts)['guard_connections_total{family="ipv4"}']


def test_the_guards_connections_since_the_start() -> None:
    counts = after(rulesets=(guard(1000), listed(f"-A POSTROUTING {OURS}")))
    assert guarded(counts) == 0, "those were counted by a daemon before this one"
    after(counts=counts, rulesets=(guard(1007),))
    assert guarded(counts) == 7


def test_the_guard_written_anew_does_not_count_backwards() -> None:
    write = plan_guard(wish(), Ruleset(V4, Backend.GUARD), Policy())
    assert write is not None
    counts = after(write, rulesets=(guard(2),))
    assert guarded(counts) == 2, "it was written by this pass"
    after(counts=counts, rulesets=(guard(10),))
    after(write, counts=counts, rulesets=(guard(11),))
    assert guarded(counts) == 21
    # Somebody reset the counters.
    after(counts=counts, rulesets=(guard(1),))
    assert guarded(counts) == 22
    # Somebody deleted it, and it came back between two looks.
    after(counts=counts, rulesets=(Ruleset(V4, Backend.GUARD),))
    after(counts=counts, rulesets=(guard(5),))
    assert guarded(counts) == 27
    # It could not be read.
    after(counts=counts)
    after(counts=counts, rulesets=(guard(6),))
    assert guarded(counts) == 28


def test_a_family_without_a_guard_has_no_counter() -> None:
    counts = after(rulesets=(Ruleset(V6, Backend.GUARD), listed("", V6, NFT)))
    assert not any(series.startswith("guard_connections") for series in values(counts))
