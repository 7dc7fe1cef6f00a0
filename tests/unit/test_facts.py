"""What the daemon tells: since when, by whom, and a datagram's fate before what the rules say."""

from __future__ import annotations

from collections import Counter
from typing import Any

from snatd.core.model import Backend
from snatd.core.plan import Transaction
from snatd.facts import Facts
from snatd.kernel.events import Writer
from snatd.reconcile import Pass, View
from tests.fakes import BROAD, LEGACY, V4, listed, plans, wish
from tests.unit.test_report import PROBLEM

IN_SYNC = View(wanted={V4: wish()})
DEGRADED = View(problems=(PROBLEM,))
IPTABLES = Writer(7, "iptables", "docker.service")


class Clock:
    """A minute goes by with each look at it that `tick` asks for."""

    def __init__(self) -> None:
        self.minute = 0

    def __call__(self) -> str:
        return f"2026-01-02T03:{self.minute:02}:00.000+00:00"

    def tick(self) -> None:
        self.minute += 1


def repair(backend: Backend = Backend.NFT, number: int = 1) -> tuple[Transaction, ...]:
    rules = "\n".join([f"-A POSTROUTING {BROAD}"] * number)
    return plans(wish(), listed(rules, backend=backend))


class Daemon:
    """Its passes, a minute apart."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.facts = Facts("enforce", self.clock)

    def passed(
        self, view: View = IN_SYNC, *applied: Transaction, by: Writer | None = None
    ) -> Daemon:
        self.clock.tick()
        causes = dict.fromkeys(applied, (by,) if by else ())
        self.facts.passed(Pass(view, applied), Counter(["nft"]), causes, 0.01)
        return self

    def found(self, **proof: Any) -> Daemon:
        self.facts.found({"proof": {"wrong": [], "proved_at": None, **proof}})
        return self

    def document(self) -> dict[str, Any]:
        return self.facts.document()

    def since(self) -> str:
        return str(self.document()["since"])[14:16]


def test_proved_is_said_with_its_time() -> None:
    daemon = Daemon().passed().found(proved_at="2026-01-02T02:04:05.678+00:00")
    assert daemon.facts.headline() == (
        "in sync since 03:01:00 UTC - 172.7.21.0/24 keeps its address towards the rest of "
        "172.7.0.0/16 - proved at 02:04:05 UTC - 0 repairs"
    )
    assert daemon.document()["in_sync"] is True
    daemon.found(proved_at="2026-01-01T02:04:05.678+00:00")
    assert "proved at 2026-01-01 02:04:05 UTC" in daemon.facts.headline()


def test_a_snated_datagram_is_degraded() -> None:
    daemon = Daemon().passed().found(wrong=["172.7.22.1 sees 10.4.7.21 (caf\u00e9)"])
    assert daemon.facts.headline() == (
        "degraded since 03:01:00 UTC - the rules are in sync, but 172.7.22.1 sees 10.4.7.21 "
        "(caf\\xe9) - 0 repairs"
    )
    assert (daemon.document()["state"], daemon.document()["in_sync"]) == ("degraded", False)


def test_a_problem_with_the_rules_comes_first() -> None:
    daemon = Daemon().passed(DEGRADED).found(wrong=["172.7.22.1 sees 10.4.7.21"])
    assert daemon.facts.headline().startswith("degraded since 03:01:00 UTC - ipv4 nft: table")


def test_the_headline_is_the_same_line_in_parts() -> None:
    daemon = Daemon().passed().found()
    document = daemon.document()
    assert document["status"] == " - ".join([*document["told"], "0 repairs"])
    assert document["status"] == daemon.facts.headline()


def test_since_is_when_the_state_began() -> None:
    daemon = Daemon().passed().passed()
    assert daemon.since() == "01"
    daemon.passed(DEGRADED).passed(DEGRADED)
    assert daemon.since() == "03"
    daemon.passed()
    assert daemon.since() == "05"
    daemon.clock.tick()
    daemon.found(wrong=["x sees y"])
    assert daemon.since() == "06"
    daemon.clock.tick()
    daemon.found(wrong=["x sees y"])
    assert daemon.since() == "06"


def test_in_sync_began_with_the_repair() -> None:
    daemon = Daemon().passed().passed(IN_SYNC, *repair(), by=IPTABLES)
    assert daemon.since() == "02"
    # One backend was repaired, and another is as broken as before.
    daemon = Daemon().passed(DEGRADED).passed(DEGRADED, *repair())
    assert daemon.since() == "01"


def test_the_last_repairs_and_by_whom() -> None:
    daemon = Daemon()
    for _ in range(3):
        daemon.passed(IN_SYNC, *repair(number=9), by=IPTABLES)
    last, *_ = daemon.document()["recent_repairs"]
    assert last["at"].startswith("2026-01-02T03:03")
    assert last["changes"] == ["rule_narrowed"]
    assert last["writers"] == [{"comm": "iptables", "pid": 7, "of": "docker.service"}]
    assert last["removed"] == [f"-A POSTROUTING {BROAD}"] * 4, "the journal has all nine"
    assert (last["more_removed"], last["more_added"]) == (5, 0)


def test_nobody_is_named_whom_nobody_named() -> None:
    daemon = Daemon().passed(IN_SYNC, *repair(LEGACY))
    assert daemon.document()["recent_repairs"][0]["writers"] == []


def test_what_is_remembered_is_bounded() -> None:
    daemon = Daemon()
    for number in range(1000):
        daemon.facts.heard("nft", Writer(number, "x" * 15, "y" * 64))
        daemon.passed(IN_SYNC, *repair(number=1 + number % 20), by=Writer(number, "x" * 15))
        daemon.facts.fights([Writer(number, "rival")], 21, 3.5)
        daemon.facts.fight_ended(22)
        daemon.clock.minute = 0
    assert daemon.document()["repairs"] == 1000
    assert daemon.document()["fights"]["count"] == 1000
    assert len(daemon.document()["recent_repairs"]) == 5
    assert len(repr(daemon.document())) < 10_000


def test_long_rules_are_cut() -> None:
    comment = "x" * 5000
    long = plans(
        wish(),
        listed(f'-A POSTROUTING {BROAD[:-14]} -m comment --comment "{comment}" -j MASQUERADE'),
    )
    daemon = Daemon().passed(IN_SYNC, *long)
    (removed,) = daemon.document()["recent_repairs"][0]["removed"]
    assert len(removed) == 500


def test_a_fight_has_a_rival_a_time_and_a_number_of_repairs() -> None:
    daemon = Daemon().passed()
    daemon.facts.fights([Writer(7, "iptables")], 21, 3.5)
    began = "2026-01-02T03:00:56.500+00:00"
    first = {
        "with": "iptables (pid 7)",
        "since": began,
        "repairs": 21,
        "guard_undone": False,
    }
    assert daemon.document()["fights"] == {"count": 1, "now": first, "last": None}
    daemon.passed()
    daemon.facts.fights([], 24, 63.5)
    document = daemon.document()
    assert document["fights"]["now"] == first | {"repairs": 24}
    assert document["status"].startswith(
        "fighting with iptables (pid 7) since 03:00:56 UTC - it undoes each repair - "
        "at the last look in sync - 172.7.21.0/24"
    )
    daemon.passed()
    assert daemon.facts.fight_ended(24) == "iptables (pid 7)"
    ended = first | {"repairs": 24, "ended_at": "2026-01-02T03:03:00.000+00:00"}
    assert daemon.document()["fights"] == {"count": 1, "now": None, "last": ended}


def test_a_rival_whom_the_kernel_does_not_name() -> None:
    daemon = Daemon().passed()
    daemon.facts.fights([], 21, 3.5)
    assert "a program that the kernel does not name" in daemon.facts.headline()
    daemon.facts.fights([Writer(7, "iptables")], 22, 4.5)
    assert "fighting with iptables (pid 7)" in daemon.facts.headline()


def test_a_rivals_unit_is_kept_once_it_is_known() -> None:
    daemon = Daemon().passed()
    daemon.facts.fights([Writer(7, "iptables")], 21, 3.5)
    daemon.facts.fights([Writer(8, "iptables", "rival.service")], 22, 4.5)
    daemon.facts.fights([Writer(9, "iptables")], 23, 5.5)
    assert "fighting with iptables (pid 8) of rival.service since" in daemon.facts.headline()
    assert daemon.document()["fights"]["now"]["repairs"] == 23
    daemon.facts.fight_ended(23)
    daemon.facts.fights([Writer(10, "nft")], 24, 0.5)
    assert "fighting with nft (pid 10) since" in daemon.facts.headline()


def test_what_hides_addresses_takes_the_place_of_the_promise() -> None:
    daemon = Daemon().passed().found(proved_at="2026-01-02T02:04:05.678+00:00")
    daemon.facts.found({}, "there is no guard, and another rule can SNAT x")
    assert daemon.facts.headline() == (
        "in sync since 03:01:00 UTC - there is no guard, and another rule can SNAT x - 0 repairs"
    )
    proof = {"proof": {"proved_at": "2026-01-02T02:04:05.678+00:00", "wrong": []}}
    daemon.facts.found(proof | {"flows": [{"changed_since": 1}, {"changed_since": 2}]})
    assert daemon.facts.headline() == (
        "in sync since 03:01:00 UTC - 3 new connections did not keep their address - 0 repairs"
    )


def test_a_refused_configuration_is_told_until_a_good_one_comes() -> None:
    daemon = Daemon().passed()
    daemon.facts.refused(("a: wrong", "b: wrong"))
    assert daemon.facts.headline().startswith(
        "new configuration refused at 03:01:00 UTC, the old one is in force - a: wrong - b: wrong "
        "- in sync since 03:01:00 UTC - "
    )
    assert daemon.document()["configuration_refused"] == {
        "at": "2026-01-02T03:01:00.000+00:00",
        "why": ["a: wrong", "b: wrong"],
    }
    daemon.facts.refused(None)
    assert daemon.facts.headline().startswith("in sync since")


def test_before_the_first_pass() -> None:
    assert Facts("enforce", Clock()).headline() == "starting since 03:00:00 UTC - 0 repairs"


def test_metrics_that_cannot_be_written_are_said() -> None:
    daemon = Daemon().passed()
    daemon.facts.metrics_problem = "/x/snatd.prom: No space left on device"
    assert daemon.facts.headline() == (
        "in sync since 03:01:00 UTC - 172.7.21.0/24 keeps its address towards the rest of "
        "172.7.0.0/16 - metrics not written: /x/snatd.prom: No space left on device - 0 repairs"
    )
    assert daemon.document()["in_sync"] is True
