# SPDX-License-Identifier: Apache-2.0
"""FUSE requests as a guest's kernel makes them, for file system devices."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import IntEnum

from tests.support.client import Client

REQUEST = struct.Struct("<IIQQIIIHH")
REPLY = struct.Struct("<IiQ")
INIT = struct.Struct("<IIIII44x")
READ_WRITE = struct.Struct("<QQIIQI4x")
ROOT = 1
HIGH_PRIORITY, REQUESTS = 0, 1
QUEUES = 2
ROOM = 1 << 16


class Op(IntEnum):
    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    MKDIR = 9
    UNLINK = 10
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    CREATE = 35
    DESTROY = 38


class Fuse:
    """One mount of a file system device."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._unique = 0

    def ask(
        self, op: Op, node: int, *arguments: bytes, room: int = 256
    ) -> bytes | OSError:
        """Make a request: what comes back, or the error."""
        request = self._header(op, node, arguments)
        (used, (head, body)) = self.client.request(
            REQUESTS, [request, *arguments], [REPLY.size, room]
        )
        length, error, unique = REPLY.unpack(head)
        assert (length, unique) == (used, self._unique)
        if error:
            return OSError(-error, os.strerror(-error))
        return body[: length - REPLY.size]

    def get(self, op: Op, node: int, *arguments: bytes, room: int = 256) -> bytes:
        """Make a request that must succeed."""
        reply = self.ask(op, node, *arguments, room=room)
        assert isinstance(reply, bytes), reply
        return reply

    def init(self) -> tuple[int, int]:
        """Mount it: the version of the protocol."""
        major, minor = struct.unpack_from(
            "<II", self.get(Op.INIT, 0, INIT.pack(7, 38, 1 << 17, 0, 0))
        )
        return major, minor

    def lookup(self, name: str, folder: int = ROOT) -> int:
        """The node of this name."""
        return _number(self.get(Op.LOOKUP, folder, name.encode() + b"\0"))

    def create(self, name: str, folder: int = ROOT) -> tuple[int, int]:
        """A new file: its node and a handle."""
        how = struct.pack("<IIII", os.O_RDWR, 0o100644, 0, 0)
        reply = self.get(Op.CREATE, folder, how, name.encode() + b"\0")
        return _number(reply), _number(reply[-16:])

    def open(self, node: int, op: Op = Op.OPEN) -> int:
        return _number(self.get(op, node, struct.pack("<II", os.O_RDONLY, 0)))

    def write(self, node: int, handle: int, offset: int, data: bytes) -> None:
        how = READ_WRITE.pack(handle, offset, len(data), 0, 0, 0)
        assert _number(self.get(Op.WRITE, node, how, data), "<I") == len(data)

    def read(
        self, node: int, handle: int, offset: int, size: int, op: Op = Op.READ
    ) -> bytes:
        how = READ_WRITE.pack(handle, offset, size, 0, 0, 0)
        return self.get(op, node, how, room=size)

    def release(self, node: int, handle: int) -> None:
        self.get(Op.RELEASE, node, struct.pack("<QIIQ", handle, 0, 0, 0))

    def forget(self, node: int) -> None:
        """It has no reply."""
        count = struct.pack("<Q", 1)
        header = self._header(Op.FORGET, node, [count])
        assert self.client.request(HIGH_PRIORITY, [header, count]) == (0, [])

    def _header(self, op: Op, node: int, arguments: Sequence[bytes]) -> bytes:
        self._unique += 2
        length = REQUEST.size + sum(map(len, arguments))
        return REQUEST.pack(length, op, self._unique, node, 0, 0, 1, 0, 0)


def _number(data: bytes, layout: str = "<Q") -> int:
    (value,) = struct.unpack_from(layout, data)
    return int(value)
