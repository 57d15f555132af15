# SPDX-License-Identifier: Apache-2.0
"""Shared memory by region: mapped, and found by guest address or by user address."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from ..errors import RequestRefused
from ..vhost.fds import HasFileno
from ..vhost.wire import MemoryRegion


@dataclass(frozen=True, slots=True)
class Mapped:
    """A region and its mapping here."""

    region: MemoryRegion
    mapping: mmap.mmap
    view: memoryview

    @classmethod
    def map(cls, region: MemoryRegion, fd: HasFileno) -> Mapped:
        """Map a region of a file, from the page in which it begins."""
        page = max(mmap.PAGESIZE, os.fstatvfs(fd.fileno()).f_bsize)
        before = region.mmap_offset % page
        try:
            mapping = mmap.mmap(
                fd.fileno(), before + region.size, offset=region.mmap_offset - before
            )
        except (OSError, ValueError, OverflowError) as error:
            raise RequestRefused(f"can't map {region}: {error}") from None
        return cls(region, mapping, memoryview(mapping)[before:])

    def close(self) -> None:
        """Unmap; BufferError when a view of it is still in use."""
        self.view.release()
        self.mapping.close()


class Memory:
    """The regions that are mapped. No two of them overlap."""

    def __init__(self) -> None:
        self.regions: list[Mapped] = []

    def add(self, region: MemoryRegion, fd: HasFileno) -> None:
        """Map one more region; the descriptor stays the caller's."""
        if not region.size:
            raise RequestRefused(f"empty: {region}")
        for other in (mapped.region for mapped in self.regions):
            if _overlap(region.guest_addr, other.guest_addr, region, other) or _overlap(
                region.user_addr, other.user_addr, region, other
            ):
                raise RequestRefused(f"{region} overlaps {other}")
        self.regions.append(Mapped.map(region, fd))

    def remove(self, region: MemoryRegion) -> None:
        """Unmap the region that has these addresses and this size."""
        wanted = (region.guest_addr, region.user_addr, region.size)
        for i, mapped in enumerate(self.regions):
            have = mapped.region
            if (have.guest_addr, have.user_addr, have.size) == wanted:
                del self.regions[i]
                mapped.close()
                return
        raise RequestRefused(f"there is no {region}")

    def clear(self) -> None:
        """Unmap all."""
        while self.regions:
            self.regions.pop().close()

    def views(self, addr: int, length: int) -> list[memoryview]:
        """Return the memory at a guest address, in a piece for each region."""
        pieces = []
        while True:
            for mapped in self.regions:
                start = addr - mapped.region.guest_addr
                if 0 <= start < mapped.region.size:
                    break
            else:
                raise LookupError(f"no memory at guest address {addr:#x}")
            piece = mapped.view[start : min(start + length, mapped.region.size)]
            pieces.append(piece)
            length -= len(piece)
            if not length:
                return pieces
            addr += len(piece)

    def view(self, addr: int, length: int) -> memoryview:
        """The memory at a guest address, which must be in one region."""
        pieces = self.views(addr, length)
        if len(pieces) > 1:
            raise LookupError(f"{length} bytes at {addr:#x} are not in one region")
        return pieces[0]

    def user_view(self, addr: int, length: int) -> memoryview:
        """The memory at a user address, which must be in one region."""
        for mapped in self.regions:
            start = addr - mapped.region.user_addr
            if start >= 0 and start + length <= mapped.region.size:
                return mapped.view[start : start + length]
        raise LookupError(f"no memory at user address {addr:#x}")


def _overlap(one: int, two: int, a: MemoryRegion, b: MemoryRegion) -> bool:
    """Do regions of the sizes of `a` and `b` overlap when they start at these?"""
    return one < two + b.size and two < one + a.size
