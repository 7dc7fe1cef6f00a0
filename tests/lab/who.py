"""A server that says who called, and the calls: the oracle of every claim about a packet."""

from __future__ import annotations

import errno
import selectors
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

from tests.lab.netns import Place

PORT = 8080


class WhoServer:
    """Answers over TCP (a line of HTTP) and UDP with the caller's address."""

    def __init__(self, host: Place, *addresses: str) -> None:
        with host.entered():
            self._tcp = socket.create_server(
                ("", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
            # One socket an address: a wildcard one would answer from the address nearest.
            self._udp = [_udp_server(address) for address in addresses]
        self.log: list[str] = []
        self._selector = selectors.DefaultSelector()
        for one in (self._tcp, *self._udp):
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)
        self._running = True
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._running:
            for key, _ in self._selector.select(0.1):
                with suppress(OSError):
                    self._answer(key.fileobj)

    def _answer(self, server: object) -> None:
        assert isinstance(server, socket.socket)
        if server is self._tcp:
            connection, peer = server.accept()
            with connection:
                connection.settimeout(2)
                body = f"{_plain(peer[0])}\n"
                self.log.append(body.strip())
                connection.sendall(f"HTTP/1.0 200 OK\r\n\r\n{body}".encode())
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        else:
            _, peer = server.recvfrom(64)
            self.log.append(_plain(peer[0]))
            server.sendto(_plain(peer[0]).encode(), peer)

    def close(self) -> None:
        self._running = False
        self._thread.join(2)
        for one in (self._tcp, *self._udp):
            one.close()
        self._selector.close()


def _udp_server(address: str) -> socket.socket:
    server = socket.socket(_family(address), socket.SOCK_DGRAM)
    server.bind((address, PORT))
    return server


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def seen_by(
    host: Place, destination: str, timeout_s: float = 10.0, source: str | None = None
) -> str | None:
    """As whom a host is seen by a WhoServer, over TCP; None where no answer comes."""
    with host.entered():
        caller = socket.socket(_family(destination), socket.SOCK_STREAM)
    with caller:
        caller.settimeout(timeout_s)
        if source is not None:
            caller.bind((source, 0))
        try:
            caller.connect((destination, PORT))
            answer = b""
            while chunk := caller.recv(256):
                answer += chunk
        except OSError:
            return None
    return answer.decode().rpartition("\r\n")[2].strip() or None


def seen_by_udp(host: Place, destination: str, timeout_s: float = 10.0) -> str | None:
    """The same by one datagram: a new flow each time, and no handshake to wait for."""
    with host.entered():
        caller = socket.socket(_family(destination), socket.SOCK_DGRAM)
    with caller:
        caller.settimeout(timeout_s)
        try:
            caller.sendto(b"who", (destination, PORT))
            return caller.recv(64).decode()
        except OSError:
            return None


Seen = Counter[tuple[str, str | None]]


def census(
    host: Place,
    destinations: Sequence[str],
    more: Callable[[int], bool],
    first_port: int = 1025,
    timeout_s: float = 0.5,
) -> Seen:
    """As whom each destination sees a host, over many UDP flows one after the other.

    Each flow has a source port of its own, counted up: no flow meets the entry of an earlier one.
    `more` is asked before each round with the number of rounds so far. After 64,510 of them there
    are no more ports, and it ends.
    """
    seen: Seen = Counter()
    number = 0
    with host.entered():
        while first_port + number <= 65535 and more(number):
            number += first_port + number == PORT  # of the host's own server
            for destination in destinations:
                with socket.socket(_family(destination), socket.SOCK_DGRAM) as caller:
                    caller.settimeout(timeout_s)
                    try:
                        caller.bind(("", first_port + number))
                    except OSError as error:
                        if error.errno != errno.EADDRINUSE:
                            raise
                        break  # somebody got it from the kernel
                    # Connected, or else a late answer of the one before would be taken for his.
                    caller.connect((destination, PORT))
                    try:
                        caller.send(b"who")
                        answer: str | None = caller.recv(64).decode()
                    except OSError:
                        answer = None
                seen[destination, answer] += 1
            number += 1
    return seen


class Udp:
    """A UDP flow that goes on: one socket that asks a WhoServer as whom it is seen."""

    def __init__(self, host: Place, destination: str) -> None:
        with host.entered():
            self.socket = socket.socket(_family(destination), socket.SOCK_DGRAM)
        self.socket.settimeout(2)
        self.socket.connect((destination, PORT))

    def seen_as(self) -> str:
        self.socket.send(b"who")
        return self.socket.recv(64).decode()


class Discard:
    """The discard port of an address, and who sent something there."""

    def __init__(self, host: Place, address: str) -> None:
        with host.entered():
            self._socket = socket.socket(_family(address), socket.SOCK_DGRAM)
        self._socket.bind((address, 9))
        self._socket.settimeout(2)

    def sender(self) -> str:
        return str(self._socket.recvfrom(100)[1][0])

    def count(self) -> int:
        """How many datagrams are there that nobody asked for yet."""
        self._socket.setblocking(False)
        heard = 0
        with suppress(BlockingIOError):
            while self._socket.recv(100):
                heard += 1
        self._socket.settimeout(2)
        return heard
