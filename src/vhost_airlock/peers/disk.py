# SPDX-License-Identifier: Apache-2.0
"""The requests of a virtio block device, done on a file (virtio 1.x, section 5.2).

This module knows no rings and no sockets: a request is the pieces of memory that the
device may read, and those that it may write. The sizes of pieces carry no meaning.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum, IntFlag
from typing import Self

from ..vhost.fds import Fd
from .ring import RingFault

SECTOR = 512
SEG_MAX = 254
HEADER = struct.Struct("<IIQ")
ID_SIZE = 20
RANGE = struct.Struct("<QII")
"""The data of WRITE_ZEROES: the first sector, the number of sectors, flags."""
MAX_ZEROES = 1 << 16
"""Sectors in one range. A request has one range."""
_UNMAP = 1
_CONFIG = struct.Struct("<Q4xI4xI10xH12xIIB3x")
_IOV_MAX = os.sysconf("SC_IOV_MAX")


class BlkFeature(IntFlag):
    """The feature bits of a block device."""

    SEG_MAX = 1 << 2
    RO = 1 << 5
    BLK_SIZE = 1 << 6
    FLUSH = 1 << 9
    MQ = 1 << 12
    WRITE_ZEROES = 1 << 14


class BlkType(IntEnum):
    """The types of a request."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    WRITE_ZEROES = 13


class BlkStatus(IntEnum):
    """The status with which a request ends."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


class Disk:
    """A file as a block device."""

    def __init__(
        self,
        file: Fd,
        *,
        read_only: bool = False,
        num_queues: int = 1,
        serial: str = "vhost-airlock",
    ) -> None:
        self._file = file
        self._serial = serial.encode()[:ID_SIZE].ljust(ID_SIZE, b"\0")
        self.num_queues = num_queues
        self.read_only = read_only
        self.capacity = os.lseek(file.fileno(), 0, os.SEEK_END) // SECTOR

    @classmethod
    def open(cls, path: str, *, read_only: bool = False, num_queues: int = 1) -> Self:
        flags = os.O_RDONLY if read_only else os.O_RDWR
        file = Fd(os.open(path, flags | os.O_CLOEXEC))
        return cls(file, read_only=read_only, num_queues=num_queues)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def features(self) -> int:
        offered = BlkFeature.SEG_MAX | BlkFeature.BLK_SIZE | BlkFeature.MQ
        if self.read_only:
            return offered | BlkFeature.RO
        return offered | BlkFeature.FLUSH | BlkFeature.WRITE_ZEROES

    def config(self) -> bytes:
        """The configuration space. Fields that are not set here are 0."""
        return _CONFIG.pack(
            self.capacity, SEG_MAX, SECTOR, self.num_queues, MAX_ZEROES, 1, 0
        )

    def serve(
        self, readable: Sequence[memoryview], writable: Sequence[memoryview]
    ) -> int:
        """Do a request; return the number of bytes written to its memory."""
        header, data_out = split(readable, HEADER.size)
        room = sum(map(len, writable))
        if sum(map(len, header)) < HEADER.size or not room:
            raise RingFault(
                f"no block request has {sum(map(len, readable))} bytes in, {room} out"
            )
        kind, _, sector = HEADER.unpack(b"".join(header))
        data_in, status = split(writable, room - 1)
        try:
            written = self._perform(kind, sector, data_out, data_in)
            status[0][0] = BlkStatus.OK
        except OSError:
            written = 0
            status[0][0] = BlkStatus.IOERR
        except NotImplementedError:
            written = 0
            status[0][0] = BlkStatus.UNSUPP
        return written + 1

    def _perform(
        self,
        kind: int,
        sector: int,
        data_out: Sequence[memoryview],
        data_in: Sequence[memoryview],
    ) -> int:
        """Do a request, but for its status; return the bytes written to its memory."""
        match kind:
            case BlkType.IN:
                return self._transfer(os.preadv, sector, data_in)
            case BlkType.OUT | BlkType.WRITE_ZEROES if self.read_only:
                raise OSError(errno.EROFS, "the disk is read-only")
            case BlkType.OUT:
                self._transfer(os.pwritev, sector, data_out)
                return 0
            case BlkType.WRITE_ZEROES:
                self._write_zeroes(b"".join(data_out))
                return 0
            case BlkType.FLUSH:
                os.fdatasync(self._file.fileno())
                return 0
            case BlkType.GET_ID:
                return _fill(data_in, self._serial)
        raise NotImplementedError

    def _transfer(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        sector: int,
        data: Sequence[memoryview],
    ) -> int:
        """Read or write all of the data, in as many calls as the kernel needs."""
        size = sum(map(len, data))
        if size % SECTOR or sector + size // SECTOR > self.capacity:
            raise OSError(errno.EINVAL, "not whole sectors of the disk")
        offset = sector * SECTOR
        while data:
            done = call(self._file.fileno(), data[:_IOV_MAX], offset)
            if not done:
                raise OSError(errno.EIO, "the file is shorter than it was")
            offset += done
            data = split(data, done)[1]
        return size

    def _write_zeroes(self, ranges: bytes) -> None:
        if len(ranges) != RANGE.size:
            raise OSError(errno.EINVAL, "not one range")
        sector, count, flags = RANGE.unpack(ranges)
        if flags & ~_UNMAP:
            raise NotImplementedError
        if count > MAX_ZEROES:
            raise OSError(errno.EINVAL, "too large a range")
        self._transfer(os.pwritev, sector, [memoryview(bytes(count * SECTOR))])


def split(
    pieces: Sequence[memoryview], size: int
) -> tuple[list[memoryview], list[memoryview]]:
    """Cut pieces of memory in two: return (pieces of the first `size` bytes, rest)."""
    first = []
    for i, piece in enumerate(pieces):
        if size < len(piece):
            if size:
                first.append(piece[:size])
            return first, [piece[size:], *pieces[i + 1 :]]
        first.append(piece)
        size -= len(piece)
    return first, []


def _fill(pieces: Sequence[memoryview], data: bytes) -> int:
    """Copy data into pieces of memory, up to the end of either."""
    done = 0
    for piece in pieces:
        part = data[done : done + len(piece)]
        piece[: len(part)] = part
        done += len(part)
    return done
