"""What the daemon finds out about the connections themselves, beside the rules: who could still
rewrite them, which are wrong since before, and a proof by packet.

Nothing here repairs a rule. It looks after a change and at each resync, and it may cost: so a look
waits until it takes no more than its share of a core, is done in stages, and gives way to whatever
the loop hears meanwhile; and connections are read in small steps from a child while the loop goes
on.
"""

from __future__ import annotations

import enum
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from snatd import report
from snatd.config import Config
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired
from snatd.core.errors import BackendError, BackendFailed, GaveWay, is_scarcity
from snatd.core.flows import Ids
from snatd.core.model import Address, Family, NodeState, count, join
from snatd.core.proof import INTERVAL_S, Limiter, Probe
from snatd.facts import now
from snatd.kernel.tools import Tools

if TYPE_CHECKING:
    from snatd.kernel.conntrack import Sweep, Tally
    from snatd.kernel.events import Writer
    from snatd.kernel.hooks import Hooks
    from snatd.suspects import Suspects

# A look waits for this long, so that several writes are one change; and until all looks together
# take no more than a share of a core.
_SETTLE_S = 0.05
# One that had to give way so often is not disturbed any more.
_MOST_PUT_OFF = 3
# One that descriptors or memory do not suffice for comes again after this.
_STARVED_S = 20.0


class Cause(enum.Enum):
    """Why to look again. The value is the share of a core that all such looks may take."""

    CHANGED = 0.05  # a repair, a start, a new configuration
    HEARD = 0.01  # somebody wrote to a nat table, and nothing was to be repaired
    RESYNC = 0.0005


_SWEEP_S = 20.0

Say = Callable[..., None]


def _stronger(one: Cause, other: Cause) -> Cause:
    return max(one, other, key=lambda cause: cause.value)


@dataclass
class _FamilyFlows:
    """The connections of one family as they were last counted. `before`: those that there were
    when the rules last changed, and None if they were not counted yet."""

    wrong: int = 0
    deleted: int = 0
    kept: int = 0
    changed: int = 0
    since: str = ""
    before: Ids | None = None
    cut_off: str | None = None


@dataclass(frozen=True)
class _Found:
    """What the last look found. `proved_at` is empty where nothing is proved."""

    suspects: tuple[Suspects, ...] = ()
    probes: tuple[Probe, ...] = ()
    probed_at: str = ""
    proved_at: str = ""
    wrong: tuple[str, ...] = ()


def load() -> None:
    """What a look imports: 0.2 s, once. No guard waits for it, and it is no part of what a look
    costs; but it comes before memory may be short, when an import can hang or crash."""
    import snatd.kernel.conntrack
    import snatd.kernel.links
    import snatd.kernel.probe
    import snatd.suspects
    import snatd.verify  # noqa: F401


@dataclass
class Evidence:
    """Looks when it is `due_s`; its sweep of connections is waited for in the loop's selector, for
    whose other descriptors a look gives way."""

    settings: Config
    tools: Tools
    selector: selectors.EpollSelector
    say: Say
    limiter: Limiter = field(default_factory=Limiter)
    look_limit_s: float = 5.0
    due_s: float | None = None
    _found: _Found = _Found()
    _flows: dict[Family, _FamilyFlows] = field(default_factory=dict)
    _node: NodeState | None = None
    _leased: tuple[Desired, ...] = ()
    _writers: dict[Writer, None] = field(default_factory=dict)
    """Who was heard since a look last told which rules there are."""
    _cause: Cause = Cause.RESYNC
    _stages: Iterator[None] | None = None
    """What is left of the look that began for `_doing`, and took `_took_s` so far."""
    _doing: Cause = Cause.RESYNC
    _took_s: float = 0.0
    _put_off: int = 0
    _unproved: bool = True
    _owed: bool = False
    """Whether a neighbour could not be asked because he was a moment ago."""
    _free_s: dict[Cause, float] = field(default_factory=lambda: dict.fromkeys(Cause, 0.0))
    _todo: deque[Desired] = field(default_factory=deque)
    _sweep: Sweep | None = None
    _sweep_began_s: float = 0.0
    _after_change: bool = False
    """Whether the sweep follows a change: it deletes what is configured, and counts anew."""

    @property
    def wrong(self) -> tuple[str, ...]:
        """What is wrong although the rules are in sync; it makes the daemon degraded."""
        return self._found.wrong

    @property
    def exposed(self) -> str:
        """The first rule that can SNAT cluster traffic, and why the guard does not keep it from
        that; empty where none can or none is known."""
        exposed = [one for one in self._found.suspects if one.rules]
        if not exposed:
            return ""
        from snatd.suspects import rule_lines

        why = {
            True: "the guard does not decide",
            False: "there is no guard",
            None: "whether a guard decides is not known",
        }[exposed[0].guarded]
        return f"{why}, and another rule {rule_lines(exposed)[0]}"

    def passed(
        self,
        node: NodeState | None,
        leased: tuple[Desired, ...],
        now_s: float,
        cause: Cause,
        writers: Iterable[Writer] = (),
    ) -> None:
        """A pass ended. The look itself comes later; one that had begun, begins again."""
        self._put_look_off()
        self._node, self._leased = node, leased
        self._writers |= dict.fromkeys(writers)
        self._cause = _stronger(self._cause, cause)
        if cause is Cause.CHANGED:
            # What was proved was proved of other rules.
            self._found = replace(self._found, proved_at="")
            self._unproved = True
        due_s = max(now_s + self._settle_s, self._free_s[self._cause])
        self.due_s = due_s if self.due_s is None else min(self.due_s, due_s)

    def waits_until_s(self) -> float | None:
        """When the loop has to come back at the latest."""
        times = [] if self._sweep is None else [self._sweep.ends_s]
        if self.due_s is not None and self._may_look():
            times.append(self.due_s)
        return min(times, default=None)

    def _may_look(self) -> bool:
        """Only after a change the connections are not counted to the end first."""
        return self._sweep is None or self._cause is Cause.CHANGED

    def turn(self, now_s: float) -> bool:
        """Does a stage of what is due; True where there is news for the status."""
        if self._sweep is not None and now_s >= self._sweep.ends_s:
            return self.step()
        if self.due_s is None or now_s < self.due_s or not self._may_look():
            return False
        try:
            load()
            if self._stages is None:
                self._begin()
            return self._go_on()
        except GaveWay:
            self._put_look_off()
            self.due_s = time.monotonic() + self._settle_s
        except (OSError, ImportError, MemoryError, SystemError) as error:
            if not is_scarcity(error):
                raise
            self._put_look_off()
            self.due_s = time.monotonic() + _STARVED_S
        return False

    @property
    def _settle_s(self) -> float:
        """Longer each time a look gave way, so that a burst is over before it gives way no more."""
        return float(_SETTLE_S * 4**self._put_off)

    def _begin(self) -> None:
        self._end_sweep()
        self._doing, self._cause = self._cause, Cause.RESYNC
        self._took_s = 0.0
        tools = self.tools
        if self._put_off < _MOST_PUT_OFF:
            tools = replace(tools, gives_way_to=self.selector.fileno())
        self._stages = self._look(tools)

    def _go_on(self) -> bool:
        assert self._stages is not None
        began_s = time.monotonic()
        for _ in self._stages:
            if self._put_off < _MOST_PUT_OFF:
                self._took_s += time.monotonic() - began_s
                return False
        self._took_s += time.monotonic() - began_s
        self._stages, self.due_s, self._put_off = None, None, 0
        self._pace(self._took_s)
        if self._owed and (self._unproved or self.exposed):
            self.due_s = began_s + INTERVAL_S
        return True

    def _put_look_off(self) -> None:
        """It begins again, for whatever it began for."""
        if self._stages is not None:
            self._stages = None
            self._put_off += 1
            self._cause = _stronger(self._cause, self._doing)

    def _pace(self, took_s: float) -> None:
        """Something that took so long ended now: how long its kind has to wait."""
        ended_s = time.monotonic()
        for cause in Cause:
            self._free_s[cause] = max(self._free_s[cause], ended_s + took_s / cause.value)

    def _look(self, tools: Tools) -> Iterator[None]:
        from snatd import suspects

        began_s = time.monotonic()
        if not self._leased:
            self._found = _Found()
        deadline = Deadline(began_s + self.look_limit_s)
        found: tuple[Suspects, ...] = ()
        for one in self._leased:
            found += (suspects.of_family(one, self.settings.marks, tools, deadline),)
            yield
        none = all(one.none for one in found)
        if none and self._found.wrong and any(one.rules for one in self._found.suspects):
            # Whose doing it was is gone. That it is right again has to be seen yet.
            self._found, self._unproved = replace(self._found, wrong=()), True
        proved_at = self._found.proved_at if none else ""
        self._found = replace(self._found, suspects=found, proved_at=proved_at)
        writers, self._writers = tuple(self._writers), {}
        self.say(
            "can_snat",
            "warning",
            suspects.rule_lines(found),
            over="none_can_snat",
            guard=self._guard(found),
            writer=join(writers) if writers else None,
            writer_comm=[writer.comm for writer in writers] or None,
            writer_pid=[writer.pid for writer in writers] or None,
            writer_unit=[writer.of for writer in writers if writer.of] or None,
            hint="snatd explain",
        )
        self.say(
            "before_guard",
            "warning",
            suspects.earlier_lines(found),
            writer=join(writers) if writers else None,
            writer_comm=[writer.comm for writer in writers] or None,
            writer_pid=[writer.pid for writer in writers] or None,
            writer_unit=[writer.of for writer in writers if writer.of] or None,
            hint="give it a priority above -199",
        )
        when = self.settings.probe
        doubt = self._unproved or self.wrong or any(one.rules for one in found)
        if when == "resync" or (when == "repair" and doubt):
            self._probe(began_s)
            yield
        if self.settings.stale_flows != "off":
            self._begin_sweeps()

    def _guard(self, found: Iterable[Suspects]) -> str:
        """Why the guard does not keep rules that can SNAT from doing so."""
        guarded = {one.guarded for one in found if one.rules}
        if None in guarded:
            return "not known"
        if False not in guarded:
            return "there, and does not decide for all of this traffic"
        if self.settings.guard == "off":
            return 'none: guard is "off"'
        return "none: mode is observe" if self.settings.mode == "observe" else "none"

    def _probe(self, now_s: float) -> None:
        from snatd.verify import probe

        made: list[Probe] = []
        there: set[Address] = set()

        def allowed(neighbours: tuple[Address, ...]) -> tuple[Address, ...]:
            there.update(neighbours)
            self.limiter, some = self.limiter.allow(neighbours, now_s)
            self._owed = self._owed or len(some) < len(neighbours)
            return some

        self._owed = False

        for one in self._leased:
            assert self._node is not None
            with suppress(BackendError):  # the pass has told what cannot be read
                made += probe(one, self._node, allowed, 0.0)
        if not made:
            return
        # Who may not be asked again yet has still answered what he answered.
        asked = {one.destination for one in made}
        made += [one for one in self._found.probes if one.destination in there - asked]
        answered = [one for one in made if one.inside and one.kept is not None]
        wrong = [told for one in answered if (told := self._doubt(one))]
        certain = all(one.none for one in self._found.suspects)
        self._unproved = False
        self._found = replace(
            self._found,
            probes=tuple(made),
            probed_at=now(),
            proved_at=now() if answered and certain and not wrong else "",
            wrong=tuple(wrong),
        )
        hint = "snatd verify; snatd explain"
        self.say("not_kept", "error", wrong, over="kept_again", hint=hint)

    def _doubt(self, one: Probe) -> str:
        from snatd.verify import doubt

        found = {suspect.desired.family: suspect for suspect in self._found.suspects}

        def read(family: Family) -> Hooks:
            hooks = found[family].hooks
            if hooks is None:
                raise BackendFailed("; ".join(found[family].unknown))
            return hooks

        if one.kept and all(suspect.none for suspect in found.values()):
            return ""  # what the rules say of all such packets
        return doubt(one, read)

    def _begin_sweeps(self) -> None:
        self._after_change = self._doing is Cause.CHANGED
        self._todo = deque(self._leased)
        self._flows = {
            one.family: self._flows.get(one.family, _FamilyFlows()) for one in self._todo
        }
        self._next_sweep()

    def _next_sweep(self) -> None:
        from snatd.kernel.conntrack import Sweep

        while self._todo and self._sweep is None:
            one = self._todo[0]
            acts = self._after_change and self.settings.mode == "enforce"
            if self._after_change:
                self._flows[one.family].before = None  # half a MiB or more, and there comes another
            self._sweep_began_s = time.monotonic()
            try:
                self._sweep = Sweep(
                    one,
                    self.tools,
                    _SWEEP_S,
                    marks=self.settings.marks,
                    policy=self.settings.stale_flows if acts else "report",
                    census=True,
                    before=self._flows[one.family].before,
                )
            except BackendError as error:
                self._todo.popleft()
                self._say_unknown(one.family, str(error))
            else:
                self.selector.register(self._sweep, selectors.EVENT_READ, self.step)

    def step(self) -> bool:
        """Reads on in the sweep; True where it is done, and so news for the status."""
        if self._sweep is None:
            return False
        sweep = self._sweep
        descriptor = sweep.fileno()
        try:
            sweep.step()
        except BackendError as error:
            self._say_unknown(self._todo[0].family, str(error))
        else:
            if sweep.tally is None:
                return False
            self._say_unknown(self._todo[0].family, "")
            self._count(self._todo[0], sweep.tally)
        self.selector.unregister(descriptor)
        self._sweep = None
        self._todo.popleft()
        self._pace(time.monotonic() - self._sweep_began_s)
        self._next_sweep()
        return True

    def _say_unknown(self, family: Family, why: str) -> None:
        hint = "install conntrack, or load nf_conntrack_netlink"
        what = f"{family.value}: {why}" if why else ""
        self.say("flows_unknown", "warning", what, over="flows_known", about=family, hint=hint)

    def _count(self, desired: Desired, tally: Tally) -> None:
        flows = self._flows[desired.family]
        flows.wrong, flows.cut_off = tally.wrong - tally.deleted, tally.cut_off
        if self._after_change or flows.before is None:
            flows.deleted += tally.deleted
            flows.kept = flows.changed = 0
            flows.since, flows.before = now(), tally.ids
            self.say("flows_changed", "warning", "", about=desired.family)
            self.say(
                "stale_flows",
                "info",
                f"{count(tally.wrong, 'connection')} from {desired.subnet} seen as somebody "
                f"else, begun before the last change or start; {tally.deleted} deleted"
                if tally.wrong
                else "",
                # The same ones after the next repair are no news; deleted ones were others.
                same=(tally.wrong, flows.since if tally.deleted else None),
                about=desired.family,
                hint="snatd flows",
            )
        else:
            flows.kept, flows.changed = tally.kept, tally.changed
            self.say(
                "flows_changed",
                "warning",
                f"{count(tally.changed, 'new connection')} from {desired.subnet} did not keep the "
                "address of its container"
                if tally.changed
                else "",
                same=tally.changed > 0,  # more of them are no news
                about=desired.family,
                hint="snatd flows; snatd explain",
            )

    def _end_sweep(self) -> None:
        if self._sweep is not None:
            self.selector.unregister(self._sweep)
            self._sweep.close()
            self._sweep = None

    def close(self) -> None:
        self._end_sweep()

    def document(self) -> dict[str, Any]:
        """For the status file."""
        found, named = self._found, []
        if found.suspects:
            from snatd import suspects

            named = suspects.document(found.suspects)
        return {
            "suspects": named,
            "proof": {
                "proved_at": found.proved_at or None,
                "probed_at": found.probed_at or None,
                "probes": [report.probe_document(one) for one in found.probes],
                "wrong": list(found.wrong),
            },
            "flows": [
                {
                    "family": family.value,
                    "stale": one.wrong,
                    "deleted": one.deleted,
                    "since": one.since or None,
                    "kept_since": one.kept,
                    "kept_one_in": one.before.one_in if one.before is not None else 1,
                    "changed_since": one.changed,
                    "cut_off": one.cut_off,
                }
                for family, one in self._flows.items()
            ],
        }
