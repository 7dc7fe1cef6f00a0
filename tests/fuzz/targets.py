"""What must hold of any input, for each reader of something that others write.

A target takes bytes and raises where something does not hold. It needs no fuzzer, so the corpus
goes through all of them in tests/unit/test_corpus.py.
"""

from __future__ import annotations

import json
import os
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import ip_address
from pathlib import Path

from snatd import config
from snatd.core import xtables
from snatd.core.deadline import Deadline
from snatd.core.desired import Desired, desired
from snatd.core.errors import (
    BackendError,
    FlowError,
    LeaseError,
    RuleError,
    StaleRuleset,
)
from snatd.core.flows import Ids, parse_flow, to_delete, verdict
from snatd.core.guard import guard_rules, guard_script, plan_guard
from snatd.core.mend import misplaced, undone
from snatd.core.model import SHORTEST_PREFIX, Family, Hold, Lease, Policy, Rule, Ruleset
from snatd.core.packet import Hook
from snatd.core.plan import Transaction, applied, plan
from snatd.core.revert import Memory, remember, revert
from snatd.core.rules import parse, parse_table
from snatd.core.saved import bring_in_line, dynamic_chains, put_back, without_dynamic
from snatd.core.trace import before_guard, cluster_packets, rewriters
from snatd.host.flannel import parse_lease, read_lease
from snatd.host.memory import MemoryDamaged, MemoryFile
from snatd.kernel.guard import GuardTable
from snatd.kernel.hooks import read_hooks
from snatd.kernel.messages import messages
from snatd.kernel.nft import NftTables, restore_script
from snatd.kernel.tools import Tools
from tests.fakes import (
    FAR_AWAY,
    NFT,
    V4,
    V6,
    P,
    egress,
    lease,
    link,
    networks,
    node,
    restored,
    wish,
)
from tests.unit.test_events import link_ear, nft_ear

# Between the parts of an input that stands for several outputs. No tool prints it.
BETWEEN = b"\x1e"

WISHES = (
    wish(),
    wish(policy=egress("keep")),
    wish(node(lease(ipmasq=True))),
    wish(policy=Policy(exclude=networks("172.7.192.0/18"))),
    wish(node(lease(inside="172.7.0.0/16 10.9.0.0/16"))),
)
SIX = wish(
    node(lease("fd00:7:21::1/64", "fd00:7::/32", V6), link(3, "docker0", "fd00:7:21::1/64")),
    family=V6,
)


@cache
def _folder() -> Path:
    """A folder of this process's own, gone with it."""
    folder = tempfile.TemporaryDirectory(prefix="snatd-fuzz-")
    _FOLDERS.append(folder)
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _written(name: str, content: bytes) -> Path:
    path = _folder() / name
    path.write_bytes(content)
    return path


def subnet_env(data: bytes) -> None:
    """A lease or a Hold; printed and read again it is the same; a cut one takes no family away."""
    path = _written("subnet.env", data)
    found = read_lease(path)
    if isinstance(found, Hold):
        assert found.reason.startswith(f"{path}: ")
        return
    text = data.decode("ascii")
    assert found.families
    for family, of_family in found.families:
        for network in (of_family.subnet, *of_family.networks):
            assert network.version == family.version
            assert network.prefixlen >= SHORTEST_PREFIX[family]
    assert parse_lease(_lease_text(found)) == found
    assert parse_lease(f"# a comment\n\n{text} \t\n") == found
    if "\r" not in text:
        assert parse_lease(text.replace("\n", "\r\n")) == found
    if text.find("FLANNEL_IPMASQ=") == text.rfind("\n", 0, -1) + 1:  # as flannel ends its file
        for cut in range(min(len(text), 200)):
            with suppress(LeaseError):
                less = parse_lease(text[:cut])
                assert not less.whole or len(less.families) == len(found.families)
    for family in Family:
        wanted = desired(family, node(found), Policy())
        if isinstance(wanted, Desired):
            assert _converges(wanted, Ruleset(family, NFT, (Rule(f"-s {wanted.subnet} -j SNAT"),)))
            assert guard_rules(wanted, (0x4000,))


def _lease_text(found: Lease) -> str:
    lines = []
    for family, of_family in found.families:
        six = "IPV6_" * (family is V6)
        lines += [f"FLANNEL_{six}SUBNET={of_family.gateway}"]
        if of_family.networks:
            lines += [f"FLANNEL_{six}NETWORK={','.join(map(str, of_family.networks))}"]
    lines += [f"FLANNEL_MTU={found.mtu}"] * (found.mtu is not None)
    lines += [f"FLANNEL_IPMASQ={str(found.ipmasq).lower()}"] * found.whole
    return "".join(f"{line}\n" for line in lines)


@dataclass
class Canned(Tools):
    """Tools that print what they were given."""

    output: Callable[[Sequence[str]], str] = field(default=lambda _: "")

    def find(self, name: str) -> str | None:
        return f"/usr/sbin/{name}"

    def run(
        self,
        argv: Sequence[str],
        deadline: Deadline,  # noqa: ARG002
        stdin: str = "",  # noqa: ARG002
        environment: Mapping[str, str] | None = None,  # noqa: ARG002
        meanwhile: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> str:
        return self.output(argv)


def listing(data: bytes) -> None:
    """`iptables -S`, of POSTROUTING and of a chain of ours: rules, or BackendFailed. Whatever the
    rules are, plans converge in one step, and move or change nobody else's."""
    first, *rest = data.split(BETWEEN)
    outputs = {"POSTROUTING": os.fsdecode(first), "-S": os.fsdecode(b"".join((first, *rest)))}
    other = os.fsdecode(b"".join(rest))
    tools = Canned(output=lambda argv: outputs.get(argv[-1], other))
    with suppress(BackendError):
        ruleset = NftTables(V4, tools).read(FAR_AWAY, thorough=len(data) % 2 == 0)
        for rule in ruleset.postrouting:
            _means_the_same_when_read_again(rule.text)
        wanted = WISHES[len(data) % len(WISHES)]
        _converges(wanted, ruleset)
        _undoes(wanted, ruleset)
        _reverts(ruleset)
    with suppress(RuleError):
        chains, _ = parse_table(outputs["-S"])
        steps = xtables.compiled(chains, chains)
        _who_rewrites([Hook("ip nat", name, 100, steps) for name in chains], WISHES[0])


def _means_the_same_when_read_again(text: str) -> None:
    with suppress(RuleError):
        one, two = parse(text), parse(str(parse(text)))
        # A word where an option should be belongs to what it happens to stand behind.
        apart = [replace(spec, others=(" ".join(spec.others),)) for spec in (one, two)]
        assert apart[0] == apart[1], text


def _certainly_foreign(rules: Iterable[Rule]) -> list[tuple[Rule, object]]:
    """The rules that can by no means be ours or broad, with their counters."""
    return [
        (rule, rule.counters)
        for rule in rules
        if "172.7.21." not in rule.text and "snatd" not in rule.text.lower()
    ]


def _converges(wanted: Desired, ruleset: Ruleset) -> Ruleset:
    now = ruleset
    for transaction in plan(wanted, {NFT: ruleset}, NFT):
        now = applied(now, transaction)
        _can_be_written(ruleset, transaction)
        assert misplaced(transaction, now) is None
    assert plan(wanted, {NFT: now}, NFT) == ()
    if wanted.subnet == P:
        assert _certainly_foreign(now.postrouting) == _certainly_foreign(ruleset.postrouting)
    return now


def _can_be_written(before: Ruleset, transaction: Transaction) -> None:
    """A restore, line by line, gives what the transaction says."""
    # A chain that only somebody else's rule jumps to is there, but is not read.
    jumped_to = re.findall(
        r"(?:^|\s)-[jg] (SNATD-\S+)", "\n".join(r.text for r in before.postrouting)
    )
    unread = {name: () for name in jumped_to if before.chain(name) is None}
    before = replace(before, own_chains=(*before.own_chains, *unread.items()))
    found = restored(before, restore_script(transaction))
    expected = applied(before, transaction)
    assert found.postrouting == expected.postrouting
    assert dict(found.own_chains) == dict(expected.own_chains)


def _undoes(wanted: Desired, ruleset: Ruleset) -> None:
    for transaction in plan(wanted, {NFT: ruleset}, NFT):
        now = applied(ruleset, transaction)
        back = applied(now, undone(transaction, now))
        assert Counter(back.postrouting) == Counter(ruleset.postrouting)
        assert dict(back.own_chains) == dict(ruleset.own_chains)


def _reverts(ruleset: Ruleset, *memories: Memory) -> None:
    for today in (P, None):
        transaction = revert(ruleset, memories, today)
        now = applied(ruleset, transaction)
        _can_be_written(ruleset, transaction)
        jumped_to = xtables.targets(now.postrouting)
        assert all(name in jumped_to for name, _ in now.own_chains)
        # What is put back may look like anybody's.
        there = iter(_certainly_foreign(now.postrouting))
        assert all(one in there for one in _certainly_foreign(ruleset.postrouting))


def _who_rewrites(hooks: Sequence[Hook], wanted: Desired) -> None:
    before_guard(hooks)
    for answer in rewriters(hooks[:4], cluster_packets(wanted, 0x6000)):
        assert not answer.kept
        assert str(answer.place)


def saved(data: bytes) -> None:
    """A saved rules file: only our lines differ after an edit, twice is once, and revert leaves
    nothing of ours; or RuleError."""
    wanted = WISHES[len(data) % len(WISHES)]
    try:
        edited = bring_in_line(data, wanted, NFT)
    except RuleError:
        return
    before, after = _lines(data), _lines(edited.content)
    for line in edited.removed:
        assert re.search(r"172\.7\.21\.|snatd|SNATD-", line), line
    for line in edited.added:
        assert re.search(r"--comment snatd|SNATD-", line), line
    _differ_by(before, edited.removed, edited.added, after)
    assert data.endswith(b"\n") == edited.content.endswith(b"\n")
    assert (edited.content == data) == (not edited.transactions)
    again = bring_in_line(edited.content, wanted, NFT)
    assert (again.content, again.transactions) == (edited.content, ())
    memory: Memory | None = None
    for transaction in edited.transactions:
        memory = remember(transaction, P, memory)
    with suppress(RuleError):
        back = put_back(edited.content, V4, NFT, [memory] if memory else [], P)
        _differ_by(after, back.removed, back.added, _lines(back.content))
        assert put_back(back.content, V4, NFT, [], P).content == back.content


def _lines(content: bytes) -> list[str]:
    return [
        line.removesuffix("\r") for line in content.decode("utf-8", "surrogateescape").split("\n")
    ]


def _differ_by(
    before: Sequence[str], removed: Sequence[str], added: Sequence[str], after: Sequence[str]
) -> None:
    """Each line is there as often as was said, and all others are in the order they were in."""
    left = Counter(before)
    left.subtract(removed)
    left.update(added)
    assert +left == Counter(after)
    assert min(left.values()) >= 0
    told = {*removed, *added}
    rest = [[line for line in lines if line not in told] for lines in (before, after)]
    assert rest[0] == rest[1]


def save(data: bytes) -> None:
    """What `iptables-save` prints: without dynamic chains it has none, and nothing else is gone."""
    less = without_dynamic(data)
    assert dynamic_chains(less) == ()
    assert without_dynamic(less) == less
    before, after = data.split(b"\n"), less.split(b"\n")
    if after == [b""] and b"" not in before:
        after = []
    there = iter(before)
    assert all(line in there for line in after)
    for line in Counter(before) - Counter(after):
        assert re.match(_OF_A_CHAIN, line), line


_OF_A_CHAIN = rb"(?::|-A |\[).*(?:DOCKER|KUBE|CNI|FLANNEL|NETAVARK)"


def nft_json(data: bytes) -> None:
    """What `nft -j` prints, and `nft -a` behind it: hooks and a guard, or BackendError."""
    document, _, text = (os.fsdecode(one) for one in data.partition(BETWEEN))

    def output(argv: Sequence[str]) -> str:
        return document if "-j" in argv else text

    for family, wanted in ((V4, WISHES[0]), (V6, SIX)):
        with suppress(BackendError):
            found = GuardTable(family, Canned(output=output)).read(FAR_AWAY)
            transaction = plan_guard(wanted, found, Policy())
            if transaction is not None:
                # Nothing of what was read goes into what is written.
                rules = guard_script(transaction).splitlines()
                assert rules[-2:] == guard_script(_from_nothing(wanted)).splitlines()[-2:]
                assert plan_guard(wanted, applied(found, transaction), Policy()) is None
        with suppress(BackendError):
            _who_rewrites(read_hooks(family, Canned(output=output), FAR_AWAY).hooks, wanted)


def _from_nothing(wanted: Desired) -> Transaction:
    transaction = plan_guard(wanted, Ruleset(wanted.family, NFT), Policy())
    assert transaction is not None
    return transaction


_HEADER = struct.Struct("=IHHII")
_NFTABLES = 10 << 8
_NEW_RULE, _DEL_RULE, _DEL_TABLE = (_NFTABLES | kind for kind in (6, 8, 2))
_BRIDGE = 3


def netlink(data: bytes) -> None:
    """Datagrams of nf_tables and of routing: no bytes break an ear, and no whole message that
    concerns us is missed."""
    ears = (nft_ear(), nft_ear(nested=True))
    links = link_ear(_BRIDGE)
    for datagram in data.split(BETWEEN * 4):
        whole = _whole_messages(datagram)
        for ear in ears:
            events = list(ear._heard(datagram))
            if any(_concerns_nat(kind, attributes) for kind, attributes in whole):
                assert ear._pending is not None or events, "missed"
            for event in events:
                assert event.writer is None or str(event.writer).isprintable()
        for kind, body in messages(datagram):
            links._concerns(kind, body)


def _whole_messages(datagram: bytes) -> list[tuple[int, list[tuple[int, bytes]]]]:
    """The messages of a datagram in which every length is right; none of any other."""
    found = []
    position = 0
    while position < len(datagram):
        if len(datagram) - position < _HEADER.size + 4:
            return []
        length, kind, *_ = _HEADER.unpack_from(datagram, position)
        if length < _HEADER.size + 4 or length % 4 or position + length > len(datagram):
            return []
        attributes = _whole_attributes(datagram[position + _HEADER.size + 4 : position + length])
        if attributes is None:
            return []
        found.append((kind, attributes))
        position += length
    return found


def _whole_attributes(content: bytes) -> list[tuple[int, bytes]] | None:
    found = []
    while content:
        if len(content) < 4:
            return None
        length, kind = struct.unpack_from("=HH", content)
        if not 4 <= length <= len(content):
            return None
        found.append((kind, content[4:length]))
        content = content[(length + 3) & ~3 :]
    return found


def _concerns_nat(kind: int, attributes: Sequence[tuple[int, bytes]]) -> bool:
    match attributes:
        case [(1, b"nat\0"), (2, b"POSTROUTING\0"), *_]:
            return kind in (_NEW_RULE, _DEL_RULE)
        case [(1, b"snatd\0"), *_]:
            return kind >> 8 == _NFTABLES >> 8
        case [(1, name), *_] if name.endswith(b"\0"):
            return kind == _DEL_TABLE
    return False


def toml(data: bytes) -> None:
    """A configuration, or complaints; printed and read again it is the same."""
    found, complaints = config.read(_written("snatd.toml", data))
    assert all("\n" not in one for one in complaints), complaints
    assert found.policy.networks == found.networks
    assert 0 <= found.marks < 2**32
    assert config.load(_written("again.toml", _toml_text(found).encode())) == found


def _toml_text(found: config.Config) -> str:
    lines = []
    for key, value in found.__dict__.items():
        plain: object = value if isinstance(value, float) else str(value)
        if isinstance(value, tuple):
            plain = [hex(one) if isinstance(one, int) else str(one) for one in value]
        if value is not None:
            # DEL is TOML's to escape, and not JSON's.
            lines.append(f"{key} = {json.dumps(plain)}\n".replace("\x7f", "\\u007f"))
    return "".join(lines)


def memory(data: bytes) -> None:
    """`replaced.json`: memories, or MemoryDamaged; kept and read again they are the same, and
    what `revert` makes of them can be written."""
    file = MemoryFile(_folder())
    file.path.write_bytes(data)
    try:
        memories = file.load()
    except MemoryDamaged:
        return
    file.store(memories)
    assert file.load() == dict([*memories.items()][-64:])
    ours = Rule("-s 172.7.21.0/24 ! -d 172.7.0.0/16 -m comment --comment snatd -j MASQUERADE")
    ruleset = Ruleset(V4, NFT, (Rule("-o eth0 -j MASQUERADE"), ours, Rule("-j RETURN")))
    with suppress(StaleRuleset):
        _reverts(ruleset, *memories.values())


def flows(data: bytes) -> None:
    """Lines of `conntrack -L`: a flow, or FlowError; its name is one that the kernel takes."""
    for line in data.decode("ascii", "backslashreplace").split("\n"):
        with suppress(FlowError):
            flow = parse_flow(line)
            for wanted in (WISHES[0], SIX):
                verdict(flow, wanted, 0x6000)
            to_delete(flow, "udp")
            Ids().add(flow.identity)
            assert ip_address(str(flow.seen_as)) == flow.seen_as
            assert 0 <= flow.key.protocol < 256
            for port in (flow.key.source_port, flow.key.destination_port):
                assert port is None or 0 <= port < 65536


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    one.__name__: one
    for one in (subnet_env, listing, saved, save, nft_json, netlink, toml, memory, flows)
}
