"""What `explain` says, against what the other side saw: random rulesets, real packets.

TRACE_CASES says how many packets (default: about a minute's), TRACE_SEED where to begin; a failure
prints the seed of its ruleset, with which TRACE_CASES=1 shows it again.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import pytest

from snatd.core.deadline import Deadline
from snatd.core.model import Family
from snatd.core.trace import Answer
from snatd.explain import Explanation, Question, explain, lines
from snatd.kernel.hooks import Hooks, read_hooks
from snatd.kernel.tools import Tools
from tests.kernel.rulesets import MARK_PORTS, V4, V6, Ruleset, World, generate
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import seen_by_udp

CASES = int(os.environ.get("TRACE_CASES", "4000"))
SEED = int(os.environ.get("TRACE_SEED", "1"))
_PACKETS_PER_RULESET = 12
_UDP = socket.IPPROTO_UDP


class Wire:
    """Sends datagrams from here to there, and says as whom each was seen."""

    def __init__(self, lab: Lab, world: World) -> None:
        self.node, self.world = lab.nodes[0], world
        self.family = socket.AF_INET if world is V4 else socket.AF_INET6
        self._sport = 1024
        self._stack = ExitStack()
        self.node.host.shell(f"ip addr add {world.second}/{24 if world is V4 else 64} dev eth0")
        self.node.container.shell(
            f"ip addr add {world.container_2}/{24 if world is V4 else 64} dev eth0"
        )
        at = {world.neighbour: lab.nodes[1].container, world.container: self.node.container}
        at |= {world.outside: lab.outside, world.lan_host: lab.outside}
        self._servers: dict[tuple[str, int], socket.socket] = {}
        for address, host in at.items():
            with host.entered():
                for port in MARK_PORTS:
                    server = self._stack.enter_context(
                        socket.socket(self.family, socket.SOCK_DGRAM)
                    )
                    server.bind((address, port))
                    self._servers[address, port] = server

    def close(self) -> None:
        self._stack.close()

    def seen(
        self, source: str, destination: str, port: int, wait_s: float
    ) -> tuple[int, str | None]:
        """The source port, never used before, and as whom; None where nothing came."""
        w, server = self.world, self._servers[destination, port]
        server.settimeout(wait_s)
        mine = source in (w.node_in, w.node_out)
        self._sport = self._sport + 1 if self._sport < 60000 else 1024
        if self._sport in MARK_PORTS:
            self._sport += len(MARK_PORTS)
        token = f"{self._sport} {time.monotonic_ns()}".encode()
        with (self.node.host if mine else self.node.container).entered():
            caller = socket.socket(self.family, socket.SOCK_DGRAM)
        with caller:
            caller.bind((source, self._sport))
            with suppress(PermissionError):  # dropped on the way out
                caller.sendto(token, (destination, port))
            with suppress(TimeoutError):
                while True:
                    received, (address, *_) = server.recvfrom(100)
                    if received == token:
                        return self._sport, address
        return self._sport, None


def install(node: Node, world: World, ruleset: Ruleset) -> None:
    """Replaces all that is on the node."""
    marks = [f"udp dport {port} meta mark set {mark}" for port, mark in MARK_PORTS.items() if mark]
    hooks = ("forward", "output")
    flush = ["flush ruleset", "add table inet marks"]
    flush += [
        f"add chain inet marks {one} {{ type filter hook {one} priority -150; }}" for one in hooks
    ]
    flush += [f"add rule inet marks {one} {mark}" for one in hooks for mark in marks]
    node.host.run("nft", "-f", "-", stdin="\n".join(flush) + "\n")
    empty = ["*nat", "COMMIT", ""]
    legacy = ruleset.xtables.get("legacy", empty)
    node.host.run(f"{world.command}-legacy-restore", stdin="\n".join(legacy))
    if "nft" in ruleset.xtables:
        node.host.run(f"{world.command}-nft-restore", stdin="\n".join(ruleset.xtables["nft"]))
    try:
        node.host.run("nft", "-f", "-", stdin="\n".join(ruleset.nft) + "\n")
    except AssertionError:
        # Chance made a rule that contradicts itself, which nft refuses: without it, then.
        for line in ruleset.nft:
            node.host.run("nft", line, check=False)


def questions(random: Random, world: World) -> Iterator[tuple[str, str, int]]:
    w = world
    for _ in range(_PACKETS_PER_RULESET):
        source = random.choice((w.container, w.container, w.container_2, w.node_out, w.node_in))
        mine = source in (w.node_in, w.node_out)
        there = (w.neighbour, w.neighbour, w.lan_host, w.outside, *([w.container] if mine else []))
        yield source, random.choice(there), random.choice(tuple(MARK_PORTS))


def told(source: str, destination: str, port: int, sport: int, hooks: Hooks) -> Explanation:
    question = Question(
        ipaddress.ip_address(source),
        ipaddress.ip_address(destination),
        mark=MARK_PORTS[port],
        protocol=_UDP,
        sport=sport,
        dport=port,
    )
    return explain(question, lambda _: hooks)


def disagreement(explanation: Explanation, seen: str | None, ruleset: Ruleset) -> str | None:
    """What is wrong with an explanation, in view of what was seen."""
    answer = explanation.trace.answer
    if answer is None and not ruleset.may:
        return "says may without a reason"
    if not any(_agrees(one, seen, explanation) for one in explanation.trace.answers):
        return "says otherwise"
    return None


def _agrees(answer: Answer, seen: str | None, explanation: Explanation) -> bool:
    if answer.dropped:
        return seen is None
    if answer.sources is None:
        return True
    # Nobody takes a packet that comes from himself.
    mine = explanation.question.destination in answer.sources
    return mine if seen is None else ipaddress.ip_address(seen) in answer.sources


@pytest.mark.parametrize("world", [V4, V6], ids=["ipv4", "ipv6"])
def test_explain_says_what_the_other_side_sees(nft_lab: Lab, world: World) -> None:
    node = nft_lab.nodes[0]
    family = Family.V4 if world is V4 else Family.V6
    wire = Wire(nft_lab, world)
    cases = mays = rewritten = 0
    seed = SEED
    while cases < CASES / 2:
        random = Random(seed)
        ruleset = generate(random, world)
        install(node, world, ruleset)
        with node.host.entered():
            hooks = read_hooks(family, Tools(), Deadline(time.monotonic() + 20))
        for source, destination, port in questions(random, world):
            with node.host.entered():
                explanation = told(source, destination, port, 0, hooks)
            answer = explanation.trace.answer
            wait_s = 0.05 if answer and answer.dropped else 1
            _, seen = wire.seen(source, destination, port, wait_s)
            wrong = disagreement(explanation, seen, ruleset)
            assert wrong is None, (
                f"TRACE_SEED={seed}: {source} to {destination} port {port} was seen as {seen}, but "
                f"explain {wrong}:\n{chr(10).join(lines(explanation))}\n{ruleset}"
            )
            cases += 1
            mays += answer is None
            rewritten += answer is not None and answer.kept is False
        seed += 1
    print(f"{cases} packets, {seed - SEED} rulesets: {rewritten} rewritten, {mays} may")
    assert rewritten > cases / 10
    assert mays < cases / 2
    wire.close()


def hooks_of(node: Node, family: Family = Family.V4, tools: Tools | None = None) -> Hooks:
    with node.host.entered():
        return read_hooks(family, tools or Tools(), Deadline(time.monotonic() + 20))


def ask(node: Node, source: str, destination: str) -> str:
    """The address that explain says, `None`, or `may`."""
    question = Question(ipaddress.ip_address(source), ipaddress.ip_address(destination))
    family = Family.V4 if question.source.version == 4 else Family.V6
    hooks = hooks_of(node, family)
    with node.host.entered():
        answer = explain(question, lambda _: hooks).trace.answer
    return "may" if answer is None else str((answer.sources or (None,))[0])


def test_looking_creates_nothing(nft_lab: Lab) -> None:
    node = nft_lab.nodes[0]
    for family in Family:
        assert hooks_of(node, family).hooks == ()
    assert node.host.run("nft", "list", "ruleset") == ""
    for name in ("ip_tables_names", "ip6_tables_names"):
        assert node.host.run("cat", f"/proc/net/{name}") == ""


def test_without_nft_only_what_iptables_knows(nft_lab: Lab) -> None:
    class Lacking(Tools):
        def find(self, name: str) -> str | None:
            return None if name == "nft" else super().find(name)

    node = nft_lab.nodes[0]
    node.host.run(
        "nft",
        "-f",
        "-",
        stdin="table ip x { chain post { type nat hook postrouting priority 0; }; }",
    )
    node.host.run("iptables-nft", "-t", "nat", "-A", "POSTROUTING", *node.broad_rule)
    found = hooks_of(node, tools=Lacking())
    assert [(hook.table, len(hook.chains["POSTROUTING"])) for hook in found.hooks] == [
        ("ip nat", 1)
    ]
    assert "nft is not installed" in found.unread[0]
    assert sorted(one.table for one in hooks_of(node).hooks) == ["ip nat", "ip x"]
    # What else there is might keep the address, or hide it: the wire says what explain may not.
    with node.host.entered():
        told = explain(
            Question(
                ipaddress.ip_address(node.container_address), ipaddress.ip_address("172.7.22.2")
            ),
            lambda _: found,
        )
    assert told.trace.answer is None
    assert (
        "may see 10.4.7.21 or another address: depends on `nft is not installed"
        in [*lines(told)][-1]
    )


def test_a_dormant_table_is_not_asked(nft_lab: Lab) -> None:
    node, neighbour = nft_lab.nodes
    node.host.shell(
        "nft add table ip x '{ flags dormant; }';"
        "nft add chain ip x post '{ type nat hook postrouting priority 0; }';"
        "nft add rule ip x post masquerade"
    )
    assert hooks_of(node).hooks == ()
    assert seen_by_udp(node.container, neighbour.container_address) == node.container_address
    node.host.shell("nft add table ip x")
    assert [one.table for one in hooks_of(node).hooks] == ["ip x"]
    assert seen_by_udp(node.container, neighbour.container_address) == node.address


def test_a_translation_of_the_other_family_passes_packets_on(nft_lab: Lab) -> None:
    node, neighbour = nft_lab.nodes
    node.host.shell(
        "nft add table inet x;"
        "nft add chain inet x post '{ type nat hook postrouting priority 101; }';"
        "nft add rule inet x post snat ip6 to fd00:4:7::21;"
        "nft add rule inet x post oifname eth0 snat ip6 to fd00:4:7::21-fd00:4:7::25"
    )
    assert seen_by_udp(node.container, neighbour.container_address) == node.container_address
    assert ask(node, node.container_address, neighbour.container_address) == node.container_address
    node.host.shell("nft add rule inet x post snat ip to 10.4.7.21")
    assert seen_by_udp(node.container, neighbour.container_address) == node.address
    assert ask(node, node.container_address, neighbour.container_address) == node.address


@pytest.mark.parametrize("chains", [3, 60])
@pytest.mark.parametrize("command", ["iptables-nft-restore", "iptables-legacy-restore", "nft"])
def test_only_what_can_be_reached_is_read(nft_lab: Lab, command: str, chains: int) -> None:
    node, names = nft_lab.nodes[0], [f"C{number}" for number in range(60)]
    if command == "nft":
        jumps = "; ".join(f"jump {name}" for name in names[:chains])
        bodies = "".join(f"chain {name} {{ ip saddr 1.2.3.4 return; }}; " for name in names)
        hook = "type nat hook postrouting priority 100"
        script = f"table ip x {{ {bodies} chain post {{ {hook}; {jumps}; }}; }}"
        node.host.run(command, "-f", "-", stdin=script)
    else:
        lines = [*(f":{name} -" for name in names), *(f"-A {name} -j RETURN" for name in names)]
        lines += [f"-A POSTROUTING -j {name}" for name in names[:chains]]
        node.host.run(command, stdin="\n".join(["*nat", *lines, "COMMIT", ""]))
    (hook_,) = hooks_of(node).hooks
    assert set(names[:chains]) <= set(hook_.chains)
    assert all(len(hook_.chains[name]) == 1 for name in names[:chains])
    if chains == 3:
        assert len(hook_.chains) == chains + 1


def test_a_native_rule_in_iptables_table(nft_lab: Lab) -> None:
    node = nft_lab.nodes[0]
    node.host.shell(
        "iptables-nft -t nat -N KUBE-POSTROUTING; "
        "iptables-nft -t nat -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN; "
        "iptables-nft -t nat -A KUBE-POSTROUTING -j MASQUERADE; "
        "iptables-nft -t nat -A POSTROUTING -m comment --comment k8s -j KUBE-POSTROUTING; "
        "nft add rule ip nat POSTROUTING oifname eth0 masquerade"
    )
    (hook,) = hooks_of(node).hooks
    assert [step.text for step in hook.chains["KUBE-POSTROUTING"]][1] == "-j MASQUERADE"
    assert hook.chains["POSTROUTING"][-1].text == 'oifname "eth0" masquerade'
    assert ask(node, node.container_address, OUTSIDE) == node.address


def test_another_base_chain_in_iptables_table(nft_lab: Lab) -> None:
    """Of a table with many chains iptables-nft prints all, and a line on that one before."""
    node = nft_lab.nodes[0]
    names = [f"C{number}" for number in range(60)]
    lines = [*(f":{name} -" for name in names), *(f"-A {name} -j RETURN" for name in names)]
    lines += [f"-A POSTROUTING -j {name}" for name in names]
    node.host.run("iptables-nft-restore", stdin="\n".join(["*nat", *lines, "COMMIT", ""]))
    odd = "add chain ip nat odd { type nat hook postrouting priority 50; }"
    node.host.run("nft", f"{odd}; add rule ip nat odd oifname eth0 masquerade")
    assert node.host.run("iptables-nft", "-t", "nat", "-S").startswith("# Table `nat' contains ")
    hooks = {hook.chain: hook for hook in hooks_of(node).hooks}
    assert set(hooks) == {"odd", "POSTROUTING"}
    assert [step.text for step in hooks["POSTROUTING"].chains["C59"]] == ["-j RETURN"]
    assert ask(node, node.container_address, OUTSIDE) == node.address


V4_ADDRESSES = [
    ("10.4.7.21/24",),
    ("10.4.7.21/24", "10.4.7.99/24"),
    ("10.4.7.99/24", "10.4.7.21/24"),
    ("10.99.0.1/24", "10.4.7.21/24"),
    ("10.4.7.21/24", "10.99.0.1/24"),
    ("10.99.0.1/24", "10.4.7.50/25", "10.4.7.21/24"),
    ("10.99.0.1/24 scope link", "10.4.7.21/24"),
    ("10.4.7.21/24 scope link", "10.99.0.1/24"),
    ("10.4.7.21/24 scope link",),
    ("10.98.0.1 peer 10.4.7.100/32", "10.4.7.21/24"),
    ("10.98.0.1 peer 10.4.7.22/32", "10.99.0.1/24"),
]
V6_ADDRESSES = [
    ("fd00:4:7::21/64",),
    ("fd00:4:7::21/64", "fd00:4:7::99/64"),
    ("fd00:4:7::99/64", "fd00:4:7::21/64"),
    ("fd00:4:7::21/64", "fd00:4:7::99/64 preferred_lft 0"),
    ("fd00:4:7::99/64 preferred_lft 0",),
    ("fd00:99::1/64", "fd00:7:99::1/64", "fd00:4:7::21/64"),
    ("fd00:4:7::21/64", "2001:db8:1::1/64"),
    (),
]


@pytest.mark.parametrize("addresses", [*V4_ADDRESSES, *V6_ADDRESSES], ids=", ".join)
def test_masquerade_takes_the_address_that_explain_says(
    nft_lab: Lab, addresses: tuple[str, ...]
) -> None:
    """As the kernel chooses: by next hop, order, scope; by destination in IPv6."""
    node = nft_lab.nodes[0]
    world = V6 if addresses in V6_ADDRESSES else V4
    wire = Wire(nft_lab, world)
    ip = "ip -6" if world is V6 else "ip -4"
    gateway, neighbour = world.lan_host, node.address.replace(".21", ".22")
    if world is V6:
        neighbour = "fd00:4:7::22"
    routes = [("default", gateway), (world.neighbour, neighbour)]
    node.host.shell(
        # Without an address of the link itself, IPv6 finds no neighbours.
        f"{ip} addr flush dev eth0{' scope global' if world is V6 else ''}; "
        + "".join(f"{ip} addr add {one} dev eth0; " for one in addresses)
        + "".join(f"{ip} route replace {to} via {via} dev eth0 onlink; " for to, via in routes)
        + f"{world.command}-nft -t nat -A POSTROUTING -o eth0 -j MASQUERADE"
    )
    asked = 0
    for destination in (world.outside, world.neighbour):
        said = ask(node, world.container, destination)
        seen = wire.seen(world.container, destination, 5000, 1.0 if said != "None" else 0.1)[1]
        asked += said != "may"
        assert said in (str(seen), "may")
    # The label table of IPv6 may have been changed, and is not read.
    assert asked == 2 or "2001:db8:1::1/64" in addresses
    wire.close()


@pytest.fixture
def snatd(nft_lab: Lab, tmp_path: Path) -> Iterator[Snatd]:
    with Snatd(nft_lab.nodes[0].host, tmp_path) as snatd:
        yield snatd


def test_the_command(nft_lab: Lab, snatd: Snatd) -> None:
    """Without a subnet.env, as long as there is a question."""
    node, neighbour = nft_lab.nodes
    pod, other = node.container_address, neighbour.container_address
    node.host.run("iptables-nft", "-t", "nat", "-A", "POSTROUTING", *node.broad_rule)
    done = snatd.command("explain", pod, other)
    assert done.returncode == 0, done.stderr
    rule = "as Docker writes it, ip nat POSTROUTING rule 1"
    assert (
        done.stdout.splitlines()[0]
        == f"{pod} to {other} by eth0, next hop {neighbour.address}, mark 0x0"
    )
    assert done.stdout.splitlines()[-1] == f"{other} sees {node.address} ({rule})"
    said = snatd.json("explain", pod, other)
    assert (said["source"], said["kept"], said["out"]) == (node.address, False, "eth0")
    kept = snatd.json("explain", pod, other, "--out", "docker0", "--mark", "0x4000")
    assert (kept["source"], kept["kept"], kept["mark"]) == (pod, True, 0x4000)
    assert kept["decided_by"] is None
    six = snatd.json("explain", node.container_v6, neighbour.container_v6, "--proto", "udp")
    assert six["source"] == node.container_v6


def test_the_command_says_may(nft_lab: Lab, snatd: Snatd) -> None:
    node, neighbour = nft_lab.nodes
    rule = ("-p", "tcp", "-m", "tcp", "--dport", "80", "-j", "MASQUERADE")
    node.host.run("iptables-nft", "-t", "nat", "-A", "POSTROUTING", *rule)
    asked = (node.container_address, neighbour.container_address)
    done = snatd.command("explain", *asked)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith("depends on `-p tcp`, `-m tcp --dport 80`")
    assert snatd.command("explain", *asked, "--proto", "udp").returncode == 0
    said = snatd.json("explain", *asked, "--proto", "tcp", "--dport", "80")
    assert said["source"] == node.address


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("172.7.21.2", "fd00::1"), "two families"),
        (("172.7.21.2", "172.7.22.2", "--out", "nosuch"), "no such device"),
        (("172.7.21.2", "10.4.7.21"), "this node's own"),
        (("172.7.21.2", "nonsense"), "is not an address"),
        (("172.7.21.2", "172.7.22.2", "--mark", "-1"), "is not from 0"),
        (("172.7.21.2", "172.7.22.2", "--proto", "odd"), "is not"),
        (("172.7.21.2",), "DST"),
    ],
)
def test_a_wrong_question(snatd: Snatd, arguments: tuple[str, ...], complaint: str) -> None:
    done = snatd.command("explain", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr


def test_no_route(nft_lab: Lab, snatd: Snatd) -> None:
    nft_lab.nodes[0].host.run("ip", "route", "del", "default")
    done = snatd.command("explain", "172.7.21.2", OUTSIDE, "--json")
    assert done.returncode == 2
    assert "no route to 203.0.113.9" in done.stderr
    assert '"exit": 2' in done.stdout


def test_a_tool_that_fails(nft_lab: Lab, snatd: Snatd, tmp_path: Path) -> None:
    folder = tmp_path / "shim"
    folder.mkdir()
    broken = folder / "nft"
    broken.write_text("#!/bin/sh\necho '{'\n")
    broken.chmod(0o755)
    nft_lab.nodes[0].host.use_iptables(folder)
    done = snatd.command("explain", "172.7.21.2", OUTSIDE)
    assert done.returncode == 4
    assert "`nft -j list chains` printed something other than JSON" in done.stderr
