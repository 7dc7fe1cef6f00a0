"""Runs one target in libFuzzer: `python -m tests.fuzz.harness TARGET [libFuzzer's arguments]`.

Coverage is that of snatd and of tomllib. Every input may take a bounded time; and since what is
slow shows only in long inputs, some inputs are also tried with their end repeated many times.
"""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from typing import Any

import atheris

with atheris.instrument_imports(include=["snatd", "tomllib"]):
    from tests.fuzz.targets import BETWEEN, TARGETS

# CPU time, with instrumentation. 64 KiB is what subnet.env may have; the square of a key's dots is
# tomllib's own, and in snatd.config is what bounds it.
_LONGEST_S = 2.0
_LONG_BYTES = 64 * 1024
_LONG_TOML_BYTES = 8 * 1024
_ONE_IN = 64


class TooSlow(Exception):
    """An input took longer than any may."""


def main(name: str, arguments: list[str]) -> None:
    target = TARGETS[name]

    def timed(data: bytes) -> None:
        began_s = time.thread_time()
        target(data)
        took_s = time.thread_time() - began_s
        if took_s > _LONGEST_S:
            raise TooSlow(f"{len(data)} bytes took {took_s:.1f} s")

    def run(data: bytes) -> None:
        timed(data)
        if data and zlib.crc32(data) % _ONE_IN == 0:
            timed(lengthened(data, _LONG_TOML_BYTES if name == "toml" else _LONG_BYTES))

    options: dict[str, Any] = {"custom_mutator": mutated} if name == "nft_json" else {}
    atheris.Setup([name, *arguments], run, **options)
    atheris.Fuzz()


def lengthened(data: bytes, size: int) -> bytes:
    """The input with its last third, half or whole repeated."""
    tail = data[-max(1, len(data) // (1 + len(data) % 3)) :]
    return data + tail * ((size - len(data)) // len(tail))


def mutated(data: bytes, largest: int, seed: int) -> bytes:
    """libFuzzer's mutations of bytes seldom leave JSON behind; so most of the time a node of the
    document is dropped, doubled, replaced by another one, or by a scalar."""
    chance = random.Random(seed)
    document, mark, text = data.partition(BETWEEN)
    try:
        tree = json.loads(document)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, largest))
    places = list(_places(tree))
    if not places or chance.random() < 0.1:
        return bytes(atheris.Mutate(data, largest))
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(places)
        other, its = chance.choice(places)
        scalars: tuple[Any, ...] = (None, True, 0, -1, 2**40, "", "@s", "ip", [], {}, 1.5, "\n")
        match chance.randint(0, 4):
            case 0 if isinstance(holder, list) and key < len(holder):
                del holder[key]
            case 1 if isinstance(holder, list) and key < len(holder):
                holder.insert(key, holder[key])
            case 2 if isinstance(holder, dict):
                holder.pop(key, None)
            case 3:
                _put(holder, key, chance.choice(scalars))
            case _:
                _put(holder, key, _copy(other, its))
    try:
        changed = json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, largest))
    return (changed + mark + text)[:largest]


def _places(node: Any) -> Any:
    """Each node but the root, as its holder and its key there; a scalar has none."""
    pairs = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node if isinstance(node, list) else ())
    )
    for key, inner in list(pairs):
        yield node, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _put(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, dict) or key < len(holder):
        holder[key] = value


def _copy(holder: Any, key: Any) -> Any:
    try:
        return json.loads(json.dumps(holder[key]))
    except (KeyError, IndexError, ValueError, RecursionError):
        return None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
