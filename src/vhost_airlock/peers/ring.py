# SPDX-License-Identifier: Apache-2.0
"""The memory of a split virtqueue (virtio 1.x, section 2.7).

`SplitRing` is the memory: every word of it can be read and written without a check, so
that a test can break a ring as well as use it. The guest's end is `DriverRing` in
driver.py, the device's is `DeviceRing` in device.py.

Rings are little-endian and so must be the host: one load or store of a 16-bit word then
is one machine instruction, which the indices need.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import AirlockError

MAX_SIZE = 32768
DESC_SIZE = 16
INDEX_MASK = 0xFFFF

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESC = struct.Struct("<QIHH")


class RingFault(AirlockError):
    """A ring is broken and stops for good; other rings go on."""


class RingFull(Exception):
    """There are not enough free descriptors for this chain now."""


class Buffer(NamedTuple):
    """One piece of guest memory in a chain."""

    addr: int
    length: int
    writable: bool = False


class Descriptor(NamedTuple):
    """A descriptor, with its fields as in memory."""

    addr: int
    length: int
    flags: int
    next: int


class Chain(NamedTuple):
    """A chain that a device takes from a ring: one request."""

    head: int
    buffers: list[Buffer]


class TableArea(NamedTuple):
    """Memory for indirect tables: one table of `entries` for each head of a ring."""

    memory: memoryview
    addr: int
    entries: int

    @staticmethod
    def length(size: int, entries: int) -> int:
        """Bytes that the tables of a ring of `size` need."""
        return size * entries * DESC_SIZE


def need_event(event: int, new: int, old: int) -> bool:
    """Did an index that went from `old` to `new` step over `event`?"""
    return (new - event - 1) & INDEX_MASK < (new - old) & INDEX_MASK


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """The addresses of the three parts of a ring of `size`, one after the other."""

    size: int
    start: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE or self.size & (self.size - 1):
            raise ValueError(f"ring size {self.size} is no power of two to {MAX_SIZE}")
        if self.start % DESC_SIZE:
            raise ValueError(f"ring at {self.start:#x} is not aligned to {DESC_SIZE}")

    @property
    def desc(self) -> int:
        return self.start

    @property
    def desc_size(self) -> int:
        return DESC_SIZE * self.size

    @property
    def avail(self) -> int:
        return self.desc + self.desc_size

    @property
    def avail_size(self) -> int:
        return 6 + 2 * self.size

    @property
    def used(self) -> int:
        return (self.avail + self.avail_size + 3) & ~3

    @property
    def used_size(self) -> int:
        return 6 + 8 * self.size

    @property
    def end(self) -> int:
        return self.used + self.used_size


class SplitRing:
    """The words of one ring, raw. The parts may lie in different memories."""

    def __init__(
        self, size: int, desc: memoryview, avail: memoryview, used: memoryview
    ) -> None:
        layout = SplitLayout(size)
        self.size = size
        self.mask = size - 1
        self.desc = desc[: layout.desc_size]
        self._avail = avail[: layout.avail_size].cast("H")
        self._used = used[: layout.used_size].cast("H")
        self._used_entries = used[4 : 4 + 8 * size].cast("I")
        # Kept locked, for fence(). One a ring, since a ring has one user at a time.
        self._gate = threading.Lock()
        self._gate.acquire()

    @classmethod
    def at(cls, memory: memoryview, layout: SplitLayout) -> SplitRing:
        return cls(
            layout.size,
            memory[layout.desc : layout.desc + layout.desc_size],
            memory[layout.avail : layout.avail + layout.avail_size],
            memory[layout.used : layout.used + layout.used_size],
        )

    def fence(self) -> None:
        """A full memory barrier.

        Python has none of its own, but a lock that is released and then acquired is two
        atomic operations on one word, between which nothing moves in either direction.
        """
        self._gate.release()
        self._gate.acquire()

    def release(self) -> None:
        """Let go of the memory, so that it can be unmapped."""
        for view in (self.desc, self._avail, self._used, self._used_entries):
            view.release()

    # Descriptors.

    def read_desc(self, index: int) -> Descriptor:
        return Descriptor(*DESC.unpack_from(self.desc, DESC_SIZE * index))

    def write_desc(
        self, index: int, addr: int, length: int, flags: int = 0, next: int = 0
    ) -> None:
        DESC.pack_into(self.desc, DESC_SIZE * index, addr, length, flags, next)

    # The driver's part. Slots are positions in the ring, 0 to size - 1.

    @property
    def avail_flags(self) -> int:
        return self._avail[0]

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self._avail[0] = value

    @property
    def avail_idx(self) -> int:
        return self._avail[1]

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self._avail[1] = value

    def avail_entry(self, slot: int) -> int:
        return self._avail[2 + slot]

    def set_avail_entry(self, slot: int, head: int) -> None:
        self._avail[2 + slot] = head

    @property
    def used_event(self) -> int:
        return self._avail[2 + self.size]

    @used_event.setter
    def used_event(self, value: int) -> None:
        self._avail[2 + self.size] = value

    # The device's part.

    @property
    def used_flags(self) -> int:
        return self._used[0]

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self._used[0] = value

    @property
    def used_idx(self) -> int:
        return self._used[1]

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self._used[1] = value

    def used_entry(self, slot: int) -> tuple[int, int]:
        """Return (head, length) in a slot of the used ring."""
        return self._used_entries[2 * slot], self._used_entries[2 * slot + 1]

    def set_used_entry(self, slot: int, head: int, length: int) -> None:
        self._used_entries[2 * slot] = head
        self._used_entries[2 * slot + 1] = length

    @property
    def avail_event(self) -> int:
        return self._used[2 + 4 * self.size]

    @avail_event.setter
    def avail_event(self, value: int) -> None:
        self._used[2 + 4 * self.size] = value
