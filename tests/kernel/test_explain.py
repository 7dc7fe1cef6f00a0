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
from random import Random

import pytest

from snatd.core.deadline import Deadline
from snatd.core.model import Family
from snatd.core.trace import Answer
from snatd.explain import Explanation, Question, explain, lines
from snatd.kernel.hooks import Hooks, read_hooks
from snatd.kernel.tools import Tools
from tests.kernel.rulesets import MARK_PORTS, V4, V6, Ruleset, World, generate
from tests.lab.network import Lab, Node

CASES = int(os.environ.get("TRACE_CASES", "1500"))
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
        for name, command in (("eth0", f"{world.second}"),):
            self.node.host.shell(f"ip addr add {command}/{24 if world is V4 else 64} dev {name}")
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
