"""Run inside a tree: the versions of what snatd stands on there, as one JSON object."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from importlib import metadata

# The columns of the table, in its order.
TOOLS = ("iptables", "nft", "conntrack")
LIBRARIES = ("pyroute2", "python-iptables", "sdnotify", "watchdog", "structlog")


def main() -> None:
    versions = {"Python": platform.python_version()}
    for tool in TOOLS:
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True)
        found = re.search(r"v(\d[\d.]*)", said.stdout)
        assert found, said.stdout
        versions[tool] = found[1]
    print(json.dumps(versions | {one: metadata.version(one) for one in LIBRARIES}))


if __name__ == "__main__":
    main()
