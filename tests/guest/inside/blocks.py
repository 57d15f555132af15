# SPDX-License-Identifier: Apache-2.0
"""Reads and writes of a disk, all in flight at the same time, each of its own block.

The content of a block follows from its number and a seed: it is like no other block,
and is not zeros. Even blocks are read, and odd ones are written.
"""

import mmap
import os
import random
import threading

from tests.guest.inside.agent import sh
from tests.guest.inside.load import DEVICE, requests
from tests.guest.inside.waiting import wait

BLOCK = 8192
APART = 1 << 17
"""From one block to the next, in bytes: requests that are apart are not merged."""


def content(number: int, seed: int) -> bytes:
    """The content of a block after start(); the one before has seed 0."""
    return random.Random(f"{seed * (number % 2)} {number}").randbytes(BLOCK)


def image(count: int) -> bytearray:
    """A disk with this many blocks."""
    blocks = (content(number, 0) for number in range(count))
    return bytearray().join(block.ljust(APART, b"\0") for block in blocks)


def check(disk: bytes | bytearray, count: int, seed: int) -> None:
    """Is the disk as it is to be when all requests are done?"""
    for number in range(count):
        if disk[number * APART :][:BLOCK] != content(number, seed):
            raise ValueError(f"block {number} is not what was written")


class Requests:
    """One thread for each block."""

    def __init__(self, count: int, seed: int) -> None:
        self.seed = seed
        self.wrong: list[str] = []
        self.threads = [
            threading.Thread(target=self.run, args=(number,), daemon=True)
            for number in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def run(self, number: int) -> None:
        try:
            self.request(number)
        except Exception as error:
            self.wrong.append(f"block {number}: {error}")

    def request(self, number: int) -> None:
        expected = content(number, self.seed)
        fd = os.open(DEVICE, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, BLOCK) as buffer:
            if number % 2:
                buffer[:] = expected
                size = os.pwrite(fd, buffer, number * APART)
            else:
                size = os.preadv(fd, [buffer], number * APART)
            if size != BLOCK or buffer[:] != expected:
                raise ValueError(f"{size} bytes, {buffer[:16].hex()}...")
        os.close(fd)


_requests: list[Requests] = []


def start(count: int, seed: int) -> None:
    """Begin with all of them; wait until the driver has them."""
    _requests.append(Requests(count, seed))
    wait_for(count)


def wait_for(count: int) -> None:
    """Wait until this many are in flight."""
    wait(lambda: requests() == count, lambda: f"{requests()} requests in flight")


def finish() -> list[str]:
    """Wait for the end of them all: what went wrong, also by the kernel's log."""
    done = _requests.pop()
    for thread in done.threads:
        thread.join()
    return [*done.wrong, *(x for x in sh("dmesg").splitlines() if "I/O error" in x)]
