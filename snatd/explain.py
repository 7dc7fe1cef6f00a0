"""`snatd explain`: asks this node's kernel what becomes of a packet, and tells it in words or JSON.

Writes nothing. The decision itself is `core.trace`.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from snatd.core.errors import Unanswerable
from snatd.core.masquerade import masquerade_addresses
from snatd.core.model import Address, Family, join
from snatd.core.packet import Mark, Packet, address_types
from snatd.core.trace import GUARD_TABLE, Answer, Place, Taken, Trace, trace
from snatd.core.writers import said, writer
from snatd.kernel.hooks import Hooks
from snatd.kernel.links import find_route, read_sources

# Lines of one hook's way that anybody would read.
_MOST_LINES = 200
_ASKS_PORTS = re.compile(r"-p |port|l4proto|\b(tcp|udp|sctp)\b")


@dataclass(frozen=True)
class Question:
    """A new connection's first packet, behind DNAT. None: not known, the port and the like; of
    `out`: by the route. `own`: sent by the node itself, whosever source it has."""

    source: Address
    destination: Address
    out: str | None = None
    mark: int = 0
    protocol: int | None = None
    sport: int | None = None
    dport: int | None = None
    own: bool = False


@dataclass(frozen=True)
class Explanation:
    question: Question
    out: str
    next_hop: Address | None
    hooks: Hooks
    trace: Trace


def explain(question: Question, read: Callable[[Family], Hooks]) -> Explanation:
    """Raises Unanswerable where there is no such packet, BackendError where rules (by `read`) or
    routes cannot be read."""
    if question.source.version != question.destination.version:
        raise Unanswerable(f"{question.source} and {question.destination} are of two families")
    family = Family.V4 if question.source.version == 4 else Family.V6
    came_in, out, next_hop = _way(question)
    hooks = read(family)
    carried, local, broadcast = read_sources(family)
    packet = Packet(
        family=family,
        source=((int(question.source), int(question.source)),),
        destination=((int(question.destination), int(question.destination)),),
        out=out,
        came_in=came_in,
        mark=Mark(question.mark),
        protocol=question.protocol,
        sport=question.sport,
        dport=question.dport,
        types=address_types(family, local, broadcast),
    )
    masquerade = masquerade_addresses(family, out, question.destination, next_hop, carried)
    traced = trace(hooks.hooks, packet, masquerade)
    if hooks.unread:
        anything = Answer(None, None, why=hooks.unread)
        traced = replace(traced, answers=(*traced.answers, anything))
    return Explanation(question, out, next_hop, hooks, traced)


def _way(question: Question) -> tuple[str | None, str, Address | None]:
    """By which device the packet comes in (none: "", it is the node's own; None: not known), by
    which it leaves, and to which next hop."""
    source, destination, out = question.source, question.destination, question.out
    if out is not None:
        try:
            socket.if_nametoindex(out)
        except OSError:
            raise Unanswerable(f"{out}: no such device") from None
    back = find_route(source)
    came_in = None if back is None else "" if back.local else back.device
    if question.own:
        came_in = ""
    if out is not None:
        route = find_route(destination, out=out, mark=question.mark)
        return came_in, out, route.next_hop if route else None
    asked = {"source": source, "came_in": came_in} if came_in is not None else {}
    # Without forwarding the kernel refuses to say where it would forward to.
    route = find_route(destination, mark=question.mark, **asked) or find_route(  # type: ignore[arg-type]
        destination, mark=question.mark
    )
    if route is None:
        raise Unanswerable(f"no route to {destination}: give the device by --out")
    if route.local and came_in != "":
        raise Unanswerable(f"{destination} is this node's own: nothing passes POSTROUTING to it")
    return came_in, route.device, route.next_hop


def lines(told: Explanation) -> Iterator[str]:
    """For a person; the last line is the answer."""
    question = told.question
    by = f", next hop {told.next_hop}" if told.next_hop not in (None, question.destination) else ""
    yield f"{question.source} to {question.destination} by {told.out}{by}, mark {question.mark:#x}"
    asked = {id(hook): way for hook, way in told.trace.ways}
    for hook in sorted(told.hooks.hooks, key=lambda one: one.priority):
        way = asked.get(id(hook))
        note = ": not asked, the source is bound" if way is None else "" if way else ": no rule"
        yield f"{hook.table} {hook.chain}, priority {hook.priority}{note}"
        for depth, taken in islice(_flat(way or ()), _MOST_LINES):
            place = taken.place
            who = said(place.table, place.chain, place.step.text)
            by = f" ({who})" if who else ""
            may = f"  [only if: {taken.undecided}]" if taken.undecided else ""
            head = f"{'  ' * depth}{place.chain} {place.step.number}{by}: "
            yield f"  {head}{place.step.text}{may}"
    yield from (f"note: {one}" for one in told.hooks.unread)
    unsaid = None in (question.protocol, question.dport)
    if unsaid and any(_ASKS_PORTS.search(why) for why in told.trace.undecided):
        yield "note: --proto and --dport were not given; a rule that asks for them may decide"
    yield conclusion(told)


def _flat(way: tuple[Taken, ...], depth: int = 0) -> Iterator[tuple[int, Taken]]:
    for one in way:
        yield depth, one
        yield from _flat(one.inner, depth + 1)


def conclusion(told: Explanation) -> str:
    """The answer in one line."""
    other, certain = told.question.destination, told.trace.answer
    if certain is None:
        some = dict.fromkeys(_seen(one) for one in told.trace.answers)
        why = [one if one.startswith("which ") else f"`{one}`" for one in told.trace.undecided]
        depends = f": depends on {join(why)}" if why else ""
        return f"{other} may see {' or '.join(some)}{depends}"
    by = _by(certain.place) if certain.place else "no rule changes it"
    if certain.dropped:
        return f"{other} sees nothing: dropped ({by})"
    return f"{other} sees {_seen(certain)} ({by})"


def _seen(answer: Answer) -> str:
    if answer.dropped:
        return "nothing"
    if answer.sources is None:
        return "another address"
    return " or ".join(map(str, answer.sources))


def _by(place: Place) -> str:
    who = said(place.table, place.chain, place.step.text)
    if place.table.endswith(f" {GUARD_TABLE}"):
        return "guard"
    return f"{who}, {place}" if who else str(place)


def document(told: Explanation) -> dict[str, Any]:
    """`source` and `kept` are null for "may": then `may` has all that may be seen."""
    question, certain = told.question, told.trace.answer
    asked = {id(hook): way for hook, way in told.trace.ways}
    return {
        **(_answer(certain) if certain else {"source": None, "kept": None, "dropped": None}),
        "decided_by": _place(certain.place) if certain else None,
        "undecided": list(told.trace.undecided),
        "may": []
        if certain
        else [
            {**_answer(one), "decided_by": _place(one.place), "depends_on": list(one.why)}
            for one in told.trace.answers
        ],
        "from": str(question.source),
        "to": str(question.destination),
        "out": told.out,
        "next_hop": str(told.next_hop) if told.next_hop else None,
        "mark": question.mark,
        "path": [
            {
                "table": hook.table,
                "chain": hook.chain,
                "priority": hook.priority,
                "asked": id(hook) in asked,
                "rules": [
                    {
                        **(_place(taken.place) or {}),
                        "depth": depth,
                        "undecided": taken.undecided or None,
                    }
                    for depth, taken in islice(_flat(asked.get(id(hook), ())), _MOST_LINES)
                ],
            }
            for hook in sorted(told.hooks.hooks, key=lambda one: one.priority)
        ],
        "unread": list(told.hooks.unread),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    one = answer.sources[0] if answer.sources and len(answer.sources) == 1 else None
    return {"source": str(one) if one else None, "kept": answer.kept, "dropped": answer.dropped}


def _place(place: Place | None) -> dict[str, Any] | None:
    if place is None:
        return None
    return {
        "table": place.table,
        "chain": place.chain,
        "rule": place.step.number,
        "text": place.step.text,
        "writer": writer(place.table, place.chain, place.step.text),
    }
