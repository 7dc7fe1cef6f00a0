"""What others do all day that is no business of snatd's."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.site import Site
from tests.bench.usage import Usage
from tests.lab.process import Snatd

_RULES, _RESTORES_A_SECOND = 5_000, 10
_PAIRS_A_SECOND = 200
_SETTLED_S = 1.0
_NO_PASS = (Aim(0),)


def restores(site: Site, snatd: Snatd, for_s: float) -> list[Figure]:
    """As kube-proxy on a busy node: each restore flushes a chain and writes it anew."""
    rules = "".join(f"-A STORM -d 10.96.{n // 250}.{n % 250}/32 -j RETURN\n" for n in range(_RULES))
    script = f"*nat\n:STORM - [0:0]\n{rules}COMMIT\n"

    def restore() -> None:
        bare.run(site.node.host, "iptables-restore", "--noflush", stdin=script)

    restore()
    name = f"{_RULES}-rule restores of a foreign chain, nft"
    return _during(snatd, name, restore, 1, _RESTORES_A_SECOND, for_s, Aim(5))


def veths(site: Site, snatd: Snatd, for_s: float) -> list[Figure]:
    """As containers come and go."""
    create = "".join(
        f"link add a{n} group 77 type veth peer name b{n}\nlink set a{n} up\n"
        for n in range(_PAIRS_A_SECOND)
    )

    def churn() -> None:
        bare.run(site.node.host, "ip", "-batch", "-", stdin=create)
        bare.run(site.node.host, "ip", "link", "del", "group", "77")

    name = "veth pairs created and deleted, nft"
    return _during(snatd, name, churn, _PAIRS_A_SECOND, _PAIRS_A_SECOND, for_s, Aim(10))


def _during(
    snatd: Snatd,
    name: str,
    act: Callable[[], None],
    makes: int,
    rate: int,
    for_s: float,
    aim: Aim,
) -> list[Figure]:
    """`act` makes so many each time. Where the machine is too slow for the rate, CPU time is that
    of the rate all the same, and what was reached is told."""
    time.sleep(_SETTLED_S)
    made, before = 0, Usage.of(snatd)
    while (passed_s := time.monotonic() - before.at_s) < for_s:
        if made > passed_s * rate:
            time.sleep(min(0.1, made / rate - passed_s))
            continue
        act()
        made += makes
    reached = made / (time.monotonic() - before.at_s)
    time.sleep(_SETTLED_S)
    after = Usage.of(snatd)
    percent = (after.cpu_s - before.cpu_s) / made * rate * 100
    passes = float(after.passes - before.passes)
    return [
        Figure(f"CPU at {rate} a second: {name}", "% core", (percent,), (aim,)),
        Figure(f"  passes: {name}", "", (passes,), _NO_PASS),
        Figure(f"  reached: {name}", "1/s", (reached,)),
    ]
