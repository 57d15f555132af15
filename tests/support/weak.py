# SPDX-License-Identifier: Apache-2.0
"""Block back-ends with deliberate flaws, as programs: python weak.py FLAW PATH

They show that an attack is real, and that the judges can say so.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from vhost_airlock.errors import Disconnected
from vhost_airlock.peers.device import DeviceRing
from vhost_airlock.peers.disk import SECTOR, Disk
from vhost_airlock.peers.ring import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Buffer,
    RingFault,
)
from vhost_airlock.peers.server import DeviceServer
from vhost_airlock.process.sockets import Listener
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd


class ExitingServer(DeviceServer):
    """Ends the process where a ring should break."""

    def _give_up(self, index: int, reason: str) -> NoReturn:
        os._exit(3)


class FreezingServer(DeviceServer):
    """Does nothing more, ever, where a ring should break."""

    def _give_up(self, index: int, reason: str) -> NoReturn:
        while True:
            time.sleep(60)


class HangingUpServer(DeviceServer):
    """Ends the connection where a ring should break."""

    def _give_up(self, index: int, reason: str) -> NoReturn:
        raise Disconnected(reason)


class BrokenForGoodServer(DeviceServer):
    """Never starts a ring again that was broken once."""

    def _give_up(self, index: int, reason: str) -> None:
        super()._give_up(index, reason)
        self._vrings[index].start = lambda memory, event_idx: False  # type: ignore[method-assign]


class DoubleFetchRing(DeviceRing):
    """Checks a next in guest memory, and then reads it once more to follow it."""

    def _walk(
        self,
        table: memoryview,
        count: int,
        index: int,
        buffers: list[Buffer],
        in_table: bool,
    ) -> None:
        for _ in range(count):
            addr, length, flags, _ = DESC.unpack_from(table, DESC.size * index)
            if flags & DESC_F_INDIRECT:
                inner = self._translate(addr, length)
                self._walk(inner, length // DESC.size, 0, buffers, True)
                return
            buffers.append(Buffer(addr, length, bool(flags & DESC_F_WRITE)))
            if not flags & DESC_F_NEXT:
                return
            if DESC.unpack_from(table, DESC.size * index)[3] >= count:
                return
            time.sleep(0.0002)  # whatever it does in between
            index = DESC.unpack_from(table, DESC.size * index)[3]
            if index >= count:
                os.abort()  # a program in C reads what is behind the table
        raise RingFault("a loop")


class DoubleFetchServer(DeviceServer):
    def _start(self, index: int) -> None:
        super()._start(index)
        ring = self._vrings[index].ring
        if ring is not None:
            ring.__class__ = DoubleFetchRing


FLAWS: dict[str, Callable[[Channel, Disk], DeviceServer]] = {
    "none": DeviceServer,
    "exits": ExitingServer,
    "freezes": FreezingServer,
    "hangs-up": HangingUpServer,
    "breaks-for-good": BrokenForGoodServer,
    "double-fetch": DoubleFetchServer,
}


def main(flaw: str, path: str) -> None:
    file = Fd(os.memfd_create("disk", os.MFD_CLOEXEC))
    os.ftruncate(file.fileno(), 2048 * SECTOR)
    listener = Listener(path)
    with Disk(file, num_queues=2) as disk:
        while True:
            with Channel(listener.accept(), peer="front") as channel:
                server = FLAWS[flaw](channel, disk)
                with contextlib.suppress(Disconnected):
                    server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
