"""Where is measured: a network whose `iptables` is of one backend, and foreign rules in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.observers import Observer
from tests.lab.network import Lab, Node

SIZES = (100, 1_000, 10_000, 50_000)


@dataclass
class Site:
    """The daemon runs on the first node only; the second one has the same foreign rules."""

    backend: str
    lab: Lab
    observer: Observer
    foreign_rules: int = field(default=0, init=False)

    @property
    def node(self) -> Node:
        return self.lab.nodes[0]

    @property
    def other(self) -> Node:
        return self.lab.nodes[1]

    @property
    def folder(self) -> Path:
        return self.lab.folder

    def fill_to(self, size: int) -> None:
        """Foreign rules of both nodes, in a chain that OUTPUT jumps to, as kube-proxy's are."""
        lines = ["*nat"]
        if not self.foreign_rules:
            lines += [":KUBE-SVC - [0:0]", "-A OUTPUT -j KUBE-SVC"]
        lines += [
            f"-A KUBE-SVC -d 10.{96 + number // 62500}.{number // 250 % 250}.{number % 250}/32 "
            "-j RETURN"
            for number in range(self.foreign_rules, size)
        ]
        script = "\n".join([*lines, "COMMIT", ""])
        for node in self.lab.nodes:
            node.host.run("iptables-restore", "--noflush", stdin=script)
        self.foreign_rules = size

    def __str__(self) -> str:
        return f"{self.backend}, {self.foreign_rules} rules"
