"""Who wrote a rule, as far as its shape tells. Nobody signs; names of tables and chains do."""

from __future__ import annotations

import re

from snatd.core.model import join
from snatd.core.trace import Answer

_TABLES = {
    "snatd": "snatd",
    "docker-bridges": "Docker",
    "cni_plugins_masquerade": "CNI bridge",
    "cni_hostport": "CNI bridge",
    "netavark": "netavark",
    "firewalld": "firewalld",
    "io.systemd.nat": "systemd-networkd",
    "kube-proxy": "kube-proxy",
    "flannel-ipv4": "flannel",
    "flannel-ipv6": "flannel",
}
_CHAINS = (
    ("SNATD-", "snatd"),
    ("KUBE-", "kube-proxy"),
    ("CNI-", "CNI bridge"),
    ("NETAVARK-", "netavark"),
    ("FLANNEL-POSTRTG", "flannel"),
    ("IP-MASQ-AGENT", "ip-masq-agent"),
    ("DOCKER", "Docker"),
    ("LIBVIRT_", "libvirt"),
    ("POST_", "firewalld"),
    ("POSTROUTING_", "firewalld"),
)
_BRIDGE = r"(?:docker0|docker_gwbridge|br-[0-9a-f]{12})"
_RULES = (
    (re.compile(r"--comment snatd( |$)"), "snatd"),
    (re.compile(r'--comment "flanneld masq"'), "flannel"),
    (re.compile(r'--comment "name: \\"'), "CNI bridge"),
    (re.compile(rf"-s \S+ ! -o {_BRIDGE} -j (MASQUERADE|SNAT)( |$)"), "Docker"),
    (re.compile(rf"-d \S+ ! -i {_BRIDGE} (-p .*)?-j DROP$"), "Docker"),
    (re.compile(rf"-o {_BRIDGE} -m addrtype --src-type LOCAL -j MASQUERADE$"), "Docker"),
    (re.compile(r"-s (\S+) -d \1 -p \w+ -m \w+ --dport \d+ -j MASQUERADE$"), "Docker"),
    (re.compile(r"-s (\S+) ! -d \1 -j MASQUERADE$"), "Docker"),
)
UNKNOWN = "unknown"


def writer(table: str, chain: str, text: str) -> str:
    """`table` as in `ip nat`; `text` as printed by the rule's own tool."""
    return _by_name(table, chain, text) or _by_shape(text) or UNKNOWN


def said(table: str, chain: str, text: str) -> str:
    """The same for a person, who shall know what is a guess: anybody may write a rule as Docker
    does. Empty where nobody is known."""
    if name := _by_name(table, chain, text):
        return name
    who = _by_shape(text)
    return f"as {who} writes it" if who not in ("", "snatd") else who


def _by_name(table: str, chain: str, text: str) -> str:
    name = table.rpartition(" ")[2]
    if name in _TABLES:
        return _TABLES[name]
    of_jump = re.search(r"(?:-[jg]|\bjump|\bgoto) (\S+)", text)
    for candidate in (chain, of_jump.group(1) if of_jump else ""):
        for beginning, who in _CHAINS:
            if candidate.startswith(beginning):
                return who
    return ""


def _by_shape(text: str) -> str:
    return next((who for shape, who in _RULES if shape.search(text)), "")


def by(table: str, chain: str, text: str) -> str:
    """The same for a sentence, empty where nobody is known."""
    who = writer(table, chain, text)
    return "" if who == UNKNOWN else f" (as {who} writes it)"


def told(answer: Answer) -> str:
    """The rule that decides, with its place, its writer and what it depends on."""
    if answer.place is None:
        return "a rule that could not be read"
    place = answer.place
    who = by(place.table, place.chain, place.step.text)
    where = f", where {join([f'`{why}`' for why in answer.why])}" if answer.why else ""
    return f"{place}{who}: {place.step.text}{where}"
