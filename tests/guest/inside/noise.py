# SPDX-License-Identifier: Apache-2.0
"""Data that both ends of a transfer can make and check at the speed of memory."""

import functools
import random
from collections.abc import Iterator

PIECE = 1 << 20
STEP = 4099


@functools.cache
def _noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(2 * PIECE)


def pieces(seed: int, size: int) -> Iterator[bytes]:
    """`size` bytes in pieces. Each begins with its number and is unlike the others."""
    noise = _noise(seed)
    for number in range(-(-size // PIECE)):
        start = number * STEP % PIECE
        piece = number.to_bytes(8, "little") + noise[start : start + PIECE - 8]
        yield piece[: size - number * PIECE]


def data(seed: int, size: int) -> bytes:
    return b"".join(pieces(seed, size))


def difference(expected: bytes, found: bytes | memoryview) -> str:
    """Where two pieces differ."""
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)))
    return (
        f"at byte {at}: {bytes(found[at : at + 16]).hex()}, not"
        f" {expected[at : at + 16].hex()} ({len(found)} of {len(expected)} bytes)"
    )
