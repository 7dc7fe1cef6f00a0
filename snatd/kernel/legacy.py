"""iptables rules that live in ip_tables: read by `iptables-legacy -S`, written by python-iptables.

A write happens under /run/xtables.lock, compares what is there with what was read, and commits the
whole change at once. python-iptables is imported by the first write, so that a node without legacy
rules never pays for it.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from snatd.core.deadline import Deadline
from snatd.core.errors import BackendError, BackendFailed, RuleError, StaleRuleset
from snatd.core.model import POSTROUTING, Backend, Family, Rule, Ruleset
from snatd.core.plan import MASQUERADE, ChainEdit, Transaction
from snatd.core.rules import SNAT_TARGETS, Match, Spec, Target, parse
from snatd.kernel import peek
from snatd.kernel.listing import changed, is_as_read, read_ruleset
from snatd.kernel.lock import XtablesLock
from snatd.kernel.tools import Tools

# From so many entries on, a second listing and a second fingerprint under the lock are what a
# repair takes most time for (50,000: 60 ms of 150, measured). Below they cost 2 to 6 ms.
LARGE_ENTRIES = 5_000

# What each family's table was when somebody last took fingerprints: each time a new object.
Digests = Mapping[Family, int]


class LegacyTables:
    """One family's nat table in ip_tables."""

    backend = Backend.LEGACY

    def __init__(
        self,
        family: Family,
        tools: Tools,
        lock: XtablesLock,
        digests: Callable[[], Digests] = dict,
    ) -> None:
        """`digests`: the last ones that somebody took before this reads, if anybody does. Whoever
        gives some calls `forget` when no write is to come any more."""
        self.family = family
        self._tools = tools
        self._lock = lock
        self._digests = digests
        # Of a large table: as it was last read, with what it was shortly before, and the library's
        # copy, if one was taken meanwhile.
        self._seen: tuple[Ruleset, int] | None = None
        self._copy: _Table | None = None
        self._last: Digests = {}
        self._written_over: Digests | None = None

    def read(self, deadline: Deadline, *, thorough: bool = False) -> Ruleset:
        """Empty, and nothing created, where the table is not in use: a mere `iptables-legacy -S`
        would leave it listed for good.

        1.2 ms at 100 rules, 24 ms at 10,000: iptables-legacy fetches the whole table.
        """
        self.forget()
        entries = peek.entries(self.family)
        if not entries:
            return Ruleset(self.family, self.backend)
        is_large = entries >= LARGE_ENTRIES
        ruleset = read_ruleset(
            self.family,
            self.backend,
            self._tools,
            deadline,
            thorough=thorough,
            meanwhile=self._prepare if is_large else None,
        )
        before = self._last.get(self.family)
        if is_large and before is not None and self._last is not self._written_over:
            self._seen = ruleset, before
        return ruleset

    def _prepare(self) -> None:
        """What else a write needs, while the tool reads: on two cores it takes no time."""
        last, self._last = self._last, self._digests()
        news = last.get(self.family) not in (None, self._last.get(self.family))
        # After a write of ours it is our own difference. The library's import no look waits for.
        if news and last is not self._written_over and "iptc" in sys.modules:
            self._copy = _open_table(self.family)
            with suppress(BackendError):
                self._copy.open()

    def forget(self) -> None:
        """Drops what the last read kept for a write: of a large table 0.5 kB an entry."""
        self._seen = None
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def apply(self, transaction: Transaction, deadline: Deadline) -> None:
        """Writes a transaction whole, or raises StaleRuleset if anything that it is about moved.

        Programs without the lock (Docker 1.x, python-iptables users) can still come between the
        last digest and the commit, 0.1 ms at 100 rules and 10 ms at 20,000: the kernel itself then
        refuses if the number of entries changed, and nobody can tell if it did not. It is the same
        with iptables-legacy's own writes (at 20,000 rules and as many writes as can be, each
        undid a tenth of one: 16 in 149 of ours, 27 in 259 of its).
        """
        table = self._copy or _open_table(self.family)
        try:
            with self._lock.held(deadline):
                if not self._apply_to_seen(transaction, table):
                    self._apply(transaction, table, deadline)
        finally:
            self._written_over = self._digests()
            self.forget()

    def _apply_to_seen(self, transaction: Transaction, table: _Table) -> bool:
        """Without another listing, if the table is what it was before it was listed. False, and
        nothing is written, if it is not.

        It may have been something else in between and be the same again, so each rule that goes is
        compared with its entry.
        """
        if self._seen is None or changed(transaction, self._seen[0]):
            return False
        ruleset, before = self._seen
        with table, suppress(StaleRuleset):
            entries = table.entries(ruleset)
            if table.has_rules(transaction, entries):
                table.edit(transaction, entries)
                if peek.digest(self.family) == before:
                    table.commit()
                    return True
        return False

    def _apply(self, transaction: Transaction, table: _Table, deadline: Deadline) -> None:
        table.close()  # what was copied before this digest may lack what somebody wrote since
        before = peek.digest(self.family)
        with table:
            actual = is_as_read(transaction, self._tools, deadline)
            table.edit(transaction, table.entries(actual))
            if peek.digest(self.family) != before:
                raise StaleRuleset(
                    f"{self.family.command}-legacy: a program without the lock wrote meanwhile"
                )
            table.commit()


def _import_iptc() -> ModuleType:
    """Imports the library without its searches: 0.03 to 0.08 s instead of 0.44 s, and 17 MB less.

    Left alone it runs ldconfig and, where they are installed, gcc and ld to find its own wrapper
    and the extensions of iptables, and loads setuptools for one path. Its own two variables say
    where to look; no extension is ever loaded from here.
    """
    if "iptc" in sys.modules:
        return sys.modules["iptc"]
    spec = importlib.util.find_spec("iptc")
    if spec is None or spec.origin is None:
        remedy = "install python3-iptables (Debian) or snatd-legacy (Fedora, EL)"
        raise ImportError(f"no module named iptc: {remedy}")
    folder = os.path.dirname(os.path.dirname(spec.origin))
    searches = ("IPTABLES_LIBDIR", "XTABLES_LIBDIR")
    added = [name for name in searches if name not in os.environ]
    os.environ.update(dict.fromkeys(added, folder))
    hidden = "distutils" not in sys.modules
    try:
        if hidden:
            sys.modules["distutils"] = None  # type: ignore[assignment]
        import iptc
    except ImportError:
        # 1.0.1 cannot do without; 1.2.0 has another way.
        del sys.modules["distutils"]
        import iptc
    finally:
        for name in added:
            del os.environ[name]
        if hidden and sys.modules.get("distutils", 0) is None:
            del sys.modules["distutils"]
    return cast(ModuleType, iptc)


def _open_table(family: Family) -> _Table:
    try:
        iptc = _import_iptc()
    except Exception as error:  # its loader raises bare Exceptions where libiptc is missing
        raise BackendFailed(f"python-iptables cannot be used: {error}") from None
    six = family is Family.V6
    return _Table(
        family, iptc, iptc.Table6 if six else iptc.Table, iptc.Rule6 if six else iptc.Rule
    )


@dataclass
class _Table:
    """python-iptables' table, which is libiptc call by call, for the time of one write.

    Entries pass through as bytes. The library's Match and Target objects are not used: they load
    the extensions of iptables, which registers those of one family per process (1.8.9), sets only
    the first option (1.8.11), leaves MASQUERADE without its range, fails where a foreign rule's
    extension is missing, and opens (thereby creates) every other table to look up a jump.
    """

    family: Family
    iptc: ModuleType
    table_class: Any
    rule_class: Any
    handle: Any = None

    def open(self) -> None:
        """Takes the library's copy of the table, unless it has one."""
        if self.handle is None:
            with self.translated():
                # One object per process and name: what an earlier write left in it is thrown away.
                handle = self.table_class(self.table_class.NAT, autocommit=False)
                handle.refresh()
            self.handle = handle

    def close(self) -> None:
        if self.handle is not None:
            self.handle.close()
            self.handle = None

    def __enter__(self) -> None:
        self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """The library's errors end here."""
        try:
            yield
        except (self.iptc.IPTCError, self.iptc.XTablesError) as error:
            said = str(error)
            if os.strerror(errno.EAGAIN) in said:
                raise StaleRuleset("the legacy nat table changed its size meanwhile") from None
            raise BackendFailed(f"the legacy nat table refused: {said}") from None

    def commit(self) -> None:
        with self.translated():
            self.handle.commit()

    def entries(self, actual: Ruleset) -> _Entries:
        """The entry of each rule that was listed. Raises StaleRuleset where there are others."""
        entries: dict[tuple[str, str], bytes] = {}
        for chain in (POSTROUTING, *(name for name, _ in actual.own_chains)):
            for rule, content in self._entries(chain, actual):
                # Of equal rules the first one stays, with its counters.
                entries.setdefault((chain, rule.text), content)
        return entries

    def has_rules(self, transaction: Transaction, entries: _Entries) -> bool:
        """Whether each rule that goes has an entry with its addresses, interface and target."""
        return all(
            self._is_entry_of(rule, entries[edit.chain, rule.text])
            for edit in transaction.edits
            for rule in edit.removed
        )

    def edit(self, transaction: Transaction, entries: _Entries) -> None:
        """Prepares all edits in the library's copy of the table; the kernel sees nothing yet."""
        with self.translated():
            for edit in transaction.edits:
                if edit.chain != POSTROUTING and edit.after is not None:
                    self._write_own_chain(edit.chain, edit.after, entries)
            for edit in transaction.edits:
                if edit.chain == POSTROUTING:
                    self._edit_base_chain(edit, entries)
            for edit in transaction.edits:
                if edit.after is None:
                    self.handle.flush_entries(edit.chain)
                    self.handle.delete_chain(edit.chain)

    def _entries(self, chain: str, actual: Ruleset) -> Iterator[tuple[Rule, bytes]]:
        """Each listed rule of a chain with its entry, copied: a change frees the library's own."""
        found = []
        entry = self.handle.first_rule(chain)
        while entry:
            content = ctypes.string_at(ctypes.addressof(entry), entry.next_offset)
            if jump := self.handle.get_target(entry):
                # Read back, a jump is an offset; to be written or compared it has to be a name.
                content = _with_target_name(content, entry.target_offset, jump)
            found.append(content)
            entry = self.handle.next_rule(entry)
        listed = actual.chain(chain) or ()
        if len(found) != len(listed):
            raise StaleRuleset(f"the legacy chain {chain} changed meanwhile")
        return zip(listed, found, strict=True)

    def _write_own_chain(self, chain: str, rules: tuple[Rule, ...], entries: _Entries) -> None:
        if self.handle.is_chain(chain):
            self.handle.flush_entries(chain)
        else:
            self.handle.create_chain(chain)
        for rule in rules:
            self.handle.append_entry(chain, _buffer(self._build(rule, entries)))

    def _edit_base_chain(self, edit: ChainEdit, entries: _Entries) -> None:
        # libiptc deletes the first of equal entries, so as on nft: where only some copies go, all
        # go and the others come back. The kernel sees only the end of it.
        touched = edit.touched
        for rule in edit.before or ():
            if rule.text in touched:
                gone = entries[edit.chain, rule.text]
                everything = _buffer(b"\xff" * len(gone))
                self.handle.delete_entry(edit.chain, _buffer(gone), everything)
        for position, rule in enumerate(edit.after or ()):
            if rule.text in touched:
                content = entries.get((edit.chain, rule.text)) or self._build(rule, entries)
                self.handle.insert_entry(edit.chain, _buffer(content), position)

    def _build(self, rule: Rule, entries: _Entries) -> bytes:
        """The entry of a rule of ours: struct ipt_entry, a comment match, the target."""
        spec = parse(rule.text)
        if spec.target is None or spec.others:
            raise BackendFailed(f"not a rule that snatd writes: {rule.text}")
        new = self._addressed(spec)
        matches = _comment_match(spec.comment) if spec.comment is not None else b""
        target = self._target(spec.target, entries.get(rule.like) if rule.like else None)
        entry = new.entry
        entry.target_offset = ctypes.sizeof(entry) + len(matches)
        entry.next_offset = entry.target_offset + len(target)
        if rule.counters is not None:
            entry.counters.pcnt = rule.counters.packets
            entry.counters.bcnt = rule.counters.bytes
        return bytes(entry) + matches + target

    def _addressed(self, spec: Spec) -> Any:
        """The library writes the addresses; the rest of the entry is laid out here."""
        new = self.rule_class()
        if spec.source is not None:
            new.src = f"{'!' * spec.source_negated}{spec.source}"
        if spec.destination is not None:
            new.dst = f"{'!' * spec.destination_negated}{spec.destination}"
        if spec.out is not None:
            _set_out_interface(new.get_ip(), spec.out)
        return new

    def _is_entry_of(self, rule: Rule, content: bytes) -> bool:
        """Whether an entry has a rule's addresses, interface and target, for certain."""
        try:
            spec = parse(rule.text)
        except RuleError:
            return False
        planned = self._addressed(spec).entry
        start = planned.__class__.from_buffer_copy(content).target_offset
        name = spec.target.name if spec.target else ""
        addresses, out = _ADDRESSES[self.family], _OUT_INTERFACE[self.family]
        return (
            bytes(planned)[addresses] == content[addresses]
            and bytes(planned)[out] == content[out]
            and _with_target_name(content, start, name) == content
        )

    def _target(self, target: Target, like: bytes | None) -> bytes:
        if target.name not in SNAT_TARGETS:
            return _target_header(target.name, _VERDICT_BYTES) + bytes(_VERDICT_BYTES)
        if like is not None:
            start = self.rule_class().entry.__class__.from_buffer_copy(like).target_offset
            return like[start:]
        if target == MASQUERADE:
            payload = _MASQUERADE_PAYLOAD[self.family]
            return _target_header(target.name, len(payload)) + payload
        raise BackendFailed(
            f"the options of `{target}` cannot be made anew; the rule that had them is gone: "
            f"add it by `{self.family.command}-legacy -t nat -A POSTROUTING`"
        )


_Entries = Mapping[tuple[str, str], bytes]

# include/uapi/linux/netfilter/x_tables.h: size, name, revision; contents aligned to 8 bytes.
_EXTENSION_HEADER = struct.Struct("=H29sB")
_TARGET_NAME = struct.Struct("=29s")
_COMMENT_BYTES = 256
# Of struct ipt_ip and ip6t_ip6: both addresses with their masks, and the name of a device.
_ADDRESSES = {Family.V4: slice(0, 16), Family.V6: slice(0, 64)}
_OUT_INTERFACE = {Family.V4: slice(32, 48), Family.V6: slice(80, 96)}
_INVERTED_OUT = 0x02  # IPT_INV_VIA_OUT and IP6T_INV_VIA_OUT
# An int, padded. libiptc turns RETURN and the names of chains into verdicts itself.
_VERDICT_BYTES = 8
_MASQUERADE_PAYLOAD = {
    # struct nf_nat_ipv4_multi_range_compat: the kernel insists on exactly one range.
    Family.V4: struct.pack("=I20x", 1),
    # struct nf_nat_range
    Family.V6: bytes(40),
}


def _set_out_interface(header: Any, out: Match) -> None:
    """As xtables_parse_interface does it, `+` at the end included.

    The library's Rule6 fills the mask with ones instead of 0xff (1.0.1 to 1.2.0): the kernel would
    compare the lowest bit of each letter, and docker2 would pass for docker0.
    """
    name = os.fsencode(out.value)
    header.outiface = name
    header.outiface_mask = b"\xff" * (len(name) - 1 if name.endswith(b"+") else len(name) + 1)
    if out.negated:
        header.invflags |= _INVERTED_OUT


def _target_header(name: str, payload_bytes: int) -> bytes:
    return _EXTENSION_HEADER.pack(_EXTENSION_HEADER.size + payload_bytes, name.encode(), 0)


def _comment_match(comment: str) -> bytes:
    size = _EXTENSION_HEADER.size + _COMMENT_BYTES
    return _EXTENSION_HEADER.pack(size, b"comment", 0) + os.fsencode(comment).ljust(
        _COMMENT_BYTES, b"\0"
    )


def _with_target_name(content: bytes, target_offset: int, name: str) -> bytes:
    start = target_offset + 2
    packed = _TARGET_NAME.pack(os.fsencode(name))
    return content[:start] + packed + content[start + _TARGET_NAME.size :]


def _buffer(content: bytes) -> Any:
    return (ctypes.c_ubyte * len(content)).from_buffer_copy(content)
