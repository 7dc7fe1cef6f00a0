"""What holds whatever Docker does: by those who were called, by Docker's rules and by its log."""

from __future__ import annotations

import re
from collections import Counter

from tests.docker.conftest import Lives
from tests.docker.life import CONTAINERS
from tests.docker.world import ENOUGH

NODE = "10.4.7.21"
_ALONE = "Docker alone"
# Without these nobody masquerades what leaves the node; so it is seen that the oracle can see it.
_BARE = ("--ip-masq=false", "--iptables=false")
_EVENTS = [
    *("snatd after Docker", "Docker after snatd", "restart", "restart with live-restore"),
    *("kill -9", "published ports", "network create", "many containers"),
]
_MORE_EVENTS = [*_BARE, "Docker as before", "another lease"]
_BROAD = re.compile(r"-A POSTROUTING -s 172\.7\.2[0-9]\.0/24 ! -o docker0 -j MASQUERADE")
_KNOWN = (
    # dockerd's client of containerd, at 12 of 25 stops without snatd.
    "module=libcontainerd",
    # A warning only: the broad rule was narrowed between dockerd's check and its delete.
    "-D POSTROUTING -s #.#.#.#/# ! -o docker0 -j MASQUERADE",
)


def events(lives: Lives) -> list[str]:
    return [*_EVENTS, *(_MORE_EVENTS if lives.suite == "bookworm" else ())]


def test_all_of_it_happened(lives: Lives) -> None:
    for life in (lives.alone, lives.beside_snatd):
        assert list(life.steps) == [_ALONE, *events(lives)]
        assert life.steps["restart with live-restore"].more == {"went on": True}
    many = lives.beside_snatd.steps["many containers"].more
    assert many["answered"] == many["started"] >= (CONTAINERS if lives.suite == "bookworm" else 10)


def test_without_snatd_all_is_wrong(lives: Lives) -> None:
    """Else nothing below would prove anything."""
    for name, step in lives.alone.steps.items():
        if name in _BARE:
            assert step.bare > 0, name
        else:
            assert set(step.called_by) == {NODE}, name


def test_no_call_has_a_wrong_source(lives: Lives) -> None:
    assert set(lives.beside_snatd.steps[_ALONE].called_by) == {NODE}
    for name in events(lives):
        seen = Counter(lives.beside_snatd.steps[name].called_by)
        # The one of a container in a network that flannel has not leased.
        seen -= Counter({NODE: name == "network create"})
        subnet = 23 if name == "another lease" else 21
        assert all(one.startswith(f"172.7.{subnet}.") for one in seen), (name, seen)
        assert seen.total() >= ENOUGH, name


def test_egress_is_masqueraded_throughout(lives: Lives) -> None:
    for name, step in lives.beside_snatd.steps.items():
        assert (set(step.outside), step.bare) == ({NODE}, 0), name
        assert step.outside[NODE] >= ENOUGH, name


def test_published_ports_are_called_by_the_same(lives: Lives) -> None:
    alone = lives.alone.steps["published ports"].more
    assert len(alone) == 6
    assert all(answer.startswith("yes to ") for answer in alone.values()), alone
    assert lives.beside_snatd.steps["published ports"].more == alone


def test_another_network_of_dockers_is_left_alone(lives: Lives) -> None:
    alone = lives.alone.steps["network create"]
    assert alone.more == {"answers": ["yes", NODE], "as the node": True, "bare": 0}
    assert lives.beside_snatd.steps["network create"].more == alone.more
    broad = "-A POSTROUTING -s 172.31.77.0/24 ! -o br-# -j MASQUERADE"
    assert broad in lives.beside_snatd.steps["network create"].rules


def test_dockers_rules_are_the_same_but_for_the_broad_one(lives: Lives) -> None:
    for name in events(lives):
        theirs = [one for one in lives.alone.steps[name].rules if not _BROAD.fullmatch(one)]
        rules = lives.beside_snatd.steps[name].rules
        ours = [one for one in rules if "--comment snatd" in one]
        assert [one for one in rules if one not in ours] == theirs, name
        assert len(ours) == 1, name


def test_docker_says_no_error_that_it_does_not_say_without(lives: Lives) -> None:
    """Over its whole life, for what it says of a stop may come with the next start."""

    def errors(steps: list[str], of: str) -> set[str]:
        life = lives.alone if of == "alone" else lives.beside_snatd
        said = [tuple(one) for name in steps for one in life.steps[name].said]
        return {text for level, text in said if level != "warning" or "ptables" in text}

    more = errors(events(lives), "beside snatd") - errors([_ALONE, *events(lives)], "alone")
    assert not {one for one in more if not any(text in one for text in _KNOWN)}


def test_snatd_complains_of_nothing(lives: Lives) -> None:
    assert lives.beside_snatd.complaints == []
    assert lives.beside_snatd.exits == [0, 0]
