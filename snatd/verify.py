"""`snatd verify`: a datagram to each neighbour, and which source the kernel gave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

from snatd import explain
from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import BackendError, Unanswerable
from snatd.core.flows import FlowKey, concerns
from snatd.core.model import Address, Family, Hold, NodeState, join
from snatd.core.proof import (
    DISCARD,
    UDP,
    Probe,
    conclusion,
    exit_code,
    neighbours,
    unused_address,
)
from snatd.flows import read_leased
from snatd.kernel.hooks import Hooks, read_hooks
from snatd.kernel.tools import Tools
from snatd.report import EXIT_FAILING, Answer, probe_document

_LIMIT_S = 20.0
_ANSWER_S = 0.3
_NO_ENTRY = (
    "no entry: connection tracking is off (no nat rule needs it, and nothing is SNATed), "
    "or the packet is exempt from it (NOTRACK), or held in a queue"
)


Choice = Callable[[tuple[Address, ...]], Iterable[Address]]


def verify(settings: Config, destinations: Sequence[Address] = ()) -> Answer:
    """Probes the neighbours, or some destinations. Raises BackendError where the node cannot be
    read."""
    tools = Tools()
    node, leased, waiting = read_leased(settings, tools, _LIMIT_S)
    warnings, probes, problems = list(waiting), [], []
    for address in destinations:
        if all(address.version != one.family.version for one in leased):
            probes.append(Probe(address, False, why="nothing is leased in its family"))
    for one in leased:
        wanted = [address for address in destinations if address.version == one.family.version]
        if destinations and not wanted:
            continue
        try:
            made = probe(one, node, _these_or_all(wanted), _ANSWER_S)
        except BackendError as error:
            problems.append(f"{one.family.value}: {error}")
            continue
        if not made:
            warnings.append(
                f"{one.family.value}: no neighbour: no route of the main table leads into "
                f"{join(one.networks)} but to {one.subnet}: name an address to be probed"
            )
        probes += made
    deadline = Deadline(time.monotonic() + _LIMIT_S)
    read = cache(lambda family: read_hooks(family, tools, deadline))
    probes = [replace(one, why=one.why or doubt(one, read)) for one in probes]
    return Answer(
        {
            "probes": [probe_document(one) for one in probes],
            "waiting_for": list(waiting),
            "problems": problems,
        },
        (*probe_lines(probes), *conclusion(probes)),
        (*warnings, *problems),
        EXIT_FAILING if problems else exit_code(probes),
    )


def doubt(one: Probe, read: Callable[[Family], Hooks]) -> str:
    """What is wrong with an answer: it was SNATed, and by which rule; or it is not what the rules
    say. Empty where nothing is. About 5 ms; `read` gives the rules, or raises BackendError."""
    if one.sent_from is None or one.seen_as is None:
        return ""
    question = explain.Question(
        one.sent_from, one.destination, protocol=UDP, dport=DISCARD, own=True
    )
    try:
        told = explain.explain(question, read)
    except (BackendError, Unanswerable) as error:
        why = f"by which rule is not known: {error}"
        return "" if one.kept else f"{one.destination} sees {one.seen_as}: {why}"
    said, answer = explain.conclusion(told), told.trace.answer
    if answer is not None and answer.sources != (one.seen_as,):
        return (
            f"a datagram from {one.sent_from} to {one.destination} left as {one.seen_as}, but by "
            f"the rules {said}: snatd does not understand this node, please report it"
        )
    if one.kept:
        return ""
    return said if answer else f"{one.destination} sees {one.seen_as}: by the rules {said}"


def _these_or_all(wanted: Sequence[Address]) -> Choice:
    return lambda found: wanted or found


def probe(
    desired: Desired,
    node: NodeState,
    choose: Choice,
    limit_s: float,
) -> tuple[Probe, ...]:
    """One datagram to each of those that `choose` takes, given the neighbours that there are.

    Blocks up to the limit, and about 1 ms a datagram. Raises BackendError.
    """
    from snatd.kernel.links import read_paths
    from snatd.kernel.probe import seen_as, send

    routes, used = read_paths(desired.family)
    used |= {address.ip for link in node.links for address in link.addresses}
    unused = unused_address(desired.subnet, used, routes)
    lease = node.lease.of(desired.family) if not isinstance(node.lease, Hold) else None
    own = lease.gateway.ip if lease else None
    sent: dict[FlowKey, Probe] = {}
    made = []
    for address in choose(neighbours(routes, desired)):
        one = Probe(address, concerns(address, desired))
        flow = send(address, unused, own)
        if isinstance(flow, str):
            made.append(replace(one, why=flow))
        else:
            sent[flow] = replace(one, sent_from=flow.source, why=_NO_ENTRY)
    found = seen_as(desired.family, sent, limit_s)
    for flow, one in sent.items():
        source = found.get(flow)
        made.append(one if source is None else replace(one, seen_as=source, why=""))
    return tuple(made)


def probe_lines(probes: Sequence[Probe]) -> tuple[str, ...]:
    """One line a probe."""
    width = max((len(str(one.destination)) for one in probes), default=0)
    return tuple(f"{one.destination!s:{width}}  {_said(one)}" for one in probes)


def _said(one: Probe) -> str:
    sent = f"sent from {one.sent_from}, " if one.sent_from else ""
    if one.kept is None:
        return f"{sent}no answer: {one.why}"
    outcome = "kept" if one.kept else "SNATed"
    outside = "" if one.inside else ", but it is not among the networks where that is promised"
    why = f": {one.why}" if one.why else ""
    return f"{sent}seen as {one.seen_as}: {outcome}{outside}{why}"
