"""Every subnet.env that flannel has written, and everything else that may stand in its place."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from ipaddress import ip_interface
from pathlib import Path

import pytest

from snatd.core.errors import LeaseError
from snatd.core.model import FamilyLease, Hold, Lease
from snatd.host.flannel import LARGEST_FILE_BYTES, parse_lease, read_lease
from tests.fakes import V4, V6, networks


@pytest.fixture(autouse=True)
def _never_blocks() -> Iterator[None]:
    """A read that waits for somebody to write is an error, and not a test that never ends."""

    def late(*_: object) -> None:
        raise RuntimeError("this blocks")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


TODAY = """\
FLANNEL_NETWORK=10.42.0.0/16
FLANNEL_SUBNET=10.42.0.1/24
FLANNEL_IPV6_NETWORK=2001:cafe:42::/56
FLANNEL_IPV6_SUBNET=2001:cafe:42::1/64
FLANNEL_MTU=1450
FLANNEL_IPMASQ=true
"""
PLAIN = """\
FLANNEL_NETWORK=172.7.0.0/16
FLANNEL_SUBNET=172.7.21.1/24
FLANNEL_MTU=1450
FLANNEL_IPMASQ=false
"""
FOUR = (V4, FamilyLease(ip_interface("10.42.0.1/24"), networks("10.42.0.0/16")))
SIX = (V6, FamilyLease(ip_interface("2001:cafe:42::1/64"), networks("2001:cafe:42::/56")))
BARE = (V4, FamilyLease(ip_interface("172.7.21.1/24"), ()))
LEASED = (V4, FamilyLease(ip_interface("172.7.21.1/24"), networks("172.7.0.0/16")))

FORMS = {
    "both families": (TODAY, Lease((FOUR, SIX), ipmasq=True, mtu=1450)),
    "IPv4 only": (PLAIN, Lease((LEASED,), mtu=1450)),
    "IPv6 only": (
        "FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n"
        "FLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n",
        Lease((SIX,), ipmasq=True, mtu=1400),
    ),
    "before v0.5.3, without the network": (
        "FLANNEL_SUBNET=172.7.21.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n",
        Lease((BARE,), mtu=1472),
    ),
    "the first version's two lines": (
        "FLANNEL_SUBNET=172.7.21.1/24\nFLANNEL_MTU=1472\n",
        Lease((BARE,), mtu=1472, whole=False),
    ),
    "v0.21's list of networks": (
        PLAIN.replace("172.7.0.0/16", "172.7.0.0/16,192.168.0.0/16"),
        Lease(
            ((V4, FamilyLease(LEASED[1].gateway, networks("172.7.0.0/16 192.168.0.0/16"))),),
            mtu=1450,
        ),
    ),
    "a network with host bits": (
        PLAIN.replace("172.7.0.0/16", "172.7.1.2/16"),
        Lease((LEASED,), mtu=1450),
    ),
    "CRLF": (PLAIN.replace("\n", "\r\n"), Lease((LEASED,), mtu=1450)),
    "quotes, blanks and comments, by hand": (
        "# made by hand\n\n  FLANNEL_NETWORK=\"172.7.0.0/16\"\nFLANNEL_SUBNET='172.7.21.1/24'\n"
        "FLANNEL_MTU=1450 \nFLANNEL_IPMASQ=false\n",
        Lease((LEASED,), mtu=1450),
    ),
    "keys of others": (f"FLANNEL_NEW=1\nOTHER=a b c\n{PLAIN}", Lease((LEASED,), mtu=1450)),
    "any order": ("\n".join(reversed(PLAIN.split("\n")[:-1])) + "\n", Lease((LEASED,), mtu=1450)),
    "the same line twice": (PLAIN + PLAIN, Lease((LEASED,), mtu=1450)),
    "cut between two lines": (
        "".join(PLAIN.splitlines(keepends=True)[:2]),
        Lease((LEASED,), whole=False),
    ),
}


@pytest.mark.parametrize(("text", "expected"), FORMS.values(), ids=FORMS)
def test_each_form(text: str, expected: Lease) -> None:
    assert parse_lease(text) == expected


def test_the_subnet_is_without_host_bits() -> None:
    found = parse_lease(PLAIN).of(V4)
    assert found is not None
    assert (found.subnet,) == networks("172.7.21.0/24")
    assert parse_lease(PLAIN).of(V6) is None


REFUSED = {
    "empty": ("", "empty or half-written"),
    "newlines only": ("\n\n", "empty or half-written"),
    "only the rest": ("FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n", "empty or half-written"),
    "cut in a line": (PLAIN[:-3], "line 4: cut in the middle"),
    "cut in the first line": ("FLANNEL_NETWO", "line 1: cut in the middle"),
    "garbage": ("FLANNEL_SUBNET=172.7.21.1/24\nhello\n", "line 2: not KEY=VALUE"),
    "NUL bytes": ("\0" * 100 + "\n", "line 1: not KEY=VALUE"),
    "a NUL in a value": (PLAIN.replace("21.1/24", "21.1/24\0"), "line 2: FLANNEL_SUBNET"),
    "a key twice": (PLAIN + "FLANNEL_SUBNET=172.7.22.1/24\n", "line 5: .* differs from line 2"),
    "no subnet": ("FLANNEL_NETWORK=172.7.0.0/16\n", "FLANNEL_NETWORK without FLANNEL_SUBNET"),
    "no IPv6 subnet": (PLAIN + "FLANNEL_IPV6_NETWORK=fd00::/48\n", "without FLANNEL_IPV6_SUBNET"),
    "outside": (PLAIN.replace("172.7.0.0/16", "10.42.0.0/16"), "line 2: .* lies outside"),
    "wider than the network": (PLAIN.replace("0.0/16", "21.0/25"), "line 2: .* lies outside"),
    "/0": (PLAIN.replace("172.7.0.0/16", "0.0.0.0/0"), "line 1: .* wider than /8"),
    "/7": (PLAIN.replace("172.7.0.0/16", "172.0.0.0/7"), "line 1: .* wider than /8"),
    "a subnet of /0": (PLAIN.replace("21.1/24", "21.1/0"), "line 2: .* wider than /8"),
    "/33": (PLAIN.replace("/24", "/33"), "line 2: FLANNEL_SUBNET"),
    "no prefix": (PLAIN.replace("/24", ""), "line 2: .* no prefix length"),
    "no value": (PLAIN.replace("172.7.21.1/24", ""), "line 2: FLANNEL_SUBNET"),
    "an empty network": (PLAIN.replace("172.7.0.0/16", ""), "line 1: FLANNEL_NETWORK"),
    "an open list": (PLAIN.replace("0.0/16", "0.0/16,"), "line 1: FLANNEL_NETWORK"),
    "IPv6 in IPv4's place": (PLAIN.replace("172.7.21.1/24", "fd00::1/64"), "line 2: .* not ipv4"),
    "IPv4 in IPv6's place": (
        PLAIN + "FLANNEL_IPV6_SUBNET=10.0.0.1/24\n",
        "line 5: .* not ipv6",
    ),
    "a wide IPv6 network": (
        "FLANNEL_IPV6_NETWORK=fc00::/7\nFLANNEL_IPV6_SUBNET=fd00::1/64\n",
        "line 1: .* wider than /16",
    ),
    "an MTU of words": (PLAIN.replace("1450", "big"), "line 3: FLANNEL_MTU"),
    "an MTU too small": (PLAIN.replace("1450", "67"), "line 3: FLANNEL_MTU"),
    "an MTU too large": (PLAIN.replace("1450", "65537"), "line 3: FLANNEL_MTU"),
    "an MTU of many digits": (PLAIN.replace("1450", "001500999"), "line 3: FLANNEL_MTU"),
    "an MTU of thousands of digits": (PLAIN.replace("1450", "001500" + "0" * 5000), "line 3"),
    "an MTU in other digits": (PLAIN.replace("1450", "1450²"), "line 3: FLANNEL_MTU"),
    "IPMASQ of neither kind": (PLAIN.replace("false", "yes"), "line 4: FLANNEL_IPMASQ"),
    "an IPv6 zone in the subnet": (
        "FLANNEL_IPV6_NETWORK=fd00::/32\nFLANNEL_IPV6_SUBNET=fd00::1%eth0/64\n",
        "line 2: FLANNEL_IPV6_SUBNET",
    ),
    "a rule in the zone of an IPv6 network": (
        "FLANNEL_IPV6_NETWORK=fd00::%x -j ACCEPT -d /32\nFLANNEL_IPV6_SUBNET=fd00:0:1::1/64\n",
        "line 1: FLANNEL_IPV6_NETWORK",
    ),
}


@pytest.mark.parametrize(("text", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_why(text: str, why: str) -> None:
    with pytest.raises(LeaseError, match=why):
        parse_lease(text)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(PLAIN)
    assert read_lease(path) == parse_lease(PLAIN)
    through = tmp_path / "link"
    through.symlink_to(path)
    assert read_lease(through) == parse_lease(PLAIN)


def touched(path: Path) -> Path:
    path.touch()
    return path


def loop(path: Path) -> None:
    path.symlink_to(path)


def readable(path: Path, mode: int, owner: int = 0) -> None:
    """A good file."""
    path.write_text(PLAIN)
    path.chmod(mode)
    if owner:
        os.chown(path, owner, owner)


def unreadable_parent(path: Path) -> None:
    path.symlink_to(path.parent / "file" / "subnet.env")
    (path.parent / "file").touch()


IN_ITS_PLACE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda _: None, "no such file: waiting for flanneld"),
    "a directory": (lambda path: path.mkdir(), "directory|not a regular file"),
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a symlink loop": (loop, "symbolic links"),
    "a symlink to nothing": (lambda path: path.symlink_to("/nowhere/at/all"), "no such file"),
    "a path through a file": (unreadable_parent, "not a directory"),
    "a large file": (
        lambda path: path.write_text(PLAIN + "#" * LARGEST_FILE_BYTES),
        "larger than 64 KiB",
    ),
    "a hole of 1 GB": (lambda path: os.truncate(touched(path), 10**9), "larger than 64 KiB"),
    "bytes that are not UTF-8": (
        lambda path: path.write_bytes(b"FLANNEL_MTU=1450\n\xff\xfe\n"),
        "line 2: a byte that is not ASCII",
    ),
    "digits that are not ASCII": (
        lambda path: path.write_text("FLANNEL_SUBNET=1\u0663.0.0.1/24\n"),
        "line 1: a byte that is not ASCII",
    ),
    "NUL bytes": (lambda path: path.write_bytes(bytes(4096)), "line 1"),
    "an empty file": (touched, "empty or half-written"),
    "what others can write": (lambda path: readable(path, 0o646), "can be written by others"),
    "what is another's": (lambda path: readable(path, 0o600, 65534), "belongs to uid 65534"),
}


@pytest.mark.parametrize(("make", "why"), IN_ITS_PLACE.values(), ids=IN_ITS_PLACE)
def test_whatever_stands_in_its_place_holds(
    make: Callable[[Path], object], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "subnet.env"
    make(path)
    found = read_lease(path)
    assert isinstance(found, Hold)
    assert found.reason.startswith(f"{path}: ")
    assert re.search(why, found.reason)


@pytest.mark.parametrize("make", [make for make, _ in IN_ITS_PLACE.values()], ids=IN_ITS_PLACE)
def test_reading_again_and_again_keeps_no_descriptor(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "subnet.env"
    make(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        read_lease(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "subnet.env"
    path.write_text(PLAIN + "#" * (LARGEST_FILE_BYTES - len(PLAIN) - 1) + "\n")
    assert isinstance(read_lease(path), Lease)
