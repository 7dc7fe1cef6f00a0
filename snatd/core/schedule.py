"""When the next pass runs. Time is an argument (seconds of a monotonic clock), never asked for.

An event is acted on at once after quiet; a storm of events is paced; an error is retried with
doubling delays; a rival that undoes every repair is given ever more time; and the resync comes
whatever happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Bucket:
    """Tokens that come back with time: a burst is free, what is sustained is not."""

    size: float
    per_s: float
    tokens: float
    at_s: float = 0.0

    def level(self, now_s: float) -> float:
        return min(self.size, self.tokens + max(0.0, now_s - self.at_s) * self.per_s)

    def take(self, now_s: float) -> Bucket:
        return replace(self, tokens=max(0.0, self.level(now_s) - 1), at_s=now_s)


def bucket(size: float, per_s: float) -> Bucket:
    return Bucket(size, per_s, size)


@dataclass(frozen=True)
class Schedule:
    """The state of the clockwork after the last pass; `due_s` says when the next one is."""

    resync_s: float
    settle_s: float = 0.02
    retry_s: float = 0.5
    longest_wait_s: float = 30.0
    # What a rival undoes is wrong until it is repaired; one repair in 5 s is under 1 % of a core.
    longest_fight_s: float = 5.0
    ended_s: float | None = None
    asked: bool = True
    failures: int = 0
    jitter: float = 0.0
    lost_rounds: int = 0
    """Repairs in a row that the rival undid, counted once the free ones are used up."""
    # Docker's restart writes three times in 0.4 s and an operator's loop once a second: both are
    # repaired at once. Five writes a second for more than 5 s are a fight.
    repairs: Bucket = field(default_factory=lambda: bucket(20, 1))
    # A pass costs about 10 ms of a core, so two a second in a lasting storm are 2 %.
    looks: Bucket = field(default_factory=lambda: bucket(30, 2))

    @property
    def fighting(self) -> bool:
        return self.lost_rounds > 0

    def rested(self, now_s: float) -> bool:
        """Whether all free repairs are there: what is repaired now is the first in a row."""
        return not self.fighting and self.repairs.level(now_s) >= self.repairs.size

    def event(self) -> Schedule:
        """Something may have changed: look."""
        return replace(self, asked=True)

    def passed(self, now_s: float, *, repaired: bool, failed: bool, jitter: float) -> Schedule:
        """A pass ended. `jitter` is a random number in [0, 1) that spreads the retries of many."""
        repairs, lost_rounds = self.repairs, 0
        if repaired:
            # A lost round gives no free repairs back: the fight ends when a pass finds quiet.
            exhausted = self.fighting or repairs.level(now_s) < 1
            repairs = repairs.take(now_s)
            lost_rounds = self.lost_rounds + 1 if exhausted else 0
        return replace(
            self,
            ended_s=now_s,
            asked=False,
            failures=self.failures + 1 if failed else 0,
            jitter=jitter,
            lost_rounds=lost_rounds,
            repairs=repairs,
            looks=self.looks.take(now_s),
        )

    def due_s(self, now_s: float) -> float:
        """The time of the next pass, which may lie in the past."""
        if self.ended_s is None:
            return now_s
        waits = [self.resync_s]
        if self.failures:
            spread = 1 - self.jitter / 4
            waits.append(self._doubling(self.retry_s, self.failures) * spread)
        # In a fight also unasked: the pass that finds quiet ends it.
        if self.asked or self.fighting:
            waits.append(self._pace(now_s))
        return self.ended_s + min(waits)

    def _pace(self, now_s: float) -> float:
        if self.fighting:
            return min(self.longest_fight_s, self._doubling(1.0, self.lost_rounds))
        return self.settle_s if self.looks.level(now_s) >= 1 else 1 / self.looks.per_s

    def _doubling(self, first_s: float, times: int) -> float:
        return float(min(self.longest_wait_s, first_s * 2.0 ** min(times - 1, 16)))
