"""What `doctor` reads breaks nothing, and its remedies for flannel's rules always end in order."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from snatd.core import boot, docker, programs, rivals
from snatd.core.flannel_rules import flannel_rules
from snatd.core.programs import Process
from snatd.core.rules import quote, tokens
from tests.fakes import BROAD, OURS, lease, wish
from tests.property.test_parsers import mutated
from tests.unit.tracing import xtables_hook

WANTED = wish()
GATEWAY = lease().families[0][1].gateway
FILE = '{"bip": "172.7.21.1/24", "ip-masq": false, "bridge": "", "config-file": "/x"}'


@given(st.binary() | mutated(FILE).map(str.encode), st.lists(st.text() | st.just("--bip")))
def test_any_file_and_arguments_of_docker(content: bytes, arguments: list[str]) -> None:
    process = Process(1, "dockerd", tuple(arguments))
    with suppress(ValueError):
        one = docker.Docker(process, "/x", docker.parse_file(content))
        json.dumps([str(one.masquerades()), one.bridge])
        list(docker.file(one))
        list(docker.bip(one, GATEWAY, WANTED, by_cni=False))


@given(st.lists(st.text()), st.text() | mutated("clusterCIDR: 10.0.0.0/8\nmasqueradeAll: true\n"))
def test_any_kube_proxy(arguments: list[str], config: str) -> None:
    for words in (arguments, [*arguments, "--config=/x"]):
        process = Process(1, "kube-proxy", ("kube-proxy", *words))
        list(programs.kube_proxy(process, config, [WANTED]))
        list(programs.lease_of_flannel([process], "/s", 1.0, 2.0, lasts=False))


@given(st.text() | mutated("IPTABLES_SAVE_ON_STOP=yes\nexport IP6TABLES_SAVE_ON_RESTART='yes'\n"))
def test_any_sysconfig(text: str) -> None:
    for finding in boot.saves_live_rules("/c", text):
        assert shlex.split(finding.remedy[0])[0] == "sed"


@given(st.text().filter(lambda text: "\0" not in text))
def test_any_comment_survives_a_shell(comment: str) -> None:
    text = f"-s 10.0.0.0/8 -m comment --comment {quote(comment)} -j MASQUERADE"
    command = rivals.rule_command("iptables", "-D", "POSTROUTING", text)
    assert shlex.split(command)[5:] == [token.value for token in tokens(text)]


MASQUERADE = "-s 172.7.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE"
LETS_GO = "-s 172.7.0.0/16 -d 172.7.0.0/16 -j RETURN"
RULES = (
    *(MASQUERADE, LETS_GO, f"{MASQUERADE} --random-fully", BROAD, OURS),
    "! -s 172.7.0.0/16 -d 172.7.21.0/24 -j RETURN",
    "! -s 172.7.0.0/16 -d 172.7.33.0/24 -j RETURN",
    "! -s 172.7.0.0/16 -d 172.7.0.0/16 -j MASQUERADE",
    '-s 172.7.33.0/24 -d 172.7.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
)


@given(st.lists(st.sampled_from(RULES), max_size=9))
def test_remedies_for_flannels_rules_end_in_order(rules: list[str]) -> None:
    before = list(rules)
    for _ in range(3):
        found = list(flannel_rules([xtables_hook("\n".join(rules))], WANTED, ()))
        for finding in found:
            for line in finding.remedy:
                words = shlex.split(line)
                if words[0] in ("systemctl", "#"):
                    continue
                text = " ".join(words[5:]).replace("flanneld masq", '"flanneld masq"')
                if words[3] == "-A":
                    rules.append(text)
                else:
                    rules.remove(text)
    if LETS_GO in before:
        assert found == []
    # Nothing but what is stale or there twice goes.
    assert {rule for rule in before if "172.7.33" not in rule} == set(rules)
    foreign = [rule for rule in before if rule in (BROAD, OURS)]
    assert [rule for rule in rules if rule in foreign] == foreign
