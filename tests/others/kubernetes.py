"""What kube-proxy and flanneld write and look after, after their sources, at their own rhythm.

kube-proxy, in mode iptables (pkg/proxy/iptables) or nftables: all rules every 30 s, and those of a
service that changed at once, at most every second. flanneld (pkg/trafficmngr): all rules at its
start, and by iptables a look every 5 s whether each is there; if not, all are made anew.
"""

from __future__ import annotations

import time
from base64 import b32encode
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

from tests.lab.netns import Namespace

NETWORK, SUBNET = "172.7.0.0/16", "172.7.21.0/24"
PORT = 8080
# By name: address and endpoint. The last one's endpoint moves all the time.
WEB, SELF, MOVES = "default/web", "default/self", "default/moves"
ADDRESSES = {WEB: "10.96.0.10", SELF: "10.96.0.11", MOVES: "10.96.0.12"}
_ENDPOINTS = {WEB: "172.7.22.2", SELF: "172.7.21.2"}
_MOVES_TO = ("172.7.22.2", "172.7.22.3")


@dataclass
class KubeProxy:
    """In mode iptables."""

    host: Namespace

    def sync(self, turn: int, *, full: bool) -> None:
        if full:
            self._ensure_jumps()
        services = {MOVES: _MOVES_TO[turn % 2]} | (_ENDPOINTS if full else {})
        lines = ["*nat", *(f":{chain} - [0:0]" for chain in _TOP), *_chains(services)]
        lines += _MASQUERADE
        lines += [line for name in ADDRESSES for line in _to_service(name)]
        for name, endpoint in services.items():
            lines += _service(name, endpoint)
        gone = _MOVES_TO[(turn + 1) % 2]
        lines += [f"-X {_endpoint_chain(MOVES, proto, gone)}" for proto in _PROTOCOLS]
        lines += [_NODE_PORTS, "COMMIT", ""]
        self.host.run(
            "iptables-restore", "-w", "5", "--noflush", "--counters", stdin="\n".join(lines)
        )

    def _ensure_jumps(self) -> None:
        """Prepends each jump that is not there."""
        self.host.shell(
            "".join(
                f"iptables -w 5 -t nat -N {chain} 2>/dev/null || :\n"
                f"for way in C I; do iptables -w 5 -t nat -$way {frm} -m comment"
                f" --comment '{comment}' -j {chain} 2>/dev/null && break; done\n"
                for frm, comment, chain in (
                    ("OUTPUT", "kubernetes service portals", "KUBE-SERVICES"),
                    ("PREROUTING", "kubernetes service portals", "KUBE-SERVICES"),
                    ("POSTROUTING", "kubernetes postrouting rules", "KUBE-POSTROUTING"),
                )
            )
        )


_TOP = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
_PROTOCOLS = ("tcp", "udp")
_MASQUERADE = (
    "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
    "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
    '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT"'
    " -j MASQUERADE --random-fully",
    "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
)
_NODE_PORTS = (
    '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the'
    ' last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS'
)


def _chain(kind: str, *words: str) -> str:
    return f"KUBE-{kind}-{b32encode(sha256(''.join(words).encode()).digest()).decode()[:16]}"


def _endpoint_chain(name: str, proto: str, endpoint: str) -> str:
    return _chain("SEP", name, proto, endpoint)


def _chains(services: dict[str, str]) -> Iterator[str]:
    """A line for a chain makes it, or empties it: those that go need one too."""
    for proto in _PROTOCOLS:
        yield f":{_chain('EXT', WEB, proto)} - [0:0]"
        for name, endpoint in services.items():
            yield f":{_chain('SVC', name, proto)} - [0:0]"
            for one in _MOVES_TO if name == MOVES else (endpoint,):
                yield f":{_endpoint_chain(name, proto, one)} - [0:0]"


def _to_service(name: str) -> Iterator[str]:
    for proto in _PROTOCOLS:
        to = f"-m {proto} -p {proto} -d {ADDRESSES[name]} --dport {PORT}"
        comment = f'-m comment --comment "{name} cluster IP"'
        yield f"-A KUBE-SERVICES {comment} {to} -j {_chain('SVC', name, proto)}"
        if name == WEB:
            external = _chain("EXT", name, proto)
            yield (
                f"-A KUBE-NODEPORTS -m comment --comment {name} -m {proto} -p {proto}"
                f" --dport {PORT} -j {external}"
            )
            yield (
                f'-A {external} -m comment --comment "masquerade traffic for {name} external'
                ' destinations" -j KUBE-MARK-MASQ'
            )
            yield f"-A {external} -j {_chain('SVC', name, proto)}"


def _service(name: str, endpoint: str) -> Iterator[str]:
    for proto in _PROTOCOLS:
        service, chain = _chain("SVC", name, proto), _endpoint_chain(name, proto, endpoint)
        yield (
            f'-A {service} -m comment --comment "{name} cluster IP" -m {proto} -p {proto}'
            f" -d {ADDRESSES[name]} --dport {PORT} ! -s {NETWORK} -j KUBE-MARK-MASQ"
        )
        yield f'-A {service} -m comment --comment "{name} -> {endpoint}:{PORT}" -j {chain}'
        yield f"-A {chain} -m comment --comment {name} -s {endpoint} -j KUBE-MARK-MASQ"
        yield (
            f"-A {chain} -m comment --comment {name} -m {proto} -p {proto} -j DNAT"
            f" --to-destination {endpoint}:{PORT}"
        )


@dataclass
class KubeProxyNft:
    """In mode nftables: what is for nat, in one transaction."""

    host: Namespace

    def sync(self, turn: int, *, full: bool) -> None:
        services = {MOVES: _MOVES_TO[turn % 2]} | (_ENDPOINTS if full else {})
        script = _NFT_TOP if full else ""
        for name, endpoint in services.items():
            word = name.replace("default/", "")
            script += _NFT_SERVICE.format(
                word=word, name=name, vip=ADDRESSES[name], endpoint=endpoint, port=PORT
            )
        if full:
            script += _NFT_EXTERNAL
        self.host.run("nft", "-f", "-", stdin=script)


_NFT_TOP = """
add table ip kube-proxy { comment "rules for kube-proxy"; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat; }
add chain ip kube-proxy nat-output { type nat hook output priority -100; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority srcnat; }
flush chain ip kube-proxy nat-prerouting
flush chain ip kube-proxy nat-output
flush chain ip kube-proxy nat-postrouting
add chain ip kube-proxy services
add chain ip kube-proxy masquerading
add chain ip kube-proxy mark-for-masquerade
flush chain ip kube-proxy services
flush chain ip kube-proxy masquerading
flush chain ip kube-proxy mark-for-masquerade
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict; }
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services fib daddr type local ip daddr != 127.0.0.0/8 \
meta l4proto . th dport vmap @service-nodeports
"""
_NFT_SERVICE = "".join(
    """
add chain ip kube-proxy service-{word}-PROTO
add chain ip kube-proxy endpoint-{word}-PROTO
flush chain ip kube-proxy service-{word}-PROTO
flush chain ip kube-proxy endpoint-{word}-PROTO
add element ip kube-proxy service-ips \
{{ {vip} . PROTO . {port} : goto service-{word}-PROTO }}
add rule ip kube-proxy service-{word}-PROTO ip daddr {vip} PROTO dport {port} \
ip saddr != NETWORK jump mark-for-masquerade
add rule ip kube-proxy service-{word}-PROTO numgen random mod 1 vmap \
{{ 0 : goto endpoint-{word}-PROTO }}
add rule ip kube-proxy endpoint-{word}-PROTO ip saddr {endpoint} jump mark-for-masquerade
add rule ip kube-proxy endpoint-{word}-PROTO meta l4proto PROTO dnat to {endpoint}:{port}
""".replace("PROTO", proto).replace("NETWORK", NETWORK)
    for proto in _PROTOCOLS
)
_NFT_EXTERNAL = "".join(
    f"""
add chain ip kube-proxy external-web-{proto}
flush chain ip kube-proxy external-web-{proto}
add element ip kube-proxy service-nodeports {{ {proto} . {PORT} : goto external-web-{proto} }}
add rule ip kube-proxy external-web-{proto} jump mark-for-masquerade
add rule ip kube-proxy external-web-{proto} goto service-web-{proto}
"""
    for proto in _PROTOCOLS
)


class Flannel:
    """By iptables."""

    def __init__(self, host: Namespace) -> None:
        self.host = host
        self.host.run("iptables", "-w", "5", "-t", "nat", "-N", "FLANNEL-POSTRTG")
        self.made = 0
        self.ensure()

    def ensure(self) -> None:
        """Makes all anew where one is missing, those that are there first deleted."""
        there = [self._is_there(rule) for rule in _FLANNEL]
        if all(there):
            return
        self.made += 1
        lines = ["*nat"]
        for rule, is_there in zip(_FLANNEL, there, strict=True):
            lines += [f"-D {rule}"] * is_there + [f"-A {rule}"]
        restore = ("iptables-restore", "--noflush", "--wait")
        self.host.run(*restore, stdin="\n".join([*lines, "COMMIT", ""]))

    def _is_there(self, rule: str) -> bool:
        check = f"iptables -w 5 -t nat -C {rule} 2>/dev/null && echo yes || test $? = 1"
        return self.host.shell(check) == "yes\n"


_FLANNEL = (
    'POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG',
    *(
        f'FLANNEL-POSTRTG {match} -m comment --comment "flanneld masq" -j {target}'
        for match, target in (
            ("-m mark --mark 0x4000/0x4000", "RETURN"),
            (f"-s {SUBNET} -d {NETWORK}", "RETURN"),
            (f"-s {NETWORK} -d {SUBNET}", "RETURN"),
            (f"! -s {NETWORK} -d {SUBNET}", "RETURN"),
            (f"-s {NETWORK} ! -d 224.0.0.0/4", "MASQUERADE --random-fully"),
            (f"! -s {NETWORK} -d {NETWORK}", "MASQUERADE --random-fully"),
        )
    ),
)


class FlannelNft:
    """By nft: at its start only, which here comes every time."""

    def __init__(self, host: Namespace) -> None:
        self.host = host
        self.made = 1
        self.ensure()

    def ensure(self) -> None:
        self.host.run("nft", "-f", "-", stdin=_FLANNEL_NFT)


_FLANNEL_NFT = f"""
add table ip flannel-ipv4 {{ comment "rules for flannel-ipv4"; }}
add chain ip flannel-ipv4 postrtg {{ type nat hook postrouting priority srcnat; }}
flush chain ip flannel-ipv4 postrtg
add rule ip flannel-ipv4 postrtg meta mark 0x4000 return
add rule ip flannel-ipv4 postrtg ip saddr {SUBNET} ip daddr {NETWORK} return
add rule ip flannel-ipv4 postrtg ip saddr {NETWORK} ip daddr {SUBNET} return
add rule ip flannel-ipv4 postrtg ip saddr != {SUBNET} ip daddr {NETWORK} return
add rule ip flannel-ipv4 postrtg ip saddr {NETWORK} ip daddr != 224.0.0.0/4 masquerade fully-random
add rule ip flannel-ipv4 postrtg ip saddr != {NETWORK} ip daddr {NETWORK} masquerade fully-random
"""


def every(period_s: float, until_s: float) -> Iterator[int]:
    """Counts up, once a period, until a time of the monotonic clock."""
    turn, next_s = 0, time.monotonic()
    while next_s < until_s:
        time.sleep(max(0.0, next_s - time.monotonic()))
        yield turn
        turn, next_s = turn + 1, next_s + period_s
