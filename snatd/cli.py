"""The commands. Each prints what a person needs, or JSON, and returns its exit status."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from snatd import config, report
from snatd.arguments import parser
from snatd.core.deadline import Deadline
from snatd.core.errors import (
    BackendBusy,
    BackendError,
    ConfigError,
    NotPermitted,
    Refused,
    StaleRuleset,
    Unanswerable,
)
from snatd.core.guard import without_guard
from snatd.core.model import Backend, Family, Hold, Network
from snatd.core.plan import Transaction
from snatd.core.revert import Memory, revert
from snatd.host.confirm import Confirmation, confirm, decline, waits
from snatd.host.instance import AlreadyRunning, Instance
from snatd.host.memory import Key, MemoryDamaged, MemoryFile
from snatd.host.saved_rules import Outcome
from snatd.host.terminal import print_lines, write
from snatd.kernel.tools import Tools
from snatd.reconcile import Edges, Tables, View

_PASS_S = 20.0
_UNDO_S = 60.0
_TRY_AGAIN_S = 0.2
_DONE = ", done"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = parser().parse_args(arguments)
    try:
        status_code = _COMMANDS[options.command](options)
    except ConfigError as error:
        status_code = _failed(options, error.complaints, report.EXIT_CONFIG)
    except NotPermitted as error:
        status_code = _failed(options, (str(error),), report.EXIT_NOT_PERMITTED)
    except AlreadyRunning as error:
        unanswered = "it is an `apply --confirm` that waits: `snatd confirm`, or it puts all back"
        why = f"{error}: {unanswered}" if waits(error.pid) else str(error)
        status_code = _failed(options, (why,), 1)
    except Refused as error:
        status_code = _failed(options, (str(error),), 1)
    except BackendError as error:
        status_code = _failed(options, (str(error),), report.EXIT_FAILING)
    except Unanswerable as error:
        status_code = _failed(options, (str(error),), report.EXIT_USAGE)
    for stream in (sys.stdout, sys.stderr):
        write(stream, "")
    return status_code


def _failed(options: argparse.Namespace, messages: Sequence[str], status_code: int) -> int:
    for message in messages:
        _warn(message)
    if getattr(options, "json", False):
        _print_json({"error": {"exit": status_code, "messages": list(messages)}})
    return status_code


def _run(options: argparse.Namespace) -> int:
    from snatd.lean import leave_out

    leave_out()
    from snatd.daemon import Daemon
    from snatd.host import journal
    from snatd.kernel.privilege import drop_capabilities
    from snatd.node import require_permission

    # Before the daemon listens to them these would end it: a reload right after a start.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    settings = config.load(options.config)
    require_permission()
    drop_capabilities()
    journal.configure(settings.log_format, settings.log_level)
    return Daemon(settings, options.config).run()


def _deadline(limit_s: float = _PASS_S) -> Deadline:
    return Deadline(time.monotonic() + limit_s)


def _check(options: argparse.Namespace) -> int:
    from snatd import suspects
    from snatd.node import open_edges, require_permission
    from snatd.reconcile import look

    settings = config.load(options.config)
    require_permission()
    tools = Tools()
    view = look(open_edges(settings, tools), settings.policy, _deadline())
    found = suspects.find_suspects(view.leased, settings.marks, tools, _deadline())
    if options.json:
        _print_json(report.document(view) | {"suspects": suspects.document(found)})
    else:
        exposed = any(one.rules for one in found)
        shown = report.lines(view, view.plan, exposed=exposed)
        _print_lines((*shown, *suspects.lines(found)))
    return report.exit_code(view)


def _apply(options: argparse.Namespace) -> int:
    from snatd.node import open_edges, require_permission
    from snatd.reconcile import look, reconcile

    settings = config.load(options.config)
    require_permission()
    edges = open_edges(settings, Tools(), _warn)
    if settings.mode == "observe":
        view = look(edges, settings.policy, _deadline())
        _warn('mode is "observe": nothing was written; this is what would be')
        _tell(options, view, view.plan, "", applied=())
        return report.exit_code(view)
    if options.confirm is not None:
        return _apply_until_confirmed(options, settings, edges)
    done = reconcile(edges, settings.policy, _deadline())
    _tell(options, done.view, done.applied, _DONE, applied=done.applied)
    return report.exit_code(done.view)


def _tell(
    options: argparse.Namespace,
    view: View,
    shown: Sequence[Transaction],
    note: str,
    **lists: Sequence[Transaction],
) -> None:
    """The view and the transactions to be shown, or as JSON the view and named lists of them."""
    if options.json:
        changes = {
            name: [report.transaction_document(one) for one in ones] for name, ones in lists.items()
        }
        _print_json(report.document(view) | changes)
    else:
        _print_lines(report.lines(view, shown, note))


def _apply_until_confirmed(
    options: argparse.Namespace, settings: config.Config, edges: Edges
) -> int:
    from snatd.reconcile import put_back, reconcile

    instance = _take_instance(settings, "it would redo what --confirm puts back")
    memory = MemoryFile(settings.state_dir)
    remembered = _load(memory)
    confirmation = Confirmation(settings.runtime_dir)
    done = reconcile(edges, settings.policy, _deadline())
    if done.applied:
        _print_lines(report.diff(done.applied, _DONE), to_stderr=True)
    confirmed = not done.applied or confirmation.wait(options.confirm)
    undoing = None if confirmed else put_back(done, edges, settings.policy, _deadline(_UNDO_S))
    confirmation.close()
    instance.release()
    if undoing is None:
        _tell(options, done.view, (), _DONE, applied=done.applied, undone=())
        return report.exit_code(done.view)
    for problem in undoing.problems:
        _warn(f"NOT put back, the change is still in force: {problem}")
    if not undoing.problems:
        with suppress(OSError):  # if it cannot be written it was not changed either
            memory.store(remembered)
        _warn("not confirmed: everything is as it was before")
    _tell(options, undoing.view, (), _DONE, applied=done.applied, undone=undoing.undone)
    return report.EXIT_FAILING if undoing.problems else report.exit_code(undoing.view)


def _take_instance(settings: config.Config, why_not: str) -> Instance:
    instance = Instance(settings.runtime_dir)
    try:
        instance.take()
    except AlreadyRunning as error:
        raise Refused(f"{error}: {why_not}; stop it first") from None
    return instance


def _take_instance_from_apply(settings: config.Config) -> Instance:
    """The instance lock. An `apply --confirm` that waits for an answer gets a no, and a minute to
    put back what it did."""
    end_s = time.monotonic() + _UNDO_S
    told = ""
    while True:
        instance = Instance(settings.runtime_dir)
        try:
            instance.take()
        except AlreadyRunning as error:
            if time.monotonic() >= end_s or (error.pid != told and not decline(error.pid)):
                why_not = "it would put its rules back at once"
                raise Refused(f"{error}: {why_not}; stop it first") from None
            if error.pid != told:
                _warn(f"told the `apply --confirm` that waits as pid {error.pid} to put all back")
            told = error.pid
            time.sleep(_TRY_AGAIN_S)
        else:
            return instance


def _load(memory: MemoryFile) -> dict[Key, Memory]:
    """The memory; where it cannot be read, what would be lost by that is said and it is empty."""
    try:
        return memory.load()
    except (OSError, MemoryDamaged) as error:
        _warn(f"{error}: what was there before snatd is not known")
        return {}


def _confirm(options: argparse.Namespace) -> int:
    settings = config.load(options.config)
    found = confirm(settings.runtime_dir)
    if options.json:
        _print_json({"confirmed": found})
    else:
        _print_lines(("confirmed" if found else "nothing is waiting to be confirmed",))
    return 0 if found else 1


def _status(options: argparse.Namespace) -> int:
    from snatd.status import status

    # The daemon's word is there also while the rest of the file is wrong.
    settings, _ = config.read(options.config)
    return status(settings.runtime_dir, as_json=options.json, every_s=options.watch)


def _explain(options: argparse.Namespace) -> int:
    from snatd import explain
    from snatd.kernel.hooks import read_hooks
    from snatd.node import require_permission

    require_permission()
    question = explain.Question(
        options.source,
        options.destination,
        options.out,
        options.mark,
        options.proto,
        dport=options.dport,
    )
    try:
        told = explain.explain(question, lambda family: read_hooks(family, Tools(), _deadline()))
    except BackendError as error:
        return _failed(options, (str(error),), report.EXIT_FAILING)
    if options.json:
        _print_json(explain.document(told))
    else:
        _print_lines(list(explain.lines(told)))
    return 0 if told.trace.answer else 1


def _revert(options: argparse.Namespace) -> int:
    from snatd import saving
    from snatd.host.metrics import MetricsFile
    from snatd.kernel.backends import iptables_is
    from snatd.kernel.restore import check_restore
    from snatd.node import require_permission

    settings = config.load(options.config)
    require_permission()
    instance = _take_instance_from_apply(settings)
    memory = MemoryFile(settings.state_dir)
    remembered = _load(memory)
    tools = Tools()
    done, problems = _revert_all(settings, remembered, tools)
    files: tuple[Outcome, ...] = ()
    try:
        backend = iptables_is(tools, _deadline())
        check = partial(check_restore, tools=tools)
        files = saving.revert_files(settings, backend, check, remembered, _warn)
    except BackendError as error:
        problems.append(f"saved rules: {error}")
    problems += saving.troubles(files)
    backups = saving.backups(settings)
    if remembered and not problems:
        try:
            memory.forget()
        except OSError as error:
            problems.append(f"{memory.path} stays: {error.strerror}: remove it by hand")
    try:
        MetricsFile(settings.metrics_textfile).remove()
    except OSError as error:
        problems.append(f"{settings.metrics_textfile} stays: {error.strerror}: remove it by hand")
    instance.release()
    if options.json:
        changes = [report.transaction_document(one) for one in done]
        document = {"saved_rules": saving.documents(files), "problems": problems}
        _print_json({"reverted": changes, **document, "backups": [str(one) for one in backups]})
        return report.EXIT_FAILING if problems else 0
    changed = (*report.diff(done, _DONE), *saving.lines(files))
    if changed or not problems:
        _print_lines(changed or ("nothing of snatd's is here",))
    _print_lines([f"{one} stays: the file as it was before snatd edited it" for one in backups])
    for problem in problems:
        _warn(f"not reverted: {problem}")
    return report.EXIT_FAILING if problems else 0


def _revert_all(
    settings: config.Config, remembered: dict[Key, Memory], tools: Tools
) -> tuple[list[Transaction], list[str]]:
    from snatd.host.flannel import read_lease
    from snatd.kernel.backends import all_tables
    from snatd.kernel.lock import XtablesLock

    lease = read_lease(settings.subnet_file)
    until_s = time.monotonic() + _UNDO_S
    done: list[Transaction] = []
    problems: list[str] = []
    # The guard goes last: until then what comes back hides nobody.
    every = all_tables(tools, XtablesLock(), only=None)
    for tables in sorted(every, key=lambda one: one.backend is Backend.GUARD):
        leased = None if isinstance(lease, Hold) else lease.of(tables.family)
        subnet = leased.subnet if leased else None
        if tables.backend is Backend.GUARD and tools.find("nft") is None:
            # Nor could it have been written, unless nft was taken away since.
            name = f"ip{'6' * (tables.family is Family.V6)} snatd"
            _warn(
                f"{tables.family.value} guard: not looked for, since nft is not installed: if it "
                f"was once, install nftables and look by `nft list table {name}`; "
                f"`nft delete table {name}` removes it"
            )
            continue
        where = (tables.family, tables.backend)
        memories = [memory for key, memory in remembered.items() if key[:2] == where]
        try:
            transaction = _revert_patiently(tables, memories, subnet, until_s)
            if transaction is not None:
                done.append(transaction)
        except BackendError as error:
            problems.append(f"{tables.family.value} {tables.backend.value}: {error}")
    return done, problems


def _revert_patiently(
    tables: Tables, memories: Sequence[Memory], subnet: Network | None, until_s: float
) -> Transaction | None:
    """What was done, if anything was. A held lock or a rival's write is no reason to leave rules
    behind: tried once, and again until that point of the clock."""
    told = False
    while True:
        try:
            return _revert_once(tables, memories, subnet, _deadline())
        except (BackendBusy, StaleRuleset) as error:
            if time.monotonic() >= until_s:
                raise
            if not told:
                _warn(f"tries again: {tables.family.value} {tables.backend.value}: {error}")
            told = True
            time.sleep(_TRY_AGAIN_S)


def _revert_once(
    tables: Tables, memories: Sequence[Memory], subnet: Network | None, deadline: Deadline
) -> Transaction | None:
    ruleset = tables.read(deadline, thorough=True)
    if tables.backend is Backend.GUARD:
        transaction = without_guard(ruleset)
    else:
        transaction = revert(ruleset, memories, subnet)
    if transaction is None or not transaction.edits:
        return None
    tables.apply(transaction, deadline)
    return transaction


def _save(options: argparse.Namespace) -> int:
    from snatd import saving
    from snatd.kernel.restore import check_restore, save_tables
    from snatd.node import open_edges, require_permission

    if options.without_dynamic and not options.full:
        raise Unanswerable("--without-dynamic says something only with --full")
    settings = config.load(options.config)
    require_permission()
    tools = Tools()
    dump = partial(save_tables, tools=tools) if options.full else None
    dry_run = options.dry_run or settings.mode == "observe"
    if dry_run and not options.dry_run:
        _warn('mode is "observe": nothing was written; this is what would be')
    edges = open_edges(settings, tools)
    answer = saving.save(
        settings,
        edges.read_node(_deadline()),
        partial(check_restore, tools=tools),
        dump,
        write=not dry_run,
        dynamic=not options.without_dynamic,
    )
    return _answer(options, answer)


def _flows(options: argparse.Namespace) -> int:
    from snatd.flows import flows
    from snatd.node import require_permission

    settings = config.load(options.config)
    require_permission()
    return _answer(options, flows(settings, options.delete))


def _verify(options: argparse.Namespace) -> int:
    from snatd.node import require_permission
    from snatd.verify import verify

    settings = config.load(options.config)
    require_permission()
    return _answer(options, verify(settings, options.destinations))


def _doctor(options: argparse.Namespace) -> int:
    from snatd.doctor import doctor
    from snatd.node import require_permission

    settings, complaints = config.read(options.config)
    require_permission()
    return _answer(options, doctor(settings, complaints))


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "check": _check,
    "apply": _apply,
    "confirm": _confirm,
    "status": _status,
    "revert": _revert,
    "save": _save,
    "flows": _flows,
    "verify": _verify,
    "explain": _explain,
    "doctor": _doctor,
}


def _answer(options: argparse.Namespace, answer: report.Answer) -> int:
    for warning in answer.warnings:
        _warn(warning)
    if options.json:
        _print_json(answer.document)
    else:
        _print_lines(answer.lines)
    return answer.exit_code


def _warn(text: str) -> None:
    write(sys.stderr, f"snatd: {text}\n")


def _print_json(document: dict[str, Any]) -> None:
    write(sys.stdout, json.dumps(document, indent=2) + "\n")


# Of a line that begins so: what goes, what comes, and how grave a finding is.
_COLOURS = (
    *(("-", "red"), ("+", "green")),
    *(("error: ", "bold red"), ("warning: ", "bold yellow"), ("info: ", "bold cyan")),
)


def _print_lines(lines: Sequence[str], to_stderr: bool = False) -> None:
    coloured = [
        (line, next((colour for head, colour in _COLOURS if line.startswith(head)), ""))
        for line in lines
    ]
    print_lines(sys.stderr if to_stderr else sys.stdout, coloured)
