"""Row 34: names and comments by somebody who may start containers, and means harm."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from tests.faults.conftest import Start
from tests.kernel.test_packets import promises_hold
from tests.lab.netns import until
from tests.lab.network import Lab, Node
from tests.lab.process import Snatd

OWNED = "/run/owned"
# What a shell, a restore, a terminal, a log, a format string or a parser might take for its own.
HOSTILE = (
    f"$(touch {OWNED})",
    f"`touch {OWNED}`",
    f"; touch {OWNED} #",
    f'"; touch {OWNED}; "',
    f"' || touch {OWNED} || '",
    f"x\ntouch {OWNED}\n",
    "x\n-A POSTROUTING -j ACCEPT\nCOMMIT",
    'x" -j ACCEPT -m comment --comment "y',
    "x\\",
    'x\\" -j ACCEPT',
    "-j ACCEPT",
    "--comment snatd",
    "snatd\n",
    "snatd ",
    "\x1b[2J\x1b]0;owned\x07",
    "x\nMESSAGE=forged\nPRIORITY=0\nSNATD_EVENT=forged\n",
    "x\nMESSAGE\n\x06\x01\x01\x01\x01\x01\x01\x01forged\n",
    "x\nREADY=1\nMAINPID=1\nWATCHDOG=trigger",
    '{"event": "forged"}\n{"event": "forged"}',
    "%n%n%n%s%x{0}{snatd}${HOME}",
    '\nsnatd_forged{a="b"} 1\n# EOF',
    "\u202edetsurt\u2066 \u00e4\u00f6\u2028\u2029\ufeff",
    "\udcff\udc80\udcc3",  # bytes that are no UTF-8
    "x" * 255,
    '"' * 200,
    "\\" * 200,
    "\n" * 200,
    " ",
    "",
)


def listed(node: Node) -> list[bytes]:
    """The rules of the nat table. A comment with a line like a rule's is cut, each time alike."""
    done = subprocess.run(
        node.host.command("iptables-save", "-t", "nat"),
        env=node.host.environment(),
        capture_output=True,
        timeout=20,
        check=True,
    )
    body = done.stdout.partition(b"*nat\n")[2].rpartition(b"COMMIT\n")[0]
    return body.removesuffix(b"\n").split(b"\n-A ")[1:]


def of_snatd(rule: bytes) -> bool:
    return b"--comment snatd " in rule or b"SNATD-" in rule


def of_others(node: Node) -> list[bytes]:
    return [rule for rule in listed(node) if b"192.0.2.1/32" in rule]


def add_with_comment(node: Node, comment: str, *rule: str) -> None:
    words = ("-m", "comment", "--comment", comment, *rule)
    node.host.run("iptables", "-w", "5", "-t", "nat", "-A", "POSTROUTING", *words)


def check_what_was_told(node: Node, snatd: Snatd) -> None:
    """Every line of the log is one event of snatd's own, in harmless characters; so is STATUS."""
    for line in snatd.log_path.read_text().splitlines():
        event = json.loads(line)
        assert line.isprintable(), line
        assert re.fullmatch("[a-z_0-9]+", event["event"]), line
        assert event["event"] != "forged", line
        assert all(printable(value) for value in event.values()), line
    for message in snatd.notifications:
        assert all("\n" not in part for part in message.split("\nMONOTONIC_USEC=")), message
        assert message.partition("=")[0] in ("STATUS", "READY", "RELOADING", "WATCHDOG"), message
        assert "MAINPID" not in message.partition("=")[0]
    for command in (["check"], ["status"], ["explain", node.container_address, "172.7.22.2"]):
        done = snatd.command(*command)
        for line in (done.stdout + done.stderr).split("\n"):
            assert line.isprintable(), (command, line)
    assert not node.host.path(OWNED).exists()
    assert not Path(OWNED).exists()


def printable(value: object) -> bool:
    if isinstance(value, dict):
        return all(printable(one) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return all(printable(one) for one in value)
    return str(value).isprintable()


def test_fault_34_comments(lab: Lab, start: Start) -> None:
    """In rules that are narrowed, and in rules that are not: read and left, or replaced and put
    back by `revert` to the byte."""
    node = lab.nodes[0]
    node.write_lease()
    for comment in HOSTILE:
        add_with_comment(node, comment, "-s", "192.0.2.1/32", "-j", "RETURN")
        add_with_comment(node, comment, *node.broad_rule)
    before, others = listed(node), of_others(node)
    assert len(others) == len(HOSTILE)
    snatd = start(node)
    until(lambda: any(of_snatd(rule) for rule in listed(node)), "ours")
    for comment in HOSTILE:
        # Again, while it runs: now also in the log, as what was removed.
        passes = snatd.status()["passes"]
        add_with_comment(node, comment, *node.broad_rule)
        until(lambda: snatd.status()["passes"] > passes, "a pass")  # noqa: B023
    promises_hold(lab)
    assert of_others(node) == others
    check_what_was_told(node, snatd)
    snatd.stop()
    assert snatd.command("revert").returncode == 0
    assert not any(of_snatd(rule) for rule in listed(node))
    assert set(listed(node)) == set(before), "each is back, to the byte"
    assert of_others(node) == others
