"""Man pages, completions and the example configuration know what the program knows, and no more."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import snatd
from snatd import arguments, config

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


def test_bash_completes_each_command_and_option() -> None:
    known = of_the_parser()
    assert complete("") == {*known, "--help", "--version"}
    for name, options in known.items():
        assert complete(name, "--") == options
    assert complete("flows", "--delete", "") == {"udp", "all"}
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
    assert config.from_table(table, "snatd.toml") == config.Config()


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
    described = re.findall(r"^\.It Li (\w+)$", manual, re.MULTILINE)
    assert len(described) > 30
    assert described == sorted(set(findings_in_the_code()))


def test_the_manual_knows_each_key() -> None:
    manual = (PACKAGING / "man" / "snatd.toml.5").read_text()
    keys = re.findall(r"^\.It Ic (\w+)$", manual, re.MULTILINE)
    assert sorted(keys) == sorted(one.name for one in fields(config.Config))
