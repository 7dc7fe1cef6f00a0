"""The very input of iptables-restore, and that nothing in it is removed by number."""

from __future__ import annotations

import re

import pytest

from snatd.core.desired import Desired
from snatd.core.model import POSTROUTING, Rule, Ruleset
from snatd.core.plan import ChainEdit, Transaction, applied
from snatd.kernel.nft import restore_script
from tests.fakes import BROAD, JUMP, NFT, OURS, V4, lease, listed, node, plans, restored, wish

TWO = wish(node(lease(inside="172.7.0.0/16 10.9.0.0/16")))


def script(wanted: Desired, ruleset: Ruleset) -> str:
    (transaction,) = plans(wanted, ruleset)
    return restore_script(transaction)


def lines(*of: str) -> str:
    return "\n".join(["*nat", *of, "COMMIT", ""])


def test_narrowing_in_the_middle() -> None:
    before = listed(f"""
        -A POSTROUTING -j FIRST
        [7:420] -A POSTROUTING {BROAD}
        -A POSTROUTING -j LAST
    """)
    assert script(wish(), before) == lines(
        f"-D POSTROUTING {BROAD}",
        f"[7:420] -I POSTROUTING 2 {OURS}",
    )


def test_narrowing_at_the_end_needs_no_number() -> None:
    before = listed(f"-A POSTROUTING -j FIRST\n-A POSTROUTING {BROAD}")
    assert script(wish(), before) == lines(
        f"-D POSTROUTING {BROAD}",
        f"-A POSTROUTING {OURS}",
    )


def test_each_copy_goes_by_a_line_of_its_own() -> None:
    before = listed("\n".join([f"[1:60] -A POSTROUTING {BROAD}"] * 3 + ["-A POSTROUTING -j LAST"]))
    assert script(wish(), before) == lines(
        f"-D POSTROUTING {BROAD}",
        f"-D POSTROUTING {BROAD}",
        f"-D POSTROUTING {BROAD}",
        f"[1:60] -I POSTROUTING 1 {OURS}",
    )


def test_where_one_of_ours_goes_all_go_and_one_returns() -> None:
    before = listed(f"""
        [1:60] -A POSTROUTING {OURS}
        -A POSTROUTING -j LAST
        [2:120] -A POSTROUTING {OURS}
    """)
    assert script(wish(), before) == lines(
        f"-D POSTROUTING {OURS}",
        f"-D POSTROUTING {OURS}",
        f"[1:60] -I POSTROUTING 1 {OURS}",
    )


def test_a_chain_is_there_before_the_jump() -> None:
    assert script(TWO, listed(f"[7:420] -A POSTROUTING {BROAD}\n-A POSTROUTING -j LAST")) == lines(
        ":SNATD-POSTROUTING - [0:0]",
        "-A SNATD-POSTROUTING -d 10.9.0.0/16 -j RETURN",
        "-A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN",
        "-A SNATD-POSTROUTING -j MASQUERADE",
        f"-D POSTROUTING {BROAD}",
        f"[7:420] -I POSTROUTING 1 {JUMP}",
    )


def test_a_chain_goes_after_the_jump() -> None:
    before = listed(f"-A POSTROUTING {JUMP}\n-A SNATD-POSTROUTING -j MASQUERADE")
    assert script(wish(), before) == lines(
        f"-D POSTROUTING {JUMP}",
        f"-A POSTROUTING {OURS}",
        "-F SNATD-POSTROUTING",
        "-X SNATD-POSTROUTING",
    )


def test_refilling_a_chain_touches_nothing_else() -> None:
    before = listed(f"-A POSTROUTING -j FIRST\n-A POSTROUTING {JUMP}\n-N SNATD-POSTROUTING")
    assert script(TWO, before) == lines(
        ":SNATD-POSTROUTING - [0:0]",
        "-A SNATD-POSTROUTING -d 10.9.0.0/16 -j RETURN",
        "-A SNATD-POSTROUTING -d 172.7.0.0/16 -j RETURN",
        "-A SNATD-POSTROUTING -j MASQUERADE",
    )


BEFORE = [
    "",
    f"-A POSTROUTING {BROAD}",
    "\n".join([f"-A POSTROUTING {BROAD}", "-A POSTROUTING -j X"] * 3),
    f"-A POSTROUTING {OURS}\n-A POSTROUTING {OURS}\n-A POSTROUTING {BROAD}",
    f"-A POSTROUTING {JUMP}\n-A SNATD-POSTROUTING -j MASQUERADE",
]


@pytest.mark.parametrize("wanted", [wish(), TWO], ids=["one", "several"])
@pytest.mark.parametrize("before", BEFORE)
def test_nothing_goes_by_number(wanted: Desired, before: str) -> None:
    for line in script(wanted, listed(before)).split("\n"):
        assert not re.match(r"(\[\d+:\d+\] )?-R ", line)
        assert not re.match(r"(\[\d+:\d+\] )?-D \S+ \d+$", line)


def test_what_moves_goes_and_comes_back() -> None:
    rules = tuple(map(Rule, ("-j A", OURS, "-j B", "-j C")))
    ruleset = Ruleset(V4, NFT, rules)
    moved = (rules[0], rules[2], rules[1], rules[3])
    transaction = Transaction(V4, NFT, (ChainEdit(POSTROUTING, rules, moved),))
    assert restored(ruleset, restore_script(transaction)) == applied(ruleset, transaction)
