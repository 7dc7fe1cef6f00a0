"""What the next boot, or a restart of a firewall, brings back: saved rules files, and the order in
which systemd starts things. As findings. Pure.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from snatd.core.desired import Desired
from snatd.core.finding import Finding, Severity
from snatd.core.model import Network, count, join
from snatd.core.networks import overlaps
from snatd.core.plan import Change
from snatd.core.saved import Edited, dynamic_chains

UNIT = "snatd.service"
# The exit status of a daemon whose configuration will not do.
_REFUSED = "78"
# What starts containers. snatd.service is ordered before them.
_RUNTIMES = {
    *("docker.service", "containerd.service", "crio.service", "kubelet.service", "k3s.service"),
}
_EXPORT = r"\s*(export\s+)?"
_SAVES = re.compile(rf"{_EXPORT}(?P<key>IP6?TABLES_SAVE_ON_(?:STOP|RESTART))=(?P<value>\S*)")


def frozen_chains(path: str, content: bytes, *, kept: bool) -> Iterator[Finding]:
    """`kept`: whether snatd may write this file."""
    chains = dynamic_chains(content)
    if chains:
        yield Finding(
            "frozen_chains",
            Severity.WARNING,
            "a saved rules file holds chains that their owners make anew",
            (f"{path}: {count(len(chains), 'chain')}: {join(chains, 12)}",),
            "they come back stale at the next boot or restart of the firewall: addresses of "
            "containers that are gone, and rules in an order that nobody meant",
            ("snatd save --full --without-dynamic", "# all other live rules are saved with it")
            if kept
            else (f"# take them and the rules that jump to them out of {path}",),
        )


def saves_live_rules(path: str, text: str) -> Iterator[Finding]:
    """`text`: of iptables-config or ip6tables-config, which a shell reads; its last word counts."""
    said: dict[str, tuple[str, int, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := _SAVES.match(line):
            said[match["key"]] = (match["value"].strip("\"'"), number, line.strip())
    for key, (value, number, line) in said.items():
        if value == "yes":
            yield Finding(
                "saves_live_rules",
                Severity.WARNING,
                "the firewall's service saves all live rules when it stops",
                (f"{path} line {number}: {line}",),
                "Docker's, Kubernetes' and CNI's rules are frozen with the others, and come back "
                "stale",
                (shlex.join(["sed", "-i", "-E", f's/^{_EXPORT}{key}=.*/{key}="no"/', path]),),
            )


def saved_rules(path: str, edited: Edited, *, kept: bool, trouble: str = "") -> Iterator[Finding]:
    """`edited`: what snatd would make of the file; `kept`: whether it may; `trouble`: why the
    daemon left it alone."""
    remedy: tuple[str, ...] = ("snatd save",)
    if trouble:
        remedy = ("# mend that as it says, then:", "snatd save")
    elif not kept:
        remedy = (
            '# saved_rules = "auto" and mode = "enforce" in snatd.toml, then:',
            "snatd save",
            f"# or take that line out of {path}",
        )
    reasons = {reason.change for one in edited.transactions for reason in one.reasons}
    if Change.NARROWED in reasons:
        yield Finding(
            "saved_broad_rule",
            Severity.WARNING,
            "a saved rules file holds a rule that hides containers",
            (
                *(f"{path}: {line}" for line in edited.removed),
                *((f"the daemon leaves it alone: {trouble}",) if trouble else ()),
            ),
            "it is in force again after the next boot or restart of the firewall, until it is "
            "mended there",
            remedy,
        )
    if edited.doubts:
        yield not_understood(path, edited.doubts)


def not_understood(path: str, doubts: Collection[str]) -> Finding:
    return Finding(
        "saved_not_understood",
        Severity.WARNING,
        "a saved rules file may hide containers, and snatd cannot read it for certain",
        tuple(f"{path}: {doubt}" for doubt in doubts),
        "what it says is in force again after the next boot or restart of the firewall",
        (
            "# write it as iptables-save does; whether it would load says:",
            f"iptables-restore --test {shlex.quote(path)}",
        ),
    )


def order_cycle(units: str) -> Iterator[Finding]:
    """`units`: those in a circle with snatd.service, "" where there is none."""
    if units.strip():
        yield Finding(
            "order_cycle",
            Severity.WARNING,
            "the order of these units is a circle",
            (units.strip(),),
            "at the next boot systemd leaves some of them out: the saved rules, Docker or snatd",
            (
                # Of some hundred lines the files and what they say of the order.
                f"{shlex.join(['systemctl', 'cat', *units.split()])} | grep -E '^(# /|After=)'",
                "# take out the After= that makes the circle, mostly that of iptables.service or "
                "netfilter-persistent.service on docker.service, then:",
                "systemctl daemon-reload",
            ),
        )


def is_unit(shown: Mapping[str, str]) -> bool:
    """Whether systemd knows snatd.service."""
    return shown.get("LoadState") in ("loaded", "masked")


def unit(shown: Mapping[str, str]) -> Iterator[Finding]:
    """`shown`: what `systemctl show` says of snatd.service."""
    if not is_unit(shown):
        return
    state = shown.get("UnitFileState", "")
    if state in ("disabled", "masked", "masked-runtime", "enabled-runtime"):
        unmask = (f"systemctl unmask {UNIT}",) if state.startswith("masked") else ()
        yield Finding(
            "not_enabled",
            Severity.WARNING,
            "snatd does not start at the next boot",
            (f"{UNIT}: {state}",),
            "then there is no guard, and Docker's rule hides containers",
            (*unmask, f"systemctl enable {UNIT}"),
        )
    if shown.get("NRestarts", "0") != "0":
        yield Finding(
            "restarted",
            Severity.INFO,
            "systemd had to start the daemon again",
            (f"{UNIT}: NRestarts={shown['NRestarts']}",),
            "it was killed, ended by itself or could not start; rules and guard stay as they are "
            "meanwhile",
            (f"journalctl -n 50 -u {UNIT}",),
        )
    late = sorted(_RUNTIMES & set(shown.get("After", "").split()))
    if late and not set(late) & set(shown.get("Before", "").split()):
        yield Finding(
            "starts_late",
            Severity.WARNING,
            "snatd starts after what starts containers",
            (f"{UNIT}: After={' '.join(late)}",),
            "connections that begin before the guard is there are masqueraded for as long as they "
            "live",
            (f"systemctl cat {UNIT}", f"systemctl revert {UNIT}"),
        )


def not_running(shown: Mapping[str, str], headline: str, *, wanted: bool) -> Iterator[Finding]:
    """`headline`: what `snatd status` says of it. `wanted`: there is something to be done, or it
    did not end in order. Without that and without a unit it is no fault, since `snatd apply` may be
    all that is wanted."""
    evidence = headline
    remedy: tuple[str, ...] = ("snatd run",)
    if is_unit(shown):
        if shown.get("ActiveState") not in ("inactive", "failed", "deactivating"):
            return
        result = shown.get("Result", "")
        why = "" if result == "success" else f", {result} ({shown.get('ExecMainStatus')})"
        evidence = f"{UNIT}: {shown['ActiveState']}{why}"
        remedy = (f"systemctl restart {UNIT}", f"journalctl -u {UNIT}")
        if shown.get("ExecMainStatus") == _REFUSED:
            says = "# says what is wrong with its configuration, or with what that names"
            remedy = (f"journalctl -n 20 -u {UNIT}  {says}", f"systemctl restart {UNIT}")
    elif not wanted:
        return
    yield Finding(
        "not_running",
        Severity.WARNING,
        "the daemon does not run",
        (evidence,),
        "nobody mends what others write; a guard that is there stays",
        remedy,
    )


def no_room(path: str, why: str, consequence: str) -> Finding:
    """A directory of snatd's own that takes nothing."""
    return Finding(
        "no_room",
        Severity.WARNING,
        f"snatd cannot write to {path}",
        (why,),
        consequence,
        (
            f"df -h {shlex.quote(path)}",
            f"df -i {shlex.quote(path)}",
            "# make room, or have it mounted writable",
        ),
    )


def not_answering(headline: str) -> Iterator[Finding]:
    """`headline`: what `snatd status` says of it."""
    yield Finding(
        "not_answering",
        Severity.WARNING,
        "the daemon does not answer",
        (headline,),
        "nobody mends what others write; a guard that is there stays",
        ("snatd status", f"systemctl restart {UNIT}"),
    )


def configuration_wrong(complaints: Sequence[str]) -> Finding:
    """`complaints`: about the file that this very command read."""
    return Finding(
        "configuration_wrong",
        Severity.ERROR,
        "snatd does not start or reload with its configuration",
        tuple(complaints),
        "what else is told here is by its other keys and the defaults",
        ("# correct it; `snatd check` says what is wrong", "systemctl reload-or-restart snatd"),
    )


def exclude_in_vain(excluded: Iterable[Network], leased: Sequence[Desired]) -> Iterator[Finding]:
    """Of the families that are leased."""
    for one in leased:
        outside = [
            network
            for network in excluded
            if network.version == one.subnet.version
            and not any(overlaps(network, inside) for inside in one.cluster)
        ]
        if outside:
            yield Finding(
                "exclude_in_vain",
                Severity.WARNING,
                "`exclude` names what is in none of the networks anyway",
                (f"exclude: {join(outside)}", f"the networks: {join(one.cluster)}"),
                "what was meant is not masqueraded",
                ("# correct `exclude` in snatd.toml, then:", "systemctl reload snatd"),
            )


def configuration_refused(why: Sequence[str]) -> Finding:
    """`why`: what was wrong with the file when the daemon was told to read it."""
    restart = any("systemctl restart snatd" in one for one in why)
    return Finding(
        "configuration_refused",
        Severity.WARNING,
        "the daemon runs with an older configuration than the file's",
        tuple(why),
        "it refused the file when it was told to read it again, and has not been told since",
        (
            "# mend what was found, then:",
            # What keeps it from a file may be its unit.
            "systemctl restart snatd" if restart else "systemctl reload snatd",
        ),
    )
