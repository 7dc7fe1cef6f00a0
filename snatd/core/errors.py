"""The errors of the product, one reaction each; anything else that is raised is a bug."""

from __future__ import annotations

import errno


class SnatdError(Exception):
    """Base of the errors that snatd reacts to. Its text says what, where and what to do."""


class ConfigError(SnatdError):
    """The operator must change something: exit 78, no restart. Carries every complaint at once."""

    def __init__(self, complaints: tuple[str, ...]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints


class NotPermitted(SnatdError):
    """The process lacks CAP_NET_ADMIN: exit 77."""


class Refused(SnatdError):
    """Not done, since another snatd would undo it: exit 1."""


class Unanswerable(SnatdError):
    """What was asked makes no sense on this node: no such device, no route. Exit 2."""


class GaveWay(SnatdError):
    """A call was ended because something more important came. Nothing was applied; ask again."""


class BackendError(SnatdError):
    """One backend of one family could not be read or written; the others go on."""

    label = "failed"


class StaleRuleset(BackendError):
    """Somebody wrote between our read and our write; nothing of ours was applied. Look again."""

    label = "stale"


class BackendBusy(BackendError):
    """The xtables lock or a tool did not answer before its deadline; nothing was applied."""

    label = "busy"


class BackendFailed(BackendError):
    """The kernel or the tool refused, or its output cannot be trusted."""


class Illegible(BackendFailed):
    """iptables-nft prints nothing of a table in which a rule is that only nft can write."""


class NotConverged(BackendError):
    """The write was accepted, yet the ruleset reads back differently from what was planned."""

    label = "not converged"


class RuleError(SnatdError):
    """A rule or a listing is not in the language of `iptables -S`."""


class FlowError(SnatdError):
    """A line is not one of a connection as `conntrack` prints it."""


class LeaseError(SnatdError):
    """subnet.env is missing, half-written, malformed or contradicts itself. `explained`: its text
    says how to mend it."""

    def __init__(self, text: str, *, explained: bool = False) -> None:
        super().__init__(text)
        self.explained = explained


_SCARCE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS, errno.ENOSPC}
# What the loader of libraries, threading, and an import out of memory (3.11) say, without a number.
_SCARCE_TEXTS = (
    "Too many open files",
    "Cannot allocate memory",
    "can't start new thread",
    "error return without exception set",
)


def is_scarcity(error: BaseException) -> bool:
    """Whether descriptors, processes, memory or room are used up: nothing is broken, and it may
    pass by itself."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _SCARCE
    return isinstance(error, MemoryError) or any(one in str(error) for one in _SCARCE_TEXTS)
