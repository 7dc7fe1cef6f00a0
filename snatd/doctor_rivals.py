"""The checks of `doctor` on what other programs write and are told to do, and on snatd's own start.

Each reads what it is about and asks `core`. Writes nothing.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from snatd import suspects, told
from snatd.core import boot, docker, programs, rivals
from snatd.core.desired import Desired
from snatd.core.errors import RuleError
from snatd.core.flannel_rules import early_rules, flannel_rules
from snatd.core.model import Backend, Family, GuardPolicy, Lease
from snatd.core.packet import Hook
from snatd.core.saved import bring_in_line
from snatd.core.trace import Answer, inbound_packet, rewriters, without_guard
from snatd.core.word import Life, Word
from snatd.core.xtables import iptables_of
from snatd.examined import Examined, Found
from snatd.host import files, processes, status
from snatd.host.docker import read_dockers
from snatd.host.saved_rules import LARGEST_FILE_BYTES, find
from snatd.kernel.events import Writer
from snatd.kernel.hooks import DNAT, FORWARD, NAT, Hooks

_SYSTEMD, _VOLATILE = Path("/run/systemd/system"), Path("/run")
_DOCKER_UNIT = "docker.service"
_CHECK_ORDER = "/usr/libexec/snatd/check-order"
_PROPERTIES = "LoadState,UnitFileState,ActiveState,Result,ExecMainStatus,NRestarts,After,Before"
_SYSCONFIG = (Path("/etc/sysconfig/iptables-config"), Path("/etc/sysconfig/ip6tables-config"))
_LARGEST_TEXT_BYTES = 1 << 20


def _drift(examined: Examined) -> Found:
    """What snatd itself would change, and the guard that it cannot have."""
    settings, view = examined.settings, examined.view
    if examined.complaints:
        return  # the daemon may be right by what it was told before
    cure: tuple[str, ...] = ('# mode = "enforce" in snatd.toml, then:', "systemctl reload snatd")
    if settings.mode == "enforce":
        cure = ("snatd apply",)
    planned = {one.family for one in view.plan if one.backend is Backend.GUARD}
    said = _refused_guards(_said(examined.word) or {})
    refused = {family: why for family, why in said.items() if family in planned}
    refused |= {one.family: str(one) for one in view.unguarded if one.family}
    dockers = read_dockers(examined.programs) if view.plan else ()
    fight = (_said(examined.word) or {}).get("fights", {}).get("now")
    for one in view.plan:
        # In a fight that is what the rival left since the last repair.
        if not fight and (one.backend is not Backend.GUARD or one.family not in refused):
            yield from rivals.drift(one, _is_guarded(examined, one.family), dockers, cure)
    for wanted in view.leased:
        if wanted.family in refused:
            yield from rivals.no_guard(wanted.family, refused[wanted.family])


def _refused_guards(daemon: Mapping[str, Any]) -> dict[Family, str]:
    """Which guards the daemon could not make, and why: a look alone does not try."""
    try:
        said = {Family(one["family"]): one["why_not"] for one in daemon.get("guard", ())}
    except (KeyError, TypeError, ValueError):
        return {}
    return {
        family: why for family, why in said.items() if why not in (None, "off", "to be written")
    }


def _is_guarded(examined: Examined, family: Family) -> bool:
    """Whether the guard is in place as it should be."""
    where = (family, Backend.GUARD)
    there = any(
        (one.family, one.backend) == where and one.postrouting for one in examined.view.rulesets
    )
    return there and not any((one.family, one.backend) == where for one in examined.view.plan)


def _rules(examined: Examined) -> Found:
    """What the rules of this node can do to cluster traffic, whoever wrote them."""
    settings = examined.settings
    for wanted in examined.leased:
        hooks, types = examined.hooks(wanted.family, NAT), examined.types(wanted.family)
        found = suspects.suspects_of(wanted, settings.marks, Hooks(wanted.family, hooks), types)
        yield from _suspects(examined, found, hooks)


def _suspects(examined: Examined, found: suspects.Suspects, hooks: tuple[Hook, ...]) -> Found:
    wanted, settings = found.desired, examined.settings
    yield from flannel_rules(hooks, wanted, {_where(one) for one in found.rules})
    # What is told already, with a remedy of its own, is not told again.
    known = {
        *early_rules(hooks, wanted),
        *(where for one in examined.view.plan for where in rivals.replaced(one)),
    }
    off = settings.policy.guard is GuardPolicy.OFF
    dockers = read_dockers(examined.programs)
    not_by = ("Docker",) if dockers and not any(one.masquerades()[0] for one in dockers) else ()
    others = _others(found.rules, known)
    yield from rivals.can_snat(wanted, others, settings.marks, guard_off=off, not_by=not_by)
    if _is_guarded(examined, wanted.family):
        yield from rivals.before_guard(found.earlier)
        would = rewriters(without_guard(hooks), found.packets)
        known |= {where for one in found.rules if (where := _where(one))}
        yield from rivals.only_guarded(wanted, _others(would, known), not_by)
    if not off:
        yield from rivals.marks(hooks, settings.masquerade_marks)


def _inbound(examined: Examined) -> Found:
    """What they can do to what other nodes' containers send to this node's."""
    for one in examined.reached:
        wanted = one.leased
        hooks, types = examined.hooks(wanted.family, NAT), examined.types(wanted.family)
        links = examined.node.links if examined.node else ()
        addresses = [address.ip for link in links for address in link.addresses]
        own = [address for address in addresses if address in wanted.subnet]
        packets = [
            inbound_packet(wanted, one.bridge, leg.device, leg.networks, own, types)
            for leg in one.legs
        ]
        found = [answer for packet in packets for answer in rewriters(hooks, (packet,))]
        told_of = early_rules(hooks, wanted)
        yield from rivals.inbound(wanted, _others(tuple(dict.fromkeys(found)), told_of))


def _where(answer: Answer) -> rivals.Where | None:
    place = answer.place
    return (place.table, place.chain, place.step.text) if place else None


def _others(answers: tuple[Answer, ...], known: Collection[rivals.Where]) -> list[Answer]:
    return [one for one in answers if _where(one) not in known]


def _backends(examined: Examined) -> Found:
    if examined.node is None:
        return
    for wanted in examined.leased:
        hooks = examined.hooks(wanted.family, NAT, FORWARD)
        yield from rivals.both_backends(wanted.family, hooks, examined.node.iptables_is)


def _programs(examined: Examined) -> Found:
    """How Docker, flannel and kube-proxy were started, and whether snatd was more than once."""
    there = examined.programs
    lease = examined.node.lease if examined.node else None
    for dockerd in read_dockers(there):
        yield from docker.file(dockerd)
        if isinstance(lease, Lease):
            yield from docker.masquerade(dockerd, lease, examined.leased)
            for family, leased in lease.families:
                of_family = examined.view.wanted.get(family)
                if isinstance(of_family, Desired):
                    yield from docker.bip(
                        dockerd, leased.gateway, of_family, by_cni=examined.by_cni
                    )
    for wanted in examined.leased:
        yield from docker.networks(examined.node.links if examined.node else (), wanted)
    if isinstance(lease, Lease):
        yield from _lease(examined.settings.subnet_file, there)
    for one in there:
        if one.name == programs.KUBE_PROXY:
            yield from programs.kube_proxy(one, _config_of(one), examined.leased)
    yield from programs.several_snatd(there)


def dockers_rules(examined: Examined) -> Found:
    """Asked before all others: what they would find comes of it, and is mended with it."""
    running = [one for one in read_dockers(examined.programs) if one.process is not None]
    if not (running and examined.node):
        return
    own = examined.node.iptables_is
    asked: dict[str, list[Hook]] = {"FORWARD": [], "nat PREROUTING": []}
    others: dict[str, list[Hook]] = {name: [] for name in asked}
    for name, kind in zip(asked, (FORWARD, DNAT), strict=True):
        for one in examined.hooks(Family.V4, kind):
            legacy = one.table.startswith("legacy ")
            mine = legacy is (own is Backend.LEGACY) or not iptables_of(one.table)[0]
            (asked if mine else others)[name].append(one)
    if any(one.unread for one in examined.rules_read.values()):
        return
    gone = [finding for one in running for finding in docker.rules_gone(one, asked, others, own)]
    # A dockerd that is about to start has none yet.
    if gone and _shown(examined, _DOCKER_UNIT).get("ActiveState") != "activating":
        yield from gone


def _lease(path: Path, there: tuple[programs.Process, ...]) -> Found:
    with suppress(OSError):
        file = os.stat(path)
        yield from programs.lease_of_flannel(
            there,
            str(path),
            age_s=time.time() - file.st_mtime,
            uptime_s=processes.uptime_s(),
            lasts=file.st_dev != os.stat(_VOLATILE).st_dev,
        )


def _config_of(one: programs.Process) -> str:
    """The file that a program was told to read, "" where there is none."""
    path = programs.options(one, ("config",)).get("config")
    with suppress(OSError, files.FileRefused):
        if path:
            content = files.read_bounded(Path(one.path(path)), _LARGEST_TEXT_BYTES)
            return content.decode(errors="replace")
    return ""


def _saved(examined: Examined) -> Found:
    """What the saved rules files would bring back."""
    settings, node = examined.settings, examined.node
    enforced = settings.mode == "enforce" and node is not None
    kept = {one.path for one in find(settings.saved_rules) if enforced}
    troubles: dict[str, str] = {}
    with suppress(*told.NOT_WHOLE):
        told_of = (_said(examined.word) or {}).get("saved_rules", ())
        troubles = {one["path"]: one["why"] for one in told_of if one["why"]}
    if node and settings.policy.backend not in (None, node.iptables_is):
        kept = set()
    for one in dict.fromkeys((*find(settings.saved_rules), *find("auto"))):
        try:
            content = files.read_bounded(one.path, LARGEST_FILE_BYTES)
            yield from boot.frozen_chains(str(one.path), content, kept=one.path in kept)
            wanted = examined.view.wanted.get(one.family)
            if isinstance(wanted, Desired) and node:
                edited = bring_in_line(content, wanted, node.iptables_is)
                there = str(one.path)
                trouble = troubles.get(there, "")
                yield from boot.saved_rules(there, edited, kept=one.path in kept, trouble=trouble)
        except FileNotFoundError:
            continue
        except (RuleError, files.FileRefused) as error:
            yield boot.not_understood(str(one.path), (str(error),))
        except OSError as error:
            yield boot.not_understood(str(one.path), (f"cannot be read: {error.strerror}",))
    for path in _SYSCONFIG:
        with suppress(OSError, files.FileRefused):
            text = files.read_bounded(path, _LARGEST_TEXT_BYTES).decode(errors="replace")
            yield from boot.saves_live_rules(str(path), text)


def _configuration(examined: Examined) -> Found:
    yield from boot.exclude_in_vain(examined.settings.exclude, examined.leased)
    if examined.complaints:
        yield boot.configuration_wrong(examined.complaints)
        return
    with suppress(*told.NOT_WHOLE):
        if (said := _said(examined.word)) and (refused := said["configuration_refused"]):
            yield boot.configuration_refused(refused["why"])


def _daemon(examined: Examined) -> Found:
    """Whether snatd itself runs, and will after the next boot."""
    word = examined.word
    shown = _shown(examined, boot.UNIT)
    if shown and os.access(_CHECK_ORDER, os.X_OK):
        circle = examined.tools.run([_CHECK_ORDER, "units"], examined.deadline)
        yield from boot.order_cycle(circle)
    yield from boot.unit(shown)
    if not word.counts:
        headline = told.document(word, status.SCHEMA)["status"]
        if word.life.runs is False:
            wanted = bool(examined.view.plan) or word.life is Life.GONE
            yield from boot.not_running(shown, headline, wanted=wanted)
        elif word.life.is_stale:
            yield from boot.not_answering(headline)
    off = examined.settings.policy.guard is GuardPolicy.OFF
    with suppress(*told.NOT_WHOLE):
        if said := _said(word):
            if fight := said["fights"]["now"]:
                yield rivals.fighting(fight, guard_off=off)
            else:
                yield from repaired_often(said["recent_repairs"], datetime.now(UTC), guard_off=off)
            yield from rivals.proved(said["proof"]["wrong"], guard_off=off)


# A status file with its repairs is 5 to 10 KiB.
_ROOM_BYTES = 16384


def _disks(examined: Examined) -> Found:
    """Whether snatd can keep what it knows."""
    settings = examined.settings
    for path, consequence in (
        (settings.runtime_dir, "`snatd status` has nothing to tell; the rules are looked after"),
        (settings.state_dir, "what snatd replaces from now on, `snatd revert` will not know"),
    ):
        with suppress(OSError):
            disk = os.statvfs(path)
            if disk.f_flag & os.ST_RDONLY:
                yield boot.no_room(str(path), os.strerror(errno.EROFS), consequence)
            elif disk.f_bfree * disk.f_frsize < _ROOM_BYTES or (disk.f_files and not disk.f_ffree):
                yield boot.no_room(str(path), os.strerror(errno.ENOSPC), consequence)


# What snatd is told, and what the node's other parts do, is nobody's undoing.
_OUR_OWN_CAUSES = {"start", "reload", "subnet_file", "link"}


def repaired_often(
    repairs: Sequence[Mapping[str, Any]], now: datetime, *, guard_off: bool
) -> Found:
    """`repairs`: of the status file, the newest first. Of each program, however it was started."""
    ages_s: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    for one in repairs:
        if _OUR_OWN_CAUSES.isdisjoint(one["trigger"].split(",")):
            # Whoever wrote legacy rules has no name.
            writers = [Writer(who["pid"], who["comm"], who["of"]) for who in one["writers"]]
            for program, name in ({who.program: str(who) for who in writers} or {"": ""}).items():
                names.setdefault(program, name)
                age_s = (now - datetime.fromisoformat(one["at"])).total_seconds()
                ages_s.setdefault(program, []).append(age_s)
    for program, of_one_s in ages_s.items():
        yield from rivals.often(of_one_s, names[program], guard_off=guard_off)


def _said(word: Word) -> dict[str, Any] | None:
    """What the daemon says of itself, as long as that counts."""
    return word.document if word.counts else None


def _shown(examined: Examined, unit: str) -> dict[str, str]:
    """What systemd says of a unit; nothing where there is no systemd."""
    if not _SYSTEMD.is_dir():
        return {}
    argv = ["systemctl", "show", f"--property={_PROPERTIES}", unit]
    said = examined.tools.run(argv, examined.deadline)
    pairs = (line.partition("=") for line in said.splitlines())
    return {key: value for key, _, value in pairs}


CHECKS: tuple[Callable[[Examined], Found], ...] = (
    _drift,
    _rules,
    _inbound,
    _backends,
    _programs,
    _saved,
    _configuration,
    _daemon,
    _disks,
)
