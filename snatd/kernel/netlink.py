"""What is wanted of pyroute2, without its `__init__`, which loads all of it.

`import pyroute2` loads a database (NDB with sqlite), WireGuard, devlink and the like: 166 modules,
11.6 MB and 0.1 s in 0.7.2, 163 and 9.3 MB in 0.9.7. These names need 89 and 2.8 MB, 99 and 3.6 MB.
The import system does not run a package that is in place, so an empty one of that name and path is
put there; the parts import each other by their full names.
"""

from __future__ import annotations

import importlib.util
import sys

if "pyroute2" not in sys.modules and (_spec := importlib.util.find_spec("pyroute2")):
    sys.modules["pyroute2"] = importlib.util.module_from_spec(_spec)

from pyroute2.iproute import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple, NFCTSocket

__all__ = ["IPRoute", "NFCTAttrTuple", "NFCTSocket", "NetlinkError"]
