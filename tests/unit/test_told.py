"""What `snatd status` shows, whole, as it is read: tests/unit/golden holds one text for each state.

The documents behind them are made by the daemon's own parts, from rules in memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snatd import told
from snatd.core.model import Backend, Counters, GuardPolicy, Hold, Policy, Ruleset
from snatd.core.word import Life, Word
from snatd.facts import Facts
from snatd.kernel.events import Writer
from snatd.reconcile import Edges, Pass, look, reconcile
from snatd.report import EXIT_DRIFT, EXIT_FAILING, EXIT_OK, EXIT_WAITING
from tests.fakes import (
    BROAD,
    DOCKER0,
    FAR_AWAY,
    IPTABLES,
    LO,
    NFT,
    V4,
    V6,
    FakeTables,
    lease,
    link,
    networks,
    node,
    refused,
)
from tests.unit.test_documents import documented_keys, keys

GOLDEN = Path(__file__).parent / "golden"
DOCKERD = Writer(27324, "iptables", "docker.service")
YESTERDAY = "2026-11-23T18:14:30"


class Story:
    """A daemon's life on a node in memory. Times are of 2026-11-24 unless they say a date."""

    def __init__(self, of: Any = None, policy: Policy | None = None) -> None:
        self.at(YESTERDAY)
        self.node = of or node()
        self.policy = policy or Policy()
        self.tables = [FakeTables(Ruleset(f, b)) for f in (V4, V6) for b in (*IPTABLES, GUARD)]
        self.facts = Facts("enforce", lambda: f"{self._now}.123+00:00")
        self.evidence: dict[str, Any] = {
            "suspects": [suspects("ipv4", none=True)],
            "proof": {"proved_at": None, "probed_at": None, "probes": [], "wrong": []},
            "flows": [],
            "saved_rules": [],
        }

    def at(self, time: str) -> Story:
        self._now = time if "T" in time else f"2026-11-24T{time}"
        return self

    def table(self, backend: Backend = NFT, family: Any = V4) -> FakeTables:
        return next(one for one in self.tables if (one.family, one.backend) == (family, backend))

    def run(
        self,
        *triggers: str,
        by: Sequence[Writer] = (),
        observe: bool = False,
        took_s: float = 0.0351,
    ) -> Story:
        """A pass."""
        edges = Edges(lambda _: self.node, self.tables, lambda *_: None)
        if observe:
            done = Pass(look(edges, self.policy, FAR_AWAY))
        else:
            done = reconcile(edges, self.policy, FAR_AWAY)
        causes = dict.fromkeys(done.applied, tuple(by))
        self.facts.passed(done, Counter(triggers), causes, took_s)
        return self

    def hears(self, source: str, writer: Writer | None = None) -> Story:
        self.facts.heard(source, writer)
        return self

    def finds(self, **evidence: Any) -> Story:
        self.evidence |= evidence
        return self

    def document(self, mode: str = "enforce") -> dict[str, Any]:
        """What is written into the status file now."""
        self.facts.mode = mode
        self.facts.found(self.evidence)
        return dict(json.loads(json.dumps({"pid": 27287, **self.facts.document()})))


GUARD = Backend.GUARD


def suspects(family: str, **parts: Any) -> dict[str, Any]:
    empty = {"family": family, "none": False, "rules": [], "before_guard": [], "unknown": []}
    return {**empty, **parts}


def probe(kept: bool | None, inside: bool = True) -> dict[str, Any]:
    return {"dst": "172.7.22.1", "kept": kept, "inside": inside}


def flows(family: str = "ipv4", **parts: Any) -> dict[str, Any]:
    counts = {"stale": 0, "deleted": 0, "kept_since": 31, "changed_since": 0, "cut_off": None}
    since = "2026-11-24T02:40:48.812+00:00"
    return {"family": family, "since": since, "kept_one_in": 1, **counts, **parts}


def started(story: Story, *, egress_there: bool = True) -> Story:
    """The first pass, a second after the start, on a node where Docker wrote before."""
    if egress_there:
        story.table().insert(BROAD)
    return story.at("2026-11-23T18:14:31").run("start", took_s=0.2147)


def dockers_rule_comes_back(story: Story) -> Story:
    story.table().insert(BROAD)
    return story.at("02:40:48").hears("nft", DOCKERD).run("nft", by=[DOCKERD])


def in_sync() -> dict[str, Any]:
    story = started(Story()).hears("watch_started")
    dockers_rule_comes_back(story)
    guard = story.table(GUARD)
    chain, rule = guard.ruleset.postrouting
    counted = (chain, replace(rule, counters=Counters(2, 120)))
    guard.ruleset = replace(guard.ruleset, postrouting=counted)
    time = "2026-11-24T02:40:48.798+00:00"
    story.at("02:40:49").run("nft").finds(
        proof={"proved_at": time, "probed_at": time, "probes": [probe(kept=True)], "wrong": []},
        flows=[flows()],
        saved_rules=[saved("in line")],
    )
    return story.document()


def saved(state: str, why: str = "") -> dict[str, Any]:
    return {"path": "/etc/iptables/rules.v4", "family": "ipv4", "state": state, "why": why}


def drift() -> dict[str, Any]:
    story = Story(policy=Policy(guard=GuardPolicy.OFF))
    for _ in range(9):
        story.table().insert(BROAD)
    story.at("02:40:48").run("start", observe=True)
    story.finds(
        suspects=[
            suspects(
                "ipv4",
                rules=["ip nat POSTROUTING rule 1 (as Docker writes it): " + BROAD],
                before_guard=["ip early post (priority -199)"],
                unknown=["nft is not installed"],
            )
        ],
        flows=[flows(stale=3, changed_since=4, kept_one_in=4), flows("ipv6", since=None)],
    )
    return story.document("observe")


def waiting() -> dict[str, Any]:
    story = Story(node(Hold("/run/flannel/subnet.env: no such file: waiting for flanneld")))
    return story.at("02:40:48").run("start").finds(suspects=[]).document()


def lost_lease() -> dict[str, Any]:
    story = started(Story())
    story.node = node(Hold("/run/flannel/subnet.env: no such file: waiting for flanneld"))
    return story.at("02:40:48").run("subnet_file").finds(suspects=[]).document()


def no_bridge() -> dict[str, Any]:
    return started(Story(node(None, LO))).finds(suspects=[]).document()


def degraded() -> dict[str, Any]:
    story = started(Story())
    story.table().reads = [refused("table `nat' is incompatible, use 'nft' tool.")] * 9
    story.at("02:40:48").run("nft")
    return story.finds(saved_rules=[saved("left alone", "does not belong to root")]).document()


def snated() -> dict[str, Any]:
    time = "2026-11-24T02:40:48.798+00:00"
    probes = [probe(kept=True), probe(kept=False), probe(kept=None), probe(False, inside=False)]
    wrong = ["172.7.22.1 sees 10.4.7.21 (ip nat POSTROUTING rule 1: -o eth0 -j MASQUERADE)"]
    proof = {"proved_at": None, "probed_at": time, "probes": probes, "wrong": wrong}
    return started(Story()).at("02:40:49").finds(proof=proof).document()


def fighting() -> Story:
    story = started(Story())
    for second in range(20, 32):
        story.table().insert(BROAD)
        story.at(f"02:40:{second}").hears("nft", DOCKERD).run("nft", by=[DOCKERD])
        if second >= 30:
            story.facts.fights([DOCKERD], second - 19, second - 20)
    return story


def fighting_for_the_guard() -> dict[str, Any]:
    story = fighting()
    guard = story.table(GUARD)
    guard.ruleset = replace(guard.ruleset, postrouting=())
    rival = Writer(27400, "nft", "rival.service")
    story.at("02:40:32").hears("nft", rival).run("nft", by=[rival])
    story.facts.fights([rival], 13, 12)
    return story.document()


def fight_ended() -> dict[str, Any]:
    story = fighting()
    story.at("02:41:02").run()
    story.facts.fight_ended(12)
    return story.document()


def refused_configuration() -> dict[str, Any]:
    story = started(Story()).at("02:40:48")
    where = "/etc/snatd/snatd.toml"
    story.facts.refused(
        (
            f"{where}: mode: 'watch' is none of 'enforce', 'observe'",
            f"{where}: resync: 0 is not a number of seconds from 1 to 3600",
        )
    )
    return story.hears("reload").run("reload").document()


def two_families() -> dict[str, Any]:
    both = replace(lease(), families=(*lease().families, *lease_v6().families))
    docker0 = replace(DOCKER0, addresses=(*DOCKER0.addresses, *DOCKER0_V6.addresses))
    of = node(both, LO, docker0, routes="172.7.21.0/24@docker0 172.7.99.0/24@eth9")
    policy = Policy(exclude=networks("172.7.192.0/18"), guard=GuardPolicy.OFF)
    story = started(Story(of, policy))
    return story.finds(
        suspects=[suspects("ipv4", none=True), suspects("ipv6", none=True)]
    ).document()


def lease_v6() -> Any:
    return lease("fd00:7:21::1/64", "fd00:7::/32", V6)


DOCKER0_V6 = link(3, "docker0", "fd00:7:21::1/64")


def metrics_problem() -> dict[str, Any]:
    story = started(Story())
    story.facts.metrics_problem = "/x/snatd.prom: No space left on device"
    return story.document()


def without_guard() -> dict[str, Any]:
    story = Story()
    story.table(GUARD).reads = [refused("Operation not supported")] * 9
    return started(story).document()


def many_rules() -> dict[str, Any]:
    story = Story(policy=Policy(exclude=networks("172.7.32.0/20 172.7.64.0/20 172.7.192.0/18")))
    for _ in range(9):
        story.table().insert(BROAD)
    return started(story).document()


CASES = {
    "in-sync": (Word(Life.ANSWERS, in_sync(), 26.2, 27287), EXIT_OK),
    "drift": (Word(Life.ANSWERS, drift(), 3.0, 27287), EXIT_DRIFT),
    "waiting": (Word(Life.ANSWERS, waiting(), 700.0, 27287), EXIT_DRIFT),
    "lost-lease": (Word(Life.ANSWERS, lost_lease(), 3.0, 27287), EXIT_DRIFT),
    "no-bridge": (Word(Life.ANSWERS, no_bridge(), 3.0, 27287), EXIT_DRIFT),
    "degraded": (Word(Life.ANSWERS, degraded(), 3.0, 27287), EXIT_DRIFT),
    "snated": (Word(Life.ANSWERS, snated(), 3.0, 27287), EXIT_DRIFT),
    "fighting": (Word(Life.ANSWERS, fighting().document(), 1.0, 27287), EXIT_DRIFT),
    "fighting-for-the-guard": (
        Word(Life.ANSWERS, fighting_for_the_guard(), 1.0, 27287),
        EXIT_DRIFT,
    ),
    "fight-ended": (Word(Life.ANSWERS, fight_ended(), 1.0, 27287), EXIT_OK),
    "refused-configuration": (Word(Life.ANSWERS, refused_configuration(), 3.0, 27287), EXIT_DRIFT),
    "two-families-guard-off": (Word(Life.ANSWERS, two_families(), 3.0, 27287), EXIT_OK),
    "without-guard": (Word(Life.ANSWERS, without_guard(), 3.0, 27287), EXIT_OK),
    "metrics-problem": (Word(Life.ANSWERS, metrics_problem(), 3.0, 27287), EXIT_OK),
    "many-rules": (Word(Life.ANSWERS, many_rules(), 3.0, 27287), EXIT_OK),
    "unseen": (Word(Life.UNSEEN, waiting(), 3.0, 27287), EXIT_DRIFT),
    "dead": (Word(Life.GONE, in_sync(), 190.0, 27287), EXIT_WAITING),
    "not-answering": (Word(Life.SILENT, in_sync(), 190.0, 27287), EXIT_FAILING),
    "stopped-by-a-signal": (Word(Life.STOPPED, in_sync(), 3.0, 27287), EXIT_FAILING),
    "unseen-and-silent": (Word(Life.UNSEEN_SILENT, in_sync(), 190.0, 27287), EXIT_FAILING),
    "dead-of-another-schema": (
        Word(Life.GONE, pid=27287, why="of schema 3, and this snatd reads 2"),
        EXIT_WAITING,
    ),
    "absent": (Word(Life.ABSENT, why="/run/snatd/status.json"), EXIT_WAITING),
    "starting": (Word(Life.STARTING, pid=27999), EXIT_WAITING),
    "elsewhere": (Word(Life.ELSEWHERE, waiting(), None, 27287), EXIT_FAILING),
    "another-schema": (
        Word(Life.UNREADABLE, pid=27287, why="of schema 3, and this snatd reads 2"),
        EXIT_FAILING,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_whole_of_it(name: str) -> None:
    word, exit_code = CASES[name]
    shown = "".join(f"{line.text}\n" for line in told.lines(word, " \u00b7 "))
    assert shown == (GOLDEN / f"status-{name}.txt").read_text()
    assert told.exit_code(word) == exit_code


def test_there_is_no_text_that_is_not_compared() -> None:
    assert {one.name for one in GOLDEN.iterdir()} == {f"status-{name}.txt" for name in CASES}


def test_colours_of_the_headline() -> None:
    colours = {name: told.lines(word)[0].colour for name, (word, _) in CASES.items()}
    assert {name for name in colours if colours[name] == "green"} == {
        "in-sync",
        "fight-ended",
        "two-families-guard-off",
        "metrics-problem",
        "many-rules",
        "without-guard",
    }
    assert {name for name in colours if colours[name] == "yellow"} == {
        "drift",
        "waiting",
        "lost-lease",
        "no-bridge",
        "refused-configuration",
        "unseen",
        "starting",
        "elsewhere",
    }
    assert set(colours.values()) == {"green", "yellow", "red"}


def test_every_part_of_a_headline_is_ascii_whatever_rules_are_called() -> None:
    story = started(Story())
    story.table().reads = [refused("\x1b[2J \u2028 \udcff caf\u00e9")] * 9
    document = story.run("nft").document()
    assert all(part.isascii() and part.isprintable() for part in document["told"])
    assert document["status"].isascii()


def test_as_json_a_word_that_counts_is_the_document() -> None:
    word, _ = CASES["in-sync"]
    found = told.document(word, 2)
    assert found == {"running": True, "stale": False, "age_s": 26.2, **in_sync()}
    assert told.document(CASES["unseen"][0], 2)["running"] is None


@pytest.mark.parametrize(
    ("name", "running", "stale", "age_s"),
    [
        ("dead", False, True, 190.0),
        ("not-answering", True, True, 190.0),
        ("stopped-by-a-signal", True, True, 3.0),
        ("unseen-and-silent", None, True, 190.0),
        ("absent", False, None, None),
        ("starting", None, None, None),
        ("elsewhere", None, None, None),
        ("another-schema", None, None, None),
    ],
)
def test_as_json_a_word_that_does_not_count_is_kept_apart(
    name: str, running: bool | None, stale: bool | None, age_s: float | None
) -> None:
    word, _ = CASES[name]
    found = told.document(word, 2)
    status = found.pop("status")
    assert status == told.lines(word)[0].text
    assert found == {
        "schema": 2,
        "running": running,
        "stale": stale,
        "age_s": age_s,
        "last_word": word.document,
    }


def test_ages_are_of_the_daemons_clock() -> None:
    document = in_sync()
    word = Word(Life.ANSWERS, document | {"last_event": None}, 3 * 86400.0, 27287)
    rows = [line.text for line in told.lines(word)]
    assert "now          2026-11-27 02:40:49; all times are UTC" in rows
    assert any("2026-11-24 02:40:49 (3 d ago)" in row for row in rows)
    # Somebody set the clock back after that.
    later = document | {"started_at": "2027-01-01T00:00:00.000+00:00"}
    rows = [line.text for line in told.lines(Word(Life.ANSWERS, later, 1.0, 27287))]
    assert any(row.endswith("started 2027-01-01 00:00:00") for row in rows)


@pytest.mark.parametrize("value", [None, 0, "x", [], {}, [{}], {"x": 1}, "absent"], ids=repr)
@pytest.mark.parametrize("life", [Life.ANSWERS, Life.SILENT])
def test_half_a_document_raises_what_is_waited_for(value: Any, life: Life) -> None:
    whole = in_sync()
    for key in whole:
        broken = {name: part for name, part in whole.items() if name != key}
        if value != "absent":
            broken[key] = value
        word = Word(life, broken, 1.0, 27287)
        with suppress(*told.NOT_WHOLE):
            assert told.exit_code(word) in (EXIT_OK, EXIT_DRIFT, EXIT_FAILING)
            assert told.lines(word)


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_in_the_manual(name: str) -> None:
    word, _ = CASES[name]
    found = {key for key in keys(told.document(word, 2)) if not key.startswith("last_word.")}
    assert found | {*keys(word.document)} <= documented_keys()
