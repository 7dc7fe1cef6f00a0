"""What `doctor` makes of other programs' rules, arguments, files and units."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import chdir
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from snatd.core import boot, docker, programs, rivals
from snatd.core.desired import CutOut
from snatd.core.docker import Docker
from snatd.core.finding import Finding, Severity, some
from snatd.core.flannel_rules import early_rules, flannel_rules
from snatd.core.model import Hold
from snatd.core.plan import plan
from snatd.core.programs import Process
from snatd.core.trace import cluster_packets, rewriters
from snatd.core.xtables import iptables_of
from snatd.doctor_rivals import _refused_guards, repaired_often
from snatd.host.docker import read_dockers
from snatd.host.processes import find
from tests.fakes import BROAD, LEGACY, NFT, OURS, V4, V6, lease, link, listed, node, wish
from tests.unit.tracing import nft_hook, xtables_hook

WANTED = wish()
WAITS = replace(WANTED, bridge=Hold("no device yet"))
ON_CNI0 = replace(WANTED, bridge="cni0")
GATEWAY = ip_interface("172.7.21.1/24")


def one(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    return finding


def called(*arguments: str, name: str = "dockerd") -> Process:
    return Process(7, name, (f"/usr/bin/{name}", *arguments))


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bip=1", "--ip-masq=false"], {"bip": "1", "ip-masq": "false"}),
        (["--bip", "1", "--ip-masq", "false"], {"bip": "1", "ip-masq": "true"}),
        (["-bip=1", "-ip-masq"], {"bip": "1", "ip-masq": "true"}),
        (["-b", "none"], {"bridge": "none"}),
        (["-b=none"], {"bridge": "none"}),
        (["-bnone"], {"bridge": "none"}),
        (["--bridge", "none", "-b=br1"], {"bridge": "br1"}),
        (["--bip=1", "--bip=2"], {"bip": "2"}),
        (["--", "--bip=1"], {}),
        (["--bip"], {}),
        (["--bip="], {"bip": ""}),
        (["--bipx=1", "bip=1", "-", "---", "", "--=", "-H", "fd://"], {}),
    ],
)
def test_arguments(arguments: list[str], expected: dict[str, str]) -> None:
    found = programs.options(called(*arguments), ("bridge", "bip"), ("ip-masq",), "b")
    assert found == expected


def test_the_words_behind_a_programs_name() -> None:
    for arguments, words in (
        (("/usr/bin/snatd", "run"), ("run",)),
        (("/usr/bin/python3", "-I", "/usr/bin/snatd", "run"), ("run",)),
        (("renamed", "run"), ("run",)),
        ((), ()),
    ):
        assert Process(1, "snatd", arguments).words == words
    long = Process(1, "dockerd-current"[:15], ("/bin/dockerd-current-of-old", "-b"))
    assert long.words == ("-b",)


@pytest.mark.parametrize(("text", "value"), [("T", True), ("0", False), ("yes", None), ("", None)])
def test_booleans(text: str, value: bool | None) -> None:
    assert programs.boolean(text) is value


def test_who_is_dockers_daemon() -> None:
    assert docker.is_daemon(called())
    assert docker.is_daemon(called(name="dockerd-current"))
    for words, daemon in ((["daemon"], True), (["-d"], True), (["run", "-d"], False), ([], False)):
        assert docker.is_daemon(called(*words, name="docker")) is daemon


# Docker.


def dockerd(*arguments: str, **file: Any) -> Docker:
    file = {name.replace("_", "-"): value for name, value in file.items()}
    return Docker(called(*arguments), "/etc/docker/daemon.json", file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"bip": "172.7.21.1/24",}', "line 1 column"),
        (b"[]", "not a JSON object"),
        (b'{"ip-masq": "no"}', '"ip-masq" is not true or false: "no"'),
        (b'{"bip": 1}', '"bip" is not a string: 1'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"bip": 1' + b"0" * 5000 + b"}", "integer string conversion"),
        (b"\x00\xff", "Expecting value"),
        (b"x" * (1 << 21), "larger than 1024 KiB"),
        (b"", ""),
        (b" \n", ""),
        (b'\xef\xbb\xbf{"log-driver": "journald"}', ""),
    ],
)
def test_a_file_that_docker_refuses(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "daemon.json"
    path.write_bytes(content)
    process = called("--config-file", str(path))
    (found,) = read_dockers([replace(process, pid=os.getpid())])
    assert (found.path, bool(found.refused)) == (str(path), bool(why))
    assert why in found.refused
    assert [finding.name for finding in docker.file(found)] == ["docker_config"] * bool(why)


def test_a_file_of_docker_that_is_none(tmp_path: Path) -> None:
    here = replace(called("--config-file=daemon.json"), pid=os.getpid())
    with chdir(tmp_path):
        (found,) = read_dockers([here])
        assert found.refused == ""
        os.mkfifo("daemon.json")
        (found,) = read_dockers([here])
        assert found.refused == "not a regular file"
    (found,) = read_dockers([replace(here, arguments=("dockerd", "--config-file=/dev/null"))])
    assert found.refused == "not a regular file"


@pytest.mark.parametrize(
    ("one", "masquerades", "why"),
    [
        (dockerd(), True, "dockerd (pid 7): --ip-masq is not given, so it is on"),
        (dockerd("--ip-masq=F"), False, "dockerd (pid 7): --ip-masq=F"),
        (dockerd("--ip-masq=nonsense"), True, "dockerd (pid 7): --ip-masq=nonsense"),
        (dockerd(ip_masq=False), False, '/etc/docker/daemon.json: "ip-masq": false'),
        (dockerd("--ip-masq", iptables=False), False, '/etc/docker/daemon.json: "iptables": false'),
    ],
)
def test_whether_docker_masquerades(one: Docker, masquerades: bool, why: str) -> None:
    assert one.masquerades() == (masquerades, why)


@pytest.mark.parametrize(
    ("one", "wanted", "by_cni", "severity"),
    [
        (dockerd("--bip=172.7.21.1/24"), WANTED, False, None),
        (dockerd(), WANTED, False, None),
        (dockerd("--bip=172.7.21.2/24"), WANTED, False, Severity.WARNING),
        (dockerd(bip="172.7.33.1/24"), WANTED, False, Severity.WARNING),
        (dockerd(bip="nonsense"), WANTED, False, Severity.WARNING),
        # Somebody else's bridge has the lease: Docker may have what it likes.
        (dockerd(bip="172.17.0.1/16"), ON_CNI0, False, None),
        (dockerd("-b", "cni0"), ON_CNI0, False, None),
        (dockerd("-b", "none"), WAITS, False, None),
        (dockerd(), WAITS, False, Severity.WARNING),
        (dockerd(), WAITS, True, None),
        (dockerd(bip="172.7.33.1/24"), WAITS, True, None),
        (dockerd(bip="172.7.33.1/24"), WAITS, False, Severity.ERROR),
        (Docker(None, "/x", {}), WAITS, False, None),
        (Docker(None, "/x", {"bip": "172.7.33.1/24"}), WANTED, False, Severity.WARNING),
    ],
)
def test_dockers_bip(one: Docker, wanted: Any, by_cni: bool, severity: Severity | None) -> None:
    found = list(docker.bip(one, GATEWAY, wanted, by_cni=by_cni))
    assert [finding.severity for finding in found] == ([severity] if severity else [])


def test_dockers_bip6() -> None:
    v6 = wish(
        node(lease("fd00:7:21::1/64", "fd00:7::/32", V6), link(3, "docker0", "fd00:7:21::1/64")),
        family=V6,
    )
    gateway = ip_interface("fd00:7:21::1/64")
    assert not list(docker.bip(dockerd(), gateway, replace(v6, bridge=Hold("")), by_cni=False))
    found = one(docker.bip(dockerd(bip6="fd00:7:33::1/64"), gateway, v6, by_cni=False))
    assert found.evidence[1] == "subnet.env: FLANNEL_IPV6_SUBNET=fd00:7:21::1/64"


def test_dockers_networks() -> None:
    links = (
        link(3, "docker0", "172.7.21.1/24"),
        link(4, "br-0123456789ab", "172.7.99.1/24 fe80::1/64"),
        link(5, "br-fedcba987654", "172.18.0.1/16"),
        link(6, "br-lan", "172.7.98.1/24"),
        link(7, "docker_gwbridge", "172.0.0.1/8"),
    )
    found = list(docker.networks(links, WANTED))
    assert [finding.evidence[0].split()[0] for finding in found] == [
        "br-0123456789ab",
        "docker_gwbridge",
    ]
    # docker0 is one of them only where another device has the lease.
    docker0 = [link(3, "docker0", "172.7.0.1/16")]
    assert not list(docker.networks(docker0, WAITS))
    assert one(docker.networks(docker0, ON_CNI0)).remedy[1] == "systemctl restart docker"


# Rules.


def test_a_rules_deletion_is_safe_in_a_shell() -> None:
    evil = r'''"a\"b $(reboot) `x` \\ it\'s"'''
    text = f"! -s 10.0.0.0/8 -m comment --comment {evil} -j MASQUERADE"
    command = rivals.rule_command("iptables-nft", "-D", "POSTROUTING", text)
    assert shlex.split(command) == [
        *("iptables-nft", "-t", "nat", "-D", "POSTROUTING", "!", "-s", "10.0.0.0/8"),
        *("-m", "comment", "--comment", "a\"b $(reboot) `x` \\ it's", "-j", "MASQUERADE"),
    ]


def test_evidence_of_a_broad_rule() -> None:
    (drift,) = plan(WANTED, {NFT: listed(f"-A POSTROUTING {BROAD}")}, NFT)
    found = one(rivals.drift(drift, False, [dockerd(ip_masq=False)], ("cure",)))
    assert found.severity is Severity.ERROR
    assert found.evidence == (
        f"iptables-nft -t nat: -A POSTROUTING {BROAD} (as Docker writes it)",
        '/etc/docker/daemon.json: "ip-masq": false, so dockerd will not write it again',
    )
    assert found.remedy == ("cure",)
    # One command; what stops Docker from writing it is there to read.
    cure, source = one(rivals.drift(drift, False, [dockerd()], ("cure",))).remedy
    assert (cure, source[0]) == ("cure", "#")
    assert '"ip-masq": false' in source
    assert one(rivals.drift(drift, True, [], ())).severity is Severity.WARNING
    assert rivals.replaced(drift) == (("ip nat", "POSTROUTING", BROAD),)
    # An operator's: dockerd has nothing to do with it.
    by_hand = BROAD.replace("! -o docker0", "-o eth0")
    (drift, *_) = plan(WANTED, {LEGACY: listed(f"-A POSTROUTING {by_hand}", backend=LEGACY)}, NFT)
    found = one(rivals.drift(drift, True, [dockerd()], ()))
    assert found.evidence == (f"iptables-legacy -t nat: -A POSTROUTING {by_hand}",)


def test_a_stale_rule_of_ours_is_nobody_elses() -> None:
    old = OURS.replace("172.7.21", "172.7.33")
    (drift,) = plan(WANTED, {NFT: listed(f"-A POSTROUTING {old}")}, NFT)
    assert rivals.replaced(drift) == ()
    names = [finding.name for finding in rivals.drift(drift, True, [], ())]
    assert names == ["stale_rule"]


def answers(*hooks: Any) -> Any:
    return rewriters(hooks, cluster_packets(WANTED, 0x6000))


def test_remedies_know_the_writer() -> None:
    hooks = (
        xtables_hook("-s 172.7.0.0/16 -j IP-MASQ-AGENT\nIP-MASQ-AGENT -j MASQUERADE"),
        xtables_hook("-o eth0 -j MASQUERADE\n-o eth1 -j SNAT --to-source 1.2.3.4", "legacy ip nat"),
        nft_hook("ip-docker-bridges"),
    )
    (found,) = rivals.only_guarded(WANTED, answers(*hooks))
    assert "# put the cluster network into its list nonMasqueradeCIDRs" in found.remedy
    assert found.remedy[1].startswith("# nothing, as long as the guard stands: legacy ip nat POST")
    assert found.severity is Severity.INFO
    hides = answers(xtables_hook("-j MASQUERADE"))
    certain = one(rivals.can_snat(WANTED, hides, 0x6000, guard_off=False))
    assert certain.severity is Severity.ERROR
    # Not what the bridge brings back, nor what asks for masquerade by a mark.
    of_others = "'!' -o docker0 -m mark --mark 0x0/0x6000"
    keep = f"POSTROUTING -s 172.7.21.0/24 -d 172.7.0.0/16 {of_others} -j ACCEPT"
    mended = f"iptables-nft -t nat -D {keep} 2>/dev/null || true; iptables-nft -t nat -I {keep}"
    assert certain.remedy == (mended,)
    first, second = one(rivals.can_snat(WANTED, hides, 0x6000, guard_off=True)).remedy
    assert first.startswith('# guard = "auto" in snatd.toml')
    assert second == mended
    # Part of the network has to be masqueraded as before.
    cut = CutOut(ip_network("172.7.99.0/24"), "it is on eth1")
    for wanted in (replace(WANTED, cut_outs=(cut,)), WAITS):
        (line,) = one(rivals.can_snat(wanted, hides, 0, guard_off=False)).remedy
        assert line.startswith("# whose it is")


def test_of_each_program_that_is_repaired_often() -> None:
    """One of a session, which has another number each time, and one without a name."""
    now = datetime(2026, 11, 28, 4, 0, tzinfo=UTC)

    def repairs(*writers: str, trigger: str = "nft") -> list[dict[str, Any]]:
        return [
            {
                "at": (now - timedelta(seconds=2 + 20 * number)).isoformat(),
                "trigger": trigger,
                "writers": [{"pid": 900 - number, "comm": comm, "of": f"run-{number}.scope"}]
                if comm
                else [],
            }
            for number, comm in enumerate(writers)
        ]

    def told(some: list[dict[str, Any]]) -> list[str]:
        found = repaired_often(some, now, guard_off=False)
        return [" | ".join(one.evidence) for one in found]

    six = "6 repairs in 100 s, the last 2 s ago"
    wrote = "iptables (pid 900) of run-0.scope wrote before"
    assert told(repairs(*["iptables"] * 6)) == [f"{six} | {wrote}"]
    assert told(repairs(*[""] * 6, trigger="xtables_lock")) == [six]
    assert not told(repairs(*["iptables", "nft"] * 3)), "three of each are not often"
    assert not told(repairs(*["iptables"] * 6, trigger="nft,reload"))


def test_repairs_that_come_too_often() -> None:
    ages_s = [2.0, 5.0, 8.0, 11.0, 300.0]
    found = one(rivals.often(ages_s, "iptables of rival.service", guard_off=False))
    assert (found.name, found.severity) == ("repaired_often", Severity.WARNING)
    assert found.evidence == (
        "5 repairs in 298 s, the last 2 s ago",
        "iptables of rival.service wrote before",
    )
    assert list(rivals.often([*ages_s[:-1], 301.0], "", guard_off=False))
    assert not list(rivals.often(ages_s[1:-1], "", guard_off=False))
    # As long ago as that nobody undoes them again and again.
    assert not list(rivals.often([one + 100 for one in ages_s[:-1]], "", guard_off=False))
    # A service that writes several times as it starts, and somebody's flush.
    assert not list(rivals.often([2.0, 60.0, 60.3, 60.9, 62.0], "", guard_off=False))
    assert not list(rivals.often((), "", guard_off=False))


def test_who_is_fought_with_is_what_the_remedy_is_about() -> None:
    fight = {"with": "nft (pid 25) of rival.service, iptables (pid 43)", "repairs": 9, "since": "x"}
    assert rivals.fighting(fight, guard_off=False).remedy == (
        "journalctl -x SNATD_EVENT=fighting",
        "systemctl status rival.service  # keep it from that",
    )
    for known in ("iptables (pid 43)", "iptables (pid 43) of docker.service"):
        assert "ip-masq" in rivals.fighting(fight | {"with": known}, guard_off=False).remedy[-1]


def test_a_datagram_outweighs_the_rules() -> None:
    assert not list(rivals.proved([], guard_off=False))
    found = one(rivals.proved(["172.7.22.1 sees 10.4.7.21"], guard_off=True))
    assert (found.name, found.severity) == ("not_kept", Severity.ERROR)
    assert found.evidence == ("172.7.22.1 sees 10.4.7.21",)


def test_marks_of_several_bits() -> None:
    hook = xtables_hook(
        "-j KUBE-POSTROUTING\n-j OTHER\n"
        "KUBE-POSTROUTING -m mark ! --mark 0x5000/0x5000 -j RETURN\n"
        "OTHER -m mark --mark 0x8/0x8 -j RETURN"
    )
    found = one(rivals.marks([hook], (0x4000, 0x2000)))
    assert found.remedy[0] == (
        '# masquerade_marks = ["0x1000", "0x2000", "0x4000"] in snatd.toml, then:'
    )
    assert not list(rivals.marks([hook], (0x4000, 0x1000)))


def test_long_lists_are_cut() -> None:
    assert some([str(n) for n in range(10)], 8, "# ")[-1] == "# and 2 more"
    assert len(some([str(n) for n in range(8)], 8)) == 8
    assert some(["a", "b", "a"]) == ("a", "b")


# flannel's rules.

M = "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE"
R = "-s 172.7.0.0/16 -d 172.7.0.0/16 -j RETURN"
X = "! -s 172.7.0.0/16 -d 172.7.21.0/24 -j RETURN"
X_OLD = "! -s 172.7.0.0/16 -d 172.7.33.0/24 -j RETURN"
Y = "! -s 172.7.0.0/16 -d 172.7.0.0/16 -j MASQUERADE"
DOCKERS = "-s 172.7.21.2/32 -d 172.7.21.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE"


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ([R, M, X, Y], []),
        ([DOCKERS, R, M], []),
        ([R, M, M, R], ["flannel_twice"]),
        ([R, M, X, Y, R, M, X, Y], ["flannel_twice"]),
        ([R, DOCKERS, R, M], ["flannel_twice"]),
        ([M, R], ["flannel_order"]),
        ([M, R, M], ["flannel_order"]),
        ([M, M, R], ["flannel_order"]),
        ([M, R, X, X_OLD], ["flannel_stale", "flannel_order"]),
        ([X_OLD, R, M], ["flannel_stale"]),
        ([M], ["flannel_order"]),
        # Of a cluster network that is no more, with both its rules.
        ([R.replace("172.7", "10.8"), M.replace("172.7", "10.8"), R, M], ["flannel_stale"]),
        # An operator's, which only look a little like it.
        (["-s 192.168.122.0/24 ! -d 224.0.0.0/4 -j MASQUERADE", "-s 10.8.0.0/16 -j RETURN"], []),
        (["! -s 10.8.0.0/16 -d 10.8.3.0/24 -j RETURN", BROAD, OURS], []),
    ],
)
def test_flannels_rules(rules: Sequence[str], names: list[str]) -> None:
    """Each remedy, done line by line, leaves rules with nothing to find; no copy is lost."""
    rules = list(rules)
    hooks = [xtables_hook("\n".join(rules))]
    found = list(flannel_rules(hooks, WANTED, ()))
    assert [finding.name for finding in found] == names
    assert all(finding.severity is Severity.WARNING for finding in found)
    before = set(rules)
    for line in (line for finding in found for line in finding.remedy):
        if line.startswith("iptables"):
            _do(rules, line)
            # A remedy for copies makes nothing worse on the way.
            assert names != ["flannel_twice"] or not early_rules(
                [xtables_hook("\n".join(rules))], WANTED
            )
    left = list(flannel_rules([xtables_hook("\n".join(rules))], WANTED, ()))
    needs_flannel = R not in before and M in before
    assert [finding.name for finding in left] == ["flannel_order"] * needs_flannel
    stale = {rule for rule in before if "172.7.33" in rule or (R in before and "10.8.0.0" in rule)}
    assert set(rules) == before - stale


def _do(rules: list[str], line: str) -> None:
    """What iptables does: -D takes the first of equal rules, -A comes last."""
    words = shlex.split(line)
    assert words[:3] == ["iptables-nft", "-t", "nat"]
    how, chain, text = words[3], words[4], " ".join(words[5:])
    assert chain == "POSTROUTING"
    if how == "-A":
        rules.append(text)
    else:
        rules.remove(text)


def test_a_wrong_order_that_hides_is_an_error() -> None:
    hooks = [xtables_hook(f"{M}\n{R}", "legacy ip nat")]
    where = ("legacy ip nat", "POSTROUTING", M)
    assert one(flannel_rules(hooks, WANTED, {where})).severity is Severity.ERROR
    assert early_rules(hooks, WANTED) == {where}
    assert not early_rules([xtables_hook(f"{R}\n{M}")], WANTED)


def test_native_tables_are_not_flannels_iptables_rules() -> None:
    assert not list(flannel_rules([nft_hook("ip-docker-bridges")], WANTED, ()))
    assert not list(flannel_rules([xtables_hook(f"{M}\n{R}", "ip mine")], WANTED, ()))


# flanneld, kube-proxy, snatd.

FLANNELD = Process(9, "flanneld", ("/opt/bin/flanneld",), age_s=1000.0)


@pytest.mark.parametrize(
    ("process", "age_s", "lasts", "names"),
    [
        (FLANNELD, 999.0, False, []),
        (FLANNELD, 1059.0, False, []),
        (FLANNELD, 1061.0, False, ["lease_old"]),
        (replace(FLANNELD, age_s=5.0), 1061.0, False, []),
        (FLANNELD, 6000.0, False, []),
        (FLANNELD, 6000.0, True, ["lease_old"]),
        (replace(FLANNELD, name="k3s-agent"), 1061.0, False, []),
        (replace(FLANNELD, name="dockerd"), 1061.0, False, ["flanneld_missing"]),
        (
            replace(FLANNELD, arguments=("flanneld", "-subnet-file", "/x")),
            1.0,
            False,
            ["other_subnet_file"],
        ),
        (replace(FLANNELD, arguments=("flanneld", "--subnet-file=/s")), 1.0, False, []),
    ],
)
def test_the_age_of_a_lease(process: Process, age_s: float, lasts: bool, names: list[str]) -> None:
    found = programs.lease_of_flannel([process], "/s", age_s, 5000.0, lasts=lasts)
    assert [finding.name for finding in found] == names


@pytest.mark.parametrize(
    ("seconds", "text"), [(9.0, "9 s"), (130.0, "2.2 min"), (9000.0, "2.5 h"), (1e6, "11.6 days")]
)
def test_times(seconds: float, text: str) -> None:
    assert programs.ago(seconds) == f"{text} ago"


@pytest.mark.parametrize(
    ("arguments", "config", "names"),
    [
        ([], "", []),
        (["--masquerade-all=false", "--cluster-cidr=172.7.0.0/16"], "", []),
        (["--cluster-cidr=10.0.0.0/8,172.7.21.0/24"], "", []),
        (["--cluster-cidr=fd00::/8"], "", []),
        (["--cluster-cidr=nonsense,"], "", []),
        (["--cluster-cidr=10.0.0.0/8"], "", ["cluster_cidr"]),
        (["--cluster-cidr=10.0.0.0/8", "--detect-local-mode=NodeCIDR"], "", []),
        (["--masquerade-all"], "", ["masquerade_all"]),
        (["--config=/c", "--masquerade-all"], "", []),
        (
            ["--config=/c"],
            "iptables:\n  masqueradeAll: true\nnftables:\n  masqueradeAll: false\n",
            ["masquerade_all"],
        ),
        (
            ["--config=/c"],
            '\nclusterCIDR: "10.0.0.0/8" # x\n#clusterCIDR: 172.7.0.0/16\n',
            ["cluster_cidr"],
        ),
        (["--config=/c"], "\nclusterCIDR: 10.0.0.0/8\ndetectLocalMode: BridgeInterface\n", []),
    ],
)
def test_kube_proxy(arguments: list[str], config: str, names: list[str]) -> None:
    process = called(*arguments, name="kube-proxy")
    assert [f.name for f in programs.kube_proxy(process, config, [WANTED])] == names


def test_several_snatd() -> None:
    daemon = Process(5, "snatd", ("/usr/bin/python3", "/usr/bin/snatd", "run"), parent=1)
    # A child that has not become what it is going to be, and other commands.
    child = replace(daemon, pid=6, parent=5)
    doctor = replace(daemon, pid=7, arguments=("/usr/bin/python3", "/usr/bin/snatd", "doctor"))
    assert not list(programs.several_snatd([daemon, child, doctor]))
    found = one(programs.several_snatd([daemon, child, doctor, replace(daemon, pid=8)]))
    assert [line.partition(":")[0] for line in found.evidence] == ["snatd (pid 5)", "snatd (pid 8)"]


@pytest.mark.parametrize(
    ("document", "refused"),
    [
        ({}, {}),
        ({"guard": [{"family": "ipv4", "why_not": None}]}, {}),
        ({"guard": [{"family": "ipv4", "why_not": "off"}]}, {}),
        ({"guard": [{"family": "ipv6", "why_not": "no"}]}, {V6: "no"}),
        ({"guard": [{"family": "ipv5", "why_not": "no"}]}, {}),
        ({"guard": 7}, {}),
        ({"guard": [7]}, {}),
        ({"guard": [{}]}, {}),
    ],
)
def test_the_daemons_word_on_guards(document: Any, refused: dict[Any, str]) -> None:
    assert _refused_guards(document) == refused


# Processes.


def process(proc: Path, pid: int, name: str, arguments: bytes, netns: str = "net:[1]") -> Path:
    folder = proc / str(pid)
    (folder / "ns").mkdir(parents=True)
    (folder / "ns/net").symlink_to(netns)
    (folder / "comm").write_text(f"{name}\n")
    (folder / "cmdline").write_bytes(arguments)
    (folder / "stat").write_text(f"{pid} ({name}) S 1 " + "0 " * 17 + "100 0\n")
    return folder


def test_processes_of_this_namespace(tmp_path: Path) -> None:
    process(tmp_path, 1, "systemd", b"/sbin/init\0")
    (tmp_path / "self").symlink_to("1")
    process(tmp_path, 20, "dockerd", b"/usr/bin/dockerd\0--label\0a\xff\nb\0")
    process(tmp_path, 3, "dockerd", b"dockerd\0", netns="net:[2]")
    process(tmp_path, 4, "a) (b", b"")
    (process(tmp_path, 5, "dockerd", b"") / "stat").unlink()
    (process(tmp_path, 6, "dockerd", b"") / "ns/net").unlink()
    (process(tmp_path, 7, "dockerd", b"") / "stat").write_text("7 (dockerd) S 1")
    (process(tmp_path, 8, "dockerd", b"") / "comm").unlink()
    os.mkfifo(tmp_path / "8/comm")
    names = ("dockerd", "a) (b")
    found = find(names, tmp_path, os.getuid())
    assert [(one.pid, one.name, one.parent) for one in found] == [
        (4, "a) (b", 1),
        (20, "dockerd", 1),
    ]
    assert found[1].arguments == ("/usr/bin/dockerd", "--label", "a\\xff\nb")
    assert found[1].age_s > 0
    assert find(names, tmp_path, os.getuid() + 1) == ()


# The next boot.


def test_what_a_shell_reads() -> None:
    text = (
        'IPTABLES_SAVE_ON_STOP=yes\n export IPTABLES_SAVE_ON_RESTART="yes"\n'
        "XIPTABLES_SAVE_ON_STOP=yes\nIPTABLES_SAVE_COUNTER=yes\nIPTABLES_SAVE_ON_STOP='no'\n"
    )
    found = one(boot.saves_live_rules("/c", text))
    assert found.evidence == ('/c line 2: export IPTABLES_SAVE_ON_RESTART="yes"',)
    assert shlex.split(found.remedy[0])[:3] == ["sed", "-i", "-E"]


UNIT = {
    **{"LoadState": "loaded", "UnitFileState": "enabled", "ActiveState": "active"},
    **{"After": "network-pre.target", "Before": "docker.service shutdown.target"},
}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"LoadState": "not-found", "UnitFileState": "disabled"}, []),
        ({"UnitFileState": "disabled"}, ["not_enabled"]),
        ({"LoadState": "masked", "UnitFileState": "masked"}, ["not_enabled"]),
        ({"UnitFileState": "static"}, []),
        ({"After": "docker.service", "Before": "shutdown.target"}, ["starts_late"]),
        ({"NRestarts": "0"}, []),
        ({"NRestarts": "2"}, ["restarted"]),
        # A circle, and that is said elsewhere.
        ({"After": "docker.service"}, []),
    ],
)
def test_the_unit(changes: dict[str, str], names: list[str]) -> None:
    assert [finding.name for finding in boot.unit({**UNIT, **changes})] == names
    assert list(boot.unit({})) == []


@pytest.mark.parametrize(
    ("shown", "wanted", "evidence"),
    [
        ({}, False, None),
        ({}, True, "not running"),
        (UNIT, True, None),
        ({**UNIT, "ActiveState": "activating"}, True, None),
        (
            {**UNIT, "ActiveState": "inactive", "Result": "success"},
            False,
            "snatd.service: inactive",
        ),
        (
            {**UNIT, "ActiveState": "failed", "Result": "exit-code", "ExecMainStatus": "78"},
            False,
            "snatd.service: failed, exit-code (78)",
        ),
    ],
)
def test_a_daemon_that_does_not_run(
    shown: dict[str, str], wanted: bool, evidence: str | None
) -> None:
    there = boot.not_running(shown, "not running", wanted=wanted)
    found = [finding.evidence for finding in there]
    assert found == ([(evidence,)] if evidence else [])


def test_a_circle_of_units() -> None:
    assert not list(boot.order_cycle("\n"))
    found = one(boot.order_cycle("snatd.service iptables.service $(reboot).service\n"))
    units = "snatd.service iptables.service '$(reboot).service'"
    assert found.remedy[0] == f"systemctl cat {units} | grep -E '^(# /|After=)'"


def test_both_backends_only_if_others_use_both() -> None:
    nft, legacy = xtables_hook("-j A"), xtables_hook("-j B\n-j C", "legacy ip filter")
    found = one(rivals.both_backends(V4, [nft, legacy], LEGACY))
    assert found.remedy[2:] == ("# iptables-nft -t nat -F", "# iptables-nft -t nat -X")
    found = one(rivals.both_backends(V4, [nft, legacy], NFT))
    assert found.remedy[2:] == ("# iptables-legacy -t filter -F", "# iptables-legacy -t filter -X")
    ours = xtables_hook("-s 172.7.21.0/24 -m comment --comment snatd -j MASQUERADE\n-j SNATD-X")
    native = xtables_hook("-j MASQUERADE", "ip own")
    for others in ([legacy], [legacy, xtables_hook("")], [legacy, ours], [legacy, native]):
        assert not list(rivals.both_backends(V4, others, NFT))


@pytest.mark.parametrize(
    ("table", "command"),
    [
        ("ip nat", ("iptables-nft", "nat")),
        ("legacy ip nat", ("iptables-legacy", "nat")),
        ("ip6 raw", ("ip6tables-nft", "raw")),
        ("inet filter", ("", "")),
        ("ip snatd", ("", "")),
        ("netdev filter", ("", "")),
    ],
)
def test_whose_a_table_is(table: str, command: tuple[str, str]) -> None:
    assert iptables_of(table) == command
