"""The fuzzer's corpus, without the fuzzer: what was found once is not found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_each_input_keeps_what_its_target_promises(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for one in inputs:
        TARGETS[name](one.read_bytes())


def test_the_corpus_is_small_and_has_a_target() -> None:
    files = [one for one in CORPUS.rglob("*") if one.is_file()]
    assert {one.parent.name for one in files} == set(TARGETS)
    assert sum(one.stat().st_size for one in files) < 300_000
