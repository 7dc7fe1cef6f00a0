"""Fault 33: mutations by three rivals at once, and the promises at each step.

SOAK_MUTATIONS says how many (default: 100,000; with SOAK=1 500,000), SOAK_SEED where to begin.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from snatd.core.model import Backend, Family
from tests.lab.netns import until
from tests.soak import deeds
from tests.soak.deeds import IPTABLES, NFT, ON_THE_GUARD, Op, do
from tests.soak.report import Size, growth, table
from tests.soak.rounds import investigated, make_round, play
from tests.soak.world import KEYS, NETWORKS, World

LONG = bool(os.environ.get("SOAK"))
MUTATIONS = int(os.environ.get("SOAK_MUTATIONS", "500000" if LONG else "100000"))
SEED = os.environ.get("SOAK_SEED") or (str(random.randrange(10**6)) if LONG else "33")
_A_ROUND, _TOLD_EACH = 400, 25
_SHORTENING_S = 600.0 if LONG else 120.0


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    # Each of four threads waits for a packet most of the time, and should not wait for another's.
    switching_s = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    world = World(tmp_path)
    try:
        yield world
    finally:
        sys.setswitchinterval(switching_s)
        world.close()


def test_fault_33_three_rivals_at_once_break_no_promise(world: World) -> None:
    began_s = time.monotonic()
    sizes: list[Size] = []
    number = 0
    while world.tally["mutations"] < MUTATIONS:
        # Of each round's own seed, so that it can be played alone.
        one = f"{SEED}-{number}"
        of = make_round(one, min(_A_ROUND, MUTATIONS - world.tally["mutations"]))
        try:
            play(world, of)
        except Exception as error:
            print(table(SEED, time.monotonic() - began_s, world.tally, sizes))
            pytest.fail(str(investigated(world, one, of, error, _SHORTENING_S)), pytrace=False)
        sizes.append(_at_rest(world))
        number += 1
        if number % _TOLD_EACH == 0:
            took_s = time.monotonic() - began_s
            print(
                f"{world.tally['mutations']} of {MUTATIONS} mutations, {took_s:.0f} s", flush=True
            )
    status = world.status()
    world.tally["repairs"], world.tally["passes"] = status["repairs"], status["passes"]
    world.stop()
    print(table(SEED, time.monotonic() - began_s, world.tally, sizes))
    assert not growth(sizes)


def _at_rest(world: World) -> Size:
    """Without children, which look at connections and run its tools. One may begin between two
    of the questions, and its pipes before it is seen: so all is asked twice."""

    def size() -> Size:
        return Size(world.memory_kib(), world.descriptors(), world.children())

    def rests() -> Size | None:
        one = size()
        return one if one.children == 0 and one == size() else None

    found: Size = until(rests, "a daemon at rest, without children")
    return found


@settings(
    max_examples=40 if LONG else 8,
    stateful_step_count=20,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
class Rivals(RuleBasedStateMachine):
    """One mutation after the other, all that must hold after each, and the shortest that fails."""

    world: World
    held = bridged = False

    @initialize()
    def begin(self) -> None:
        self.world.reset()
        self.held, self.bridged = False, True

    @rule(
        backend=st.sampled_from((Backend.NFT, Backend.LEGACY)),
        what=st.sampled_from(sorted(IPTABLES)),
        a=st.integers(0, 9999),
        b=st.integers(0, 999_999),
    )
    def iptables(self, backend: Backend, what: str, a: int, b: int) -> None:
        self._do(Op(f"iptables-{backend.value}", what, a, b))

    @rule(what=st.sampled_from(sorted(NFT)), a=st.integers(0, 9999), b=st.integers(0, 999_999))
    def nft(self, what: str, a: int, b: int) -> None:
        # Nobody makes the guard again, nor looks at anything, while there is no lease.
        if not (self.held and (what in ON_THE_GUARD or what == "in_nat")):
            self._do(Op("nft", what, a, b))

    @precondition(lambda self: not self.held)
    @rule(number=st.integers(0, len(NETWORKS) - 1))
    def network(self, number: int) -> None:
        self._do(Op("node", "network", number))

    @precondition(lambda self: not self.held)
    @rule()
    def move_lease(self) -> None:
        deeds.move_lease(self.world)
        self.world.settle()

    @precondition(lambda self: not self.held)
    @rule(name=st.sampled_from(("docker0", "cni0", "br-0123456789ab")))
    def rename_bridge(self, name: str) -> None:
        self.world.bridge(name)

    @precondition(lambda self: not self.held)
    @rule(way=st.integers(0, len(deeds.BROKEN) + 2))
    def break_lease(self, way: int) -> None:
        deeds.break_lease(self.world, way)
        deeds.freeze(self.world)
        self.held = True

    @precondition(lambda self: not self.held)
    @rule(way=st.integers(0, 1))
    def take_bridge(self, way: int) -> None:
        self.world.bridge("docker0")
        deeds.take_bridge(self.world, way)
        deeds.freeze(self.world)
        self.held, self.bridged = True, False

    @precondition(lambda self: self.held)
    @rule()
    def mend(self) -> None:
        deeds.thaw(self.world)
        deeds.mend_lease(self.world)
        self.world.bridge("docker0")
        self.held, self.bridged = False, True

    @invariant()
    def promises(self) -> None:
        with self._told():
            self._promises()

    def _do(self, op: Op) -> None:
        with self._told():
            do(self.world, op)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # If it does not fail again, hypothesis says only that.
            print(f"{type(error).__name__}: {error}", *self.world.trace, sep="\n    ")
            raise

    def _promises(self) -> None:
        with self.world.node.container.entered():
            for family in Family if self.bridged else ():
                self.world.cluster_is_right(family)
        if self.held:
            for key in KEYS:
                self.world.foreign_is_right(key)
            self.world.natives_are_right()
        else:
            self.world.settle()
            self.world.all_is_right()

    def teardown(self) -> None:
        self.world.stop()


def test_fault_33_one_after_the_other(world: World) -> None:
    Rivals.world = world
    run_state_machine_as_test(seed(int(SEED))(Rivals))
    print(table(SEED, 0, world.tally, ()))
