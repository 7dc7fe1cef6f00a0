"""`snatd flows`: the connections that hide a container's address, and the end of them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired, desired
from snatd.core.errors import BackendError
from snatd.core.flows import Flow
from snatd.core.model import Family, Hold, NodeState, count
from snatd.kernel.conntrack import Sweep
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import look
from snatd.report import EXIT_FAILING, EXIT_OK, EXIT_WAITING, Answer, duration

_LIMIT_S = 20.0
_HEAD = ("PROTOCOL", "STATE", "SOURCE", "DESTINATION", "SEEN AS", "ENDS IN", "AGE")


def read_leased(
    settings: Config, tools: Tools, limit_s: float
) -> tuple[NodeState, tuple[Desired, ...], tuple[str, ...]]:
    """The node, what holds in each leased family, and why that cannot be told of others.

    Raises BackendError where the node cannot be read.
    """
    edges = open_edges(settings, tools)
    node = edges.read_node(Deadline(time.monotonic() + limit_s))
    wanted = [desired(family, node, settings.policy) for family in Family]
    holds = dict.fromkeys(one.reason for one in wanted if isinstance(one, Hold))
    return node, tuple(one for one in wanted if isinstance(one, Desired)), tuple(holds)


def flows(settings: Config, delete: str | None = None) -> Answer:
    """Lists the wrong flows, or deletes those of a policy (`udp`, `all`). Blocks up to 20 s a
    family; raises BackendError where the node cannot be read."""
    tools = Tools()
    _, leased, waiting = read_leased(settings, tools, _LIMIT_S)
    policy, marks = delete or "report", settings.marks
    tallies, problems, warnings = [], [], list(waiting)
    if delete and not _in_sync(settings, tools):
        warnings.append("the rules are not in sync (`snatd check`): flows may come back as wrong")
    for one in leased:
        try:
            tallies.append(Sweep(one, tools, _LIMIT_S, marks=marks, policy=policy).run())
        except BackendError as error:
            problems.append(f"{one.family.value}: {error}")
    shown = [flow for tally in tallies for flow in tally.flows]
    wrong = sum(tally.wrong for tally in tallies)
    deleted = sum(tally.deleted for tally in tallies)
    warnings += [
        f"cut off {tally.cut_off}: there may be more" for tally in tallies if tally.cut_off
    ]
    if len(shown) < wrong and not delete:
        warnings.append(f"only the first {len(shown)} of {wrong} are listed")
    if not delete and (over := sum(flow.is_over for flow in shown)):
        warnings.append(f"{over} of these are over; `snatd status` counts them no more")
    if delete == "all" and any(tally.deleted for tally in tallies):
        warnings.append("a TCP connection that was deleted is reset with its next packet")
    if delete == "udp" and any(flow.protocol != "udp" for flow in shown):
        warnings.append("what is left is not UDP: `--delete all` ends it too, and resets TCP")
    document: dict[str, Any] = {
        "flows": [flow_document(flow) for flow in shown],
        "wrong": wrong,
        "cut_off": any(tally.cut_off for tally in tallies),
        "waiting_for": list(waiting),
        "problems": problems,
    }
    if delete:
        document["deleted"] = deleted
    if not wrong:
        lines: tuple[str, ...] = ("no flow hides a container's address",)
        if document["cut_off"]:
            lines = ("not all flows were looked at",)
    elif delete:
        lines = (f"{count(deleted, 'flow')} deleted, {wrong - deleted} left",)
    else:
        lines = flow_lines(shown)
    failed = problems or document["cut_off"]
    exit_code = EXIT_FAILING if failed else EXIT_OK if leased else EXIT_WAITING
    return Answer(document, lines if tallies else (), (*warnings, *problems), exit_code)


def _in_sync(settings: Config, tools: Tools) -> bool:
    deadline = Deadline(time.monotonic() + _LIMIT_S)
    return not look(open_edges(settings, tools), settings.policy, deadline).plan


def flow_document(flow: Flow) -> dict[str, Any]:
    """One flow as JSON."""
    key = flow.key
    return {
        "family": f"ipv{key.source.version}",
        "protocol": flow.protocol,
        "source": str(key.source),
        "source_port": key.source_port,
        "destination": str(key.destination),
        "destination_port": key.destination_port,
        "icmp": dict(zip(("type", "code", "id"), key.icmp, strict=True)) if key.icmp else None,
        "state": flow.state or None,
        "seen_as": str(flow.seen_as),
        "timeout_s": flow.timeout_s,
        "age_s": flow.age_s,
    }


def flow_lines(shown: Iterable[Flow]) -> tuple[str, ...]:
    """A table of flows. `ENDS IN` is what is left if no packet comes."""
    table = zip(_HEAD, *map(_row, shown), strict=True)
    columns = [column for column in table if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    rows = zip(*columns, strict=True)
    return tuple(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(flow: Flow) -> tuple[str, ...]:
    key = flow.key
    return (
        flow.protocol,
        flow.state,
        _end(str(key.source), key.source_port),
        _end(str(key.destination), key.destination_port),
        str(flow.seen_as),
        "" if flow.timeout_s is None else duration(flow.timeout_s),
        "" if flow.age_s is None else duration(flow.age_s),
    )


def _end(address: str, port: int | None) -> str:
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
