"""The language of `iptables -S`: words, rules, listings."""

from __future__ import annotations

import time

import pytest

from snatd.core.errors import RuleError
from snatd.core.model import Counters, Rule
from snatd.core.rules import (
    Match,
    Spec,
    Target,
    own_chains,
    own_jumps,
    parse,
    parse_listing,
    parse_table,
    quote,
    tokens,
)
from tests.fakes import BROAD, HAND_MADE, JUMP, OURS, N, P

CNI = (
    '-s 172.7.21.5/32 -m comment --comment "name: \\"cbr0\\" id: \\"d3adbeef\\"" '
    "-j CNI-0123456789abcdef01234567"
)
LANGUAGE = [
    BROAD,
    OURS,
    HAND_MADE,
    JUMP,
    CNI,
    "-j MASQUERADE",
    "-o eth0 -j MASQUERADE",
    "! -s 172.7.0.0/16 -d 172.7.0.0/16 -j MASQUERADE",
    "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
    "-s fd00:7:21::/64 ! -d fd00:7::/48 ! -o cni0 -m comment --comment snatd -j MASQUERADE",
    "-s 172.7.21.0/24 ! -o docker0 -j SNAT --to-source 192.168.33.10 --persistent",
    '-s 172.7.21.0/24 -m comment --comment "" -j MASQUERADE',
    '-s 172.7.21.0/24 -m comment --comment "it\\\'s \\"odd\\" \\\\" -j MASQUERADE',
    "-s 172.7.21.0/24 -m comment --comment -j -j MASQUERADE",
    "-s 172.7.21.0/24 -m comment --comment -s -j MASQUERADE",
    '-s 172.7.21.0/24 -m comment --comment "!" -j MASQUERADE',
    '-m comment --comment "two\nlines" -j RETURN',
    "-g CUSTOM",
    "-m comment --comment counted",
]


@pytest.mark.parametrize("text", LANGUAGE)
def test_a_rule_that_is_read_is_written_as_it_was(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize("text", [*LANGUAGE, '-i eth0 -o a"b -j X', "a  b", ""])
def test_words_lose_nothing(text: str) -> None:
    assert " ".join(word.raw for word in tokens(text)) == " ".join(filter(None, text.split(" ")))


@pytest.mark.parametrize(
    ("value", "printed"),
    [
        ("snatd", "snatd"),
        ("-j", "-j"),
        ("a-b_C9", "a-b_C9"),
        ("", '""'),
        ("a b", '"a b"'),
        ("é", '"é"'),
        ("a\n", '"a\n"'),
        ("it's", '"it\\\'s"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("back\\slash", '"back\\\\slash"'),
        ("!", '"!"'),
    ],
)
def test_a_string_is_quoted_as_iptables_does(value: str, printed: str) -> None:
    assert quote(value) == printed
    (word,) = tokens(printed)
    assert (word.raw, word.value, word.quoted) == (printed, value, printed.startswith('"'))


def test_our_rule_means_what_it_says() -> None:
    assert parse(OURS) == Spec(
        source=P,
        destination=N,
        destination_negated=True,
        out=Match("docker0", negated=True),
        comment="snatd",
        target=Target("MASQUERADE"),
    )
    assert parse(OURS).owned


def test_a_negation_ends_with_its_option() -> None:
    spec = parse("! -s 10.0.0.0/8 -d 10.0.0.0/8 -o eth0 -j MASQUERADE")
    assert (spec.source_negated, spec.destination_negated) == (True, False)
    assert spec.out == Match("eth0", negated=False)


def test_what_has_no_name_here_is_kept_as_printed() -> None:
    text = '-i eth0 -p tcp -m tcp ! --dport 80 -m set --match-set "a b" src -j SNAT --to-source A'
    spec = parse(text)
    assert spec.others == (
        "-i eth0",
        "-p tcp",
        "-m tcp",
        "! --dport 80",
        "-m set",
        '--match-set "a b" src',
    )
    assert spec.target == Target("SNAT", "--to-source A")


@pytest.mark.parametrize(
    "comment", ["snatd2", "not snatd", '"snatd "', '" snatd"', "Snatd", '"--comment snatd"']
)
def test_only_the_whole_comment_makes_a_rule_ours(comment: str) -> None:
    assert not parse(f"-s 172.7.21.0/24 -m comment --comment {comment} -j MASQUERADE").owned


@pytest.mark.parametrize("first", ["snatd", "ops"])
def test_a_rule_with_two_comments_is_nobody_we_know(first: str) -> None:
    two = f"-m comment --comment {first} -m comment --comment snatd"
    spec = parse(f"-s 172.7.21.0/24 {two} -j MASQUERADE")
    assert not spec.owned
    assert spec.others
    assert parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('-m comment --comment "open -j X', "not closed"),
        ('-m comment --comment "open\\', "not closed"),
        ("-s", "lacks its value"),
        ("-j", "lacks its value"),
        ("-m comment --comment", "lacks its value"),
        ("-s 172.7.21.0/24 -s 172.7.21.0/24", "twice"),
        ("-o eth0 -o eth1", "twice"),
        ("-s 172.7.21.1/24 -j X", "not a network"),
        ("-s 172.7.21.0/255.0.255.0 -j X", "not a network"),
        ("-s 172.7.21.0/33 -j X", "not a network"),
        ("-s somewhere -j X", "not a network"),
        ('-o a"b -j X', "interface"),
        ("-o a'b -j X", "interface"),
        ("-o -j -j X", "interface"),
        ("-o a\\b -j X", "interface"),
    ],
)
def test_what_cannot_be_told_for_certain_is_an_error(text: str, why: str) -> None:
    with pytest.raises(RuleError, match=why):
        parse(text)


@pytest.mark.parametrize("text", ["-s 0.0.0.0/0.0.0.255 -j X", "-s 0.0.0.0/0.0.255.255 -j X"])
def test_a_mask_that_is_no_prefix_is_not_read_as_one(text: str) -> None:
    # iptables prints a mask in full where it is no prefix; these match on the last bits.
    with pytest.raises(RuleError):
        parse(text)


def test_a_network_carries_no_text_of_its_own() -> None:
    # ipaddress takes anything behind a % as an IPv6 zone; iptables has no zones.
    with pytest.raises(RuleError):
        parse("-s fd00::%x/64 -j X")


HEAD = "-P POSTROUTING ACCEPT -c 12 3456\n"


def listing(*lines: str, chain: str = "POSTROUTING") -> tuple[Rule, ...]:
    return parse_listing(HEAD + "".join(f"{line}\n" for line in lines), chain)


def test_counters_leave_the_text() -> None:
    (rule,) = listing("-A POSTROUTING -s 172.7.21.0/24 ! -o docker0 -c 7 420 -j MASQUERADE")
    assert (rule.text, rule.counters) == (BROAD, Counters(7, 420))


def test_a_rule_without_a_target_has_its_counters_last() -> None:
    (rule,) = listing("-A POSTROUTING -s 172.7.21.0/24 -c 7 420")
    assert (rule.text, rule.counters) == ("-s 172.7.21.0/24", Counters(7, 420))


def test_a_rule_without_counters_has_none() -> None:
    (rule,) = listing(f"-A POSTROUTING {BROAD}")
    assert (rule.text, rule.counters) == (BROAD, None)


def test_a_comment_that_looks_like_counters_is_a_comment() -> None:
    text = '-m comment --comment "-c 1 2" -j RETURN'
    (rule,) = listing('-A POSTROUTING -m comment --comment "-c 1 2" -c 3 4 -j RETURN')
    assert (rule.text, rule.counters) == (text, Counters(3, 4))
    (rule,) = listing("-A POSTROUTING -m comment --comment -c -c 3 4 -j RETURN")
    assert (rule.text, rule.counters) == ("-m comment --comment -c -j RETURN", Counters(3, 4))


@pytest.mark.parametrize(
    "text",
    [
        CNI,
        '-m comment --comment "two\nlines" -j RETURN',
        '-m comment --comment "\n\n" -j RETURN',
        '-m comment --comment "x\n-A POSTROUTING -j MASQUERADE\n" -j RETURN',
        '-m comment --comment "it\\\'s \\"odd\\" \\\\" -j RETURN',
        '-m comment --comment "" -j RETURN',
        "-m comment --comment -j -j RETURN",
        '-o a"b -j MASQUERADE',
        "-i a'b -j RETURN",
        '-o " -j MASQUERADE',
        '-m comment --comment "tab\there" -j RETURN',
    ],
)
def test_an_odd_rule_keeps_its_text_among_others(text: str) -> None:
    around = ("-j FIRST", "-j LAST")
    found = listing(*(f"-A POSTROUTING {one}" for one in (around[0], text, around[1])))
    assert [rule.text for rule in found] == [around[0], text, around[1]]


def test_a_chain_of_ours_begins_with_its_own_head() -> None:
    output = "-N SNATD-POSTROUTING\n-A SNATD-POSTROUTING -c 0 0 -j MASQUERADE\n"
    assert parse_listing(output, "SNATD-POSTROUTING") == (Rule("-j MASQUERADE"),)


def test_an_empty_chain_has_no_rules() -> None:
    assert listing() == ()


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("", "head line"),
        ("\n", "head line"),
        (f"-A POSTROUTING {BROAD}\n", "head line"),
        ("-P PREROUTING ACCEPT\n", "head line"),
        ("-N POSTROUTING2\n", "head line"),
        ("-P POSTROUTING ACCEPT", "middle of a line"),
        (f"{HEAD}-A POSTROUTING -s 172.7.2", "middle of a line"),
        (f"{HEAD}-A OTHER -j X\n", "not a rule of POSTROUTING"),
        (f"{HEAD}-A\n", "not a rule of POSTROUTING"),
        (f"{HEAD}\n", "not a rule of POSTROUTING"),
        (f"{HEAD}-P POSTROUTING ACCEPT\n", "not a rule of POSTROUTING"),
        (f"{HEAD}Segmentation fault\n", "not a rule of POSTROUTING"),
        (f'{HEAD}-A POSTROUTING -m comment --comment "open\n', "not closed"),
        (f'{HEAD}-A POSTROUTING -m comment --comment "{"x" * 70000}" -j X\n', "not closed"),
    ],
)
def test_a_listing_that_is_not_whole_is_an_error(output: str, why: str) -> None:
    with pytest.raises(RuleError, match=why):
        parse_listing(output, "POSTROUTING")


@pytest.mark.parametrize("tail", ["\n", "x\n", '\\"\n', " \n"])
def test_a_string_that_never_closes_costs_no_more_than_its_length(tail: str) -> None:
    """It took minutes where each line of it was read from the beginning again."""
    output = f'{HEAD}-A POSTROUTING -m comment --comment "{tail * 60_000}'
    began_s = time.thread_time()
    with pytest.raises(RuleError, match="not closed"):
        parse_listing(output, "POSTROUTING")
    with pytest.raises(RuleError, match="not closed"):
        own_chains(output)
    assert time.thread_time() - began_s < 2


def test_a_number_of_any_length_is_no_bug() -> None:
    # Python refuses to convert more than 4300 digits, with an error of its own.
    with pytest.raises(RuleError):
        listing(f"-A POSTROUTING -c {'9' * 5000} 1 -j X")


def test_the_chains_of_ours_are_those_that_our_rules_jump_to() -> None:
    other = JUMP.replace("SNATD-POSTROUTING", "SNATD-SNAT-01234567")
    foreign = "-s 10.0.0.0/8 -j SNATD-FOREIGN"
    odd = '-o a"b -m comment --comment snatd -j SNATD-ODD'
    rules = (Rule(foreign), Rule(JUMP), Rule(odd), Rule(other), Rule(JUMP), Rule(OURS))
    assert own_jumps(rules) == ("SNATD-POSTROUTING", "SNATD-SNAT-01234567")


def test_the_chains_of_ours_in_a_whole_listing() -> None:
    output = (
        "-P POSTROUTING ACCEPT\n-N DOCKER\n-N SNATD-POSTROUTING\n-N SNATD-SNAT-01234567\n"
        f"-A POSTROUTING {JUMP}\n"
    )
    assert own_chains(output) == ("SNATD-POSTROUTING", "SNATD-SNAT-01234567")


@pytest.mark.parametrize("break_", ["\n", "\u2028", "\x0b", "\x85", "\r"])
def test_a_comment_invents_no_chain_of_ours(break_: str) -> None:
    comment = f'"x{break_}-N SNATD-INVENTED{break_}"'
    output = f"-P POSTROUTING ACCEPT\n-A POSTROUTING -m comment --comment {comment} -j RETURN\n"
    assert own_chains(output) == ()


def test_a_table_is_read_chain_by_chain() -> None:
    listing = (
        "-P PREROUTING ACCEPT\n-P POSTROUTING DROP\n-N C\n"
        '-A POSTROUTING -m comment --comment "two\nlines" -j C\n-A C\n-A POSTROUTING -g C\n'
    )
    chains, policies = parse_table(listing)
    texts = {name: [rule.text for rule in rules] for name, rules in chains.items()}
    assert texts == {
        "PREROUTING": [],
        "POSTROUTING": ['-m comment --comment "two\nlines" -j C', "-g C"],
        "C": [""],
    }
    assert policies == {"PREROUTING": "ACCEPT", "POSTROUTING": "DROP"}


def test_a_table_with_somebodys_own_base_chain() -> None:
    line = "# Table `nat' contains incompatible base-chains, use 'nft' tool to list them.\n"
    assert parse_table(f"{line}-P POSTROUTING ACCEPT\n")[0] == {"POSTROUTING": ()}


@pytest.mark.parametrize(
    "listing",
    [
        "",
        "# Table\n-P POSTROUTING ACCEPT\n",
        "-P POSTROUTING ACCEPT\n-A POSTROUTING -j MASQ",
        "-A POSTROUTING -j MASQUERADE\n",
        "-P POSTROUTING ACCEPT\n-A FOO -j MASQUERADE\n",
        "-P POSTROUTING ACCEPT\nwarning\n",
        "-N \n",
        '-P POSTROUTING ACCEPT\n-A POSTROUTING -m comment --comment "a\n',
    ],
)
def test_a_table_that_is_not_whole_is_refused(listing: str) -> None:
    with pytest.raises(RuleError):
        parse_table(listing)
