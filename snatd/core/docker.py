"""How dockerd is configured, and where that does not fit flannel's lease, as findings. Pure.

What Docker's rules do is `rivals`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snatd.core.desired import Desired
from snatd.core.finding import Finding, Severity
from snatd.core.model import Backend, Family, Interface, Lease, Link, join
from snatd.core.networks import interface, overlaps
from snatd.core.packet import Hook
from snatd.core.programs import Process, boolean, options

DEFAULT_FILE = "/etc/docker/daemon.json"
DEFAULT_BRIDGE = "docker0"

# dockerd's names for what counts here; --bridge is -b too, and --bip6 is there since Docker 28.
_TEXTS, _FLAGS = ("bridge", "bip", "bip6", "config-file"), ("ip-masq", "iptables")
_BIP = {Family.V4: "bip", Family.V6: "bip6"}
_OWN_BRIDGE = re.compile(r"(?:docker0|docker_gwbridge|br-[0-9a-f]{12})\Z")
_RESTART = "systemctl restart docker"


@dataclass(frozen=True)
class Docker:
    """One dockerd, or its file where none runs. `refused`: why it would not start with the file."""

    process: Process | None
    path: str
    file: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def arguments(self) -> dict[str, str]:
        return options(self.process, _TEXTS, _FLAGS, "b") if self.process else {}

    def text(self, name: str) -> tuple[str, str]:
        """What one of its options is, "" for the default, and where that is said."""
        if name in self.arguments:
            return self.arguments[name], f"{self.process}: --{name}={self.arguments[name]}"
        value = self.file.get(name, "")
        if value != "":
            return _as_text(value), f'{self.path}: "{name}": {json.dumps(value)}'
        return "", f"{self.process or 'dockerd'}: --{name} is not given"

    def is_on(self, name: str) -> tuple[bool, str]:
        """The same of an option that is on by default."""
        text, where = self.text(name)
        return boolean(text) is not False, f"{where}, so it is on" if text == "" else where

    @property
    def bridge(self) -> str:
        return self.text("bridge")[0] or DEFAULT_BRIDGE

    def masquerades(self) -> tuple[bool, str]:
        """Whether it writes a rule for its bridge, and what says so."""
        writes, why = self.is_on("iptables")
        return self.is_on("ip-masq") if writes else (False, why)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def is_daemon(process: Process) -> bool:
    """dockerd by all its names; until Docker 1.12 it was `docker daemon`, or `docker -d`."""
    if process.name == "docker":
        return process.words[:1] in (("daemon",), ("-d",), ("--daemon",))
    return process.name in ("dockerd", "dockerd-current", "dockerd-ce")


def file_of(process: Process | None) -> str:
    """Where its file is."""
    given = options(process, _TEXTS, _FLAGS, "b") if process else {}
    return given.get("config-file", DEFAULT_FILE)


def parse_file(content: bytes) -> Mapping[str, Any]:
    """What daemon.json says. Raises ValueError with the reason for which dockerd refuses it."""
    if not content.strip():
        return {}
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    for name in (*_TEXTS, *_FLAGS):
        wanted, kind = (str, "a string") if name in _TEXTS else (bool, "true or false")
        if name in found and not isinstance(found[name], wanted):
            raise ValueError(f'"{name}" is not {kind}: {json.dumps(found[name])[:60]}')
    return found


def file(docker: Docker) -> Iterator[Finding]:
    """Whether dockerd would start again."""
    evidence = [f"{docker.path}: {docker.refused}"] if docker.refused else []
    for name in docker.arguments:
        if name in docker.file:
            said = json.dumps(docker.file[name])
            evidence.append(
                f'{docker.process}: --{name} is given, and {docker.path} has "{name}": {said}'
            )
    if evidence:
        yield Finding(
            "docker_config",
            Severity.WARNING,
            "dockerd will not start again with its configuration",
            tuple(evidence),
            "containers stay away after the next restart or boot",
            (f"# correct {docker.path}; it must not repeat what is an argument", _RESTART),
        )


def masquerade(docker: Docker, lease: Lease, leased: Iterable[Desired]) -> Iterator[Finding]:
    """flannel's --ip-masq against Docker's, where Docker's bridge is the one with the lease."""
    if docker.bridge not in [one.bridge for one in leased] or docker.process is None:
        return
    by_docker, why = docker.masquerades()
    evidence = (f"subnet.env: FLANNEL_IPMASQ={'true' if lease.ipmasq else 'false'}", why)
    if lease.ipmasq and by_docker:
        yield Finding(
            "two_masquerade",
            Severity.WARNING,
            "flannel and Docker both masquerade what containers send",
            evidence,
            "Docker's rule hides containers from other nodes wherever snatd does not mend it; with "
            "FLANNEL_IPMASQ=true flannel expects Docker to have --ip-masq=false",
            (_put(docker, "ip-masq", "false"), _then_restart(docker, "ip-masq", "false")),
        )
    elif not (lease.ipmasq or by_docker):
        yield Finding(
            "nobody_masquerades",
            Severity.INFO,
            "neither flannel nor Docker masquerades what containers send outside",
            evidence,
            "if anything does it is snatd's own rule (the key `egress`) or one of yours",
            ("# none is needed; `snatd check` says whether that rule is there",),
        )


def _put(docker: Docker, name: str, value: str) -> str:
    """How an option is set, where it is said now."""
    if name in docker.arguments:
        return f"# start dockerd with --{name}={value.strip(chr(34))}"
    return f'# put "{name}": {value} into {docker.path}'


def _then_restart(docker: Docker, name: str, value: str) -> str:
    """Typed before that is done it would stop all containers for nothing."""
    if name in docker.arguments:
        return f"# then: {_RESTART}"
    path, pattern = shlex.quote(docker.path), shlex.quote(f'"{name}": *{re.escape(value)}')
    return f"grep -q {pattern} {path} && {_RESTART}"


def bip(docker: Docker, gateway: Interface, wanted: Desired, *, by_cni: bool) -> Iterator[Finding]:
    """Whether its bridge is told `gateway`, FLANNEL_SUBNET, if it is the one to carry that.
    `by_cni`: containers get their addresses otherwise here."""
    name = _BIP[wanted.family]
    text, where = docker.text(name)
    waits = not isinstance(wanted.bridge, str)
    meant = wanted.bridge == docker.bridge or (waits and not by_cni)
    # With --bridge somebody else sets it up, and dockerd refuses to be told its address.
    if not meant or docker.text("bridge")[0] or _is(text, gateway):
        return
    severity = Severity.ERROR if waits and text else Severity.WARNING
    if not text and not (waits and docker.process and wanted.family is Family.V4):
        return
    yield Finding(
        "docker_bip",
        severity,
        "Docker's bridge is not told the subnet that flannel leased",
        (where, f"subnet.env: {_LEASE[wanted.family]}={gateway}"),
        "containers get addresses that other nodes do not send here"
        + (", from the next start of dockerd on at the latest" if not waits else ""),
        (_put(docker, name, f'"{gateway}"'), _then_restart(docker, name, f'"{gateway}"')),
    )


_LEASE = {Family.V4: "FLANNEL_SUBNET", Family.V6: "FLANNEL_IPV6_SUBNET"}


def _is(text: str, gateway: Interface) -> bool:
    try:
        return interface(text) == gateway
    except ValueError:
        return False


def rules_gone(
    docker: Docker,
    asked: Mapping[str, Sequence[Hook]],
    others: Mapping[str, Sequence[Hook]],
    own: Backend,
) -> Iterator[Finding]:
    """Whether a dockerd's own rules are still asked. `asked`: the base chains of each place where
    it has some, by the place's name; `others`: those of the backend that is not the node's `own`,
    left from before that was changed."""
    on, why = docker.is_on("iptables")
    without = [where for where, hooks in asked.items() if not any(map(_is_dockers, hooks))]
    if not (on and without):
        return
    closed = [str(one) for where in without for one in asked[where] if one.drops]
    if len(without) == len(asked) and not closed and _are_dockers(others):
        other = Backend.LEGACY if own is Backend.NFT else Backend.NFT
        yield Finding(
            "docker_other_tables",
            Severity.WARNING,
            f"Docker's rules stand in {other.value} tables, and the node's iptables writes to "
            f"{own.value} ones",
            (
                why,
                *(
                    f"nothing in {where} of {own.value} leads to a chain of Docker's"
                    for where in asked
                ),
            ),
            f"they do their work; but what dockerd writes from now on goes to {own.value} tables",
            (f"{_RESTART}  # writes them there; `snatd doctor` then says how to end the others",),
        )
        return
    yield Finding(
        "docker_rules_gone",
        Severity.ERROR if closed else Severity.WARNING,
        "somebody removed rules of Docker's",
        (
            why,
            *(f"nothing in {where} leads to a chain of Docker's" for where in without),
            *(f"{one} drops what no rule accepts" for one in closed),
        ),
        "containers reach nothing that is forwarded, and nobody reaches them"
        if closed
        else "published ports may not answer, and Docker's networks are not kept apart",
        (f"{_RESTART}  # writes them again; then ask doctor again",),
    )


def _are_dockers(places: Mapping[str, Sequence[Hook]]) -> bool:
    return all(any(map(_is_dockers, hooks)) for hooks in places.values())


def _is_dockers(hook: Hook) -> bool:
    """Its table for nft is `docker-bridges` (Docker 29)."""
    by_nft = hook.table.endswith(" docker-bridges")
    return by_nft or any(name.startswith("DOCKER") for name in hook.chains)


def networks(links: Iterable[Link], wanted: Desired) -> Iterator[Finding]:
    """Docker's own networks that lie in the cluster's."""
    for link in links:
        # Where the lease is nowhere yet, docker0 may be about to get it.
        default = link.name == DEFAULT_BRIDGE and not isinstance(wanted.bridge, str)
        if not _OWN_BRIDGE.match(link.name) or link.name == wanted.bridge or default:
            continue
        for address in link.addresses:
            if not any(overlaps(address.network, one) for one in wanted.cluster):
                continue
            which = link.name.removeprefix("br-")
            inside = join(wanted.cluster)
            remedy: tuple[str, ...] = (
                f"docker network inspect {which}",
                f"# if nothing needs it: docker network rm {which}",
                f'# or "default-address-pools" in {DEFAULT_FILE} outside of {inside}',
            )
            if link.name == DEFAULT_BRIDGE:
                remedy = (f'# "bip" in {DEFAULT_FILE} outside of {inside}', _RESTART)
            yield Finding(
                "docker_network",
                Severity.WARNING,
                "a network of Docker's lies inside the cluster network",
                (f"{link.name} carries {address}", f"the cluster network is {inside}"),
                "what this node sends to the containers that flannel has there ends in that bridge",
                remedy,
            )
