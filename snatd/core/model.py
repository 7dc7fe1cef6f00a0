"""The values that travel along the line: what the node is, what its rulesets say."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface

POSTROUTING = "POSTROUTING"
OWN_CHAIN_PREFIX = "SNATD-"
OWN_COMMENT = "snatd"


class Family(enum.Enum):
    """An address family. Everything that differs between the two is a value here, never an `if`."""

    V4 = "ipv4"
    V6 = "ipv6"

    @property
    def version(self) -> int:
        return 4 if self is Family.V4 else 6

    @property
    def command(self) -> str:
        """The name under which the iptables tools of this family are installed."""
        return "iptables" if self is Family.V4 else "ip6tables"

    @property
    def multicast(self) -> Network:
        """What flannel's own masquerade rule leaves out (flannel v0.5 to v0.28)."""
        return IPv4Network("224.0.0.0/4") if self is Family.V4 else IPv6Network("ff00::/8")


# A network that is wider than this is a mistake: it would exempt much of the world.
SHORTEST_PREFIX = {Family.V4: 8, Family.V6: 16}


class Backend(enum.Enum):
    """Where rules live: the kernel's two homes of iptables rules, and our own nft table."""

    GUARD = "guard"
    NFT = "nft"
    LEGACY = "legacy"

    def line(self, chain: str, text: str) -> str:
        """A rule as the backend's own tool takes it."""
        return f"add {text}" if self is Backend.GUARD else f"-A {chain} {text}"


class EgressPolicy(enum.Enum):
    """Whether a masquerading rule is added where the node has none."""

    AUTO = "auto"
    ENSURE = "ensure"
    KEEP = "keep"


class GuardPolicy(enum.Enum):
    """Whether the guard stands. AUTO: wherever nft and the kernel can do it."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class Policy:
    """What the operator wants, as far as decisions depend on it.

    Traffic that carries one of `masquerade_marks` asks for masquerade: kube-proxy's 0x4000, the
    host ports' 0x2000.
    """

    networks: tuple[Network, ...] = ()
    exclude: tuple[Network, ...] = ()
    egress: EgressPolicy = EgressPolicy.AUTO
    backend: Backend | None = None
    guard: GuardPolicy = GuardPolicy.AUTO
    masquerade_marks: tuple[int, ...] = (0x4000, 0x2000)


@dataclass(frozen=True)
class Hold:
    """We do not know enough to touch anything, and why. Unknown is not empty. `explained`: the
    reason says how to mend it."""

    reason: str
    explained: bool = False


@dataclass(frozen=True)
class FamilyLease:
    """What flannel leased to this node in a family. `gateway`: FLANNEL_SUBNET with host bits."""

    gateway: Interface
    networks: tuple[Network, ...]

    @property
    def subnet(self) -> Network:
        return self.gateway.network


@dataclass(frozen=True)
class Lease:
    """A well-formed subnet.env. `whole`: its last line is there, what is missing is not leased."""

    families: tuple[tuple[Family, FamilyLease], ...]
    ipmasq: bool = False
    mtu: int | None = None
    whole: bool = True

    def of(self, family: Family) -> FamilyLease | None:
        return dict(self.families).get(family)


@dataclass(frozen=True)
class Link:
    """A network device and the addresses that it carries."""

    index: int
    name: str
    addresses: tuple[Interface, ...] = ()


@dataclass(frozen=True)
class DirectRoute:
    """A unicast route of the main table without a gateway: its hosts are neighbours on a device."""

    destination: Network
    device: str


@dataclass(frozen=True)
class NodeState:
    """Everything outside the rulesets that a decision depends on, read anew for each pass."""

    lease: Lease | Hold
    links: tuple[Link, ...] = ()
    direct_routes: tuple[DirectRoute, ...] = ()
    ipv6: bool = True
    iptables_is: Backend = Backend.NFT

    def has(self, family: Family) -> bool:
        """Whether the kernel speaks a family at all (ipv6.disable=1 and disable_ipv6 say no)."""
        return self.ipv6 or family is Family.V4


@dataclass(frozen=True)
class Counters:
    packets: int
    bytes: int


@dataclass(frozen=True)
class Rule:
    """A rule, as `iptables -S` prints it behind `-A CHAIN `. Two are equal if their texts are.

    `counters` and `like` ride along for the writer: `like` names the rule, by chain and text, from
    which this one takes its target, bytes and all.
    """

    text: str
    counters: Counters | None = field(default=None, compare=False)
    like: tuple[str, str] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Ruleset:
    """nat POSTROUTING of one backend and family, and the chains of ours that it jumps to.

    Of the guard: its chain and rules in `postrouting`, none where the table does not exist.
    """

    family: Family
    backend: Backend
    postrouting: tuple[Rule, ...] = ()
    own_chains: tuple[tuple[str, tuple[Rule, ...]], ...] = ()

    def chain(self, name: str) -> tuple[Rule, ...] | None:
        """The rules of a chain, or None where it does not exist as far as the read went."""
        return self.postrouting if name == POSTROUTING else dict(self.own_chains).get(name)

    def lines(self) -> tuple[str, ...]:
        """The whole as the backend's own tool would print it."""
        chains = ((POSTROUTING, self.postrouting), *self.own_chains)
        return tuple(self.backend.line(name, rule.text) for name, rules in chains for rule in rules)


def join(items: Sequence[object], at_most: int = 4) -> str:
    """A list for a sentence, in which nobody would read more than a few."""
    shown = [str(item) for item in items[:at_most]]
    if len(items) > at_most:
        shown.append(f"{len(items) - at_most} more")
    return ", ".join(shown) or "none"


def count(number: int, noun: str) -> str:
    """`1 rule`, `2 rules`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
