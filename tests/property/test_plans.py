"""Plans converge, in one step and after any cut, and cost nobody else anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from snatd.core.desired import Absent, Desired
from snatd.core.errors import RuleError
from snatd.core.mend import misplaced, undone
from snatd.core.model import OWN_COMMENT, POSTROUTING, Backend, Counters, Hold, Rule, Ruleset
from snatd.core.plan import (
    Transaction,
    applied,
    plan,
    unwritable,
)
from snatd.core.revert import Memory, remember, revert
from snatd.core.rules import SNAT_TARGETS, Spec, parse, quote
from snatd.kernel.nft import restore_script
from tests.fakes import HAND_MADE, IPTABLES, NFT, V4, P, restored, texts
from tests.property.chains import (
    FOREIGN,
    WISHES,
    S,
    broad_text,
    rulesets,
    shapes,
    situations,
)

Situation = tuple[Desired, dict[Backend, Ruleset], Backend]


def apply_all(
    rulesets_: dict[Backend, Ruleset], transactions: Iterable[Transaction]
) -> dict[Backend, Ruleset]:
    result = dict(rulesets_)
    for one in transactions:
        result[one.backend] = applied(result[one.backend], one)
    return result


def exactly(rules: Iterable[Rule]) -> list[tuple[str, Counters | None]]:
    """Rules with their counters, which equality leaves out."""
    return [(rule.text, rule.counters) for rule in rules]


def whole(ruleset: Ruleset) -> dict[str, list[tuple[str, Counters | None]]]:
    chains = ((POSTROUTING, ruleset.postrouting), *ruleset.own_chains)
    return {name: exactly(rules) for name, rules in chains}


@given(situations())
def test_a_plan_that_was_applied_leaves_nothing_to_plan(situation: Situation) -> None:
    wanted, before, iptables_is = situation
    now = apply_all(before, plan(wanted, before, iptables_is))
    assert plan(wanted, now, iptables_is) == ()


@given(situations())
def test_an_empty_edit_is_in_no_plan(situation: Situation) -> None:
    for transaction in plan(*situation):
        assert transaction.edits
        assert transaction.reasons
        for edit in transaction.edits:
            assert edit.before != edit.after
            assert edit.before == situation[1][transaction.backend].chain(edit.chain)


@given(situations())
def test_foreign_rules_keep_text_order_and_counters(situation: Situation) -> None:
    wanted, before, iptables_is = situation
    alone = {*FOREIGN, HAND_MADE} if len(wanted.cluster) == 1 else set(FOREIGN)
    if len(wanted.networks) > 1 or wanted.cluster != WISHES[0].cluster:
        alone -= {HAND_MADE}
    now = apply_all(before, plan(wanted, before, iptables_is))
    for backend, ruleset in before.items():
        kept = [rule for rule in ruleset.postrouting if rule.text in alone]
        left = [rule for rule in now[backend].postrouting if rule.text in alone]
        assert exactly(left) == exactly(kept)


@given(situations())
def test_nothing_is_there_that_was_not_or_is_ours(situation: Situation) -> None:
    wanted, before, iptables_is = situation
    for backend, ruleset in apply_all(before, plan(wanted, before, iptables_is)).items():
        was = set(texts(before[backend].postrouting))
        new = [text for text in texts(ruleset.postrouting) if text not in was]
        assert all(parse(text).owned for text in new)
        assert len(set(new)) == len(new)


@given(situations(), st.permutations((True, False, False)), st.booleans())
def test_a_plan_cut_anywhere_converges_in_the_next_pass(
    situation: Situation, keep: list[bool], backwards: bool
) -> None:
    wanted, before, iptables_is = situation
    transactions = plan(wanted, before, iptables_is)[:: -1 if backwards else 1]
    some = [one for one, kept in zip(transactions, keep, strict=False) if kept]
    now = apply_all(before, some)
    now = apply_all(now, plan(wanted, now, iptables_is))
    assert plan(wanted, now, iptables_is) == ()


@given(situations())
def test_without_a_bridge_nothing_is_planned(situation: Situation) -> None:
    wanted, before, iptables_is = situation
    assert plan(replace(wanted, bridge=Hold("not yet")), before, iptables_is) == ()


@given(situations())
def test_where_nothing_is_leased_exactly_ours_goes(situation: Situation) -> None:
    _, before, iptables_is = situation
    now = apply_all(before, plan(Absent(V4), before, iptables_is))
    for backend, ruleset in before.items():
        foreign = [rule for rule in ruleset.postrouting if not owned(rule)]
        assert exactly(now[backend].postrouting) == exactly(foreign)
        assert now[backend].own_chains == ()
    assert plan(Absent(V4), now, iptables_is) == ()


def owned(rule: Rule) -> bool:
    spec = told(rule)
    return spec is not None and spec.owned


def told(rule: Rule) -> Spec | None:
    try:
        return parse(rule.text)
    except RuleError:
        return None


INTERNET, NEIGHBOUR = ip_address("8.8.8.8"), ip_address("172.7.22.5")


def rewrites(ruleset: Ruleset, destination: object, out: str = "eth0") -> bool:
    """Whether rules for the whole of P rewrite the source of a packet that leaves by a device.

    Everything that says more than source, destination and interface is left out.
    """
    return any(_rewrites(rule, ruleset, destination, out) for rule in ruleset.postrouting)


def _rewrites(rule: Rule, ruleset: Ruleset, destination: object, out: str) -> bool:
    spec = told(rule)
    if spec is None or spec.source != P or spec.source_negated or spec.target is None:
        return False
    if spec.others or "\n" in rule.text or not _matches(spec, destination, out):
        return False
    if spec.target.name in SNAT_TARGETS:
        return not spec.target.goto
    for inner in ruleset.chain(spec.target.name) or ():
        said = parse(inner.text)
        if _matches(said, destination, out):
            return said.target is not None and said.target.name in SNAT_TARGETS
    return False


def _matches(spec: Spec, destination: object, out: str) -> bool:
    there = (
        spec.destination is None or (destination in spec.destination) != spec.destination_negated
    )
    by = spec.out is None or (spec.out.value == out) != spec.out.negated
    return there and by


@given(situations())
def test_the_promises_hold_after_a_plan(situation: Situation) -> None:
    wanted, before, iptables_is = situation
    if iptables_is not in before:
        before[iptables_is] = Ruleset(V4, iptables_is)
    now = apply_all(before, plan(wanted, before, iptables_is))
    foreign = {*FOREIGN, HAND_MADE}
    for ruleset in now.values():
        mine = tuple(rule for rule in ruleset.postrouting if rule.text not in foreign)
        assert not rewrites(replace(ruleset, postrouting=mine), NEIGHBOUR)
    rewritten = any(rewrites(ruleset, INTERNET) for ruleset in before.values())
    # Rules with our comment that say odd things are cleared away, never counted on.
    odd = any(owned(rule) for ruleset in before.values() for rule in ruleset.postrouting)
    if (wanted.add_egress and not wanted.flannel_egress_counts) or (rewritten and not odd):
        assert any(rewrites(ruleset, INTERNET) for ruleset in now.values())


@given(situations())
def test_the_restore_script_does_what_the_plan_says(situation: Situation) -> None:
    wanted, before, iptables_is = situation
    for transaction in plan(wanted, before, iptables_is):
        check_script(before[transaction.backend], transaction)


@given(situations())
def test_undoing_gives_back_the_rules_and_can_be_written(situation: Situation) -> None:
    for transaction in plan(*situation):
        before = situation[1][transaction.backend]
        now = applied(before, transaction)
        undo = undone(transaction, now)
        check_script(now, undo)
        back = applied(now, undo)
        assert sorted(texts(back.postrouting)) == sorted(texts(before.postrouting))
        assert dict(back.own_chains) == dict(before.own_chains)
        if len(set(before.postrouting)) == len(before.postrouting):
            assert texts(back.postrouting) == texts(before.postrouting)


@given(situations(), st.data())
def test_a_misplaced_rule_is_put_right(situation: Situation, data: st.DataObject) -> None:
    wanted, before, iptables_is = situation
    for transaction in plan(wanted, before, iptables_is):
        meant = applied(before[transaction.backend], transaction)
        assert misplaced(transaction, meant) is None
        new = {line.removeprefix("-A POSTROUTING ") for line in transaction.added}
        replaced = [line for line in transaction.removed if line.startswith("-A POSTROUTING ")]
        if not replaced or len(set(meant.postrouting)) < len(meant.postrouting):
            # What was only appended needed no number to find its place.
            continue
        moved = [rule for rule in meant.postrouting if rule.text not in new]
        for rule in meant.postrouting:
            if rule.text in new:
                moved.insert(data.draw(st.integers(0, len(moved))), rule)
        there = replace(meant, postrouting=tuple(moved))
        fix = misplaced(transaction, there)
        if fix is not None:
            there = restored(there, restore_script(fix))
        assert texts(there.postrouting) == texts(meant.postrouting)


def check_script(before: Ruleset, transaction: Transaction) -> None:
    """A restore line by line gives what the transaction says, counters included."""
    found = restored(before, restore_script(transaction))
    expected = applied(before, transaction)
    # A chain of ours is written whole and counts anew.
    assert exactly(found.postrouting) == exactly(expected.postrouting)
    assert dict(found.own_chains) == dict(expected.own_chains)


@st.composite
def plain_chains(draw: st.DrawFn) -> tuple[Ruleset, bool]:
    """Foreign and broad rules, one broad rule a shape, its copies together; whether one is odd."""
    groups = [[text] for text in draw(st.lists(st.sampled_from(FOREIGN), max_size=6))]
    odd = False
    for shape in draw(st.lists(shapes, unique_by=str, max_size=3)):
        within = draw(st.sampled_from(("", "", " ! -d 172.7.21.0/24")))
        decoration = draw(st.sampled_from(("", "", " -m comment --comment ops")))
        copies = draw(st.integers(1, 3))
        odd = odd or bool(within or decoration) or copies > 1
        groups.append([broad_text(shape, within, decoration)] * copies)
    order = draw(st.permutations(groups))
    rules = tuple(Rule(text) for group in order for text in group)
    return Ruleset(V4, NFT, rules), odd


@given(plain_chains(), st.sampled_from(WISHES))
def test_revert_gives_back_what_was_narrowed(chain: tuple[Ruleset, bool], wanted: Desired) -> None:
    before, odd = chain
    wanted = replace(wanted, add_egress=False)
    now, memory = before, Memory(wanted.subnet)
    for transaction in plan(wanted, {NFT: before}, NFT):
        memory = remember(transaction, wanted.subnet, memory)
        now = applied(now, transaction)
    transaction = revert(now, [memory], wanted.subnet)
    check_script(now, transaction)
    assert texts(applied(now, transaction).postrouting) == texts(before.postrouting)
    if not odd:
        # Without the memory the plain ones come back all the same.
        assert applied(now, revert(now, (), None)).postrouting == before.postrouting


@given(st.sampled_from(WISHES).flatmap(lambda wanted: rulesets(wanted, NFT)))
def test_revert_leaves_nothing_of_ours_and_all_of_others(ruleset: Ruleset) -> None:
    broad = Memory(P, (("-s 172.7.21.0/24 -j MASQUERADE", 2),))
    for memories in ((), (Memory(P),), (broad,)):
        transaction = revert(ruleset, memories, P)
        check_script(ruleset, transaction)
        now = applied(ruleset, transaction)
        assert not any(owned(rule) for rule in now.postrouting)
        assert now.own_chains == ()
        foreign = [rule for rule in ruleset.postrouting if rule.text in FOREIGN]
        assert exactly(r for r in now.postrouting if r.text in FOREIGN) == exactly(foreign)


comments = st.text(
    st.characters(codec="utf-8", exclude_characters="\0")
    | st.sampled_from("\n\r\t\x1b\"'\\\u2028 !-"),
    max_size=40,
).filter(lambda comment: comment != OWN_COMMENT)


@given(comments, st.sampled_from(IPTABLES), st.sampled_from(WISHES))
def test_a_broad_rule_with_any_comment_is_narrowed_or_reported(
    comment: str, backend: Backend, wanted: Desired
) -> None:
    text = f"-s 172.7.21.0/24 ! -o docker0 -m comment --comment {quote(comment)} -j MASQUERADE"
    before = Ruleset(V4, backend, (Rule("-j A"), Rule(text)))
    now = apply_all({backend: before}, plan(wanted, {backend: before}, backend))[backend]
    assert (Rule(text) in now.postrouting) == ("\n" in comment)
    assert unwritable(wanted, now) == ((2,) if "\n" in comment else ())
    for transaction in plan(wanted, {backend: before}, backend):
        check_script(before, transaction)


@given(situations())
def test_what_is_in_sync_hides_nothing(situation: Situation) -> None:
    """Of a broad rule that stays somebody is told; of all others nobody."""
    wanted, before, iptables_is = situation
    for ruleset in apply_all(before, plan(wanted, before, iptables_is)).values():
        odd = {f'{S} -o a"b -j MASQUERADE', f'{S} -m comment --comment "two\nlines" -j MASQUERADE'}
        stay = [n for n, rule in enumerate(ruleset.postrouting, 1) if rule.text in odd]
        assert list(unwritable(wanted, ruleset)) == stay
