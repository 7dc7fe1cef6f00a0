"""Every writer that hides containers, by its own rules, before and after snatd starts.

What a row writes is what the program's sources write, as far as POSTROUTING goes. Both promises are
checked by packets at once after the write, not after the repair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP

import pytest

from snatd.core.model import Family
from tests.kernel.test_packets import promises_hold
from tests.lab.netns import until
from tests.lab.network import OUTSIDE, OUTSIDE_V6, Lab
from tests.lab.process import Snatd
from tests.lab.who import seen_by


@dataclass(frozen=True)
class Row:
    """A writer's rules as shell. `{nat}` is `iptables -t nat` of the backend and family; `{ip}`
    what nft calls the family; P, N and C the subnet, the network and the container; A the node.

    `native`: written by nft, so the same for every backend.
    """

    name: str
    script: str
    native: bool = False
    v6: bool = True


ROWS = (
    Row("docker", "{nat} -I POSTROUTING -s {P} ! -o docker0 -j MASQUERADE"),
    Row("docker 1.1", "{nat} -I POSTROUTING -s {P} ! -d {P} -j MASQUERADE", v6=False),
    Row("docker with a host address", "{nat} -I POSTROUTING -s {P} ! -o docker0 -j SNAT --to {A}"),
    Row(
        "docker 29 nftables",
        """
        nft add table {ip} docker-bridges
        nft add chain {ip} docker-bridges nat-postrouting \
            '{{ type nat hook postrouting priority srcnat; policy accept; }}'
        nft add chain {ip} docker-bridges nat-postrouting-out__docker0
        nft add rule {ip} docker-bridges nat-postrouting oifname != docker0 \
            jump nat-postrouting-out__docker0
        nft add rule {ip} docker-bridges nat-postrouting-out__docker0 oifname != docker0 \
            {ip} saddr {P} counter masquerade comment '"MASQUERADE"'
        """,
        native=True,
    ),
    Row(
        "cni bridge",
        """
        {nat} -N CNI-0123456789abcdef01234567
        {nat} -A POSTROUTING -s {C} -m comment --comment 'name: "cbr0" id: "x"' \
            -j CNI-0123456789abcdef01234567
        {nat} -A CNI-0123456789abcdef01234567 -d {P} -j ACCEPT
        {nat} -A CNI-0123456789abcdef01234567 ! -d {M} -j MASQUERADE
        """,
    ),
    Row(
        "cni nft",
        """
        nft add table inet cni_plugins_masquerade
        nft add chain inet cni_plugins_masquerade masq_checks
        nft add chain inet cni_plugins_masquerade postrouting \
            '{{ type nat hook postrouting priority srcnat; policy accept; }}'
        nft add rule inet cni_plugins_masquerade postrouting {ip} saddr {C} {ip} daddr != {P} \
            masquerade comment '"cbr0-x"'
        """,
        native=True,
    ),
    Row(
        "netavark",
        """
        {nat} -N NETAVARK-1D8721804F16F
        {nat} -A POSTROUTING -s {P} -j NETAVARK-1D8721804F16F
        {nat} -A NETAVARK-1D8721804F16F -d {P} -j ACCEPT
        {nat} -A NETAVARK-1D8721804F16F ! -d {M} -j MASQUERADE
        """,
    ),
    Row(
        "netavark nft",
        """
        nft add table inet netavark
        nft add chain inet netavark POSTROUTING \
            '{{ type nat hook postrouting priority srcnat; policy accept; }}'
        nft add chain inet netavark nv_1
        nft add rule inet netavark POSTROUTING {ip} saddr {P} jump nv_1
        nft add rule inet netavark nv_1 {ip} daddr {P} accept
        nft add rule inet netavark nv_1 {ip} daddr != {M} masquerade
        """,
        native=True,
    ),
    Row(
        "flannel in the wrong order",
        """
        {nat} -A POSTROUTING -s {N} ! -d {M} -m comment --comment "flanneld masq" -j MASQUERADE
        {nat} -A POSTROUTING -s {N} -d {N} -m comment --comment "flanneld masq" -j RETURN
        """,
    ),
    Row(
        "flannel twice",
        """
        {nat} -A POSTROUTING -s {N} ! -d {M} -j MASQUERADE
        {nat} -A POSTROUTING -s {N} -d {N} -j RETURN
        {nat} -A POSTROUTING -s {N} ! -d {M} -j MASQUERADE --random-fully
        """,
    ),
    Row(
        "flannel with a stale lease",
        """
        {nat} -N FLANNEL-POSTRTG
        {nat} -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
        {nat} -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN
        {nat} -A FLANNEL-POSTRTG -s {OLD} -d {N} -j RETURN
        {nat} -A FLANNEL-POSTRTG -s {N} -d {OLD} -j RETURN
        {nat} -A FLANNEL-POSTRTG -s {N} ! -d {M} -j MASQUERADE --random-fully
        """,
    ),
    Row(
        "ip-masq-agent",
        """
        {nat} -N IP-MASQ-AGENT
        {nat} -A POSTROUTING -m addrtype ! --dst-type LOCAL -j IP-MASQ-AGENT
        {nat} -A IP-MASQ-AGENT -d {PRIVATE} -j RETURN
        {nat} -A IP-MASQ-AGENT -j MASQUERADE
        """,
    ),
    Row("operator by interface", "{nat} -A POSTROUTING -o eth0 -j MASQUERADE"),
    Row("operator by subnet", "{nat} -A POSTROUTING -s {P} -j MASQUERADE"),
    Row("operator by nothing", "{nat} -I POSTROUTING -j MASQUERADE"),
    Row("operator by network", "{nat} -A POSTROUTING -s {N} -o eth0 -j SNAT --to-source {A}"),
    Row(
        "a native rule in iptables-nft's table",
        """
        nft add table {ip} nat
        nft add chain {ip} nat POSTROUTING \
            '{{ type nat hook postrouting priority srcnat; policy accept; }}'
        nft add rule {ip} nat POSTROUTING oifname eth0 masquerade
        """,
        native=True,
    ),
    Row(
        "systemd-networkd",
        """
        nft add table {ip} io.systemd.nat
        nft add set {ip} io.systemd.nat masq_saddr '{{ type {type}; flags interval; }}'
        nft add element {ip} io.systemd.nat masq_saddr '{{ {P} }}'
        nft add chain {ip} io.systemd.nat postrouting \
            '{{ type nat hook postrouting priority srcnat + 1; policy accept; }}'
        nft add rule {ip} io.systemd.nat postrouting {ip} saddr @masq_saddr masquerade
        """,
        native=True,
    ),
    Row(
        "firewalld by iptables",
        """
        {nat} -N POST_public_allow
        {nat} -A POSTROUTING -o eth0 -g POST_public_allow
        {nat} -A POST_public_allow ! -o lo -j MASQUERADE
        """,
    ),
    Row(
        "firewalld",
        """
        nft add table inet firewalld
        nft add chain inet firewalld nat_POSTROUTING \
            '{{ type nat hook postrouting priority srcnat + 10; policy accept; }}'
        nft add chain inet firewalld nat_POST_public_allow
        nft add rule inet firewalld nat_POSTROUTING oifname eth0 goto nat_POST_public_allow
        nft add rule inet firewalld nat_POST_public_allow \
            meta nfproto {nfproto} oifname != lo masquerade
        """,
        native=True,
    ),
)

WORDS = {
    Family.V4: {
        "ip": "ip",
        "type": "ipv4_addr",
        "nfproto": "ipv4",
        "P": "172.7.21.0/24",
        "OLD": "172.7.99.0/24",
        "N": "172.7.0.0/16",
        "C": "172.7.21.2",
        "M": "224.0.0.0/4",
        "A": "10.4.7.21",
        "PRIVATE": "10.0.0.0/8",
    },
    Family.V6: {
        "ip": "ip6",
        "type": "ipv6_addr",
        "nfproto": "ipv6",
        "P": "fd00:7:21::/64",
        "OLD": "fd00:7:99::/64",
        "N": "fd00:7::/32",
        "C": "fd00:7:21::2",
        "M": "ff00::/8",
        "A": "fd00:4:7::21",
        "PRIVATE": "fe80::/10",
    },
}

CASES = [
    pytest.param(row, command, id=f"{row.name}-{command}".replace(" ", "_"))
    for row in ROWS
    for command in (("nft",) if row.native else ("iptables-nft", "iptables-legacy"))
]


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab("nft") as lab:
        yield lab


@pytest.fixture
def clean(shared_lab: Lab) -> Lab:
    """The lab as it was: a new legacy table is empty, and so is everything else."""
    node = shared_lab.nodes[0]
    node.host.shell(
        "nft flush ruleset; rm -rf /run/flannel/*; conntrack -F 2>/dev/null;"
        "for one in iptables ip6tables; do $one-legacy -t nat -F; $one-legacy -t nat -X; done"
    )
    node.write_lease(v6=True)
    return shared_lab


def write(lab: Lab, row: Row, command: str) -> None:
    for family, words in WORDS.items():
        if family is Family.V6 and not row.v6:
            continue
        tool = command.replace("iptables", family.command)
        lab.nodes[0].host.shell(row.script.format(nat=f"{tool} -w 5 -t nat", **words))


def is_hidden(lab: Lab) -> bool:
    node, neighbour = lab.nodes
    return seen_by(node.container, neighbour.container_address) == node.address


@pytest.mark.parametrize(("row", "command"), CASES)
def test_before_snatd(clean: Lab, tmp_path: Path, row: Row, command: str) -> None:
    write(clean, row, command)
    assert is_hidden(clean), "the row does not show the problem"
    with Snatd(clean.nodes[0].host, tmp_path) as snatd:
        snatd.start()
        promises_hold(clean, v6=True)


@pytest.mark.parametrize(("row", "command"), CASES)
def test_after_snatd(clean: Lab, tmp_path: Path, row: Row, command: str) -> None:
    with Snatd(clean.nodes[0].host, tmp_path) as snatd:
        snatd.start()
        promises_hold(clean, v6=True)
        # While the daemon cannot repair: what holds now holds by the guard alone.
        snatd.signal(SIGSTOP)
        write(clean, row, command)
        promises_hold(clean, v6=True)
        snatd.signal(SIGCONT)
        until(lambda: settled(snatd), "a pass after the write")
        promises_hold(clean, v6=True)


def settled(snatd: Snatd) -> bool:
    """In sync; or iptables-nft cannot print a native rule in its table, which is told."""
    status = snatd.status()
    problems = [one["message"] for one in status["problems"]]
    return status["in_sync"] or (bool(problems) and all("incompatible" in one for one in problems))


def test_outside_has_no_way_back_to_a_bare_container(clean: Lab) -> None:
    """So that `promises_hold` can fail for the egress."""
    container = clean.nodes[0].container
    assert seen_by(container, OUTSIDE, timeout_s=0.3) is None
    assert seen_by(container, OUTSIDE_V6, timeout_s=0.3) is None
