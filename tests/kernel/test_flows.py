"""Connections that were SNATed before the repair: listed, and deleted without touching another."""

from __future__ import annotations

import gc
import json
import select
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snatd.core.desired import Desired, desired
from snatd.core.errors import BackendError
from snatd.core.flows import FlowKey
from snatd.core.model import Family, NodeState, Policy
from snatd.host.flannel import read_lease
from snatd.kernel.conntrack import SHOWN, Entries, Sweep, Tally, read_peers
from snatd.kernel.snapshot import read_links
from snatd.kernel.tools import Tools
from tests.kernel.test_packets import add, applied
from tests.lab.netns import Namespace, until
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import PORT, Udp, seen_by, seen_by_udp

VIP = "10.96.0.1"


class Tcp:
    """A TCP connection that stays open between two hosts."""

    def __init__(self, client: Namespace, server: Namespace, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with server.entered():
            listener = socket.create_server((address, 0), family=family)
        with listener, client.entered():
            self.client = socket.create_connection(listener.getsockname()[:2], 2)
            self.server, peer = listener.accept()
        self.peer = peer[0]
        self.server.settimeout(2)

    def goes_on(self) -> bool:
        """Whether a byte still comes through; False where the peer resets."""
        try:
            self.client.send(b"x")
            select.select([self.client, self.server], [], [], 2)
            self.client.setblocking(False)
            try:
                self.client.recv(1)
            except BlockingIOError:
                return self.server.recv(1) == b"x"
        except ConnectionResetError:
            return False
        raise AssertionError("neither a byte nor a reset")


@pytest.fixture
def node(lab: Lab) -> Node:
    node = lab.nodes[0]
    node.write_lease(v6=True)
    add(node, "-A", "POSTROUTING", *node.broad_rule)
    v6_rule = ("-s", node.subnet_v6, "!", "-o", "docker0", "-j", "MASQUERADE")
    add(node, "-A", "POSTROUTING", *v6_rule, command="ip6tables")
    return node


@pytest.fixture
def snatd(node: Node, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(node.host, tmp_path / "snatd") as snatd:
        yield snatd


def entries(host: Namespace) -> set[str]:
    """All entries, without what changes by itself: timeouts, use counts."""
    found = set()
    for family in ("ipv4", "ipv6"):
        for line in host.run("conntrack", "-L", "-f", family, "-o", "id").splitlines():
            number, tail = line.split()[1], line[line.index("src=") :]
            found.add(f"{number} {tail.replace('use=2', 'use=1')}")
    return found


def test_fault_30_flows_from_before_the_repair(
    lab: Lab, node: Node, snatd: Snatd, tmp_path: Path
) -> None:
    other = lab.nodes[1]
    udp = Udp(node.container, other.container_address)
    udp_v6 = Udp(node.container, other.container_v6)
    tcp = Tcp(node.container, other.container, other.container_address)
    assert (udp.seen_as(), udp_v6.seen_as()) == (node.address, node.address_v6)
    assert tcp.peer == node.address
    applied(node, tmp_path)
    assert udp.seen_as() == node.address, "the kernel corrects it by itself"

    done = snatd.command("flows")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()].count("udp") == 2
    document = snatd.json("flows")
    assert document["cut_off"] is False
    listed = {(one["protocol"], one["source"]): one for one in document["flows"]}
    assert set(listed) == {
        ("udp", node.container_address),
        ("udp", node.container_v6),
        ("tcp", node.container_address),
    }
    for one in listed.values():
        assert one["seen_as"] == (node.address_v6 if one["family"] == "ipv6" else node.address)
        assert one["timeout_s"] > 0
        assert one["age_s"] is None
    of_udp = listed["udp", node.container_address]
    assert of_udp["source_port"] == udp.socket.getsockname()[1]
    assert (of_udp["destination"], of_udp["destination_port"]) == (other.container_address, PORT)

    done = snatd.command("flows", "--delete", "udp")
    assert done.returncode == 0
    assert "what is left is not UDP" in done.stderr
    assert done.stdout == "2 flows deleted, 1 left\n"
    assert udp.seen_as() == node.container_address, "the same socket, the right address"
    assert udp_v6.seen_as() == node.container_v6
    assert tcp.goes_on()

    done = snatd.command("flows", "--delete", "all")
    assert done.stdout == "1 flow deleted, 0 left\n"
    assert "TCP" in done.stderr
    assert not tcp.goes_on(), "the warning is about nothing"
    assert snatd.json("flows")["flows"] == []
    assert snatd.command("flows").stdout == "no flow hides a container's address\n"


def test_fault_30_no_entry_of_anyone_else_is_touched(
    lab: Lab, node: Node, snatd: Snatd, tmp_path: Path
) -> None:
    other, pod = lab.nodes[1], lab.nodes[1].container_address
    # kube-proxy, as far as a packet sees it: a mark, a DNAT, and masquerade for what is marked.
    for rule in (
        f"-t mangle -A PREROUTING -d {VIP} -j MARK --set-mark 0x4000",
        f"-t nat -A PREROUTING -d {VIP} -j DNAT --to-destination {pod}",
        "-t nat -I POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE",
    ):
        node.host.run("iptables", "-w", "5", *rule.split())
    assert seen_by(node.container, VIP) == node.address
    assert seen_by_udp(node.container, OUTSIDE) == node.address
    assert seen_by(node.container, OUTSIDE) == node.address
    wrong = Udp(node.container, pod)
    assert wrong.seen_as() == node.address
    port = wrong.socket.getsockname()[1]
    assert seen_by_udp(node.container, other.container_v6) == node.address_v6
    applied(node, tmp_path)
    assert seen_by_udp(node.container, pod) == node.container_address
    # Made by hand what takes more hosts to make: each differs in one thing from a wrong one.
    ports = f"--sport {port} --dport {PORT} --reply-port-src {PORT} --reply-port-dst {port}"
    me = node.container_address
    by_hand = [
        f"-s 172.7.29.2 -d {pod} -r {pod} -n {node.address} -p udp {ports}",
        f"-s 172.17.0.2 -d {pod} -r {pod} -n {node.address} -p udp {ports}",
        f"-s {me} -d 172.7.21.9 -r 172.7.21.9 -n {node.address} -p udp {ports}",
        f"-s {me} -d 172.8.0.9 -r 172.8.0.9 -n {node.address} -p udp {ports}",
        f"-s {me} -d 172.7.96.1 -g {pod} -n {node.address} -p udp {ports}",
        f"-s {me} -d {pod} -r {pod} -n {node.address} -m 0x4000 -p udp "
        f"{ports.replace(str(port), '7')}",
        f"-s {pod} -d {me} -r {me} -n {node.address} -p udp {ports}",
    ]
    script = "".join(f"-A -t 600 -u SEEN_REPLY,ASSURED {one}\n" for one in by_hand)
    node.host.run("conntrack", "-R", "-", stdin=script)
    same_in_tcp = f"-s {me} -d {pod} -r {pod} -n {node.address} -p tcp {ports} --state ESTABLISHED"
    state = "-A -t 600 -u SEEN_REPLY,ASSURED"
    node.host.run("conntrack", "-R", "-", stdin=f"{state} {same_in_tcp}\n")
    before = entries(node.host)
    assert len(before) >= len(by_hand) + 7

    done = snatd.command("flows", "--delete", "udp")
    assert done.stdout == "2 flows deleted, 1 left\n"
    assert "what is left is not UDP: `--delete all` ends it too, and resets TCP" in done.stderr
    gone = before - entries(node.host)
    assert all(one.startswith("17 ") for one in gone)
    assert {one.split("dst=")[1].split()[0] for one in gone} == {pod, other.container_v6}
    assert {one.split("src=")[1].split()[0] for one in gone} == {me, node.container_v6}
    assert len(gone) == 2
    assert snatd.command("flows", "--delete", "all").stdout == "1 flow deleted, 0 left\n"
    (tcp,) = before - gone - entries(node.host)
    assert tcp.startswith(f"6 src={me} dst={pod} sport={port} ")


def test_a_delete_before_the_repair_is_said_to_be_in_vain(
    lab: Lab, node: Node, snatd: Snatd
) -> None:
    udp = Udp(node.container, lab.nodes[1].container_address)
    assert udp.seen_as() == node.address
    done = snatd.command("flows", "--delete", "udp")
    assert done.stdout == "1 flow deleted, 0 left\n"
    assert "not in sync" in done.stderr
    assert udp.seen_as() == node.address


def test_a_cut_out_keeps_its_masquerade(backend: str, tmp_path: Path) -> None:
    with Lab(backend, pods="10.7") as lab:
        node = lab.nodes[0]
        node.write_lease("10.0.0.0/8")
        add(node, "-A", "POSTROUTING", *node.broad_rule)
        assert seen_by_udp(node.container, "10.4.7.100") == node.address
        assert seen_by_udp(node.container, lab.nodes[1].container_address) == node.address
        snatd = applied(node, tmp_path)
        (one,) = snatd.json("flows")["flows"]
        assert one["destination"] == lab.nodes[1].container_address


def test_without_the_command(nft_lab: Lab, tmp_path: Path) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    node.host.shell("mount --bind /dev/null $(command -v conntrack)")
    with Snatd(node.host, tmp_path) as snatd:
        done = snatd.command("flows", "--json")
        assert done.returncode == 4
        assert "install the package conntrack" in done.stderr
        assert "install the package conntrack" in json.loads(done.stdout)["problems"][0]


def test_without_a_lease(host: Namespace, tmp_path: Path) -> None:
    with Snatd(host, tmp_path) as snatd:
        done = snatd.command("flows")
        assert done.returncode == 3
        assert "subnet.env" in done.stderr


def test_age_where_the_kernel_keeps_it(lab: Lab, node: Node, snatd: Snatd) -> None:
    node.host.shell("echo 1 > /proc/sys/net/netfilter/nf_conntrack_timestamp")
    assert seen_by_udp(node.container, lab.nodes[1].container_address) == node.address
    (one,) = snatd.json("flows")["flows"]
    assert one["age_s"] in range(10)


def leased(node: Node) -> Desired:
    with node.host.entered():
        links, routes = read_links(list(Family))
    lease = read_lease(node.host.path("/run/flannel/subnet.env"))
    one = desired(Family.V4, NodeState(lease, links, routes), Policy())
    assert isinstance(one, Desired)
    return one


def sweep(node: Node, limit_s: float = 10, **options: object) -> Tally:
    with node.host.entered():
        return Sweep(leased(node), Tools(), limit_s, **options).run()  # type: ignore[arg-type]


def test_fault_30_flows_since_a_change(lab: Lab, node: Node, tmp_path: Path) -> None:
    pod = lab.nodes[1].container_address
    wrong = Udp(node.container, pod)
    assert wrong.seen_as() == node.address
    applied(node, tmp_path, guard="off")
    at_the_change = sweep(node, census=True)
    assert (at_the_change.wrong, at_the_change.kept) == (1, 0)
    assert at_the_change.ids is not None
    for _ in range(3):
        assert seen_by_udp(node.container, pod) == node.container_address
    since = sweep(node, census=True, before=at_the_change.ids)
    assert (since.kept, since.changed, since.wrong) == (3, 0, 1)
    # The same tuple begun anew is another connection, even where the kernel gives it the same id.
    assert sweep(node, policy="udp").deleted == 1
    assert wrong.seen_as() == node.container_address
    since = sweep(node, census=True, before=at_the_change.ids)
    assert (since.kept, since.changed, since.wrong) == (4, 0, 0)
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    assert seen_by_udp(node.container, pod) == node.address
    since = sweep(node, census=True, before=at_the_change.ids)
    assert (since.kept, since.changed, since.wrong) == (4, 1, 1)


def test_a_connection_of_before_that_is_over_does_not_count(
    lab: Lab, node: Node, tmp_path: Path
) -> None:
    """It takes two minutes for its entry to go."""
    pod = lab.nodes[1].container_address
    assert seen_by(node.container, pod) == node.address
    until(lambda: [one.state for one in sweep(node).flows] == ["TIME_WAIT"], "its end")
    before = sweep(node, census=True)
    assert (before.wrong, before.changed) == (0, 0)
    assert sweep(node, census=True, before=before.ids).wrong == 0
    # One that was begun since then is a proof of what the rules do.
    assert seen_by(node.container, pod) == node.address
    since = sweep(node, census=True, before=before.ids)
    assert (since.wrong, since.changed) == (1, 1)
    with Snatd(node.host, tmp_path) as snatd:
        over = "2 of these are over; `snatd status` counts them no more"
        until(lambda: over in snatd.command("flows").stderr, "both told")


def test_single_entries_by_their_tuple(lab: Lab, node: Node, tmp_path: Path) -> None:
    flow = Udp(node.container, lab.nodes[1].container_address)
    flow.seen_as()
    (listed,) = sweep(node).flows
    applied(node, tmp_path)
    with node.host.entered(), Entries(Family.V4) as table:
        assert table.seen_as(listed.key) == listed.seen_as
        assert not table.delete(listed.key, listed.id ^ 1)
        assert table.delete(listed.key, listed.id)
        assert not table.delete(listed.key, listed.id)
        assert flow.seen_as() == node.container_address
        assert table.seen_as(listed.key) == listed.key.source
        # The tuple of its reply names the same entry, and is not its own.
        key = listed.key
        back = FlowKey(17, key.destination, key.source, key.destination_port, key.source_port)
        assert table.seen_as(back) is None
        assert table.delete(key)
        assert table.seen_as(key) is None


def fill(node: Node, number: int, *, wrong: bool, pod: str = "") -> None:
    """Entries as they would be after as many flows; 60,000 take half a second."""
    pod, me = pod or ("172.7.22.2" if wrong else "172.7.22.3"), "172.7.21.2"
    to = f"-n {node.address}" if wrong else f"-q {me}"
    script = "".join(
        f"-A -t 600 -u SEEN_REPLY,ASSURED -s {me} -d {pod} -r {pod} {to} -p udp --sport {port} "
        f"--dport 53 --reply-port-src 53 --reply-port-dst {port}\n"
        for port in range(1024, 1024 + number)
    )
    node.host.run("conntrack", "-R", "-", stdin=script)


def test_60_000_entries(nft_lab: Lab) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    fill(node, 60_000, wrong=True)
    before_kb, times_s = _peak_kb(), []
    for _ in range(3):  # of this thread alone: the machine may be busy with something else
        started_s = time.thread_time()
        tally = sweep(node)
        times_s.append(time.thread_time() - started_s)
        assert (tally.wrong, len(tally.flows), tally.cut_off) == (60_000, SHOWN, None)
    assert min(times_s) < 1, times_s
    assert _peak_kb() - before_kb < 10_000


def test_of_a_large_table_new_flows_are_counted_by_a_sample_and_wrong_ones_all(
    nft_lab: Lab,
) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    for pod in ("172.7.22.4", "172.7.22.5"):
        fill(node, 40_000, wrong=False, pod=pod)
    first = sweep(node, census=True)
    assert first.ids is not None
    assert (first.ids.one_in, first.wrong) == (2, 0)
    assert len(first.ids) == pytest.approx(40_000, rel=0.05)
    same = sweep(node, census=True, before=first.ids)
    assert (same.kept, same.changed) == (0, 0)
    fill(node, 4_000, wrong=False)
    fill(node, 7, wrong=True)
    then = sweep(node, census=True, before=first.ids)
    assert then.kept == pytest.approx(4_000, rel=0.15)
    assert (then.changed, then.wrong) == (7, 7)


def _peak_kb() -> int:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1])


@contextmanager
def _no_garbage() -> Iterator[None]:
    """That of three thousand tests before is none of a sweep's, and is not looked through in it."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def test_a_sweep_never_blocks_and_is_cut_off(nft_lab: Lab) -> None:
    node = nft_lab.nodes[0]
    node.write_lease()
    fill(node, 60_000, wrong=True)
    with node.host.entered(), _no_garbage():
        one = Sweep(leased(node), Tools(), 1.0, policy="all", census=True)
        longest_s, took_s = 0.0, []
        selector = selectors.DefaultSelector()
        selector.register(one, selectors.EVENT_READ)
        while one.tally is None:
            selector.select(max(0.0, one.ends_s - time.monotonic()))
            started_s, began_s = time.thread_time(), time.monotonic()
            one.step()
            took_s.append(time.monotonic() - began_s)
            longest_s = max(longest_s, time.thread_time() - started_s)
        selector.unregister(one)
        assert not selector.get_map()
    assert one.tally.cut_off == "after 1 s"
    assert 0 < one.tally.deleted <= one.tally.wrong < 60_000
    assert longest_s < 0.05
    # On a busy machine one or the other has to wait for a core.
    assert sorted(took_s)[len(took_s) * 9 // 10] < 0.05
    left = int(node.host.run("conntrack", "-C"))
    assert left == 60_000 - one.tally.deleted


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo nonsense", "cannot be read"),
        ("printf 'udp      17 29 src=1.2'", "middle of a line"),
        ("echo no >&2; exit 1", "exit 1.*no"),
        ("kill -9 $$", "killed by SIGKILL"),
    ],
)
def test_a_conntrack_that_cannot_be_trusted(
    nft_lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: str
) -> None:
    nft_lab.nodes[0].write_lease()
    tool = tmp_path / "conntrack"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    with pytest.raises(BackendError, match=error):
        sweep(nft_lab.nodes[0])


def test_a_conntrack_that_hangs_is_ended(
    nft_lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nft_lab.nodes[0].write_lease()
    tool = tmp_path / "conntrack"
    tool.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    tally = sweep(nft_lab.nodes[0], 0.3)
    assert tally.cut_off == "after 0.3 s"
    pid = (tmp_path / "pid").read_text().strip()
    until(lambda: not Path(f"/proc/{pid}").exists(), "the child's end")


def test_a_conntrack_that_takes_its_time_to_end_is_believed(
    nft_lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nft_lab.nodes[0].write_lease()
    tool = tmp_path / "conntrack"
    tool.write_text("#!/bin/sh\nexec >&-\nsleep 0.3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    assert sweep(nft_lab.nodes[0]).cut_off is None
    with nft_lab.nodes[0].host.entered():
        assert read_peers(leased(nft_lab.nodes[0]), Tools(), 5.0) == ((), True)
