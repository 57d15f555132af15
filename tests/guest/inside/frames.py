"""Ethernet frames that both ends know, on a guest's interface without any protocol."""

import socket
from collections.abc import Iterator

from tests.guest.inside.noise import data

KIND = b"\x88\xb5"
"""The type for local experiments, so that nobody else sends or answers such frames."""
HEADER = b"\2\0\0\0\0\1" + b"\2\0\0\0\0\2" + KIND
SMALLEST = 60
SO_RCVBUFFORCE = 33


def frames(seed: int, count: int, largest: int) -> Iterator[bytes]:
    """Numbered frames of all sizes."""
    noise = data(seed, 1 << 20)
    for number in range(count):
        size = SMALLEST + number * 7919 % (largest + 1 - SMALLEST)
        start = number * 4099 % (len(noise) - largest)
        payload = number.to_bytes(4, "big") + noise[start:]
        yield HEADER + payload[: size - len(HEADER)]


_sockets: list[socket.socket] = []


def listen() -> None:
    """Take these frames from now on."""
    kind = int.from_bytes(KIND, "big")
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
    sock.bind(("eth0", kind))
    sock.settimeout(60)
    _sockets.append(sock)


def exchange(incoming: int, outgoing: int, count: int, largest: int) -> None:
    """Receive frames and no others, and send as many in between."""
    pairs = zip(
        frames(incoming, count, largest), frames(outgoing, count, largest), strict=True
    )
    with _sockets.pop() as sock:
        for number, (expected, ours) in enumerate(pairs):
            sock.send(ours)
            found = sock.recv(65536)
            if found != expected:
                raise ValueError(
                    f"frame {number} has {len(found)} bytes, not {len(expected)}:"
                    f" {found[:64].hex()}, not {expected[:64].hex()}"
                )
