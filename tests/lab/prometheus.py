"""What Prometheus' own tool says, and the values in a file of metrics."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGED = Path(__file__).parents[2] / "packaging" / "prometheus"
RULES = PACKAGED / "snatd.rules.yml"
DASHBOARD = PACKAGED / "snatd.dashboard.json"

_PROMTOOL = Path(sys.executable).with_name("promtool")


def promtool(*arguments: str | Path, stdin: bytes | None = None) -> str:
    """What it printed. It has to be content: lint is an error too."""
    assert _PROMTOOL.exists(), f"{_PROMTOOL} is missing: run `make venv`"
    done = subprocess.run(
        [_PROMTOOL, *arguments], input=stdin, capture_output=True, timeout=60, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said.decode()
    return said.decode()


def values(text: bytes) -> dict[str, float]:
    """The samples of a file that promtool accepts, each by its name with its labels."""
    assert promtool("check", "metrics", stdin=text) == ""
    lines = (line for line in text.decode().split("\n")[:-1] if not line.startswith("#"))
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines)}
