"""The commands. Each prints what a person needs, or JSON, and returns its exit status."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from snatd import __version__, config, report
from snatd.core.deadline import Deadline
from snatd.core.errors import BackendError, ConfigError, NotPermitted
from snatd.core.model import Hold, Network, Ruleset
from snatd.core.plan import Transaction
from snatd.host import status
from snatd.host.confirm import Confirmation, confirm
from snatd.host.instance import AlreadyRunning, Instance
from snatd.host.memory import MemoryFile
from snatd.reconcile import Edges, View

_PASS_S = 20.0
_UNDO_S = 60.0

_DESCRIPTION = """\
Keeps the source address of container traffic inside a flannel network: the rule that masquerades
all that leaves this node's container subnet is narrowed to what leaves the cluster network.
"""

_EXITS = """\
exit status: 0 in sync (status: the daemon says so), 1 drift (status: not in sync; revert, confirm:
refused), 3 waiting for flannel or the bridge (status: not running), 4 a lock or a tool is busy or
fails, 77 not permitted, 78 the configuration is wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigError as error:
        print(*(f"snatd: {complaint}" for complaint in error.complaints), sep="\n", file=sys.stderr)
        return report.EXIT_CONFIG
    except NotPermitted as error:
        print(f"snatd: {error}", file=sys.stderr)
        return report.EXIT_NOT_PERMITTED
    except BrokenPipeError:
        # The reader of our output is gone (`snatd check | head -1`); what it read was right.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return report.EXIT_FAILING


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="snatd",
        description=_DESCRIPTION,
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"snatd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str, *, reports: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_EXITS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument(
            "--config",
            type=Path,
            metavar="PATH",
            help=f"configuration file (default: {config.DEFAULT_PATH} if it exists)",
        )
        if reports:
            one.add_argument("--json", action="store_true", help="print one JSON object")
        one.set_defaults(command=command)
        return one

    add("run", _run, "run the daemon in the foreground", reports=False)
    add("check", _check, "say what is wrong with this node's rules, and change nothing")
    apply = add("apply", _apply, "put this node's rules right once, and say what was done")
    apply.add_argument(
        "--confirm",
        type=_positive_seconds,
        metavar="SECONDS",
        help="put everything back unless a key is pressed or `snatd confirm` is called in time",
    )
    add("confirm", _confirm, "keep what a waiting `snatd apply --confirm` has done")
    add("status", _status, "show what the running daemon says of itself")
    add("revert", _revert, "put back the rules that were there before snatd's, and remove its own")
    return parser


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError("from 1 to 86400 seconds")
    return seconds


def _run(options: argparse.Namespace) -> int:
    from snatd.daemon import Daemon
    from snatd.host import journal
    from snatd.node import require_permission

    # Before the daemon listens to them these would end it: a reload right after a start.
    for number in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    settings = config.load(options.config)
    require_permission()
    journal.configure(settings.log_format, settings.log_level)
    try:
        return Daemon(settings, options.config).run()
    except AlreadyRunning as error:
        print(f"snatd: {error}", file=sys.stderr)
        return 1


def _deadline(limit_s: float = _PASS_S) -> Deadline:
    return Deadline(time.monotonic() + limit_s)


def _check(options: argparse.Namespace) -> int:
    from snatd.kernel.tools import Tools
    from snatd.node import open_edges, require_permission
    from snatd.reconcile import look

    settings = config.load(options.config)
    require_permission()
    view = look(open_edges(settings, Tools()), settings.policy, _deadline())
    if options.json:
        _print_json(report.document(view))
    else:
        _print_lines(report.lines(view, view.plan))
    return report.exit_code(view)


def _apply(options: argparse.Namespace) -> int:
    from snatd.kernel.tools import Tools
    from snatd.node import open_edges, require_permission
    from snatd.reconcile import look, reconcile

    settings = config.load(options.config)
    require_permission()
    edges = open_edges(settings, Tools(), _warn)
    if settings.mode == "observe":
        view = look(edges, settings.policy, _deadline())
        _warn('mode is "observe": nothing was written; this is what would be')
        _tell(options, view, view.plan, applied=())
        return report.exit_code(view)
    if options.confirm is not None:
        return _apply_until_confirmed(options, settings, edges)
    done = reconcile(edges, settings.policy, _deadline())
    _tell(options, done.view, done.applied, applied=done.applied)
    return report.exit_code(done.view)


def _tell(
    options: argparse.Namespace,
    view: View,
    shown: Sequence[Transaction],
    **lists: Sequence[Transaction],
) -> None:
    """The view and the transactions to be shown, or as JSON the view and named lists of them."""
    if options.json:
        changes = {
            name: [report.transaction_document(one) for one in ones] for name, ones in lists.items()
        }
        _print_json(report.document(view) | changes)
    else:
        _print_lines(report.lines(view, shown))


def _apply_until_confirmed(
    options: argparse.Namespace, settings: config.Config, edges: Edges
) -> int:
    from snatd.reconcile import put_back, reconcile

    instance = Instance(settings.runtime_dir)
    try:
        instance.take()
    except AlreadyRunning as error:
        _warn(f"{error}: it would redo what --confirm puts back; stop it first")
        return 1
    memory, remembered = MemoryFile(settings.state_dir), {}
    with suppress(OSError):  # what cannot be read will not be written either, and that is told
        remembered = memory.load()
    confirmation = Confirmation(settings.runtime_dir)
    done = reconcile(edges, settings.policy, _deadline())
    if done.applied:
        _print_lines(report.diff(done.applied), sys.stderr)
    confirmed = not done.applied or confirmation.wait(options.confirm)
    undoing = None if confirmed else put_back(done, edges, settings.policy, _deadline(_UNDO_S))
    confirmation.close()
    instance.release()
    if undoing is None:
        _tell(options, done.view, (), applied=done.applied, undone=())
        return report.exit_code(done.view)
    for problem in undoing.problems:
        _warn(f"NOT put back, the change is still in force: {problem}")
    if not undoing.problems:
        memory.store(remembered)
        _warn("not confirmed in time: everything is as it was before")
    _tell(options, undoing.view, (), applied=done.applied, undone=undoing.undone)
    return report.EXIT_FAILING if undoing.problems else report.exit_code(undoing.view)


def _confirm(options: argparse.Namespace) -> int:
    settings = config.load(options.config)
    found = confirm(settings.runtime_dir)
    if options.json:
        _print_json({"confirmed": found})
    else:
        print("confirmed" if found else "nothing is waiting to be confirmed")
    return 0 if found else 1


def _status(options: argparse.Namespace) -> int:
    document = status.read(config.runtime_dir(options.config))
    if document is None:
        if options.json:
            _print_json({"schema": status.SCHEMA, "running": False})
        else:
            print("snatd is not running")
        return 3
    if options.json:
        _print_json({"running": True, **document})
    else:
        _print_lines(report.status_lines(document))
    healthy = document["in_sync"] and not document["fighting"]
    return 0 if healthy and not document["configuration_refused"] else 1


def _revert(options: argparse.Namespace) -> int:
    from snatd.kernel.tools import Tools
    from snatd.node import require_permission

    settings = config.load(options.config)
    require_permission()
    instance = Instance(settings.runtime_dir)
    try:
        instance.take()
    except AlreadyRunning as error:
        _warn(f"{error}: it would put its rules back at once; stop it first")
        return 1
    done, problems = _revert_all(settings, Tools())
    instance.release()
    if options.json:
        changes = [report.transaction_document(one) for one in done]
        _print_json({"reverted": changes, "problems": problems})
    else:
        _print_lines(report.diff(done) or ("nothing of snatd's is here",))
        for problem in problems:
            _warn(problem)
    return report.EXIT_FAILING if problems else 0


def _revert_all(settings: config.Config, tools: Any) -> tuple[list[Transaction], list[str]]:
    from snatd.core.revert import revert
    from snatd.host.flannel import read_lease
    from snatd.kernel.backends import all_tables
    from snatd.kernel.lock import XtablesLock

    memory_file = MemoryFile(settings.state_dir)
    lease = read_lease(settings.subnet_file)
    deadline = _deadline()
    done: list[Transaction] = []
    problems: list[str] = []
    try:
        memories = memory_file.load()
    except OSError as error:
        memories = {}
        problems.append(f"{memory_file.path}: {error.strerror}")
    for tables in all_tables(tools, XtablesLock(), only=None):
        leased = None if isinstance(lease, Hold) else lease.of(tables.family)
        today: Network | None = leased.subnet if leased else None
        try:
            ruleset: Ruleset = tables.read(deadline, thorough=True)
            memory = memories.get((tables.family, tables.backend))
            transaction = revert(ruleset, memory, today)
            if transaction.edits:
                tables.apply(transaction, deadline)
                done.append(transaction)
        except BackendError as error:
            problems.append(f"{tables.family.value} {tables.backend.value}: {error}")
    if not problems:
        memory_file.forget()
    return done, problems


def _warn(text: str) -> None:
    print(f"snatd: {text}", file=sys.stderr)


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2))


def _print_lines(lines: Sequence[str], file: Any = None) -> None:
    file = file or sys.stdout
    colours = {"-": "\033[31m", "+": "\033[32m"} if file.isatty() else {}
    for line in lines:
        # A rule may hold any byte, and a terminal obeys some of them.
        safe = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in line)
        colour = colours.get(safe[:1])
        print(f"{colour}{safe}\033[0m" if colour else safe, file=file)
    file.flush()
