"""What is wanted of pyroute2, without its `__init__`, which loads all of it.

`import pyroute2` loads a database (NDB with sqlite), WireGuard, devlink and the like: 166 modules,
11.6 MB and 0.1 s in 0.7.2, 163 and 9.3 MB in 0.9.7. These names need 89 and 2.8 MB, 99 and 3.6 MB.
The import system does not run a package that is in place, so an empty one of that name and path is
put there; the parts import each other by their full names.

Since 0.9 a socket that breaks (it reads by asyncio into 256 KiB, which there may be no memory for)
is told as the answer to question 0, while whoever asked another waits for ever, and with him the
watchdog. `answering` tells them too.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from snatd.core.errors import BackendBusy

if "pyroute2" not in sys.modules and (_spec := importlib.util.find_spec("pyroute2")):
    sys.modules["pyroute2"] = importlib.util.module_from_spec(_spec)

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

__all__ = ["IPRoute", "NFCTAttrTuple", "NFCTSocket", "NetlinkError", "answering", "errors"]

_Socket = TypeVar("_Socket", IPRoute, NFCTSocket)
# NLMSG_ERROR: header, error, header of the question.
_ERROR = struct.Struct("=IHHIIiIHHII")
# What asyncio says of it is said by the exception.
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def answering(opened: _Socket) -> _Socket:
    """The same socket, every question of which ends: if it breaks, with ENOMEM."""
    core = getattr(opened, "asyncore", None)
    if core is None:  # before 0.9
        return opened
    enqueue = core.enqueue

    def pass_on(data: bytes, sender: object) -> None:
        enqueue(data, sender)
        if sender is None:  # of pyroute2, not of the kernel
            for question in filter(None, core.msg_queue.queues):
                head = (_ERROR.size, 2, 0, question, 0)
                error = _ERROR.pack(*head, -errno.ENOMEM, *head)
                core.msg_queue.put_nowait(question, error)

    core.enqueue = pass_on  # some open what reads them for each call
    if (protocol := getattr(core.local, "protocol", None)) is not None:
        protocol.enqueue = pass_on
    return opened


@contextmanager
def errors() -> Iterator[None]:
    """BackendBusy where no socket can be had, or no memory for the answer."""
    try:
        yield
    except NetlinkError as error:
        if error.code != errno.ENOMEM:
            raise
        raise BackendBusy("netlink: Cannot allocate memory") from None
    except OSError as error:
        raise BackendBusy(f"netlink: {error.strerror or error}") from None
