"""What was there before us is remembered by text and number, and comes back in its place."""

from __future__ import annotations

from dataclasses import replace

from snatd.core.desired import Desired
from snatd.core.model import POSTROUTING, Counters, Network, Rule, Ruleset
from snatd.core.plan import applied
from snatd.core.revert import Memory, lapsed, remember, revert
from tests.fakes import (
    BROAD,
    HAND_MADE,
    JUMP,
    NFT,
    OURS,
    V4,
    P,
    egress,
    lease,
    listed,
    networks,
    node,
    plans,
    texts,
    wish,
)

TWO = wish(node(lease(inside="172.7.0.0/16 10.9.0.0/16")))
(OTHER_P,) = networks("172.7.9.0/24")
SNAT = "SNAT --to-source 192.168.33.10"


def chain(*rules: str) -> Ruleset:
    return Ruleset(V4, NFT, tuple(map(Rule, rules)))


def narrow(
    before: Ruleset, wanted: Desired | None = None, memory: Memory | None = None
) -> tuple[Ruleset, Memory]:
    """The chain after one pass, and the memory of it."""
    wanted = wanted or wish()
    for transaction in plans(wanted, before):
        memory = remember(transaction, wanted.subnet, memory)
        before = applied(before, transaction)
    assert memory is not None
    return before, memory


def reverted(ruleset: Ruleset, memory: Memory | None, today: Network | None = P) -> Ruleset:
    return applied(ruleset, revert(ruleset, known(memory), today))


def known(memory: Memory | None) -> tuple[Memory, ...]:
    return () if memory is None else (memory,)


def test_texts_and_copies_are_remembered() -> None:
    odd = "-s 172.7.21.0/24 -m comment --comment ops -j MASQUERADE"
    _, memory = narrow(chain(BROAD, "-j A", BROAD, odd))
    assert memory == Memory(P, ((BROAD, 2), (odd, 1)))


def test_where_nothing_was_the_memory_says_so() -> None:
    _, memory = narrow(chain("-j A"))
    assert memory == Memory(P)


def test_ours_is_never_remembered() -> None:
    _, memory = narrow(chain(OURS, OURS, BROAD))
    assert memory == Memory(P, ((BROAD, 1),))


def test_of_what_comes_again_and_again_the_most_copies_count() -> None:
    ruleset, memory = narrow(chain(BROAD, BROAD))
    for _ in range(3):
        ruleset, memory = narrow(chain(BROAD, *texts(ruleset.postrouting)), memory=memory)
    assert memory == Memory(P, ((BROAD, 2),))


def test_another_rule_is_remembered_beside_the_first() -> None:
    other = "-s 172.7.21.0/24 -o eth0 -j MASQUERADE"
    ruleset, memory = narrow(chain(BROAD))
    _, memory = narrow(chain(other, *texts(ruleset.postrouting)), memory=memory)
    assert memory == Memory(P, ((BROAD, 1), (other, 1)))


def test_of_another_subnet_nothing_is_kept() -> None:
    _, memory = narrow(chain(BROAD), memory=Memory(OTHER_P, (("-j OLD", 3),)))
    assert memory == Memory(P, ((BROAD, 1),))


def test_a_narrowed_rule_becomes_what_it_was() -> None:
    for rules in (
        ("-j A", BROAD, "-j B"),
        (BROAD, BROAD, "-j B"),
        ("-s 172.7.21.0/24 ! -d 172.7.21.0/24 -j MASQUERADE", "-j B"),
        ("-s 172.7.21.0/24 -o eth1 -j SNAT --to-source 10.9.9.9", "-j A", BROAD),
        ('-s 172.7.21.0/24 -m comment --comment "by ops" -j MASQUERADE', "-j B"),
    ):
        for wanted in (wish(policy=egress("keep")), TWO):
            before = chain(*rules)
            now, memory = narrow(before, wanted)
            found = reverted(now, memory)
            if wanted is TWO:
                found = Ruleset(V4, NFT, tuple(r for r in found.postrouting if r.text != JUMP))
            assert texts(found.postrouting) == list(rules)
            assert found.own_chains == ()


def test_counters_go_to_the_first_copy() -> None:
    now, memory = narrow(listed(f"[7:420] -A POSTROUTING {BROAD}\n-A POSTROUTING {BROAD}"))
    found = reverted(now, memory)
    assert [rule.counters for rule in found.postrouting] == [Counters(7, 420), None]


def test_what_was_added_goes() -> None:
    now, memory = narrow(chain("-j A"))
    assert texts(now.postrouting) == ["-j A", OURS]
    assert texts(reverted(now, memory).postrouting) == ["-j A"]


def test_a_hand_made_rule_is_not_touched() -> None:
    now, memory = narrow(chain(BROAD, HAND_MADE))
    assert texts(now.postrouting) == [HAND_MADE]
    assert texts(reverted(now, memory).postrouting) == [HAND_MADE, BROAD]
    assert texts(reverted(now, None).postrouting) == [HAND_MADE]


def test_without_a_memory_ours_becomes_the_broad_rule_of_its_shape() -> None:
    now, _ = narrow(listed(f"-A POSTROUTING -j A\n[7:420] -A POSTROUTING {BROAD}"))
    found = reverted(now, None)
    assert texts(found.postrouting) == ["-j A", BROAD]
    assert found.postrouting[1].counters == Counters(7, 420)


def test_without_a_memory_a_chain_of_ours_becomes_the_broad_rule_too() -> None:
    now, _ = narrow(chain("-j A", f"-s 172.7.21.0/24 -o eth0 -j {SNAT}", BROAD), TWO)
    found = reverted(now, None)
    assert texts(found.postrouting) == ["-j A", f"-s 172.7.21.0/24 -o eth0 -j {SNAT}", BROAD]
    assert found.own_chains == ()


def test_a_chain_that_somebody_else_uses_stays() -> None:
    theirs = "-s 10.1.1.0/24 -j SNATD-POSTROUTING"
    now, memory = narrow(chain("-j A", BROAD), TWO)
    found = reverted(replace(now, postrouting=(*now.postrouting, Rule(theirs))), memory)
    assert texts(found.postrouting) == ["-j A", BROAD, theirs]
    assert found.own_chains == now.own_chains


def test_a_target_comes_back_from_the_rule_that_took_it() -> None:
    broad = f"-s 172.7.21.0/24 -j {SNAT}"
    for wanted in (wish(), TWO):
        now, memory = narrow(chain(broad), wanted)
        (edit, *_) = (e for e in revert(now, [memory], P).edits if e.chain == POSTROUTING)
        (rule,) = edit.added
        assert rule.text == broad
        assert rule.like is not None
        name, text = rule.like
        assert text in texts(now.chain(name) or ())
        assert SNAT in text


def test_what_ours_stood_for_comes_back_although_ours_was_deleted() -> None:
    _, memory = narrow(chain("-j A", BROAD, "-j B"))
    assert texts(reverted(chain("-j A", "-j B"), memory).postrouting) == ["-j A", "-j B", BROAD]


def test_what_a_boot_or_a_flush_took_comes_back_only_in_our_place() -> None:
    odd = "-s 172.7.21.0/24 -j MASQUERADE"
    _, memory = narrow(chain(BROAD, odd))
    assert texts(reverted(chain("-j A", OURS), memory).postrouting) == ["-j A", BROAD, odd]
    after, added = narrow(chain("-j A"))
    assert texts(after.postrouting) == ["-j A", OURS]
    (transaction,) = plans(wish(), chain("-j A"))
    memory = lapsed(memory, transaction)
    assert added.gone == frozenset()
    assert texts(reverted(after, memory).postrouting) == ["-j A", BROAD]
    # Who wrote it again since would miss it.
    _, memory = narrow(chain(odd, OURS), memory=memory)
    assert texts(reverted(after, memory).postrouting) == ["-j A", BROAD, odd]


def test_what_a_rival_leaves_in_between_does_not_count() -> None:
    after, memory = narrow(chain(BROAD))
    for _ in range(3):
        after, memory = narrow(chain(BROAD, BROAD, BROAD, *texts(after.postrouting)), memory=memory)
    assert texts(reverted(after, memory).postrouting) == [BROAD]


def test_where_all_rules_are_gone_nothing_comes_back() -> None:
    _, memory = narrow(chain(BROAD))
    assert texts(reverted(chain(), memory).postrouting) == []


def test_what_is_back_already_is_not_put_back_again() -> None:
    _, memory = narrow(chain(BROAD, "-j A"))
    assert texts(reverted(chain(BROAD, OURS, "-j A"), memory).postrouting) == [BROAD, "-j A"]
    assert texts(reverted(chain(BROAD, "-j A"), memory).postrouting) == [BROAD, "-j A"]


def test_what_is_back_behind_ours_is_not_put_back_again() -> None:
    _, memory = narrow(chain(BROAD, "-j A"))
    found = texts(reverted(chain(OURS, "-j A", BROAD), memory).postrouting)
    assert found.count(BROAD) == 1
    assert OURS not in found


def test_a_memory_of_another_subnet_is_not_replayed() -> None:
    old = "-s 172.7.9.0/24 ! -o docker0 -j MASQUERADE"
    memory = Memory(OTHER_P, ((old, 1),))
    stale = OURS.replace("172.7.21.0", "172.7.9.0")
    assert texts(reverted(chain("-j A", stale), memory).postrouting) == ["-j A"]


def test_a_memory_of_another_subnet_does_not_take_todays_egress_away() -> None:
    # The lease changed while state_dir could not be written.
    memory = Memory(OTHER_P, (("-s 172.7.9.0/24 ! -o docker0 -j MASQUERADE", 1),))
    assert texts(reverted(chain("-j A", OURS), memory).postrouting) == ["-j A", BROAD]


def test_going_back_to_an_earlier_subnet_its_memory_is_still_there() -> None:
    memories = (Memory(P, ((BROAD, 1),)), Memory(OTHER_P))
    found = revert(chain("-j A", OURS), memories, P)
    assert texts(applied(chain("-j A", OURS), found).postrouting) == ["-j A", BROAD]


def test_a_guess_is_called_a_guess() -> None:
    (known_reason,) = revert(chain(OURS), [Memory(P, ((BROAD, 1),))], P).reasons
    (guessed,) = revert(chain(OURS), (), P).reasons
    assert "what was there before snatd" in known_reason.why
    assert "not remembered" in guessed.why


def test_of_two_copies_one_of_which_is_back_the_other_comes_back() -> None:
    _, memory = narrow(chain(BROAD, BROAD, "-j A"))
    found = texts(reverted(chain(BROAD, OURS, "-j A"), memory).postrouting)
    assert found.count(BROAD) == 2


def test_an_unknown_lease_replays_the_memory() -> None:
    now, memory = narrow(chain("-j A", BROAD))
    assert texts(reverted(now, memory, None).postrouting) == ["-j A", BROAD]


def test_foreign_rules_stay_as_they_are() -> None:
    odd = ('-o a"b -j MASQUERADE', '-m comment --comment "two\nlines" -j RETURN', "-j A", "-j A")
    now, memory = narrow(chain(*odd[:2], BROAD, *odd[2:]))
    for kept in (memory, None):
        assert texts(reverted(now, kept).postrouting) == [*odd[:2], BROAD, *odd[2:]]


def test_where_nothing_is_ours_nothing_is_done() -> None:
    assert revert(chain("-j A", BROAD), (), P).edits == ()
    assert revert(chain("-j A", BROAD), [Memory(P, ((BROAD, 1),))], P).edits == ()


def test_a_chain_of_ours_without_a_jump_goes() -> None:
    leftover = listed("-A POSTROUTING -j A\n-A SNATD-POSTROUTING -j MASQUERADE")
    for memory in (None, Memory(P)):
        found = reverted(leftover, memory)
        assert (texts(found.postrouting), found.own_chains) == (["-j A"], ())
