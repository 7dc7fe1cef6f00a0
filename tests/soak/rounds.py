"""A soak: rounds of mutations by three rivals at once, from a seed; and the shortest that fails.

In every round each mutation is followed by a connection into the cluster, which must keep its
address. A round's mood says what else the rivals may do, and so what is checked at each step.
"""

from __future__ import annotations

import enum
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from snatd.core.model import Family
from tests.soak import deeds
from tests.soak.deeds import IPTABLES, NFT, ON_THE_GUARD, ROUGH, Op, do
from tests.soak.world import World

RIVALS = ("iptables-nft", "iptables-legacy", "nft")


class Mood(enum.Enum):
    """GENTLE: nobody takes away a rule of snatd's or the egress, so egress too is checked at each
    step; flannel's network changes meanwhile. ROUGH: rules of snatd's are deleted, moved, copied,
    flushed. GUARD: the guard too; only then is a connection excused until a pass is over.
    MOVED: another subnet was leased before. RENAMED: the bridge has another name.
    NO_LEASE, NO_BRIDGE: subnet.env is broken or the bridge gone, and nothing may be touched.
    """

    GENTLE = "gentle"
    ROUGH = "rough"
    GUARD = "on the guard"
    MOVED = "lease moved"
    RENAMED = "bridge renamed"
    NO_LEASE = "no lease"
    NO_BRIDGE = "no bridge"


_MOODS = (
    *[Mood.GENTLE] * 7,
    *[Mood.ROUGH] * 6,
    *[Mood.GUARD] * 3,
    *(Mood.MOVED, Mood.MOVED, Mood.RENAMED, Mood.NO_LEASE, Mood.NO_LEASE, Mood.NO_BRIDGE),
)
# What happens often beside what is listed once.
_OFTEN = ("add", "insert", "delete", "move", "broad", "add", "insert", "delete", "replace")


@dataclass(frozen=True)
class Round:
    """`way` chooses how the lease is broken or the bridge taken away."""

    mood: Mood
    way: int
    ops: tuple[Op, ...]


def make_round(seed: str, mutations: int) -> Round:
    chance = random.Random(seed)
    mood = chance.choice(_MOODS)
    ops = [_make_op(chance, mood) for _ in range(mutations)]
    return Round(mood, chance.randrange(1000), tuple(ops))


def _make_op(chance: random.Random, mood: Mood) -> Op:
    who = chance.choice(RIVALS)
    if mood is Mood.GENTLE and chance.random() < 0.01:
        return Op("node", "network", chance.randrange(4))
    what = chance.choice(nft_words(mood) if who == "nft" else iptables_words(mood))
    return Op(who, what, chance.randrange(10_000), chance.randrange(1_000_000))


def iptables_words(mood: Mood) -> tuple[str, ...]:
    gentle = tuple(one for one in IPTABLES if one not in ROUGH)
    return (*_OFTEN * 3, *gentle, *(() if mood is Mood.GENTLE else ROUGH))


def nft_words(mood: Mood) -> tuple[str, ...]:
    gentle = tuple(one for one in NFT if one not in ON_THE_GUARD)
    held = mood in (Mood.NO_LEASE, Mood.NO_BRIDGE)
    some = tuple(one for one in gentle if not (held and one == "in_nat"))
    often = ("add", "delete", "move") * 8
    return (*often, *some, *(ON_THE_GUARD if mood is Mood.GUARD else ()))


def play(world: World, of: Round) -> None:
    """A round, from the mood's beginning to its end. Raises Violation."""
    world.tally[f"rounds {of.mood.value}"] += 1
    _begin(world, of)
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=_mutate, args=(world, of.mood, some, errors))
        for who in RIVALS
        if (some := [op for op in of.ops if op.who == who or (op.who, who) == ("node", "nft")])
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if errors:
        raise errors[0]
    _end(world, of)
    world.settle()
    world.all_is_right()


def _begin(world: World, of: Round) -> None:
    match of.mood:
        case Mood.MOVED:
            deeds.move_lease(world)
            world.settle()
            world.all_is_right()
        case Mood.RENAMED:
            world.bridge(("docker0", "cni0", "br-0123456789ab")[of.way % 3])
        case Mood.NO_LEASE:
            deeds.break_lease(world, of.way)
            deeds.freeze(world)
        case Mood.NO_BRIDGE:
            world.bridge("docker0")
            deeds.take_bridge(world, of.way)
            deeds.freeze(world)


def _end(world: World, of: Round) -> None:
    if of.mood in (Mood.NO_LEASE, Mood.NO_BRIDGE):
        deeds.thaw(world)
    if of.mood is Mood.NO_LEASE:
        deeds.mend_lease(world)
    if of.mood is Mood.NO_BRIDGE:
        world.bridge("docker0")


def _mutate(world: World, mood: Mood, ops: Sequence[Op], errors: list[BaseException]) -> None:
    try:
        with ExitStack() as stack:
            stack.enter_context(world.node.container.entered())
            for number, op in enumerate(ops):
                if errors:
                    return
                do(world, op)
                if mood is not Mood.NO_BRIDGE:
                    check(world, mood, number)
    except BaseException as error:
        errors.append(error)


def check(world: World, mood: Mood, number: int) -> None:
    """What must hold right after each mutation, without waiting for anything."""
    family = tuple(Family)[number % 2]
    world.cluster_is_right(family)
    if mood is Mood.GENTLE:
        world.egress_is_right(family, lan=number % 4 == 0)


Fails = Callable[[Sequence[Op]], bool]


def shortened(ops: Sequence[Op], fails: Fails, end_s: float) -> tuple[Op, ...]:
    """A part of a sequence that still fails, without what it fails without as well (Zeller's
    ddmin), as far as one gets by a time of the monotonic clock."""
    parts = 2
    while len(ops) > 1 and time.monotonic() < end_s:
        size = -(-len(ops) // parts)
        for start in range(0, len(ops), size):
            rest = (*ops[:start], *ops[start + size :])
            if time.monotonic() < end_s and fails(rest):
                ops, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(ops), parts * 2)
    return tuple(ops)


@dataclass(frozen=True)
class Failure:
    """What is told of a failed soak: enough to see it again."""

    seed: str
    error: BaseException
    of: Round
    ops: tuple[Op, ...]
    trace: tuple[str, ...]
    alone: bool

    def __str__(self) -> str:
        again = "alone, on a new node" if self.alone else "only after the rounds before it"
        lines = [
            f"seed {self.seed}, a round {self.of.mood.value!r} of {len(self.of.ops)} mutations",
            f"{type(self.error).__name__}: {self.error}",
            f"it fails {again}; shortened to {len(self.ops)} mutations, way {self.of.way}:",
            *(f"    {op}" for op in self.ops),
            "the last that was done:",
            *(f"    {line}" for line in self.trace[-40:]),
        ]
        return "\n".join(lines)


def investigated(
    world: World, seed: str, of: Round, error: BaseException, budget_s: float
) -> Failure:
    """Whether a failed round fails on a new node, and the least of it that does."""
    trace = tuple(world.trace)
    end_s = time.monotonic() + budget_s

    def fails(ops: Sequence[Op]) -> bool:
        try:
            world.reset()
            play(world, Round(of.mood, of.way, tuple(ops)))
        except Exception:
            return True
        return False

    alone = any(fails(of.ops) for _ in range(3))
    ops = shortened(of.ops, fails, end_s) if alone else of.ops
    return Failure(seed, error, of, ops, trace, alone)
