"""The unit of a real iptables that wrote a rule.

On the machine itself and not in a booted one: the kernel names the writer by its pid as the machine
counts, and a booted one counts for itself.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.groups import make_groups, start_reaper
from tests.lab.netns import until
from tests.lab.network import Lab
from tests.lab.process import Snatd


@pytest.fixture
def docker_service() -> Iterator[list[Path]]:
    """A control group like that of a unit, in each hierarchy."""
    groups = make_groups(f"snatd-test-{os.getpid()}-writer")
    reaper = start_reaper(groups)
    units = [group / "docker.service" for group in groups]
    for unit in units:
        unit.mkdir()
    yield units
    assert reaper.stdin is not None
    reaper.stdin.close()
    reaper.wait(30)


def test_the_journal_says_of_whom(docker_service: list[Path], tmp_path: Path) -> None:
    with Lab("nft") as lab, Snatd(lab.nodes[0].host, tmp_path) as snatd:
        node = lab.nodes[0]
        node.write_lease()
        snatd.start()
        # The last look that it takes by itself.
        until(lambda: "watch_started" in snatd.status()["last_pass"]["trigger"], "quiet")
        join = "".join(f"echo $$ >{unit}/cgroup.procs; " for unit in docker_service)
        script = f"{join} nsenter -t {node.host.pid} -n -m iptables-nft -t nat -I POSTROUTING"
        rule = " ".join(node.broad_rule)
        writers = []
        for number in range(1, 21):
            # A shell stays the parent, as dockerd does.
            subprocess.run(["sh", "-euc", f"{script} {rule}; :"], check=True)
            found = snatd.wait_for("rule_narrowed", number)[-1]
            assert found["writer"].startswith("iptables-nft (pid "), found
            assert found["writer_comm"] == ["iptables-nft"]
            writers += found.get("writer_unit", [])
        # A busy machine may see to it that the writer is gone first; nobody else is named then.
        assert {*writers} == {"docker.service"}
        print(f"{len(writers)} of {number} writers were seen while they lived")
