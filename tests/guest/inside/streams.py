# SPDX-License-Identifier: Apache-2.0
"""Streams of checked data over sockets of any kind, and a server for them.

A client says what it wants in a line, "take SEED SIZE" or "give SEED SIZE"; the bytes
follow in that direction. At the end of what it takes the server says "ok".
"""

import socket
import threading
from collections.abc import Callable
from typing import Any

from tests.guest.inside.files import in_threads
from tests.guest.inside.noise import PIECE, data, difference, pieces

Address = list[Any]
"""["inet", host, port] or ["vsock", cid, port]; JSON has no tuples."""

FAMILIES = {"inet": socket.AF_INET, "vsock": socket.AF_VSOCK}
PATIENCE = 60
ENOUGH = 64
"""Connections that a server lets wait."""
VSOCK_LIMIT = 32768
"""Linux 6.17 and later puts larger packets into several descriptors, which
vhost-device-vsock 0.3.0 drops ("DescriptorLengthTooSmall"), and the stream stalls."""


def no_matter(size: int) -> None:
    """Nobody counts."""


class Server:
    """Serves each connection in a thread of its own, and remembers what went wrong."""

    def __init__(self, listener: socket.socket) -> None:
        listener.listen(ENOUGH)
        self.listener = listener
        self.moved = 0
        """Bytes of streams, in both directions."""
        self.failures: list[str] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:  # it is closed
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(PATIENCE)
            with sock, sock.makefile("rb") as incoming:
                for line in incoming:
                    verb, seed, size = line.split()
                    if verb == b"take":
                        receive(incoming, int(seed), int(size), self._moved)
                        sock.sendall(b"ok\n")
                    else:
                        send(sock, int(seed), int(size), self._moved)
        except Exception as error:
            self.failures.append(repr(error))

    def has_moved(self, size: int) -> bool:
        return self.moved >= size

    def _moved(self, size: int) -> None:
        with self._lock:
            self.moved += size


def send(
    sock: socket.socket, seed: int, size: int, moved: Callable[[int], None] = no_matter
) -> None:
    at_once = VSOCK_LIMIT if sock.family == socket.AF_VSOCK else PIECE
    for piece in pieces(seed, size):
        for start in range(0, len(piece), at_once):
            sock.sendall(piece[start : start + at_once])
        moved(len(piece))


def receive(
    incoming: Any, seed: int, size: int, moved: Callable[[int], None] = no_matter
) -> None:
    for number, piece in enumerate(pieces(seed, size)):
        found = incoming.read(len(piece))
        if found != piece:
            raise ValueError(f"piece {number} {difference(piece, found)}")
        moved(len(piece))


def give(sock: socket.socket, seed: int, size: int) -> None:
    """Send data to a server, which checks them."""
    sock.sendall(b"take %d %d\n" % (seed, size))
    send(sock, seed, size)
    with sock.makefile("rb") as incoming:
        said = incoming.readline()
    if said != b"ok\n":
        raise ValueError(f"the server has not got all: {said!r}")


def take(sock: socket.socket, seed: int, size: int) -> None:
    """Get data from a server, and check them."""
    sock.sendall(b"give %d %d\n" % (seed, size))
    with sock.makefile("rb") as incoming:
        receive(incoming, seed, size)


def both(sock: socket.socket, number: int) -> None:
    """A short exchange in both directions, of a size that depends on the number."""
    size = 1 + number * 7919 % 30000
    take(sock, number % 5, size)
    give(sock, number % 5, size)


# The jobs of guests.

_servers: list[Server] = []


def serve(address: Address) -> None:
    """Let a server run from now on."""
    listener = socket.socket(FAMILIES[address[0]])
    listener.bind(tuple(address[1:]))
    _servers.append(Server(listener))


def failures() -> list[str]:
    """The errors of the servers."""
    return [failure for server in _servers for failure in server.failures]


def connect(address: Address) -> socket.socket:
    sock = socket.socket(FAMILIES[address[0]])
    sock.settimeout(PATIENCE)
    sock.connect(tuple(address[1:]))
    return sock


def give_to(address: Address, seed: int, size: int) -> None:
    with connect(address) as sock:
        give(sock, seed, size)


def take_from(address: Address, seed: int, size: int) -> None:
    with connect(address) as sock:
        take(sock, seed, size)


def connect_many(address: Address, at_once: int, rounds: int) -> None:
    """Many connections, some at the same time, each with data in both directions."""

    def one(number: int) -> None:
        for i in range(rounds):
            with connect(address) as sock:
                both(sock, number * rounds + i)

    in_threads(one, at_once)


def send_datagrams(address: Address, count: int, size: int) -> None:
    """Numbered datagrams, as fast as they go."""
    content = data(0, size - 8)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(tuple(address[1:]))
        for number in range(count):
            sock.send(number.to_bytes(8, "little") + content)
