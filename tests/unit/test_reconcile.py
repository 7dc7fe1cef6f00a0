"""One pass over tables in memory, with rivals and errors between its read and its write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendBusy, BackendError, BackendFailed, NotConverged, StaleRuleset
from snatd.core.model import (
    Backend,
    Family,
    GuardPolicy,
    Hold,
    Lease,
    Network,
    NodeState,
    Policy,
    Rule,
    Ruleset,
)
from snatd.core.plan import Transaction
from snatd.reconcile import Edges, Pass, look, put_back, reconcile
from tests.fakes import (
    BROAD,
    ETH0,
    FAR_AWAY,
    LEGACY,
    LO,
    NFT,
    OURS,
    V4,
    V6,
    FakeTables,
    P,
    egress,
    lease,
    link,
    listed,
    node,
    once,
    refused,
    replacing,
)

BROAD6 = "-s fd00:7:21::/64 ! -o cni0 -j MASQUERADE"
OURS6 = "-s fd00:7:21::/64 ! -d fd00:7::/32 ! -o cni0 -m comment --comment snatd -j MASQUERADE"
BOTH = Lease((*lease().families, *lease("fd00:7:21::1/64", "fd00:7::/32", V6).families))
BOTH_NODE = node(
    BOTH, LO, ETH0, link(3, "docker0", "172.7.21.1/24"), link(4, "cni0", "fd00:7:21::1/64")
)

Remembered = list[tuple[Transaction, Network | None]]


def edges(
    *tables: FakeTables,
    of: NodeState | BackendError | None = None,
    remember: Callable[[Transaction, Network | None], None] = lambda *_: None,
) -> Edges:
    def read_node(_: Deadline) -> NodeState:
        if isinstance(of, BackendError):
            raise of
        return of or node()

    return Edges(read_node, tables, remember)


def passed(*tables: FakeTables, of: NodeState | BackendError | None = None) -> Pass:
    return reconcile(edges(*tables, of=of), Policy(), FAR_AWAY)


def chain(*rules: str) -> str:
    return "\n".join(f"-A POSTROUTING {rule}" for rule in rules)


def nft(*rules: str) -> FakeTables:
    return FakeTables(listed(chain(*rules)))


def legacy(*rules: str) -> FakeTables:
    return FakeTables(listed(chain(*rules), backend=LEGACY))


def kinds(done: Pass) -> list[tuple[str, Family | None, object]]:
    return [(type(one.error).__name__, one.family, one.backend) for one in done.view.problems]


def test_what_is_wrong_is_repaired_and_read_back() -> None:
    tables = nft("-j A", BROAD, "-j B")
    done = passed(tables)
    assert tables.texts == ["-j A", OURS, "-j B"]
    assert done.view.in_sync
    assert [one.added for one in done.applied] == [(f"-A POSTROUTING {OURS}",)]


def test_in_sync_nothing_is_written() -> None:
    tables = nft("-j A", OURS)
    done = passed(tables)
    assert (tables.written, done.applied, done.view.in_sync) == ([], (), True)
    assert tables.read_count == 1


def test_looking_writes_and_remembers_nothing() -> None:
    tables, kept = nft(BROAD), Remembered()
    view = look(edges(tables, remember=lambda *one: kept.append(one)), Policy(), FAR_AWAY)
    assert (tables.written, kept, len(view.plan)) == ([], [], 1)
    assert tables.texts == [BROAD]
    assert not view.in_sync


@pytest.mark.parametrize(
    ("rule", "backend", "tool"),
    [
        (BROAD.replace("-j", '-m comment --comment "a\nb" -j'), NFT, "iptables-nft"),
        (BROAD.replace("docker0", "doc'ker0"), LEGACY, "iptables-legacy"),
    ],
)
def test_what_no_restore_can_name_is_left_alone_and_reported(
    rule: str, backend: Backend, tool: str
) -> None:
    rules = FakeTables(Ruleset(V4, backend, (Rule("-j A"), Rule(rule))))
    for done in (passed(rules), passed(rules)):
        assert rule in rules.texts
        assert not done.view.in_sync
        (problem,) = done.view.problems
        assert f"`{tool} -t nat -D POSTROUTING 2`" in str(problem)
    assert len(rules.written) <= 1, "ours, beside it"


def test_memory_comes_before_the_write() -> None:
    tables, order = nft(BROAD), list[str]()
    tables.before_apply = lambda _: order.append("write")
    kept: Remembered = []

    def remember(transaction: Transaction, subnet: Network | None) -> None:
        order.append("remember")
        kept.append((transaction, subnet))

    reconcile(edges(tables, remember=remember), Policy(), FAR_AWAY)
    assert order == ["remember", "write"]
    ((transaction, subnet),) = kept
    assert (transaction.removed, subnet) == ((f"-A POSTROUTING {BROAD}",), P)


def test_where_memory_fails_by_a_bug_nothing_is_written() -> None:
    tables = nft(BROAD)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reconcile(edges(tables, remember=broken), Policy(), FAR_AWAY)
    assert tables.texts == [BROAD]


def test_all_backends_and_families_are_repaired() -> None:
    four, six, old = nft(BROAD), FakeTables(listed(chain(BROAD6), V6)), legacy(BROAD)
    done = passed(four, old, six, of=BOTH_NODE)
    assert (four.texts, old.texts, six.texts) == ([OURS], [OURS], [OURS6])
    assert done.view.in_sync
    assert len(done.applied) == 3


def test_a_backend_that_cannot_be_read_does_not_stop_the_others() -> None:
    broken, other = nft(BROAD), legacy(BROAD)
    broken.reads = [refused()] * 9
    done = passed(broken, other)
    assert (broken.texts, other.texts) == ([BROAD], [OURS])
    assert kinds(done) == [("BackendFailed", V4, NFT)]
    assert str(done.view.problems[0]) == "ipv4 nft: refused"


def test_a_backend_that_cannot_be_written_does_not_stop_the_others() -> None:
    for error in (refused(), BackendBusy("locked")):
        broken, other = nft(BROAD), legacy(BROAD)
        broken.writes = [error] * 9
        done = passed(broken, other)
        assert (broken.texts, other.texts) == ([BROAD], [OURS])
        assert kinds(done) == [(type(error).__name__, V4, NFT)]
        assert [one.backend for one in done.applied] == [LEGACY]
        # It is not asked again and again in one pass.
        assert len(broken.writes) == 8


def test_a_node_that_cannot_be_read_is_a_problem_and_nothing_is_read() -> None:
    tables = nft(BROAD)
    done = passed(tables, of=BackendFailed("netlink"))
    assert (tables.read_count, tables.texts) == (0, [BROAD])
    assert kinds(done) == [("BackendFailed", None, None)]
    assert str(done.view.problems[0]) == "netlink"


def test_an_unknown_lease_reads_and_writes_nothing() -> None:
    tables = nft(BROAD)
    state = NodeState(Hold("subnet.env: no such file"))
    done = passed(tables, of=state)
    assert (tables.read_count, tables.texts) == (0, [BROAD])
    assert done.view.holds == ("subnet.env: no such file",)
    assert not done.view.in_sync


def test_a_missing_bridge_is_waited_for() -> None:
    tables = nft(BROAD)
    done = passed(tables, of=node(None, LO, ETH0))
    assert tables.texts == [BROAD]
    assert len(done.view.holds) == 1


def test_without_ipv6_its_tables_are_not_asked() -> None:
    four, six = nft(OURS), FakeTables(listed("", V6))
    done = passed(four, six, of=node(ipv6=False))
    assert six.read_count == 0
    assert done.view.in_sync


def test_tables_of_a_family_that_is_not_leased_may_be_unreadable() -> None:
    four, six = nft(OURS), FakeTables(listed("", V6), reads=[refused()])
    assert passed(four, six).view.in_sync


def test_ours_of_a_family_that_is_no_longer_leased_goes() -> None:
    four, six = nft(OURS), FakeTables(listed(chain("-j A", OURS6), V6))
    kept: Remembered = []
    done = reconcile(edges(four, six, remember=lambda *one: kept.append(one)), Policy(), FAR_AWAY)
    assert six.texts == ["-j A"]
    assert done.view.in_sync
    assert [subnet for _, subnet in kept] == [None]
    # A lease that is not whole does not say what it has not.
    unsure = FakeTables(listed(chain("-j A", OURS6), V6))
    passed(nft(OURS), unsure, of=node(lease(whole=False)))
    assert unsure.texts == ["-j A", OURS6]


def test_what_moved_meanwhile_is_looked_at_again() -> None:
    tables = nft("-j A", BROAD)
    # Docker restarts: its rule goes and comes back at the head.
    tables.before_apply = once(replacing(BROAD, BROAD))
    tables.writes = [StaleRuleset("moved")]
    done = passed(tables)
    assert tables.texts == [OURS, "-j A"]
    assert done.view.in_sync


def test_legacy_refuses_what_moved_and_looks_again() -> None:
    tables = legacy("-j A", BROAD)
    tables.before_apply = once(lambda rival: rival.insert("-j RIVAL", 0))
    done = passed(tables)
    assert tables.texts == ["-j RIVAL", "-j A", OURS]
    assert done.view.in_sync
    assert len(done.applied) == 1


def test_always_stale_ends_after_a_few_rounds() -> None:
    tables = nft(BROAD)
    tables.writes = [StaleRuleset("moved")] * 100
    done = passed(tables)
    assert kinds(done) == [("StaleRuleset", V4, NFT)]
    assert done.applied == ()
    assert 90 <= len(tables.writes) < 99


def test_a_rival_that_undoes_each_write_is_not_converged() -> None:
    tables = nft("-j A", BROAD)
    tables.after_apply = replacing(OURS, BROAD)
    done = passed(tables)
    assert kinds(done) == [("NotConverged", V4, NFT)]
    message = str(done.view.problems[0])
    # Both rulesets are in the record.
    assert BROAD in message
    assert OURS in message
    assert 2 <= len(tables.written) <= 8
    assert isinstance(done.view.problems[0].error, NotConverged)


def test_a_rival_in_one_backend_leaves_the_other_in_peace() -> None:
    tables, other = nft(BROAD), legacy(BROAD)
    tables.after_apply = replacing(OURS, BROAD)
    done = passed(tables, other)
    assert kinds(done) == [("NotConverged", V4, NFT)]
    assert (len(other.written), other.texts) == (1, [OURS])


def test_a_rivals_rule_between_read_and_write_is_kept_in_its_place() -> None:
    for position in (0, 1, 2, 3):
        tables = nft("-j A", BROAD, "-j B")
        tables.before_apply = once(partial(FakeTables.insert, text="-j RIVAL", position=position))
        done = passed(tables)
        texts = [text for text in tables.texts if text != "-j RIVAL"]
        assert texts == ["-j A", OURS, "-j B"], position
        assert tables.texts.count("-j RIVAL") == 1
        assert done.view.in_sync


def test_a_rivals_removal_between_read_and_write_costs_no_order() -> None:
    tables = nft("-j A", "-j B", BROAD, "-j C", "-j D")
    tables.before_apply = once(lambda of: of.remove("-j A"))
    assert passed(tables).view.in_sync
    assert tables.texts == ["-j B", OURS, "-j C", "-j D"]


def test_a_write_that_happened_counts_although_it_could_not_be_read_back() -> None:
    tables = nft("-j A", BROAD)
    tables.reads = [None, BackendBusy("slow")]
    done = passed(tables)
    assert tables.texts == ["-j A", OURS]
    # `apply --confirm` undoes what a pass says that it applied.
    assert len(done.applied) == 1


def test_a_deadline_that_is_over_is_a_busy_backend() -> None:
    tables = nft(BROAD)
    done = reconcile(edges(tables), Policy(), Deadline(-1.0))
    assert kinds(done) == [("BackendBusy", V4, NFT)]
    assert tables.texts == [BROAD]


def test_the_operators_backend_wins_over_the_nodes() -> None:
    four, old = nft(), legacy()
    reconcile(edges(four, old), Policy(backend=LEGACY), FAR_AWAY)
    assert (four.texts, old.texts) == ([], [OURS])


def test_a_pass_is_put_back() -> None:
    before = ["-j A", BROAD, "-j B"]
    four, old = nft(*before), legacy(*before)
    line = edges(four, old)
    done = reconcile(line, Policy(), FAR_AWAY)
    four.insert("-j NEW", 0)
    undoing = put_back(done, line, Policy(), FAR_AWAY)
    assert (four.texts, old.texts) == (["-j NEW", *before], before)
    assert [one.backend for one in undoing.undone] == [LEGACY, NFT]
    assert undoing.problems == ()
    assert len(undoing.view.plan) == 2


def test_a_held_lock_does_not_keep_a_pass_from_being_put_back() -> None:
    old = legacy(BROAD)
    line = edges(old)
    done = reconcile(line, Policy(), FAR_AWAY)
    old.writes = [BackendBusy("locked"), StaleRuleset("moved"), BackendBusy("locked")]
    assert put_back(done, line, Policy(), FAR_AWAY).problems == ()
    assert old.texts == [BROAD]


def test_what_cannot_be_put_back_is_a_problem_and_the_rest_is() -> None:
    four, old = nft(BROAD), legacy(BROAD)
    line = edges(four, old)
    done = reconcile(line, Policy(), FAR_AWAY)
    old.writes = [refused()]
    undoing = put_back(done, line, Policy(), FAR_AWAY)
    assert (four.texts, old.texts) == ([BROAD], [OURS])
    (problem,) = undoing.problems
    assert (problem.family, problem.backend) == (V4, LEGACY)


def test_keep_writes_nothing_into_an_empty_table() -> None:
    tables = nft()
    done = reconcile(edges(tables), egress("keep"), FAR_AWAY)
    assert (tables.written, done.view.in_sync) == ([], True)


def guard(*lines: str, family: Family = V4) -> FakeTables:
    return FakeTables(Ruleset(family, Backend.GUARD, tuple(map(Rule, lines))))


def test_the_guard_is_written_before_anything_else() -> None:
    order: list[Backend] = []
    tables = [guard(), nft(BROAD), legacy(BROAD)]
    for one in tables:
        one.before_apply = lambda one: order.append(one.backend)
    done = passed(*tables)
    assert order == [Backend.GUARD, NFT, LEGACY]
    assert done.view.in_sync
    assert [rule.split()[0] for rule in tables[0].texts] == ["chain", "rule"]
    assert passed(*tables).applied == ()


def test_the_guard_stands_while_the_bridge_is_waited_for() -> None:
    tables = guard(), nft(BROAD)
    done = passed(*tables, of=node(None, LO, ETH0))
    assert [one.backend for one in done.applied] == [Backend.GUARD]
    assert tables[1].texts == [BROAD]


def with_guard(how: str, *tables: FakeTables) -> Pass:
    return reconcile(edges(*tables), Policy(guard=GuardPolicy(how)), FAR_AWAY)


@pytest.mark.parametrize("fails", ["reads", "writes"])
@pytest.mark.parametrize(
    ("how", "in_sync", "problems", "unguarded"),
    [("auto", True, 0, 1), ("on", False, 1, 0), ("off", True, 0, 0)],
)
def test_a_guard_that_cannot_be_had(
    fails: str, how: str, in_sync: bool, problems: int, unguarded: int
) -> None:
    tables = guard(*["rule of an older one"] * (how == "off")), nft(BROAD)
    getattr(tables[0], fails).extend([refused("no such hook")] * 9)
    done = with_guard(how, *tables)
    assert tables[1].texts == [OURS], "the others go on"
    assert done.view.in_sync is in_sync
    assert len(done.view.problems) == problems
    assert len(done.view.unguarded) == unguarded


@pytest.mark.parametrize("how", ["auto", "on"])
@pytest.mark.parametrize("error", [BackendBusy("held"), NotConverged("otherwise")])
def test_a_guard_that_may_come_is_not_given_up(how: str, error: BackendError) -> None:
    tables = guard(), nft(OURS)
    tables[0].writes.extend([error] * 9)
    done = with_guard(how, *tables)
    assert [one.backend for one in done.view.problems] == [Backend.GUARD]
    assert done.view.unguarded == ()


def test_a_guard_that_somebody_takes_away_again_and_again_is_a_problem() -> None:
    def take(one: FakeTables) -> None:
        one.ruleset = replace(one.ruleset, postrouting=())

    tables = guard(), nft(OURS)
    tables[0].after_apply = take
    done = with_guard("auto", *tables)
    assert [type(one.error) for one in done.view.problems] == [NotConverged]
