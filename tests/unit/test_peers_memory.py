# SPDX-License-Identifier: Apache-2.0
"""Regions of shared memory, and a guest's RAM made of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from vhost_airlock.errors import RequestRefused
from vhost_airlock.peers.memory import Memory
from vhost_airlock.peers.ram import HIGH, LOW, MIB, PAGE, USER_BASE, GuestRam
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import MemoryRegion

SIZE = 16 * PAGE


@pytest.fixture
def file() -> Iterator[Fd]:
    with Fd(os.memfd_create("regions")) as fd:
        os.write(fd.fileno(), bytes(i >> 4 & 0xFF for i in range(SIZE)))
        yield fd


@pytest.fixture
def memory() -> Iterator[Memory]:
    memory = Memory()
    yield memory
    memory.clear()


def is_mapped(name: str) -> bool:
    with open("/proc/self/maps") as maps:
        return f"/memfd:{name}" in maps.read()


@pytest.mark.parametrize("offset", [0, PAGE, 100, PAGE + 100])
def test_region_is_found_by_both_its_addresses(
    memory: Memory, file: Fd, offset: int
) -> None:
    memory.add(MemoryRegion(0x10000, 1000, 0x7F000000, offset), file)
    expected = os.pread(file.fileno(), 16, offset + 64)
    assert memory.view(0x10000 + 64, 16) == expected
    assert memory.user_view(0x7F000000 + 64, 16) == expected
    assert memory.view(0x10000 + 990, 10) == os.pread(file.fileno(), 10, offset + 990)


def test_piece_of_memory_may_cross_regions(memory: Memory, file: Fd) -> None:
    memory.add(MemoryRegion(2 * PAGE, PAGE, 9 * PAGE, 3 * PAGE), file)
    memory.add(MemoryRegion(PAGE, PAGE, PAGE, 5 * PAGE), file)
    pieces = memory.views(2 * PAGE - 10, 30)
    assert [len(piece) for piece in pieces] == [10, 20]
    assert pieces[0] == os.pread(file.fileno(), 10, 6 * PAGE - 10)
    assert pieces[1] == os.pread(file.fileno(), 20, 3 * PAGE)
    with pytest.raises(LookupError, match="not in one region"):
        memory.view(2 * PAGE - 10, 30)


def test_what_is_outside_is_not_found(memory: Memory, file: Fd) -> None:
    memory.add(MemoryRegion(PAGE, PAGE, 8 * PAGE), file)
    for addr, length in [(0, 1), (PAGE - 1, 2), (2 * PAGE - 1, 2), (2**64 - 1, 2)]:
        with pytest.raises(LookupError):
            memory.views(addr, length)
    for addr, length in [(PAGE, 1), (8 * PAGE - 1, 2), (9 * PAGE - 1, 2)]:
        with pytest.raises(LookupError):
            memory.user_view(addr, length)


@pytest.mark.parametrize(
    "region",
    [
        MemoryRegion(5 * PAGE - 1, PAGE, 0x900000),
        MemoryRegion(4 * PAGE + 10, 10, 0x900000),
        MemoryRegion(9 * PAGE, PAGE, 0x800000 - 1),
        MemoryRegion(9 * PAGE, 0, 0x900000),
        MemoryRegion(9 * PAGE, 2 * SIZE, 0x900000),
        MemoryRegion(9 * PAGE, PAGE, 0x900000, SIZE),
    ],
)
def test_impossible_region_is_refused(
    memory: Memory, file: Fd, region: MemoryRegion
) -> None:
    memory.add(MemoryRegion(4 * PAGE, PAGE, 0x800000), file)
    with pytest.raises(RequestRefused):
        memory.add(region, file)
    assert len(memory.regions) == 1


def test_removed_region_is_unmapped(memory: Memory, file: Fd) -> None:
    memory.add(MemoryRegion(PAGE, PAGE, 8 * PAGE, 7), file)
    assert is_mapped("regions")
    with pytest.raises(RequestRefused, match="there is no"):
        memory.remove(MemoryRegion(PAGE, PAGE - 1, 8 * PAGE))
    memory.remove(MemoryRegion(PAGE, PAGE, 8 * PAGE, 0))
    assert not is_mapped("regions")


def test_guest_ram_is_laid_out_as_a_pcs() -> None:
    ram = GuestRam(MIB, 2 * MIB)
    (low, low_fd), (high, high_fd) = ram.shared()
    assert (low.guest_addr, low.size, low.mmap_offset) == (LOW, MIB, 0)
    assert (high.guest_addr, high.size, high.mmap_offset) == (HIGH, 2 * MIB, MIB)
    assert os.path.sameopenfile(low_fd.fileno(), high_fd.fileno())
    assert ram.user_addr(HIGH + 5) == USER_BASE + MIB + 5
    with pytest.raises(LookupError):
        ram.view(MIB, 1)
    ram.close()
    assert not is_mapped("guest-ram")


def test_guest_ram_allocates_each_byte_once() -> None:
    ram = GuestRam(16 * PAGE, 16 * PAGE)
    # All but the page at address 0, which stays unused.
    taken = sorted(ram.alloc(PAGE // 2, 64) for _ in range(62))
    with pytest.raises(MemoryError):
        ram.alloc(PAGE // 2, 64)
    assert all(addr % 64 == 0 for addr in taken)
    assert all(len(ram.view(addr, PAGE // 2)) == PAGE // 2 for addr in taken)
    assert all(a + PAGE // 2 <= b for a, b in itertools.pairwise(taken))
    ram.close()


def test_plugged_memory_comes_and_goes() -> None:
    ram = GuestRam(MIB, MIB)
    region = ram.plug(HIGH + 64 * MIB, MIB)
    addr = ram.alloc(PAGE, region=region)
    assert addr == region.guest_addr
    ram.view(addr, 3)[:] = b"abc"
    regions = [shared for shared, _ in ram.shared()]
    assert regions[-1] == region
    assert len({shared.user_addr for shared in regions}) == 3
    ram.unplug(region)
    with pytest.raises(LookupError):
        ram.view(addr, 3)
    ram.close()


def test_marker_is_planted_in_every_region_and_away_from_all_else() -> None:
    ram = GuestRam(MIB, MIB)
    marker = os.urandom(64)
    before = ram.alloc(100, 1)
    planted = ram.plant(marker)
    after = ram.alloc(100, 1)
    assert [addr >= HIGH for addr in planted] == [False, True]
    for addr in planted:
        assert ram.view(addr, 64) == marker
        assert addr % PAGE
        assert {before // PAGE, after // PAGE}.isdisjoint(
            {addr // PAGE, (addr + 63) // PAGE}
        )
    ram.close()
