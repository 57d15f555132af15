# SPDX-License-Identifier: Apache-2.0
"""Isolated memory: all that the back ever sees.

It is made of memfds that are sealed against shrinking, growing and further seals
before the back gets them: it can't cut one short, which would be a fault of ours, nor
seal it against our own writes. Shadow rings are in one memfd, the pool's bounce buffers
in others, and a request that is larger than the pool in one of its own.

To the back, they are a guest of its own: guest address and user address of a region
are the same and start at 2^46, where no guest has memory. So if a payload carries an
address of the real guest, the back finds nothing there, and says so at once.
"""

from __future__ import annotations

import errno
import fcntl
import os

from ..dataplane.mapping import Mapping
from ..dataplane.pool import Pool
from ..errors import RequestRefused
from ..record import changeable, record
from ..vhost.fds import Fd
from ..vhost.wire import MemoryRegion

BASE = 1 << 46
RINGS_SIZE = 128 << 20
"""Room for shadow rings; only the used part costs memory. It is for about 230 rings of
1024 entries."""
REGION_SIZE = 32 << 20
"""The pool grows by at least this much."""
STEPS = 32
"""The most steps in which the pool reaches its limit."""
MAX_SLOTS = 66
"""The regions that the pool can manage, the rings' and the lone one."""
PAGE = 4096
ROUNDING = (2 * 1024 + 160) * PAGE
"""More than a chain of 1024 buffers may take beyond its size: each begins and ends
within a page, and small ones and the table of an indirect chain do not count."""
MFD_NOEXEC_SEAL = 0x0008
"""Of memfd_create; Python has no name for it yet."""


@record
class Region:
    """One memfd, where we see it and where the back does."""

    fd: Fd
    mapping: Mapping
    announced: MemoryRegion

    def close(self) -> None:
        self.mapping.close()
        self.fd.close()

    @property
    def size(self) -> int:
        return self.announced.size

    @property
    def resident(self) -> int:
        """Bytes of memory that it really takes; 0 when it has just been closed."""
        try:
            return os.fstat(self.fd.fileno()).st_blocks * 512
        except (OSError, ValueError):  # only for a thread that is not ours
            return 0


def sealed_memfd(name: str, size: int) -> Fd:
    """Make a memfd of this size in bytes, for good; it can't be executed."""
    fd = Fd(_memfd(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(fd.fileno(), size)
        fcntl.fcntl(
            fd.fileno(),
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
    except BaseException:
        fd.close()
        raise
    return fd


def _memfd(name: str, flags: int) -> int:
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Linux before 6.3 does not know the flag
            raise
    return os.memfd_create(name, flags)


@changeable
class RingMemory:
    """Two rooms of the same size for one ring's shadow, used in turns."""

    start: int
    """In the memory for rings, in bytes."""
    size: int
    """Of each."""
    second: bool = False
    """Whether the second one was used last."""

    def turn(self) -> int:
        """Use the other room; return where it starts."""
        self.second = not self.second
        return self.start + self.size * self.second


class IsolatedMemory:
    """The regions of one connection to a back, and the pool in them.

    With `slots` the pool begins empty and grows region by region: grow() returns the
    region to announce. Without, it is one region of `limit` bytes from the start,
    of which again only the used part costs memory. `shared`: by several workers.

    A chain that is too large for the pool, but no larger than `lone_limit` bytes, has a
    lone region for itself. Where there is no slot for one, all of them are in the
    region of the rings, behind these, one after the other.
    """

    def __init__(
        self, limit: int, *, slots: int, lone_limit: int = 0, shared: bool = False
    ) -> None:
        self.limit = max(PAGE, limit // PAGE * PAGE)
        self.slots = min(slots, MAX_SLOTS)
        self.lone_has_slot = slots > 2
        self._pool_slots = self.slots - 1 - self.lone_has_slot
        steps = max(1, min(self._pool_slots, STEPS))
        self._step = max(REGION_SIZE, -(-self.limit // steps // PAGE) * PAGE)
        self.pool = Pool(
            self.limit,
            largest=_power_below(self.limit),
            lone_limit=lone_limit,
            shared=shared,
        )
        self._lone: Region | None = None
        lone_size = self.pool.largest_chain + ROUNDING
        rings_size = RINGS_SIZE + (0 if self.lone_has_slot else lone_size)
        self.rings = self._make("vhost-airlock-rings", rings_size)
        self._rings_used = 0
        self._ring_memory: dict[int, RingMemory] = {}
        self._pool_regions: dict[int, Region] = {}
        if not slots:
            self._add_to_pool(self.limit)
        if not self.lone_has_slot:
            self.open_lone(self.rings)

    @property
    def regions(self) -> list[Region]:
        """All regions, in the order of their addresses."""
        lone = self._lone
        regions = [self.rings, *self._pool_regions.values()]
        if lone is not None and lone is not self.rings:
            regions.append(lone)
        return sorted(regions, key=lambda region: region.announced.guest_addr)

    @property
    def resident(self) -> int:
        """Bytes of memory that all of it really takes. Any thread may ask."""
        return sum(region.resident for region in self.regions)

    @property
    def small(self) -> bool:
        """Is the pool as small as it gets?"""
        return not self.slots or len(self._pool_regions) < 2

    def ring_memory(self, index: int, size: int) -> tuple[int, int]:
        """Room of `size` bytes for a shadow ring: (our address, the back's).

        It is never the last one of this ring: a back that writes late to the ring that
        it was told to leave does not write to the next one.
        """
        rooms = self._ring_memory.get(index)
        if rooms is None or rooms.size < size:
            size = _pages(size)
            rooms = RingMemory(self._allot(index, 2 * size), size)
            self._ring_memory[index] = rooms
        return self._addresses(rooms.turn())

    def slot_memory(self, index: int, size: int) -> tuple[int, int]:
        """Room of `size` bytes for slots of a ring: (our address, the back's)."""
        return self._addresses(self._allot(index, size))

    def forget_rings(self) -> None:
        """No ring is there any more, nor any chain of one."""
        self._rings_used = 0
        self._ring_memory.clear()

    def grow(self, wanted: int) -> Region | None:
        """Make one more region, with room for a block of `wanted` bytes.

        Returns the region to announce to the back; then open() it. None: the limit is
        reached.
        """
        room = self.limit - sum(region.size for region in self._pool_regions.values())
        size = min(max(self._step, wanted), room)
        if not self.slots or size < wanted or size < PAGE:
            return None
        if len(self._pool_regions) >= self._pool_slots:
            return None
        return self._make("vhost-airlock-pool", size)

    def open(self, region: Region) -> None:
        """The back knows this region: take buffers from it, while no worker runs."""
        number = self.pool.add_region(
            region.mapping.address, region.announced.guest_addr, region.size
        )
        self._pool_regions[number] = region

    def idle(self) -> list[int]:
        """Numbers of the regions that no buffer is in, while no worker runs."""
        return [n for n in self._pool_regions if self.pool.used_pages(n) == 0]

    def withdraw(self, number: int) -> Region:
        """Take an idle region out of the pool, while no worker runs.

        Returns the region, which the back has to forget; then close() it.
        """
        self.pool.remove_region(number)
        return self._pool_regions.pop(number)

    def make_lone(self, size: int) -> Region:
        """Make a lone region, where it has a slot. Announce it; then open_lone() it."""
        return self._make("vhost-airlock-lone", size)

    def open_lone(self, region: Region) -> None:
        """The back knows this region, for one chain, while no worker runs."""
        start = RINGS_SIZE if region is self.rings else 0
        self.pool.open_lone(
            region.mapping.address + start,
            region.announced.guest_addr + start,
            region.size - start,
        )
        self._lone = region

    def close_lone(self) -> tuple[int, Region | None]:
        """Take the lone region, in which no chain is, from the pool; no worker runs.

        Returns the bytes that the next chain needs, 0 if there is none, and the region
        that was closed, if there was one.
        """
        wanted = self.pool.close_lone()
        closed, self._lone = self._lone, None
        return wanted, closed

    def clear_lone(self) -> None:
        """Empty the room for lone regions behind the rings."""
        self.rings.mapping.empty(RINGS_SIZE)

    def clear(self) -> None:
        """Empty everything, when no ring is started and no chain is left."""
        for region in self.regions:
            region.mapping.empty()

    def close(self) -> None:
        """Unmap everything. No pump may use it any more, and the back is gone."""
        for region in self.regions:
            region.close()

    def _allot(self, index: int, size: int) -> int:
        """Take memory for rings, which is not given back; return where it starts."""
        start = self._rings_used
        if start + size > RINGS_SIZE:
            raise RequestRefused(
                f"ring {index}: rings need more than {RINGS_SIZE} bytes"
            )
        self._rings_used = start + _pages(size)
        return start

    def _addresses(self, start: int) -> tuple[int, int]:
        return (
            self.rings.mapping.address + start,
            self.rings.announced.guest_addr + start,
        )

    def _add_to_pool(self, size: int) -> None:
        self.open(self._make("vhost-airlock-pool", size))

    def _make(self, name: str, size: int) -> Region:
        address = BASE
        if name != "vhost-airlock-rings":
            for region in self.regions:
                taken = region.announced
                if address + size <= taken.guest_addr:
                    break
                address = taken.guest_addr + taken.size
        fd = sealed_memfd(name, size)
        try:
            mapping = Mapping(fd.fileno(), size, huge_pages=True)
        except BaseException:
            fd.close()
            raise
        return Region(fd, mapping, MemoryRegion(address, size, address))


def _pages(size: int) -> int:
    """Return a size rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def _power_below(size: int) -> int:
    """The largest power of two that is no larger."""
    return 1 << (size.bit_length() - 1)
