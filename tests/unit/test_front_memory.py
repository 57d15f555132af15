# SPDX-License-Identifier: Apache-2.0
"""The guest's memory: which tables are possible, and where what they name is mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy.front_memory import MAX_REGIONS, FrontMemory
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import MemoryRegion

PAGE = mmap.PAGESIZE
NAME = "memory-under-test"
TOP = 1 << 64


class File:
    """A memfd in which each 8 bytes say at which offset they are."""

    def __init__(self, size: int) -> None:
        self.fd = Fd(os.memfd_create(NAME, os.MFD_CLOEXEC))
        words = b"".join(at.to_bytes(8, "little") for at in range(0, size, 8))
        os.pwrite(self.fd.fileno(), words[:size], 0)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd.fileno(), size, offset)


def mapped() -> list[str]:
    """Which of the files are mapped into this process: address ranges, sorted."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split()[0] for line in lines if NAME in line]


@pytest.fixture
def file() -> Iterator[File]:
    file = File(64 * PAGE)
    yield file
    file.fd.close()


@pytest.fixture
def memory() -> Iterator[FrontMemory]:
    memory = FrontMemory()
    yield memory
    memory.close()
    assert mapped() == []
    memory.close()


def region(guest: int, size: int, user: int, offset: int = 0) -> MemoryRegion:
    """All in pages."""
    return MemoryRegion(guest * PAGE, size * PAGE, user * PAGE, offset * PAGE)


def test_user_addresses_are_found_where_the_file_is(
    memory: FrontMemory, file: File
) -> None:
    memory.add(region(0, 4, 100, 8), file.fd)
    memory.add(region(50, 2, 200, 1), file.fd)
    for user, size, offset in (
        (100 * PAGE, 4 * PAGE, 8 * PAGE),
        (101 * PAGE + 24, 16, 9 * PAGE + 24),
        (104 * PAGE - 8, 8, 12 * PAGE - 8),
        (200 * PAGE, 2 * PAGE, PAGE),
    ):
        address = memory.find(user, size)
        assert address is not None
        assert ctypes.string_at(address[0], size) == file.read(offset, size)


@pytest.mark.parametrize(
    ("user", "size"),
    [
        (100 * PAGE - 1, 1),
        (100 * PAGE - 1, 2),
        (102 * PAGE, 1),
        (102 * PAGE - 1, 2),
        (101 * PAGE, PAGE + 1),
        (0, 1),
        (TOP - 1, 1),
    ],
)
def test_what_is_not_in_one_region_is_not_found(
    memory: FrontMemory, file: File, user: int, size: int
) -> None:
    memory.add(region(0, 2, 100), file.fd)
    memory.add(region(2, 1, 103), file.fd)
    assert memory.find(user, size) is None


def test_a_range_over_two_adjacent_regions_is_not_in_one(
    memory: FrontMemory, file: File
) -> None:
    memory.add(region(0, 2, 100), file.fd)
    memory.add(region(2, 2, 102), file.fd)
    assert memory.find(102 * PAGE - 4, 8) is None


@pytest.mark.parametrize("offset", [1, 8, 16, 4088, 4097])
def test_offset_need_not_be_page_aligned(
    memory: FrontMemory, file: File, offset: int
) -> None:
    """libblkio announces regions like this."""
    memory.add(MemoryRegion(PAGE, 3 * PAGE + 100, 2 * PAGE, offset), file.fd)
    address = memory.find(2 * PAGE, 3 * PAGE + 100)
    assert address is not None
    assert ctypes.string_at(address[0], 3 * PAGE + 100) == file.read(
        offset, 3 * PAGE + 100
    )


GOOD = region(10, 4, 110)

IMPOSSIBLE = {
    "no size": (region(20, 0, 120), "size 0"),
    "same guest address": (region(10, 4, 120), "overlaps"),
    "same user address": (region(20, 4, 110), "overlaps"),
    "guest address, one page from below": (region(9, 2, 120), "overlaps"),
    "guest address, one page from above": (region(13, 2, 120), "overlaps"),
    "guest address, within": (region(11, 1, 120), "overlaps"),
    "guest address, around": (region(9, 6, 120), "overlaps"),
    "user address, one page from below": (region(20, 2, 109), "overlaps"),
    "user address, one page from above": (region(20, 2, 113), "overlaps"),
    "one byte": (MemoryRegion(9 * PAGE, PAGE + 1, 120 * PAGE, 0), "overlaps"),
    "guest address wraps": (
        MemoryRegion(TOP - PAGE, 2 * PAGE, 0, 0),
        "guest address wraps",
    ),
    "guest address ends beyond the top": (
        MemoryRegion(TOP - PAGE, PAGE + 1, 0, 0),
        "guest address wraps",
    ),
    "user address wraps": (
        MemoryRegion(0, 2 * PAGE, TOP - PAGE, 0),
        "user address wraps",
    ),
    "offset wraps": (MemoryRegion(0, 2 * PAGE, 0, TOP - PAGE), "offset .* wraps"),
    "all of everything": (MemoryRegion(0, TOP - 1, 0, 0), "overlaps"),
    "file too short": (region(20, 65, 120), "ends at 0x41000 of a file of 0x40000"),
    "file too short by a byte": (
        MemoryRegion(20 * PAGE, PAGE, 120 * PAGE, 63 * PAGE + 1),
        "ends at 0x40001 of a file of 0x40000",
    ),
    "begins behind the file": (region(20, 1, 120, 64), "ends at 0x41000"),
}


@pytest.mark.parametrize(("bad", "text"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_impossible_region_changes_nothing(
    memory: FrontMemory, file: File, bad: MemoryRegion, text: str
) -> None:
    memory.add(GOOD, file.fd)
    before = mapped()
    address = memory.find(110 * PAGE, 4 * PAGE)
    with pytest.raises(RequestRefused, match=text) as refused:
        memory.add(bad, file.fd)
    assert str(refused.value).count("\n") == 0
    with pytest.raises(RequestRefused, match=text):
        memory.replace([GOOD, bad], [file.fd, file.fd])
    assert len(memory) == 1
    memory.publish()
    memory.prune()
    assert (mapped(), memory.find(110 * PAGE, 4 * PAGE)) == (before, address)


def test_a_region_may_end_at_the_top(memory: FrontMemory, file: File) -> None:
    memory.add(MemoryRegion(TOP - PAGE, PAGE, TOP - PAGE, 0), file.fd)
    assert memory.find(TOP - PAGE, PAGE) is not None
    assert memory.find(TOP - PAGE, PAGE + 1) is None


def test_what_can_not_be_mapped_is_refused(memory: FrontMemory) -> None:
    ours, theirs = os.pipe()
    with Fd(ours), Fd(theirs) as pipe:
        with pytest.raises(RequestRefused, match="can't be mapped"):
            memory.add(region(0, 1, 0), pipe)
        with pytest.raises(RequestRefused, match="can't be mapped"):
            memory.replace([region(0, 1, 0)], [pipe])
    assert len(memory) == 0


def test_a_file_that_is_only_for_reading_is_refused(memory: FrontMemory) -> None:
    """The device's part of a ring has to be written."""
    with (
        Fd(os.open(__file__, os.O_RDONLY | os.O_CLOEXEC)) as source,
        pytest.raises(RequestRefused, match="can't be mapped"),
    ):
        memory.add(MemoryRegion(0, 64, 0, 0), source)


def test_descriptors_stay_the_senders(memory: FrontMemory, file: File) -> None:
    memory.add(region(0, 1, 0), file.fd)
    memory.replace([region(1, 1, 1)], [file.fd])
    assert not file.fd.closed


def test_number_of_regions_is_bounded(memory: FrontMemory, file: File) -> None:
    for i in range(MAX_REGIONS):
        memory.add(region(i, 1, i, i % 64), file.fd)
    memory.publish()
    with pytest.raises(RequestRefused, match=f"ADD_MEM_REG: more than {MAX_REGIONS}"):
        memory.add(region(MAX_REGIONS, 1, MAX_REGIONS), file.fd)
    memory.remove(region(7, 1, 7))
    memory.add(region(MAX_REGIONS, 1, MAX_REGIONS), file.fd)
    memory.publish()


def test_removed_region_is_mapped_until_pruned(memory: FrontMemory, file: File) -> None:
    memory.add(GOOD, file.fd)
    memory.add(region(30, 1, 130, 40), file.fd)
    assert len(mapped()) == 2
    # The offset is none of REM_MEM_REG's business.
    memory.remove(MemoryRegion(GOOD.guest_addr, GOOD.size, GOOD.user_addr, 12345))
    assert memory.find(110 * PAGE, 1) is None
    assert len(mapped()) == 2
    memory.publish()
    memory.prune()
    assert len(mapped()) == 1


@pytest.mark.parametrize(
    "other", [region(10, 4, 111), region(11, 4, 110), region(10, 3, 110)], ids=str
)
def test_only_the_very_region_can_be_removed(
    memory: FrontMemory, file: File, other: MemoryRegion
) -> None:
    memory.add(GOOD, file.fd)
    with pytest.raises(RequestRefused, match="REM_MEM_REG: there is no such region"):
        memory.remove(other)
    assert len(memory) == 1
    memory.remove(GOOD)
    with pytest.raises(RequestRefused, match="REM_MEM_REG"):
        memory.remove(GOOD)


def test_unchanged_regions_stay_where_they_are(memory: FrontMemory, file: File) -> None:
    first, second, third = region(0, 4, 0), region(4, 4, 4, 4), region(8, 4, 8, 8)
    memory.replace([first, second], [file.fd, file.fd])
    before = memory.find(0, 1), memory.find(4 * PAGE, 1)
    # A VMM sends the same memory by other descriptors each time.
    with Fd.dup(file.fd) as one, Fd.dup(file.fd) as two, Fd.dup(file.fd) as three:
        memory.replace([third, second, first], [one, two, three])
    assert (memory.find(0, 1), memory.find(4 * PAGE, 1)) == before
    memory.replace([second], [file.fd])
    memory.prune()
    assert memory.find(0, 1) is None
    assert memory.find(4 * PAGE, 1) == before[1]


def test_the_same_place_in_another_file_is_another_region(
    memory: FrontMemory, file: File
) -> None:
    memory.replace([GOOD], [file.fd])
    before = memory.find(110 * PAGE, 1)
    with Fd(os.memfd_create(NAME, os.MFD_CLOEXEC)) as other:
        os.ftruncate(other.fileno(), 4 * PAGE)
        memory.replace([GOOD], [other])
    after = memory.find(110 * PAGE, 4 * PAGE)
    assert after is not None
    assert after != before
    assert ctypes.string_at(after[0], 4 * PAGE) == bytes(4 * PAGE)


def test_the_same_place_at_another_offset_is_another_region(
    memory: FrontMemory, file: File
) -> None:
    memory.replace([region(10, 4, 110, 0)], [file.fd])
    memory.replace([region(10, 4, 110, 5)], [file.fd])
    address = memory.find(110 * PAGE, 8)
    assert address is not None
    assert ctypes.string_at(address[0], 8) == file.read(5 * PAGE, 8)


def test_a_table_that_fails_at_its_end_leaves_nothing_mapped(
    memory: FrontMemory, file: File
) -> None:
    memory.replace([GOOD], [file.fd])
    before = mapped()
    table = [GOOD, region(20, 1, 120), region(30, 1, 130)]
    with (
        Fd(os.memfd_create(NAME, os.MFD_CLOEXEC)) as empty,
        pytest.raises(RequestRefused, match="file of 0x0 bytes"),
    ):
        memory.replace(table, [file.fd, file.fd, empty])
    assert mapped() == before
    assert memory.find(110 * PAGE, 1) is not None


def test_an_empty_table_is_a_table(memory: FrontMemory, file: File) -> None:
    memory.replace([GOOD], [file.fd])
    memory.replace([], [])
    memory.publish()
    memory.prune()
    assert (len(memory), mapped()) == (0, [])


class Tables(RuleBasedStateMachine):
    """Random messages about memory, against sets of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = FrontMemory()
        self.file = File(8 * PAGE)
        self.regions: list[MemoryRegion] = []

    def teardown(self) -> None:
        self.memory.close()
        self.file.fd.close()
        assert mapped() == []

    @staticmethod
    def pages(start: int, size: int) -> set[int]:
        return set(range(start // PAGE, (start + size) // PAGE))

    def possible(self, regions: list[MemoryRegion]) -> bool:
        guest: set[int] = set()
        user: set[int] = set()
        for each in regions:
            theirs = self.pages(each.guest_addr, each.size)
            users = self.pages(each.user_addr, each.size)
            inside = each.mmap_offset + each.size <= 8 * PAGE
            top = max(each.guest_addr, each.user_addr) + each.size <= TOP
            if not each.size or guest & theirs or user & users or not (inside and top):
                return False
            guest |= theirs
            user |= users
        return True

    where = st.integers(0, 12) | st.integers(TOP // PAGE - 3, TOP // PAGE - 1)
    some = st.builds(region, where, st.integers(0, 4), where, st.integers(0, 8))

    @rule(new=some)
    def add(self, new: MemoryRegion) -> None:
        if self.possible([*self.regions, new]):
            self.memory.add(new, self.file.fd)
            self.regions.append(new)
        else:
            with pytest.raises(RequestRefused):
                self.memory.add(new, self.file.fd)

    @rule(old=some, data=st.data())
    def remove(self, old: MemoryRegion, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from([old, *self.regions]))
        same = [
            each
            for each in self.regions
            if (each.guest_addr, each.size, each.user_addr)
            == (old.guest_addr, old.size, old.user_addr)
        ]
        if same:
            self.memory.remove(old)
            self.regions.remove(same[0])
        else:
            with pytest.raises(RequestRefused):
                self.memory.remove(old)

    @rule(new=st.lists(some, max_size=4), data=st.data())
    def replace(self, new: list[MemoryRegion], data: st.DataObject) -> None:
        if self.regions:
            kept = data.draw(st.lists(st.sampled_from(self.regions), max_size=3))
            new = [*kept, *new]
        fds = [self.file.fd] * len(new)
        before = {each: self.memory.find(each.user_addr, 1) for each in self.regions}
        if self.possible(new):
            self.memory.replace(new, fds)
            for each in set(new) & set(before):
                assert self.memory.find(each.user_addr, 1) == before[each]
            self.regions = new
        else:
            with pytest.raises(RequestRefused):
                self.memory.replace(new, fds)

    @rule()
    def settle(self) -> None:
        self.memory.publish()
        self.memory.prune()
        assert len(mapped()) <= len(self.regions)

    @invariant()
    def everything_is_found_where_it_is(self) -> None:
        assert len(self.memory) == len(self.regions)
        users: set[int] = set()
        for each in self.regions:
            users |= self.pages(each.user_addr, each.size)
            address = self.memory.find(each.user_addr, each.size)
            assert address is not None
            for at in (0, each.size - 8):
                assert ctypes.string_at(address[0] + at, 8) == self.file.read(
                    each.mmap_offset + at, 8
                )
        for page in set(range(16)) - users:
            assert self.memory.find(page * PAGE, 1) is None


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
