"""What the builds hold, and what the linters of packages say of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.system.conftest import PROJECT, Packages

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def said(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, env=_ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_lintian_is_content(packages: Packages) -> None:
    assert said("lintian", "--allow-root", "--pedantic", "--fail-on=none", packages.deb) == ""


def test_rpmlint_is_content(packages: Packages) -> None:
    reviewed = PROJECT / "packaging" / "rpm" / "rpmlint.toml"
    files = (packages.rpm, packages.legacy_rpm)
    last = said("rpmlint", "--config", reviewed, *files).splitlines()[-1]
    assert " 0 errors, 0 warnings" in last, last


def test_the_deb_depends_on_what_is_imported(packages: Packages) -> None:
    depends = said("dpkg-deb", "--field", packages.deb, "Depends")
    for name in ("iptables", "pyroute2", "sdnotify", "structlog", "watchdog"):
        assert f"python3-{name}" in depends
    for name in ("conntrack", "iptables", "nftables"):
        assert f"{name}, " in depends
    assert said("dpkg-deb", "--info", packages.deb, "conffiles") == "/etc/snatd/snatd.toml\n"


def test_the_rpm_says_what_it_brings_along(packages: Packages) -> None:
    provided = said("rpm", "-qp", "--provides", packages.rpm)
    for name in ("pyroute2", "sdnotify", "structlog", "watchdog"):
        assert f"bundled(python3-{name}) = " in provided
    # Nobody shall take what is in our folder for a library of the system.
    assert "python3dist(" not in provided
    assert said("rpm", "-qp", "--configfiles", packages.rpm) == "/etc/snatd/snatd.toml\n"


def test_the_scriptlets_name_the_unit(packages: Packages) -> None:
    """A macro that is missing takes its argument with it, and says nothing."""
    scripts = said("rpm", "-qp", "--scripts", packages.rpm)
    for what in ("preset", "disable --now", "try-restart"):
        assert f"systemctl --no-reload {what} snatd.service" in scripts.replace(
            "systemctl try-restart", "systemctl --no-reload try-restart"
        )
    assert "/usr/libexec/snatd/revert" in scripts
    assert "%" not in scripts
    legacy = said("rpm", "-qp", "--list", packages.rpm)
    assert "iptc" not in legacy, "compiled, and a package of its own"


@pytest.mark.parametrize(
    ("distribution", "bundled", "python"),
    [
        (("fedora", "42"), {"structlog"}, "/usr/bin/python3"),
        (("rhel", "10"), {"structlog", "sdnotify"}, "/usr/bin/python3"),
        (("rhel", "9"), {"structlog", "sdnotify", "pyroute2", "watchdog"}, "/usr/bin/python3.11"),
    ],
    ids=["fedora", "el10", "el9"],
)
def test_what_is_brought_along_where(
    tmp_path: Path, distribution: tuple[str, str], bundled: set[str], python: str
) -> None:
    """The spec as rpm reads it there, with their macros for scriptlets replaced by marks."""
    text = (PROJECT / "packaging" / "rpm" / "snatd.spec").read_text()
    spec = tmp_path / "snatd.spec"
    spec.write_text(re.sub("@[A-Z0-9]+@", "1", text.replace("@DATE@", "Mon Nov 23 2026")))
    marks = [f"{name}() {name} of %1" for name in ("systemd_post", "systemd_preun")]
    marks += ["systemd_postun_with_restart() restart of %1", f"{distribution[0]} {distribution[1]}"]
    words = [word for mark in marks for word in ("--define", mark)]
    read = said("rpmspec", "--parse", *words, spec)
    assert set(re.findall(r"^Provides: +bundled\(python3-(\w+)\)", read, re.M)) == bundled
    needed = set(re.findall(r"^Requires: +python[\d.]*-(\w+) >= ", read, re.M))
    assert needed == {"structlog", "sdnotify", "pyroute2", "watchdog"} - bundled
    assert f"|{python}|" in read
    for mark in ("systemd_post", "systemd_preun", "restart"):
        assert f"{mark} of snatd.service" in read
    assert "update-catalog" not in read, "systemd's own file triggers do that"
