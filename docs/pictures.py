"""`make pictures`: what the demo and `snatd status` print, as SVG, from a real run."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.lab.netns import until
from tests.lab.network import Lab
from tests.lab.process import Snatd
from tests.lab.who import seen_by

_HERE = Path(__file__).parent
_COLUMNS = 112


def main() -> int:
    """Writes both pictures, or none of a run that failed."""
    demo = printed([sys.executable, "-m", "tests.lab.demo"])
    status = printed_status()
    draw(demo, "make demo", _HERE / "demo.svg")
    draw(status, "snatd status", _HERE / "status.svg")
    return 0


def printed_status() -> str:
    """Of a daemon on a node whose broad rule came back once, and whose container then called."""
    with Lab("nft") as lab:
        node, neighbour = lab.nodes
        node.write_lease()
        broad = ("iptables", "-t", "nat", "-I", "POSTROUTING", *node.broad_rule)
        node.host.run(*broad)
        with Snatd(node.host, lab.folder / "snatd") as snatd:
            snatd.start()
            node.host.run(*broad)
            until(lambda: snatd.status()["repairs"] >= 2, "the repair")
            seen_by(node.container, neighbour.container_address)
            until(lambda: snatd.status()["proof"]["proved_at"], "the proof")
            argv = node.host.command(*snatd.program, "status", "--config", str(snatd.config))
            return printed(argv, node.host.environment())


def printed(argv: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints on a terminal of that many columns. Raises CalledProcessError."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, _COLUMNS, 0, 0))
    there = {**(environment or os.environ), "TERM": "xterm-256color"}
    there.pop("NO_COLOR", None)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=terminal, env=there) as process:
        os.close(terminal)
        said = bytearray()
        try:
            while some := os.read(reader, 65536):
                said += some
        except OSError:
            pass  # EIO: the last one who had the terminal has closed it
    os.close(reader)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, argv, bytes(said))
    return said.decode().replace("\r\n", "\n")


def draw(said: str, title: str, path: Path) -> None:
    """Writes the picture of a terminal."""
    console = Console(width=_COLUMNS, record=True, file=io.StringIO(), highlight=False)
    console.print(Text.from_ansi(said.strip("\n")))
    # The same run gives the same file; rich would number what it draws by chance.
    console.save_svg(str(path), title=title, unique_id="snatd")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
