# SPDX-License-Identifier: Apache-2.0
"""The guest's memory as the front announces it: checked, mapped, looked up.

Only the data plane reads and writes the memory that is mapped here. The table that it
uses is changed by `publish()`, which the caller calls while no worker runs; regions
that went away are unmapped after that, by `prune()`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence

from ..dataplane.mapping import Mapping
from ..dataplane.regions import GuestMemory
from ..errors import RequestRefused
from ..record import record
from ..vhost.fds import Fd
from ..vhost.wire import MemoryRegion

MAX_REGIONS = 509
"""The answer to GET_MAX_MEM_SLOTS; QEMU takes up to 512."""
_END = 1 << 64


@record
class Mapped:
    """A region and where we see it; `file` identifies the file that it is in."""

    region: MemoryRegion
    file: tuple[int, int]
    mapping: Mapping


class FrontMemory:
    """All regions of one front."""

    def __init__(self) -> None:
        self.guest = GuestMemory()
        self._regions: list[Mapped] = []
        self._gone: list[Mapped] = []

    def __len__(self) -> int:
        return len(self._regions)

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[Fd]) -> None:
        """SET_MEM_TABLE: these are all regions now. Unchanged ones stay mapped."""
        for position, region in enumerate(regions):
            _check(region, regions[:position])
        old = {(mapped.region, mapped.file): mapped for mapped in self._regions}
        new: list[Mapped] = []
        try:
            for region, fd in zip(regions, fds, strict=True):
                kept = old.pop((region, _file_of(fd)), None)
                new.append(kept or _map(region, fd))
        except BaseException:
            for mapped in new:
                if mapped not in self._regions:
                    mapped.mapping.close()
            raise
        self._regions = new
        self._gone += old.values()

    def add(self, region: MemoryRegion, fd: Fd) -> None:
        """ADD_MEM_REG: one region more."""
        if len(self._regions) == MAX_REGIONS:
            raise RequestRefused(f"ADD_MEM_REG: more than {MAX_REGIONS} regions")
        _check(region, (mapped.region for mapped in self._regions))
        self._regions.append(_map(region, fd))

    def remove(self, region: MemoryRegion) -> None:
        """REM_MEM_REG: the region with this guest address, user address and size."""
        for mapped in self._regions:
            if _key(mapped.region) == _key(region):
                self._regions.remove(mapped)
                self._gone.append(mapped)
                return
        raise RequestRefused(f"REM_MEM_REG: there is no such region: {region}")

    def publish(self) -> None:
        """Make the data plane use the regions as they are now."""
        self.guest.set_regions(
            [
                (m.region.guest_addr, m.region.size, m.mapping.address)
                for m in self._regions
            ]
        )

    def prune(self) -> None:
        """Unmap the regions that went away."""
        for mapped in self._gone:
            mapped.mapping.close()
        self._gone.clear()

    def find(self, user_addr: int, size: int) -> tuple[int, int] | None:
        """Return our address and the guest's of a range of user addresses.

        None if no region holds all of it.
        """
        for mapped in self._regions:
            offset = user_addr - mapped.region.user_addr
            if offset >= 0 and offset + size <= mapped.region.size:
                return (
                    mapped.mapping.address + offset,
                    mapped.region.guest_addr + offset,
                )
        return None

    def close(self) -> None:
        """Unmap everything. No worker may use the memory any more."""
        self._gone += self._regions
        self._regions = []
        self.publish()
        self.prune()


def _key(region: MemoryRegion) -> tuple[int, int, int]:
    return region.guest_addr, region.user_addr, region.size


def _check(region: MemoryRegion, others: Iterable[MemoryRegion]) -> None:
    """Refuse a region that is empty, wraps round, or overlaps another."""
    if region.size == 0:
        raise RequestRefused(f"memory region of size 0: {region}")
    for name, start in (
        ("guest address", region.guest_addr),
        ("user address", region.user_addr),
        ("offset in its file", region.mmap_offset),
    ):
        if start + region.size > _END:
            raise RequestRefused(f"memory region's {name} wraps round: {region}")
    for other in others:
        if _overlap(region.guest_addr, other.guest_addr, region, other) or _overlap(
            region.user_addr, other.user_addr, region, other
        ):
            raise RequestRefused(f"memory region overlaps {other}: {region}")


def _overlap(start: int, other: int, a: MemoryRegion, b: MemoryRegion) -> bool:
    return start < other + b.size and other < start + a.size


def _map(region: MemoryRegion, fd: Fd) -> Mapped:
    status = os.fstat(fd.fileno())
    end = region.mmap_offset + region.size
    if stat.S_ISREG(status.st_mode) and end > status.st_size:
        raise RequestRefused(
            f"memory region ends at {end:#x} of a file of {status.st_size:#x} bytes"
        )
    try:
        mapping = Mapping(fd.fileno(), region.size, region.mmap_offset)
    except (OSError, OverflowError) as error:
        raise RequestRefused(f"memory region can't be mapped ({error})") from None
    return Mapped(region, (status.st_dev, status.st_ino), mapping)


def _file_of(fd: Fd) -> tuple[int, int]:
    status = os.fstat(fd.fileno())
    return status.st_dev, status.st_ino
