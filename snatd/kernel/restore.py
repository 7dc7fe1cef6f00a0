"""The node's own `iptables-restore --test` and `iptables-save`. Neither changes a rule."""

from __future__ import annotations

import os
import re

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendFailed
from snatd.core.model import Backend, Family
from snatd.kernel.listing import NO_LOCK
from snatd.kernel.peek import listed_tables
from snatd.kernel.tools import Tools


def check_restore(
    family: Family, backend: Backend, content: bytes, tools: Tools, deadline: Deadline
) -> None:
    """Whether a saved file would load. Raises BackendBusy, or BackendFailed with line and reason.

    What it does to the kernel (strace, 1.8.9): iptables-nft-restore opens a batch and sends
    nothing in it, so no rule and no generation changes. iptables-legacy-restore takes the xtables
    lock, which is pointed elsewhere here, and reads each table that the file names, which makes
    the table if nobody had used it. So where that would happen it runs in a network namespace of
    its own.

    It reads the lines and loads the extensions. iptables-nft-restore does not see that a rule
    jumps to a chain that does not exist; iptables-legacy-restore does.
    """
    tool = f"{family.command}-{backend.value}-restore"
    argv = [tool, "--test"]
    if backend is Backend.LEGACY:
        named = {match.decode() for match in re.findall(rb"^\*(\w+)", content, re.MULTILINE)}
        if not named <= listed_tables(family):
            argv = ["unshare", "--net", "--", tools.find(tool) or tool, "--test"]
    try:
        tools.run(argv, deadline, stdin=os.fsdecode(content), environment=NO_LOCK)
    except BackendFailed as error:
        said = str(error)
        if "unshare: unshare failed" in said:
            raise BackendFailed(
                "it cannot be tested by this service without making legacy tables that are not in "
                "use yet: run `snatd save` as root"
            ) from None
        raise BackendFailed(re.sub(r"\s*Try `.*\Z", "", said, flags=re.DOTALL)) from None


def save_tables(family: Family, backend: Backend, tools: Tools, deadline: Deadline) -> bytes:
    """All tables of a family in a backend, as `iptables-save` prints them. Raises BackendError."""
    argv = [f"{family.command}-{backend.value}-save"]
    return os.fsencode(tools.run(argv, deadline, environment=NO_LOCK))
