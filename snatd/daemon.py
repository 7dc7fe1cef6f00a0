"""The loop: one thread waits in one place and decides when to look.

Decides nothing about rules; a pass (`reconcile`) does.
"""

from __future__ import annotations

import os
import random
import selectors
import signal
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from snatd import __version__, config, report
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import BackendBusy, ConfigError, NotConverged, is_scarcity
from snatd.core.model import Backend, Family, Lease, Policy, join
from snatd.core.plan import Transaction
from snatd.core.proof import Limiter
from snatd.core.schedule import Schedule
from snatd.counts import Counts
from snatd.evidence import Cause, Evidence, load
from snatd.facts import Causes, Facts
from snatd.host import journal, status
from snatd.host.files import sweep
from snatd.host.instance import Instance
from snatd.host.memory import MemoryFile
from snatd.host.metrics import Metric, MetricsFile
from snatd.host.notify import Notifier
from snatd.kernel import lock
from snatd.kernel.events import Event, LegacyPoll, LinkEar, NftEar, Tables, Writer, who_wrote
from snatd.kernel.legacy import LegacyTables
from snatd.kernel.restore import check_restore
from snatd.kernel.tools import Tools
from snatd.node import open_edges
from snatd.reconcile import Edges, Pass, Problem, View, look, reconcile
from snatd.saving import Saving

# A pass's time-outs together, and never more than this share of systemd's watchdog.
_PASS_S = 20.0
_SHARE_OF_WATCHDOG = 0.4
# After each pass the status file is written, so it is never older than a resync, a pass and this.
_SPARE_S = 10.0
# READY=1 after the first pass whatever it gave, or after this: other services wait for it at boot.
_FIRST_PASS_S = 9.0
# Where inotify is used up, subnet.env is looked at this often.
_UNWATCHED_S = 5.0
# Out of memory: the loop's next turn comes after this.
_STARVED_S = 0.5

# Bytes on the wake pipe; signals write their own numbers (1 to 64).
_SUBNET_FILE, _XTABLES_LOCK = 0xF0, 0xF1
_WOKEN_BY = {_SUBNET_FILE: "subnet_file", _XTABLES_LOCK: "xtables_lock"}


class Daemon:
    """One run of `snatd run`."""

    def __init__(self, settings: config.Config, path: Path | None) -> None:
        self._path = path
        self._settings = settings
        self._log = journal.logger()
        self._tools = Tools()
        self._lock = lock.XtablesLock()
        self._poll = LegacyPoll()
        self._edges = self._open_edges(settings)
        self._schedule = Schedule(resync_s=settings.resync)
        self._notifier = Notifier()
        self._instance = Instance(settings.runtime_dir)
        self._selector = selectors.EpollSelector()
        self._ears: list[NftEar | LinkEar] = []
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watch: Any = None
        self._stopping = False
        self._triggers: Counter[str] = Counter({"start": 1})
        self._writers: dict[Writer, Tables] = {}
        # Of them: who was heard during the last pass, and so may be repaired already.
        self._late: set[Writer] = set()
        self._told: dict[object, tuple[Any, Any]] = {}
        # Of the repairs in a row: when the first was due, and how many there were before.
        self._episode = (time.monotonic(), 0)
        self._evidence = self._gather(Limiter())
        self._saving = self._look_after_files()
        self._facts = Facts(settings.mode)
        self._counts = Counts()
        self._metrics = MetricsFile(settings.metrics_textfile)

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT; leaves the rules as they are. Raises AlreadyRunning, also
        later, where somebody removed the lock and another daemon took it, and ConfigError."""
        self._instance.take()
        self._sweep()
        self._metrics.check()
        self._open()
        self._log.info("started", version=__version__, mode=self._settings.mode)
        self._pass(_FIRST_PASS_S)
        self._notifier.ready()
        self._open_watch()
        with suppress(OSError, ImportError, MemoryError):  # the first look tries again
            load()
        # The look that follows finds what came before the watch did.
        self._heard(Event("watch_started"))
        while not self._stopping:
            try:
                self._turn()
            except MemoryError:
                # Whatever it was about, the pass that follows looks at everything anew.
                self._schedule = self._schedule.event()
                time.sleep(_STARVED_S)
        self._notifier.stopping()
        self._evidence.close()
        if self._watch is not None:
            self._watch.stop()
        with suppress(OSError):
            status.path_in(self._settings.runtime_dir).unlink(missing_ok=True)
        if self._metrics.due_s is not None:
            self._write_metrics(self._metrics.due_s)
        self._log.info("stopped", rules="left in place; `snatd revert` removes them")
        return 0

    def _sweep(self) -> None:
        """Removes what an earlier daemon, killed, left beside the files that it wrote."""
        for path in (
            status.path_in(self._settings.runtime_dir),
            MemoryFile(self._settings.state_dir).path,
        ):
            with suppress(OSError):
                sweep(path)

    def _open_edges(self, settings: config.Config) -> Edges:
        return open_edges(
            settings, self._tools, self._complain, self._lock, digests=self._poll.digests
        )

    def _open(self) -> None:
        # The ears come before the first look, so that nothing falls between.
        for ear in (NftEar(self._tools.own_pids), LinkEar()):
            self._hear(ear)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)

    def _hear(self, ear: NftEar | LinkEar) -> None:
        self._ears.append(ear)
        self._selector.register(ear, selectors.EVENT_READ, partial(self._listen, ear))

    def _gather(self, limiter: Limiter) -> Evidence:
        return Evidence(self._settings, self._tools, self._selector, self._say, limiter)

    def _look_after_files(self) -> Saving:
        return Saving(self._settings, partial(check_restore, tools=self._tools), self._say)

    def _open_watch(self) -> None:
        try:
            # After READY: the import costs 80 ms.
            from snatd.host.watch import FileWatch

            watch = FileWatch()
            watch.add(self._settings.subnet_file, lambda: self._wake(_SUBNET_FILE))
            watch.add(lock.PATH, lambda: self._wake(_XTABLES_LOCK), release=True)
            watch.start()
        except (OSError, ImportError, MemoryError) as error:
            if not is_scarcity(error):
                raise
            self._watched(f"inotify: {getattr(error, 'strerror', None) or error}")
        else:
            self._watch = watch
            self._rearm()

    def _wake(self, reason: int) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_writer, bytes((reason,)))

    def _turn(self) -> None:
        now_s = time.monotonic()
        waits = [self._schedule.due_s(now_s)]
        # Where a pass is asked for already, a difference would be no news.
        if not self._schedule.asked:
            waits.append(self._poll.due_s)
        if self._notifier.watchdog_s is not None:
            waits.append(now_s + self._notifier.watchdog_s / 4)
        if (evidence_s := self._evidence.waits_until_s()) is not None:
            waits.append(evidence_s)
        if self._saving.due_s is not None:
            waits.append(self._saving.due_s)
        if self._metrics.due_s is not None:
            waits.append(self._metrics.due_s)
        news = [key.data() for key, _ in self._selector.select(max(0.0, min(waits) - now_s))]
        now_s = time.monotonic()
        if now_s >= self._poll.due_s and not self._schedule.asked:
            for event in self._poll.events(now_s):
                self._heard(event)
        if not self._stopping and now_s >= self._schedule.due_s(now_s):
            self._pass(_PASS_S)
        elif (
            self._saving.turn(now_s)
            or self._evidence.turn(now_s)
            or any(news)
            or self._metrics.is_due(now_s)
        ):
            self._publish()
        self._notifier.alive(time.monotonic())

    def _listen(self, ear: Any) -> None:
        try:
            for event in ear.events():
                self._heard(event)
        except OSError as error:
            # The socket is dead. Another one, and a look, since it may have missed something.
            self._log.warning("ear_reopened", source=ear.source, error=str(error))
            with suppress(KeyError, ValueError):
                self._selector.unregister(ear)
            ear.close()
            self._ears.remove(ear)
            self._hear(NftEar(self._tools.own_pids) if isinstance(ear, NftEar) else LinkEar())
            self._heard(Event(ear.source))

    def _heard(self, event: Event) -> None:
        self._schedule = self._schedule.event()
        self._counts.heard(time.monotonic(), overflow=event.overflow)
        self._triggers[event.source] += 1
        self._facts.heard(event.source, event.writer)
        if event.writer is not None:
            self._late.discard(event.writer)
            wrote = self._writers.get(event.writer, frozenset())
            self._writers[event.writer] = wrote | event.wrote

    def _woken(self) -> None:
        for byte in os.read(self._wake_reader, 4096):
            if byte in _WOKEN_BY:
                self._heard(Event(_WOKEN_BY[byte]))
            elif byte in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True
            elif byte == signal.SIGHUP:
                self._reload()
            elif byte == signal.SIGUSR1:
                self._summarise()

    def _reload(self) -> None:
        self._notifier.reloading()
        try:
            new = config.load(self._path)
            metrics = MetricsFile(new.metrics_textfile)
            metrics.check()
        except ConfigError as error:
            # The old configuration stays in force, and STATUS says so until a good one comes.
            self._facts.refused(error.complaints)
            self._log.error("configuration_refused", why=list(error.complaints), hint=_REFUSED_HELP)
        else:
            if new.runtime_dir != self._settings.runtime_dir:
                self._log.warning(
                    "needs_restart", key="runtime_dir", hint="systemctl restart snatd"
                )
            self._facts.refused(None)
            # The lock and the status file stay where everybody looks for them until a restart.
            new = replace(new, runtime_dir=self._settings.runtime_dir)
            self._settings = new
            self._facts.mode = new.mode
            journal.configure(new.log_format, new.log_level)
            self._log = journal.logger()
            self._edges = self._open_edges(new)
            self._schedule = replace(self._schedule, resync_s=new.resync)
            # Each state is told anew, or told to be over.
            self._told = {key: (object(), what) for key, (_, what) in self._told.items() if what}
            self._evidence.close()
            self._evidence = self._gather(self._evidence.limiter)
            self._saving = self._look_after_files()
            if new.metrics_textfile != self._metrics.path:
                with suppress(OSError):
                    self._metrics.remove()
            self._metrics = metrics
            if self._watch is not None:
                self._watch.stop()
                self._watch = None
            self._open_watch()
            self._log.info("configuration_loaded", mode=new.mode)
        self._heard(Event("reload"))
        self._publish()
        self._notifier.ready()

    def _pass(self, limit_s: float) -> None:
        triggers, writers, late = self._triggers, self._writers, self._late
        self._triggers, self._writers, self._late = Counter(), {}, set()
        started_s = time.monotonic()
        self._counts.begun(started_s)
        if self._instance.keep():
            self._log.warning("lock_restored", path=str(self._instance.path), hint=_LOCK_HELP)
        self._rearm()
        self._poll.rebase(started_s)
        deadline = Deadline(started_s + self._within_watchdog_s(limit_s))
        policy = self._settings.policy
        done = self._reconcile(policy, deadline)
        enforce = self._settings.mode == "enforce"
        planned = () if enforce else done.view.plan
        if done.applied or planned:
            # Who wrote may have been heard only while this pass was on its way.
            for ear in tuple(self._ears):
                self._listen(ear)
            for writer, wrote in self._writers.items():
                writers[writer] = writers.get(writer, frozenset()) | wrote
            late -= self._writers.keys()
            self._late = set(self._writers)
        causes = {one: _causes(one, writers, late) for one in done.applied}
        rivals = dict.fromkeys(by for one in planned for by in _causes(one, writers, late))
        ended_s = time.monotonic()
        if self._schedule.rested(started_s):
            self._episode = (started_s, self._facts.repairs)
        was_fighting = self._schedule.fighting
        self._schedule = self._schedule.passed(
            ended_s,
            repaired=bool(done.applied) and "start" not in triggers,
            failed=bool(done.view.problems),
            jitter=random.random(),
        )
        if was_fighting and not self._schedule.fighting:
            self._rearm()
            self._heard(Event("watch_started"))
        if self._triggers:  # heard during the pass, perhaps after its last look
            self._schedule = self._schedule.event()
        if any(one.backend is Backend.LEGACY for one in done.applied):
            # The digest that the poll compares with is older than our own write. A look after the
            # next `rebase` makes sure that nobody came between the two.
            self._schedule = self._schedule.event()
            self._triggers["read_back"] += 1
        self._listen_to_bridge(done)
        self._facts.passed(done, triggers, causes, time.monotonic() - started_s)
        programs = {one: {writer.program for writer in by} for one, by in causes.items()}
        self._counts.passed(done, programs, ended_s - started_s, ended_s, enforce=enforce)
        # What was waited for came before what was done then.
        self._say("holding", "info", list(done.view.holds), over="hold_ended", hint=_HOLD_HELP)
        self._tell_fight(done, causes, ended_s, was_fighting)
        if not (self._schedule.fighting and was_fighting):
            self._tell_changes(causes, triggers, ended_s - started_s)
        self._tell_state(done, tuple(rivals))
        # In a fight each repair is undone: what begins counts from its beginning to its end.
        fighting = self._schedule.fighting and was_fighting
        changed = not fighting and (bool(done.applied) or was_fighting)
        self._look_further(done, triggers, writers, ended_s, changed=changed)
        self._publish()

    def _within_watchdog_s(self, limit_s: float) -> float:
        watchdog_s = self._notifier.watchdog_s
        return limit_s if watchdog_s is None else min(limit_s, watchdog_s * _SHARE_OF_WATCHDOG)

    def _reconcile(self, policy: Policy, deadline: Deadline) -> Pass:
        try:
            if self._settings.mode == "observe":
                return Pass(look(self._edges, policy, deadline))
            return reconcile(self._edges, policy, deadline)
        except (OSError, ImportError, MemoryError) as error:
            if not is_scarcity(error):
                raise
            # Each write is whole or not at all, so what was done so far is right as it is.
            why = getattr(error, "strerror", None) or str(error) or "no memory"
            return Pass(View(problems=(Problem(BackendBusy(f"not enough for a pass: {why}")),)))
        finally:
            # Of tables with many rules: nothing of them stays in memory between two passes.
            self._poll.digests()
            for tables in self._edges.tables:
                if isinstance(tables, LegacyTables):
                    tables.forget()

    def _look_further(
        self,
        done: Pass,
        triggers: Counter[str],
        writers: Iterable[Writer],
        now_s: float,
        *,
        changed: bool,
    ) -> None:
        if self._notifier.watchdog_s is not None:
            share_s = self._notifier.watchdog_s * _SHARE_OF_WATCHDOG / 4
            self._evidence.look_limit_s = min(self._evidence.look_limit_s, share_s)
            self._saving.look_limit_s = min(self._saving.look_limit_s, share_s)
        cause = Cause.RESYNC
        if changed or not {"start", "reload"}.isdisjoint(triggers):
            cause = Cause.CHANGED
        elif not {NftEar.source, LegacyPoll.source, "xtables_lock"}.isdisjoint(triggers):
            cause = Cause.HEARD
        self._evidence.passed(done.view.node, done.view.leased, now_s, cause, writers)
        self._saving.passed(done.view, now_s)

    def _listen_to_bridge(self, done: Pass) -> None:
        links = done.view.node.links if done.view.node else ()
        bridges = {one.bridge for one in done.view.wanted.values() if isinstance(one, Desired)}
        for ear in self._ears:
            if isinstance(ear, LinkEar):
                ear.bridges = {
                    link.index: os.fsencode(link.name) for link in links if link.name in bridges
                }

    def _rearm(self) -> None:
        if self._watch is not None:
            # In a fight the passes come unasked, and each of the rival's writes would only wake up
            # four threads: half of what a fight on legacy costs.
            resting = (lock.PATH,) if self._schedule.fighting else ()
            self._watched("; ".join(self._watch.rearm(resting)))
        elif self._facts.passes:  # it was tried before, and could not be had
            self._open_watch()

    def _watched(self, problem: str) -> None:
        """Where a file cannot be watched, passes come often enough to notice all the same."""
        resync_s = self._settings.resync
        if problem:
            resync_s = min(resync_s, _UNWATCHED_S)
        self._schedule = replace(self._schedule, resync_s=resync_s)
        self._say("watch_failed", "warning", problem, over="watch_restored", hint=_INOTIFY_HELP)

    def _tell_fight(self, done: Pass, causes: Causes, ended_s: float, was_fighting: bool) -> None:
        """One line when a fight begins and one when it ends; no repair is told between them."""
        if not (self._schedule.fighting or was_fighting):
            return
        # A script has another pid at each write: the last one of a name says enough.
        writers = [writer for several in causes.values() for writer in several]
        last = {(writer.comm, writer.of): writer for writer in writers}
        placed = {comm for comm, of in last if of}
        # One that was gone before its unit was seen is the same rival's.
        names = [one for (comm, of), one in last.items() if of or comm not in placed]
        began_s, before = self._episode
        repairs, lasted_s = self._facts.repairs - before, round(ended_s - began_s, 1)
        if not self._schedule.fighting:
            writer = self._facts.fight_ended(repairs)
            self._log.info("fight_ended", writer=writer, repairs=repairs, lasted_s=lasted_s)
            self._episode = (ended_s, self._facts.repairs)
            return
        self._facts.fights(names, repairs, lasted_s)
        if not was_fighting:
            self._counts.fights += 1
            self._log.warning(
                "fighting",
                writer=join(names) if names else None,
                repairs=repairs,
                lasted_s=lasted_s,
                guard=report.guard_meanwhile(done.view, undone=self._facts.guard_is_undone),
                hint=_FIGHT_HELP,
            )

    def _tell_changes(self, causes: Causes, triggers: Counter[str], duration_s: float) -> None:
        # A quick rival undoes a write before it is read back: one repair to a reader.
        for one, named in causes.items():
            for reason in one.reasons:
                self._log.info(
                    reason.change.value,
                    priority=journal.NOTICE,
                    family=one.family.value,
                    backend=one.backend.value,
                    rule=list(one.added) or None,
                    removed=list(one.removed_for(reason)) or None,
                    why=reason.why,
                    trigger=",".join(triggers) or "resync",
                    writer=join(named) if named else None,
                    writer_comm=[writer.comm for writer in named] or None,
                    writer_pid=[writer.pid for writer in named] or None,
                    writer_unit=[writer.of for writer in named if writer.of] or None,
                    duration_ms=round(duration_s * 1000, 1),
                )

    def _tell_state(self, done: Pass, rivals: Sequence[Writer]) -> None:
        """Says what is new about the state, and nothing while nothing is. `rivals`: who may have
        caused what is only planned."""
        view = done.view
        self._say("cut_out", "info", list(report.cut_out_lines(view)))
        self._say(
            "no_guard", "warning", list(map(str, view.unguarded)), over="guarded", hint=_UNGUARDED
        )
        # The first time-outs of a busy lock are nobody's worry, nor is a rival who was quicker; the
        # third in a row is.
        busy = report.is_busy(view) and self._schedule.failures < 3
        if not busy:
            level = "warning" if report.is_busy(view) else "error"
            # Who holds a lock changes, and what a rival made of a write; the trouble is the same.
            same = [
                one.error.label if isinstance(one.error, BackendBusy | NotConverged) else str(one)
                for one in view.problems
            ]
            problems = list(map(str, view.problems))
            self._say("backend_failed", level, problems, same, over="recovered", hint=_FAILED_HELP)
        lease = view.node.lease if view.node else None
        leased = isinstance(lease, Lease) and lease.of(Family.V6) is not None
        skipped = leased and view.node is not None and not view.node.ipv6
        why = "IPv6 is leased, and switched off in this kernel"
        hint = "only IPv4 is looked after"
        self._say("ipv6_skipped", "info", why if skipped else "", hint=hint)
        if self._settings.mode == "observe":
            # A rival's copies are no news, however many there are.
            changes = list(dict.fromkeys(report.diff(view.plan)))
            self._say(
                "would_change",
                "warning",
                changes,
                over="in_sync",
                writer=join(rivals) if rivals else None,
                writer_comm=[writer.comm for writer in rivals] or None,
                writer_pid=[writer.pid for writer in rivals] or None,
                writer_unit=[writer.of for writer in rivals if writer.of] or None,
                hint=_OBSERVE_HELP,
            )

    def _say(
        self,
        event: str,
        level: str,
        what: Any,
        same: Any = None,
        over: str | None = None,
        about: Family | None = None,
        **fields: Any,
    ) -> None:
        """Logs an event when its content (or `same`, what matters of it) differs from the last
        time, that of each family apart; `over` when it is empty, with what it was."""
        matters = what if same is None else same
        before, was = self._told.get((event, about), (None, None))
        self._told[event, about] = (matters, what)
        if matters == before or (not matters and not before):
            return
        if what:
            getattr(self._log, level)(event, what=what, **fields)
        elif over is not None:
            self._log.info(over, was=was)

    def _complain(self, text: str) -> None:
        self._say("state_not_kept", "warning", text)

    def _publish(self) -> None:
        saved_rules = {"saved_rules": self._saving.document()}
        self._facts.found(self._evidence.document() | saved_rules, self._evidence.exposed)
        self._write_metrics(time.monotonic())
        try:
            document = self._facts.document()
            pass_s = self._within_watchdog_s(_PASS_S)
            longest_silence_s = self._schedule.resync_s + pass_s + _SPARE_S
            status.write(self._settings.runtime_dir, document, longest_silence_s)
        except OSError as error:
            path = status.path_in(self._settings.runtime_dir)
            hint = "`snatd status` has nothing to tell meanwhile; snatd doctor"
            self._say("status_not_written", "warning", f"{path}: {error.strerror}", hint=hint)
        else:
            self._say("status_not_written", "warning", "")
        self._notifier.status(self._facts.headline())

    def _write_metrics(self, now_s: float) -> None:
        def metrics() -> tuple[Metric, ...]:
            document = self._facts.document()
            waits = (lock.waits.count, lock.waits.total_s)
            return self._counts.metrics(document, self._settings.resync, waits)

        self._metrics.offer(now_s, metrics)
        problem = self._metrics.problem
        self._facts.metrics_problem = problem or None
        hint = "tried again after each pass"
        self._say("metrics_not_written", "warning", problem, over="metrics_written", hint=hint)

    def _summarise(self) -> None:
        self._publish()
        self._log.info(
            "summary",
            status=self._facts.headline(),
            repairs=self._facts.repairs,
            passes=self._facts.passes,
            events=dict(self._facts.events),
            dropped_log_lines=journal.dropped["lines"],
        )


def _causes(
    one: Transaction, writers: Mapping[Writer, Tables], late: Collection[Writer]
) -> tuple[Writer, ...]:
    """Who may have caused a repair: those heard since the pass before, or else those heard during
    that one, whose writes it has mostly seen already."""
    named = who_wrote(writers, one.family, one.backend)
    return tuple(writer for writer in named if writer not in late) or named


_UNGUARDED = (
    "only the rules are narrowed: until a repair, and by chains of others, some may be SNATed"
)
_HOLD_HELP = "what hangs on it is not changed or removed meanwhile; it goes on by itself"
_FAILED_HELP = "tried again at least every 30 s; snatd check"
_FIGHT_HELP = (
    "have that program not write it; repairs go on, up to 5 s apart, not logged one by one"
)
_OBSERVE_HELP = "nothing was changed, since mode is observe"
_REFUSED_HELP = "the old configuration stays in force; snatd check; systemctl reload snatd"
_LOCK_HELP = "it was taken again; find out what removes files there"
_INOTIFY_HELP = (
    "looked at every 5 s meanwhile; fs.inotify.max_user_instances and max_user_watches may be "
    "used up"
)
