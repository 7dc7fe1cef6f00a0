"""What arrives outside with a container's own address: an egress that nobody masqueraded, which the
host outside cannot answer."""

from __future__ import annotations

import json

from tests.lab.netns import Namespace


def count_bare(outside: Namespace, source: str, only: str = "") -> None:
    """Begins to count the packets from a network, of them `only` those that match this."""
    outside.run(
        *("nft", "-f", "-"),
        stdin=f"""
        table ip bare {{
            counter bare {{ }}
            chain bare {{
                type filter hook prerouting priority raw
                ip saddr {source} {only} counter name bare
            }}
        }}
        """,
    )


def bare_packets(outside: Namespace) -> int:
    """How many there were so far."""
    listed = json.loads(outside.run("nft", "-j", "list", "counters"))["nftables"]
    return int(next(one["counter"]["packets"] for one in listed if "counter" in one))
