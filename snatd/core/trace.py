"""Who would SNAT this packet, or drop it? Walks base chains as the kernel does.

The first binding wins, one to the own address too; accept and return end only their base chain.
Where a test cannot be decided both ways are followed, as sets of marks and not as a tree, so a
chain of n rules costs n. Decides nothing about what should be; reads nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, permutations

from snatd.core.desired import Desired
from snatd.core.model import Address, Network, join
from snatd.core.networks import network, subtract
from snatd.core.packet import (
    ALL_BITS,
    LOSE_MARK,
    Action,
    Check,
    Hook,
    Jump,
    Keep,
    Mark,
    Packet,
    Ranges,
    Rewrite,
    SetMark,
    Snat,
    Step,
    Unknown,
    Verdict,
    addresses,
    holds,
    merge,
    rewritten,
)

# More different marks than this at one place become one mark with unknown bits.
_MOST_MARKS = 16
# Reasons on one way; base chains of one priority whose every order is tried.
_MOST_REASONS, _MOST_ORDERED = 4, 4
# nft refuses more than 16 jumps into each other; legacy chains may lie deeper.
_DEEPEST = 64

# In the order in which a packet meets them.
_HOOKS = ("prerouting", "input", "forward", "postrouting")

Why = tuple[str, ...]
GUARD_TABLE, GUARD_PRIORITY = "snatd", -199


@dataclass(frozen=True)
class Place:
    """A rule and where it stands."""

    table: str
    chain: str
    step: Step

    def __str__(self) -> str:
        """Without the rule's text."""
        which = f"rule {self.step.number}" if self.step.number else self.step.text
        return f"{self.table} {self.chain} {which}"


@dataclass(frozen=True)
class Taken:
    """A rule on the way; `undecided`: the match because of which only perhaps."""

    place: Place
    undecided: str = ""
    inner: tuple[Taken, ...] = ()


class End(enum.Enum):
    BACK = "back"
    ACCEPT = "accept"
    DROP = "drop"
    BOUND = "bound"


@dataclass(frozen=True)
class _Outcome:
    """How a chain was left. `rewrite` and `place`: of a binding."""

    end: End
    mark: Mark
    place: Place | None = None
    rewrite: Rewrite | None = None


@dataclass(frozen=True)
class Answer:
    """What may become of the packet. `sources`: all that it may be, None for any; one is certain.
    `place`: the rule that binds, None where none does. `why`: the matches that it depends on."""

    sources: tuple[Address, ...] | None
    kept: bool | None
    dropped: bool = False
    place: Place | None = None
    why: Why = ()

    @property
    def same(self) -> object:
        return (self.sources, self.kept, self.dropped)


@dataclass(frozen=True)
class Trace:
    """All that may become of a packet, and its way through each hook in order."""

    answers: tuple[Answer, ...]
    ways: tuple[tuple[Hook, tuple[Taken, ...]], ...] = ()

    @property
    def answer(self) -> Answer | None:
        """What certainly becomes of it; None for "may"."""
        first = self.answers[0]
        certain = all(one.same == first.same for one in self.answers)
        exact = first.dropped or (first.sources is not None and len(first.sources) == 1)
        return first if certain and (exact or first.kept) else None

    @property
    def undecided(self) -> Why:
        return tuple(dict.fromkeys(why for one in self.answers for why in one.why))


def trace(
    hooks: Sequence[Hook], packet: Packet, masquerade: tuple[Address, ...] | None = None
) -> Trace:
    """What becomes of a packet's source. `masquerade`: what MASQUERADE may choose, () if nothing
    (the kernel then drops), None if that is not known."""
    walks = {id(hook): _Walk(hook, packet) for hook in hooks}
    live: dict[Mark, Why] = {packet.mark: ()}
    ended: dict[_Outcome, Why] = {}
    ways: list[tuple[Hook, tuple[Taken, ...]]] = []
    for _, same in groupby(sorted(hooks, key=_priority), key=_priority):
        if not live:
            break
        group = list(same)
        live, done, seen = _through_any_order(group, walks, live, packet, masquerade)
        ways += seen
        for outcome, why in done.items():
            ended.setdefault(outcome, why)
    for mark, why in live.items():
        ended.setdefault(_Outcome(End.ACCEPT, mark), why)
    answers = dict.fromkeys(_answer(one, why, packet, masquerade) for one, why in ended.items())
    return Trace(tuple(answers), tuple(ways))


def _priority(hook: Hook) -> tuple[int, int]:
    return _HOOKS.index(hook.hook), hook.priority


_Ended = dict[_Outcome, Why]
_Ways = list[tuple[Hook, tuple[Taken, ...]]]


def _through_any_order(
    group: list[Hook],
    walks: dict[int, _Walk],
    live: dict[Mark, Why],
    packet: Packet,
    masquerade: tuple[Address, ...] | None,
) -> tuple[dict[Mark, Why], _Ended, _Ways]:
    """Of equal priorities the kernel asks the one first that was registered last, and that cannot
    be seen. So every order is tried of those that do anything."""
    busy = _busy(group, walks, set(live))
    tried = busy[:_MOST_ORDERED]
    orders = [_through(order, walks, live) for order in permutations(tried)]
    marks, ended, ways = orders[0]
    results = {
        (frozenset(left), frozenset(_answer(one, (), packet, masquerade).same for one in done))
        for left, done, _ in orders
    }
    if len(results) > 1 or tried != busy:
        names = join([f"{one.table} {one.chain}" for one in busy])
        why = (f"which at priority {busy[0].priority} is asked first of {names}",)
        marks = {mark: _and(before, why) for left, _, _ in orders for mark, before in left.items()}
        ended = {one: _and(before, why) for _, done, _ in orders for one, before in done.items()}
        ways = list(
            {id(way[0]): way for *_, several in orders for way in reversed(several)}.values()
        )
        if tried != busy:
            nobody = Place("", "", Step(0, why[0], ()))
            anything = _anything(nobody, packet.mark)
            marks |= {one.mark: why for one in anything if one.end is End.BACK}
            ended |= {one: why for one in anything if one.end in (End.DROP, End.BOUND)}
    idle = [hook for hook in group if hook not in busy]
    first = next(iter(live))
    return (
        marks,
        ended,
        [*ways, *((one, walks[id(one)].effect(one.chain, first).taken) for one in idle)],
    )


def _busy(group: list[Hook], walks: dict[int, _Walk], marks: set[Mark]) -> list[Hook]:
    """The hooks that do anything: with the marks of now, or with one that another may set."""
    while True:
        busy = [one for one in group if not all(walks[id(one)].is_idle(mark) for mark in marks)]
        more = {
            outcome.mark
            for hook in busy
            for mark in marks
            for outcome in walks[id(hook)].effect(hook.chain, mark).outcomes
        }
        if more <= marks or len(group) == 1:
            return busy
        if len(marks) > _MOST_MARKS:
            return group
        marks |= more


def _through(
    order: Sequence[Hook], walks: dict[int, _Walk], live: dict[Mark, Why]
) -> tuple[dict[Mark, Why], _Ended, _Ways]:
    ended: _Ended = {}
    ways: _Ways = []
    for hook in order:
        after: dict[Mark, Why] = {}
        taken: dict[int, Taken] = {}
        for mark, why in live.items():
            effect = walks[id(hook)].effect(hook.chain, mark)
            for one in effect.taken:
                taken.setdefault(id(one.place.step), one)
            for outcome, more in effect.outcomes.items():
                if outcome.end is End.ACCEPT or (outcome.end is End.BACK and not hook.drops):
                    after.setdefault(outcome.mark, _and(why, more))
                elif outcome.end is End.BACK:
                    policy = Place(hook.table, hook.chain, Step(0, "policy drop", ()))
                    ended.setdefault(_Outcome(End.DROP, outcome.mark, policy), _and(why, more))
                else:
                    ended.setdefault(outcome, _and(why, more))
        ways.append((hook, tuple(taken.values())))
        live = after if len(after) <= _MOST_MARKS else _widened(after)
        if not live:
            break
    return live, ended, ways


def _answer(
    outcome: _Outcome, why: Why, packet: Packet, masquerade: tuple[Address, ...] | None
) -> Answer:
    source = packet.exact_source
    own = (source,) if source else None
    if outcome.end is End.DROP:
        return Answer((), None, True, outcome.place, why)
    if outcome.rewrite is None or isinstance(outcome.rewrite, Keep):
        return Answer(own, True, False, outcome.place, why)
    sources = rewritten(outcome.rewrite, packet, masquerade)
    if sources == ():
        return Answer((), None, True, outcome.place, why)
    kept = None if sources is None or (source in sources and len(sources) > 1) else sources == own
    return Answer(sources, kept, False, outcome.place, why)


@dataclass(frozen=True)
class _Effect:
    outcomes: dict[_Outcome, Why]
    taken: tuple[Taken, ...] = ()


@dataclass
class _Walk:
    """One packet through the chains of one hook. Each chain is walked once for each mark."""

    hook: Hook
    packet: Packet
    known: dict[tuple[str, Mark], _Effect] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def is_idle(self, mark: Mark) -> bool:
        """Whether nothing comes of it: no binding, no drop, no other mark."""
        quiet = {End.ACCEPT} if self.hook.drops else {End.ACCEPT, End.BACK}
        outcomes = self.effect(self.hook.chain, mark).outcomes
        return all(one.end in quiet and one.mark == mark for one in outcomes)

    def effect(self, chain: str, mark: Mark) -> _Effect:
        key = (chain, mark)
        if key not in self.known:
            # The kernel has no loops; a table that changed while it was read may seem to.
            deep = len(self.open) > _DEEPEST or chain in self.open
            if deep or chain not in self.hook.chains:
                unread = f"chain {chain}, which could not be read"
                return _Effect(_anything(Place(self.hook.table, chain, Step(0, unread, ())), mark))
            self.open.append(chain)
            self.known[key] = self._walked(chain, mark)
            self.open.pop()
        return self.known[key]

    def _walked(self, chain: str, mark: Mark) -> _Effect:
        live: dict[Mark, Why] = {mark: ()}
        outcomes: dict[_Outcome, Why] = {}
        taken: list[Taken] = []
        for step in self.hook.chains[chain]:
            live = self._step(Place(self.hook.table, chain, step), live, outcomes, taken)
            if not live:
                break
        for one, why in live.items():
            outcomes.setdefault(_Outcome(End.BACK, one), why)
        return _Effect(outcomes, tuple(taken))

    def _step(
        self,
        place: Place,
        live: dict[Mark, Why],
        outcomes: dict[_Outcome, Why],
        taken: list[Taken],
    ) -> dict[Mark, Why]:
        """The marks with which the next rule is reached; other ends are added to `outcomes`."""
        after: dict[Mark, Why] = {}
        undecided, acted = "", False
        inner: tuple[Taken, ...] = ()
        for part in place.step.parts:
            reached: dict[Mark, Why] = {}
            for mark, why in live.items():
                if isinstance(part, Check):
                    result = holds(part, self.packet, mark)
                    if result is not True:
                        after.setdefault(mark, why)
                    if result is None:
                        undecided = undecided or part.text
                    if result is not False:
                        reached.setdefault(mark, why if result else _and(why, (part.text,)))
                    continue
                acted = True
                if isinstance(part, Jump):
                    inner = self.effect(part.chain, mark).taken
                for outcome, more in self._act(part, place, mark).items():
                    if outcome.end is End.BACK and not _returns(part):
                        reached.setdefault(outcome.mark, _and(why, more))
                    else:
                        outcomes.setdefault(outcome, _and(why, more))
            live = reached
            if not live:
                break
        if acted:
            taken.append(Taken(place, undecided, inner))
        for mark, why in live.items():
            after.setdefault(mark, why)
        return after if len(after) <= _MOST_MARKS else _widened(after)

    def _act(self, action: Action, place: Place, mark: Mark) -> dict[_Outcome, Why]:
        match action:
            case Jump(chain):
                return self.effect(chain, mark).outcomes
            case Verdict.ACCEPT:
                return {_Outcome(End.ACCEPT, mark): ()}
            case Verdict.DROP:
                return {_Outcome(End.DROP, mark, place): ()}
            case Verdict.RETURN:
                return {_Outcome(End.BACK, mark): ()}
            case SetMark():
                return {_Outcome(End.BACK, action.of(mark)): ()}
            case Unknown():
                return _anything(place, mark)
            case rewrite:
                return {_Outcome(End.BOUND, mark, place, rewrite): ()}


def _returns(action: Action) -> bool:
    return action is Verdict.RETURN or (isinstance(action, Jump) and action.goto)


def _anything(place: Place, mark: Mark) -> dict[_Outcome, Why]:
    why = (place.step.text,)
    lost = LOSE_MARK.of(mark)
    return {
        _Outcome(End.BACK, lost): why,
        _Outcome(End.ACCEPT, lost): why,
        _Outcome(End.DROP, lost, place): why,
        _Outcome(End.BOUND, lost, place, Snat(None)): why,
    }


def _and(why: Why, more: Why) -> Why:
    return tuple(dict.fromkeys((*why, *more)))[:_MOST_REASONS] if more else why


def _widened(live: dict[Mark, Why]) -> dict[Mark, Why]:
    """One mark for many: the bits in which they differ are unknown."""
    first = next(iter(live))
    known = ALL_BITS
    for mark in live:
        known &= mark.known & ~(mark.value ^ first.value)
    whys = [why for why in live.values() if why]
    return {Mark(first.value & known, known): whys[0] if whys else ()}


def cluster_packets(
    wanted: Desired, marks: int, types: tuple[tuple[str, Ranges], ...] = ()
) -> tuple[Packet, ...]:
    """The classes that promise 1 is about: from our subnet into the networks and not into itself,
    without the marks that ask for masquerade. All else is unknown.

    One for each prefix: several rules may share the work, and of none of them alone would it be
    certain that it holds for all.
    """
    return tuple(
        Packet(
            family=wanted.family,
            source=addresses((wanted.subnet,)),
            destination=addresses((network,)),
            not_out=(wanted.bridge,) if isinstance(wanted.bridge, str) else (),
            mark=Mark(0, marks),
            types=types,
        )
        for network in subtract(wanted.networks, wanted.subnet)
    )


def inbound_packet(
    wanted: Desired,
    bridge: str,
    came_in: str,
    sources: Sequence[Network],
    own: Iterable[Address],
    types: tuple[tuple[str, Ranges], ...] = (),
) -> Packet:
    """What other nodes' containers, which are in `sources`, send to ours, without any mark. The
    guard leaves it alone, since promise 1 is about what ours send. `own`: the node's addresses."""
    ours: tuple[Network, ...] = (wanted.subnet,)
    for one in own:
        ours = subtract(ours, network(str(one)))
    return Packet(
        family=wanted.family,
        source=addresses(sources),
        destination=addresses(ours),
        out=bridge,
        came_in=came_in,
        mark=Mark(0, ALL_BITS),
        types=types,
    )


def rewriters(hooks: Sequence[Hook], packets: Sequence[Packet]) -> tuple[Answer, ...]:
    """What can rewrite the source of some classes of packets that differ in their destination: each
    rule with what it depends on; empty where no rule can."""
    if not packets:
        return ()
    together = merge(pair for one in packets for pair in one.destination)
    if not _rewriters(hooks, replace(packets[0], destination=together)):
        return ()  # which is so on most nodes, and one walk instead of many
    found = [answer for one in packets for answer in _rewriters(hooks, one)]
    return tuple({answer.place: answer for answer in reversed(found)}.values())[::-1]


def _rewriters(hooks: Sequence[Hook], packet: Packet) -> tuple[Answer, ...]:
    return tuple(one for one in trace(hooks, packet).answers if not (one.kept or one.dropped))


def before_guard(hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    """Other programs' nat chains that are asked before the guard, or may be."""
    return tuple(one for one in without_guard(hooks) if one.priority <= GUARD_PRIORITY)


def without_guard(hooks: Sequence[Hook]) -> tuple[Hook, ...]:
    return tuple(one for one in hooks if one.table.partition(" ")[2] != GUARD_TABLE)
