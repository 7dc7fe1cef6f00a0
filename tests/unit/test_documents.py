"""Man pages, completions and the example configuration know what the program knows, and no more."""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import snatd
from docs import manual
from snatd import arguments, config
from snatd.core.finding import Finding
from tests import logged
from tests.lab.prometheus import DASHBOARD, RULES
from tests.unit.test_counts import each_with_a_sample

CODE = Path(snatd.__file__).parent
PACKAGING = Path(snatd.__file__).parents[1] / "packaging"

Options = dict[str, frozenset[str]]


def of_the_parser() -> Options:
    """Commands with their long options."""
    parser = arguments.parser()
    (commands,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    return {
        name: frozenset(
            option
            for action in command._actions
            for option in action.option_strings
            if option.startswith("--")
        )
        for name, command in commands.choices.items()
    }


def test_the_manual_knows_each_command_and_option() -> None:
    manual = (PACKAGING / "man" / "snatd.8").read_text()
    found = re.findall(r"^\.It Cm (\w+)(.*)$", manual, re.MULTILINE)
    options = {
        name: frozenset(f"--{one}" for one in re.findall(r"Fl -([a-z-]+)", rest)) | {"--help"}
        for name, rest in found
    }
    assert options == of_the_parser()


def keys(document: Any, path: str = "") -> Iterator[str]:
    """The keys of a JSON document: `a.b` of an object in an object, `a[].b` of those in a list."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield f"{path}{key}"
            if f"{path}{key}" != "events":  # its keys are the sources that were heard
                yield from keys(value, f"{path}{key}.")
    elif isinstance(document, list):
        for one in document:
            yield from keys(one, f"{path.removesuffix('.')}[].")


def documented_keys() -> set[str]:
    """Those of `snatd status --json` in the manual."""
    manual = (PACKAGING / "man" / "snatd.8").read_text()
    section = manual.partition(".Sh STATUS DOCUMENT\n")[2].partition("\n.Sh ")[0]
    found = re.findall(r"^\.It Va (\S+)$", section, re.MULTILINE)
    assert len(found) == len(set(found))
    return set(found)


def test_keys() -> None:
    assert [*keys({"a": [{"b": {"c": []}}, 1], "events": {"x": 1}})] == [
        "a",
        "a[].b",
        "a[].b.c",
        "events",
    ]


def test_bash_completes_each_command_and_option() -> None:
    known = of_the_parser()
    assert complete("") == {*known, "--help", "--version"}
    for name, options in known.items():
        assert complete(name, "--") == options
    assert complete("flows", "--delete", "") == {"udp", "all"}
    assert complete("status", "--watch", "--") == known["status"]
    assert complete("ch") == {"check"}


def complete(*words: str) -> set[str]:
    """What bash offers behind `snatd WORDS`."""
    script = (
        f"source '{PACKAGING}/completions/snatd.bash'; "
        'COMP_WORDS=(snatd "$@"); COMP_CWORD=$#; _snatd; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-euc", script, "bash", *words], capture_output=True, text=True, check=True
    )
    return {*done.stdout.split()}


def test_zsh_completes_each_command_and_option() -> None:
    text = (PACKAGING / "completions" / "snatd.zsh").read_text()
    listed = set(re.findall(r"^    '(\w+):", text, re.MULTILINE))
    options: Options = {}
    for names, rest in re.findall(r"^    ([\w|]+)\) _arguments (.*) ;;$", text, re.MULTILINE):
        some = {"--help", "--config"} if "$common" in rest else set()
        for name in names.split("|"):
            options[name] = frozenset({*some, *re.findall(r"'(--[\w-]+)\[", rest)})
    assert listed == set(options)
    assert options == of_the_parser()


def test_fish_completes_each_command_and_option() -> None:
    text = (PACKAGING / "completions" / "snatd.fish").read_text()
    options = {name: {"--help"} for name in re.findall(r"use_subcommand -a (\w+)", text)}
    for names, option in re.findall(r"seen_subcommand_from ([\w ]+)' -l ([\w-]+)", text):
        for name in names.split():
            options[name].add(f"--{option}")
    assert options == of_the_parser()


def test_the_example_has_every_key_commented_with_its_default() -> None:
    text = (PACKAGING / "snatd.toml").read_text()
    assert tomllib.loads(text) == {}
    keys = re.findall(r"^#(\w+ = .*)$", text, re.MULTILINE)
    table = tomllib.loads("\n".join(keys))
    assert set(table) == {one.name for one in fields(config.Config)}
    del table["metrics_textfile"]  # it has no default
    assert config.from_table(table, "snatd.toml") == (config.Config(), ())


def findings_in_the_code() -> list[str]:
    """The first argument of each Finding: a literal, so that it can be found by who reads it."""
    found = []
    for path in CODE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding":
                name = call.args[0] if call.args else None
                assert isinstance(name, ast.Constant), f"{path.name}:{call.lineno}"
                found.append(str(name.value))
    return found


def test_the_manual_knows_each_finding() -> None:
    manual = (PACKAGING / "man" / "snatd.8").read_text()
    section = manual.partition(".Sh FINDINGS")[2].partition("\n.Sh ")[0]
    described = re.findall(r"^\.It Li (\w+)$", section, re.MULTILINE)
    assert len(described) > 30
    assert described == sorted(set(findings_in_the_code()))


def test_the_manual_knows_what_a_finding_has() -> None:
    manual = (PACKAGING / "man" / "snatd.8").read_text()
    head = manual.partition(".Sh FINDINGS")[2].partition("\n.Bl ")[0]
    described = re.findall(r"^\.Va (\w+)", head, re.MULTILINE)
    assert described == ["schema", "findings", *(one.name for one in fields(Finding))]


def test_the_manual_knows_each_field_of_an_event() -> None:
    """Which event has which is generated."""
    manual = (PACKAGING / "man" / "snatd.8").read_text()
    section = manual.partition(".Sh EVENTS")[2].partition("\n.Sh ")[0]
    described = re.findall(r"^\.It Va (\w+)$", section, re.MULTILINE)
    assert described == sorted({name for kind in logged.events().values() for name in kind.all})


def test_the_manual_knows_each_key() -> None:
    manual = (PACKAGING / "man" / "snatd.toml.5").read_text()
    keys = re.findall(r"^\.It Ic (\w+)$", manual, re.MULTILINE)
    assert sorted(keys) == sorted(one.name for one in fields(config.Config))


def metrics_in_the_code() -> dict[str, tuple[str, str]]:
    """The type of each metric, and its labels with blanks between."""
    return {
        f"snatd_{one.name}": (
            one.kind,
            " ".join(label for label, _ in one.samples[0].labels if label != "le"),
        )
        for one in each_with_a_sample()
    }


def test_the_readme_knows_each_metric_with_type_and_labels() -> None:
    readme = (PACKAGING.parent / "README.md").read_text()
    rows = re.findall(r"^\| `(snatd_\w+)` \| (\w+) \| (.*?) ?\| .+ \|$", readme, re.MULTILINE)
    found = {name: (kind, " ".join(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(found) == len(rows)
    assert found == metrics_in_the_code()


def series_in_the_code() -> set[str]:
    """What a query may name."""
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
    return {
        f"{name}{suffix}"
        for name, (kind, _) in metrics_in_the_code().items()
        for suffix in suffixes.get(kind, ("",))
    }


def test_the_alert_rules_name_what_there_is_and_each_is_tested() -> None:
    text = RULES.read_text()
    named = set(re.findall(r"snatd_\w+", text))
    assert len(named) > 5
    assert named <= series_in_the_code()
    tests = RULES.with_suffix(".test.yml").read_text()
    assert set(re.findall(r"snatd_\w+", tests)) <= series_in_the_code()
    fired = set(re.findall(r"alertname: (\w+)\n +exp_alerts:\n", tests))
    assert fired == set(re.findall(r"- alert: (\w+)", text))
    for part in ("severity", "summary", "description", "action"):
        assert len(re.findall(rf"^ +{part}: .", text, re.MULTILINE)) == len(fired)


def queries() -> list[str]:
    """Of the dashboard, its variable's included."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = [one.get("definition", "") for one in dashboard["templating"]["list"]]
    return [one["expr"] for panel in dashboard["panels"] for one in panel["targets"]] + variables


def test_the_dashboard_names_what_there_is() -> None:
    named = set(re.findall(r"snatd_\w+", " ".join(queries())))
    assert len(named) > 10
    assert named <= series_in_the_code()


@pytest.mark.parametrize("page", manual.PAGES, ids=lambda page: page.name)
def test_the_lists_of_the_manual_are_up_to_date(page: Path) -> None:
    """`make manual` makes them."""
    assert page.read_text() == manual.renewed(page.read_text())
    assert page.read_text().count('.\\" end\n') >= 1


def test_there_is_one_address_to_write_to() -> None:
    """SECURITY.md says where a fault is reported; the packages name their maintainers."""
    root = PACKAGING.parent
    files = [
        root / "SECURITY.md",
        PACKAGING / "debian" / "control",
        *PACKAGING.glob("rpm/*.spec"),
    ]
    found = {
        path.name: set(re.findall(r"[\w.+-]+@[\w-]+\.\w+", path.read_text())) for path in files
    }
    assert len(found) == 4
    assert len(set.union(*found.values())) == 1, found
    assert all(found.values()), found
