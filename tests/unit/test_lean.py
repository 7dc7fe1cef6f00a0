"""What the daemon keeps out of its memory, seen in a process of its own."""

from __future__ import annotations

import subprocess
import sys

# All that the daemon loads in its life, but for python-iptables.
_EVERYTHING = """
from snatd.lean import leave_out
leave_out()
import sys
import snatd.daemon
import snatd.host.journal
import snatd.host.watch
import snatd.kernel.conntrack
import snatd.kernel.links
import snatd.kernel.probe
import snatd.suspects
import snatd.verify
snatd.host.journal.configure("console", "info")
snatd.host.journal.logger().info("it_speaks", where="here")
print(*sorted(name for name in sys.modules if sys.modules[name] is not None))
"""


def test_openssl_and_rich_are_not_loaded() -> None:
    argv = [sys.executable, "-c", _EVERYTHING]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.split())
    assert {"_ssl", "_hashlib"} & loaded == set()
    assert not any(name.partition(".")[0] == "rich" for name in loaded)
    assert {"asyncio", "structlog", "pyroute2.iproute", "watchdog"} <= loaded
    assert "it_speaks" in done.stderr
