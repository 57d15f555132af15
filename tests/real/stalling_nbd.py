# SPDX-License-Identifier: Apache-2.0
"""A network disk (NBD) that stalls when the test says so, for qemu-storage-daemon.

Requests that come during a stall are kept in the order of their arrival, undone and
unanswered, until the test lets them go, in any order.
"""

import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO

from tests.real.storage import Disk

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
"""Flags of the handshake, the same for both sides."""
HAS_FLAGS, SEND_FLUSH = 1, 4
"""Flags of the export."""
REPLY_ACK, REPLY_INFO, REPLY_UNSUPPORTED = 1, 3, (1 << 31) + 1
INFO_EXPORT = 0

GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", FIXED_NEWSTYLE | NO_ZEROES)
OPTION = struct.Struct(">8sII")
"""IHAVEOPT, option, length of its data."""
OPTION_REPLY = struct.Struct(">QIII")
"""Magic, option, kind of the reply, length of its data."""
OPTION_REPLY_MAGIC = 0x3E889045565A9
EXPORT = struct.Struct(">HQH")
"""INFO_EXPORT, size, flags."""
REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, command, cookie, offset, length."""
REPLY = struct.Struct(">IIQ")
"""Magic, error, cookie."""
REPLY_MAGIC = 0x67446698


class Option(IntEnum):
    """The options of a client in the handshake; all others are unsupported."""

    ABORT = 2
    GO = 7


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3


@dataclass(frozen=True)
class Request:
    command: Command
    cookie: int
    offset: int
    length: int
    data: bytes


class StallingNbd:
    """A disk that holds `content`. Serves one client after the other."""

    def __init__(self, path: Path, content: bytearray) -> None:
        self.path = path
        self.content = content
        self.done = 0
        """How many requests were done and answered since the last stall began."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._client: socket.socket | None = None
        self._stalled = False
        self._kept: list[Request] = []
        self._changed = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._serve, name="nbd")
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    # Methods for the test.

    def stall(self) -> None:
        """Keep all requests from now on."""
        with self._changed:
            self._stalled = True
            self.done = 0

    def wait_for_kept(self, count: int) -> None:
        """Wait until at least this many requests are kept."""
        with self._changed:
            there = self._changed.wait_for(lambda: len(self._kept) >= count, 30)
            assert there, f"{len(self._kept)} requests are kept, not {count}"

    def wait_for_done(self, count: int) -> None:
        """Wait until this many requests are done since the stall began."""
        with self._changed:
            there = self._changed.wait_for(lambda: self.done >= count, 30)
            assert there, f"{self.done} requests are done, not {count}"

    def let_go(self, places: Sequence[int]) -> None:
        """Do some of the requests that are kept, in this order of their places."""
        with self._changed:
            chosen = [self._kept[place] for place in places]
            self._kept = [request for request in self._kept if request not in chosen]
            for request in chosen:
                self._do(request)

    def go_on(self) -> None:
        """End the stall. Of the requests that are kept the last one is done first."""
        with self._changed:
            self._stalled = False
            self.let_go(range(len(self._kept))[::-1])

    def go_on_without_client(self) -> None:
        """End the stall when the client is gone, whose requests are forgotten."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._kept, 30)
            self._stalled = False

    # Replies to the client.

    def _serve(self) -> None:
        while True:
            try:
                self._client, _ = self._listener.accept()
            except OSError:  # it is shut down
                return
            with self._client as client, client.makefile("rb") as incoming:
                client.sendall(GREETING)
                if self._agree(client, incoming):
                    self._hear(incoming)
            with self._changed:
                self._kept.clear()
                self._changed.notify_all()

    def _agree(self, client: socket.socket, incoming: BinaryIO) -> bool:
        """Answer the client's options; return whether it goes on to requests."""

        def reply(kind: int, data: bytes = b"") -> None:
            head = OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data))
            client.sendall(head + data)

        incoming.read(4)  # the client's flags
        while head := incoming.read(OPTION.size):
            _, option, length = OPTION.unpack(head)
            incoming.read(length)
            if option == Option.GO:
                size, flags = len(self.content), HAS_FLAGS | SEND_FLUSH
                reply(REPLY_INFO, EXPORT.pack(INFO_EXPORT, size, flags))
                reply(REPLY_ACK)
                return True
            if option == Option.ABORT:
                reply(REPLY_ACK)
                return False
            reply(REPLY_UNSUPPORTED)
        return False

    def _hear(self, incoming: BinaryIO) -> None:
        """Take requests until the client disconnects."""
        while head := incoming.read(REQUEST.size):
            _, _, number, cookie, offset, length = REQUEST.unpack(head)
            command = Command(number)
            if command == Command.DISCONNECT:
                return
            data = incoming.read(length) if command == Command.WRITE else b""
            request = Request(command, cookie, offset, length, data)
            with self._changed:
                if self._stalled:
                    self._kept.append(request)
                    self._changed.notify_all()
                else:
                    self._do(request)

    def _do(self, request: Request) -> None:
        place = slice(request.offset, request.offset + request.length)
        data = b""
        if request.command == Command.WRITE:
            self.content[place] = request.data
        elif request.command == Command.READ:
            data = bytes(self.content[place])
        assert self._client is not None
        self._client.sendall(REPLY.pack(REPLY_MAGIC, 0, request.cookie) + data)
        self.done += 1
        self._changed.notify_all()


@contextmanager
def stalling_nbd(path: Path, content: bytearray) -> Iterator[StallingNbd]:
    """A disk that listens at `path`."""
    server = StallingNbd(path, content)
    try:
        yield server
    finally:
        server.close()


@dataclass(frozen=True)
class NbdDisk(Disk):
    """The network disk at `server`, for qemu-storage-daemon to export."""

    server: Path = Path()

    def blockdev(self) -> str:
        return f"driver=nbd,node-name=disk,server.type=unix,server.path={self.server}"
