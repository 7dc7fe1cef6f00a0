"""What the code logs, read from its text: each kind of event, with the fields that it has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import snatd
from snatd.core.plan import Change
from snatd.host import journal

CODE = Path(snatd.__file__).parent
CATALOG = CODE.parent / "systemd" / "snatd.catalog"
_LEVELS = {"debug", "info", "warning", "error"}
_SAYS = {"say", "_say"}
# What `say` takes for itself; `priority` is no field of its own.
_NO_FIELDS = {"same", "over", "about", "priority"}
# What is undone is undone by commands, which do not log.
CHANGES = tuple(change.value for change in Change if change is not Change.UNDONE)

# What an event has and its entry in the catalog leaves out. Of a guard that is removed nothing
# comes; what a rule that is added displaced is told apart.
NOT_SHOWN = {"guard_removed": {"rule", "writer"}, "rule_added": {"removed"}}

Fields = dict[str, ast.expr | None]


@dataclass
class Kind:
    """A kind of event: the fields of each place that logs it, with the expressions."""

    calls: list[Fields] = field(default_factory=list)

    @property
    def always(self) -> set[str]:
        return set.intersection(*(set(fields) for fields in self.calls))

    @property
    def all(self) -> list[str]:
        return sorted(set[str]().union(*self.calls))

    def may_be_none_or_several(self, name: str) -> bool:
        odd = (ast.BoolOp, ast.IfExp, ast.List, ast.ListComp, ast.Tuple, ast.Dict, ast.Constant)
        for fields in self.calls:
            value = fields[name]
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
                if value.func.id in ("list", "tuple", "dict"):
                    return True
            elif isinstance(value, odd) and getattr(value, "value", None) is None:
                return True
        return False

    def sample(self, event: str, *, whole: bool) -> dict[str, Any]:
        """An entry with two of all that there may be several of, or with none of it."""

        def value(name: str) -> Any:
            if name in journal._ABSENT:
                return [f"first-{event}-{name}", f"second-{event}-{name}"] if whole else None
            return 1.5 if name == "duration_ms" else f"one-{event}-{name}"

        return {name: value(name) for fields in self.calls for name in fields}


def events() -> dict[str, Kind]:
    """Every name that is logged: a literal first argument of a log call, `over=`, and the changes,
    whose names are their values."""
    found: dict[str, Kind] = {}
    for path in CODE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                for name, fields in _logged(call, call.func.attr):
                    found.setdefault(name, Kind()).calls.append(fields)
    return found


def _logged(call: ast.Call, method: str) -> Iterator[tuple[str, Fields]]:
    if method not in _LEVELS | _SAYS or not call.args:
        return
    keywords: Fields = {one.arg: one.value for one in call.keywords if one.arg is not None}
    fields = {name: value for name, value in keywords.items() if name not in _NO_FIELDS}
    if method in _SAYS:
        fields["what"] = call.args[2]
    for name in _literal(call.args[0]):
        yield name, fields
    if ast.unparse(call.args[0]) == "reason.change.value":
        for change in CHANGES:
            yield change, fields
    for name in _literal(keywords.get("over")):
        yield name, {"was": None}


def _literal(node: ast.expr | None) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
