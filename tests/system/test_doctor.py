"""`snatd doctor` on a booted machine: what systemd knows of snatd, and in which order it starts."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.netns import until
from tests.system.machine import Machine
from tests.system.node import Node


def found(machine: Machine) -> dict[str, dict[str, Any]]:
    """The findings that count, by name."""
    done = machine.try_to("snatd", "doctor", "--json")
    findings = json.loads(done.stdout)["findings"]
    there = {one["name"]: one for one in findings if one["severity"] != "info"}
    assert done.returncode == (1 if there else 0), done.stdout
    return there


def test_a_healthy_machine(node: Node) -> None:
    node.wait_for_status("in sync")
    assert found(node.machine) == {}


def test_not_enabled_and_not_running(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    machine.run("systemctl", "disable", "--now", "snatd")
    there = found(machine)
    assert set(there) == {"not_enabled", "not_running"}
    assert there["not_enabled"]["evidence"] == ["snatd.service: disabled"]
    assert there["not_running"]["evidence"] == ["snatd.service: inactive"]
    machine.shell(there["not_enabled"]["remedy"][0])
    machine.shell(there["not_running"]["remedy"][0])
    node.wait_for_status("in sync")
    assert found(machine) == {}


def test_a_daemon_that_ended_with_a_broken_configuration(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    file = machine.path("/etc/snatd/snatd.toml")
    file.write_text("mode = 'watch'\n")
    machine.run("systemctl", "reload", "snatd")
    node.wait_for_status("new configuration refused")
    file.write_text("")
    assert "'watch' is none of" in found(machine)["configuration_refused"]["evidence"][0]
    file.write_text("mode = 'watch'\n")
    machine.try_to("systemctl", "restart", "snatd")
    until(lambda: machine.show("snatd", "ActiveState") == "failed", "the end")
    file.write_text("")
    one = found(machine)["not_running"]
    assert one["evidence"] == ["snatd.service: failed, exit-code (78)"]
    assert one["remedy"][0].startswith("journalctl ")
    machine.shell("\n".join(one["remedy"]))
    node.wait_for_status("in sync")
    assert found(machine) == {}


def test_the_order_of_units(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    docker = machine.path("/etc/systemd/system/docker.service")
    docker.write_text("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "enable", "docker")
    assert found(machine) == {}
    drop_in = machine.path("/etc/systemd/system/netfilter-persistent.service.d/late.conf")
    drop_in.parent.mkdir()
    drop_in.write_text("[Unit]\nAfter=docker.service\n")
    machine.run("systemctl", "daemon-reload")
    there = found(machine)
    assert set(there) == {"order_cycle"}
    assert {"snatd.service", "docker.service", "netfilter-persistent.service"} <= set(
        there["order_cycle"]["evidence"][0].split()
    )
    assert "After=docker.service" in machine.shell(there["order_cycle"]["remedy"][0])
    drop_in.unlink()
    machine.run("systemctl", "daemon-reload")
    assert found(machine) == {}
    # A unit of the operator's own in place of ours, which starts behind Docker.
    own = machine.path("/etc/systemd/system/snatd.service")
    text = machine.run("cat", "/lib/systemd/system/snatd.service")
    lines = [line for line in text.splitlines() if not line.startswith(("Before=", "After="))]
    lines.insert(1, "After=docker.service")
    own.write_text("\n".join(lines) + "\n")
    machine.run("systemctl", "daemon-reload")
    there = found(machine)
    assert set(there) == {"starts_late"}
    assert there["starts_late"]["evidence"] == ["snatd.service: After=docker.service"]
    machine.shell(there["starts_late"]["remedy"][1])
    assert found(machine) == {}


def test_a_dockerd_that_is_about_to_start_has_no_rules_yet(node: Node) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    machine.run("cp", "/bin/sleep", "/usr/local/bin/dockerd")
    docker = machine.path("/etc/systemd/system/docker.service")

    def started(kind: str) -> str:
        docker.write_text(f"[Service]\nType={kind}\nExecStart=/usr/local/bin/dockerd infinity\n")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", "--no-block", "docker")
        until(lambda: machine.show("docker", "MainPID") != "0", "its start")
        return machine.show("docker", "ActiveState")

    assert started("notify") == "activating"
    assert "docker_rules_gone" not in found(machine)
    assert started("simple") == "active"
    assert "docker_rules_gone" in found(machine)
