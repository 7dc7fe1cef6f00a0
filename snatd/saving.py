"""The saved rules files of this node: brought in line by the daemon and `snatd save`, and put back
by `snatd revert`. What a file should say is `core.saved`; how it is replaced, `host.saved_rules`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Absent, Desired, desired
from snatd.core.model import Backend, Family, Hold, Lease, NodeState, join
from snatd.core.revert import Memory
from snatd.core.saved import Edited, bring_in_line, dynamic_chains, put_back, without_dynamic
from snatd.host import journal
from snatd.host.flannel import read_lease
from snatd.host.memory import Key, MemoryDamaged, MemoryFile
from snatd.host.saved_rules import (
    Outcome,
    SavedFile,
    State,
    candidates,
    drop_backup,
    find,
    rewrite,
    signature,
)
from snatd.reconcile import View
from snatd.report import EXIT_DRIFT, EXIT_FAILING, EXIT_OK, EXIT_WAITING, Answer

# All looks together take no more than this share of a core. What may pass by itself is tried again
# at the first pass after so many seconds.
_SHARE = 0.01
_RETRY_S = 30.0
_COMMAND_S = 20.0

Complain = Callable[[str], None]


class Check(Protocol):
    """Raises BackendError where a content would not load."""

    def __call__(
        self, family: Family, backend: Backend, content: bytes, *, deadline: Deadline
    ) -> None: ...


class Dump(Protocol):
    """All tables of a family. Raises BackendError."""

    def __call__(self, family: Family, backend: Backend, *, deadline: Deadline) -> bytes: ...


def memory_of(settings: Config) -> MemoryFile:
    """What the rules of ours in saved files stand for."""
    return MemoryFile(settings.state_dir, "replaced-saved.json")


@dataclass(frozen=True)
class _Bringer:
    """Brings files in line; what it needs for any of them."""

    settings: Config
    backend: Backend
    check: Check
    complain: Complain
    deadline: Deadline
    write: bool = True

    def each(self, wanted: Mapping[Family, Desired | Absent | Hold]) -> tuple[Outcome, ...]:
        """All files of the families of which it is known what they should be."""
        outcomes = []
        for file in find(self.settings.saved_rules):
            of_family = wanted.get(file.family)
            if isinstance(of_family, Desired | Absent):
                outcomes.append(self.one(file, of_family))
        return tuple(outcomes)

    def one(
        self, file: SavedFile, wanted: Desired | Absent, instead: bytes | None = None
    ) -> Outcome:
        """`instead`: what is brought in line, whatever the file holds."""

        def edit(content: bytes) -> Edited:
            edited = bring_in_line(content if instead is None else instead, wanted, self.backend)
            return edited if instead is None else _compared(content, edited)

        def keep(edited: Edited) -> None:
            for one in edited.transactions:
                if isinstance(wanted, Desired):
                    memory_of(self.settings).keep(one, wanted.subnet, self.complain)

        return rewrite(
            file,
            edit,
            lambda content: self.check(file.family, self.backend, content, deadline=self.deadline),
            keep,
            write=self.write,
            old_must_load=instead is None,
        )


def _compared(old: bytes, new: Edited) -> Edited:
    """The difference of two whole saves, without comments. The order of rules is none."""
    before, after = list(_tables(old)), list(_tables(new.content))
    return replace(new, removed=_only(before, after), added=_only(after, before))


def _tables(save: bytes) -> Iterator[tuple[str, str]]:
    """Its lines, each with its table: `:INPUT` and `COMMIT` say something else in another one."""
    table = ""
    for line in save.decode("utf-8", "surrogateescape").split("\n"):
        table = line if line.startswith("*") else table
        if line and not line.startswith("#"):
            yield table, line


def _only(these: Iterable[tuple[str, str]], those: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """The lines, as often and in the order as they are here, that are not there."""
    there = Counter(those)
    found = []
    for one in these:
        if there[one]:
            there[one] -= 1
        else:
            found.append(one[1])
    return tuple(found)


def _is_ours(settings: Config, backend: Backend) -> bool:
    """Whether the operator wants the backend looked after that the files are loaded into."""
    return settings.policy.backend in (None, backend)


@dataclass
class Saving:
    """The daemon's part: looks when a pass converged, and then only if the wish or a file changed
    since the last look."""

    settings: Config
    check: Check
    say: Callable[..., None]
    look_limit_s: float = 5.0
    due_s: float | None = None
    _view: View = field(default_factory=View)
    _seen: object = None
    _free_s: float = 0.0
    _outcomes: tuple[Outcome, ...] = ()
    _writes: int = 0

    def passed(self, view: View, now_s: float) -> None:
        """A pass ended. The look itself comes when the loop asks for it."""
        self._view, self.due_s = view, None
        if self.settings.mode != "enforce" or not view.in_sync or view.node is None:
            return
        if _is_ours(self.settings, view.node.iptables_is) and self._signature() != self._seen:
            self.due_s = max(now_s, self._free_s)

    def _signature(self) -> object:
        """Taken before a look: if our own write or a rival's comes after, there is another."""
        assert self._view.node is not None
        files = tuple(signature(one) for one in candidates(self.settings.saved_rules))
        return (tuple(self._view.wanted.items()), self._view.node.iptables_is, files)

    def turn(self, now_s: float) -> bool:
        """Looks if that is due; True where there is news for the status."""
        node = self._view.node
        if self.due_s is None or now_s < self.due_s or node is None:
            return False
        self.due_s = None
        self._seen = self._signature()
        began_s = time.monotonic()
        wanted = {one: want for one, want in self._view.wanted.items() if node.has(one)}
        bringer = _Bringer(
            self.settings,
            node.iptables_is,
            self.check,
            lambda text: self.say("state_not_kept", "warning", text),
            Deadline(began_s + self.look_limit_s),
        )
        self._outcomes = bringer.each(wanted)
        self._tell()
        # A busy node makes a look long, and is no reason to leave a file as it is for minutes.
        wait_s = min((time.monotonic() - began_s) / _SHARE, _RETRY_S)
        if any(one.state is State.NOT_WRITTEN for one in self._outcomes):
            self._seen, wait_s = None, _RETRY_S
        self._free_s = time.monotonic() + wait_s
        return True

    def _tell(self) -> None:
        for one in self._outcomes:
            if one.state is State.WRITTEN:
                self._writes += 1
                self.say(
                    "saved_rules_written",
                    "info",
                    str(one.file.path),
                    same=self._writes,  # each is news
                    priority=journal.NOTICE,
                    family=one.file.family.value,
                    removed=list(one.edited.removed) or None,
                    added=list(one.edited.added) or None,
                )
        self.say(
            "saved_rules_left_alone",
            "warning",
            troubles(self._outcomes),
            over="saved_rules_in_line",
            hint="snatd save",
        )
        doubts = _doubts(self._outcomes)
        hint = "write it as iptables-save does, or remove it"
        self.say("saved_rule_not_understood", "warning", doubts, hint=hint)

    def document(self) -> list[dict[str, Any]]:
        """For the status file."""
        return [_document(one) for one in self._outcomes]


def save(
    settings: Config,
    node: NodeState,
    check: Check,
    dump: Dump | None,
    *,
    write: bool,
    dynamic: bool,
) -> Answer:
    """`snatd save`. With `dump` the files become what that says; `dynamic`: all of it.

    Blocks up to 20 s; raises BackendError where the rules cannot be read.
    """
    warnings: list[str] = []
    deadline = Deadline(time.monotonic() + _COMMAND_S)
    bringer = _Bringer(settings, node.iptables_is, check, warnings.append, deadline, write=write)
    wanted = {one: desired(one, node, settings.policy) for one in Family if node.has(one)}
    holds = [_hold(one) for one in wanted.values()]
    warnings += [f"waiting: {why}" for why in dict.fromkeys(holds) if why]
    if not _is_ours(settings, node.iptables_is):
        warnings.append(f"backend is not {node.iptables_is.value}, which the files are loaded into")
        outcomes: tuple[Outcome, ...] = ()
    elif dump is None:
        outcomes = bringer.each({one: want for one, want in wanted.items() if not _hold(want)})
    else:
        outcomes = tuple(_in_full(bringer, wanted, dump, warnings, dynamic=dynamic))
    if not find(settings.saved_rules):
        there = join([str(one.path) for one in candidates(settings.saved_rules)])
        warnings.append(f"no saved rules file here (looked for: {there}); snatd makes none")
    warnings += [*_doubts(outcomes), *troubles(outcomes)]
    states = {one.state for one in outcomes}
    exit_code = EXIT_WAITING if any(holds) else EXIT_OK
    if State.WOULD_CHANGE in states:
        exit_code = EXIT_DRIFT
    if not states.isdisjoint(_TROUBLE) or (dump and not outcomes):
        exit_code = EXIT_FAILING
    document = {"saved_rules": documents(outcomes), "waiting_for": [one for one in holds if one]}
    return Answer(document, lines(outcomes), tuple(warnings), exit_code)


def _hold(wanted: Desired | Absent | Hold) -> str:
    """Why it is not known yet what a file should be."""
    if isinstance(wanted, Hold):
        return wanted.reason
    bridge = wanted.bridge if isinstance(wanted, Desired) else None
    return bridge.reason if isinstance(bridge, Hold) else ""


def _in_full(
    bringer: _Bringer,
    wanted: Mapping[Family, Desired | Absent | Hold],
    dump: Dump,
    warnings: list[str],
    *,
    dynamic: bool,
) -> Iterable[Outcome]:
    for file in find(bringer.settings.saved_rules):
        want = wanted.get(file.family)
        if not isinstance(want, Desired | Absent) or _hold(want):
            continue
        content = dump(file.family, bringer.backend, deadline=bringer.deadline)
        chains = dynamic_chains(content)
        if chains and dynamic:
            warnings.append(
                f"{file.path} freezes chains that their owners make anew, and they would come back "
                f"stale: {join(chains, 12)} (`--without-dynamic` leaves them out)"
            )
        yield bringer.one(file, want, content if dynamic else without_dynamic(content))


def revert_files(
    settings: Config,
    backend: Backend,
    check: Check,
    live: Mapping[Key, Memory],
    complain: Complain,
) -> tuple[Outcome, ...]:
    """Puts back what the rules of ours in the files stand for; `live`: what those in the kernel
    do, for files that hold rules of ours that snatd did not write there. Forgets what it put back.
    """
    if settings.saved_rules == "off":
        return ()
    lease = read_lease(settings.subnet_file)
    deadline = Deadline(time.monotonic() + _COMMAND_S)
    memory = memory_of(settings)
    try:
        remembered = memory.load()
    except (OSError, MemoryDamaged) as error:
        complain(f"{error}: what was in the saved files before snatd is not known")
        remembered = {}

    def put_file_back(file: SavedFile) -> Outcome:
        family = file.family
        memories = [one for key, one in remembered.items() if key[0] is family]
        memories = memories or [one for key, one in live.items() if key[:2] == (family, backend)]
        leased = lease.of(family) if isinstance(lease, Lease) else None
        return rewrite(
            file,
            lambda content: put_back(
                content, family, backend, memories, leased.subnet if leased else None
            ),
            lambda content: check(family, backend, content, deadline=deadline),
            lambda _: None,
        )

    files = [one for one in find(settings.saved_rules) if one.path.exists()]
    outcomes = [put_file_back(one) for one in files]
    if remembered and not troubles(outcomes):
        try:
            memory.forget()
        except OSError as error:
            complain(f"{memory.path} stays: {error.strerror}: remove it by hand")
    return tuple(one for one in outcomes if one.state is not State.IN_LINE)


def backups(settings: Config) -> tuple[Path, ...]:
    """Where the first content of a saved file still is, and differs from the file. A backup that
    says the same as its file is removed."""
    files = dict.fromkeys((*candidates("auto"), *candidates(settings.saved_rules)))
    return tuple(backup for file in files if (backup := drop_backup(file.path)) is not None)


_TROUBLE = (State.LEFT_ALONE, State.NOT_WRITTEN)


def troubles(outcomes: Iterable[Outcome]) -> list[str]:
    """The files that are not as they should be, and why."""
    return [
        f"{one.file.path} {one.state.value}: {one.why}" for one in outcomes if one.state in _TROUBLE
    ]


def _doubts(outcomes: Iterable[Outcome]) -> list[str]:
    return [f"{one.file.path}: {doubt}" for one in outcomes for doubt in one.edited.doubts]


def lines(outcomes: Iterable[Outcome]) -> tuple[str, ...]:
    """What was or would be changed, as `snatd save` and `snatd revert` print it."""
    result: list[str] = []
    for one in outcomes:
        result.append(f"{one.file.family.value} {one.file.path}, {one.state.value}")
        result += [f"- {line}" for line in one.edited.removed]
        result += [f"+ {line}" for line in one.edited.added]
    return tuple(result)


def documents(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [
        {
            **_document(one),
            "removed": list(one.edited.removed),
            "added": list(one.edited.added),
            "not_understood": list(one.edited.doubts),
        }
        for one in outcomes
    ]


def _document(one: Outcome) -> dict[str, Any]:
    return {
        "path": str(one.file.path),
        "family": one.file.family.value,
        "state": one.state.value,
        "why": one.why,
    }
