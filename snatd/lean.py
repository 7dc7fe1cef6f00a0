"""Keeps out of the daemon what its libraries would load and it never uses.

It speaks no TLS, yet asyncio, which structlog and pyroute2 bring along, loads OpenSSL where it can:
5 MB of 38. It prints no tables, yet structlog loads rich where that is installed: 2 MB and 20 ms.
Both libraries are made to do without.
"""

from __future__ import annotations

import sys
from types import ModuleType


def leave_out() -> None:
    """Before the first import of either. None in `sys.modules` is Python's own way to say that
    there is no such module."""
    absent: dict[str, None] = dict.fromkeys(("rich", "ssl"))
    sys.modules.update(absent)  # type: ignore[arg-type]
    import asyncio  # noqa: F401

    # pyroute2 0.9 imports it for a probe that is never made here, and does not ask whether it is
    # there. An empty one will do; whoever used it would be told at once.
    sys.modules["ssl"] = ModuleType("ssl")
