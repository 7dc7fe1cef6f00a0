"""Random rulesets of the shapes that real nodes have, and worse, for the trace to be right about.

A ruleset remembers whether anything in it is undecidable: only then may the answer be "may".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from tests.lab.network import LAN_HOST, OUTSIDE, OUTSIDE_V6

MARK_PORTS = {5000: 0, 5001: 0x4000, 5002: 0x2000, 5003: 0x6001}


@dataclass(frozen=True)
class World:
    """One family's addresses in the lab."""

    ip: str
    command: str
    subnet: str
    cluster: str
    container: str
    container_2: str
    node_in: str
    node_out: str
    second: str
    neighbour: str
    lan_host: str
    outside: str
    netmap: tuple[str, ...]
    multicast: str
    some: tuple[str, ...]


V4 = World(
    *("ip", "iptables", "172.7.21.0/24", "172.7.0.0/16", "172.7.21.2", "172.7.21.5"),
    *("172.7.21.1", "10.4.7.21", "10.4.7.99", "172.7.22.2", LAN_HOST, OUTSIDE),
    ("10.88.0.0/24", "10.88.0.0/28", "10.88.7.7/32"),
    "224.0.0.0/4",
    ("10.4.7.0/24", "172.7.22.0/24", "172.7.21.4/30", "203.0.113.0/24", "0.0.0.0/1", "10.0.0.0/8"),
)
V6 = World(
    *("ip6", "ip6tables", "fd00:7:21::/64", "fd00:7::/32", "fd00:7:21::2", "fd00:7:21::5"),
    *("fd00:7:21::1", "fd00:4:7::21", "fd00:4:7::99", "fd00:7:22::2", "fd00:4:7::100", OUTSIDE_V6),
    ("fd00:88::/64", "fd00:88::/96"),
    "ff00::/8",
    ("fd00:4:7::/64", "fd00:7:22::/64", "fd00:7:21::4/126", "2001:db8::/32", "8000::/1"),
)


@dataclass
class Ruleset:
    """`nft`: a script; `xtables`: restore input by backend."""

    nft: list[str] = field(default_factory=list)
    xtables: dict[str, list[str]] = field(default_factory=dict)
    undecidable: bool = False
    priorities: list[int] = field(default_factory=list)

    @property
    def may(self) -> bool:
        return self.undecidable or len(self.priorities) != len(set(self.priorities))

    def __str__(self) -> str:
        blocks = [f"{name}:\n" + "\n".join(lines) for name, lines in self.xtables.items()]
        return "\n".join([*blocks, *self.nft])


def generate(random: Random, world: World) -> Ruleset:
    if random.random() < 0.5:
        return _small(random, world)
    ruleset = Ruleset()
    backends = random.choice([(), ("nft",), ("nft",), ("legacy",), ("legacy",), ("nft", "legacy")])
    for backend in backends:
        ruleset.xtables[backend] = _xtables(random, world, ruleset)
        ruleset.priorities.append(100)
    if "nft" in backends and random.random() < 0.1:
        device = random.choice(("eth0", "docker0"))
        ruleset.nft.append(f'add rule {world.ip} nat POSTROUTING oifname "{device}" masquerade')
        # nft's JSON does not show what is inside the matches and targets of iptables-nft.
        ruleset.undecidable = True
    tables = random.choice([0, 0, 1, 1, 2, 3])
    for number in range(tables):
        ruleset.nft += _native(random, world, ruleset, number)
    if random.random() < 0.25:
        ruleset.nft += _guard(world)
        ruleset.priorities.append(-199)
    return ruleset


def _small(random: Random, world: World) -> Ruleset:
    """A few rules of one table, none in the shadow of others, and egress for the rest."""
    ruleset = Ruleset()
    if random.random() < 0.5:
        rules = [_rule(random, world, ruleset, []) for _ in range(random.randrange(1, 4))]
        lines = [f"-A POSTROUTING {rule}" for rule in (*rules, "-j MASQUERADE")]
        backend = random.choice(("nft", "legacy"))
        ruleset.xtables[backend] = ["*nat", *lines, "COMMIT", ""]
        ruleset.priorities.append(100)
    else:
        ruleset.nft += _native(random, world, ruleset, random.randrange(5), 3)
        ruleset.nft.append(f"add rule {ruleset.nft[0].removeprefix('add table ')} post masquerade")
    return ruleset


def _guard(world: World) -> list[str]:
    ip = world.ip
    return [
        f"add table {ip} snatd",
        f"add chain {ip} snatd postrouting {{ type nat hook postrouting priority -199; }}",
        f"add rule {ip} snatd postrouting {ip} saddr {world.subnet} {ip} daddr {world.cluster} "
        f"{ip} daddr != {world.subnet} meta mark & 0x6000 == 0 counter snat to {ip} saddr",
    ]


def _networks(random: Random, world: World) -> str:
    return random.choice(
        (
            *(world.subnet, world.cluster, world.container, world.container_2, world.neighbour),
            *(world.multicast, world.outside, world.lan_host, *world.some),
        )
    )


def _not(random: Random) -> str:
    return random.choice(("", "", "! "))


def _match(random: Random, world: World, ruleset: Ruleset) -> str:
    kind = random.randrange(14)
    match kind:
        case 0 | 1 | 2:
            return f"{_not(random)}-s {_networks(random, world)}"
        case 3 | 4 | 5:
            return f"{_not(random)}-d {_networks(random, world)}"
        case 6 | 7:
            return (
                f"{_not(random)}-o {random.choice(('docker0', 'eth0', 'eth+', 'd+', 'lo', 'x0'))}"
            )
        case 8:
            mark = random.choice(("0x4000/0x4000", "0x2000/0x2000", "0x0", "0x6001", "0x0/0x6000"))
            return f"-m mark {_not(random)}--mark {mark}"
        case 9:
            protocol = random.choice(("udp", "tcp", "sctp"))
            ports = random.choice(("5000", "5001:5002", "80", "5002:65535"))
            port = f" -m {protocol} {_not(random)}--dport {ports}" if random.random() < 0.7 else ""
            if not port and random.random() < 0.5:
                return f"! -p {protocol}"
            return f"-p {protocol}{port}"
        case 10:
            ports = random.choice(("5000,5003", "80,5001:5002", "1,2,3"))
            return f"-p udp -m multiport {_not(random)}--dports {ports}"
        case 11:
            side = random.choice(("src", "dst"))
            kinds = ("LOCAL", "LOCAL", "MULTICAST", *(("UNICAST",) if world is V4 else ()))
            return f"-m addrtype {_not(random)}--{side}-type {random.choice(kinds)}"
        case 12:
            return f"-m conntrack {_not(random)}--ctstate {random.choice(('NEW', 'ESTABLISHED'))}"
        case _:
            if random.random() < 0.6:
                return ""
            ruleset.undecidable = True
            return random.choice(
                ("-m statistic --mode random --probability 0.5", "-m length --length 0:40")
            )


def _matches(random: Random, world: World, ruleset: Ruleset, most: int = 3) -> str:
    some: dict[str, str] = {}
    for _ in range(random.randrange(most + 1)):
        match = _match(random, world, ruleset)
        # One of a kind; iptables wants no option twice.
        first, _, rest = match.replace("! ", "").partition(" ")
        some.setdefault(rest.split(" ")[0] if first == "-m" else first, match)
    order = sorted(some.values(), key=lambda one: "-m" in one.split(" "))
    return " ".join(one for one in order if one)


def _target(random: Random, world: World, ruleset: Ruleset, chains: list[str]) -> str:
    kind = random.randrange(16)
    match kind:
        case 0 | 1 | 2 | 3:
            return f"-j MASQUERADE{random.choice(('', ' --random-fully'))}"
        case 4 | 5:
            return f"-j SNAT --to-source {world.second}"
        case 6:
            return f"-j SNAT --to-source {world.container}"
        case 7:
            return f"-j NETMAP --to {random.choice(world.netmap)}"
        case 8:
            return "-j ACCEPT"
        case 9:
            return "-j RETURN"
        case 10 | 11:
            value = random.choice(("0x4000/0x0", "0x4000/0x4000", "0x1/0xffffffff", "0x0/0x4000"))
            return f"-j MARK --set-xmark {value}"
        case 12:
            if random.random() < 0.7:
                return random.choice(("", "-j CONNMARK --save-mark"))
            if random.random() < 0.3:
                ruleset.undecidable = True
                return "-j CONNMARK --restore-mark"
            ruleset.undecidable = True
            return f"-j SNAT --to-source {world.second.replace('99', '97')}-{world.second}"
        case _:
            if not chains:
                return "-j RETURN"
            return f"{random.choice(('-j', '-j', '-g'))} {random.choice(chains)}"


def _rule(random: Random, world: World, ruleset: Ruleset, chains: list[str]) -> str:
    matches = _matches(random, world, ruleset)
    return f"{matches} {_target(random, world, ruleset, chains)}".strip()


def _shapes(random: Random, world: World) -> tuple[list[str], dict[str, list[str]]]:
    """What one writer of facts puts into POSTROUTING, and its chains."""
    w, comment = world, "-m comment --comment"
    masq, net = f"! -d {w.multicast}", w.cluster
    cni = "CNI-0123456789abcdef01234567"
    pod = random.choice((w.container, w.container_2))
    flannel = f'{comment} "flanneld masq"'
    return random.choice(
        (
            ([f"-s {w.subnet} ! -o docker0 -j MASQUERADE"], {}),
            ([f"-s {w.subnet} ! -d {w.subnet} -j MASQUERADE"], {}),
            ([f"-s {w.subnet} ! -o docker0 -j SNAT --to-source {w.second}"], {}),
            ([f"-s {w.subnet} ! -d {net} ! -o docker0 {comment} snatd -j MASQUERADE"], {}),
            (
                [f'-s {pod} {comment} "name: \\"cbr0\\" id: \\"d3ad\\"" -j {cni}'],
                {cni: [f"-d {w.subnet} -j ACCEPT", f"{masq} -j MASQUERADE"]},
            ),
            (
                [f"-s {w.subnet} -j NETAVARK-1D8721804F16F"],
                {
                    "NETAVARK-1D8721804F16F": [
                        f"-d {w.subnet} -j ACCEPT",
                        f"{masq} -j MASQUERADE",
                    ]
                },
            ),
            ([f"-s {net} {masq} {flannel} -j MASQUERADE", f"-s {net} -d {net} -j RETURN"], {}),
            ([f"-s {net} -d {net} -j RETURN", f"-s {net} {masq} -j MASQUERADE --random-fully"], {}),
            (
                [f"{flannel} -j FLANNEL-POSTRTG"],
                {
                    "FLANNEL-POSTRTG": [
                        f"-m mark --mark 0x4000/0x4000 {flannel} -j RETURN",
                        f"-s {w.subnet} -d {net} {flannel} -j RETURN",
                        f"-s {net} -d {w.subnet} {flannel} -j RETURN",
                        f"! -s {net} -d {w.subnet} {flannel} -j RETURN",
                        f"-s {net} {masq} {flannel} -j MASQUERADE --random-fully",
                        f"! -s {net} -d {net} {flannel} -j MASQUERADE --random-fully",
                    ]
                },
            ),
            (
                [f'{comment} "kubernetes postrouting rules" -j KUBE-POSTROUTING'],
                {
                    "KUBE-POSTROUTING": [
                        "-m mark ! --mark 0x4000/0x4000 -j RETURN",
                        "-j MARK --set-xmark 0x4000/0x0",
                        "-j MASQUERADE --random-fully",
                    ]
                },
            ),
            (
                ["-m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT"],
                {"IP-MASQ-AGENT": [f"-d {w.some[-1]} -j RETURN", "-j MASQUERADE"]},
            ),
            (
                [f"{comment} portfwd -j CNI-HOSTPORT-MASQ"],
                {"CNI-HOSTPORT-MASQ": ["-m mark --mark 0x2000/0x2000 -j MASQUERADE"]},
            ),
            (["-o eth0 -j MASQUERADE"], {}),
            ([f"-s {w.subnet} -d {net} -j ACCEPT"], {}),
            (["-m mark ! --mark 0x4000/0x4000 -j ACCEPT"], {}),
            (
                ["-g POST_public"],
                {
                    "POST_public": ["-j POST_public_deny", "-j POST_public_allow"],
                    "POST_public_deny": [],
                    "POST_public_allow": ["! -o lo -j MASQUERADE"],
                },
            ),
            (["-o docker0 -m addrtype --src-type LOCAL -j MASQUERADE"], {}),
        )
    )


def _xtables(random: Random, world: World, ruleset: Ruleset) -> list[str]:
    chains: dict[str, list[str]] = {}
    post: list[str] = []
    for _ in range(random.randrange(4)):
        rules, own = _shapes(random, world)
        post += [rule for rule in rules if rule not in post]
        chains |= own
    names = [f"C{number}" for number in range(random.randrange(4))]
    for number, name in enumerate(names):
        deeper = names[number + 1 :]
        chains[name] = [
            _rule(random, world, ruleset, deeper) for _ in range(random.randrange(1, 5))
        ]
    for _ in range(random.randrange(5)):
        post.insert(random.randrange(len(post) + 1), _rule(random, world, ruleset, names))
    lines = ["*nat", ":POSTROUTING ACCEPT [0:0]", *(f":{name} - [0:0]" for name in chains)]
    lines += [f"-A {name} {rule}" for name, rules in chains.items() for rule in rules]
    lines += [f"-A POSTROUTING {rule}" for rule in post]
    # An empty legacy table is one that is not in use.
    return [
        *lines,
        "-A POSTROUTING -s 1.2.3.4 -j RETURN"
        if world is V4
        else "-A POSTROUTING -s 1::2 -j RETURN",
        "COMMIT",
        "",
    ]


_PRIORITIES = (-198, -150, 0, 50, 99, 100, 101, 110, 200)


def _native(
    random: Random, world: World, ruleset: Ruleset, number: int, most: int = 5
) -> list[str]:
    family = random.choice((world.ip, "inet"))
    names = ("docker-bridges", "cni_plugins_masquerade", "netavark", "firewalld", "io.systemd.nat")
    table = f"{family} {names[number]}"
    priority = random.choice(_PRIORITIES)
    ruleset.priorities.append(priority)
    policy = " policy drop;" if random.random() < 0.02 else ""
    chains = [f"n{one}" for one in range(random.randrange(3))]
    ip = world.ip
    elements = {_networks(random, world).removesuffix("/128") for _ in range(2)}
    kind = "ipv4_addr" if world is V4 else "ipv6_addr"
    hook = f"{{ type nat hook postrouting priority {priority};{policy} }}"
    lines = [
        f"add table {table}",
        f"add chain {table} post {hook}",
        *(f"add chain {table} {name}" for name in chains),
        f"add set {table} nets {{ type {kind}; flags interval; auto-merge; }}",
        f"add element {table} nets {{ {', '.join(sorted(elements))} }}",
        f'add set {table} ifs {{ type ifname; elements = {{ "eth0", "lo" }}; }}',
    ]
    if chains:
        verdict = random.choice(("jump", "goto"))
        device = random.choice(("eth0", "docker0"))
        lines.append(
            f"add map {table} jumps {{ type ifname : verdict; "
            f'elements = {{ "{device}" : {verdict} {chains[0]} }}; }}'
        )
    for at, name in enumerate(chains):
        for _ in range(random.randrange(1, 4)):
            rule = _native_rule(random, world, ruleset, chains[at + 1 :], False)
            lines.append(f"add rule {table} {name} {rule}")
    for _ in range(random.randrange(1, most)):
        rule = (
            random.choice(_native_shapes(world))
            if random.random() < 0.4
            else _native_rule(random, world, ruleset, chains, bool(chains))
        )
        lines.append(f"add rule {table} post {rule.replace('IP ', f'{ip} ')}")
    return lines


def _native_shapes(world: World) -> tuple[str, ...]:
    return (
        f'oifname != "docker0" IP saddr {world.subnet} counter masquerade comment "MASQUERADE"',
        f'IP saddr {world.container} IP daddr != {world.subnet} masquerade comment "pod"',
        "meta mark & 0x4000 == 0 return",
        "meta mark set meta mark xor 0x4000",
        "masquerade fully-random",
        'oifname != "lo" masquerade',
        "IP saddr @nets masquerade",
        'meta nfproto ipv4 oifname != "lo" masquerade',
        "ct state established,related accept",
        "ip saddr 0.0.0.0/0 accept",
        "ip6 daddr ::/0 return",
        "meta mark set meta mark or 0x2000 meta mark 0x2000 accept",
        f"IP saddr {world.subnet} accept",
        f"IP daddr {world.cluster} return",
    )


def _native_rule(
    random: Random, world: World, ruleset: Ruleset, chains: list[str], mapped: bool
) -> str:
    ip = world.ip
    words: list[str] = []
    for _ in range(random.randrange(3)):
        operator = random.choice(("", "", "!= "))
        kind = random.randrange(12)
        one = _networks(random, world)
        match kind:
            case 0 | 1:
                words.append(f"{ip} saddr {operator}{one}")
            case 2 | 3:
                words.append(f"{ip} daddr {operator}{one}")
            case 4:
                side = random.choice(("saddr", "daddr"))
                words.append(f"{ip} {side} {operator}@nets")
            case 5:
                device = random.choice(('"eth*"', '"docker0"', '{ "eth0", "x*" }', "@ifs"))
                words.append(f"oifname {operator}{device}")
            case 6:
                words.append(f"iifname {operator}{random.choice(('docker0', 'eth0', 'lo'))}")
            case 7:
                mark = random.choice(("& 0x4000 == 0x4000", "& 0x6000 != 0", "0x6001", "{ 0, 1 }"))
                words.append(f"meta mark {mark}")
            case 8:
                ports = random.choice(("5000", "{ 5001, 5003 }", "5001-5002", "{ 80-90, 5002 }"))
                words.append(
                    f"{random.choice(('udp', 'tcp', 'th'))} dport {operator}{ports}"
                    if random.random() < 0.7
                    else "meta l4proto { tcp, udp }"
                )
                if words[-1].startswith("th"):
                    words.insert(len(words) - 1, "meta l4proto udp")
            case 9:
                side = random.choice(("saddr", "daddr"))
                words.append(f"fib {side} type {operator}local")
            case 10:
                words.append(random.choice(("meta nfproto ipv4", "meta nfproto ipv6")))
            case _:
                if random.random() < 0.3:
                    ruleset.undecidable = True
                    words.append(
                        random.choice(
                            (
                                "ct status dnat",
                                "limit rate 1/second burst 1 packets",
                                "meta length < 40",
                            )
                        )
                    )
    return " ".join([*words, _native_verdict(random, world, ruleset, chains, mapped)])


def _native_verdict(
    random: Random, world: World, ruleset: Ruleset, chains: list[str], mapped: bool
) -> str:
    ip = world.ip
    kind = random.randrange(16)
    match kind:
        case 0 | 1 | 2:
            return random.choice(("masquerade", "masquerade random"))
        case 3 | 4:
            return f"snat {ip} to {world.second}"
        case 5:
            return f"snat to {ip} saddr"
        case 6:
            return "accept"
        case 7:
            return "return"
        case 8:
            return random.choice(
                (
                    "meta mark set 0x4000",
                    "meta mark set meta mark or 0x2000",
                    "meta mark set meta mark and 0x1",
                )
            )
        case 9:
            return "meta mark set 0x4000 meta mark 0x4000 masquerade"
        case 10:
            return "drop" if random.random() < 0.2 else "counter"
        case 11 if random.random() < 0.3:
            ruleset.undecidable = True
            return f"snat {ip} prefix to {ip} saddr map {{ {world.subnet} : {world.netmap[0]} }}"
        case 12 if random.random() < 0.3:
            ruleset.undecidable = True
            span = f"{world.second.replace('99', '97')}-{world.second}"
            return random.choice(("meta mark set ct mark", f"snat {ip} to {span}"))
        case 13:
            return f"snat {ip} prefix to {world.netmap[0]}"
        case _ if mapped and random.random() < 0.5:
            return random.choice(("oifname vmap @jumps", "iifname vmap @jumps"))
        case _ if chains:
            return f"{random.choice(('jump', 'goto'))} {random.choice(chains)}"
        case _:
            return 'oifname vmap { "docker0" : return, "eth0" : accept }'
