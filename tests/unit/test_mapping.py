# SPDX-License-Identifier: Apache-2.0
"""Mappings: what they cover, what they refuse, and that they go away once."""

from __future__ import annotations

import gc
import mmap
import os
import re
from pathlib import Path

import pytest

from vhost_airlock.dataplane.mapping import Mapping

PAGE = 4096


@pytest.fixture
def fd():
    fd = os.memfd_create("mapping", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def mapped(address: int) -> str | None:
    """The kernel's lines about the mapping at this address."""
    text = Path("/proc/self/smaps").read_text()
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        start, end = (int(n, 16) for n in part.split(" ", 1)[0].split("-"))
        if start <= address < end:
            return part
    return None


def pages(address: int) -> int:
    """How many pages the mapping has that starts at this address."""
    part = mapped(address)
    assert part is not None
    start, end = (int(n, 16) for n in part.split(" ", 1)[0].split("-"))
    assert start == address
    return (end - start) // PAGE


def test_it_has_the_size_that_was_asked_for(fd):
    mapping = Mapping(fd, 3 * PAGE, PAGE)
    assert mapping.size == 3 * PAGE
    assert mapping.address % PAGE == 0
    assert pages(mapping.address) == 3
    mapping.close()


@pytest.mark.parametrize(
    ("size", "offset", "count"),
    [
        (1, 0, 1),
        (PAGE, 1, 2),
        (PAGE - 1, 1, 1),
        (5000, 0, 2),
        (2 * PAGE, PAGE + 100, 3),
        (1, 3 * PAGE - 1, 1),
    ],
)
def test_offset_and_size_may_be_any(fd, size, offset, count):
    mapping = Mapping(fd, size, offset)
    assert mapping.address % PAGE == offset % PAGE
    assert pages(mapping.address - offset % PAGE) == count
    mapping.close()


def flags(part: str | None) -> list[str]:
    """The kernel's flags of a mapping, of two letters each (proc_pid_smaps(5))."""
    assert part is not None
    found = re.search(r"VmFlags: (.*)", part)
    assert found is not None
    return found[1].split()


def test_it_is_shared_writable_and_not_dumped(fd):
    mapping = Mapping(fd, PAGE)
    part = mapped(mapping.address)
    assert part is not None
    assert " rw-s " in part.split("\n")[0]
    assert "dd" in flags(part)
    mapping.close()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this kernel has no transparent huge pages",
)
@pytest.mark.parametrize("huge_pages", [False, True])
def test_huge_pages_are_asked_for_if_wanted(fd, huge_pages):
    mapping = Mapping(fd, PAGE, huge_pages=huge_pages)
    assert ("hg" in flags(mapped(mapping.address))) == huge_pages
    mapping.close()


def test_it_is_undone_once(fd):
    mapping = Mapping(fd, 7 * PAGE)
    mapping.close()
    assert mapped(mapping.address) is None
    # Something else at the same place is none of its business.
    other = [mmap.mmap(-1, 7 * PAGE) for _ in range(4)]
    mapping.close()
    del mapping
    gc.collect()
    for view in other:
        view[0] = 1
        view.close()


def test_it_is_undone_with_the_object(fd):
    mapping = Mapping(fd, PAGE)
    address = mapping.address
    assert mapped(address) is not None
    del mapping
    gc.collect()
    assert mapped(address) is None


def test_it_outlives_the_descriptor():
    fd = os.memfd_create("mapping", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    mapping = Mapping(fd, PAGE)
    os.close(fd)
    assert mapped(mapping.address) is not None
    mapping.close()


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (0, 0),
        ((1 << 64) - 1, 0),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, PAGE - 1),
        ((1 << 64) - PAGE, PAGE - 1),
        ((1 << 64) - PAGE + 1, 0),
        (1 << 63, 0),
        (PAGE, (1 << 64) - PAGE),
        (PAGE, 1 << 63),
        (2 * PAGE, (1 << 63) - PAGE),
    ],
)
def test_sizes_and_offsets_that_wrap_round_are_refused(fd, size, offset):
    with pytest.raises(OSError, match="cannot map"):
        Mapping(fd, size, offset)


def test_a_closed_descriptor_is_refused(fd):
    other = os.dup(fd)
    os.close(other)
    with pytest.raises(OSError, match="cannot ask the file system"):
        Mapping(other, PAGE)


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(bytes(PAGE))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="cannot map 4096 bytes") as raised:
            Mapping(fd, PAGE)
        assert raised.value.errno is not None
    finally:
        os.close(fd)


def test_what_has_no_memory_is_refused():
    fd = os.eventfd(0)
    try:
        with pytest.raises(OSError, match="cannot map"):
            Mapping(fd, PAGE)
    finally:
        os.close(fd)


def test_huge_pages_are_mapped_whole():
    """Nothing is touched, so no huge pages need to be set aside."""
    huge = 2 << 20
    try:
        fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    except OSError as error:
        pytest.skip(f"no huge pages here: {error}")
    try:
        os.ftruncate(fd, 4 * huge)
        mapping = Mapping(fd, 5 * PAGE, huge + 3 * PAGE)
    finally:
        os.close(fd)
    assert mapping.address % huge == 3 * PAGE
    assert pages(mapping.address - 3 * PAGE) == huge // PAGE
    mapping.close()
    assert mapped(mapping.address) is None


def test_a_part_can_be_emptied(fd):
    """It is zeros then, takes no memory, and is still mapped."""
    with mmap.mmap(fd, 16 * PAGE) as view:
        view[:] = b"x" * 16 * PAGE
        mapping = Mapping(fd, 16 * PAGE)
        mapping.empty(4 * PAGE)
        assert view[:] == b"x" * 4 * PAGE + bytes(12 * PAGE)
        mapping.empty()
        assert os.fstat(fd).st_blocks == 0
        assert view[:] == bytes(16 * PAGE)
        for start in (1, 17 * PAGE):
            with pytest.raises(ValueError, match=f"from byte {start} on"):
                mapping.empty(start)
        mapping.close()
        with pytest.raises(ValueError, match="cannot empty"):
            mapping.empty()
