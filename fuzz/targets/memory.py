# SPDX-License-Identifier: Apache-2.0
"""Memory tables of any shape in any order; look-ups, and copies through a pump."""

from __future__ import annotations

import ctypes
import os
from functools import cache

from fuzz.ringmodel import PATTERN
from fuzz.source import Source
from tests.support.plane import PAGE, Lane, World
from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy.front_memory import FrontMemory
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import MemoryRegion

FILE = 8 * PAGE
STARTS = (0, 1 << 32, 1 << 46, (1 << 64) - 8 * PAGE, (1 << 64) - 1)
STEPS = (0, PAGE, 2 * PAGE, 4 * PAGE, 1, 0x7FF, 560, 6 * PAGE)
SIZES = (PAGE, 2 * PAGE, 4 * PAGE, 560, 1, 0, PAGE + 1, FILE, FILE + 1, (1 << 64) - 1)
LENGTHS = (16, 0, 1, 560, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE, 8 * PAGE)
END = 1 << 64


@cache
def files() -> list[Fd]:
    made = [Fd(os.memfd_create("fuzz", os.MFD_CLOEXEC)) for _ in range(2)]
    for fd in made:
        os.ftruncate(fd.fileno(), FILE)
    return made


@cache
def kept_lane() -> Lane:
    return Lane(World(pool=128 * PAGE, largest=32 * PAGE, regions=()), size=4)


class MemoryModel:
    """Regions as a list, files as bytes; every look-up goes through all of them."""

    def __init__(self) -> None:
        for i, fd in enumerate(files()):
            os.pwrite(fd.fileno(), PATTERN[i : FILE + i], 0)
        self.memory = FrontMemory()
        self.content = [bytearray(PATTERN[i : FILE + i]) for i in range(2)]
        self.table: list[tuple[MemoryRegion, int]] = []
        self.lane = kept_lane()
        self.lane.world.memory = self.memory.guest
        self.lane.pump.detach(None)
        self.begin()

    def begin(self) -> None:
        self.lane.renew()
        self.lane.ring.avail_idx = self.lane.ring.used_idx = 0
        self.lane.start(0)

    # The form of a table.

    @staticmethod
    def possible(table: list[tuple[MemoryRegion, int]]) -> bool:
        for i, (region, _) in enumerate(table):
            size = region.size
            starts = region.guest_addr, region.user_addr, region.mmap_offset
            if not size or max(starts) + size > END or region.mmap_offset + size > FILE:
                return False
            for other, _ in table[:i]:
                for a, b in (
                    (region.guest_addr, other.guest_addr),
                    (region.user_addr, other.user_addr),
                ):
                    if max(a, b) < min(a + size, b + other.size):
                        return False
        return True

    def change(self, source: Source) -> None:
        """One message about memory."""
        kind = source.below(4)
        if kind == 0 and self.table:
            region, _ = source.choice(self.table)
            if source.below(4) == 3:
                region = any_region(source)
            key = region.guest_addr, region.user_addr, region.size
            table = [
                (r, f)
                for r, f in self.table
                if (r.guest_addr, r.user_addr, r.size) != key
            ]
            self._try(
                lambda: self.memory.remove(region), table, len(self.table) > len(table)
            )
            return
        added = [(any_region(source), source.below(2)) for _ in range(source.below(4))]
        if kind == 1:
            table = [entry for entry in self.table if source.flag()] + added
            fds = [files()[file] for _, file in table]
            regions = [region for region, _ in table]
            self._try(
                lambda: self.memory.replace(regions, fds), table, self.possible(table)
            )
            return
        for region, file in added:
            table = [*self.table, (region, file)]
            fd = files()[file]
            self._try(
                lambda region=region, fd=fd: self.memory.add(region, fd),
                table,
                self.possible(table),
            )

    def _try(self, act, table, possible: bool) -> None:  # type: ignore[no-untyped-def]
        try:
            act()
        except RequestRefused:
            assert not possible, "a good table was refused"
        else:
            assert possible, "an impossible table was taken"
            self.table = table
        self.memory.publish()
        self.memory.prune()
        assert len(self.memory) == len(self.table)

    # The content of a table.

    def look_up(self, user: int, size: int) -> None:
        """The airlock finds a range of user addresses in one region, or not at all."""
        found = self.memory.find(user, size)
        for region, file in self.table:
            at = user - region.user_addr
            if at >= 0 and at + size <= region.size:
                assert found is not None
                start = region.mmap_offset + at
                # A range of no bytes may lie at a region's very end.
                expected = self.content[file][start : start + size]
                host, guest = found
                assert ctypes.string_at(host, size) == expected
                assert guest == region.guest_addr + at
                return
        assert found is None

    def place(self, guest: int) -> tuple[int, int, int] | None:
        """(file, offset in it, bytes from there on) of a guest address."""
        for region, file in self.table:
            at = guest - region.guest_addr
            if 0 <= at < region.size:
                return file, region.mmap_offset + at, region.size - at
        return None

    def read(self, guest: int, size: int) -> bytes | None:
        data = b""
        while size:
            found = self.place(guest)
            if found is None:
                return None
            file, start, run = found
            run = min(run, size)
            data += self.content[file][start : start + run]
            guest += run
            size -= run
        return data

    def write(self, guest: int, data: bytes) -> None:
        """As far as there is memory."""
        while data and (found := self.place(guest)):
            file, start, run = found
            run = min(run, len(data))
            self.content[file][start : start + run] = data[:run]
            guest += run
            data = data[run:]

    def copy(self, source: Source) -> None:
        """One request: bytes go to the back and others come back, or it is a fault."""
        lane, ring = self.lane, self.lane.ring
        out, size_out = self.address(source), source.choice(LENGTHS)
        into, size_in = self.address(source), source.choice(LENGTHS)
        given = self.read(out, size_out)
        whole = out + size_out < END and into + size_in < END and size_in + size_out > 0
        good = whole and given is not None and self.read(into, size_in) is not None
        ring.write_desc(0, out, size_out, 1, 1)
        ring.write_desc(1, into, size_in, 2)
        ring.set_avail_entry(ring.avail_idx % 4, 0)
        ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF
        assert lane.step() == good
        assert bool(lane.pump.fault) == (not good)
        if not good:
            lane.pump.detach(None)
            self.begin()
            return
        chain = lane.take()
        assert lane.bytes_of(chain) == given
        if source.below(4) == 3:
            self.change(source)
        data = PATTERN[3 : 3 + size_in]
        lane.complete(chain, data)
        assert lane.step() == 1
        self.write(into, data)

    def address(self, source: Source) -> int:
        if self.table and source.below(8):
            region, _ = source.choice(self.table)
            start = region.guest_addr + source.choice(STEPS)
            if source.flag():  # so that it ends with the region, or nearly
                start = region.guest_addr + region.size - source.choice(LENGTHS)
            return (start + 1 - source.below(3)) % END
        return (source.choice(STARTS) + source.choice(STEPS)) % END

    def check(self) -> None:
        for fd, content in zip(files(), self.content, strict=True):
            assert os.pread(fd.fileno(), FILE, 0) == content


def any_region(source: Source) -> MemoryRegion:
    if source.number(1) == 0xFF:
        return MemoryRegion(*(source.number(8) for _ in range(4)))
    guest = source.choice(STARTS) + source.choice(STEPS)
    user = source.choice(STARTS) + source.choice(STEPS)
    size, offset = source.choice(SIZES), source.choice(STEPS)
    return MemoryRegion(guest % END, size, user % END, offset)


def one(data: bytes) -> None:
    source = Source(data)
    model = MemoryModel()
    try:
        for _ in range(60):
            if not source.more:
                break
            kind = source.below(4)
            if kind < 2:
                model.change(source)
            elif kind == 2:
                model.copy(source)
            else:
                user = (source.choice(STARTS) + source.choice(STEPS)) % END
                model.look_up(user, source.choice(SIZES))
            model.check()
    finally:
        model.memory.close()
    model.lane.world.check()
