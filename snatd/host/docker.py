"""Reads how the dockerds of this network namespace are configured. Decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from snatd.core.docker import Docker, file_of, is_daemon, parse_file
from snatd.core.programs import Process
from snatd.host.files import FileRefused, read_bounded

NAMES = ("docker", "dockerd", "dockerd-current", "dockerd-ce")
_LARGEST_FILE_BYTES = 1 << 20


def read_dockers(processes: Iterable[Process]) -> tuple[Docker, ...]:
    """Each dockerd among some processes; where none runs, what its file says for the next start,
    and nothing where that is not there either."""
    running = [one for one in processes if is_daemon(one)]
    if running:
        return tuple(_read(one) for one in running)
    docker = _read(None)
    return (docker,) if docker.file or docker.refused else ()


def _read(process: Process | None) -> Docker:
    path = file_of(process)
    try:
        content = read_bounded(Path(process.path(path) if process else path), _LARGEST_FILE_BYTES)
        return Docker(process, path, parse_file(content))
    except FileNotFoundError:
        return Docker(process, path)
    except OSError as error:
        return Docker(process, path, refused=f"cannot be read: {error.strerror}")
    except (FileRefused, ValueError) as error:
        return Docker(process, path, refused=str(error))
