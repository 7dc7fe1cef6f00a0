"""firewalld in a booted Debian, its zone with masquerading, beside snatd as it is installed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.lab.netns import until
from tests.lab.who import Seen, census, seen_by
from tests.others.installed import rules_of_others
from tests.system.conftest import build, commit, install
from tests.system.node import BROAD, CONTAINER, NARROW, NEIGHBOUR, NODE, OUTSIDE, Node

__all__ = ["commit"]

CASES = (("trixie", "nftables"), ("trixie", "iptables"), ("forky", "nftables"))
RIGHT = {(NEIGHBOUR, CONTAINER), (OUTSIDE, NODE)}
# The backend iptables flushes everybody's rules each time, snatd's too; until they are
# there again, what leaves the cluster is bare. The guard is not iptables' and stays.
FLUSHED = (OUTSIDE, CONTAINER)


@pytest.fixture(scope="session")
def deb(work: Path, commit: str) -> Path:
    return build("packaging/deb", str(work / "packages"), commit)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    suite, backend = request.param
    return suite, backend


@pytest.fixture
def node(case: tuple[str, str], request: pytest.FixtureRequest, work: Path) -> Iterator[Node]:
    """A node with firewalld, a masquerading zone for what leaves it, and Docker's broad rule."""
    suite, backend = case
    tree: Path = request.getfixturevalue(suite)
    with closing(Node([tree], work / f"firewalld-{suite}-{backend}")) as node:
        settings = node.machine.root / "etc/firewalld/firewalld.conf"
        text = settings.read_text()
        assert "\nFirewallBackend=nftables\n" in text
        settings.write_text(text.replace("Backend=nftables", f"Backend={backend}"))
        # It writes its interfaces in a set's order, and so otherwise after each restart (2.5).
        drop_in = node.machine.root / "etc/systemd/system/firewalld.service.d/order.conf"
        drop_in.parent.mkdir(parents=True)
        drop_in.write_text("[Service]\nEnvironment=PYTHONHASHSEED=0\n")
        node.boot()
        node.network()
        node.lease()
        node.machine.shell(
            """
            firewall-cmd --permanent --zone=trusted --add-interface=docker0
            firewall-cmd --permanent --zone=public --add-interface=eth0
            firewall-cmd --permanent --zone=public --add-masquerade
            firewall-cmd --reload
            """
        )
        node.add_broad()
        yield node


def log(node: Node, unit: str) -> list[str]:
    """Warnings and worse since the boot."""
    said = [str(one["MESSAGE"]) for one in node.machine.journal("-b", "-u", unit, "-p", "warning")]
    # Of systemd 262 itself, in a machine whose control groups have no controllers.
    return [one for one in said if "Failed to read pids.max" not in one]


def repaired(node: Node) -> None:
    def is_so() -> bool:
        rules = node.rules()
        return rules.count(NARROW) == 1 and BROAD not in rules

    until(is_so, "the narrowed rule")


class Calls:
    """From the container, each from a port of its own: it meets no entry of an earlier one."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._port = 10000

    def wrong_during(self, *command: str) -> Seen:
        """Those that were seen as somebody else's while a command ran; one without an answer counts
        for nothing, as firewalld drops what is new until its rules are there again."""
        with ThreadPoolExecutor() as pool:
            # And until firewalld answers again: systemctl does not wait for its rules.
            script = f"{' '.join(command)}; firewall-cmd --state || :"
            running = pool.submit(self.node.machine.shell, script)

            def more(_: int) -> bool:
                time.sleep(0.003)
                return not running.done()

            seen = census(self.node.container, (NEIGHBOUR, OUTSIDE), more, self._port, 0.1)
            running.result()
        self._port += seen.total()
        assert seen.total() >= 4, "hardly anything was asked"
        return Counter({call: n for call, n in seen.items() if call not in RIGHT and call[1]})


COMMANDS: tuple[tuple[str, ...], ...] = (
    ("firewall-cmd", "--reload"),
    ("firewall-cmd", "--complete-reload"),
    ("systemctl", "restart", "firewalld"),
    ("systemctl", "stop", "firewalld"),
    ("systemctl", "start", "firewalld"),
    ("firewall-cmd", "--reload"),
)


def others_after(node: Node, command: Sequence[str]) -> list[str]:
    if "stop" not in command:
        assert node.machine.run("firewall-cmd", "--state").endswith("running\n")
    return [line for line in rules_of_others(node.machine) if BROAD not in line]


def test_firewalld(case: tuple[str, str], node: Node, deb: Path) -> None:
    machine, calls = node.machine, Calls(node)
    assert machine.run("firewall-cmd", "--query-masquerade") == "yes\n"
    assert seen_by(node.container, NEIGHBOUR) == NODE, "the problem"
    assert calls.wrong_during("firewall-cmd", "--reload")[NEIGHBOUR, NODE] > 0
    without = []
    for command in COMMANDS:
        machine.run(*command)
        without.append(others_after(node, command))
    assert log(node, "firewalld") == []

    install(machine, deb)
    node.add_broad()
    repaired(node)
    for command, rules in zip(COMMANDS, without, strict=True):
        wrong = calls.wrong_during(*command)
        if "iptables" in case:
            wrong.pop(FLUSHED, None)
        assert not wrong, command
        until(lambda: seen_by(node.container, OUTSIDE, 0.5) == NODE, "egress")
        node.promises_hold()
        node.add_broad()
        repaired(node)
        assert others_after(node, command) == rules, command
    assert log(node, "firewalld") == log(node, "snatd") == []
    node.wait_for_status("in sync since")

    # And from the boot on.
    machine.reboot()
    node.connect_wire()
    machine.wait_until_up()
    node.network()
    node.lease()
    node.wait_for_status("in sync since")
    node.promises_hold()
    node.add_broad()
    repaired(node)
    node.promises_hold()
    assert log(node, "firewalld") == log(node, "snatd") == []
