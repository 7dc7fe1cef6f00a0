"""The node on which the rivals meet, what they know of their rules, and what must hold."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from snatd.core.model import Backend, Family
from tests.lab.netns import until
from tests.lab.network import LAN_HOST, OUTSIDE, OUTSIDE_V6, Lab
from tests.lab.process import Snatd
from tests.lab.who import PORT
from tests.soak.model import POSTROUTING, Table, parse
from tests.soak.rivals import Nft, Restore
from tests.soak.rules import SIDES, broads, is_ours

Key = tuple[Backend, Family]
KEYS: tuple[Key, ...] = tuple(itertools.product((Backend.NFT, Backend.LEGACY), Family))

# The node's two subnets, of which one is leased, and all networks that hold both of them and the
# neighbour's. The last one holds the node's own LAN too, which is cut out.
SUBNETS = ("172.7.21", "172.7.23")
NETWORKS = ("172.7.0.0/16", "172.4.0.0/14", "172.6.0.0/15", "172.7.0.0/16,10.0.0.0/8")
SUBNET_V6 = "fd00:7:21::/64"

# A storm of three writers delays a pass, a fight up to 5 s; nothing may delay it for longer.
LONGEST_PASS_S = 20.0
_ANSWER_S = 3.0
# Flows are forgotten after a second, so that a port used again is a connection of its own.
_FIRST_PORT, _PORTS = 10_000, 50_000


class Violation(AssertionError):
    """A promise that was broken."""


class World:
    """Two nodes, a container each, a daemon on the first, and a model of each rival's rules.

    `backend_lock` is held by whoever writes to the nat tables of a backend, so that kernel and
    model change together; snatd knows of no such lock.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self._starts = 0
        self.lab = self._stack.enter_context(Lab("nft"))
        self.node, self.neighbour = self.lab.nodes
        self.host = self.node.host
        self._two_subnets()
        self.backend_lock = {one: threading.RLock() for one in (Backend.NFT, Backend.LEGACY)}
        self.native_lock = threading.RLock()
        self.restores = {key: Restore(self.host, *key) for key in KEYS}
        self.nft = Nft(self.host)
        self._stack.callback(self.nft.close)
        for one in self.restores.values():
            self._stack.callback(one.close)
        self._ports = itertools.count()
        self._last_words = itertools.cycle(KEYS)
        self.trace: deque[str] = deque(maxlen=5000)
        self.tally: Counter[str] = Counter()
        self.snatd: Snatd | None = None
        self.reset()

    def _two_subnets(self) -> None:
        self.host.shell(
            "for one in udp_timeout udp_timeout_stream; do "
            "echo 1 > /proc/sys/net/netfilter/nf_conntrack_$one; done"
        )
        self.node.container.shell(f"ip addr add {SUBNETS[1]}.2/24 dev eth0")
        self.neighbour.host.shell(f"ip route add {SUBNETS[1]}.0/24 via {self.node.address}")
        self._addresses()

    def _addresses(self) -> None:
        self.host.shell(
            "".join(f"ip addr replace {one}.1/24 dev docker0; " for one in SUBNETS)
            + "ip addr replace fd00:7:21::1/64 dev docker0 nodad; ip link set docker0 up"
        )

    def reset(self) -> None:
        """Everything as on a new node, and a new daemon."""
        self.stop()
        for one in self.restores.values():
            one.close()
        self.bridge("docker0")
        self.host.shell(
            "nft flush ruleset; rm -rf /run/flannel /run/snatd; mkdir /run/flannel; "
            "for one in iptables ip6tables; do $one-legacy -t nat -F; $one-legacy -t nat -X; done"
        )
        self.lease, self.network = 0, NETWORKS[0]
        self.tables = {key: Table(self._passing(key[1])) for key in KEYS}
        self.natives: dict[str, dict[str, list[str]]] = {}
        self.saves: dict[Key, tuple[list[str], dict[str, list[str]]]] = {}
        self.guard_attacked = False
        self.trace.clear()
        self.write_lease()
        self._starts += 1
        self.snatd = Snatd(self.host, self._folder / str(self._starts))
        self.snatd.start()
        self.settle()

    def stop(self) -> None:
        """Ends the daemon, whose log must hold no traceback."""
        if self.snatd is not None:
            self.snatd.close()
            self.say_log()
            self.snatd = None

    def close(self) -> None:
        try:
            self.stop()
        finally:
            self._stack.close()

    def subnet(self, family: Family) -> str:
        return SUBNET_V6 if family is Family.V6 else f"{SUBNETS[self.lease]}.0/24"

    def _passing(self, family: Family) -> Callable[[str], bool]:
        side = SIDES[family]
        return lambda rule: is_ours(rule) or rule in broads(side, self.subnet(family))

    # -- the node ---------------------------------------------------------------------------

    def write_lease(self) -> None:
        self.node.write_lease(self.network, v6=True, subnet=f"{SUBNETS[self.lease]}.1/24")

    def bridge(self, name: str) -> None:
        """The container's bridge, made anew if it is gone, by this name."""
        self.host.shell(
            "if ! ip link show veth0 | grep -q 'master'; then "
            "ip link add docker0 type bridge mcast_snooping 0; ip link set veth0 master docker0; fi"
        )
        now = self.host.shell("ip -o link show type bridge").split(": ")[1]
        if now != name:
            self.host.shell(
                f"ip link set {now} name {name} 2>/dev/null || "
                f"(ip link set {now} down; ip link set {now} name {name})"
            )
        if name == "docker0":
            self._addresses()

    # -- what must hold ---------------------------------------------------------------------

    @property
    def container(self) -> dict[Family, str]:
        return {Family.V4: f"{SUBNETS[self.lease]}.2", Family.V6: self.node.container_v6}

    def seen(self, family: Family, destination: str) -> str | None:
        """As whom the container is seen by a new flow. The caller is in its network."""
        domain = socket.AF_INET6 if family is Family.V6 else socket.AF_INET
        with socket.socket(domain, socket.SOCK_DGRAM) as caller:
            caller.settimeout(_ANSWER_S)
            caller.bind((self.container[family], _FIRST_PORT + next(self._ports) % _PORTS))
            caller.connect((destination, PORT))
            try:
                caller.send(b"who")
                return caller.recv(64).decode()
            except OSError:
                return None

    def cluster_is_right(self, family: Family) -> None:
        """Promise 1. A connection is excused only where somebody has taken the guard away, and no
        pass is over since."""
        found = self.seen(family, self.cluster_host(family))
        self.tally["cluster connections"] += 1
        if found == self.container[family]:
            return
        if self.guard_attacked:
            self.tally["excused: the guard was taken away by a rival"] += 1
            return
        says = self.status()
        guards = [one["why_not"] for one in says["guard"]]
        raise Violation(
            f"cluster traffic of {self.container[family]} was seen as {found}; snatd says "
            f"{says['headline']!r}, guards missing: {guards}"
        )

    def cluster_host(self, family: Family) -> str:
        six = family is Family.V6
        return self.neighbour.container_v6 if six else self.neighbour.container_address

    def egress_is_right(self, family: Family, lan: bool = False) -> None:
        """Promise 2."""
        six = family is Family.V6
        destination = OUTSIDE_V6 if six else LAN_HOST if lan else OUTSIDE
        expected = self.node.address_v6 if six else self.node.address
        found = self.seen(family, destination)
        self.tally["egress connections"] += 1
        if found != expected:
            raise Violation(f"{destination} was called by {found}, not by {expected}")

    def listing(self, key: Key) -> dict[str, list[str]]:
        backend, family = key
        command = [f"{family.command}-{backend.value}", *_wait(backend), "-t", "nat", "-S"]
        for _ in range(5):
            printed = self.host.run(*command)
            # iptables-nft 1.8.9 also says that of a table in which no other base chain is, after a
            # commit came into its reading; where there is one, it says so each time.
            if not printed.startswith("# Table `nat' contains incompatible base-chains"):
                break
            self.tally["listings that a commit came into"] += 1
        return {POSTROUTING: [], **parse(printed)}

    def foreign_is_right(self, key: Key) -> dict[str, list[str]]:
        """Promise 3, for one table: byte for byte what the rivals know; and the listing."""
        backend, family = key
        with self.backend_lock[backend]:
            actual = self.listing(key)
            told = self.tables[key].difference(actual)
        self.tally["listings compared"] += 1
        if told:
            raise Violation(f"{family.value} {backend.value}: {told}")
        return actual

    def natives_are_right(self) -> None:
        with self.native_lock:
            for nft_family in ("ip", "ip6", "inet"):
                expected = self.natives.get(nft_family, {})
                for chain, rules in expected.items():
                    actual = [text for text, _ in self.nft.rules(nft_family, "rival", chain)]
                    if actual != rules:
                        raise Violation(f"table {nft_family} rival {chain}: {actual} not {rules}")
        self.tally["listings compared"] += 1

    # -- passes -----------------------------------------------------------------------------

    def settle(self) -> None:
        """Docker's rule comes once more, as the last word, and the pass that narrows it is over."""
        began_s = time.time()
        # A pass tells its times in whole milliseconds; one that hears the last word begins later.
        until(lambda: time.time() > began_s + 0.002, "the next millisecond")
        last = next(self._last_words)
        rule = broads(SIDES[last[1]], self.subnet(last[1]))[0]
        with self.backend_lock[last[0]]:
            said = self.restores[last].commit(f"-I {POSTROUTING} 1 {rule}")
        assert not said, said
        self.trace.append(f"{last[1].command}-{last[0].value} -t nat -I POSTROUTING 1 {rule}")

        def over() -> bool:
            return self.passed_since(began_s) and rule not in self.listing(last)[POSTROUTING]

        try:
            until(over, "a pass after the last mutation", within_s=LONGEST_PASS_S)
        except AssertionError as error:
            told = self.status()
            raise Violation(f"{error}: {told['headline']}; {told['last_pass']}") from None
        self.guard_attacked = False
        self.tally["passes waited for"] += 1

    def passed_since(self, began_s: float) -> bool:
        """Whether a pass that began since then is over and found, or left, all in order."""
        status = self.status()
        ended_s = datetime.fromisoformat(status["last_pass"]["at"]).timestamp()
        started_s = ended_s - status["last_pass"]["duration_ms"] / 1000
        quiet = not (status["problems"] or status["plan"] or status["waiting_for"])
        return started_s > began_s and quiet

    def status(self) -> dict[str, Any]:
        assert self.snatd is not None
        if self.snatd.process.poll() is not None:
            raise Violation(f"snatd ended with {self.snatd.process.returncode}")
        return self.snatd.status()

    def all_is_right(self) -> None:
        """After a pass: all promises, and no rule of ours or broad one that should not be."""
        for key in KEYS:
            self._ours_are_right(key[1], self.foreign_is_right(key)[POSTROUTING])
        self.natives_are_right()
        with self.node.container.entered():
            for family in Family:
                self.cluster_is_right(family)
                self.egress_is_right(family)
            self.egress_is_right(Family.V4, lan=True)

    def _ours_are_right(self, family: Family, rules: list[str]) -> None:
        subnet = self.subnet(family)
        network = SIDES[family].cluster if family is Family.V6 else self.network
        into = "(?=.* -j SNATD-)" if "," in network else f" ! -d {re.escape(network)}"
        form = re.compile(rf"-s {re.escape(subnet)}{into}(?:(?: !)? -o \S+)? -m comment")
        for rule in rules:
            if rule in broads(SIDES[family], subnet):
                raise Violation(f"{family.value}: not narrowed: {rule}")
            if is_ours(rule) and not form.match(rule):
                raise Violation(f"{family.value}: stale: {rule}")

    # -- the process ------------------------------------------------------------------------

    def say_log(self) -> None:
        assert self.snatd is not None
        log = self.snatd.log_path.read_text()
        if "Traceback" in log:
            raise Violation(log[log.index("Traceback") :])
        for line in log.split("\n")[:-1]:
            self.tally[f"logged {json.loads(line)['event']}"] += 1

    def memory_kib(self) -> int:
        assert self.snatd is not None
        status = Path(f"/proc/{self.snatd.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]

    def descriptors(self) -> int:
        assert self.snatd is not None
        return len(os.listdir(f"/proc/{self.snatd.pid}/fd"))

    def children(self) -> int:
        assert self.snatd is not None
        of_threads = Path(f"/proc/{self.snatd.pid}/task").glob("*/children")
        return sum(len(one.read_text().split()) for one in of_threads)


def _wait(backend: Backend) -> tuple[str, ...]:
    return ("-w", "10") if backend is Backend.LEGACY else ()


@contextmanager
def locked(*locks: threading.RLock) -> Iterator[None]:
    """Several at once, always in one order."""
    with ExitStack() as stack:
        for one in locks:
            stack.enter_context(one)
        yield
