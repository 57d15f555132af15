# SPDX-License-Identifier: Apache-2.0
"""Guests for the traces: their memory, their rings, and requests with known answers.

A guest knows nothing of vhost-user. The player reads from it what messages say, and
lets it work between the phases of a trace.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol, Self

from tests.support.backs import PATIENCE
from tests.support.client import REQUIRED, Queue
from tests.support.fuse import INIT, REPLY, REQUEST, REQUESTS, Op
from vhost_airlock.peers.disk import HEADER, SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.driver import DriverRing
from vhost_airlock.peers.ram import MIB, GuestRam
from vhost_airlock.vhost.fds import eventfd
from vhost_airlock.vhost.wire import Feature, MemoryRegion

WANTED = REQUIRED | Feature.INDIRECT_DESC | Feature.EVENT_IDX
LOW, HIGH, PLUGGED = 8 * MIB, 24 * MIB, 64 * MIB
"""Sizes of the memory: little, for testpmd touches all of it. Plugged memory has the
most room, so that it is used from then on."""
PLUGGED_AT = 64 << 30


class Ring(Queue):
    """A ring, with what a VMM says of it."""

    def __init__(self, ram: GuestRam, index: int) -> None:
        super().__init__(ram, index)
        self.patience = PATIENCE
        self.err = eventfd()
        self.masked = eventfd()
        """Where interrupts go that the guest doesn't want to have now."""

    def use(self, features: int) -> None:
        """Use the ring as was negotiated."""
        self.indirect = bool(features & Feature.INDIRECT_DESC)
        self._driver.event_idx = bool(features & Feature.EVENT_IDX)

    def reset(self) -> None:
        """Begin anew, as a driver does after it has reset the device."""
        for views in self._writable.values():
            for view in views:
                view.release()
        self._writable.clear()
        self._done.clear()
        event_idx = self._driver.event_idx
        self._driver = DriverRing(self._ring, tables=self._tables, event_idx=event_idx)
        self.base = 0

    @property
    def avail(self) -> int:
        """The index of the available ring in the guest's memory."""
        return self._ring.avail_idx

    @property
    def used(self) -> int:
        """The index of the used ring in the guest's memory."""
        return self._ring.used_idx

    def close(self) -> None:
        super().close()
        self.err.close()
        self.masked.close()


class Pending(Protocol):
    """A request that is on its way."""

    def __call__(self) -> None:
        """Wait for its end, and check it."""


class Guest:
    """The common parts of all kinds of guests."""

    kind: str
    device_bits = 0
    """Features of the device type that its driver wants."""
    config_size = 0
    """Bytes of the configuration space; 0: the back-end doesn't serve it."""
    used = 2
    """Rings that the guest uses."""
    all = 2
    """Rings that the device has."""

    def __init__(self) -> None:
        self.ram = GuestRam(LOW, HIGH)
        self.rings = [Ring(self.ram, index) for index in range(self.all)]
        self.made = 0
        """Requests so far: no two of them say the same."""

    @property
    def wanted(self) -> int:
        return int(WANTED) | self.device_bits

    def reset(self) -> None:
        """The driver has reset the device, and sets it up again."""
        for ring in self.rings:
            ring.reset()
        self.lost()

    def lost(self) -> None:
        """The back-end is another one."""

    def begin(self) -> Pending:
        """Make a request."""
        raise NotImplementedError

    def work(self) -> None:
        """Make several requests, one after the other."""
        for _ in range(4):
            self.begin()()

    def rest(self) -> None:
        """Leave nothing with the device."""

    def plug(self) -> MemoryRegion:
        """Get more memory, where all new buffers are from now on."""
        return self.ram.plug(PLUGGED_AT, PLUGGED)

    def unplug(self, region: MemoryRegion) -> None:
        """Give it back, when the device has no buffer there any more."""
        self.rest()
        self.ram.unplug(region)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for ring in self.rings:
            ring.close()
        self.ram.close()


class BlkGuest(Guest):
    """A disk: each request writes a sector, and reads it back."""

    kind = "blk"
    config_size = 60
    all = 4

    def begin(self) -> Pending:
        self.made += 1
        number = self.made
        ring = self.rings[number % self.used]
        data = number.to_bytes(4, "little") * (SECTOR // 4)
        sector = number % 64
        written = ring.offer([HEADER.pack(BlkType.OUT, 0, sector), data], [1])

        def end() -> None:
            assert ring.wait(written)[1] == [bytes([BlkStatus.OK])]
            header = HEADER.pack(BlkType.IN, 0, sector)
            _, (found, status) = ring.wait(ring.offer([header], [SECTOR, 1]))
            assert status == bytes([BlkStatus.OK])
            assert found == data

        return end


class FsGuest(Guest):
    """A file system: each request asks for the attributes of a file.

    The first of them after a reset, or to a new back-end, mounts it.
    """

    kind = "fs"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        """That of the file which the host has put there: `file`."""
        self.mounted = False

    def lost(self) -> None:
        self.mounted = False

    def begin(self) -> Pending:
        ring = self.rings[REQUESTS]
        if self.mounted:
            head = self._offer(ring, Op.LOOKUP, 1, b"file\0")
        else:
            head = self._offer(ring, Op.INIT, 0, INIT.pack(7, 38, 1 << 17, 0, 0))

        def end() -> None:
            used, (reply, body) = ring.wait(head)
            length, error, _ = REPLY.unpack(reply)
            assert (length, error) == (used, 0)
            if self.mounted:
                # struct fuse_entry_out: 40 bytes, then the attributes: ino, size.
                assert int.from_bytes(body[48:56], "little") == self.size
            self.mounted = True

        return end

    def _offer(self, ring: Ring, op: Op, node: int, argument: bytes) -> int:
        self.made += 1
        length = REQUEST.size + len(argument)
        header = REQUEST.pack(length, op, self.made, node, 0, 0, 1, 0, 0)
        return ring.offer([header, argument], [REPLY.size, 256])


class NetGuest(Guest):
    """A network whose other end sends back each frame that it gets.

    As with real drivers, the device has buffers all the time for frames to come.
    """

    kind = "net"
    device_bits = 1 << 15  # VIRTIO_NET_F_MRG_RXBUF: DPDK's header has 12 bytes anyway
    header = bytes(12)
    stock = 8

    def __init__(self) -> None:
        super().__init__()
        self.receive, self.transmit = self.rings
        self.posted: deque[int] = deque()
        """Buffers that the device has, in the order in which it will use them."""

    def reset(self) -> None:
        super().reset()
        self.posted.clear()

    def begin(self) -> Pending:
        while len(self.posted) < self.stock:
            self.posted.append(self.receive.offer([], [len(self.header), 2048]))
        return self.send()

    def rest(self) -> None:
        while self.posted:
            self.send()()

    def send(self) -> Pending:
        self.made += 1
        frame = b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + bytes([self.made]) * 100
        out = self.transmit.offer([self.header, frame], [])

        def end() -> None:
            assert self.transmit.wait(out) == (0, [])
            used, (_, found) = self.receive.wait(self.posted.popleft())
            assert found[: used - len(self.header)] == frame

        return end
