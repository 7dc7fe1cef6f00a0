"""One call's share of what a whole pass may take."""

from __future__ import annotations

import pytest

from snatd.core.deadline import LONGEST_CALL_S, Deadline
from snatd.core.errors import BackendBusy


def test_a_call_gets_what_is_left_but_not_all_of_it() -> None:
    assert Deadline(100.0).remaining_s(98.0) == 2.0
    assert Deadline(100.0).remaining_s(0.0) == LONGEST_CALL_S


@pytest.mark.parametrize("now_s", [100.0, 100.1, 1e9])
def test_after_the_end_nothing_is_started(now_s: float) -> None:
    with pytest.raises(BackendBusy):
        Deadline(100.0).remaining_s(now_s)
