"""Control groups of a test's own, and what kills all that is in them when the test ends."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

# Kills all that is in the control groups, and removes them, when its stdin ends. A group is busy
# for a moment after its last process is no longer listed.
_REAPER = """
cat >/dev/null
for group; do
    while [ -d "$group" ]; do
        pids=$(find "$group" -name cgroup.procs -exec cat {} + 2>/dev/null)
        [ -z "$pids" ] || kill -KILL $pids 2>/dev/null
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
        [ ! -d "$group" ] || sleep 0.02
    done
done
exit 0
"""
# In front of a command and `--`: groups to join.
INTO_GROUPS = 'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"'


def make_groups(name: str) -> list[Path]:
    """A control group in each hierarchy that systemd uses."""
    root = Path("/sys/fs/cgroup")
    roots = [root / one for one in ("systemd", "unified") if (root / one).is_dir()] or [root]
    groups = [one / name for one in roots]
    for group in groups:
        group.mkdir()
    return groups


def start_reaper(groups: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Kills what is in these groups and removes them when its stdin closes: by us or by our end."""
    return subprocess.Popen(
        ["sh", "-c", _REAPER, "reaper", *map(str, groups)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def anywhere(name: str) -> list[Path]:
    """Where a group of that name may be made by others: in each hierarchy."""
    root = Path("/sys/fs/cgroup")
    return [one.parent / name for one in root.glob("*/cgroup.procs")] or [root / name]
