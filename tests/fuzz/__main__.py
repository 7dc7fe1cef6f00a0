"""`python -m tests.fuzz [TARGET...]`: each target for FUZZ_S seconds, and a table of what was run.

Exit 1 where something was found: the input is kept and printed, and how to run it again. What the
fuzzer learns is kept in `.fuzz/` of the working directory, and the next run begins with it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).with_name("corpus")
LEARNT = Path(".fuzz")
# CPU seconds are counted by the harness; this ends what does not come back at all.
_HANGING_S = 60
_MEMORY_MIB = 1024


@dataclass(frozen=True)
class Outcome:
    """What came of one target. `found` is what libFuzzer and Python said, empty for nothing."""

    target: str
    inputs: int
    edges: int
    seconds: float
    found: str = ""

    def __str__(self) -> str:
        per_s = self.inputs / self.seconds
        row = f"{self.target:12} {self.inputs:>10,} {per_s:>8,.0f} {self.edges:>8,}"
        return f"{row}   {'FOUND' if self.found else 'nothing'}"


def fuzz(target: str, seconds: int, temporary: str) -> Outcome:
    learnt, found = LEARNT / target, LEARNT / f"{target}-found"
    for folder in (learnt, found):
        folder.mkdir(parents=True, exist_ok=True)
    options = {
        **{"max_total_time": seconds, "timeout": _HANGING_S, "rss_limit_mb": _MEMORY_MIB},
        **{"print_final_stats": 1, "artifact_prefix": f"{found}/"},
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.harness", target),
            *(f"-{name}={value}" for name, value in options.items()),
            *(str(learnt), str(CORPUS / target)),
        ],
        env={**os.environ, "TMPDIR": temporary},  # libFuzzer ends without cleaning up
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
        check=False,
    )
    inputs = re.findall(r"^stat::number_of_executed_units: (\d+)$", done.stdout, re.MULTILINE)
    edges = re.findall(r"^#\d+\s.* cov: (\d+) ", done.stdout, re.MULTILINE)
    # Behind the fuzzer's own progress.
    said = re.sub(r"^(#|INFO:).*\n", "", done.stdout[-20_000:], flags=re.MULTILINE)
    said = "" if done.returncode == 0 else said[-6000:]
    return Outcome(target, int((inputs or [0])[-1]), int((edges or [0])[-1]), seconds, said)


def main(names: list[str]) -> int:
    unknown = set(names) - set(TARGETS)
    if unknown:
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
        return 2
    seconds = int(os.environ.get("FUZZ_S", "25"))
    with (
        tempfile.TemporaryDirectory(prefix="snatd-fuzz-") as folder,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        outcomes = list(pool.map(lambda name: fuzz(name, seconds, folder), names or TARGETS))
    for one in outcomes:
        if one.found:
            print(f"--- {one.target}\n{one.found}")
            print(f"again: {sys.executable} -m tests.fuzz.harness {one.target} FILE\n")
    print(f"{'target':12} {'inputs':>10} {'a second':>8} {'branches':>8}   found in {seconds} s")
    print("\n".join(map(str, outcomes)))
    total = sum(one.inputs for one in outcomes)
    print(f"{'together':12} {total:>10,}")
    return int(any(one.found for one in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
