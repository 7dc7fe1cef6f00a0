"""Connections of the kernel: lists by the `conntrack` command, single entries by pyroute2.

A table holds 262,144 entries and more. pyroute2 takes 4.5 s and 55 MB or more to dump 60,000 (0.7.2
and 0.9.7), the command 0.2 s in a memory of its own. The command in turn dumps the whole table for
each `-D` (0.15 s of 64,000), where netlink deletes an entry by its tuple and id in 0.3 ms.
Decides nothing: what is wrong is `core.flows`.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snatd.core.desired import Desired
from snatd.core.errors import BackendError, BackendFailed, FlowError
from snatd.core.flows import (
    Flow,
    FlowKey,
    Ids,
    Kept,
    Verdict,
    one_in,
    parse_flow,
    to_delete,
    verdict,
)
from snatd.core.model import Address, Family
from snatd.kernel.sysctls import read_number
from snatd.kernel.tools import Tools, check_exit

if TYPE_CHECKING:
    from snatd.core.routes import Peer

_DOMAINS = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_NO_ENTRY = 2

# A full pipe: about 480 lines, 5 ms of work.
_CHUNK_SIZE = 65536
_LONGEST_LINE_BYTES = 65536
_DELETING_S = 0.01
# Between the end of its output and its own conntrack gives back what it read by: at once, or after
# more than 50 ms where the machine is busy. Asked again by each step.
_LAST_WORDS_S = 0.01

SHOWN = 1000


@dataclass(frozen=True)
class Tally:
    """What a sweep saw in one family. `flows` are the first SHOWN of the `wrong` ones, and none of
    a census.

    `changed` and `kept` count those that were not there before, wrong and right; `ids` are those of
    before, where there was no before. Both want a census. `cut_off` says why it is not the whole.
    """

    wrong: int = 0
    deleted: int = 0
    changed: int = 0
    kept: int = 0
    flows: tuple[Flow, ...] = ()
    ids: Ids | None = None
    cut_off: str | None = None


class Sweep:
    """One look through a family's connections, and the end of those that the policy deletes.

    Never blocks: a selector waits for `fileno`, each `step` takes 15 ms at most, and is due at
    `ends_s` of the monotonic clock at the latest. `run` does it all at once. Nothing is held but
    the first wrong flows. `census`: also counts the flows that kept their source, and of both those
    that are not in `before`, at the cost of reading all from the subnet into the networks; but no
    connection of before that is over. Of large tables those that kept it are a sample's, and the
    count is what it stands for (`Ids.one_in`).
    """

    def __init__(
        self,
        desired: Desired,
        tools: Tools,
        limit_s: float,
        *,
        marks: int = 0,
        policy: str = "report",
        census: bool = False,
        before: Ids | None = None,
    ) -> None:
        """Starts the child. Raises BackendFailed where `conntrack` is missing, BackendBusy where
        no process can be made."""
        if tools.find("conntrack") is None:
            raise BackendFailed(
                "connections cannot be listed: the command conntrack is missing: install the "
                "package conntrack (Debian, Ubuntu) or conntrack-tools (Fedora, EL)"
            )
        self.ends_s = time.monotonic() + limit_s
        self._desired, self._marks, self._policy = desired, marks, policy
        self._is_first = before is None
        if census and before is None:
            before = Ids(one_in(read_number("net.netfilter.nf_conntrack_count") or 0))
        self._before = before
        self._sure = Kept(desired)
        self._wrong = self._changed = self._deleted = self._kept = 0
        self._census = census
        self._flows: list[Flow] = []
        self._due: deque[Flow] = deque()
        self._rest = b""
        self._entries: Entries | None = None
        self._limit_s = limit_s
        self._argv = list_command(desired, every=census)
        self._child = tools.start(self._argv)
        assert self._child.stdout is not None
        self._stdout = self._child.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self.tally: Tally | None = None

    def fileno(self) -> int:
        """The pipe from the child. It stays readable at its end until `step` has found all."""
        return self._stdout.fileno()

    def run(self) -> Tally:
        """Steps until it is done. Blocks up to the limit. Raises BackendError."""
        while self.tally is None:
            if not self._due:
                select.select([self], [], [], max(0.0, self.ends_s - time.monotonic()))
            self.step()
        return self.tally

    def step(self) -> None:
        """Deletes or reads a little; at the end sets `tally`. Raises BackendError and is closed."""
        try:
            if time.monotonic() >= self.ends_s:
                self._finish(f"after {self._limit_s:g} s")
            elif self._due:
                self._delete_some()
            elif (chunk := self._read()) is not None:
                self._take(chunk)
        except FlowError as error:
            self.close()
            raise BackendFailed(str(error)) from None
        except BackendError:
            self.close()
            raise

    def _read(self) -> bytes | None:
        try:
            return os.read(self.fileno(), _CHUNK_SIZE)
        except BlockingIOError:
            return None

    def _take(self, chunk: bytes) -> None:
        if not chunk:
            if _has_ended(self._argv, self._child, _LAST_WORDS_S):
                if self._rest:
                    raise BackendFailed(f"`{' '.join(self._argv)}` ended in the middle of a line")
                self._finish(None)
            return
        lines, self._rest = _whole_lines(self._rest + chunk)
        for line in lines:
            text = line.decode("ascii", "backslashreplace")
            if (identity := self._sure.identity(text)) is not None:
                self._keep(identity)
            else:
                self._judge(parse_flow(text))

    def _keep(self, identity: int) -> None:
        if self._before is None or self._before.counted(identity):
            self._kept += self._is_new(identity)

    def _is_new(self, identity: int) -> bool:
        if self._is_first and self._before is not None:
            self._before.add(identity)
        return self._is_first or self._before is None or identity not in self._before

    def _judge(self, flow: Flow) -> None:
        found = verdict(flow, self._desired, self._marks)
        if found is Verdict.FOREIGN:
            return
        if found is Verdict.KEPT:
            self._keep(flow.identity)
            return
        new = self._is_new(flow.identity)
        if self._census and flow.is_over and (self._is_first or not new):
            return  # of before, and in nobody's way any more
        self._wrong += 1
        self._changed += new
        if not self._census and len(self._flows) < SHOWN:
            self._flows.append(flow)
        if to_delete(flow, self._policy):
            self._due.append(flow)

    def _delete_some(self) -> None:
        if self._entries is None:
            self._entries = Entries(self._desired.family)
        stop_s = time.monotonic() + _DELETING_S
        while self._due and time.monotonic() < stop_s:
            flow = self._due.popleft()
            self._deleted += self._entries.delete(flow.key, flow.id)

    def _finish(self, cut_off: str | None) -> None:
        self.close()
        self.tally = Tally(
            wrong=self._wrong,
            deleted=self._deleted,
            changed=self._changed,
            kept=self._kept * (self._before.one_in if self._before is not None else 1),
            flows=tuple(self._flows),
            ids=self._before if self._is_first else None,
            cut_off=cut_off,
        )

    def close(self) -> None:
        """Ends the child and closes what is open; unregister it from a selector before."""
        Tools.end(self._child)
        if self._entries is not None:
            self._entries.close()
            self._entries = None


def list_command(desired: Desired, *, every: bool) -> list[str]:
    """What lists the connections out of the subnet into the networks; `every`: not only those
    whose source was translated. It takes one `-d`; where there are more networks, we filter."""
    into = ["-d", str(desired.cluster[0])] if len(desired.cluster) == 1 else []
    only = [] if every else ["--src-nat"]
    subnet = str(desired.subnet)
    return ["conntrack", "-L", "-f", desired.family.value, *only, "-s", subnet, *into, "-o", "id"]


def read_peers(desired: Desired, tools: Tools, limit_s: float) -> tuple[tuple[Peer, ...], bool]:
    """With whom containers have connections, from the subnet into the networks and from anywhere to
    the subnet; and whether these are all, since it reads for the limit at most. Raises as Sweep
    does."""
    from snatd.core.routes import best, peer

    found: dict[Address, Peer] = {}
    ends_s = time.monotonic() + limit_s
    to_us = ["conntrack", "-L", "-f", desired.family.value, "-d", str(desired.subnet), "-o", "id"]
    for outbound, argv in ((True, list_command(desired, every=True)), (False, to_us)):
        for line in _lines(argv, tools, ends_s):
            try:
                one = peer(line.decode("ascii", "backslashreplace"), outbound=outbound)
            except ValueError as error:
                raise BackendFailed(f"`{' '.join(argv)}`: {error}") from None
            if one is not None:
                found[one.address] = best(found.get(one.address), one)
    return tuple(found.values()), time.monotonic() < ends_s


def _lines(argv: list[str], tools: Tools, ends_s: float) -> Iterator[bytes]:
    """What a tool prints until then, without a last line that may be cut."""
    child = tools.start(argv)
    try:
        assert child.stdout is not None
        rest = b""
        while select.select([child.stdout], [], [], max(0.0, ends_s - time.monotonic()))[0]:
            chunk = os.read(child.stdout.fileno(), _CHUNK_SIZE)
            if not chunk:
                _has_ended(argv, child, max(0.0, ends_s - time.monotonic()))
                break
            lines, rest = _whole_lines(rest + chunk)
            yield from lines
    finally:
        tools.end(child)


def _whole_lines(text: bytes) -> tuple[list[bytes], bytes]:
    """And the beginning of the next one. Raises BackendFailed where that is no line's."""
    *lines, rest = text.split(b"\n")
    if len(rest) > _LONGEST_LINE_BYTES:
        raise BackendFailed("conntrack prints a line without an end")
    return lines, rest


def _has_ended(argv: list[str], child: subprocess.Popen[bytes], within_s: float) -> bool:
    """Whether a child whose output ended has ended too. Raises BackendError where it did not end
    well: its output may be cut."""
    assert child.stderr is not None
    try:
        returncode = child.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    os.set_blocking(child.stderr.fileno(), False)
    check_exit(argv, returncode, child.stderr.read(4096) or b"")
    return True


class Entries:
    """Single connections of a family by their exact tuple: 0.4 ms each. A context manager.

    The socket asks and subscribes to nothing, and is used in the thread that made it (pyroute2 0.9
    wants both).
    """

    def __init__(self, family: Family) -> None:
        """Raises BackendBusy where no socket can be had."""
        # A list needs no pyroute2, whose import takes longer than to list 10,000 entries.
        from snatd.kernel.netlink import NFCTSocket, answering, errors

        self._family = _DOMAINS[family]
        with errors():
            self._socket = answering(NFCTSocket(nfgen_family=self._family))

    def seen_as(self, key: FlowKey) -> Address | None:
        """The source that the other side sees, or None where there is no such connection."""
        for answer in self._ask("get", key) or ():
            original = answer.get_attr("CTA_TUPLE_ORIG")
            # The kernel also finds an entry whose reply has this tuple.
            if original and self._address(original, "SRC") == key.source:
                return self._address(answer.get_attr("CTA_TUPLE_REPLY"), "DST")
        return None

    def delete(self, key: FlowKey, entry_id: int | None = None) -> bool:
        """Deletes one entry; False where it is gone. With its id, not one that took its place, as
        far as the id tells (`Flow.identity`)."""
        more = {} if entry_id is None else {"id": entry_id}
        return self._ask("del", key, **more) is not None

    def _address(self, part: Any, which: str) -> Address:
        version = 4 if self._family == socket.AF_INET else 6
        return ipaddress.ip_address(
            part.get_attr("CTA_TUPLE_IP").get_attr(f"CTA_IP_V{version}_{which}")
        )

    def _ask(self, what: str, key: FlowKey, **more: int) -> list[Any] | None:
        """The answers (pyroute2 0.7 has none to a delete), or None where there is no such entry."""
        from snatd.kernel.netlink import NetlinkError, NFCTAttrTuple, errors

        icmp_type, icmp_code, icmp_id = key.icmp or (None, None, None)
        original = NFCTAttrTuple(
            family=self._family,
            saddr=str(key.source),
            daddr=str(key.destination),
            proto=key.protocol,
            sport=key.source_port,
            dport=key.destination_port,
            icmp_id=icmp_id,
            icmp_type=icmp_type,
            icmp_code=icmp_code,
        )
        try:
            with errors():
                return list(self._socket.entry(what, tuple_orig=original, **more))
        except NetlinkError as error:
            if error.code == _NO_ENTRY:
                return None
            raise BackendFailed(f"the kernel refused to {what} a connection: {error}") from None

    def close(self) -> None:
        with suppress(OSError):
            self._socket.close()

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
