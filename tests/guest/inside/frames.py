# SPDX-License-Identifier: Apache-2.0
"""Ethernet frames that both ends know, on a guest's interface without any protocol."""

import socket
from collections.abc import Iterator

from tests.guest.inside.noise import data

KIND = b"\x88\xb5"
"""The type for local experiments, so that nobody else sends or answers such frames."""
ADDRESS = b"\2\0\0\0\0"
SMALLEST = 60
SO_RCVBUFFORCE = 33


def frames(seed: int, count: int, largest: int) -> Iterator[bytes]:
    """Numbered frames of all sizes; the seed is in the sender's address."""
    noise = data(seed, 1 << 20)
    header = ADDRESS + b"\1" + ADDRESS + bytes([seed]) + KIND
    for number in range(count):
        size = SMALLEST + number * 7919 % (largest + 1 - SMALLEST)
        start = number * 4099 % (len(noise) - largest)
        payload = number.to_bytes(4, "big") + noise[start:]
        yield header + payload[: size - len(header)]


def seed_of(frame: bytes) -> int:
    return frame[2 * len(ADDRESS) + 1]


_sockets: list[socket.socket] = []


def listen() -> None:
    """Take these frames from now on."""
    kind = int.from_bytes(KIND, "big")
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
    sock.bind(("eth0", kind))
    sock.settimeout(60)
    _sockets.append(sock)


def take_socket() -> socket.socket:
    """The socket that listen() has made."""
    return _sockets.pop()


def exchange(incoming: list[int], outgoing: int, count: int, largest: int) -> None:
    """Receive frames of these seeds, each in order, and send as many in between."""
    expected = {seed: frames(seed, count, largest) for seed in incoming}
    with take_socket() as sock:
        for ours in frames(outgoing, count * len(incoming), largest):
            sock.send(ours)
            found = sock.recv(65536)
            wanted = next(expected[seed_of(found)])
            if found != wanted:
                raise ValueError(
                    f"{len(found)} bytes {found[:64].hex()} instead of {len(wanted)}"
                    f" bytes {wanted[:64].hex()}"
                )
