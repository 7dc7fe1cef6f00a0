"""What other programs' rules do to cluster traffic, or would do without the guard, as findings.

Pure. What a rule can do is decided in `trace`, what is to be done about it in `plan`.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from snatd.core.desired import Desired
from snatd.core.docker import Docker
from snatd.core.errors import RuleError
from snatd.core.finding import Finding, Severity, some
from snatd.core.model import POSTROUTING, Backend, Family, count
from snatd.core.packet import Check, Hook, Marked
from snatd.core.plan import Change, Transaction
from snatd.core.rules import parse, tokens
from snatd.core.trace import GUARD_PRIORITY, Answer, Place
from snatd.core.word import units_in
from snatd.core.writers import UNKNOWN, by, told, writer
from snatd.core.xtables import iptables_of

_GUARD_IT = (
    '# guard = "auto" in snatd.toml, and systemctl reload snatd: then no such rule does harm; or:'
)
INSTALL_NFT = ("apt-get install nftables", "# Fedora, EL: dnf install nftables")
# More lines of evidence nobody reads.
_MOST_LINES = 8

# Where a rule of a kind that cannot be narrowed comes from, and how it ends there.
_AT_ITS_SOURCE = {
    "Docker": (
        '# put "ip-masq": false into /etc/docker/daemon.json, then:',
        "systemctl restart docker",
    ),
    "CNI bridge": ('# "ipMasq": false in /etc/cni/net.d, for pods that are made after that',),
    "ip-masq-agent": ("# put the cluster network into its list nonMasqueradeCIDRs",),
    "firewalld": ("# firewall-cmd --permanent --zone=ZONE --remove-masquerade, and --reload",),
    "systemd-networkd": (
        "# take IPMasquerade= out of the .network file, then:",
        "networkctl reload",
    ),
    "flannel": ("systemctl restart flanneld",),
}
# No command: it is not wanted beside, and a restart of Docker may restart its containers.
_SOURCE_OF_BROAD = (
    "# if Docker writes it again and again, and only then: "
    '"ip-masq": false in /etc/docker/daemon.json, systemctl restart docker'
)
_TABLES = {
    (family, backend): f"{legacy}{ip} nat"
    for family, ip in ((Family.V4, "ip"), (Family.V6, "ip6"))
    for backend, legacy in ((Backend.NFT, ""), (Backend.LEGACY, "legacy "))
}

# Table, chain and text of a rule.
Where = tuple[str, str, str]


def rule_command(command: str, how: str, chain: str, text: str) -> str:
    """A rule's deletion (-D) or addition (-A) for a shell, whatever the rule's strings hold."""
    words = [token.value for token in tokens(text)]
    return shlex.join([command, "-t", "nat", how, chain, *words])


def drift(
    one: Transaction, guarded: bool, dockers: Sequence[Docker], cure: tuple[str, ...]
) -> Iterator[Finding]:
    """What a transaction of the plan is about, reason by reason."""
    change = some(
        [*(f"- {line}" for line in one.removed), *(f"+ {line}" for line in one.added)], _MOST_LINES
    )
    for reason in one.reasons:
        match reason.change:
            case Change.NARROWED:
                yield _broad(one, guarded, dockers, cure)
            case Change.ADDED:
                yield Finding(
                    "no_egress",
                    Severity.ERROR,
                    "nothing masquerades what this node's containers send outside",
                    (f"{one.family.command}-{one.backend.value} -t nat: {reason.why}",),
                    "who is asked by a container does not know the way back, and no answer comes",
                    cure,
                )
            case Change.GUARD_WRITTEN:
                yield Finding(
                    "guard_missing",
                    Severity.WARNING,
                    "the guard is not in place, or not as it should be",
                    change,
                    "whoever writes a broad rule hides containers until it is mended",
                    cure,
                )
            case _:
                yield Finding(
                    "stale_rule",
                    Severity.WARNING,
                    "rules of snatd's own are not what they should be",
                    change,
                    reason.why,
                    cure,
                )


def replaced(one: Transaction) -> tuple[Where, ...]:
    """The rules of others that a transaction takes out of POSTROUTING."""
    texts = [line.removeprefix(f"-A {POSTROUTING} ") for line in one.removed]
    table = _TABLES.get((one.family, one.backend), "")
    return tuple(
        (table, POSTROUTING, text)
        for text in texts
        if table and writer(table, POSTROUTING, text) != "snatd"
    )


def _broad(
    one: Transaction, guarded: bool, dockers: Sequence[Docker], cure: tuple[str, ...]
) -> Finding:
    remedy = list(cure)
    evidence = []
    by_docker = False
    for table, chain, text in replaced(one):
        by_docker = by_docker or writer(table, chain, text) == "Docker"
        command, _ = iptables_of(table)
        evidence.append(f"{command} -t nat: -A {chain} {text}{by(table, chain, text)}")
    for docker in dockers if by_docker else ():
        on, why = docker.masquerades()
        evidence.append(why if on else f"{why}, so dockerd will not write it again")
        remedy += (_SOURCE_OF_BROAD,) if on else ()
    return Finding(
        "broad_rule",
        Severity.WARNING if guarded else Severity.ERROR,
        "a rule hides containers from other nodes"
        + (" as soon as the guard is gone" if guarded else ""),
        tuple(dict.fromkeys(evidence)),
        "other nodes see this node's address instead of the container's",
        tuple(dict.fromkeys(remedy)),
    )


def can_snat(
    wanted: Desired,
    answers: Sequence[Answer],
    marks: int,
    *,
    guard_off: bool,
    not_by: Collection[str] = (),
) -> Iterator[Finding]:
    """The rules that can SNAT cluster traffic; those for certain are graver. `marks`: the bits by
    which masquerade is asked for. `guard_off`: by configuration. `not_by`: who is told already not
    to write such a rule, so that it is another's, or a left-over."""
    for severity, conditions, some_answers in _by_certainty(answers):
        yield Finding(
            "can_snat",
            severity,
            f"a rule hides containers of {wanted.subnet} from {wanted.inside}{conditions}",
            some((told(one) for one in some_answers), _MOST_LINES),
            "other nodes see another address than the container's",
            ((_GUARD_IT,) if guard_off else ()) + _remedies(some_answers, not_by, wanted, marks),
        )


def only_guarded(
    wanted: Desired, answers: Sequence[Answer], not_by: Collection[str] = ()
) -> Iterator[Finding]:
    """`answers`: what could, if there were no guard. `not_by`: as in `can_snat`."""
    if answers:
        yield Finding(
            "only_guarded",
            Severity.INFO,
            f"without the guard {count(len(answers), 'rule')} could hide containers of "
            f"{wanted.subnet}",
            some((told(one) for one in answers), _MOST_LINES),
            "these cannot be narrowed in their place; the guard keeps what containers send",
            _remedies(answers, not_by),
        )


def inbound(wanted: Desired, answers: Sequence[Answer]) -> Iterator[Finding]:
    """`answers`: what can SNAT what other nodes' containers send to this node's."""
    for severity, conditions, some_answers in _by_certainty(answers):
        places = [one.place for one in some_answers if one.place]
        yield Finding(
            "inbound_snat",
            severity,
            f"a rule hides other nodes' containers from those of {wanted.subnet}{conditions}",
            some((told(one) for one in some_answers), _MOST_LINES),
            "containers here see another address than the caller's; the guard keeps only what they "
            "send themselves",
            some(
                (line for place in places for line in _leaving_out(place, wanted)),
                _MOST_LINES,
                "# ",
            ),
        )


def _by_certainty(answers: Sequence[Answer]) -> Iterator[tuple[Severity, str, list[Answer]]]:
    """Those that are so for certain, and those that are under conditions, if there are any."""
    if certain := [one for one in answers if not one.why]:
        yield Severity.ERROR, "", certain
    if uncertain := [one for one in answers if one.why]:
        yield Severity.WARNING, " under conditions", uncertain


def _leaving_out(place: Place, wanted: Desired) -> tuple[str, ...]:
    who = writer(place.table, place.chain, place.step.text)
    at_its_source = _AT_ITS_SOURCE.get(who)
    leave = f"has to leave what goes into {wanted.subnet} out of it: {place}"
    return at_its_source or (f"# whose it is ({who}) {leave}",)


def _remedies(
    answers: Iterable[Answer],
    not_by: Collection[str],
    wanted: Desired | None = None,
    marks: int = 0,
) -> tuple[str, ...]:
    """`wanted`: None where a guard keeps it all the same."""
    places = [one.place for one in answers if one.place]
    lines = (line for one in places for line in _remedy(one, not_by, wanted, marks))
    return some(lines, _MOST_LINES, "# ")


def _remedy(
    place: Place, not_by: Collection[str], wanted: Desired | None, marks: int
) -> tuple[str, ...]:
    who = writer(place.table, place.chain, place.step.text)
    who = UNKNOWN if who in not_by else who
    if who in _AT_ITS_SOURCE:
        return _AT_ITS_SOURCE[who]
    if wanted is None:
        return (f"# nothing, as long as the guard stands: {place}",)
    command, name = iptables_of(place.table)
    if who == UNKNOWN and name == "nat":
        # What iptables could not print, nft did, in its own language.
        with suppress(RuleError):
            if parse(place.step.text).target and (keep := _keep_first(command, wanted, marks)):
                return keep
    return (f"# whose it is ({who}) has to leave the cluster network out of it: {place}",)


def _keep_first(command: str, wanted: Desired, marks: int) -> tuple[str, ...]:
    """What the guard does, before the rule, which stays for whoever else it is meant. One rule
    comes of each command, however often it is typed. Empty where it takes more than one: cut-outs
    stay masqueraded, as do what the node sends to itself by its bridge and what has a mark."""
    if wanted.cut_outs or not isinstance(wanted.bridge, str):
        return ()
    nat = [command, "-t", "nat"]
    unmarked = ["-m", "mark", "--mark", f"0x0/{marks:#x}"] if marks else []
    commands = []
    for network in wanted.cluster:
        match = ["-s", str(wanted.subnet), "-d", str(network), "!", "-o", wanted.bridge, *unmarked]
        rule = [POSTROUTING, *match, "-j", "ACCEPT"]
        delete, insert = (shlex.join([*nat, how, *rule]) for how in ("-D", "-I"))
        commands.append(f"{delete} 2>/dev/null || true; {insert}")
    return tuple(commands)


def proved(wrong: Sequence[str], *, guard_off: bool) -> Iterator[Finding]:
    """`wrong`: what the daemon says of its datagrams, which outweighs what rules seem to do."""
    if wrong:
        yield Finding(
            "not_kept",
            Severity.ERROR,
            "a datagram of the daemon's did not keep its source",
            some(wrong),
            "so other nodes see another address than the container's",
            (
                *((_GUARD_IT,) if guard_off else ()),
                "snatd explain  # follows a packet through each rule",
                "# the other findings here name the rules that could, and how to end that",
                "snatd verify  # sends another datagram to each node",
            ),
        )


def before_guard(hooks: Iterable[Hook]) -> Iterator[Finding]:
    """Nat chains that the kernel asks before the guard, or may."""
    for hook in hooks:
        yield Finding(
            "before_guard",
            Severity.WARNING,
            "another program's nat chain is asked before the guard, or may be",
            (f"nat chain {hook}",),
            "what it rewrites the guard cannot keep",
            (
                shlex.join(["nft", "list", "chain", *hook.table.split(" "), hook.chain]),
                f"# whose it is has to give it a priority above {GUARD_PRIORITY}; 100 is usual",
            ),
        )


def no_guard(family: Family, why: str) -> Iterator[Finding]:
    """`why`: what nft or the kernel said."""
    yield Finding(
        "no_guard",
        Severity.WARNING,
        f"there is no guard for {family.value}: this node cannot have it",
        (why,),
        "only rules whose source is exactly the subnet are mended, and each only after it was "
        "written",
        (
            *(
                INSTALL_NFT
                if "is not installed" in why
                else ("# run a kernel with nf_tables and its nat chains (CONFIG_NFT_NAT)",)
            ),
            '# or accept it: guard = "off" in snatd.toml',
        ),
    )


def marks(hooks: Iterable[Hook], masquerade_marks: Collection[int]) -> Iterator[Finding]:
    """Marks by which kube-proxy and host ports ask for masquerade here, and the guard keeps."""
    found: dict[int, str] = {}
    for hook in hooks:
        of_kube_proxy = hook.table.endswith(" kube-proxy")
        for chain, steps in hook.chains.items():
            if of_kube_proxy or chain.startswith(_BY_MARK):
                for step in steps:
                    for part in step.parts:
                        if isinstance(part, Check) and isinstance(part.what, Marked):
                            found.setdefault(part.what.mask, f"{hook.table} {chain}: {step.text}")
    known = sum(set(masquerade_marks))
    for mask, where in found.items():
        if not mask & ~known:
            continue
        bits = sorted({*masquerade_marks, *(1 << n for n in range(32) if mask >> n & 1)})
        listed = ", ".join(f'"{bit:#x}"' for bit in bits)
        yield Finding(
            "unknown_mark",
            Severity.WARNING,
            f"traffic that asks for masquerade by the mark {mask:#x} does not get it",
            (where, f"masquerade_marks = {', '.join(map(hex, sorted(masquerade_marks)))}"),
            "the guard lets it keep its address, and the answer may take a way on which nobody "
            "waits for it",
            (
                f"# masquerade_marks = [{listed}] in snatd.toml, then:",
                "systemctl reload snatd",
            ),
        )


_OFTEN, _WITHIN_S, _BURST_S = 4, 300.0, 2.5


def often(ages_s: Sequence[float], who: str, *, guard_off: bool) -> Iterator[Finding]:
    """`ages_s`: of the last repairs of what one wrote, the newest first. Who writes slowly is
    repaired each time, and that is no fight; but he should stop all the same. One restart of a
    service, which writes several times, is no more than that."""
    recent = [age_s for age_s in ages_s if age_s <= _WITHIN_S]
    if not recent or recent[0] > _WITHIN_S / (_OFTEN - 1):
        return  # whoever writes as often would have written again
    times = 1 + sum(later + _BURST_S < one for later, one in pairwise(recent))
    if times < _OFTEN:
        return
    yield Finding(
        "repaired_often",
        Severity.WARNING,
        "another program undoes snatd's repairs again and again",
        (
            f"{count(len(recent), 'repair')} in {recent[-1] - recent[0]:.0f} s, the last "
            f"{recent[0]:.0f} s ago",
            *((f"{who} wrote before",) if who else ()),
        ),
        f"repairs go on; {_IN_BETWEEN[guard_off]}",
        (*((_GUARD_IT,) if guard_off else ()), "snatd status", "# keep that program from it"),
    )


# By whether the guard is switched off.
_IN_BETWEEN = {
    True: "there is no guard, so containers are hidden in between",
    False: "what the guard does not keep is wrong in between",
}


def fighting(fight: Mapping[str, Any], *, guard_off: bool) -> Finding:
    """`fight`: what the daemon says of it."""
    units = units_in(fight["with"])
    keep = [f"systemctl status {shlex.quote(one)}  # keep it from that" for one in units]
    if not units or "docker.service" in units:
        keep.append('# for Docker: "ip-masq": false in /etc/docker/daemon.json')
    return Finding(
        "fighting",
        Severity.ERROR if guard_off else Severity.WARNING,
        "another program undoes each repair of snatd's",
        (f"{fight['with']}: {count(fight['repairs'], 'repair')} since {fight['since']}",),
        f"repairs go on, further apart; {_IN_BETWEEN[guard_off]}",
        (*((_GUARD_IT,) if guard_off else ()), "journalctl -x SNATD_EVENT=fighting", *keep),
    )


_EMPTY = ("-F", "-X")
_BY_MARK = ("KUBE-POSTROUTING", "CNI-HOSTPORT-MASQ", "NETAVARK-HOSTPORT-MASQ")


def both_backends(family: Family, hooks: Iterable[Hook], iptables_is: Backend) -> Iterator[Finding]:
    """`hooks`: on nat postrouting and forward, where whoever serves containers has rules."""
    there: dict[str, dict[str, str]] = {}
    for hook in hooks:
        command, table = iptables_of(hook.table)
        texts = [one.text for one in hook.chains.get(hook.chain, ())]
        foreign = [one for one in texts if writer(hook.table, hook.chain, one) != "snatd"]
        if command and foreign and hook.chain == hook.hook.upper():
            there.setdefault(command, {})[table] = (
                f"{command} -t {table}: {count(len(foreign), 'rule')} of others in {hook.chain}, "
                f"the first: {foreign[0]}"
            )
    if len(there) < 2:
        return
    other = Backend.LEGACY if iptables_is is Backend.NFT else Backend.NFT
    command = f"{family.command}-{other.value}"
    yield Finding(
        "legacy_and_nft",
        Severity.WARNING,
        f"{family.value} rules stand in legacy and in nft tables",
        tuple(
            line
            for _, lines in sorted(there.items(), key=lambda one: one[0] == command)
            for line in lines.values()
        ),
        "a packet passes through both, and whoever looks at one does not see the other",
        (
            f"{command}-save > ~/{command}-$(date +%F-%H%M%S).rules",
            f"# restart what wrote them, so that it writes to {iptables_is.value} tables, as the "
            f"node's {family.command} does; only then, since it takes others' rules away:",
            *(f"# {command} -t {table} {what}" for table in there[command] for what in _EMPTY),
        ),
    )
