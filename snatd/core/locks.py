"""Who holds a lock on a file, by the text of /proc/locks."""

from __future__ import annotations


def holder(locks: str, device: tuple[int, int], inode: int) -> int | None:
    """The pid that holds the flock on a file, None where none is listed.

    `device`: its major and minor number. Locks of processes of other pid namespaces are not listed.
    """
    file = f"{device[0]:02x}:{device[1]:02x}:{inode}"
    for line in locks.splitlines():
        # `1: FLOCK ADVISORY WRITE 4711 00:1a:42 0 EOF`; who waits has `->` in the second place.
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == file and words[4].isdecimal():
            return int(words[4])
    return None
