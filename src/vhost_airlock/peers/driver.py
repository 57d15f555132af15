# SPDX-License-Identifier: Apache-2.0
"""The driver's end of a split virtqueue, as in a guest.

It keeps its own indices and its own record of the chains, and reads only the device's
words in the ring. See device.py for the service loop, which is the same here with
calls in place of kicks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    RingFault,
    RingFull,
    SplitRing,
    TableArea,
    need_event,
)


class DriverRing:
    """The guest's end: offers chains, and gets their heads back.

    `base` is the index that both sides start from. `free` holds the descriptors that
    are not in use, the next one last: a test may shuffle it.
    """

    def __init__(
        self,
        ring: SplitRing,
        *,
        base: int = 0,
        event_idx: bool = False,
        tables: TableArea | None = None,
    ) -> None:
        self.ring = ring
        self.event_idx = event_idx
        self.tables = tables
        self.free = list(range(ring.size - 1, -1, -1))
        self.next_avail = base
        self.next_used = base
        self._published = base
        self._noticed = base
        self._chains: dict[int, list[int]] = {}
        ring.avail_flags = 0
        ring.avail_idx = base
        ring.used_event = base
        ring.used_flags = 0
        ring.used_idx = base
        ring.avail_event = base

    @property
    def outstanding(self) -> list[int]:
        """The heads of the chains that the device has not completed, oldest first."""
        return list(self._chains)

    def offer(
        self, buffers: Sequence[Buffer], *, indirect: bool = False, direct: int = 0
    ) -> int:
        """Make a chain, which the device sees after publish(); return its head.

        With `indirect` the first `direct` buffers get descriptors of the ring, and all
        others stand in one indirect table at the end of the chain.
        """
        tabled = buffers[direct:] if indirect else ()
        plain = buffers[:direct] if tabled else buffers
        needed = len(plain) + bool(tabled)
        if not needed:
            raise ValueError("a chain needs a buffer")
        if needed > len(self.free):
            raise RingFull(f"{needed} descriptors wanted, {len(self.free)} free")
        chain = [self.free.pop() for _ in range(needed)]
        head = chain[0]
        write = self.ring.write_desc
        for here, buffer, next in zip(chain, plain, [*chain[1:], None], strict=False):
            more = 0 if next is None else DESC_F_NEXT
            flags = DESC_F_WRITE if buffer.writable else 0
            write(here, buffer.addr, buffer.length, flags | more, next or 0)
        if tabled:
            addr, length = self._fill_table(head, tabled)
            write(chain[-1], addr, length, DESC_F_INDIRECT)
        self._chains[head] = chain
        self._put(head)
        return head

    def _fill_table(self, head: int, buffers: Sequence[Buffer]) -> tuple[int, int]:
        if self.tables is None or len(buffers) > self.tables.entries:
            raise ValueError(f"no indirect table for {len(buffers)} buffers")
        start = TableArea.length(head, self.tables.entries)
        last = len(buffers) - 1
        for i, buffer in enumerate(buffers):
            flags = DESC_F_WRITE if buffer.writable else 0
            if i < last:
                flags |= DESC_F_NEXT
            DESC.pack_into(
                self.tables.memory,
                start + DESC_SIZE * i,
                buffer.addr,
                buffer.length,
                flags,
                i + 1 if i < last else 0,
            )
        return self.tables.addr + start, DESC_SIZE * len(buffers)

    def _put(self, head: int) -> None:
        self.ring.set_avail_entry(self.next_avail & self.ring.mask, head)
        self.next_avail = (self.next_avail + 1) & INDEX_MASK

    def publish(self) -> None:
        """Let the device see all offered chains."""
        if self._published != self.next_avail:
            self.ring.fence()  # the chains before the index that tells of them
            self.ring.avail_idx = self._published = self.next_avail

    def kick_needed(self) -> bool:
        """Does the device want a kick for chains published since the last look?"""
        old, self._noticed = self._noticed, self._published
        if old == self._noticed:
            return False
        self.ring.fence()  # the index stored, then the device's wish loaded
        if self.event_idx:
            return need_event(self.ring.avail_event, self._noticed, old)
        return not self.ring.used_flags & USED_F_NO_NOTIFY

    def used(self) -> Iterator[tuple[int, int]]:
        """Take back completed chains: yields (head, bytes written) for each."""
        end = self.ring.used_idx
        self.ring.fence()  # the index loaded, then the entries that it tells of
        if (end - self.next_used) & INDEX_MASK > len(self._chains):
            raise RingFault(f"used index jumped from {self.next_used} to {end}")
        while self.next_used != end:
            head, length = self.ring.used_entry(self.next_used & self.ring.mask)
            chain = self._chains.pop(head, None)
            if chain is None:
                raise RingFault(f"used head {head} was not outstanding")
            self.free.extend(reversed(chain))
            self.next_used = (self.next_used + 1) & INDEX_MASK
            yield head, length

    def arm(self, after: int = 0) -> bool:
        """Ask for a call once more than `after` further chains are completed.

        True if some are completed already, for which no call may come. Without
        EVENT_IDX a call comes for each.
        """
        if self.event_idx:
            self.ring.used_event = (self.next_used + after) & INDEX_MASK
        else:
            self.ring.avail_flags = 0
        self.ring.fence()  # the wish stored, then the device's index loaded
        return (self.ring.used_idx - self.next_used) & INDEX_MASK > after

    def disarm(self) -> None:
        """Ask for no calls. With EVENT_IDX none comes without a new arm() anyway."""
        if not self.event_idx:
            self.ring.avail_flags = AVAIL_F_NO_INTERRUPT

    def reoffer(self) -> int:
        """Offer all outstanding chains again, as the device was lost with them.

        Returns the base for a new device. First take back the chains that are used().
        """
        heads = self.outstanding
        self.next_avail = self._noticed = self.next_used
        for head in heads:
            self._put(head)
        self._published = self.next_avail
        self.ring.fence()
        self.ring.avail_idx = self._published
        return self.next_used
