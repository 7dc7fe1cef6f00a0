"""Why a container's packets may not find their way to another node, or back. Pure.

Says nothing of source addresses: that is `trace`.
"""

from __future__ import annotations

from collections.abc import Iterator

from snatd.core.desired import Desired
from snatd.core.finding import Finding, Severity
from snatd.core.model import Family

FORWARDING = {
    Family.V4: "net.ipv4.ip_forward",
    Family.V6: "net.ipv6.conf.all.forwarding",
}


def forwarding(leased: Desired, value: str) -> Iterator[Finding]:
    """`value`: of the family's sysctl in FORWARDING."""
    key = FORWARDING[leased.family]
    if value == "0":
        yield Finding(
            "forwarding_off",
            Severity.ERROR,
            f"this node forwards no {leased.family.value} packets",
            (f"{key} = {value}",),
            f"what a container of {leased.subnet} sends to another node ends here",
            (f"sysctl -w {key}=1", f"echo '{key} = 1' > /etc/sysctl.d/90-forwarding.conf"),
        )
