"""When the daemon looks for who could rewrite connections, and what it gives way to."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from snatd import suspects
from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import GaveWay
from snatd.core.model import Family
from snatd.evidence import Cause, Evidence
from snatd.kernel.tools import Tools
from snatd.suspects import Suspects
from tests.fakes import wish
from tests.unit.test_daemon import SIX

LEASED: tuple[Desired, ...] = (wish(), SIX)


@dataclass
class Looks:
    """Takes the place of the look for suspects: notes of whom it was asked, and whether it gives
    way; the first ones do."""

    giving_way: int = 0
    asked: list[Family] = field(default_factory=list)
    patient: list[bool] = field(default_factory=list)

    def of_family(self, desired: Desired, _: int, tools: Tools, __: Deadline) -> Suspects:
        self.asked.append(desired.family)
        self.patient.append(tools.gives_way_to is not None)
        if tools.gives_way_to is not None and self.giving_way:
            self.giving_way -= 1
            raise GaveWay("test")
        return Suspects(desired)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    looks = Looks()
    monkeypatch.setattr(suspects, "of_family", looks.of_family)
    return looks


@pytest.fixture
def evidence() -> Iterator[Evidence]:
    with selectors.EpollSelector() as selector:
        settings = Config(probe="off", stale_flows="off")
        yield Evidence(settings, Tools(), selector, lambda *_, **__: None)


def turn(evidence: Evidence) -> bool:
    """When the loop has to come back; whether there is news."""
    due_s = evidence.waits_until_s()
    assert due_s is not None
    return evidence.turn(max(due_s, time.monotonic()))


def test_each_family_is_a_stage_of_its_own(looks: Looks, evidence: Evidence) -> None:
    evidence.passed(None, LEASED, 0.0, Cause.CHANGED)
    assert [turn(evidence) for _ in range(3)] == [False, False, True]
    assert looks.asked == [Family.V4, Family.V6]
    assert all(looks.patient)
    assert evidence.waits_until_s() is None
    assert [one["family"] for one in evidence.document()["suspects"]] == ["ipv4", "ipv6"]


def test_a_pass_in_between_begins_it_again_for_whatever_it_began_for(
    looks: Looks, evidence: Evidence
) -> None:
    evidence.passed(None, LEASED, 0.0, Cause.CHANGED)
    turn(evidence)
    evidence.passed(None, LEASED[1:], time.monotonic(), Cause.RESYNC)
    while not turn(evidence):
        pass
    assert looks.asked == [Family.V4, Family.V6]
    assert evidence._doing is Cause.CHANGED


def test_it_gives_way_and_waits_longer_each_time_until_it_does_no_more(
    looks: Looks, evidence: Evidence
) -> None:
    looks.giving_way = 9
    evidence.passed(None, LEASED, 0.0, Cause.CHANGED)
    waits_s = []
    while not turn(evidence):
        waits_s.append((evidence.waits_until_s() or 0) - time.monotonic())
    assert looks.patient == [True, True, True, False, False]
    assert waits_s == pytest.approx([0.2, 0.8, 3.2], abs=0.1)
    evidence.passed(None, LEASED, time.monotonic(), Cause.CHANGED)
    looks.giving_way = 0
    turn(evidence)
    assert looks.patient[-1], "the next look gives way again"


def test_the_descriptor_is_that_of_all_the_loop_waits_for(
    monkeypatch: pytest.MonkeyPatch, evidence: Evidence
) -> None:
    """A tool that is asked meanwhile is ended as soon as any of them has something."""
    reader, writer = os.pipe()
    evidence.selector.register(reader, selectors.EVENT_READ)

    def of_family(desired: Desired, _: int, tools: Tools, deadline: Deadline) -> Suspects:
        os.write(writer, b"x")
        tools.run(["sleep", "60"], deadline)
        return Suspects(desired)

    monkeypatch.setattr(suspects, "of_family", of_family)
    evidence.passed(None, LEASED, 0.0, Cause.CHANGED)
    started_s = time.monotonic()
    assert not turn(evidence)
    assert time.monotonic() - started_s < 5
    assert evidence._put_off == 1
    os.close(reader)
    os.close(writer)
