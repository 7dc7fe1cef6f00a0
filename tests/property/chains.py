"""Chains as real nodes have them, and worse: broad, ours, stale, hand-made, foreign rules."""

from __future__ import annotations

from hypothesis import strategies as st

from snatd.core.desired import Desired
from snatd.core.model import Backend, Counters, Policy, Rule, Ruleset
from snatd.core.plan import Shape, chain_name, narrowed, own_chain
from snatd.core.rules import Match, Target, own_jumps
from tests.fakes import HAND_MADE, IPTABLES, V4, egress, lease, link, networks, node, wish

S = "-s 172.7.21.0/24"
MARK = "-m comment --comment snatd"

FOREIGN = (
    '-m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
    '-m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ',
    '-m comment --comment "flanneld masq" -j FLANNEL-POSTRTG',
    "-s 172.7.0.0/16 -d 172.7.0.0/16 -j RETURN",
    "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE --random-fully",
    "! -s 172.7.0.0/16 -d 172.7.0.0/16 -j MASQUERADE",
    "-s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE",
    "-o docker0 -m addrtype --src-type LOCAL -j MASQUERADE",
    '-s 172.7.21.5/32 -m comment --comment "name: \\"cbr0\\" id: \\"d3ad\\"" -j CNI-0123',
    "-s 172.7.21.5/32 -j SNAT --to-source 192.168.33.77",
    f"{S} -j NETAVARK-1D8721804F16F",
    f"{S} -p tcp -m tcp --dport 80 -j MASQUERADE",
    f"{S} -d 10.0.0.0/8 -j MASQUERADE",
    f'{S} -o a"b -j MASQUERADE',
    f"{S} -m comment --comment snatd2 -j RETURN",
    f'{S} -m comment --comment "two\nlines" -j MASQUERADE',
    f'{S} -m odd --unknown "\\"quoted\\" \\\\ it\\\'s" -j MASQUERADE',
    "-o eth0 -j MASQUERADE",
    "-j MASQUERADE",
    "-g CUSTOM",
    "-m comment --comment counted",
)
OUTS = (None, Match("docker0", True), Match("br-0123456789ab", True), Match("eth0"))
TARGETS = (
    Target("MASQUERADE"),
    Target("MASQUERADE", "--random-fully"),
    Target("SNAT", "--to-source 192.168.33.10 --persistent"),
)
DECORATIONS = ("", " -m comment --comment ops", ' -m comment --comment "by \\"ops\\""')

WISHES: tuple[Desired, ...] = (
    wish(),
    wish(policy=egress("keep")),
    wish(node(lease(ipmasq=True))),
    wish(node(lease(inside="172.7.0.0/16 10.9.0.0/16"))),
    wish(policy=Policy(exclude=networks("172.7.1.0/24"))),
    wish(
        node(
            lease(inside="172.0.0.0/8"),
            link(2, "eth0", "172.9.0.4/16"),
            link(3, "docker0", "172.7.21.1/24"),
            routes="172.9.0.0/16@eth0",
        ),
        egress("ensure"),
    ),
)
LATER = wish(node(lease(inside="172.7.0.0/16 10.8.0.0/16")))
OLDER = (
    wish(node(lease("172.7.9.1/24"), link(3, "docker0", "172.7.9.1/24"))),
    wish(node(lease("172.7.9.1/24", "172.7.0.0/16 10.8.0.0/16"), link(3, "cni0", "172.7.9.1/24"))),
    wish(node(lease(inside="172.6.0.0/15"))),
    LATER,
)

shapes = st.builds(Shape, st.sampled_from(OUTS), st.sampled_from(TARGETS))
counters = st.none() | st.builds(Counters, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))


def broad_text(shape: Shape, within: str = "", decoration: str = "") -> str:
    out = f" {'! ' * shape.out.negated}-o {shape.out.value}" if shape.out else ""
    return f"{S}{within}{out}{decoration} -j {str(shape.target).removeprefix('-j ')}"


broads = st.builds(
    broad_text, shapes, st.sampled_from(("", " ! -d 172.7.21.0/24")), st.sampled_from(DECORATIONS)
)
# Says what nobody would, with our comment on it.
claimed = st.sampled_from(
    (
        MARK,
        f"-p tcp {MARK} -j ACCEPT",
        f"! {S} {MARK} -j MASQUERADE",
        f"{S} -d 172.7.0.0/16 {MARK} -j RETURN",
        f"{S} {MARK} -j MASQUERADE",
        f"{S} {MARK} -g SNATD-POSTROUTING",
    )
)


def ours(wanted: Desired) -> st.SearchStrategy[str]:
    """Rules of ours, of today, of yesterday and of another lease."""
    return st.builds(
        lambda of, shape: str(narrowed(of, shape)), st.sampled_from((wanted, *OLDER)), shapes
    )


def texts_for(wanted: Desired) -> st.SearchStrategy[str]:
    return st.one_of(
        st.sampled_from(FOREIGN), broads, ours(wanted), claimed, st.just(HAND_MADE), broads
    )


@st.composite
def rulesets(draw: st.DrawFn, wanted: Desired, backend: Backend) -> Ruleset:
    """A chain of up to a dozen rules, with copies, and the chains of ours that it jumps to."""
    pool = draw(st.lists(texts_for(wanted), min_size=1, max_size=8))
    order = draw(st.lists(st.sampled_from(pool), max_size=12))
    rules = tuple(Rule(text, draw(counters)) for text in order)
    own = tuple((name, draw(contents(name, wanted))) for name in own_jumps(rules))
    return Ruleset(V4, backend, rules, own)


@st.composite
def contents(draw: st.DrawFn, name: str, wanted: Desired) -> tuple[Rule, ...]:
    """What a chain of ours may hold: what it should, that of yesterday, less, nothing, more."""
    target = next((one for one in TARGETS if chain_name(one) == name), TARGETS[0])
    of = draw(st.sampled_from((wanted, LATER)))
    whole = tuple(Rule(str(one), draw(counters)) for one in own_chain(of, target))
    kept = tuple(rule for rule in whole if draw(st.integers(0, 3)))
    odd = (*kept, Rule("-j ACCEPT"))
    return draw(st.sampled_from((whole, whole, kept, odd, ())))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Desired, dict[Backend, Ruleset], Backend]:
    """A wish, what one or both backends hold, and which of them the iptables command is."""
    wanted = draw(st.sampled_from(WISHES))
    both = {one: draw(rulesets(wanted, one)) for one in IPTABLES}
    only = draw(st.sampled_from((IPTABLES, (Backend.NFT,), (Backend.LEGACY,))))
    return wanted, {one: both[one] for one in only}, draw(st.sampled_from(IPTABLES))
