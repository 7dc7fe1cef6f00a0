"""What a view says: exit status, headline, diff, documents."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from snatd.core.errors import BackendBusy, BackendError
from snatd.core.guard import guard_rules, plan_guard
from snatd.core.model import Backend, Counters, Hold, Policy, Rule, Ruleset
from snatd.reconcile import Edges, Problem, View, look, reconcile
from snatd.report import (
    cut_out_lines,
    diff,
    document,
    exit_code,
    headline,
    is_busy,
    lines,
    state,
)
from tests.fakes import (
    BROAD,
    ETH0,
    FAR_AWAY,
    LEGACY,
    LO,
    NFT,
    OURS,
    V4,
    FakeTables,
    lease,
    link,
    listed,
    node,
    plans,
    refused,
    replacing,
    wish,
)

PLAN = plans(wish(), listed(f"-A POSTROUTING {BROAD}"))
PROBLEM = Problem(refused("table `nat' is incompatible"), V4, NFT)
HELD = {V4: Hold("subnet.env: no such file")}


def seen(*rules: str) -> View:
    """What a look at one nft table gives."""
    tables = FakeTables(Ruleset(V4, NFT, tuple(map(Rule, rules))))
    return look(Edges(lambda _: node(), (tables,), lambda *_: None), Policy(), FAR_AWAY)


@pytest.mark.parametrize(
    ("view", "code", "word"),
    [
        (View(wanted={V4: wish()}), 0, "in sync"),
        (View(wanted={V4: wish()}, plan=PLAN), 1, "drift"),
        (View(wanted=HELD), 3, "waiting"),
        (View(wanted=HELD, plan=PLAN), 1, "drift"),
        (View(problems=(PROBLEM,)), 4, "degraded"),
        (View(wanted=HELD, problems=(PROBLEM,)), 4, "degraded"),
        (View(wanted=HELD, plan=PLAN, problems=(PROBLEM,)), 4, "degraded"),
    ],
)
def test_of_several_states_the_one_that_needs_a_person_most(
    view: View, code: int, word: str
) -> None:
    assert (exit_code(view), state(view)) == (code, word)
    assert headline(view).startswith(f"{word}: ")
    assert headline(view).isascii()
    assert document(view)["state"] == word
    assert document(view)["in_sync"] is (code == 0)


def test_headlines() -> None:
    assert (
        headline(seen(OURS))
        == "in sync: 172.7.21.0/24 keeps its address towards the rest of 172.7.0.0/16"
    )
    assert headline(seen(BROAD, BROAD)) == "drift: 2 rules to remove, 1 to add"
    assert headline(View(wanted=HELD)) == "waiting: subnet.env: no such file"
    two = View(problems=(PROBLEM, PROBLEM))
    assert headline(two) == "degraded: ipv4 nft: table `nat' is incompatible (and 1 more)"


HOSTILE = ["x\nMAINPID=1", "caf\u00e9", "\x1b[2J", "\udcff", "\u2028"]


@pytest.mark.parametrize("odd", HOSTILE)
def test_a_headline_is_one_line_of_ascii_whatever_a_device_is_called(odd: str) -> None:
    held = wish(node(None, LO, ETH0, link(3, odd, "172.7.21.1/16"))).bridge
    assert isinstance(held, Hold)
    found = headline(View(wanted={V4: held}))
    assert found.isascii()
    assert found.isprintable()


@pytest.mark.parametrize("odd", HOSTILE)
def test_a_headline_is_one_line_of_ascii_whatever_a_rule_says(odd: str) -> None:
    # A rival undoes each write, so the record holds the whole chain, foreign comments included.
    foreign = f'-m comment --comment "{odd}" -j RETURN'
    tables = FakeTables(Ruleset(V4, NFT, (Rule(foreign), Rule(BROAD))))
    tables.after_apply = replacing(OURS, BROAD, 1)
    done = reconcile(Edges(lambda _: node(), (tables,), lambda *_: None), Policy(), FAR_AWAY)
    assert exit_code(done.view) == 4
    found = headline(done.view)
    assert found.isascii()
    assert found.isprintable()


def test_the_diff() -> None:
    assert diff(PLAN) == (
        "ipv4 nft:",
        f"- -A POSTROUTING {BROAD}",
        f"+ -A POSTROUTING {OURS}",
        "  because it hides the addresses of 172.7.21.0/24 from 172.7.0.0/16",
    )
    assert diff(()) == ()


def test_the_diff_of_several_backends() -> None:
    both = plans(
        wish(),
        listed(f"-A POSTROUTING {BROAD}\n-A POSTROUTING {BROAD}"),
        listed(f"-A POSTROUTING {BROAD}", backend=LEGACY),
    )
    heads = [line for line in diff(both) if not line.startswith(("-", "+", " "))]
    assert heads == ["ipv4 nft:", "ipv4 legacy:"]
    assert diff(both).count(f"- -A POSTROUTING {BROAD}") == 3


WIDE = wish(
    node(
        lease("10.42.3.1/24", "10.0.0.0/8"),
        link(2, "eth0", "10.1.2.3/16"),
        link(3, "cni0", "10.42.3.1/24"),
        routes="10.1.0.0/16@eth0",
    )
)


def test_cut_outs_are_always_said() -> None:
    view = View(wanted={V4: WIDE})
    assert cut_out_lines(view) == ("10.1.0.0/16 (directly connected on eth0)",)
    assert "stays masqueraded: 10.1.0.0/16 (directly connected on eth0)" in lines(view, ())


def test_all_there_is_to_know_and_nothing_twice() -> None:
    view = View(wanted=HELD, problems=(PROBLEM,))
    assert lines(view, PLAN) == (
        "degraded: ipv4 nft: table `nat' is incompatible",
        *diff(PLAN),
        "waiting: subnet.env: no such file",
    )
    two = View(problems=(PROBLEM, Problem(refused("broken"))))
    assert lines(two, ()) == (
        "degraded: ipv4 nft: table `nat' is incompatible (and 1 more)",
        "problem: broken",
    )
    assert lines(View(wanted=HELD), ()) == ("waiting: subnet.env: no such file",)


@pytest.mark.parametrize(
    ("errors", "busy"),
    [
        ([], False),
        ([BackendBusy("locked")], True),
        ([BackendBusy("locked"), BackendBusy("locked")], True),
        ([BackendBusy("locked"), refused()], False),
    ],
)
def test_busy_may_pass_by_itself(errors: list[BackendError], busy: bool) -> None:
    assert is_busy(View(problems=tuple(map(Problem, errors)))) is busy


def test_the_document_is_json_and_whole() -> None:
    for view in (seen(OURS), seen(BROAD), View(wanted=HELD), View(problems=(PROBLEM,))):
        found = json.loads(json.dumps(document(view)))
        assert set(found) == {
            "state",
            "in_sync",
            "headline",
            "iptables_is",
            "ipmasq",
            "families",
            "rulesets",
            "guard",
            "waiting_for",
            "problems",
            "plan",
        }
    (family,) = document(seen(OURS))["families"]
    assert family == {
        "family": "ipv4",
        "subnet": "172.7.21.0/24",
        "networks": ["172.7.0.0/16"],
        "cut_outs": [],
        "bridge": "docker0",
    }
    (problem,) = document(View(problems=(PROBLEM,)))["problems"]
    assert (problem["backend"], problem["kind"]) == ("nft", "failed")
    (plan,) = document(seen(BROAD))["plan"]
    assert plan["remove"] == [f"-A POSTROUTING {BROAD}"]
    assert plan["reasons"][0]["change"] == "rule_narrowed"


def test_only_rules_of_ours_are_listed_as_ours() -> None:
    foreign = '-m comment --comment "x --comment snatd y" -j RETURN'
    (found,) = document(seen(foreign, OURS))["rulesets"]
    assert found["ours"] == [f"-A POSTROUTING {OURS}"]
    assert found["postrouting_rules"] == 2


def with_guard(counted: Counters | None = None, *, planned: bool = False) -> View:
    ruleset = Ruleset(V4, Backend.GUARD, guard_rules(wish(), (0x4000,)))
    if counted:
        chain, rule = ruleset.postrouting
        ruleset = replace(ruleset, postrouting=(chain, replace(rule, counters=counted)))
    plan = plan_guard(wish(), ruleset, Policy())
    return View(wanted={V4: wish()}, rulesets=(ruleset,), plan=(plan,) if plan and planned else ())


def test_the_guard_in_the_document() -> None:
    view = with_guard(Counters(7, 420))
    found = document(view)
    assert found["guard"] == [
        {"family": "ipv4", "in_place": True, "connections": 7, "why_not": None}
    ]
    assert found["rulesets"] == [], "it is no ruleset of iptables"


def test_a_guard_that_is_to_be_written_is_not_in_place() -> None:
    (guard,) = document(with_guard(planned=True))["guard"]
    assert not guard["in_place"]


def test_without_a_guard_it_says_so_everywhere() -> None:
    why = Problem(refused("Operation not supported"), V4, Backend.GUARD)
    view = View(wanted={V4: wish()}, unguarded=(why,))
    assert exit_code(view) == 0
    assert headline(view) == (
        "in sync: 172.7.21.0/24 keeps its address towards the rest of 172.7.0.0/16, without a guard"
    )
    assert "no guard: ipv4 guard: Operation not supported" in lines(view, ())
    found = document(view)
    assert found["guard"][0]["why_not"] == "Operation not supported"
