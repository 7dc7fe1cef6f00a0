"""The file of metrics under the unit's confinement, where Debian's node exporter looks for it."""

from __future__ import annotations

import re

from tests.lab.netns import until
from tests.lab.prometheus import values
from tests.system.node import NARROW, Node

FOLDER = "/var/lib/prometheus/node-exporter"
PATH = f"{FOLDER}/snatd.prom"
DROP_IN = "/etc/systemd/system/snatd.service.d/override.conf"


def test_what_the_unit_may_not_write_is_refused_and_the_drop_in_that_is_named_helps(
    node: Node,
) -> None:
    machine = node.machine
    node.wait_for_status("in sync")
    configuration = machine.path("/etc/snatd/snatd.toml")
    configuration.write_text(f'metrics_textfile = "{PATH}"\n')
    # As the package of the node exporter makes it.
    machine.run("install", "-d", FOLDER)
    machine.run("systemctl", "reload", "snatd")
    node.wait_for_status("UTC, the old one is in force - metrics_textfile: ")
    assert node.status_line().startswith("new configuration refused at ")
    refused = machine.event("configuration_refused")["SNATD_WHY"]
    assert f"{PATH} cannot be written: Read-only file system" in refused
    node.add_broad()
    node.wait_for_repair()

    assert machine.try_to("systemctl", "restart", "snatd").returncode != 0
    assert machine.show("snatd", "ExecMainStatus") == "78"
    assert machine.show("snatd", "ActiveState") == "failed"
    assert machine.show("snatd", "NRestarts") == "0"
    told = machine.run("journalctl", "-b", "-u", "snatd", "-o", "cat", "-n", "20", "--no-pager")
    assert "`systemctl edit snatd`" in told
    assert node.rules() == [NARROW]

    # What is named, as it is named.
    (section,) = set(re.findall(r"`(\[\w+\])`", told))
    (line,) = set(re.findall(r"`(ReadWritePaths=\S+)`", told))
    drop_in = machine.path(DROP_IN)
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text(f"{section}\n{line}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "snatd")
    node.wait_for_status("in sync")
    assert machine.run("stat", "-c", "%a %U %G", PATH) == "644 root root\n"
    for_everybody = ("setpriv", "--reuid=65534", "--clear-groups", "cat", PATH)
    found = values(machine.run(*for_everybody).encode())
    assert found["snatd_in_sync"] == 1
    assert machine.run("ls", "-A", FOLDER) == "snatd.prom\n"

    node.add_broad()
    node.wait_for_repair()
    until(
        lambda: values(machine.path(PATH).read_bytes())["snatd_repair_seconds_count"] == 1,
        "the repair in the file",
    )
    assert not machine.journal("-b", "SNATD_EVENT=metrics_not_written")
    machine.run("systemctl", "stop", "snatd")
    assert values(machine.path(PATH).read_bytes())["snatd_in_sync"] == 1
    said = machine.run("apt-get", "purge", "-y", "-q", "snatd")
    assert machine.run("ls", "-A", FOLDER) == "", said


def test_a_directory_of_another_user_is_refused_with_the_reason(node: Node) -> None:
    """Root without CAP_DAC_OVERRIDE is a user like others."""
    machine = node.machine
    machine.path("/etc/snatd/snatd.toml").write_text(f'metrics_textfile = "{PATH}"\n')
    machine.run("install", "-d", FOLDER)
    machine.run("chown", "nobody:", FOLDER)
    drop_in = machine.path(DROP_IN)
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text(f"[Service]\nReadWritePaths={FOLDER}\n")
    machine.run("systemctl", "daemon-reload")
    assert machine.try_to("systemctl", "restart", "snatd").returncode != 0
    assert machine.show("snatd", "ExecMainStatus") == "78"
    told = machine.run("journalctl", "-b", "-u", "snatd", "-o", "cat", "-n", "20", "--no-pager")
    assert f"{PATH} cannot be written: Permission denied: root must own {FOLDER}, " in told
    machine.run("chown", "root:", FOLDER)
    machine.run("systemctl", "restart", "snatd")
    until(lambda: machine.path(PATH).exists(), "the file")


def test_rules_and_dashboard_are_installed(node: Node) -> None:
    listed = node.machine.run("ls", "/usr/share/snatd/prometheus").split()
    assert listed == ["snatd.dashboard.json", "snatd.rules.yml"]
