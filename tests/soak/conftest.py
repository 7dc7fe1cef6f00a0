"""The soak wants what the kernel tests want: root, and the machine's own tables left alone."""

from __future__ import annotations

from tests.kernel.conftest import _root, _the_machines_own_tables_stay_as_they_are

__all__ = ["_root", "_the_machines_own_tables_stay_as_they_are"]
