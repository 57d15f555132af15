# SPDX-License-Identifier: Apache-2.0
"""How fast a guest's file system is."""

import os
import time
from pathlib import Path

PIECE = 1 << 20


def large(folder: str, size: int) -> tuple[float, float]:
    """Write a large file and read it, past the guest's cache: bytes a second."""
    path = Path(folder, "large")
    piece = os.urandom(PIECE)
    begin = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // PIECE):
            file.write(piece)
        os.fsync(file.fileno())
    written = size / (time.monotonic() - begin)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.monotonic()
        while file.read(PIECE):
            pass
    read = size / (time.monotonic() - begin)
    path.unlink()
    return written, read


def small(folder: str, count: int) -> float:
    """Make, write, look at, and remove small files: how many a second."""
    begin = time.monotonic()
    for i in range(count):
        path = Path(folder, f"small-{i}")
        path.write_bytes(b"x" * 1000)
        path.stat()
        path.unlink()
    return count / (time.monotonic() - begin)
