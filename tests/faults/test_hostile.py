"""Row 34: names and comments by somebody who may start containers, and means harm."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import snatd as package
from snatd.core.plan import plan
from snatd.core.revert import remember, revert
from snatd.core.rules import is_ours
from tests.faults.conftest import Start
from tests.faults.test_journal import journald
from tests.faults.test_rules import settled
from tests.faults.test_tools import Shims
from tests.kernel.test_packets import NARROW, add, promises_hold, rules
from tests.kernel.test_races import SUBNET, WANTED, _tables, soon
from tests.lab.netns import Namespace, until
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


@pytest.mark.long
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


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_fault_34_any_comment(host: Namespace, tmp_path: Path, kind: str) -> None:
    """Whatever bytes it is made of: planned, written and put back, or left alone, to the byte."""
    command = f"iptables-{kind}"
    table = (command, "-w", "5", "-t", "nat")
    hostile = st.sampled_from(HOSTILE)
    text = st.text(st.characters(blacklist_characters="\0", max_codepoint=0x2FFF), max_size=80)
    comments = st.lists(st.one_of(hostile, text, st.builds(str.__add__, hostile, text)), max_size=3)

    @settings(
        max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(comments)
    def written(found: list[str]) -> None:
        host.run(*table, "-F", "POSTROUTING")
        for number, comment in enumerate(found):
            words = ["-s", f"192.0.2.{number}/32", "-j", "RETURN"]
            if number == 1:
                words = ["-s", str(SUBNET), "!", "-o", "docker0", "-j", "MASQUERADE"]
            words = [*table, "-A", "POSTROUTING", *words, "-m", "comment", "--comment"]
            argv = [*map(str.encode, words), os.fsencode(comment)[:255]]
            subprocess.run(argv, check=True, timeout=20)
        before = raw()
        tables = _tables(kind, tmp_path)
        ruleset = tables.read(soon())
        transactions = plan(WANTED, {tables.backend: ruleset}, tables.backend)
        for one in transactions:
            tables.apply(one, soon())
        there = tables.read(soon())
        assert sum(is_ours(rule) for rule in there.postrouting) == 1
        memories = [remember(one, SUBNET, None) for one in transactions]
        back = revert(there, memories, SUBNET)
        assert back is not None
        tables.apply(back, soon())
        assert raw() == before

    def raw() -> bytes:
        argv = [*table, "-S", "POSTROUTING"]
        return subprocess.run(argv, check=True, timeout=20, stdout=subprocess.PIPE).stdout

    with host.entered():
        written()


# What a device may be called: any bytes but blanks, `/` and `:`, up to 15.
DEVICES = (
    *('a"b', "a'b", "a\\b", "$(reboot)", "`reboot`", ";reboot;", "-j", "--", "!", "*", "eth+", "+"),
    *(
        "+",
        "\x1b[2J",
        "\u202eabc",
        "\udcff\udcfe",
        "{0}",
        "x\x7fy",
        '"',
        "#",
        "-s0.0.0.0",
    ),
)


@pytest.mark.long
def test_fault_34_the_bridges_name(lab: Lab, start: Start) -> None:
    """Ours is there once, by that name; or, where no rule could name it, not at all."""
    node = lab.nodes[0]
    node.write_lease()
    snatd = start(node, resync=1)
    settled(snatd)
    before = "docker0"
    for name in DEVICES:
        node.host.run("ip", "link", "set", "dev", before, "name", name)
        before, passes = name, snatd.status()["passes"]
        waits = any(one in name for one in "\"'\\") or name[0] in "-!" or name[-1] == "+"
        state = "waiting" if waits else "in sync"
        until(lambda: snatd.status()["passes"] > passes + 1, "two looks")  # noqa: B023
        until(lambda: snatd.status()["state"] == state, f"{name!r}: {state}")  # noqa: B023
        ours = f" ! -o {name} ".encode(errors="surrogateescape")
        assert sum(ours in rule for rule in listed(node)) == (not waits), name
        assert all(of_snatd(rule) for rule in listed(node)), name
        promises_hold(lab)
    node.host.run("ip", "link", "set", "dev", before, "name", "docker0")
    until(lambda: snatd.status()["in_sync"], "a name again")
    check_what_was_told(node, snatd)


@pytest.mark.long
def test_fault_34_other_devices_names(nft_lab: Lab, node: Node, start: Start) -> None:
    """Of networks that are cut out, which are told by name."""
    snatd = start(node, resync=1)
    settled(snatd)
    for number, name in enumerate(DEVICES):
        node.host.shell(
            "ip link add veth9 type veth; ip link set veth9 up;"
            f"ip addr add 172.7.{100 + number}.1/24 dev veth9"
        )
        node.host.run("ip", "link", "set", "dev", "veth9", "name", name)
        network = f"172.7.{100 + number}.0/24"
        until(lambda: network in str(snatd.status()["families"]), name)  # noqa: B023
        passes = snatd.status()["passes"]
        until(lambda: snatd.status()["passes"] > passes, "a look at the new name")  # noqa: B023
        node.host.run("ip", "link", "del", "dev", name)
    until(lambda: snatd.status()["in_sync"], "in sync")
    check_what_was_told(node, snatd)
    promises_hold(nft_lab)


# By somebody who has CAP_NET_ADMIN here, and nothing else: the kernel takes any bytes as a name.
WORDS = (
    "x p ; add table ip owned ; #",
    "x ; add table ip owned",
    'x p; include "/run/owned";',
    "-M/run/evil",
    "-F",
    "x\nMESSAGE=forged\nSNATD_EVENT=forged",
    "\x1b[2J%n$(touch /run/owned)",
    "a\"b'c\\d",
)


def test_fault_34_names_of_native_tables_and_chains(nft_lab: Lab, node: Node, start: Start) -> None:
    """nft reads its arguments as its language, and iptables what begins with `-` as an option."""
    node.host.shell("printf '#!/bin/sh\ntouch /run/owned\n' >/run/evil; chmod +x /run/evil")
    node.host.run("nft", "add table ip x; add chain ip x p; add rule ip x p counter")
    node.host.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "RETURN")
    commands: list[object] = []
    for word in WORDS:
        table = {"family": "ip", "name": word}
        base = {"type": "nat", "hook": "postrouting", "prio": 200, "policy": "accept"}
        chain = {"family": "ip", "table": word, "name": "p", **base}
        inner = {"family": "ip", "table": "nat", "name": word}
        jump = {"family": "ip", "table": "nat", "chain": "POSTROUTING"}
        commands += [{"add": {"table": table}}, {"add": {"chain": chain}}]
        commands += [{"add": {"chain": inner}}]
        commands += [{"insert": {"rule": {**jump, "expr": [{"jump": {"target": word}}]}}}]
    # A table that sleeps is looked at once more, by name.
    sleeping = {"family": "ip", "name": "x ; add table ip owned ; #", "flags": ["dormant"]}
    commands += [{"add": {"table": sleeping}}]
    node.host.run("nft", "-j", "-f", "-", stdin=json.dumps({"nftables": commands}))
    before = tables(node)
    snatd = start(node, resync=1)
    until(lambda: snatd.status()["suspects"], "a look at all that could SNAT")
    passes = snatd.status()["passes"]
    add(node, "-I", "POSTROUTING", *node.broad_rule)
    until(lambda: snatd.status()["passes"] > passes + 2, "looks")
    promises_hold(nft_lab)
    check_what_was_told(node, snatd)
    assert "cannot be asked for" in str(snatd.status()["suspects"])
    assert [one for one in tables(node) if one not in before] == []


def tables(node: Node) -> list[object]:
    listed = json.loads(node.host.run("nft", "-j", "list", "tables"))["nftables"]
    names = [one["table"]["name"] for one in listed if "table" in one]
    return [one for one in names if one != "snatd"]


COMMS = (
    "a\nb=c",
    "$(touch x)",
    "\x1b[2J",
    "%n%n%n",
    "x\nMESSAGE=y",
    '"}{"',
    "\u202eab",
    "-rf",
    "é\udcff",
)


def test_fault_34_the_writers_name(node: Node, start: Start) -> None:
    """A program may be called anything; the kernel tells its name, and the log and STATUS do."""
    snatd = start(node)
    settled(snatd)
    for number, name in enumerate(COMMS, 1):
        program = node.host.path("/run") / name
        shutil.copy("/usr/sbin/xtables-nft-multi", program)
        words = ("iptables", "-t", "nat", "-I", "POSTROUTING", *node.broad_rule)
        node.host.run("env", "-C", "/run", f"./{name}", *words)
        event = snatd.wait_for("rule_narrowed", number)[-1]
        assert re.fullmatch(r"[!-~]+", event["writer_comm"][0])
        until(lambda: rules(node) == [NARROW], "the repair")
    check_what_was_told(node, snatd)


@pytest.mark.long
def test_fault_34_what_a_tool_says(node: Node, start: Start, tmp_path: Path) -> None:
    """Its error ends up in the log and in STATUS."""
    shims = Shims(node, tmp_path / "shims")
    snatd = start(node, resync=1)
    settled(snatd)
    said = tmp_path / "said"
    for text in HOSTILE:
        said.write_bytes(text.encode(errors="surrogateescape"))
        shims.put("iptables-nft", f"cat {said} >&2; exit 1")
        snatd.notifications.clear()
        add_unseen(node)
        until(lambda: snatd.status()["state"] == "degraded", "it told")
        snatd.wait_for_notification("STATUS=degraded since ")
        shims.remove("iptables-nft")
        until(lambda: snatd.status()["in_sync"], "the recovery", 20)
    check_what_was_told(node, snatd)


def add_unseen(node: Node) -> None:
    words = ("-w", "5", "-t", "nat", "-I", "POSTROUTING", *node.broad_rule)
    node.host.run("/usr/sbin/iptables", *words)


@pytest.mark.long
def test_fault_34_the_journal(node: Node, start: Start) -> None:
    """Its native protocol has a field in each line: none may come of a rule."""
    with journald(node) as journal:
        snatd = start(node, log_format="journal")
        settled(snatd)
        for comment in HOSTILE:
            passes = snatd.status()["passes"]
            add_with_comment(node, comment, *node.broad_rule)
            until(lambda: snatd.status()["passes"] > passes, "a pass")  # noqa: B023
            journal.settimeout(0.2)
            with suppress(TimeoutError):
                while entry := journal.recv(65536):
                    check_entry(entry)


def check_entry(datagram: bytes) -> None:
    for line in datagram.decode("ascii").splitlines():
        name, _, value = line.partition("=")
        assert name in ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "MESSAGE_ID") or re.fullmatch(
            "SNATD_[A-Z_]+", name
        ), line
        assert value.isprintable(), line
        assert value != "forged", line
        assert (name, value) != ("PRIORITY", "0")


def test_fault_34_nothing_of_it_reaches_a_shell() -> None:
    """There is none in the program."""
    for path in Path(package.__file__).parent.rglob("*.py"):
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.keyword):
                assert part.arg != "shell", path
            if isinstance(part, ast.Attribute):
                assert part.attr not in ("system", "popen", "getoutput", "getstatusoutput"), path
