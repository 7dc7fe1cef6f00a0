"""What `snatd revert` needs, kept in state_dir: the rules that ours stand for."""

from __future__ import annotations

import errno
import ipaddress
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snatd.core.errors import SnatdError
from snatd.core.model import Backend, Family, Network
from snatd.core.plan import Transaction
from snatd.core.revert import Memory, lapsed, remember
from snatd.host.files import FileRefused, make_directory, open_to_others, read_bounded, write_whole

SCHEMA = 1

# One node sees few leases in its life; a broken file must not grow without end.
_MOST = 64
_LARGEST_BYTES = 16 << 20

Key = tuple[Family, Backend, Network]


class MemoryDamaged(SnatdError):
    """There is a file, and what it says cannot be told."""


class MemoryFile:
    """replaced.json: one memory per family, backend and subnet, the newest last. There is one of
    the kernel's rules, and another of the saved rules files."""

    def __init__(self, state_dir: Path, name: str = "replaced.json") -> None:
        self.path = state_dir / name

    def load(self) -> dict[Key, Memory]:
        """All memories; empty where there is no file. Raises OSError, MemoryDamaged."""
        try:
            if why := open_to_others(self.path):
                raise MemoryDamaged(f"{self.path} is not believed: {why}")
            document = json.loads(read_bounded(self.path, _LARGEST_BYTES, follow=False))
            # Of another version there is nothing under this key.
            found = {SCHEMA: document["replaced"]}[document["schema"]]
            memories = [(entry, _memory(entry)) for entry in found]
            return {
                (Family(entry["family"]), Backend(entry["backend"]), memory.subnet): memory
                for entry, memory in memories
            }
        except FileNotFoundError:
            return {}
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise MemoryDamaged(f"{self.path} is not believed: it is a symlink") from None
            raise
        except FileRefused as error:
            raise OSError(errno.EINVAL, str(error), str(self.path)) from None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise MemoryDamaged(f"{self.path} is damaged, or not written by this version") from None

    def store(self, memories: dict[Key, Memory]) -> None:
        """Writes all memories, durably. Raises OSError and keeps the old file."""
        entries = [
            {
                "family": family.value,
                "backend": backend.value,
                "subnet": str(memory.subnet),
                "rules": [
                    {"text": text, "copies": copies}
                    | ({"gone": True} if text in memory.gone else {})
                    for text, copies in memory.replaced
                ],
            }
            for (family, backend, _), memory in [*memories.items()][-_MOST:]
        ]
        document = {"schema": SCHEMA, "replaced": entries}
        make_directory(self.path.parent)
        write_whole(self.path, json.dumps(document, indent=1).encode() + b"\n", 0o600, durable=True)

    def keep(
        self, transaction: Transaction, subnet: Network, complain: Callable[[str], None]
    ) -> None:
        """Remembers what a transaction replaces. `complain` hears where that cannot be kept."""
        key = (transaction.family, transaction.backend, subnet)
        try:
            try:
                memories = self.load()
            except MemoryDamaged as error:
                complain(f"{error}: begun anew")
                memories = {}
            now = {
                of: lapsed(memory, transaction)
                if (of[0], of[2]) == (transaction.family, subnet)
                else memory
                for of, memory in memories.items()
            }
            memory = remember(transaction, subnet, now.pop(key, None))
            if {**now, key: memory} != memories:
                self.store({**now, key: memory})
        except OSError as error:
            complain(
                f"state_dir: {self.path} cannot be kept: {error.strerror}: "
                "`snatd revert` will not know what was there before"
            )

    def forget(self) -> None:
        """Removes the file. Raises OSError."""
        self.path.unlink(missing_ok=True)


def _memory(entry: dict[str, Any]) -> Memory:
    rules = tuple((str(rule["text"]), int(rule["copies"])) for rule in entry["rules"])
    # 64 copies are more than any Docker ever left; a broken file must not fill a table.
    if any("\n" in text or not 0 < copies <= 64 for text, copies in rules):
        raise ValueError("not written by snatd")
    gone = frozenset(str(rule["text"]) for rule in entry["rules"] if rule.get("gone"))
    return Memory(ipaddress.ip_network(entry["subnet"]), rules, gone)
