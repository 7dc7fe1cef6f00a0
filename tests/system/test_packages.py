"""What the builds hold, and what the linters of packages say of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.system.conftest import DISTRIBUTIONS, PROJECT, Packages

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def said(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env=_ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lintian_is_content(packages: Packages) -> None:
    assert said("lintian", "--allow-root", "--pedantic", "--fail-on=none", packages.deb) == ""


def test_rpmlint_is_content(packages: Packages) -> None:
    reviewed = PROJECT / "packaging" / "rpm" / "rpmlint.toml"
    files = [file for one in packages.rpms.values() for file in (one.this, one.legacy)]
    last = said("rpmlint", "--config", reviewed, *files).splitlines()[-1]
    assert " 0 errors, 0 warnings" in last, last


def test_the_deb_depends_on_what_is_imported(packages: Packages) -> None:
    depends = said("dpkg-deb", "--field", packages.deb, "Depends")
    for name in ("iptables", "pyroute2", "sdnotify", "structlog", "watchdog"):
        assert f"python3-{name}" in depends
    for name in ("conntrack", "iptables", "nftables"):
        assert f"{name}, " in depends
    assert said("dpkg-deb", "--info", packages.deb, "conffiles") == "/etc/snatd/snatd.toml\n"


EVERYWHERE = {
    *("(iptables-nft or iptables)", "nftables", "conntrack-tools", "systemd", "systemd >= 252"),
    *("/bin/sh", "python(abi) >= 3.11"),
}
BUNDLED = {
    "el9": {"pyroute2", "sdnotify", "structlog", "watchdog"},
    "el10": {"sdnotify", "structlog"},
    "fc43": {"structlog"},
}


@pytest.mark.parametrize(
    ("distribution", "needed"),
    [
        ("el9", {"/usr/bin/python3.11", "python3.11"}),
        ("el10", {"/usr/bin/python3", "python3-pyroute2 >= 0.7.2", "python3-watchdog >= 2.2.1"}),
        (
            "fc43",
            {
                *("/usr/bin/python3", "python3-pyroute2 >= 0.7.2", "python3-sdnotify >= 0.3.1"),
                "python3-watchdog >= 2.2.1",
            },
        ),
    ],
)
def test_an_rpm_built_on_debian_needs_what_there_is_elsewhere(
    packages: Packages, distribution: str, needed: set[str]
) -> None:
    rpm = packages.rpms[distribution].this
    assert rpm.name.endswith(f"-1.{distribution}.noarch.rpm")
    lines = said("rpm", "-qp", "--requires", rpm).splitlines()
    assert {one for one in lines if not one.startswith(("rpmlib(", "config("))} == {
        *EVERYWHERE,
        *needed,
    }
    # What `snatd revert` needs is there until it has run, when all is removed at once.
    until_then = said("rpm", "-qp", "--qf", "[%{REQUIRENAME}/%{REQUIREFLAGS:deptype}\\n]", rpm)
    for one in needed - {"/usr/bin/python3", "/usr/bin/python3.11"}:
        assert f"{one.split()[0]}/preun\n" in until_then
    # What the oldest of them, rpm 4.16 of EL 9, unpacks and verifies.
    form = said("rpm", "-qp", "--qf", "%{PAYLOADCOMPRESSOR} %{FILEDIGESTALGO}", rpm)
    assert form == "gzip 8", "8 is SHA-256"
    listed = said("rpm", "-qp", "--list", rpm).splitlines()
    assert not [one for one in listed if one.endswith(".pyc")], "Debian's byte code fits nobody"
    assert not [one for one in listed if "iptc" in one], "compiled, and a package of its own"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_rpm_says_what_it_brings_along(packages: Packages, distribution: str) -> None:
    rpm = packages.rpms[distribution].this
    provided = said("rpm", "-qp", "--provides", rpm)
    assert {*re.findall(r"bundled\(python3-(\w+)\) = ", provided)} == BUNDLED[distribution]
    # Nobody shall take what is in our folder for a library of the system.
    assert "python3dist(" not in provided
    assert said("rpm", "-qp", "--configfiles", rpm) == "/etc/snatd/snatd.toml\n"


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_scriptlets_name_the_unit(packages: Packages, distribution: str) -> None:
    """A macro that is missing takes its argument with it, and says nothing."""
    scripts = said("rpm", "-qp", "--scripts", packages.rpms[distribution].this)
    for what in ("preset", "disable --now", "try-restart"):
        assert f"systemctl --no-reload {what} snatd.service" in scripts.replace(
            "systemctl try-restart", "systemctl --no-reload try-restart"
        )
    assert "/usr/libexec/snatd/revert" in scripts
    assert "%" not in scripts


@pytest.mark.parametrize(
    ("distribution", "bundled", "python"),
    [
        (("fedora", "42"), BUNDLED["fc43"], "/usr/bin/python3"),
        (("rhel", "10"), BUNDLED["el10"], "/usr/bin/python3"),
        (("rhel", "9"), BUNDLED["el9"], "/usr/bin/python3.11"),
    ],
    ids=["fedora", "el10", "el9"],
)
def test_what_is_brought_along_where(
    tmp_path: Path, distribution: tuple[str, str], bundled: set[str], python: str
) -> None:
    """The spec as rpm reads it there, with their macros replaced by marks."""
    text = (PROJECT / "packaging" / "rpm" / "snatd.spec").read_text()
    spec = tmp_path / "snatd.spec"
    spec.write_text(re.sub("@[A-Z0-9]+@", "1", text.replace("@DATE@", "Mon Nov 23 2026")))
    marks = [f"{name}() {name} of %1" for name in ("systemd_post", "systemd_preun")]
    marks += ["systemd_postun_with_restart() restart of %1", f"{distribution[0]} {distribution[1]}"]
    marks += ["py_byte_compile() compile by %1"]
    words = [word for mark in marks for word in ("--define", mark)]
    read = said("rpmspec", "--parse", *words, spec)
    assert set(re.findall(r"^Provides: +bundled\(python3-(\w+)\)", read, re.M)) == bundled
    needed = set(re.findall(r"^Requires: +python[\d.]*-(\w+) >= ", read, re.M))
    assert needed == {"structlog", "sdnotify", "pyroute2", "watchdog"} - bundled
    assert f"|{python}|" in read
    for mark in ("systemd_post", "systemd_preun", "restart"):
        assert f"{mark} of snatd.service" in read
    assert "update-catalog" not in read, "systemd's own file triggers do that"
    assert f"compile by {python}" in read
    assert "compileall" not in read
