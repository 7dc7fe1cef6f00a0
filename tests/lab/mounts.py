"""Mounts that are gone with the test run, however that ends."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS = 0x20000


def own_mount_namespace() -> None:
    """From here on this process's mounts are its own, and die with it."""
    if _libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare: these tests need root")
    _mount("--make-rprivate", "/")


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def overlay(lower: Sequence[Path], folder: Path) -> Path:
    """A writable view on trees, the upper ones first; its changes are in `folder`/upper."""
    for name in ("upper", "work", "root"):
        (folder / name).mkdir(parents=True)
    layers = ":".join(map(str, lower))
    options = f"lowerdir={layers},upperdir={folder}/upper,workdir={folder}/work"
    _mount("-t", "overlay", "overlay", "-o", options, str(folder / "root"))
    return folder / "root"


@contextmanager
def memory(name: str) -> Iterator[Path]:
    """A folder in memory, mounted for this process alone."""
    prefix = f"snatd-{name}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        # The empty mount point of a run that was killed; never that of one that runs.
        if not Path("/proc", left.name.removeprefix(prefix).partition("-")[0]).exists():
            left.rmdir()
    own_mount_namespace()
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as folder:
        _mount("-t", "tmpfs", "tmpfs", folder)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)
