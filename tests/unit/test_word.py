"""When a daemon's last word counts."""

from __future__ import annotations

import math

import pytest

from snatd.core.word import Life, Process, Word, judge


@pytest.mark.parametrize(
    ("process", "silent_s", "life"),
    [
        (Process.RUNS, 0.0, Life.ANSWERS),
        (Process.RUNS, 90.0, Life.ANSWERS),
        (Process.RUNS, 90.1, Life.SILENT),
        (Process.RUNS, None, Life.ELSEWHERE),
        (Process.RUNS, -0.1, Life.ELSEWHERE),
        (Process.RUNS, math.nan, Life.ELSEWHERE),
        (Process.STOPPED, 0.0, Life.STOPPED),
        (Process.STOPPED, None, Life.STOPPED),
        (Process.GONE, 0.0, Life.GONE),
        (Process.GONE, None, Life.GONE),
        (Process.UNSEEN, 90.0, Life.UNSEEN),
        (Process.UNSEEN, 90.1, Life.UNSEEN_SILENT),
        (Process.UNSEEN, None, Life.ELSEWHERE),
    ],
)
def test_judge(process: Process, silent_s: float | None, life: Life) -> None:
    assert judge(process, silent_s, 90.0) is life


def test_only_a_fresh_word_counts() -> None:
    counting = {life for life in Life if Word(life, {}).counts}
    assert counting == {Life.ANSWERS, Life.UNSEEN}
    assert not Word(Life.ANSWERS).counts, "there is no word"


def test_nobody_is_said_to_run_or_not_who_is_not_seen() -> None:
    assert {life for life in Life if life.runs} == {Life.ANSWERS, Life.SILENT, Life.STOPPED}
    assert {life for life in Life if life.runs is False} == {Life.GONE, Life.ABSENT}
