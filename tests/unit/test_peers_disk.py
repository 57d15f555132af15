# SPDX-License-Identifier: Apache-2.0
"""The block device's answers to requests."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_airlock.peers.disk import (
    HEADER,
    MAX_ZEROES,
    RANGE,
    SEG_MAX,
    BlkFeature,
    BlkStatus,
    BlkType,
    Disk,
    split,
)
from vhost_airlock.peers.ring import RingFault
from vhost_airlock.vhost.fds import Fd

SECTORS = 64
SIZE = SECTORS * 512


def memory(size: int) -> memoryview:
    return memoryview(bytearray(size))


def cut(data: memoryview, cuts: Sequence[int]) -> list[memoryview]:
    """Pieces of data that end at these offsets; empty ones too."""
    ends = [*sorted(min(c, len(data)) for c in cuts), len(data)]
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@pytest.fixture
def file() -> Iterator[Fd]:
    with Fd(os.memfd_create("disk")) as fd:
        os.ftruncate(fd.fileno(), SIZE)
        yield fd


@pytest.fixture
def disk(file: Fd) -> Disk:
    return Disk(file, num_queues=3)


def do(
    disk: Disk, kind: int, sector: int, out: bytes = b"", room: int = 0
) -> tuple[int, bytes, int]:
    """Do a request cut the usual way: its status, its data, the length it reports."""
    header = memoryview(bytearray(HEADER.pack(kind, 0, sector)))
    data, status = memory(room), memory(1)
    status[0] = 0xFF
    written = disk.serve(
        [header, memoryview(bytearray(out))] if out else [header],
        [data, status] if room else [status],
    )
    return status[0], bytes(data), written


def test_config_space_is_the_specifications(disk: Disk) -> None:
    config = disk.config()
    assert struct.unpack_from("<Q", config, 0) == (SECTORS,)
    assert struct.unpack_from("<I", config, 12) == (SEG_MAX,)
    assert struct.unpack_from("<I", config, 20) == (512,)
    assert struct.unpack_from("<H", config, 34) == (3,)
    assert struct.unpack_from("<II", config, 48) == (MAX_ZEROES, 1)
    assert len(config) == 60


def test_written_data_can_be_read(disk: Disk, file: Fd) -> None:
    data = os.urandom(1024)
    assert do(disk, BlkType.OUT, 7, out=data) == (BlkStatus.OK, b"", 1)
    assert os.pread(file.fileno(), 1024, 7 * 512) == data
    assert do(disk, BlkType.IN, 7, room=1024) == (BlkStatus.OK, data, 1025)
    assert do(disk, BlkType.FLUSH, 0) == (BlkStatus.OK, b"", 1)


offsets = st.lists(st.integers(0, 2100), max_size=8)


@given(cuts_out=offsets, cuts_in=offsets, sector=st.integers(0, SECTORS - 4))
def test_how_a_request_is_cut_means_nothing(
    cuts_out: list[int], cuts_in: list[int], sector: int
) -> None:
    with Fd(os.memfd_create("disk")) as file:
        os.ftruncate(file.fileno(), SIZE)
        disk = Disk(file)
        data = os.urandom(2048)
        out = HEADER.pack(BlkType.OUT, 0, sector) + data
        result = memory(1)
        assert disk.serve(cut(memoryview(bytearray(out)), cuts_out), [result]) == 1
        assert result[0] == BlkStatus.OK
        assert os.pread(file.fileno(), SIZE, sector * 512)[:2048] == data

        header = memoryview(bytearray(HEADER.pack(BlkType.IN, 0, sector)))
        room = memory(2049)
        room[2048] = 0xFF
        assert disk.serve(cut(header, cuts_out), cut(room, cuts_in)) == 2049
        assert bytes(room) == data + bytes([BlkStatus.OK])


def test_more_pieces_than_the_kernel_takes_at_once(disk: Disk) -> None:
    count = os.sysconf("SC_IOV_MAX") + 500
    data = os.urandom(count // 512 * 512)
    out = HEADER.pack(BlkType.OUT, 0, 0) + data
    pieces = cut(memoryview(bytearray(out)), range(1, len(out)))
    status = memory(1)
    disk.serve(pieces, [status])
    assert status[0] == BlkStatus.OK
    assert do(disk, BlkType.IN, 0, room=len(data))[1] == data


@pytest.mark.parametrize(
    ("kind", "sector", "size"),
    [
        (BlkType.IN, SECTORS, 512),
        (BlkType.IN, SECTORS - 1, 1024),
        (BlkType.IN, 2**64 - 1, 512),
        (BlkType.IN, 0, 511),
        (BlkType.OUT, SECTORS, 512),
        (BlkType.OUT, 0, 513),
    ],
)
def test_what_is_not_whole_sectors_of_the_disk_fails(
    disk: Disk, file: Fd, kind: int, sector: int, size: int
) -> None:
    if kind == BlkType.IN:
        assert do(disk, kind, sector, room=size)[0] == BlkStatus.IOERR
    else:
        assert do(disk, kind, sector, out=b"x" * size) == (BlkStatus.IOERR, b"", 1)
        assert os.pread(file.fileno(), SIZE, 0) == bytes(SIZE)
    assert os.fstat(file.fileno()).st_size == SIZE


def test_file_that_has_shrunk_fails(disk: Disk, file: Fd) -> None:
    os.ftruncate(file.fileno(), 512)
    assert do(disk, BlkType.IN, 0, room=1024)[0] == BlkStatus.IOERR


def test_read_only_disk_is_not_written(file: Fd) -> None:
    disk = Disk(file, read_only=True)
    assert disk.features & BlkFeature.RO
    assert do(disk, BlkType.OUT, 0, out=bytes([1]) * 512)[0] == BlkStatus.IOERR
    zeroes = RANGE.pack(0, 1, 0)
    assert do(disk, BlkType.WRITE_ZEROES, 0, out=zeroes)[0] == BlkStatus.IOERR
    assert not disk.features & BlkFeature.WRITE_ZEROES
    assert os.pread(file.fileno(), 512, 0) == bytes(512)
    assert do(disk, BlkType.IN, 0, room=512)[0] == BlkStatus.OK


@pytest.mark.parametrize("room", [4, 20, 64])
def test_get_id_fills_what_there_is(disk: Disk, room: int) -> None:
    status, data, written = do(disk, BlkType.GET_ID, 0, room=room)
    assert status == BlkStatus.OK
    assert data == b"vhost-airlock".ljust(64, b"\0")[:room]
    assert written == min(room, 20) + 1


def test_zeroes_are_written(disk: Disk, file: Fd) -> None:
    os.pwrite(file.fileno(), b"x" * SIZE, 0)
    zeroes = RANGE.pack(3, 5, 1)
    assert do(disk, BlkType.WRITE_ZEROES, 0, out=zeroes) == (BlkStatus.OK, b"", 1)
    expected = b"x" * 3 * 512 + bytes(5 * 512) + b"x" * (SIZE - 8 * 512)
    assert os.pread(file.fileno(), SIZE, 0) == expected


@pytest.mark.parametrize(
    ("ranges", "status"),
    [
        (RANGE.pack(SECTORS - 1, 2, 0), BlkStatus.IOERR),
        (RANGE.pack(0, MAX_ZEROES + 1, 0), BlkStatus.IOERR),
        (RANGE.pack(0, 1, 2), BlkStatus.UNSUPP),
        (2 * RANGE.pack(0, 1, 0), BlkStatus.IOERR),
        (RANGE.pack(0, 1, 0)[:8], BlkStatus.IOERR),
    ],
)
def test_impossible_zeroes_are_not(
    disk: Disk, file: Fd, ranges: bytes, status: int
) -> None:
    os.pwrite(file.fileno(), b"x" * SIZE, 0)
    assert do(disk, BlkType.WRITE_ZEROES, 0, out=ranges) == (status, b"", 1)
    assert os.pread(file.fileno(), SIZE, 0) == b"x" * SIZE


def test_unknown_request_is_unsupported(disk: Disk) -> None:
    assert do(disk, 99, 0, room=8) == (BlkStatus.UNSUPP, bytes(8), 1)


@pytest.mark.parametrize(("readable", "writable"), [(15, 1), (0, 1), (16, 0)])
def test_no_request_at_all_is_a_fault(disk: Disk, readable: int, writable: int) -> None:
    with pytest.raises(RingFault, match="no block request"):
        disk.serve([memory(readable)], [memory(writable)])


@given(cuts=offsets, size=st.integers(0, 2500))
def test_split_cuts_in_two(cuts: list[int], size: int) -> None:
    data = memoryview(os.urandom(2048))
    first, rest = split(cut(data, cuts), size)
    assert b"".join(first) == data[:size]
    assert b"".join(rest) == data[size:]
