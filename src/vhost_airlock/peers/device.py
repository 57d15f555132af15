# SPDX-License-Identifier: Apache-2.0
"""The device's end of a split virtqueue, as in a back-end.

It keeps its own indices, and looks at each word of the driver's once. The service loop:

    while True:
        device.disarm()                     # no kicks are needed during the look
        while chain := device.take():
            device.complete(chain.head, serve(chain))
        device.publish()
        if device.call_needed():
            call()
        if not device.arm():                # no chain came between the look and this
            wait_for_kick()
"""

from __future__ import annotations

from collections.abc import Callable

from .ring import (
    AVAIL_F_NO_INTERRUPT,
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    INDEX_MASK,
    USED_F_NO_NOTIFY,
    Buffer,
    Chain,
    RingFault,
    SplitRing,
    need_event,
)


class DeviceRing:
    """The device's end: takes chains, and completes them in any order.

    `translate` gives the memory behind an address and length, for indirect tables.
    A malformed chain raises RingFault, after which the ring is not to be used.
    """

    def __init__(
        self,
        ring: SplitRing,
        translate: Callable[[int, int], memoryview],
        *,
        base: int = 0,
        event_idx: bool = False,
    ) -> None:
        self.ring = ring
        self.event_idx = event_idx
        self.next_avail = base
        self.next_used = ring.used_idx
        self._translate = translate
        self._seen = base
        self._noticed = self.next_used

    def take(self) -> Chain | None:
        """The next chain that the driver offers, or None."""
        if self.next_avail == self._seen:
            self._look()
            if self.next_avail == self._seen:
                return None
        head = self.ring.avail_entry(self.next_avail & self.ring.mask)
        buffers: list[Buffer] = []
        self._walk(self.ring.desc, self.ring.size, head, buffers, in_table=False)
        self.next_avail = (self.next_avail + 1) & INDEX_MASK
        return Chain(head, buffers)

    def _look(self) -> None:
        self._seen = self.ring.avail_idx
        if (self._seen - self.next_avail) & INDEX_MASK > self.ring.size:
            raise RingFault(
                f"available index jumped from {self.next_avail} to {self._seen}"
            )
        self.ring.fence()  # the index loaded, then the chains that it tells of

    def _walk(
        self,
        table: memoryview,
        count: int,
        index: int,
        buffers: list[Buffer],
        in_table: bool,
    ) -> None:
        """Collect the chain that starts at `index` of `count` descriptors."""
        for _ in range(count):
            if index >= count:
                raise RingFault(f"descriptor {index} of {count}")
            addr, length, flags, index = DESC.unpack_from(table, DESC_SIZE * index)
            if flags & DESC_F_INDIRECT:
                if in_table or flags & DESC_F_NEXT:
                    raise RingFault("indirect descriptor with a next one, or nested")
                if not length or length % DESC_SIZE:
                    raise RingFault(f"indirect table of {length} bytes")
                inner = self._translate(addr, length)
                self._walk(inner, length // DESC_SIZE, 0, buffers, in_table=True)
                return
            writable = bool(flags & DESC_F_WRITE)
            if buffers and buffers[-1].writable and not writable:
                raise RingFault("readable descriptor after a writable one")
            buffers.append(Buffer(addr, length, writable))
            if not flags & DESC_F_NEXT:
                return
        raise RingFault(f"chain longer than {count} descriptors")

    def complete(self, head: int, length: int = 0) -> None:
        """Give a chain back, which the driver sees after publish()."""
        self.ring.set_used_entry(self.next_used & self.ring.mask, head, length)
        self.next_used = (self.next_used + 1) & INDEX_MASK

    def publish(self) -> None:
        """Let the driver see all completed chains."""
        self.ring.fence()  # the entries, and the data, before the index
        self.ring.used_idx = self.next_used

    def call_needed(self) -> bool:
        """Does the driver want a call for chains published since the last look?"""
        old, self._noticed = self._noticed, self.next_used
        if old == self._noticed:
            return False
        self.ring.fence()  # the index stored, then the driver's wish loaded
        if self.event_idx:
            return need_event(self.ring.used_event, self._noticed, old)
        return not self.ring.avail_flags & AVAIL_F_NO_INTERRUPT

    def arm(self) -> bool:
        """Ask for a kick with the next chain; True if there is one already."""
        if self.event_idx:
            self.ring.avail_event = self.next_avail
        else:
            self.ring.used_flags = 0
        self.ring.fence()  # the wish stored, then the driver's index loaded
        return self.ring.avail_idx != self.next_avail

    def disarm(self) -> None:
        """Ask for no kicks. With EVENT_IDX none comes without a new arm() anyway."""
        if not self.event_idx:
            self.ring.used_flags = USED_F_NO_NOTIFY
