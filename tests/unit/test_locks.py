"""Who holds a lock, by /proc/locks."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from snatd.core.locks import holder
from snatd.host import instance

LOCKS = """\
1: FLOCK  ADVISORY  WRITE 4711 00:1a:42 0 EOF
1: -> FLOCK  ADVISORY  WRITE 4712 00:1a:42 0 EOF
2: POSIX  ADVISORY  WRITE 4713 00:1a:43 0 EOF
3: FLOCK  ADVISORY  READ 4714 103:02:42 0 EOF
4: FLOCK  ADVISORY
"""


def test_the_holder_of_a_lock() -> None:
    assert holder(LOCKS, (0, 0x1A), 42) == 4711
    assert holder(LOCKS, (0x103, 2), 42) == 4714
    assert holder(LOCKS, (0, 0x1A), 43) is None, "no flock"
    assert holder(LOCKS, (0, 0x1A), 4) is None


def test_the_instance_lock_is_looked_at_and_not_taken(tmp_path: Path) -> None:
    assert instance.holder(tmp_path) is None
    lock = instance.Instance(tmp_path)
    lock.take()
    assert instance.holder(tmp_path) == os.getpid()
    lock.release()
    assert instance.holder(tmp_path) is None
    with (tmp_path / "snatd.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert instance.holder(tmp_path) == os.getpid()
