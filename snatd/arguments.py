"""What may stand behind `snatd`: commands, options and exit statuses. Does nothing but parse."""

from __future__ import annotations

import argparse
import ipaddress
import textwrap
from collections.abc import Callable
from pathlib import Path

from snatd import __version__, config
from snatd.core.model import Address
from snatd.core.packet import PROTOCOLS

_DESCRIPTION = """\
Keeps the source address of container traffic inside a flannel network: the rule that masquerades
all that leaves this node's container subnet is narrowed to what leaves the cluster network, and an
nft table in front of all nat rules, the guard, keeps it whoever writes whatever rule.
"""

_STATE_EXITS = (
    "0 in sync, 1 drift, 3 waiting for flannel or the bridge, 4 a lock or a tool is busy or fails"
)
_COMMON_EXITS = "77 not permitted, 78 the configuration is wrong"


def parser() -> argparse.ArgumentParser:
    """Of all commands; the name of the one that was given is `command`."""
    whole = argparse.ArgumentParser(
        prog="snatd",
        description=_DESCRIPTION,
        epilog="Exit statuses are told by `snatd COMMAND --help`.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"snatd {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, text: str, exits: str, *, reports: bool = True) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=textwrap.fill(f"exit status: {exits}; 2 wrong usage, {_COMMON_EXITS}", 79),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument(
            "--config",
            type=Path,
            metavar="PATH",
            help=f"configuration file (default: {config.DEFAULT_PATH} if it exists)",
        )
        if reports:
            one.add_argument("--json", action="store_true", help="print one JSON object")
        one.set_defaults(command=name)
        return one

    add(
        "run",
        "run the daemon in the foreground",
        "0 ended by SIGTERM or SIGINT, 1 another snatd runs",
        reports=False,
    )
    add(
        "check",
        "say what is wrong with this node's rules, and change nothing",
        _STATE_EXITS,
    )
    apply = add(
        "apply",
        "put this node's rules right once, and say what was done",
        f"{_STATE_EXITS}; with --confirm 1 also if a daemon runs",
    )
    apply.add_argument(
        "--confirm",
        type=_seconds,
        metavar="SECONDS",
        help="put everything back unless a key is pressed or `snatd confirm` is called in time",
    )
    add(
        "confirm",
        "keep what a waiting `snatd apply --confirm` has done",
        "0 done, 1 nothing waits",
    )
    status = add(
        "status",
        "show what the running daemon says of itself",
        "0 in sync, 1 not, or in a fight, or a new configuration was refused, 3 not running, 4 it "
        "does not answer, or its status file cannot be understood; 130 --watch was ended by Ctrl-C",
    )
    status.add_argument(
        "--watch",
        type=_seconds,
        nargs="?",
        const=1.0,
        metavar="SECONDS",
        help="go on showing it, and look that often (default: 1)",
    )
    add(
        "doctor",
        "find what makes containers lose their address or their way, and say what mends it",
        "0 nothing found, 1 something was; information does not count",
    )
    add(
        "revert",
        "put back the rules that were there before snatd's, and remove its own",
        "0 done or nothing to do, 1 a daemon runs, 4 a lock or a tool is busy or fails",
    )
    save = add(
        "save",
        "bring the saved rules files in line, and show what was changed",
        "0 done, or nothing to do, 1 something would change (--dry-run), 3 waiting for flannel or "
        "the bridge, 4 a file is left alone or could not be written, and why",
    )
    save.add_argument("--dry-run", action="store_true", help="only show what would change")
    save.add_argument(
        "--full",
        action="store_true",
        help="replace the files by what `iptables-save` prints now, and bring that in line",
    )
    save.add_argument(
        "--without-dynamic",
        action="store_true",
        help="with --full: leave out the chains of Docker, Kubernetes, CNI, flannel and netavark, "
        "and the rules that jump to them",
    )
    flows = add(
        "flows",
        "list the connections whose container is still seen as somebody else",
        "0 listed or deleted, 3 waiting for flannel, 4 the connections cannot be read",
    )
    flows.add_argument(
        "--delete",
        choices=("udp", "all"),
        help="delete these, and no others: a UDP flow goes on with the right address, "
        "a TCP connection is reset",
    )
    verify = add(
        "verify",
        "send a datagram to each neighbour, and say which source the kernel gave it",
        "0 every datagram into the networks kept its source, 1 one was SNATed, 3 not proved: no "
        "neighbour, no answer or no lease, 4 the node cannot be read",
    )
    verify.add_argument(
        "destinations",
        nargs="*",
        type=_neighbour,
        metavar="DST",
        help="addresses to send to, instead of the neighbours that the routes tell",
    )
    asking = add(
        "explain",
        "say who would rewrite the source of a new connection's packet",
        '0 the source is certain, 1 "may", 4 a lock or a tool is busy or fails; 2 also where there '
        "is no such device or route",
    )
    asking.add_argument("source", type=_address, metavar="SRC", help="address that it comes from")
    asking.add_argument("destination", type=_address, metavar="DST", help="address, behind DNAT")
    asking.add_argument(
        "--out", metavar="IFACE", help="device it leaves by (default: by the route)"
    )
    asking.add_argument(
        "--mark", type=_number(0, 2**32 - 1), default=0, help="its mark (default: 0)"
    )
    asking.add_argument("--proto", type=_protocol, help="tcp, udp, ..., or a number")
    asking.add_argument("--dport", type=_number(0, 65535), help="destination port")
    return whole


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address") from None


def _neighbour(text: str) -> Address:
    address = _address(text)
    if address.is_multicast or address.is_unspecified or address.is_link_local:
        raise argparse.ArgumentTypeError(f"{text} is no container's address")
    return address


def _number(lowest: int, highest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text, 0)
        except ValueError:
            value = -1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not from {lowest} to {highest}")
        return value

    return number


def _protocol(text: str) -> int:
    return PROTOCOLS[text] if text in PROTOCOLS else _number(0, 255)(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 86400")
    return seconds
