"""`make test-matrix`: unit, property and kernel tests in the trees of several Debians, two at a
time, and the README's support table from what they gave. Exits 0 only if all passed."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.lab.mounts import memory
from tests.matrix import table
from tests.matrix.table import Row
from tests.matrix.tree import ALL, PROJECT, TREES, Tree

_WITHIN_S = 2400.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.matrix", description=__doc__)
    parser.add_argument("--only", metavar="WORD", default="", help="trees whose name has this")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="trees at a time")
    parser.add_argument(
        "tests", nargs="*", default=ALL, help="pytest's arguments instead of all tests"
    )
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("the kernel tests make network namespaces: run it as root", file=sys.stderr)
        return 1
    trees = [one for one in TREES if options.only in one.distribution]

    def run(tree: Tree, folder: Path) -> Row:
        began_s = time.monotonic()
        row, said = tree.run(folder, _WITHIN_S, options.tests)
        shutil.rmtree(folder)
        passed = f"{row.tests - len(row.failed)} of {row.tests} passed"
        print(f"{tree.distribution}: {passed}, {time.monotonic() - began_s:.0f} s", flush=True)
        if row.failed:
            print(said, flush=True)
        return row

    with memory("matrix") as folder, ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(run, trees, [folder / str(one) for one in range(len(trees))]))
    print(table.block(rows))
    if len(rows) == len(TREES) and options.tests == ALL:
        readme = PROJECT / "README.md"
        readme.write_text(table.put(readme.read_text(), rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
