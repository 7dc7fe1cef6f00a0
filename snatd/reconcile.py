"""One pass: read the node, decide, read the rulesets, plan, apply, read back.

The edges (what reads and writes) are arguments. Nothing is remembered from one pass to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from snatd.core.deadline import Deadline
from snatd.core.desired import Absent, Desired, desired
from snatd.core.errors import (
    BackendBusy,
    BackendError,
    BackendFailed,
    NotConverged,
    StaleRuleset,
)
from snatd.core.guard import plan_guard
from snatd.core.mend import misplaced, undone
from snatd.core.model import (
    Backend,
    Family,
    GuardPolicy,
    Hold,
    Network,
    NodeState,
    Policy,
    Ruleset,
    join,
)
from snatd.core.plan import (
    Transaction,
    applied,
    plan,
    unwritable,
)

# How often a pass looks again at once when a rival wrote between its read and its write, and how
# often it writes the same thing when a rival undid it before it was read back.
_ROUNDS = 4
_WRITES = 2
# Each try waits up to 5 s for a lock: a minute in all.
_UNDO_TRIES = 12


class Tables(Protocol):
    """The rules of one family in one backend; the contract is tests/kernel/test_contract.py."""

    family: Family

    @property
    def backend(self) -> Backend: ...

    def read(self, deadline: Deadline, *, thorough: bool = False) -> Ruleset: ...

    def apply(self, transaction: Transaction, deadline: Deadline) -> None: ...


@dataclass(frozen=True)
class Edges:
    """What a pass reads and writes through, in that order. `remember` is called before each write
    to iptables rules."""

    read_node: Callable[[Deadline], NodeState]
    tables: Sequence[Tables]
    remember: Callable[[Transaction, Network | None], None]


Wanted = Desired | Absent | Hold


@dataclass(frozen=True)
class Problem:
    """What could not be read or written. No family: the node itself could not be read."""

    error: BackendError
    family: Family | None = None
    backend: Backend | None = None

    def __str__(self) -> str:
        where = " ".join(one.value for one in (self.family, self.backend) if one)
        return f"{where + ': ' if where else ''}{self.error}"


@dataclass(frozen=True)
class View:
    """One look: what the node is, what it should be, what the rulesets are, what is to be done.

    `unguarded`: why there is no guard, where the policy can do without.
    """

    node: NodeState | None = None
    wanted: Mapping[Family, Wanted] = field(default_factory=dict)
    rulesets: tuple[Ruleset, ...] = ()
    plan: tuple[Transaction, ...] = ()
    problems: tuple[Problem, ...] = ()
    unguarded: tuple[Problem, ...] = ()

    @property
    def leased(self) -> tuple[Desired, ...]:
        """What holds in each family of which it is known."""
        return tuple(one for one in self.wanted.values() if isinstance(one, Desired))

    @property
    def holds(self) -> tuple[str, ...]:
        """Why some of it cannot be told yet; each reason once."""
        reasons = [one.reason for one in self.wanted.values() if isinstance(one, Hold)]
        bridges = [one.bridge for one in self.leased]
        reasons += [bridge.reason for bridge in bridges if isinstance(bridge, Hold)]
        return tuple(dict.fromkeys(reasons))

    @property
    def in_sync(self) -> bool:
        return not (self.plan or self.problems or self.holds)


@dataclass(frozen=True)
class Pass:
    """A pass and what came of it. `view` is the last look, so an applied plan is not in it."""

    view: View
    applied: tuple[Transaction, ...] = ()


def look(edges: Edges, policy: Policy, deadline: Deadline) -> View:
    """Reads everything and plans; writes nothing. One backend's error leaves the others alone."""
    try:
        node = edges.read_node(deadline)
    except BackendError as error:
        return View(problems=(Problem(error),))
    wanted = {family: desired(family, node, policy) for family in Family}
    return _look_at_rules(View(node, wanted), edges, policy, deadline)


def _look_at_rules(view: View, edges: Edges, policy: Policy, deadline: Deadline) -> View:
    assert view.node is not None
    rulesets: dict[Family, dict[Backend, Ruleset]] = {family: {} for family in view.wanted}
    problems = []
    decided = {one: want for one, want in view.wanted.items() if not isinstance(want, Hold)}
    for tables in edges.tables:
        # Of what is held only the guard is looked at: it stays, and does its work meanwhile.
        wanted_here = tables.family in decided or tables.backend is Backend.GUARD
        if not (wanted_here and view.node.has(tables.family)):
            continue
        try:
            rulesets[tables.family][tables.backend] = tables.read(deadline)
        except BackendError as error:
            # Of a family that is not leased we want nothing, so nothing is missing.
            if isinstance(view.wanted[tables.family], Desired):
                problems.append(Problem(error, tables.family, tables.backend))
    flat = tuple(ruleset for of_family in rulesets.values() for ruleset in of_family.values())
    guards = {family: of.pop(Backend.GUARD, None) for family, of in rulesets.items()}
    # The guards go first: whatever then happens to the other rules, no packet is wrong.
    transactions = [
        transaction
        for family, wanted in decided.items()
        if (guard := guards[family]) and (transaction := plan_guard(wanted, guard, policy))
    ]
    for family, wanted in decided.items():
        transactions += plan(wanted, rulesets[family], policy.backend or view.node.iptables_is)
        if isinstance(wanted, Desired):
            problems += [
                Problem(_unwritable(wanted, ruleset, numbers), family, backend)
                for backend, ruleset in rulesets[family].items()
                if (numbers := unwritable(wanted, ruleset))
            ]
    view = replace(view, rulesets=flat, plan=tuple(transactions))
    return _excused(view, problems, policy)


def _unwritable(wanted: Desired, ruleset: Ruleset, numbers: Sequence[int]) -> BackendFailed:
    tool = f"{wanted.family.command}-{ruleset.backend.value}"
    first = f"{tool} -t nat -D POSTROUTING {numbers[0]}"
    return BackendFailed(
        f"POSTROUTING rule {join(numbers)} hides the addresses of {wanted.subnet} and cannot be "
        f"narrowed, because of a line break in its comment or a quote in its interface: remove it "
        f"by hand: `{first}`"
    )


def _excused(view: View, problems: Sequence[Problem], policy: Policy) -> View:
    """A view with its problems. A guard that this node cannot have is none, unless it must."""
    excused = [one for one in problems if _is_excusable(one, policy)]
    where = {(one.family, one.backend) for one in excused}
    return replace(
        view,
        plan=tuple(one for one in view.plan if (one.family, one.backend) not in where),
        problems=tuple(one for one in problems if one not in excused),
        unguarded=tuple(excused) if policy.guard is GuardPolicy.AUTO else (),
    )


def _is_excusable(problem: Problem, policy: Policy) -> bool:
    return (
        problem.backend is Backend.GUARD
        and policy.guard is not GuardPolicy.ON
        and isinstance(problem.error, BackendFailed)
    )


def reconcile(edges: Edges, policy: Policy, deadline: Deadline) -> Pass:
    """Looks, applies what is missing and reads back, until nothing is or somebody is in the way."""
    view = look(edges, policy, deadline)
    done: list[Transaction] = []
    errors: dict[tuple[Family, Backend], BackendError] = {}
    writes: Counter[tuple[Family, Backend]] = Counter()
    for _ in range(_ROUNDS):
        todo = [
            one
            for one in view.plan
            if not _gave_up(errors.get((one.family, one.backend)))
            and writes[one.family, one.backend] < _WRITES
        ]
        if not todo:
            break
        written = _apply_each(todo, view, edges, deadline, errors)
        writes.update((one.family, one.backend) for one in written)
        done += written
        view = _look_at_rules(view, edges, policy, deadline)
        moves = [move for one in written if (move := _displaced(one, view)) is not None]
        if moves:
            _apply_each(moves, view, edges, deadline, errors)
            view = _look_at_rules(view, edges, policy, deadline)
    left = {(one.family, one.backend): one for one in view.plan}
    for key, transaction in left.items():
        errors.setdefault(key, _not_converged(transaction, view))
    problems = [
        Problem(error, *key) for key, error in errors.items() if key in left or _gave_up(error)
    ]
    # What could not be written comes first: that it could not be read back may follow from it.
    return Pass(_excused(view, (*problems, *view.problems, *view.unguarded), policy), tuple(done))


def _gave_up(error: BackendError | None) -> bool:
    return error is not None and not isinstance(error, StaleRuleset)


def _apply_each(
    transactions: Sequence[Transaction],
    view: View,
    edges: Edges,
    deadline: Deadline,
    errors: dict[tuple[Family, Backend], BackendError],
) -> list[Transaction]:
    """Applies what can be; keeps in `errors` why the rest cannot."""
    written = []
    for transaction in transactions:
        key = (transaction.family, transaction.backend)
        errors.pop(key, None)
        wanted = view.wanted[transaction.family]
        edges.remember(transaction, wanted.subnet if isinstance(wanted, Desired) else None)
        try:
            _tables_of(transaction, edges).apply(transaction, deadline)
            written.append(transaction)
        except BackendError as error:
            errors[key] = error
    return written


def _displaced(transaction: Transaction, view: View) -> Transaction | None:
    """What moves ours back if a rival's write displaced it, as far as it was read back."""
    ruleset = _ruleset_of(transaction, view)
    return misplaced(transaction, ruleset) if ruleset else None


def _ruleset_of(transaction: Transaction, view: View) -> Ruleset | None:
    key = (transaction.family, transaction.backend)
    return next((one for one in view.rulesets if (one.family, one.backend) == key), None)


def _tables_of(transaction: Transaction, edges: Edges) -> Tables:
    key = (transaction.family, transaction.backend)
    return next(one for one in edges.tables if (one.family, one.backend) == key)


def _not_converged(transaction: Transaction, view: View) -> NotConverged:
    actual = _ruleset_of(transaction, view)
    assert actual is not None, "what was planned was read"
    planned = applied(actual, transaction)
    return NotConverged(
        f"still not as planned after {_WRITES} writes; is: {' | '.join(actual.lines())}; "
        f"planned: {' | '.join(planned.lines())}"
    )


@dataclass(frozen=True)
class Undoing:
    """What came of undoing a pass: what was undone, and what could not be."""

    view: View
    undone: tuple[Transaction, ...]
    problems: tuple[Problem, ...]


def put_back(done: Pass, edges: Edges, policy: Policy, deadline: Deadline) -> Undoing:
    """Undoes the transactions of a pass, last first. Tries hard: somebody may depend on it."""
    undoing: list[Transaction] = []
    problems: list[Problem] = []
    for transaction in reversed(done.applied):
        try:
            undoing.append(_undo(transaction, _tables_of(transaction, edges), deadline))
        except BackendError as error:
            problems.append(Problem(error, transaction.family, transaction.backend))
    return Undoing(look(edges, policy, deadline), tuple(undoing), tuple(problems))


def _undo(transaction: Transaction, tables: Tables, deadline: Deadline) -> Transaction:
    for _ in range(_UNDO_TRIES - 1):
        # A held lock or a rival's write is no reason to leave a half-finished change behind.
        with suppress(BackendBusy, StaleRuleset):
            return _undo_once(transaction, tables, deadline)
    return _undo_once(transaction, tables, deadline)


def _undo_once(transaction: Transaction, tables: Tables, deadline: Deadline) -> Transaction:
    undo = undone(transaction, tables.read(deadline))
    if undo.edits:
        tables.apply(undo, deadline)
    return undo
