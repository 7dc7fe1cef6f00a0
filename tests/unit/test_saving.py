"""When the daemon looks at saved files: after a pass that converged, and if something changed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from snatd.config import Config
from snatd.core.desired import Absent
from snatd.core.model import Backend, Family, Hold
from snatd.reconcile import Problem, View
from snatd.saving import Saving
from tests.fakes import V4, V6, node, refused, wish

VIEW = View(node(), {V4: wish()})


@dataclass
class Daemon:
    """What a daemon hears and how often it would test a content."""

    path: Path
    said: list[tuple[str, Any]] = field(default_factory=list)

    def saving(self, **settings: Any) -> Saving:
        given = {"saved_rules": str(self.path / "rules.v4"), "state_dir": self.path, **settings}
        return Saving(Config(**given), self.check, self.say)

    def check(self, family: Family, backend: Backend, content: bytes, *, deadline: Any) -> None:
        raise AssertionError((family, backend, content, deadline))

    def say(self, event: str, _: str, what: Any, **__: Any) -> None:
        if what:
            self.said.append((event, what))


@pytest.fixture
def daemon(tmp_path: Path) -> Daemon:
    return Daemon(tmp_path)


def test_it_looks_once_until_something_changes(daemon: Daemon) -> None:
    saving = daemon.saving()
    assert not saving.turn(0.0)
    saving.passed(VIEW, 0.0)
    assert saving.due_s == 0.0
    assert saving.turn(0.0)
    ((event, (why,)),) = daemon.said
    assert event == "saved_rules_left_alone"
    assert "rules.v4 left alone: no such file" in why
    assert [one["state"] for one in saving.document()] == ["left alone"]
    saving.passed(VIEW, 1e9)
    assert saving.due_s is None
    assert not saving.turn(1e9)
    saving.passed(replace(VIEW, wanted={V4: replace(wish(), add_egress=False)}), 1e9)
    assert saving.due_s == 1e9
    saving.passed(VIEW, 1e9)
    (daemon.path / "rules.v4").write_text("# nothing of ours\n")
    saving.passed(VIEW, 1e9)
    assert saving.turn(1e9)
    assert [one["state"] for one in saving.document()] == ["in line"]


def test_all_looks_together_are_a_small_share(daemon: Daemon) -> None:
    saving = daemon.saving()
    saving.passed(VIEW, 0.0)
    began_s = time.monotonic()
    saving.turn(0.0)
    took_s = time.monotonic() - began_s
    (daemon.path / "rules.v4").write_text("")
    saving.passed(VIEW, 0.0)
    assert saving.due_s is not None
    assert began_s < saving.due_s <= began_s + 110 * took_s


def test_what_may_pass_by_itself_is_tried_again_later(daemon: Daemon) -> None:
    (daemon.path / "loop").symlink_to("loop")
    saving = daemon.saving(saved_rules=str(daemon.path / "loop"))
    saving.passed(VIEW, 0.0)
    saving.turn(0.0)
    assert [one["state"] for one in saving.document()] == ["not written"]
    saving.passed(VIEW, 0.0)
    assert saving.due_s is not None
    assert saving.due_s > time.monotonic() + 25


@pytest.mark.parametrize(
    ("view", "settings"),
    [
        (replace(VIEW, problems=(Problem(refused()),)), {}),
        (replace(VIEW, wanted={V4: Hold("waiting")}), {}),
        (View(), {}),
        (VIEW, {"mode": "observe"}),
        (VIEW, {"backend": "legacy"}),
    ],
)
def test_when_it_does_not_look(daemon: Daemon, view: View, settings: dict[str, Any]) -> None:
    saving = daemon.saving(**settings)
    saving.passed(view, 0.0)
    assert saving.due_s is None


def test_a_family_that_the_kernel_has_not_is_left_out(daemon: Daemon) -> None:
    saving = daemon.saving(saved_rules=str(daemon.path / "rules.v6"))
    saving.passed(View(node(ipv6=False), {V6: Absent(V6)}), 0.0)
    saving.turn(0.0)
    assert saving.document() == []
