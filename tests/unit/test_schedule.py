"""When passes run, over simulated time: at once, paced, retried, backed off, resynced."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest

from snatd.core.schedule import Schedule

RESYNC_S = 60.0


def done(
    schedule: Schedule,
    now_s: float,
    *,
    repaired: bool = False,
    failed: bool = False,
    jitter: float = 0.0,
) -> Schedule:
    return schedule.passed(now_s, repaired=repaired, failed=failed, jitter=jitter)


def quiet(now_s: float = 1000.0) -> Schedule:
    return done(Schedule(RESYNC_S), now_s)


def simulate(writes_s: Iterable[float], *, repaired: bool, until_s: float) -> list[float]:
    """The times of the passes, while something changes at the times given."""
    schedule, passes = quiet(0.0), list[float]()
    events = sorted(writes_s)
    now_s = 0.0
    while True:
        due_s = max(now_s, schedule.due_s(now_s))
        heard = bool(events) and events[0] <= due_s
        now_s = events.pop(0) if heard else due_s
        if now_s > until_s:
            return passes
        if heard:
            schedule = schedule.event()
        else:
            passes.append(now_s)
            asked = schedule.asked
            schedule = done(schedule, now_s, repaired=repaired and asked)


def every(period_s: float, until_s: float, start_s: float = 10.0) -> list[float]:
    return [start_s + n * period_s for n in range(int((until_s - start_s) / period_s))]


def test_the_first_pass_is_now() -> None:
    assert Schedule(RESYNC_S).due_s(5.0) == 5.0


def test_without_events_the_next_pass_is_the_resync() -> None:
    assert quiet().due_s(1000.0) == 1060.0
    assert simulate([], repaired=False, until_s=200.0) == [60.0, 120.0, 180.0]


def test_the_first_event_after_quiet_is_acted_on_at_once() -> None:
    assert quiet().event().due_s(1005.0) <= 1005.0


def test_a_second_event_settles_first() -> None:
    assert quiet().event().due_s(1000.001) == pytest.approx(1000.02)


def test_an_event_is_answered_once() -> None:
    schedule = done(quiet().event(), 1005.0)
    assert schedule.due_s(1005.0) == 1065.0


def test_a_storm_is_paced_to_two_passes_a_second() -> None:
    passes = simulate(every(0.001, 70.0), repaired=False, until_s=70.0)
    late = [at for at in passes if 40.0 <= at < 60.0]
    assert len(late) == pytest.approx(40, abs=2)
    assert len(passes) < 30 + 2 * 60 + 5


def test_after_a_storm_the_burst_is_free_again() -> None:
    storm = simulate([*every(0.001, 40.0), 100.0], repaired=False, until_s=101.0)
    assert 100.0 in storm


def test_retries_double_up_to_the_cap() -> None:
    schedule, waits = Schedule(600.0), []
    for _ in range(12):
        schedule = done(schedule, 100.0, failed=True)
        waits.append(schedule.due_s(100.0) - 100.0)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30]


def test_the_cap_holds_after_ages() -> None:
    schedule = Schedule(600.0, failures=100_000)
    assert done(schedule, 0.0, failed=True).due_s(0.0) == 30.0


def test_jitter_spreads_the_retries() -> None:
    waits = {done(quiet(), 0.0, failed=True, jitter=n / 10).due_s(0.0) for n in range(10)}
    assert len(waits) == 10
    assert all(0.25 <= wait <= 0.75 for wait in waits)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
def test_jitter_does_not_break_the_cap(jitter: float) -> None:
    schedule = Schedule(600.0, failures=20)
    assert done(schedule, 0.0, failed=True, jitter=jitter).due_s(0.0) <= 30.0


def test_success_ends_the_retries() -> None:
    schedule = done(done(quiet(), 0.0, failed=True), 1.0)
    assert (schedule.failures, schedule.due_s(1.0)) == (0, 61.0)


def test_an_event_does_not_wait_for_the_retry() -> None:
    schedule = quiet(0.0)
    for _ in range(10):
        schedule = done(schedule, 0.0, failed=True)
    assert schedule.event().due_s(5.0) <= 5.0


def test_a_retry_is_no_later_than_the_resync() -> None:
    assert done(Schedule(2.0, failures=10), 0.0, failed=True).due_s(0.0) == 2.0


def test_three_writes_in_a_restart_are_repaired_at_once() -> None:
    writes = [10.0, 10.2, 10.4]
    assert simulate(writes, repaired=True, until_s=30.0) == writes


def test_a_write_a_second_is_repaired_at_once_for_ever() -> None:
    writes = every(1.0, 300.0)
    passes = simulate(writes, repaired=True, until_s=299.5)
    assert set(writes) <= set(passes)


def test_five_writes_a_second_are_backed_off_from() -> None:
    passes = simulate(every(0.2, 300.0), repaired=True, until_s=300.0)
    assert [at for at in passes if at < 14.0] == pytest.approx(every(0.2, 14.0), abs=0.05)
    assert len([at for at in passes if at > 60.0]) <= (300 - 60) / 5 + 2
    assert max(b - a for a, b in pairwise(passes)) <= 5.3


def test_a_fight_is_known_and_ends_with_quiet() -> None:
    schedule = quiet(0.0)
    for _ in range(20):
        schedule = done(schedule.event(), 1.0, repaired=True)
        assert not schedule.fighting
    schedule = done(schedule.event(), 1.0, repaired=True)
    assert schedule.fighting
    waits = []
    for _ in range(7):
        waits.append(schedule.event().due_s(2.0) - 1.0)
        schedule = done(schedule.event(), 1.0, repaired=True)
    assert waits == [1, 2, 4, 5, 5, 5, 5]
    assert not done(schedule, 40.0).fighting


def test_a_fight_gives_no_free_repairs_back() -> None:
    schedule = quiet(0.0)
    for _ in range(21):
        schedule = done(schedule, 1.0, repaired=True)
    # Half a minute later the bucket is full, yet the rival is still at it.
    assert done(schedule, 31.0, repaired=True).lost_rounds == 2


def test_at_rest_all_free_repairs_are_there() -> None:
    schedule = done(quiet(0.0), 1.0, repaired=True)
    assert quiet(0.0).rested(1.0)
    assert not schedule.rested(1.5)
    assert schedule.rested(2.0)
    for _ in range(20):
        schedule = done(schedule, 1.0, repaired=True)
    assert not schedule.rested(100.0), "a fight is no rest, however far apart its repairs are"
    schedule = done(schedule, 100.0)
    assert schedule.rested(100.0)


def test_in_a_fight_the_resync_still_comes() -> None:
    schedule = Schedule(5.0, lost_rounds=10, ended_s=0.0, asked=True)
    assert schedule.due_s(0.0) == 5.0


def test_a_schedule_is_not_changed_by_what_follows() -> None:
    schedule = quiet()
    schedule.event()
    done(schedule, 2000.0, repaired=True, failed=True)
    assert schedule == quiet()
