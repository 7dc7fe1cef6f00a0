"""No text breaks a parser: it is understood, or refused by the parser's own error."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from snatd.config import Config, from_table
from snatd.core.errors import LeaseError, RuleError
from snatd.core.model import Counters, Lease, Rule
from snatd.core.rules import (
    Match,
    Spec,
    Target,
    own_chains,
    own_jumps,
    parse,
    parse_listing,
    quote,
    tokens,
)
from snatd.host.flannel import parse_lease
from snatd.host.memory import MemoryDamaged, MemoryFile
from snatd.kernel.events import _GENERATION, _is_link_local, _is_relevant, _printable
from snatd.kernel.messages import messages
from tests.fakes import BROAD, JUMP, OURS, networks
from tests.property.chains import FOREIGN, counters

# What tends to matter to one parser or another.
SPICE = st.sampled_from(
    ['"', "'", "\\", "\n", "\r", "\0", " ", "!", "-", "=", ",", "/", "%", "-c 1 2", "-j", "\u2028"]
)


def mutated(*valid: str) -> st.SearchStrategy[str]:
    """A valid text with pieces cut out, doubled, or spiced."""

    @st.composite
    def strategy(draw: st.DrawFn) -> str:
        text = draw(st.sampled_from(valid))
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, len(text)))
            end = draw(st.integers(start, min(len(text), start + 12)))
            piece = draw(SPICE | st.just(text[start:end] * 2) | st.just("") | st.text(max_size=3))
            text = text[:start] + piece + text[end:]
        return text

    return strategy()


def only(error: type[Exception], call: Callable[[], object]) -> None:
    with suppress(error):
        call()


@given(st.text() | mutated(BROAD, OURS, JUMP, *FOREIGN))
def test_a_rule(text: str) -> None:
    only(RuleError, lambda: parse(text))
    only(RuleError, lambda: tokens(text))
    own_jumps((Rule(text),))


LISTING = (
    "-P POSTROUTING ACCEPT -c 1 60\n"
    f"-A POSTROUTING {BROAD.replace(' -j', ' -c 7 420 -j')}\n"
    f"-A POSTROUTING {FOREIGN[8]}\n-A POSTROUTING {FOREIGN[15]}\n"
)


@given(st.text() | mutated(LISTING))
def test_a_listing(text: str) -> None:
    only(RuleError, lambda: parse_listing(text, "POSTROUTING"))
    only(RuleError, lambda: own_chains(text))


@given(mutated(LISTING), st.integers(0, 400))
def test_a_listing_cut_off_inside_a_line_is_refused(text: str, at: int) -> None:
    cut = text[:at].rstrip("\n")
    if cut:
        try:
            parse_listing(cut, "POSTROUTING")
        except RuleError:
            return
        raise AssertionError(cut)


SUBNET_ENV = """\
FLANNEL_NETWORK=10.42.0.0/16,192.168.0.0/16
FLANNEL_SUBNET=10.42.0.1/24
FLANNEL_IPV6_NETWORK=2001:cafe:42::/56
FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
"""


@given(st.text() | mutated(SUBNET_ENV))
def test_a_subnet_env(text: str) -> None:
    try:
        lease = parse_lease(text)
    except LeaseError:
        return
    assert lease.families
    for family, of_family in lease.families:
        assert of_family.subnet.version == family.version
        assert all(network.version == family.version for network in of_family.networks)
        # Into a rule it goes as text.
        assert all(str(one).isascii() and " " not in str(one) for one in of_family.networks)


@given(st.integers(0, len(SUBNET_ENV)))
def test_a_half_written_subnet_env_never_says_that_a_family_is_gone(at: int) -> None:
    try:
        lease = parse_lease(SUBNET_ENV[:at])
    except LeaseError:
        return
    assert isinstance(lease, Lease)
    assert lease == parse_lease(SUBNET_ENV) or not lease.whole


TOML = """\
mode = "observe"
networks = ["10.9.0.0/16", "fd00:9::/48"]
exclude = ["10.9.1.0/24"]
egress = "keep"
resync = 30
state_dir = "/srv/state"
masquerade_marks = ["0x4000", "8"]
saved_rules = "/etc/iptables/rules.v4"
"""
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
KEYS = st.sampled_from([*Config.__dataclass_fields__]) | st.text()


@given(mutated(TOML) | st.text())
def test_a_configuration_file(text: str) -> None:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    from_table(table, "snatd.toml")


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_configuration_of_any_values(table: dict[str, object]) -> None:
    found, complaints = from_table(table, "snatd.toml")
    assert len(complaints) <= len(table)
    if complaints:
        return
    assert found.policy.networks == found.networks
    assert {type(one) for one in found.masquerade_marks} <= {int}


MEMORY = json.dumps(
    {
        "schema": 1,
        "replaced": [
            {
                "family": "ipv4",
                "backend": "nft",
                "subnet": "172.7.21.0/24",
                "rules": [{"text": BROAD, "copies": 2}],
            }
        ],
    }
)


@given(st.binary() | mutated(MEMORY).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_memory_file(tmp_path: Path, content: bytes) -> None:
    memory = MemoryFile(tmp_path)
    memory.path.write_bytes(content)
    with suppress(MemoryDamaged):
        for one in memory.load().values():
            assert all("\n" not in text and 0 < copies <= 64 for text, copies in one.replaced)


@given(st.binary())
def test_a_datagram(datagram: bytes) -> None:
    _is_relevant(datagram)
    _is_link_local(datagram)
    _GENERATION.search(datagram)
    assert sum(len(body) for _, body in messages(datagram)) <= len(datagram)
    assert _printable(datagram).isprintable()


odd_text = st.text(st.sampled_from("a-_ \"'\\\n\t!é\u2028") | st.characters(codec="utf-8"))


@given(odd_text)
def test_a_quoted_string_is_one_word_again(text: str) -> None:
    (word,) = tokens(quote(text))
    assert (word.raw, word.value) == (quote(text), text)


@given(st.lists(odd_text))
def test_quoted_strings_are_as_many_words(strings: list[str]) -> None:
    assert [word.value for word in tokens(" ".join(map(quote, strings)))] == strings


some_network = st.none() | st.sampled_from(
    networks("172.7.21.0/24 172.7.0.0/16 10.0.0.0/8 172.7.21.5/32 fd00:7:21::/64 ::/0")
)
device = st.from_regex(r"[a-z0-9.+@]{1,2}[a-z0-9.+@:_-]{0,12}", fullmatch=True)
specs = st.builds(
    Spec,
    source=some_network,
    source_negated=st.booleans(),
    destination=some_network,
    destination_negated=st.booleans(),
    out=st.none() | st.builds(Match, device, st.booleans()),
    comment=st.none() | odd_text,
    others=st.lists(
        st.sampled_from(("-p tcp", "! -p udp", "-m tcp", "--dport 80", '--helper "a b"')),
    ).map(tuple),
    target=st.none()
    | st.builds(
        Target,
        st.sampled_from(("MASQUERADE", "SNAT", "RETURN", "SNATD-POSTROUTING")),
        odd_text.map(lambda text: f"--prefix {quote(text)}") | st.just(""),
        st.booleans(),
    ),
).filter(
    # What is not there cannot be negated.
    lambda spec: (
        (spec.source is not None or not spec.source_negated)
        and (spec.destination is not None or not spec.destination_negated)
    )
)


@given(specs)
def test_what_is_written_means_the_same_when_read(spec: Spec) -> None:
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)


@given(st.lists(st.tuples(specs, counters), max_size=5))
def test_a_listing_gives_back_rules_and_counters(rules: list[tuple[Spec, Counters | None]]) -> None:
    lines = ["-P POSTROUTING ACCEPT"]
    for spec, count in rules:
        words = [str(Spec(**{**spec.__dict__, "target": None}))]
        words += [f"-c {count.packets} {count.bytes}"] if count else []
        words += [str(spec.target)] if spec.target else []
        lines.append(" ".join(["-A POSTROUTING", *filter(None, words)]))
    found = parse_listing("".join(f"{line}\n" for line in lines), "POSTROUTING")
    assert [rule.text for rule in found] == [str(spec) for spec, _ in rules]
    assert [rule.counters for rule in found] == [count for _, count in rules]
