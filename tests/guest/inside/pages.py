# SPDX-License-Identifier: Apache-2.0
"""Memory that only the disk writes, all the time, while the guest moves.

The processor's own writes are found by every VMM. A page that a device alone has
written since it was sent arrives only if the device's log is right.
"""

import mmap
import os
import random
import threading

from tests.guest.inside.load import DEVICE, KEPT, MIB

BUFFERS = 64
SIZE = 256 << 10


class Pages:
    """Buffers into which the disk reads what load.keep() has kept, from another place
    each time. The processor touches them only before the first time.
    """

    def __init__(self) -> None:
        self.buffers = [mmap.mmap(-1, SIZE) for _ in range(BUFFERS)]
        for buffer in self.buffers:
            buffer[:] = bytes(SIZE)
        self.places = [-1] * BUFFERS
        self.reads = 0
        self.stopping = False
        self.failure = ""
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self) -> None:
        fd = os.open(DEVICE, os.O_RDONLY | os.O_DIRECT)
        places = random.Random(1)
        while not self.stopping and not self.failure:
            number = self.reads % BUFFERS
            place = places.randrange(0, MIB - SIZE, 512)
            with self.changed:
                try:
                    size = os.preadv(fd, [self.buffers[number]], KEPT + place)
                    assert size == SIZE, f"{size} bytes"
                except Exception as error:
                    self.failure = repr(error)
                self.places[number] = place
                self.reads += 1
                self.changed.notify()
        os.close(fd)

    def wait_for(self, wanted: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.failure or self.reads >= wanted, 140)
        if self.failure or self.reads < wanted:
            raise ValueError(f"{self.reads} reads, not {wanted}: {self.failure}")


_pages: list[Pages] = []


def start() -> None:
    _pages.append(Pages())


def go_on(times: int = 1) -> None:
    """Wait until the disk has written each buffer so many times more."""
    pages = _pages[-1]
    pages.wait_for(pages.reads + times * BUFFERS)


def check(seed: int) -> None:
    """Stop. Does each buffer have what the disk has written last?"""
    pages = _pages.pop()
    pages.stopping = True
    pages.thread.join()
    pages.wait_for(0)
    kept = random.Random(seed).randbytes(MIB)
    for number, place in enumerate(pages.places):
        found = pages.buffers[number][:]
        if place >= 0 and found != kept[place : place + SIZE]:
            raise ValueError(f"buffer {number} has not what was at {place}")
