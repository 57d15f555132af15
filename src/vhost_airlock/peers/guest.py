# SPDX-License-Identifier: Apache-2.0
"""A guest that drives a block device: its memory, its VMM, and its driver, in one.

    with BlkGuest(num_queues=2) as guest:
        guest.connect("/tmp/blk.sock")
        guest.start()
        buffer = guest.ram.alloc(4096)
        guest.ram.view(buffer, 5)[:] = b"hello"
        guest.write(0, [(buffer, 4096)])
        guest.stop()

`queues` can do many requests at a time: submit() some, kick(), and reap() those that
are done, with wait() when none is.
"""

from __future__ import annotations

import select
import struct
import time
from collections.abc import Collection, Sequence
from typing import Self

from ..errors import DeadlineExceeded, SessionError
from ..vhost.channel import TIMEOUT as MESSAGE_TIMEOUT
from ..vhost.channel import Channel
from ..vhost.fds import Fd, notify
from ..vhost.frontend import Frontend
from ..vhost.wire import Feature, Inflight, MemoryRegion, ProtocolFeature
from .disk import ID_SIZE, SEG_MAX, BlkFeature, BlkType
from .events import clear
from .guest_queue import GuestQueue, Io, Segment
from .ram import GuestRam
from .ring import RingFault, RingFull

TIMEOUT = 30.0
WANTED = (
    Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)
WANTED_BLK = BlkFeature.SEG_MAX | BlkFeature.RO | BlkFeature.FLUSH | BlkFeature.MQ
WANTED_PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class BlkGuest:
    """The guest. `without` are features that it would use otherwise, `also` others.

    `timeout` is the seconds that the back-end has to answer a message.
    """

    def __init__(
        self,
        *,
        ram: GuestRam | None = None,
        num_queues: int = 1,
        queue_size: int = 128,
        seg_max: int = SEG_MAX,
        without: Collection[Feature | ProtocolFeature] = (),
        also: Collection[ProtocolFeature] = (),
        timeout: float = MESSAGE_TIMEOUT,
    ) -> None:
        self.ram = ram or GuestRam()
        self.timeout = timeout
        self.queues = [
            GuestQueue(self.ram, i, queue_size, seg_max) for i in range(num_queues)
        ]
        self.features = 0
        self.capacity = 0
        self._wanted = int(WANTED) | int(WANTED_BLK)
        self._wanted_protocol = int(WANTED_PROTOCOL) | sum(also)
        for feature in without:
            if isinstance(feature, ProtocolFeature):
                self._wanted_protocol &= ~int(feature)
            else:
                self._wanted &= ~int(feature)
        self._front: Frontend | None = None
        self._memory_is_shared = False
        self._record: tuple[Inflight, Fd] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, the memory and all descriptors."""
        self.disconnect()
        self.forget_record()
        for queue in self.queues:
            queue.close()
        self.ram.close()

    # The VMM's part.

    @property
    def front(self) -> Frontend:
        """The connection, for other messages on it."""
        if self._front is None:
            raise SessionError("the guest is not connected")
        return self._front

    def connect(self, path_or_channel: str | Channel) -> None:
        """Connect to a back-end and agree on features."""
        channel = (
            Channel.connect(path_or_channel, peer="back-end")
            if isinstance(path_or_channel, str)
            else path_or_channel
        )
        front = self._front = Frontend(channel, timeout=self.timeout)
        self._memory_is_shared = False
        offered = front.get_features()
        self.features = offered & self._wanted
        if not self.features & Feature.VERSION_1:
            raise SessionError("the back-end has no VERSION_1")
        if self.features & Feature.PROTOCOL_FEATURES:
            front.negotiate(self._wanted_protocol)
        front.set_owner()
        if self._has(ProtocolFeature.MQ) and front.get_queue_num() < len(self.queues):
            raise SessionError(f"the back-end hasn't got {len(self.queues)} queues")
        if self._has(ProtocolFeature.CONFIG):
            (self.capacity,) = struct.unpack("<Q", front.get_config(0, 8))

    def disconnect(self) -> None:
        """Close the connection without a message, as a VMM that ends does."""
        if self._front:
            self._front.close()
            self._front = None

    def _has(self, feature: ProtocolFeature) -> bool:
        return feature in self.front.protocol_features

    def start(self) -> None:
        """Start all rings from where they are."""
        front = self.front
        front.set_features(self.features)
        if not self._memory_is_shared:
            self._share_memory()
        if self._has(ProtocolFeature.INFLIGHT_SHMFD):
            self._share_record()
        for queue in self.queues:
            queue.set_features(self.features)
            front.set_vring_num(queue.index, queue.size)
            front.set_vring_base(queue.index, queue.base)
            front.set_vring_addr(queue.vring_addr(self.ram))
            front.set_vring_err(queue.index, queue.err_fd)
            front.set_vring_call(queue.index, queue.call_fd)
            notify(queue.kick_fd)  # there may be requests from before
            front.set_vring_kick(queue.index, queue.kick_fd)
        if self.features & Feature.PROTOCOL_FEATURES:
            for queue in self.queues:
                front.set_vring_enable(queue.index, True)
        front.barrier()

    def stop(self) -> None:
        """Stop all rings. Unfinished requests are done after the next start()."""
        if self.features & Feature.PROTOCOL_FEATURES:
            for queue in self.queues:
                self.front.set_vring_enable(queue.index, False)
        for queue in self.queues:
            queue.base = self.front.get_vring_base(queue.index)

    def reconnect(self, path_or_channel: str | Channel) -> None:
        """Go on with a new back-end, which gets the old one's unfinished requests."""
        self.disconnect()
        for queue in self.queues:
            queue.reap()
            if self._record is None:
                queue.base = queue.driver.reoffer()
            else:
                queue.base = queue.driver.next_used  # as QEMU; the record goes before
        self.connect(path_or_channel)
        self.start()

    def _share_memory(self) -> None:
        if self._has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.front.get_max_mem_slots()
            for region, fd in self.ram.shared():
                self.front.add_mem_region(region, fd)
        else:
            self.front.set_mem_table(self.ram.shared())
        self._memory_is_shared = True

    def _share_record(self) -> None:
        """Let the back-end record the requests in flight, where all before it have."""
        if self._record is None:
            size = max(queue.size for queue in self.queues)
            self._record = self.front.get_inflight_fd(len(self.queues), size)
        self.front.set_inflight_fd(*self._record)

    def forget_record(self) -> None:
        """Have a new record made at the next start, as after a reset of the device."""
        if self._record is not None:
            self._record[1].close()
            self._record = None

    def plug(self, guest_addr: int, size: int) -> MemoryRegion:
        """Give the guest more memory while it runs."""
        region = self.ram.plug(guest_addr, size)
        if self._has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.front.add_mem_region(*self.ram.shared()[-1])
        else:
            self._share_memory()
        self.front.barrier()
        return region

    def unplug(self, region: MemoryRegion) -> None:
        """Take memory away from the guest, which must not use it any more."""
        if self._has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            self.front.remove_mem_region(region)
            self.ram.unplug(region)
        else:
            self.ram.unplug(region)
            self._share_memory()
        self.front.barrier()

    # The driver's part.

    def wait(self, timeout: float = TIMEOUT) -> None:
        """Wait until a request is done in a queue that has requests pending.

        Raises `RingFault` when the back-end says that a ring is broken, and
        `Disconnected` when it's gone.
        """
        for queue in self.queues:
            clear(queue.call_fd)
        if any(queue.driver.arm() for queue in self.queues):
            return
        poll = select.poll()
        poll.register(self.front, select.POLLIN)
        for queue in self.queues:
            poll.register(queue.call_fd, select.POLLIN)
            poll.register(queue.err_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout * 1000)}
        for queue in self.queues:
            if queue.err_fd.fileno() in ready:
                raise RingFault(f"the back-end says that ring {queue.index} is broken")
        if self.front.fileno() in ready:
            self.front.unsolicited()
        if not ready:
            raise DeadlineExceeded(f"no request was done in {timeout} s")

    def finish(self, timeout: float = TIMEOUT) -> None:
        """Wait until all requests are done."""
        deadline = time.monotonic() + timeout
        for queue in self.queues:
            queue.kick()
        while any(queue.pending for queue in self.queues):
            self.wait(max(0.0, deadline - time.monotonic()))
            for queue in self.queues:
                queue.reap()

    def do(self, kind: int, sector: int = 0, segments: Sequence[Segment] = ()) -> Io:
        """Do one request on the first queue; it may end with an error status."""
        try:
            io = self.queues[0].submit(kind, sector, segments)
        except RingFull:
            self.finish()
            io = self.queues[0].submit(kind, sector, segments)
        self.finish()
        return io

    def read(self, sector: int, segments: Sequence[Segment]) -> None:
        self.do(BlkType.IN, sector, segments).check()

    def write(self, sector: int, segments: Sequence[Segment]) -> None:
        self.do(BlkType.OUT, sector, segments).check()

    def flush(self) -> None:
        self.do(BlkType.FLUSH).check()

    def serial(self) -> str:
        addr = self.ram.alloc(ID_SIZE, 64)
        self.do(BlkType.GET_ID, 0, [(addr, ID_SIZE)]).check()
        return bytes(self.ram.view(addr, ID_SIZE)).rstrip(b"\0").decode()
