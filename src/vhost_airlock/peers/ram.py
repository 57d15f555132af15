# SPDX-License-Identifier: Apache-2.0
"""The memory of a guest, as a VMM has it: pieces of memfds, with holes between."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..vhost.fds import Fd
from ..vhost.wire import MemoryRegion
from .memory import Memory

MIB = 1 << 20
PAGE = 4096

LOW = 0
HIGH = 4 << 30
USER_BASE = 0x7E57_0000_0000
"""The user address at which the "VMM" has its memory: no guest address or file offset.
"""


class GuestRam(Memory):
    """Guest memory, with an allocator that never takes anything back.

    It starts as a PC's: one memfd, of which the first part is at guest address 0 and
    the rest at 4 GiB. `plug()` adds memory in a memfd of its own. Nothing is allocated
    until it is touched, so it can be large.
    """

    def __init__(self, low: int = 64 * MIB, high: int = 192 * MIB) -> None:
        super().__init__()
        self._fds: list[Fd] = []
        self._free: dict[int, int] = {}
        self._next_user = USER_BASE
        fd = _memfd(low + high)
        try:
            self._plug(MemoryRegion(LOW, low, USER_BASE, 0), Fd.dup(fd))
            self._plug(MemoryRegion(HIGH, high, USER_BASE + low, low), Fd.dup(fd))
        finally:
            fd.close()

    def plug(self, guest_addr: int, size: int) -> MemoryRegion:
        """Add memory; the caller tells the back-end."""
        region = MemoryRegion(guest_addr, size, self._next_user, 0)
        self._plug(region, _memfd(size))
        return region

    def _plug(self, region: MemoryRegion, fd: Fd) -> None:
        self.add(region, fd)
        self._fds.append(fd)
        # Address 0 would do as well, but looks like no address when debugging.
        self._free[region.guest_addr] = region.guest_addr or PAGE
        self._next_user = max(self._next_user, region.user_addr + region.size + PAGE)

    def unplug(self, region: MemoryRegion) -> None:
        """Take memory away."""
        index = [mapped.region for mapped in self.regions].index(region)
        self.remove(region)
        self._fds.pop(index).close()
        del self._free[region.guest_addr]

    def close(self) -> None:
        """Unmap and close all."""
        self.clear()
        while self._fds:
            self._fds.pop().close()

    def shared(self) -> Sequence[tuple[MemoryRegion, Fd]]:
        """The regions with their descriptors, for SET_MEM_TABLE or ADD_MEM_REG."""
        return [
            (mapped.region, fd)
            for mapped, fd in zip(self.regions, self._fds, strict=True)
        ]

    def alloc(
        self, size: int, align: int = PAGE, region: MemoryRegion | None = None
    ) -> int:
        """Return the guest address of fresh memory, in `region` or the emptiest one."""
        candidates = [region] if region else [each.region for each in self.regions]

        def room(each: MemoryRegion) -> int:
            return each.guest_addr + each.size - self._free[each.guest_addr]

        best = max(candidates, key=room)
        addr = -(-self._free[best.guest_addr] // align) * align
        if addr + size > best.guest_addr + best.size:
            raise MemoryError(f"no {size} bytes of guest memory left")
        self._free[best.guest_addr] = addr + size
        return addr

    def user_addr(self, addr: int) -> int:
        """Return the user address of a guest address."""
        for mapped in self.regions:
            start = addr - mapped.region.guest_addr
            if 0 <= start < mapped.region.size:
                return mapped.region.user_addr + start
        raise LookupError(f"no memory at guest address {addr:#x}")

    def plant(self, marker: bytes) -> list[int]:
        """Put a marker into each region, apart from requests; return the addresses."""
        pages = 2 + len(marker) // PAGE
        planted = []
        for mapped in self.regions:
            # Not at the start of a page, where a search finds it most easily.
            addr = self.alloc(pages * PAGE, region=mapped.region) + PAGE // 3
            self.view(addr, len(marker))[:] = marker
            planted.append(addr)
        return planted


def _memfd(size: int) -> Fd:
    fd = Fd(os.memfd_create("guest-ram", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), size)
    return fd
