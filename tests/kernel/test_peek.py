"""The fingerprint of a legacy table: of every rule, and of no counter."""

from __future__ import annotations

import random

import pytest

from snatd.core.model import Family
from snatd.kernel.peek import Peek, digest
from tests.lab.netns import Namespace

_COMMENT = '-m comment --comment "' + "long " * 30 + '"'


def script(rules: list[str], number: int) -> str:
    """All of a table anew, with such counters."""
    lines = ["*nat", f":POSTROUTING ACCEPT [{number}:{number}]", ":C - [0:0]", *rules]
    counted = [f"[{number}:{number * 60}] {one}" if one[0] == "-" else one for one in lines]
    return "\n".join([*counted, "COMMIT", ""])


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("count", [1, 9000])
def test_it_tells_every_rule_and_no_counter(host: Namespace, family: Family, count: int) -> None:
    """Entries of one length in runs, of several in any order, and more than a run is looked for.
    Asked by descriptors that were opened once, while there was no table."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    protocols = ("", "-p tcp --dport 1", _COMMENT, "-m mark --mark 0x1")
    rules = ["-A C -j RETURN"] * count + [
        f"-A C {chance.choice(protocols)} -m mark --mark {number} -j ACCEPT"
        for number in range(300)
    ]
    tool = f"{family.command}-legacy-restore"

    table = Peek(family)
    with host.entered():
        assert table.digest() == 0

    def digest_of(rules: list[str], number: int) -> int:
        host.run(tool, "--counters", stdin=script(rules, number))
        with host.entered():
            found = table.digest()
            assert found == digest(family), "as asked anew"
            return found

    first = digest_of(rules, 0)
    for number in (1, 255, 2**40):
        assert digest_of(rules, number) == first, f"seed {seed}"
    for changed in (0, count // 2, count, count + chance.randrange(300), count + 299):
        rules[changed] = rules[changed].replace("-j", "-m mark --mark 0x7777 -j")
        last, first = first, digest_of(rules, 3)
        assert first != last, f"seed {seed}, rule {changed}"
        rules[changed] = rules[changed].replace("0x7777", "0x7778")
        last, first = first, digest_of(rules, 3)
        assert first != last, f"same length, seed {seed}, rule {changed}"
    table.close()
    with host.entered():
        assert table.digest() == first, "closed, and opened again"
    table.close()


def test_a_fingerprint_asked_for_later_is_of_what_was_then(host: Namespace) -> None:
    host.run("iptables-legacy-restore", stdin=script(["-A C -j RETURN"], 0))
    with host.entered(), Peek(Family.V4) as table:
        first = table.digest()
        glance = table.glance()
        host.run("iptables-legacy-restore", stdin=script(["-A C -j ACCEPT"], 0))
        assert table.digest() != first
        assert (glance.digest(), glance.digest()) == (first, first)
