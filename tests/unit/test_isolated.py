# SPDX-License-Identifier: Apache-2.0
"""Isolated memory: sealed for good, far from any guest, and no more than its limit."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.limits import no_more_fds
from vhost_airlock.dataplane.pump import shadow_bytes, slot_bytes
from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy import isolated
from vhost_airlock.proxy.isolated import (
    BASE,
    PAGE,
    REGION_SIZE,
    RINGS_SIZE,
    ROUNDING,
    STEPS,
    IsolatedMemory,
    Region,
    sealed_memfd,
)
from vhost_airlock.vhost.fds import Fd

MIB = 1 << 20
GIB = 1 << 30
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
SEAL_EXEC = 0x20  # F_SEAL_EXEC
PUNCH_HOLE = 0x01 | 0x02  # FALLOC_FL_PUNCH_HOLE needs FALLOC_FL_KEEP_SIZE

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: Fd, mode: int, offset: int, size: int) -> None:
    if _fallocate(fd.fileno(), mode, offset, size):
        raise OSError(ctypes.get_errno(), "fallocate")


def held() -> tuple[int, int]:
    """The descriptors and mappings of isolated memory in this process."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("vhost-airlock")


@pytest.fixture
def make() -> Iterator[Callable[..., IsolatedMemory]]:
    """Makes isolated memory, which leaves nothing behind."""
    before = held()
    with ExitStack() as stack:

        def make(limit: int = 256 * MIB, slots: int = 509) -> IsolatedMemory:
            memory = IsolatedMemory(limit, slots=slots)
            stack.callback(memory.close)
            return memory

        yield make
    assert held() == before


def grown(memory: IsolatedMemory, wanted: int = 0) -> Region:
    region = memory.grow(wanted)
    assert region is not None
    memory.open(region)
    return region


CHANGES: dict[str, Callable[[Fd], None]] = {
    "shrink": lambda fd: os.ftruncate(fd.fileno(), 0),
    "shrink by a page": lambda fd: os.ftruncate(fd.fileno(), 7 * PAGE),
    "grow": lambda fd: os.ftruncate(fd.fileno(), 9 * PAGE),
    "grow by writing": lambda fd: _write_at(fd, 8 * PAGE),
    "grow by allocating": lambda fd: fallocate(fd, 0, 0, 9 * PAGE),
    "seal against writing": lambda fd: _seal(fd, fcntl.F_SEAL_WRITE),
    "seal against later writing": lambda fd: _seal(fd, 0x10),
    "seal against execution": lambda fd: _seal(fd, SEAL_EXEC),
    "seal once more": lambda fd: _seal(fd, fcntl.F_SEAL_SEAL),
}


def _seal(fd: Fd, seal: int) -> None:
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seal)


def _write_at(fd: Fd, offset: int) -> None:
    os.pwrite(fd.fileno(), b"x", offset)


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_nobody_can_change_the_memfd(change: Callable[[Fd], None]) -> None:
    """With one descriptor or another: the back's is a copy of ours."""
    with sealed_memfd("test", 8 * PAGE) as fd, Fd.dup(fd) as copy:
        path = f"/proc/self/fd/{fd.fileno()}"
        with Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC)) as reopened:
            for each in (fd, copy, reopened):
                with pytest.raises(PermissionError):
                    change(each)
        assert os.fstat(fd.fileno()).st_size == 8 * PAGE
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS


def test_the_memfd_can_not_be_executed() -> None:
    """Where the kernel can have it so; nor is it then the back's to change."""
    with sealed_memfd("test", PAGE) as fd:
        mode = os.fstat(fd.fileno()).st_mode
        if fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & SEAL_EXEC:
            assert mode & 0o111 == 0
            with pytest.raises(PermissionError):
                os.fchmod(fd.fileno(), 0o777)


def test_an_older_kernel_makes_a_memfd_without_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linux before 6.3 says EINVAL to a flag that it does not know."""
    asked = []
    make = os.memfd_create

    def older(name: str, flags: int) -> int:
        asked.append(flags)
        if flags & isolated.MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return make(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    with sealed_memfd("test", PAGE) as fd:
        assert fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS
    assert [bool(flags & isolated.MFD_NOEXEC_SEAL) for flags in asked] == [True, False]


def test_want_of_descriptors_is_not_taken_for_an_older_kernel() -> None:
    with no_more_fds(), pytest.raises(OSError, match="Too many") as told:
        sealed_memfd("test", PAGE)
    assert told.value.errno == errno.EMFILE


def test_a_hole_reads_as_zeros() -> None:
    """It can't be prevented; the memory stays mapped, and it is as a write of zeros."""
    with sealed_memfd("test", 8 * PAGE) as fd, mmap.mmap(fd.fileno(), 8 * PAGE) as view:
        view[:] = b"x" * 8 * PAGE
        fallocate(fd, PUNCH_HOLE, PAGE, 6 * PAGE)
        assert view[:] == b"x" * PAGE + bytes(6 * PAGE) + b"x" * PAGE


@pytest.mark.parametrize("slots", [0, 509])
def test_every_region_is_sealed(
    make: Callable[..., IsolatedMemory], slots: int
) -> None:
    memory = make(slots=slots)
    if slots:
        grown(memory)
        grown(memory)
    for region in memory.regions:
        assert fcntl.fcntl(region.fd.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS
        assert not os.get_inheritable(region.fd.fileno())


def assert_apart(regions: list[Region]) -> None:
    """Far from guests, page by page, and no two in one place."""
    for region in regions:
        announced = region.announced
        assert announced.guest_addr == announced.user_addr >= BASE
        assert announced.guest_addr + announced.size <= 2 * BASE
        assert announced.mmap_offset == 0
        assert announced.guest_addr % PAGE == announced.size % PAGE == 0
        assert announced.size == os.fstat(region.fd.fileno()).st_size
    for one, two in pairwise(regions):
        assert one.announced.guest_addr + one.size <= two.announced.guest_addr


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from([1, 8, 33, 100, 256, 1024]),
    st.integers(2, 12),
    st.lists(st.integers(0, 3) | st.sampled_from([0.1, 1, 32, 64, 128]), max_size=20),
)
def test_regions_come_and_go_without_overlap(
    limit: int, slots: int, plan: list[float]
) -> None:
    """0 takes a new region, as do sizes; 1 to 3 give one back."""
    memory = IsolatedMemory(limit * MIB, slots=slots)
    try:
        assert memory.regions == [memory.rings]
        for step in plan:
            pool = [r for r in memory.regions if r is not memory.rings]
            if step in (1, 2, 3) and pool:
                number = sorted(memory.idle())[int(step) % len(pool)]
                memory.withdraw(number).close()
                continue
            wanted = int(step * MIB) // PAGE * PAGE
            region = memory.grow(wanted)
            room = limit * MIB - sum(r.size for r in pool)
            if region is None:
                most = max(1, slots - 2)
                assert len(pool) == most or wanted > room or not room
                continue
            assert wanted <= region.size <= room
            memory.open(region)
            assert memory.grow(room) is None
            assert_apart(memory.regions)
            assert len(memory.regions) <= slots
    finally:
        memory.close()


def test_the_pool_is_no_larger_than_its_limit(
    make: Callable[..., IsolatedMemory],
) -> None:
    memory = make(REGION_SIZE * 2 + 5 * PAGE + 123)
    sizes = [grown(memory).size for _ in range(3)]
    assert sizes == [REGION_SIZE, REGION_SIZE, 5 * PAGE]
    assert memory.grow(0) is None
    assert memory.grow(PAGE) is None
    (last,) = set(memory.idle()) - {0, 1}
    memory.withdraw(last).close()
    assert grown(memory).size == 5 * PAGE


def test_a_region_is_large_enough_for_what_is_wanted(
    make: Callable[..., IsolatedMemory],
) -> None:
    memory = make(256 * MIB)
    assert grown(memory, 4 * REGION_SIZE).size == 4 * REGION_SIZE
    assert memory.grow(8 * REGION_SIZE) is None
    assert grown(memory, PAGE).size == REGION_SIZE


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_few_slots_are_enough_for_all_of_the_pool(
    make: Callable[..., IsolatedMemory], slots: int
) -> None:
    """And for a lone region: of two, it takes none."""
    memory = make(256 * MIB, slots)
    for _ in range(max(1, slots - 2)):
        grown(memory)
    assert memory.grow(0) is None
    assert sum(region.size for region in memory.regions[1:]) == 256 * MIB
    if slots > 2:
        memory.open_lone(memory.make_lone(MIB))
    assert len(memory.regions) == slots
    assert_apart(memory.regions)


def test_no_more_regions_than_the_back_has_slots(
    make: Callable[..., IsolatedMemory],
) -> None:
    memory = make(256 * MIB, slots=4)
    for wanted in (128 * MIB, 0):
        grown(memory, wanted)
    memory.withdraw(0).close()
    grown(memory, 64 * MIB)
    # There is room, but no slot: that is for a lone region.
    assert memory.grow(PAGE) is None
    assert len(memory.regions) == 3


def test_no_more_regions_than_the_pool_can_manage(
    make: Callable[..., IsolatedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that make way for each other leave remainders, and these add up."""
    monkeypatch.setattr("vhost_airlock.proxy.isolated.REGION_SIZE", PAGE)
    memory = make(STEPS * 100 * PAGE)
    chance = random.Random(1)
    for _ in range(3000):
        wanted = chance.randrange(50, 250) * PAGE
        if region := memory.grow(wanted) or memory.grow(0):
            memory.open(region)
        else:
            memory.withdraw(chance.choice(memory.idle())).close()
    assert_apart(memory.regions)
    assert STEPS < len(memory.regions) <= 2 * STEPS


@pytest.mark.parametrize("slots", [0, 509])
@pytest.mark.parametrize("limit", [GIB, 2 * GIB + PAGE, 4 * GIB])
def test_a_large_pool_can_be_used_to_its_end(
    make: Callable[..., IsolatedMemory], limit: int, slots: int
) -> None:
    memory = make(limit, slots)
    if slots:
        while region := memory.grow(0):
            memory.open(region)
    assert sum(region.size for region in memory.regions[1:]) == limit
    assert_apart(memory.regions)


def test_without_slots_there_is_one_region_from_the_start(
    make: Callable[..., IsolatedMemory],
) -> None:
    memory = make(64 * MIB + 1, slots=0)
    rings, pool = memory.regions
    assert rings is memory.rings
    assert pool.size == 64 * MIB
    assert_apart(memory.regions)
    assert memory.grow(0) is None
    assert memory.grow(PAGE) is None
    assert memory.small


@pytest.mark.parametrize("slots", [0, 2])
def test_where_there_is_no_slot_lone_regions_lie_behind_the_rings(
    make: Callable[..., IsolatedMemory], slots: int
) -> None:
    memory = make(64 * MIB, slots)
    assert memory.rings.size == RINGS_SIZE + 64 * MIB + ROUNDING
    assert not memory.lone_has_slot
    assert_apart(memory.regions)
    ctypes.memset(memory.rings.mapping.address, 1, PAGE)
    ctypes.memset(memory.rings.mapping.address + RINGS_SIZE, 1, PAGE)
    memory.clear_lone()
    assert ctypes.string_at(memory.rings.mapping.address, 1) == b"\x01"
    assert ctypes.string_at(memory.rings.mapping.address + RINGS_SIZE, 1) == b"\0"
    assert memory.close_lone() == (0, memory.rings)
    memory.open_lone(memory.rings)


def test_a_lone_region_comes_and_goes(make: Callable[..., IsolatedMemory]) -> None:
    """Beside the limit of the pool, and of the size that is wanted."""
    memory = make(REGION_SIZE)
    grown(memory)
    assert memory.close_lone() == (0, None)
    for pages in (20000, 3):
        lone = memory.make_lone(pages * PAGE)
        memory.open_lone(lone)
        assert [region.size for region in memory.regions[1:]] == [
            REGION_SIZE,
            pages * PAGE,
        ]
        assert_apart(memory.regions)
        assert memory.close_lone() == (0, lone)
        assert lone not in memory.regions
        lone.close()


@pytest.mark.parametrize("slots", [0, 509])
def test_all_of_it_can_be_emptied(
    make: Callable[..., IsolatedMemory], slots: int
) -> None:
    memory = make(64 * MIB, slots)
    if slots:
        grown(memory)
    for region in memory.regions:
        ctypes.memset(region.mapping.address + 5 * PAGE, 1, 3 * PAGE)
    assert memory.resident > 0
    memory.clear()
    assert memory.resident == 0


def test_nothing_is_resident_before_it_is_used(
    make: Callable[..., IsolatedMemory],
) -> None:
    memory = make(GIB, slots=0)
    assert memory.resident == 0
    ctypes.memset(memory.rings.mapping.address, 1, 3 * PAGE)
    assert memory.resident == 3 * PAGE


def test_withdrawn_regions_are_gone(make: Callable[..., IsolatedMemory]) -> None:
    memory = make()
    grown(memory)
    assert memory.small
    second = grown(memory)
    assert not memory.small
    third = grown(memory)
    before = held()
    withdrawn = memory.withdraw(1)
    assert withdrawn is second
    withdrawn.close()
    fds, mappings = before
    assert held() == (fds - 1, mappings - 1)
    assert memory.idle() == [0, 2]
    # The hole is used again.
    assert grown(memory).announced == second.announced
    assert third.announced.guest_addr == second.announced.guest_addr + REGION_SIZE


def test_rings_have_rooms_of_their_own(make: Callable[..., IsolatedMemory]) -> None:
    """Each has two, and room for its slots; none of them overlap."""
    memory = make()
    size = shadow_bytes(256)
    rooms = []
    for i in range(50):
        rooms.append((*memory.slot_memory(i, slot_bytes(256)), slot_bytes(256)))
        rooms += [(*memory.ring_memory(i, size), size) for _ in range(2)]
    rooms.sort()
    assert rooms[0][1] == memory.rings.announced.guest_addr == BASE
    for (host, back, length), (next_host, next_back, _) in pairwise(rooms):
        assert next_host - host == next_back - back >= length
    assert rooms[-1][1] + size <= BASE + RINGS_SIZE
    assert all(host % PAGE == back % PAGE == 0 for host, back, _ in rooms)


def test_a_ring_never_has_its_last_room_again(
    make: Callable[..., IsolatedMemory],
) -> None:
    memory = make()
    first, second, third = (memory.ring_memory(7, shadow_bytes(256)) for _ in range(3))
    assert first == third != second
    assert memory.ring_memory(7, shadow_bytes(128)) == second
    larger = [memory.ring_memory(7, shadow_bytes(512)) for _ in range(2)]
    assert len({first, second, *larger}) == 4
    assert memory.ring_memory(7, shadow_bytes(256)) == larger[0]


def test_rings_without_room_are_refused(make: Callable[..., IsolatedMemory]) -> None:
    memory = make()
    for i in range(230):
        memory.slot_memory(i, slot_bytes(1024))
        memory.ring_memory(i, shadow_bytes(1024))
    with pytest.raises(RequestRefused, match="ring 230: rings need more than"):
        memory.slot_memory(230, slot_bytes(1024))
    # Rings that are there can be started again.
    memory.ring_memory(0, shadow_bytes(1024))
