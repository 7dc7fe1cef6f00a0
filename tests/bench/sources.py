"""As whom the others see new connections while a rival rewrites the broad rule all the time."""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import snatd as product
from tests.bench import bare
from tests.bench.figures import Aim, Figure
from tests.bench.site import Site
from tests.lab.netns import until
from tests.lab.network import OUTSIDE, Node
from tests.lab.outside import bare_packets, count_bare
from tests.lab.process import Snatd
from tests.lab.who import Seen, census, seen_by

_NONE = (Aim(0, "p99"),)
_PERIOD_S = 0.02
# Of so many connections one is TCP's; the others are UDP's, which take a tenth of the time.
_ONE_IN = 10
_NEWER = "9.9.9"


def sources(site: Site, snatd: Snatd, count: int) -> list[Figure]:
    """`count` connections into the cluster network and as many out of it, in each of three states
    of the daemon; before it, without snatd, fewer: what would be wrong."""
    bare.only_broad(site.node)
    outside = site.lab.outside
    count_bare(outside, site.node.subnet)
    figures: list[Figure] = []
    with _rival(site.node):
        seen = _seen(site, count // 10, 0, lambda: False)
        figures.append(_figures(site, "without snatd, as a control", seen, 0, vital=False)[0])
        snatd.start()
        # Until then egress hangs on the rival's own rule, which it deletes for some ms each time.
        until(lambda: _is_narrowed(site), "the first narrowed rule")
        states: tuple[tuple[str, Callable[[], object]], ...] = (
            ("daemon alive", lambda: None),
            ("daemon killed", lambda: _kill(snatd)),
            ("restarts, kills and an upgrade", lambda: _restarts(snatd, site.folder)),
        )
        for number, (state, change) in enumerate(states, 1):
            changing = threading.Thread(target=change)
            changing.start()
            if state == "daemon killed":
                changing.join()
            before = bare_packets(outside)
            seen = _seen(site, count, number, changing.is_alive)
            changing.join()
            figures += _figures(site, state, seen, bare_packets(outside) - before)
        assert snatd.status()["version"] == _NEWER, "the newer version did not start"
    snatd.stop()
    return figures


def _is_narrowed(site: Site) -> bool:
    return "--comment snatd " in site.node.host.run("iptables", "-t", "nat", "-S", "POSTROUTING")


def _kill(snatd: Snatd) -> None:
    snatd.signal(signal.SIGKILL)
    snatd.process.wait()


def _restarts(snatd: Snatd, folder: Path) -> None:
    """Starts it again, as after the kill; stops and starts it; kills and starts it; and stops it
    and starts another version, as a package does."""
    newer = folder / "newer"
    shutil.copytree(Path(product.__file__).parent, newer / "snatd", dirs_exist_ok=True)
    init = newer / "snatd" / "__init__.py"
    init.write_text(init.read_text().replace(f'"{product.__version__}"', f'"{_NEWER}"'))
    snatd.start()
    snatd.stop()
    snatd.start()
    _kill(snatd)
    snatd.start()
    snatd.stop()
    snatd.start(PYTHONPATH=str(newer))


@contextmanager
def _rival(node: Node) -> Iterator[None]:
    """Deletes the broad rule and inserts it at the head, every 20 ms and what that takes."""
    rule = f"POSTROUTING {' '.join(node.broad_rule)}"
    script = (
        f"while :; do iptables -w -t nat -D {rule} 2>/dev/null; "
        f"iptables -w -t nat -I {rule}; sleep {_PERIOD_S}; done"
    )
    rival = node.host.popen("sh", "-c", script, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        assert rival.poll() is None, "the rival ended before the measurement did"
        rival.kill()
        rival.wait()


def _seen(site: Site, count: int, number: int, busy: Callable[[], bool]) -> Seen:
    """UDP flows have ports that no earlier measurement used, since an entry lives on. Goes on while
    `busy`."""
    inside = site.other.container_address
    client = site.node.container
    rounds = count - count // _ONE_IN
    seen = census(
        client,
        (inside, OUTSIDE),
        lambda done: done < rounds or (done < 2 * rounds and busy()),
        first_port=1025 + number * 12_000,
    )
    for _ in range(count // _ONE_IN):
        for destination in (inside, OUTSIDE):
            seen[destination, seen_by(client, destination)] += 1
    return seen


def _figures(site: Site, state: str, seen: Seen, bare: int, *, vital: bool = True) -> list[Figure]:
    """`bare`: packets that arrived outside as a container's."""
    node = site.node
    expected = {site.other.container_address: node.container_address, OUTSIDE: node.address}
    wrong, total = dict.fromkeys(expected, 0), dict.fromkeys(expected, 0)
    for (destination, answer), number in seen.items():
        total[destination] += number
        wrong[destination] += number * (answer != expected[destination])
    inside, outside = expected
    unanswered = seen[OUTSIDE, None]
    aims = _NONE if vital else ()
    where = f"{site.backend}, {state}"
    return [
        Figure(
            f"wrong sources among {total[inside]} new connections, {where}",
            "",
            (float(wrong[inside]),),
            aims,
            vital=vital,
        ),
        Figure(
            f"  egress not masqueraded, of {total[outside]}, {where}",
            "",
            (float(bare + wrong[outside] - unanswered),),
            aims,
            vital=vital,
        ),
        Figure(f"  egress without an answer, {where}", "", (float(unanswered),)),
    ]
