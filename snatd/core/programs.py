"""What programs beside snatd are told to do, by their arguments and files, as findings. Pure.

Docker has a file of its own. What programs write is `rivals`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from snatd.core.desired import Desired
from snatd.core.finding import Finding, Severity
from snatd.core.model import Network, count, join
from snatd.core.networks import contains, network

FLANNELD, KUBE_PROXY = "flanneld", "kube-proxy"
# flannel is a part of these.
K3S = ("k3s", "k3s-server", "k3s-agent")

# A start of flanneld ends in a new subnet.env within seconds, unless it cannot reach its store.
_TIME_TO_WRITE_S, _SLACK_S = 10.0, 60.0


@dataclass(frozen=True)
class Process:
    """A program that runs in this network namespace. `name`: its first 15 bytes, as the kernel has
    it. `age_s`: since its start."""

    pid: int
    name: str
    arguments: tuple[str, ...] = ()
    age_s: float = 0.0
    parent: int = 0

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"

    @property
    def words(self) -> tuple[str, ...]:
        """What stands behind its own name; in front of that may be an interpreter."""
        for number, word in enumerate(self.arguments):
            if word.rpartition("/")[2][:15] == self.name:
                return self.arguments[number + 1 :]
        return self.arguments[1:]

    def path(self, path: str) -> str:
        """Where a file of this program is to be found, whatever it has mounted."""
        return f"/proc/{self.pid}/{'root' if path.startswith('/') else 'cwd/'}{path}"


def options(
    program: Process, valued: Sequence[str], flags: Sequence[str] = (), short: str = ""
) -> dict[str, str]:
    """What a program written in Go was told: each of the options named, the last word on it.

    `valued` take a value, `flags` only by `=` and mean true without (flag and pflag both). One
    letter, `short`, stands for the first of `valued`.
    """
    found: dict[str, str] = {}
    todo = list(program.words)
    while todo:
        word = todo.pop(0)
        if word == "--":
            break
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not name:
            continue
        if short and word.startswith(f"-{short}") and name not in (*valued, *flags):
            name, value = valued[0], word[2:].removeprefix("=")
            equals = value
        if name in flags:
            found[name] = value if equals else "true"
        elif name in valued and (equals or todo):
            found[name] = value if equals else todo.pop(0)
    return found


def boolean(text: str) -> bool | None:
    """As Go's strconv.ParseBool reads it; None for what it refuses."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    return False if text in ("0", "f", "F", "FALSE", "false", "False") else None


def lease_of_flannel(
    processes: Iterable[Process],
    path: str,
    age_s: float,
    uptime_s: float,
    *,
    lasts: bool,
) -> Iterator[Finding]:
    """Whether who leased the subnet still stands by it. `age_s`: of the file; `lasts`: it would
    outlive a boot."""
    flanneld = [one for one in processes if one.name == FLANNELD]
    if age_s > uptime_s:
        # A file in memory that is older than the boot: the clock was set since, and tells nothing.
        if lasts:
            yield _old_lease(
                (f"{path} was written {ago(age_s)}, and this node booted {ago(uptime_s)}",)
            )
    else:
        for one in flanneld:
            if one.age_s > _TIME_TO_WRITE_S and age_s > one.age_s + _SLACK_S:
                yield _old_lease(
                    (f"{path} was written {ago(age_s)}, and {one} started {ago(one.age_s)}",)
                )
    for one in flanneld:
        where = options(one, ("subnet-file",)).get("subnet-file")
        if where not in (None, path):
            yield Finding(
                "other_subnet_file",
                Severity.WARNING,
                "flanneld writes its lease to another file than the one that snatd reads",
                (f"{one}: --subnet-file {where}", f"subnet_file = {path}"),
                "snatd does not learn of a lease that changes",
                (f'# subnet_file = "{where}" in snatd.toml, then:', "systemctl reload snatd"),
            )
    if not any(one.name in (FLANNELD, *K3S) for one in processes):
        yield Finding(
            "flanneld_missing",
            Severity.INFO,
            "nothing that is flannel runs in this network namespace",
            (f"{path} is there; no process flanneld or k3s",),
            "routes to nodes that join or move stay as they are, if nobody else sets them",
            ("systemctl start flanneld  # or as flannel is started on this node",),
        )


def _old_lease(evidence: tuple[str, ...]) -> Finding:
    return Finding(
        "lease_old",
        Severity.WARNING,
        "the lease in subnet.env is older than the program that should have renewed it",
        evidence,
        "flanneld writes it at each start, after its rules; it hangs, or this is another lease",
        ("journalctl -u flanneld", "systemctl restart flanneld"),
    )


def kube_proxy(one: Process, config: str, leased: Iterable[Desired]) -> Iterator[Finding]:
    """`config`: the text of the file that it was given; its arguments do not count then."""
    said = options(one, ("cluster-cidr", "detect-local-mode", "config"), ("masquerade-all",))
    if "config" in said:
        said = {"config": said["config"], **_of_yaml(config)}
    where = f"{one}{', ' + said['config'] if 'config' in said else ''}"
    if boolean(said.get("masquerade-all", "false")):
        yield Finding(
            "masquerade_all",
            Severity.WARNING,
            "kube-proxy masquerades all that goes to a service",
            (f"{where}: masquerade-all is true",),
            "a container that is called by a service sees the node and not the caller; "
            "it asks for that by its mark, which snatd respects",
            ("# start kube-proxy without --masquerade-all (masqueradeAll: false)",),
        )
    mode = said.get("detect-local-mode") or "ClusterCIDR"
    networks = [found for part in said.get("cluster-cidr", "").split(",") if (found := _cidr(part))]
    for wanted in leased if mode == "ClusterCIDR" else ():
        same = [found for found in networks if found.version == wanted.family.version]
        if same and not any(contains(found, wanted.subnet) for found in same):
            yield Finding(
                "cluster_cidr",
                Severity.WARNING,
                "kube-proxy takes this node's containers for strangers",
                (
                    f"{where}: cluster-cidr is {said['cluster-cidr']}",
                    f"this node's subnet is {wanted.subnet}",
                ),
                "what they send to a service is marked for masquerade, so they lose their address",
                (f"# start kube-proxy with --cluster-cidr={join(wanted.cluster)}",),
            )


def _of_yaml(text: str) -> dict[str, str]:
    """The three keys that count. kube-proxy's files are generated, one plain scalar a line."""
    found: dict[str, str] = {}
    for name, key in (
        ("cluster-cidr", "clusterCIDR"),
        ("detect-local-mode", "detectLocalMode"),
        ("masquerade-all", "masqueradeAll"),
    ):
        for value in re.findall(rf'^ *{key}: *"?([^\s"#]*)', text, re.MULTILINE):
            # Of iptables' and nftables' keys the one that is set says what is done.
            found[name] = value if found.get(name) != "true" else "true"
    return found


def _cidr(text: str) -> Network | None:
    try:
        return network(text.strip(), strict=False)
    except ValueError:
        return None


def several_snatd(processes: Iterable[Process]) -> Iterator[Finding]:
    """More than one daemon; each has a lock of its own where their runtime_dir differs."""
    daemons = [one for one in processes if one.name == "snatd" and one.words[:1] == ("run",)]
    pids = {one.pid for one in daemons}
    daemons = [one for one in daemons if one.parent not in pids]
    if len(daemons) > 1:
        yield Finding(
            "several_snatd",
            Severity.WARNING,
            f"{count(len(daemons), 'snatd')} run in one network namespace",
            tuple(f"{one}: {' '.join(one.arguments)}" for one in daemons),
            "with different configurations each undoes what the other does",
            ("# stop all but one; `systemctl status PID` says what each belongs to",),
        )


_UNITS: Mapping[str, float] = {"days": 86400, "h": 3600, "min": 60}


def ago(seconds: float) -> str:
    """`3.2 h ago`."""
    for unit, length_s in _UNITS.items():
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.1f} {unit} ago"
    return f"{seconds:.0f} s ago"
