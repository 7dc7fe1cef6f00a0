"""What the daemon says, when it is news, and that each family's news are its own."""

from __future__ import annotations

import errno
import selectors
from typing import Any

import pytest

from snatd.config import Config
from snatd.core.desired import Desired
from snatd.core.flows import Ids
from snatd.core.model import Family
from snatd.core.schedule import Schedule
from snatd.daemon import Daemon, _causes
from snatd.evidence import Evidence, _FamilyFlows
from snatd.facts import Facts
from snatd.host import status
from snatd.host.metrics import MetricsFile
from snatd.host.notify import Notifier
from snatd.kernel.conntrack import Tally
from snatd.kernel.events import Writer
from snatd.kernel.tools import Tools
from tests.fakes import BROAD, NFT, V4, V6, lease, link, listed, node, plans, wish

Said = list[tuple[str, dict[str, Any]]]


class Log:
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.said: Said = []

    def info(self, event: str, **fields: Any) -> None:
        self.said.append((event, fields))

    warning = error = info


@pytest.fixture
def daemon() -> Daemon:
    """One that can only speak."""
    daemon = Daemon.__new__(Daemon)
    daemon._told = {}
    daemon._tools = Tools()
    daemon._log = Log()
    return daemon


def said(daemon: Daemon) -> Said:
    found: Said = daemon._log.said
    daemon._log = Log()
    return found


def test_news_are_said_once_and_their_end_with_what_they_were(daemon: Daemon) -> None:
    for what in (["a"], ["a"], ["a", "b"], [], []):
        daemon._say("holding", "info", what, over="hold_ended")
    assert said(daemon) == [
        ("holding", {"what": ["a"]}),
        ("holding", {"what": ["a", "b"]}),
        ("hold_ended", {"was": ["a", "b"]}),
    ]


def test_what_is_the_same_is_no_news_and_still_the_last_word(daemon: Daemon) -> None:
    for what in ("held by pid 1", "held by pid 2", ""):
        daemon._say("backend_failed", "error", what, same=bool(what), over="recovered")
    assert said(daemon) == [
        ("backend_failed", {"what": "held by pid 1"}),
        ("recovered", {"was": "held by pid 2"}),
    ]


SIX = wish(
    node(lease("fd00:7:21::1/64", "fd00:7::/32", V6), link(3, "docker0", "fd00:7:21::1/64")),
    family=V6,
)


@pytest.fixture
def count(daemon: Daemon) -> Any:
    """Tells an `Evidence` of the daemon's how many new connections of a family were changed."""
    with selectors.EpollSelector() as selector:
        evidence = Evidence(Config(), Tools(), selector, daemon._say)

        def tell(family: Family, changed: int, *, after_change: bool = False) -> None:
            desired: Desired = {V4: wish(), V6: SIX}[family]
            evidence._flows.setdefault(family, _FamilyFlows(before=Ids()))
            evidence._after_change = after_change
            evidence._count(desired, Tally(changed=changed, ids=Ids()))

        yield tell


def test_new_wrong_flows_are_told_once_for_each_family(daemon: Daemon, count: Any) -> None:
    for changed in (0, 1, 2, 2):
        count(V4, changed)
        count(V6, 5 * changed)
    assert [fields["what"].split()[0] for _, fields in said(daemon)] == ["1", "5"]
    # A repair begins a new count, of which the first is news again.
    count(V4, 0, after_change=True)
    count(V4, 7)
    ((event, fields),) = said(daemon)
    assert (event, fields["what"].split()[0]) == ("flows_changed", "7")


def test_one_familys_connections_being_known_says_nothing_of_the_other(daemon: Daemon) -> None:
    with selectors.EpollSelector() as selector:
        evidence = Evidence(Config(), Tools(), selector, daemon._say)
        for _ in range(3):
            evidence._say_unknown(V4, "")
            evidence._say_unknown(V6, "no module")
    ((event, fields),) = said(daemon)
    assert (event, fields["what"]) == ("flows_unknown", "ipv6: no module")


def test_whose_write_was_repaired_already_is_named_only_if_nobody_else_is_there() -> None:
    old, new, other = (Writer(pid, "iptables") for pid in (1, 2, 3))
    (one,) = plans(wish(), listed(f"-A POSTROUTING {BROAD}"))
    nat = frozenset({(V4, NFT)})
    wrote = {old: nat, new: nat, other: frozenset({(V6, NFT)})}
    assert _causes(one, wrote, {old}) == (new,)
    assert _causes(one, wrote, ()) == (old, new)
    assert _causes(one, {old: nat, other: wrote[other]}, {old}) == (old,)
    assert _causes(one, {other: wrote[other]}, ()) == ()


def test_a_status_file_that_cannot_be_written_is_named(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails, unlike an open, does not say of which file."""

    full = OSError(errno.ENOSPC, "No space left on device")
    outcomes = iter((full, full, None, full))

    def write(*_: object) -> None:
        if (outcome := next(outcomes)) is not None:
            raise outcome

    monkeypatch.setattr(status, "write", write)
    daemon._settings = Config()
    daemon._schedule = Schedule(resync_s=60)
    daemon._facts = Facts("enforce")
    daemon._notifier = Notifier()
    daemon._schedule = Schedule(resync_s=60)
    daemon._saving = daemon._look_after_files()
    daemon._metrics = MetricsFile(None)
    with selectors.EpollSelector() as selector:
        daemon._evidence = Evidence(Config(), Tools(), selector, daemon._say)
        for _ in range(4):
            daemon._publish()
    # Told again after it had been well.
    assert [fields["what"] for _, fields in said(daemon)] == [
        "/run/snatd/status.json: No space left on device"
    ] * 2
