"""Hooks from rules as tools print them, and packets, for the tests of the trace."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from snatd.core import native, xtables
from snatd.core.model import Address, Family
from snatd.core.packet import Hook, Packet, address_types, addresses
from snatd.core.rules import parse_table
from snatd.core.trace import Trace, trace

CAPTURED = Path(__file__).parent / "captured"
NODE, SECOND = ip_address("10.4.7.21"), ip_address("10.4.7.99")
_LOCAL = [ip_network(one) for one in ("127.0.0.0/8", "10.4.7.21/32", "172.7.21.1/32")]

PACKET = Packet(
    family=Family.V4,
    source=addresses([ip_network("172.7.21.2")]),
    destination=addresses([ip_network("172.7.22.2")]),
    out="eth0",
    came_in="docker0",
    protocol=17,
    sport=4000,
    dport=5000,
    types=address_types(Family.V4, _LOCAL, [ip_network("10.4.7.255")]),
)


def packet(source: str = "", destination: str = "", **fields: Any) -> Packet:
    for name, text in (("source", source), ("destination", destination)):
        if text:
            fields[name] = addresses([ip_network(one) for one in text.split(" ")])
    if ":" in source:
        fields.setdefault("family", Family.V6)
    return replace(PACKET, **fields)


def xtables_hook(rules: str, table: str = "ip nat", priority: int = 100) -> Hook:
    """From lines `CHAIN RULE`, or `RULE` alone in POSTROUTING."""
    lines = [line.strip() for line in rules.strip().splitlines() if line.strip()]
    lines = [f"POSTROUTING {one}" if one[0] in "-!" else one for one in lines]
    chains = dict.fromkeys(["POSTROUTING", *(line.split(" ")[0] for line in lines)])
    head = [f"-{'P' if one == 'POSTROUTING' else 'N'} {one} ACCEPT" for one in chains]
    listing = "\n".join([*head, *(f"-A {line}" for line in lines if " " in line), ""])
    parsed, _ = parse_table(listing)
    return Hook(table, "POSTROUTING", priority, xtables.compiled(parsed, parsed))


def nft_hook(name: str, family: Family = Family.V4) -> Hook:
    """The base chain of a captured table."""
    objects = json.loads((CAPTURED / f"{name}.json").read_text())["nftables"]
    texts = native.texts((CAPTURED / f"{name}.nft").read_text())
    base = next(one["chain"] for one in objects if "prio" in one.get("chain", {}))
    chains = native.compiled(family, native.listing(objects), texts)
    table = f"{base['family']} {base['table']}"
    return Hook(table, base["name"], base["prio"], chains, base["policy"] == "drop")


def traced(
    *hooks: Hook, of: Packet = PACKET, masquerade: tuple[Address, ...] | None = (NODE,)
) -> Trace:
    return trace(hooks, of, masquerade)


def verdict(
    *hooks: Hook, of: Packet = PACKET, masquerade: tuple[Address, ...] | None = (NODE,)
) -> str:
    """The address, `kept`, `dropped` or `may`."""
    answer = traced(*hooks, of=of, masquerade=masquerade).answer
    if answer is None:
        return "may"
    if answer.dropped:
        return "dropped"
    return "kept" if answer.kept else str((answer.sources or ("?",))[0])
