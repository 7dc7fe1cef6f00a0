"""Nobody gets there first: the guard by packets, against rivals that write all the time."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGKILL, SIGSTOP

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import snatd as package
from snatd.core.deadline import Deadline
from snatd.core.desired import CutOut, Desired
from snatd.core.errors import BackendFailed
from snatd.core.guard import guard_rules, plan_guard, without_guard
from snatd.core.mend import undone
from snatd.core.model import Family, GuardPolicy, Network, Policy
from snatd.core.networks import collapse, contains
from snatd.core.plan import Transaction
from snatd.kernel.guard import GuardTable
from snatd.kernel.tools import Tools
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.lab.netns import Namespace, until
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import Seen, WhoServer, census, seen_by, seen_by_udp

CONNECTIONS = 1500


@contextmanager
def rival(node: Node) -> Iterator[subprocess.Popen[bytes]]:
    """Puts the broad rule back on both backends every 30 ms, as Docker does at each start."""
    rule = " ".join(node.broad_rule)
    tries = "; ".join(
        f"{command} -t nat -C POSTROUTING {rule} 2>/dev/null ||"
        f" {command} -t nat -I POSTROUTING {rule}"
        for command in ("iptables-nft", "iptables-legacy -w 5")
    )
    process = node.host.popen("sh", "-uc", f"while :; do {tries}; sleep 0.03; done")
    try:
        yield process
        assert process.poll() is None, "the rival ended before the test did"
    finally:
        process.kill()
        process.wait()


def opened(lab: Lab, more: Callable[[int], bool] = lambda n: n < CONNECTIONS) -> Seen:
    """Flows from the container to its neighbour and to the outside, one each a round."""
    node, neighbour = lab.nodes
    return census(node.container, (neighbour.container_address, OUTSIDE), more)


def wrong(seen: Seen, lab: Lab) -> dict[tuple[str, str | None], int]:
    """What broke a promise: a hidden container inside, a bare one (no answer) outside."""
    node, neighbour = lab.nodes
    right = {(neighbour.container_address, node.container_address), (OUTSIDE, node.address)}
    return {pair: number for pair, number in seen.items() if pair not in right}


def test_without_the_guard_hundreds_are_wrong(nft_lab: Lab, tmp_path: Path) -> None:
    """So the tests below can fail: narrowing alone comes after the rival's write."""
    node, neighbour = nft_lab.nodes
    node.write_lease()
    with Snatd(node.host, tmp_path, guard="off") as snatd:
        snatd.start()
        with rival(node):
            seen = opened(nft_lab)
    assert seen[neighbour.container_address, node.address] > 200, seen
    # The egress is never taken away, guard or not.
    assert seen[OUTSIDE, node.address] == CONNECTIONS, seen


def test_fault_03_with_the_guard_none_is_wrong(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        with rival(node):
            seen = opened(nft_lab)
        assert snatd.status()["repairs"] > 0
    assert wrong(seen, nft_lab) == {}
    assert sum(seen.values()) == 2 * CONNECTIONS


@pytest.mark.parametrize("number", [SIGSTOP, SIGKILL])
def test_fault_22_nor_with_a_daemon_that_is_stopped_or_dead(
    nft_lab: Lab, tmp_path: Path, number: int
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        snatd.process.send_signal(number)
        with rival(node):
            until(lambda: " ".join(node.broad_rule) in rules(node), "the broad rule")
            seen = opened(nft_lab)
            assert " ".join(node.broad_rule) in rules(node), "nobody repaired it"
        snatd.process.send_signal(SIGCONT)
    assert wrong(seen, nft_lab) == {}
    assert sum(seen.values()) == 2 * CONNECTIONS


def meanwhile(lab: Lab, act: Callable[[], None]) -> Seen:
    """Opens flows for as long as something is done, 1500 at least."""
    done = threading.Event()
    found: list[Seen] = []

    def call() -> None:
        found.append(opened(lab, lambda n: n < CONNECTIONS or not done.is_set()))

    caller = threading.Thread(target=call)
    caller.start()
    try:
        act()
    finally:
        done.set()
        caller.join()
    return found[0]


def test_fault_32_nor_while_it_is_restarted(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()

    def restart() -> None:
        for turn in range(4):
            if turn % 2:
                snatd.process.kill()
                snatd.process.wait()
            else:
                assert snatd.stop() == 0
            snatd.start()

    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        with rival(node):
            seen = meanwhile(nft_lab, restart)
    assert wrong(seen, nft_lab) == {}


def test_fault_32_nor_while_it_is_upgraded_in_place(nft_lab: Lab, tmp_path: Path) -> None:
    """Another version in the same folder, whose guard is not like the one that stands."""
    node = nft_lab.nodes[0]
    node.write_lease()
    tree = tmp_path / "tree"
    shutil.copytree(
        Path(package.__file__).parent, tree / "snatd", ignore=shutil.ignore_patterns("__pycache__")
    )
    core = tree / "snatd/core/guard.py"
    new = core.read_text()
    old = new.replace("PRIORITY = -199", "PRIORITY = -150")
    assert old != new

    def upgrade() -> None:
        for text in (new, old, new):
            core.write_text(text)
            assert snatd.stop() == 0
            snatd.start()
            assert snatd.wait_for("guard_written")

    with Snatd(node.host, tmp_path / "snatd") as snatd:
        run = "import sys; sys.path.insert(0, sys.argv.pop(1)); from snatd.cli import main; "
        snatd.program = (sys.executable, "-B", "-c", f"{run}sys.exit(main())", str(tree))
        core.write_text(old)
        snatd.start()
        assert "priority -150" in node.host.run("nft", "-nn", "list", "table", "ip", "snatd")
        with rival(node):
            seen = meanwhile(nft_lab, upgrade)
        assert "priority -199" in node.host.run("nft", "-nn", "list", "table", "ip", "snatd")
    assert wrong(seen, nft_lab) == {}


def test_nor_while_it_is_replaced_all_the_time(nft_lab: Lab, tmp_path: Path) -> None:
    """A configuration that changes its networks; the broad rule stands and nobody narrows it."""
    node = nft_lab.nodes[0]
    node.write_lease()

    def reload() -> None:
        for turn in range(12):
            written = len(snatd.events("guard_written"))
            snatd.write_config(networks=[f"10.{100 + turn}.0.0/16"])
            snatd.signal(SIGHUP)
            snatd.wait_for("guard_written", written + 1)

    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        with rival(node):
            seen = meanwhile(nft_lab, reload)
        assert len(snatd.events("guard_written")) > 10
    assert wrong(seen, nft_lab) == {}


def guard_of(node: Node, family: str = "ip") -> str:
    return node.host.run("nft", "-s", "list", "table", family, "snatd", check=False)


@pytest.mark.parametrize(
    "attack",
    [
        "nft flush ruleset",
        "nft delete table ip snatd",
        "nft flush table ip snatd",
        "nft insert rule ip snatd postrouting masquerade",
        "nft add rule ip snatd postrouting return",
        "nft add chain ip snatd extra",
        "nft add table ip snatd '{ flags dormant; }'",
        # Of this table nft 1.0.6 prints half of a JSON.
        "nft 'delete table ip snatd; add table ip snatd { flags dormant; }'",
        "nft add set ip snatd extra { type ipv4_addr\\; }",
        "nft 'delete table ip snatd; add table ip snatd;"
        " add chain ip snatd postrouting { type nat hook postrouting priority 200; }'",
    ],
)
def test_fault_04_whatever_is_done_to_it_it_is_made_again(
    nft_lab: Lab, tmp_path: Path, attack: str
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease(v6=True)
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        before = guard_of(node), guard_of(node, "ip6")
        written = len(snatd.events("guard_written"))
        node.host.shell(attack)
        event = snatd.wait_for("guard_written", written + 1)[-1]
        assert event["writer"].startswith("nft (pid ")
        until(lambda: (guard_of(node), guard_of(node, "ip6")) == before, "the same guards")
        until(lambda: snatd.status()["in_sync"], "in sync")
    promises_hold(nft_lab, v6=True)


def test_taken_away_again_right_behind_the_repair(nft_lab: Lab, tmp_path: Path) -> None:
    """What is heard while a pass is on its way is looked at after it, at whatever moment."""
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path, resync=3600) as snatd:
        snatd.start()
        for turn in range(24):
            node.host.run("nft", "delete", "table", "ip", "snatd")
            until(lambda: guard_of(node), "the guard")
            time.sleep(turn % 12 * 0.004)  # somewhere in the rest of the pass
        node.host.run("nft", "delete", "table", "ip", "snatd")
        until(lambda: guard_of(node), "the guard")


def test_it_stands_before_the_bridge_does(nft_lab: Lab, tmp_path: Path) -> None:
    node, neighbour = nft_lab.nodes
    node.host.run("ip", "link", "set", "docker0", "name", "later")
    node.host.run("ip", "addr", "flush", "dev", "later")
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        assert snatd.status()["state"] == "waiting"
        assert "snat to ip saddr" in guard_of(node)
        # A container comes up, and the rule that hides it, before snatd knows the bridge.
        node.host.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE")
        snatd.process.send_signal(SIGSTOP)
        node.host.run("ip", "addr", "add", "172.7.21.1/24", "dev", "later")
        assert seen_by(node.container, neighbour.container_address) == node.container_address
        snatd.process.send_signal(SIGCONT)


def test_fault_19_a_lease_change_moves_it_before_the_old_rule_goes(
    nft_lab: Lab, tmp_path: Path
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        node.host.run("ip", "addr", "add", "172.7.33.1/24", "dev", "docker0")
        said = len(snatd.events())
        node.write_lease(subnet="172.7.33.1/24")
        snatd.wait_for("stale_rule_removed")
        until(lambda: snatd.status()["in_sync"], "in sync")
        names = [one["event"] for one in snatd.events()[said:] if one.get("rule")]
        assert names == ["guard_written", "stale_rule_removed"]
    assert "172.7.33.0/24" in guard_of(node)
    assert "172.7.21.0/24" not in guard_of(node)


def test_off_removes_it(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        snatd.start()
        assert "snat to" in guard_of(node)
        snatd.write_config(guard="off")
        snatd.signal(SIGHUP)
        snatd.wait_for("guard_removed")
        assert guard_of(node) == ""
        assert snatd.status()["in_sync"]
        (guard,) = snatd.status()["guard"]
        assert guard == {
            "family": "ipv4",
            "in_place": False,
            "connections": None,
            "why_not": "off",
        }


@pytest.mark.parametrize("lists", [True, False])
def test_auto_says_once_that_there_is_none_and_goes_on(
    lab: Lab, tmp_path: Path, lists: bool
) -> None:
    node = lab.nodes[0]
    node.write_lease()
    _broken_nft(node, tmp_path / "bin", lists)
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        snatd.start()
        assert rules(node) == [NARROW]
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        until(lambda: rules(node) == [NARROW], "the repair")
        until(lambda: snatd.status()["in_sync"], "in sync")
        assert "without a guard" in snatd.status()["headline"]
        (said,) = snatd.events("no_guard")
        assert "Could not process rule: Operation not supported" in said["what"][0]
        done = snatd.command("apply")
        assert done.returncode == 0, done.stdout
        assert "no guard: ipv4 guard: " in done.stdout
        (tmp_path / "bin/nft").unlink()
        add(node, "-I", "POSTROUTING", *node.broad_rule)
        snatd.wait_for("guarded")
        assert snatd.command("check").stdout.startswith("in sync: 172.7.21.0/24 keeps its address")


def _broken_nft(node: Node, folder: Path, lists: bool = True) -> None:
    """An nft whose kernel refuses; the other commands stay as they are."""
    folder.mkdir()
    list_all_the_same = 'case "$*" in *list*) exec /usr/sbin/nft "$@";; esac\n' * lists
    (folder / "nft").write_text(
        f"#!/bin/sh\n{list_all_the_same}"
        'echo "Error: Could not process rule: Operation not supported" >&2; exit 1\n'
    )
    (folder / "nft").chmod(0o755)
    path = node.host.environment()["PATH"].partition(":")[0]
    for link in Path(path).iterdir():
        (folder / link.name).symlink_to(link.resolve())
    node.host.use_iptables(folder)


def test_on_makes_that_degraded(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    _broken_nft(node, tmp_path / "bin")
    with Snatd(node.host, tmp_path / "snatd", guard="on") as snatd:
        snatd.start()
        assert rules(node) == [NARROW]
        assert snatd.status()["state"] == "degraded"
        assert "Operation not supported" in snatd.status()["headline"]
        assert snatd.command("apply").returncode == 4


def test_fault_12_no_nft_at_all(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    empty = tmp_path / "empty"
    empty.write_text("")
    node.host.run("mount", "--bind", str(empty), "/usr/sbin/nft")
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        done = snatd.command("apply")
        assert done.returncode == 0, done.stdout
        assert "no guard: ipv4 guard: " in done.stdout
        assert "nft" in done.stdout
        assert rules(node) == [NARROW]
        reverted = snatd.command("revert")
        assert reverted.returncode == 0, reverted.stderr
        assert "`nft delete table ip snatd` removes it" in reverted.stderr
        assert "`nft delete table ip6 snatd` removes it" in reverted.stderr
        assert rules(node) == []


def test_revert_takes_it_away_last(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease(v6=True)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    with Snatd(node.host, tmp_path) as snatd:
        assert snatd.command("apply").returncode == 0
        backends = [one["backend"] for one in snatd.json("revert")["reverted"]]
        assert backends == ["nft", "nft", "guard", "guard"]
    assert guard_of(node) == guard_of(node, "ip6") == ""
    assert rules(node) == [" ".join(node.broad_rule)]


def test_an_unconfirmed_one_is_taken_back(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        assert snatd.command("apply", "--confirm", "1").returncode != 0
    assert guard_of(node) == ""


def test_the_counter_counts_connections(nft_lab: Lab, tmp_path: Path) -> None:
    node, neighbour = nft_lab.nodes
    node.write_lease()
    with Snatd(node.host, tmp_path) as snatd:
        assert snatd.command("apply").returncode == 0
        for _ in range(3):
            assert seen_by(node.container, neighbour.container_address) == node.container_address
        assert seen_by(node.container, OUTSIDE) == node.address
        assert snatd.json("check")["guard"] == [
            {"family": "ipv4", "in_place": True, "connections": 3, "why_not": None}
        ]


KUBE = """
    iptables -t nat -N KUBE-POSTROUTING
    iptables -t nat -A POSTROUTING -j KUBE-POSTROUTING
    iptables -t nat -A KUBE-POSTROUTING -m mark ! --mark {mark}/{mark} -j RETURN
    iptables -t nat -A KUBE-POSTROUTING -j MARK --set-xmark {mark}/0x0
    iptables -t nat -A KUBE-POSTROUTING -j MASQUERADE --random-fully
    iptables -t mangle -A PREROUTING -p udp --dport 8080 -j MARK --set-xmark {mark}/{mark}
"""


@pytest.mark.parametrize(
    ("mark", "marks", "masqueraded"),
    [
        ("0x4000", None, True),
        ("0x2000", None, True),
        ("0x8000", None, False),
        ("0x8000", ["0x8000"], True),
        ("0x4000", [], False),
        # nft prints a mask of the highest bits in another way.
        ("0x80000000", ["0x80000000"], True),
    ],
)
def test_a_mark_asks_for_masquerade(
    lab: Lab, tmp_path: Path, mark: str, marks: list[str] | None, masqueraded: bool
) -> None:
    node, neighbour = lab.nodes
    node.write_lease()
    node.host.shell(KUBE.format(mark=mark))
    more = {} if marks is None else {"masquerade_marks": marks}
    with Snatd(node.host, tmp_path, **more) as snatd:
        assert snatd.command("apply").returncode == 0
        check = snatd.json("check")
    assert check["in_sync"], "nft's own form of the mask is read back"
    assert check["suspects"][0]["none"]
    seen = seen_by_udp(node.container, neighbour.container_address)
    assert seen == (node.address if masqueraded else node.container_address)
    # Only the marked kind.
    assert seen_by(node.container, neighbour.container_address) == node.container_address


HAIRPIN = """
    iptables -t nat -A PREROUTING -d 172.30.0.1/32 -p {protocol} --dport 8080 \
        -j DNAT --to-destination 172.7.21.2:8080
    iptables -t nat -A POSTROUTING -s 172.7.21.2/32 -d 172.7.21.2/32 -j MASQUERADE
"""


@pytest.mark.parametrize("bridged", [True, False])
def test_hairpin_works_as_before(lab: Lab, tmp_path: Path, bridged: bool) -> None:
    """A container to a service that is itself, as Docker without its proxy writes it."""
    node = lab.nodes[0]
    node.write_lease()
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    if bridged:
        node.host.run("bridge", "link", "set", "dev", "veth0", "hairpin", "on")
    else:
        # As the ptp plugin: a veth with the gateway's address and a route to the one container.
        node.host.shell(
            "ip link set veth0 nomaster; ip addr del 172.7.21.1/24 dev docker0;"
            "ip addr add 172.7.21.1/24 dev veth0"
        )
    for protocol in ("tcp", "udp"):
        node.host.shell(HAIRPIN.format(protocol=protocol))
    before = seen_by(node.container, "172.30.0.1"), seen_by_udp(node.container, "172.30.0.1")
    assert before == ("172.7.21.1", "172.7.21.1")
    with Snatd(node.host, tmp_path) as snatd:
        assert snatd.command("apply").returncode == 0
    assert "snat to ip saddr" in guard_of(node)
    after = seen_by(node.container, "172.30.0.1"), seen_by_udp(node.container, "172.30.0.1")
    assert after == before
    promises_hold(lab)


def test_hairpin_through_a_proxy_on_the_node(lab: Lab, tmp_path: Path) -> None:
    """Docker's proxy: the container calls the node, and a process there calls the container."""
    node = lab.nodes[0]
    node.write_lease()
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    proxy = WhoServer(node.host)

    def both_calls() -> tuple[str | None, str | None]:
        return seen_by(node.container, node.address), seen_by(node.host, node.container_address)

    try:
        before = both_calls()
        assert before == (node.container_address, "172.7.21.1")
        with Snatd(node.host, tmp_path) as snatd:
            assert snatd.command("apply").returncode == 0
        assert both_calls() == before
    finally:
        proxy.close()


SUBNETS = {Family.V4: ip_network("172.7.21.0/24"), Family.V6: ip_network("fd00:7:21::/64")}
CLUSTER = {Family.V4: ip_network("172.7.0.0/16"), Family.V6: ip_network("fd00:7::/32")}


def wanted(family: Family, *more: Network, spared: tuple[Network, ...] = ()) -> Desired:
    cluster = collapse((CLUSTER[family], *more))
    cut_outs = tuple(CutOut(one, "exclude") for one in spared)
    return Desired(
        family, SUBNETS[family], cluster, cluster, cluster, cut_outs, "docker0", True, False
    )


def soon() -> Deadline:
    return Deadline(time.monotonic() + 20)


def needed(transaction: Transaction | None) -> Transaction:
    assert transaction is not None
    return transaction


@pytest.fixture
def inside(host: Namespace) -> Iterator[Namespace]:
    with host.entered():
        yield host


@pytest.mark.parametrize("family", Family)
def test_it_reads_back_as_it_was_written(inside: Namespace, family: Family) -> None:
    """Random networks, cut-outs and marks; nft sorts and joins as it likes."""
    table = GuardTable(family, Tools())
    bits = 32 if family is Family.V4 else 128
    space = ip_network("10.0.0.0/8") if family is Family.V4 else ip_network("fd00:10::/32")

    @st.composite
    def prefix(draw: st.DrawFn) -> Network:
        length = draw(st.integers(space.prefixlen + 1, bits))
        number = draw(st.integers(0, 2 ** (length - space.prefixlen) - 1))
        first = int(space.network_address) + (number << (bits - length))
        return ip_network((first, length))

    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        st.lists(prefix(), max_size=6),
        st.lists(prefix(), max_size=6),
        st.lists(st.sampled_from([1, 0x2000, 0x4000, 2**31]), unique=True),
    )
    def written(more: list[Network], spared: list[Network], marks: list[int]) -> None:
        spared = [one for one in spared if not contains(SUBNETS[family], one)]
        policy = Policy(masquerade_marks=tuple(marks))
        want = wanted(family, *more, spared=tuple(spared))
        transaction = plan_guard(want, table.read(soon()), policy)
        if transaction is not None:
            table.apply(transaction, soon())
        there = table.read(soon())
        assert there.postrouting == guard_rules(want, marks)
        assert plan_guard(want, there, policy) is None

    written()
    table.apply(needed(without_guard(table.read(soon()))), soon())
    assert table.read(soon()).postrouting == ()
    assert inside.run("nft", "list", "ruleset") == ""


@pytest.mark.parametrize("family", Family)
def test_a_look_creates_nothing(inside: Namespace, family: Family) -> None:
    assert GuardTable(family, Tools()).read(soon()).postrouting == ()
    assert inside.run("nft", "list", "ruleset") == ""


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("family", Family)
def test_what_was_there_comes_back(family: Family) -> None:
    table = GuardTable(family, Tools())
    table.apply(needed(plan_guard(wanted(family), table.read(soon()), Policy())), soon())
    first = table.read(soon())
    more = CLUSTER[family].supernet(1)
    change = needed(plan_guard(wanted(family, more), first, Policy()))
    table.apply(change, soon())
    assert table.read(soon()).postrouting != first.postrouting
    table.apply(undone(change, table.read(soon())), soon())
    assert table.read(soon()).postrouting == first.postrouting


def test_a_refusal_changes_nothing(inside: Namespace) -> None:
    table = GuardTable(Family.V4, Tools())
    table.apply(needed(plan_guard(wanted(Family.V4), table.read(soon()), Policy())), soon())
    before = inside.run("nft", "list", "ruleset")
    change = needed(without_guard(table.read(soon())))
    (edit,) = change.edits
    bad = tuple(replace(rule, text=f"{rule.text} nonsense") for rule in edit.before or ())
    with pytest.raises(BackendFailed, match="nonsense"):
        table.apply(replace(change, edits=(replace(edit, after=bad),)), soon())
    assert inside.run("nft", "list", "ruleset") == before


@pytest.mark.usefixtures("inside")
def test_off_plans_nothing_where_there_is_none() -> None:
    table = GuardTable(Family.V4, Tools())
    policy = Policy(guard=GuardPolicy.OFF)
    assert plan_guard(wanted(Family.V4), table.read(soon()), policy) is None
