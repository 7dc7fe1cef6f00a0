"""What `snatd revert` needs, kept in state_dir: the rules that ours stand for."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

from snatd.core.model import Backend, Family
from snatd.core.revert import Memory
from snatd.host.files import write_whole

SCHEMA = 1

Key = tuple[Family, Backend]


class MemoryFile:
    """replaced.json: one memory per family and backend."""

    def __init__(self, state_dir: Path) -> None:
        self.path = state_dir / "replaced.json"

    def load(self) -> dict[Key, Memory]:
        """All memories; empty where there is no file or not one of ours. Raises OSError."""
        try:
            document = json.loads(self.path.read_bytes())
            if document["schema"] != SCHEMA:
                return {}
            return {
                (Family(entry["family"]), Backend(entry["backend"])): _memory(entry)
                for entry in document["replaced"]
            }
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            # Half a memory is none: `revert` then restores the shape of our own rules.
            return {}

    def store(self, memories: dict[Key, Memory]) -> None:
        """Writes all memories, durably. Raises OSError and keeps the old file."""
        entries = [
            {
                "family": family.value,
                "backend": backend.value,
                "subnet": str(memory.subnet),
                "rules": [{"text": text, "copies": copies} for text, copies in memory.replaced],
            }
            for (family, backend), memory in memories.items()
        ]
        document = {"schema": SCHEMA, "replaced": entries}
        self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(document, indent=1).encode() + b"\n", 0o600, durable=True)

    def forget(self) -> None:
        """Removes the file. Raises OSError."""
        self.path.unlink(missing_ok=True)


def _memory(entry: dict[str, Any]) -> Memory:
    rules = tuple((str(rule["text"]), int(rule["copies"])) for rule in entry["rules"])
    # 64 copies are more than any Docker ever left; a broken file must not fill a table.
    if any("\n" in text or not 0 < copies <= 64 for text, copies in rules):
        raise ValueError("not written by snatd")
    return Memory(ipaddress.ip_network(entry["subnet"]), rules)
