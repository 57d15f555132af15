# SPDX-License-Identifier: Apache-2.0
"""A guest's block driver, one queue of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..vhost.fds import eventfd, notify
from ..vhost.wire import Feature, VringAddr
from .disk import HEADER, BlkStatus, BlkType
from .driver import DriverRing
from .ram import GuestRam
from .ring import Buffer, RingFull, SplitLayout, SplitRing, TableArea

Segment = tuple[int, int]
"""Guest address and length of a piece of a request's data."""

_SLOT = 32
_STATUS = 16
_PENDING = 0xFF


@dataclass(slots=True, eq=False)
class Io:
    """A request; `status` is None until it's done."""

    kind: int
    sector: int
    segments: Sequence[Segment]
    then: Callable[[Io], None] | None = None
    status: int | None = None
    written: int = 0
    """The bytes that the device says it wrote to memory."""

    def check(self) -> None:
        """Raise OSError unless its status is OK."""
        if self.status != BlkStatus.OK:
            what = f"request {self.kind} at sector {self.sector}"
            raise OSError(f"{what} ended with status {self.status}")


class GuestQueue:
    """One queue: a ring in guest memory, and a header and a status for each request."""

    def __init__(self, ram: GuestRam, index: int, size: int, seg_max: int) -> None:
        self.index = index
        self.size = size
        self.base = 0
        self.kick_fd = eventfd()
        self.call_fd = eventfd()
        self.err_fd = eventfd()
        self.indirect = self.event_idx = False
        layout = SplitLayout(size)
        entries = seg_max + 2
        self.ring_addr = ram.alloc(layout.end)
        self._ring = SplitRing.at(ram.view(self.ring_addr, layout.end), layout)
        self._slots_addr = ram.alloc(_SLOT * size)
        self._slots = ram.view(self._slots_addr, _SLOT * size)
        tables = ram.alloc(TableArea.length(size, entries))
        self._tables = TableArea(
            ram.view(tables, TableArea.length(size, entries)), tables, entries
        )
        self.reset()

    def reset(self) -> None:
        """Start from nothing, as a driver does after it has reset the device."""
        self.base = 0
        self.driver = DriverRing(
            self._ring, event_idx=self.event_idx, tables=self._tables
        )
        self._free = list(range(self.size))
        self._pending: dict[int, tuple[int, Io]] = {}

    def set_features(self, features: int) -> None:
        """Use the ring by the negotiated features."""
        self.indirect = bool(features & Feature.INDIRECT_DESC)
        self.event_idx = bool(features & Feature.EVENT_IDX)
        self.driver.event_idx = self.event_idx

    def vring_addr(self, ram: GuestRam) -> VringAddr:
        user = ram.user_addr(self.ring_addr)
        layout = SplitLayout(self.size, user)
        return VringAddr(self.index, 0, layout.desc, layout.used, layout.avail)

    @property
    def pending(self) -> int:
        """The number of requests that are not done."""
        return len(self._pending)

    def submit(
        self,
        kind: int,
        sector: int = 0,
        segments: Sequence[Segment] = (),
        then: Callable[[Io], None] | None = None,
        *,
        indirect: bool | None = None,
        direct: int = 0,
    ) -> Io:
        """Offer a request, which the device sees after kick(). RingFull: reap() first.

        `indirect` and `direct` are those of DriverRing.offer(). Unless they say
        otherwise, descriptors are indirect when the device can do that.
        """
        if not self._free:
            raise RingFull(f"{self.size} requests are pending")
        slot = self._free[-1]
        at = slot * _SLOT
        HEADER.pack_into(self._slots, at, kind, 0, sector)
        self._slots[at + _STATUS] = _PENDING
        addr = self._slots_addr + at
        writable = kind not in (BlkType.OUT, BlkType.FLUSH, BlkType.WRITE_ZEROES)
        head = self.driver.offer(
            [
                Buffer(addr, HEADER.size),
                *(Buffer(start, length, writable) for start, length in segments),
                Buffer(addr + _STATUS, 1, True),
            ],
            indirect=self.indirect if indirect is None else indirect,
            direct=direct,
        )
        self._free.pop()
        io = Io(kind, sector, segments, then)
        self._pending[head] = (slot, io)
        return io

    def kick(self) -> bool:
        """Let the device see the submitted requests; returns True if it was kicked."""
        self.driver.publish()
        needed = self.driver.kick_needed()
        if needed:
            notify(self.kick_fd)
        return needed

    def reap(self) -> list[Io]:
        """Return the requests that are done, after calling their `then`."""
        done = []
        for head, written in self.driver.used():
            slot, io = self._pending.pop(head)
            self._free.append(slot)
            io.status = self._slots[slot * _SLOT + _STATUS]
            io.written = written
            done.append(io)
        for io in done:
            if io.then:
                io.then(io)
        return done

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            fd.close()
        self._ring.release()
        self._slots.release()
        self._tables.memory.release()
