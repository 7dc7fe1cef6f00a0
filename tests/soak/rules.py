"""What the rivals write: rules as iptables and nft print them, each chosen by a number.

Whose a rule is follows from how it was made here and from nothing of snatd's: `foreign` ones are
to stay byte for byte, `broad` ones are snatd's to narrow, and `is_ours` knows the comment.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from snatd.core.model import Family

CHAINS = ("KUBE-SVC-A", "CNI-0123456789abcdef01234567", "NETAVARK-1D8721804F16F", "RIVAL-A", "b+x")

# As -S prints it: what iptables would not leave bare is escaped already.
_COMMENTS = (
    "plain",
    '"two words"',
    '"name: \\"cbr0\\" id: \\"d3ad\\""',
    '"it\\\'s \\\\ \\"odd\\""',
    '"--comment snatd -j MASQUERADE"',
    '"$(reboot) `id` ; %s \x1b[31m"',
    '"\u00e9\u2028\u00fc"',
    f'"{"long " * 51}"',
    "snatd2",
    '"-A POSTROUTING -j ACCEPT"',
)


@dataclass(frozen=True)
class Side:
    """One family's addresses. No foreign rule keeps the probes' egress from being masqueraded."""

    family: Family
    cluster: str
    everything: str
    multicast: str
    node: str
    some: str
    other: str

    def host(self, number: int) -> str:
        return f"{self.some}{number % 250 + 1:x}/128" if ":" in self.some else self._v4(number)

    def _v4(self, number: int) -> str:
        return f"{self.some}{number % 250 + 1}/32"


V4 = Side(
    Family.V4, "172.7.0.0/16", "172.0.0.0/8", "224.0.0.0/4", "10.4.7.21", "192.0.2.", "10.9.8.0/24"
)
V6 = Side(
    *(Family.V6, "fd00:7::/32", "fd00::/16", "ff00::/8", "fd00:4:7::21"),
    *("2001:db8:5::", "fd00:9:8::/64"),
)
SIDES = {one.family: one for one in (V4, V6)}


def foreign(side: Side, number: int) -> str:
    """A rule that snatd never touches."""
    kind, number = number % 18, number // 18
    host, port = side.host(number), 1000 + number % 60000
    comment = _COMMENTS[number % len(_COMMENTS)]
    return (
        f"-s {host} -j RETURN",
        f"-d {host} -p tcp -m tcp --dport {port} -j RETURN",
        f"-s {host} -m comment --comment {comment} -j RETURN",
        f"-s {host} -p udp -m udp --sport {port} -m comment --comment {comment} -j MASQUERADE",
        f"-d {host} -m mark --mark {number % 4095 + 1:#x} -j ACCEPT",
        f"-s {side.other} ! -o docker0 -j MASQUERADE",
        "-o eth0 -j MASQUERADE",
        "-j MASQUERADE",
        f"-s {side.cluster} ! -d {side.multicast} -j MASQUERADE --random-fully",
        f"-s {side.cluster} -d {side.cluster} -j RETURN",
        f"-s {side.cluster} -o eth0 -j SNAT --to-source {side.node}",
        "-m mark --mark 0x4000/0x4000 -j MASQUERADE",
        "-o docker0 -m addrtype --src-type LOCAL -j MASQUERADE",
        f"-s {side.host(number)} -d {side.host(number)} -p tcp -m tcp --dport {port} -j MASQUERADE",
        f"! -s {side.cluster} -d {side.cluster} -j MASQUERADE",
        f"-s {side.other} -m comment --comment snatd2 -j MASQUERADE",
        f"-s {host} -j SNAT --to-source {side.node}",
        f"-m comment --comment {comment}",
    )[kind]


def jump(side: Side, number: int, chain: str) -> str:
    return f"-s {side.host(number)} -j {chain}"


def hand_made(side: Side, subnet: str) -> str:
    """Counts as the egress rule as long as it is there, and is nobody's to touch."""
    return f"-s {subnet} ! -d {side.everything} ! -o docker0 -j MASQUERADE"


def broads(side: Side, subnet: str) -> tuple[str, ...]:
    """What Docker and operators write for a subnet; snatd narrows it."""
    docker = f"-s {subnet} ! -o docker0 -j MASQUERADE"
    return (
        docker,
        docker,
        docker,
        f"-s {subnet} -j MASQUERADE",
        f"-s {subnet} -o eth0 -j MASQUERADE",
        f"-s {subnet} ! -d {subnet} -j MASQUERADE",
        f"-s {subnet} ! -o docker0 -j SNAT --to-source {side.node}",
        f"-s {subnet} ! -o docker0 -j MASQUERADE --random-fully",
        f'-s {subnet} ! -o docker0 -m comment --comment "by ops" -j MASQUERADE',
    )


def stale(side: Side, number: int) -> str:
    """With snatd's comment, and of another lease."""
    return (
        f"-s {side.other} ! -d {side.everything} -m comment --comment snatd -j MASQUERADE"
        if (number % 2)
        else f"-s {side.other} -m comment --comment snatd -j ACCEPT"
    )


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def is_ours(rule: str) -> bool:
    return re.search(r"--comment snatd(?: |\Z)", _STRING.sub('""', rule)) is not None


def native(nft_family: str, number: int) -> str:
    """A rule for a nat chain of nft's own, as nft prints it without counters."""
    kind, number = number % 9, number // 9
    four = (
        f"ip saddr 192.0.2.{number % 250 + 1} return",
        "ip saddr 172.7.21.2 ip daddr != 172.7.21.0/24 masquerade",
        f'ip saddr 172.7.21.0/24 oifname != "docker0" counter masquerade comment "M{number % 9}"',
        "ip saddr 172.7.0.0/16 ip daddr != 224.0.0.0/4 masquerade",
        f"ip daddr 198.51.100.{number % 250 + 1} accept",
        f"tcp dport {number % 60000 + 1} accept",
        'oifname "eth0" masquerade',
        "masquerade",
    )
    six = (
        f"ip6 saddr 2001:db8:5::{number % 250 + 1:x} return",
        "ip6 saddr fd00:7:21::2 ip6 daddr != fd00:7:21::/64 masquerade",
        f'ip6 saddr fd00:7:21::/64 oifname != "docker0" counter masquerade comment "M{number % 9}"',
        "ip6 saddr fd00:7::/32 ip6 daddr != ff00::/8 masquerade",
        f"ip6 daddr 2001:db8:6::{number % 250 + 1:x} accept",
        f"udp sport {number % 999 + 1} accept",
        'oifname "eth0" masquerade',
        "masquerade",
    )
    last = {
        "ip": "ip saddr 172.7.0.0/16 snat to 10.4.7.21",
        "ip6": "ip6 saddr fd00:7::/32 snat to fd00:4:7::21",
        "inet": "snat ip6 to fd00:4:7::21" if number % 2 else "snat ip to 10.4.7.21",
    }[nft_family]
    some = {"ip": four, "ip6": six, "inet": six if number % 2 else four}[nft_family]
    return (*some, last)[kind]
