"""`make demo`: the problem and its repair, seen by the other side. Exits 0 only if all was seen."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator

from tests.lab.netns import until
from tests.lab.network import OUTSIDE, Lab, Node
from tests.lab.process import Snatd
from tests.lab.who import seen_by

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


class Story:
    """Tells and checks at the same time. Plain in a pipe."""

    def __init__(self) -> None:
        self._coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.missed: list[str] = []

    def paint(self, text: str, *styles: str) -> str:
        codes = ";".join(_COLOURS[style] for style in styles)
        return f"\033[{codes}m{text}\033[0m" if self._coloured else text

    def head(self, text: str) -> None:
        print(f"\n{self.paint(text, 'bold')}", flush=True)

    def line(self, left: str, right: str = "", *styles: str) -> None:
        print(f"  {left:<46} {self.paint(right, *styles)}".rstrip(), flush=True)

    def lines(self, text: str) -> None:
        for line in text.splitlines():
            ours = "--comment snatd" in line or "snat to ip saddr" in line
            print(f"    {self.paint(line, 'green' if ours else 'dim')}", flush=True)

    def expect(
        self, what: str, seen: str | None, wanted: str, meaning: str, style: str = "green"
    ) -> None:
        right = seen == wanted
        if not right:
            self.missed.append(f"{what}: saw {seen}, expected {wanted}")
        said = f"{seen or 'no answer':<14} {meaning if right else 'NOT AS EXPECTED'}"
        self.line(what, said, style if right else "red")


def main() -> int:
    """Builds the network, tells the story, cleans up also when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=("nft", "legacy"), default="nft")
    backend = parser.parse_args().backend
    if os.geteuid() != 0:
        print("the demo makes network namespaces: run it as root", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    story, started_s = Story(), time.monotonic()
    try:
        _tell(story, backend)
    except KeyboardInterrupt:
        print("\ninterrupted; the namespaces are gone", file=sys.stderr)
        return 130
    if story.missed:
        story.head("Not all was as it should be:")
        for missed in story.missed:
            story.line(missed)
        return 1
    story.head(f"All of it was seen on the wire, in {time.monotonic() - started_s:.1f} s.")
    return 0


def _tell(story: Story, backend: str) -> None:
    with Lab(backend) as lab:
        node, neighbour = lab.nodes
        story.head(f"Two nodes, a container on each, a host outside (iptables is {backend})")
        story.line(f"node 1    {node.address}", f"container {node.container_address}", "cyan")
        story.line(
            f"node 2    {neighbour.address}", f"container {neighbour.container_address}", "cyan"
        )
        story.line(f"outside   {OUTSIDE}", "knows no way back to a container", "dim")
        node.write_lease()
        _iptables(node, "-A", "POSTROUTING", *node.broad_rule)

        story.head("The problem: Docker masquerades all that leaves node 1's containers")
        story.lines(_rules(node))
        _ask(story, node, neighbour, node.address, "the node's address: the problem", "red")

        with Snatd(node.host, lab.folder / "snatd") as snatd:
            story.head("`snatd run` starts on node 1")
            started_s = time.monotonic()
            snatd.start()
            story.line("ready after", f"{(time.monotonic() - started_s) * 1000:.0f} ms")
            story.lines(_rules(node))
            _ask(story, node, neighbour, node.container_address, "the container's own address")
            _ask_outside(story, node)

            story.head("Docker restarts, and puts its rule back at the head")
            for event, took_ms in _docker_restarts(node):
                story.line(event, f"repaired within {took_ms:.0f} ms", "green")
            story.lines(_rules(node))
            _ask(story, node, neighbour, node.container_address, "the container's own address")
            _ask_outside(story, node)

            story.head("What the daemon said")
            for line in snatd.command("status").stdout.splitlines():
                story.lines(line)
            for one in snatd.events():
                head = f"{one.pop('timestamp')[11:23]} {one.pop('level')} {one.pop('event')}"
                fields = " ".join(f"{key}={value}" for key, value in one.items())
                story.lines(f"{head}: {fields}")
            if (status := snatd.stop()) != 0:
                story.missed.append(f"snatd ended with {status}")

        story.head("With snatd gone, Docker puts its rule back, and nobody repairs it")
        _iptables(node, "-I", "POSTROUTING", *node.broad_rule)
        story.lines(_rules(node))
        story.lines(node.host.run("nft", "list", "table", "ip", "snatd"))
        _ask(story, node, neighbour, node.container_address, "its own all the same: the guard")
        _ask_outside(story, node)


def _docker_restarts(node: Node) -> Iterator[tuple[str, float]]:
    """Insert, delete, insert, as dockerd does within 0.4 s; each repair with its time."""
    yield "inserted at 1", _time_of_repair(node, "-I")
    _iptables(node, "-D", "POSTROUTING", *node.broad_rule, check=False)
    yield "inserted at 1 again", _time_of_repair(node, "-I")


def _time_of_repair(node: Node, how: str) -> float:
    _iptables(node, how, "POSTROUTING", *node.broad_rule)
    started_s = time.monotonic()
    broad = f"-A POSTROUTING {' '.join(node.broad_rule)}"
    until(lambda: broad not in _rules(node).splitlines(), "the repair", 15)
    return (time.monotonic() - started_s) * 1000


def _ask(
    story: Story, node: Node, neighbour: Node, wanted: str, meaning: str, style: str = "green"
) -> None:
    seen = seen_by(node.container, neighbour.container_address)
    story.expect("the other container's server was called by", seen, wanted, meaning, style)


def _ask_outside(story: Story, node: Node) -> None:
    seen = seen_by(node.container, OUTSIDE)
    story.expect("the server outside was called by", seen, node.address, "the node's: egress kept")


def _iptables(node: Node, *words: str, check: bool = True) -> None:
    node.host.run("iptables", "-w", "5", "-t", "nat", *words, check=check)


def _rules(node: Node) -> str:
    return node.host.run("iptables", "-w", "5", "-t", "nat", "-S", "POSTROUTING")


if __name__ == "__main__":
    sys.exit(main())
