# SPDX-License-Identifier: Apache-2.0
"""A guest whose first ring the attacks abuse, and their tools."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..peers.disk import HEADER, BlkType
from ..peers.events import clear
from ..peers.guest import BlkGuest
from ..peers.ring import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    INDEX_MASK,
    SplitRing,
)
from ..vhost.fds import notify

N, W, T = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
Raw = tuple[int, int, int, int]
"""A descriptor: address, length, flags, next."""

QUEUE_SIZE = 64
SETTLE = 0.2
"""Seconds to wait for the effect of a bad chain on the program."""
STORM = 0.4
"""Seconds that a storm lasts."""


class GuestScene:
    """All rings run. The guest's own driver takes no part on the first one.

    `page` is memory of its own, filled with zeros: as a request's header, that is a
    read of sector 0, so nothing here writes to the disk.
    """

    def __init__(self, guest: BlkGuest) -> None:
        self.guest = guest
        self.queue = guest.queues[0]
        self.page = guest.ram.alloc(4 * 4096)
        self.header = self.page
        self.status = self.page + 64
        self.data = self.page + 4096
        self.table = self.page + 2 * 4096
        clear(self.queue.call_fd)
        self.queue.driver.arm()

    @property
    def ring(self) -> SplitRing:
        return self.queue.driver.ring

    @property
    def hole(self) -> int:
        """Return the end of guest memory below a large hole."""
        region = self.guest.ram.regions[0].region
        return region.guest_addr + region.size

    def chain(self, *descriptors: Raw, first: int = 8) -> None:
        """Write descriptors from number 8 on, and offer the first."""
        self.write(*descriptors, first=first)
        self.offer(first)

    def write(self, *descriptors: Raw, first: int = 8) -> None:
        for i, (addr, length, flags, following) in enumerate(descriptors):
            self.ring.write_desc(first + i, addr, length, flags, following)

    def request(self, *data: Raw, kind: int = BlkType.IN, sector: int = 0) -> None:
        """Offer a request whose data is given by descriptors, to be linked."""
        self.set_header(kind, sector)
        middle = [
            (addr, length, flags | N, 10 + i)
            for i, (addr, length, flags, _) in enumerate(data)
        ]
        self.chain((self.header, HEADER.size, N, 9), *middle, (self.status, 1, W, 0))

    def set_header(self, kind: int, sector: int = 0) -> None:
        HEADER.pack_into(self.view(self.header, HEADER.size), 0, kind, 0, sector)

    def write_table(self, *descriptors: Raw) -> None:
        memory = self.view(self.table, 4096)
        for i, descriptor in enumerate(descriptors):
            DESC.pack_into(memory, DESC.size * i, *descriptor)

    def indirect(self, *descriptors: Raw, length: int | None = None) -> None:
        """Offer an indirect table."""
        self.write_table(*descriptors)
        size = DESC.size * len(descriptors) if length is None else length
        self.chain((self.table, size, T, 0))

    def view(self, addr: int, size: int) -> memoryview:
        return self.guest.ram.view(addr, size)

    def offer(self, *heads: int) -> None:
        """Put heads into the avail ring, and kick."""
        ring = self.ring
        at = ring.avail_idx
        for head in heads:
            ring.set_avail_entry(at & ring.mask, head)
            at = (at + 1) & INDEX_MASK
        self.set_avail(at)

    def set_avail(self, index: int) -> None:
        self.ring.fence()
        self.ring.avail_idx = index & INDEX_MASK
        self.kick()

    def jump(self, by: int) -> None:
        self.set_avail(self.ring.avail_idx + by)

    def kick(self) -> None:
        notify(self.queue.kick_fd)

    def settle(self, timeout: float = SETTLE) -> bool:
        """Wait for a reaction of the program, which may not come.

        True: it has signalled that the ring is broken, or has hung up.
        """
        over = {self.guest.front.fileno(), self.queue.err_fd.fileno()}
        poll = select.poll()
        for number in (*over, self.queue.call_fd.fileno()):
            poll.register(number, select.POLLIN)
        return any(number in over for number, _ in poll.poll(timeout * 1000))

    @contextmanager
    def racing(self, *steps: Callable[[], None]) -> Iterator[Iterator[float]]:
        """Take these steps over and over in a thread while the body runs.

        Yields an iterator that ends when the time is over, for the body's own loop.
        """
        ended = threading.Event()

        def race() -> None:
            while not ended.is_set():
                for step in steps:
                    step()

        thread = threading.Thread(target=race, name="race")
        thread.start()
        try:
            yield until(STORM)
        finally:
            ended.set()
            thread.join()


def until(seconds: float) -> Iterator[float]:
    """Yield the seconds that are left, again and again until there are none."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        yield left
