# SPDX-License-Identifier: Apache-2.0
"""VMMs that say what real ones say, in the order in which they do.

Each class has the traces of one program, as observed or as its source has it. `Vmm` is
what they have in common: a guest with a block driver, and a VMM that says nothing by
itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vhost_airlock.peers.disk import SECTOR, BlkType
from vhost_airlock.peers.guest import WANTED, WANTED_BLK, BlkGuest
from vhost_airlock.peers.ram import MIB, GuestRam
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, eventfd, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import (
    U64,
    Empty,
    Feature,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
)

P = ProtocolFeature
NOTHING = Empty()


class Vmm(BlkGuest):
    """A guest, its driver, and nothing that would speak for it."""

    wanted_protocol = P.MQ | P.REPLY_ACK | P.CONFIG | P.CONFIGURE_MEM_SLOTS
    wanted_features = int(WANTED) | int(WANTED_BLK)
    acks = True
    """Does it ask for one with every message?"""

    def __init__(self, ram: GuestRam | None = None, *, num_queues: int = 2) -> None:
        super().__init__(ram=ram, num_queues=num_queues, queue_size=64, seg_max=14)
        self.spare: list[Fd] = []
        """Eventfds that belong to no queue."""
        self._made = 0

    def attach(self, channel: Channel) -> Frontend:
        """Take a connection, on which nothing was said yet."""
        self._front = Frontend(channel)
        return self._front

    def say(
        self, request: Request, payload: Payload = NOTHING, fds: Sequence[Fd] = ()
    ) -> None:
        """Send a message, with the acks that this VMM asks for."""
        self.front.exchange(request, payload, fds, need_reply=self.acks)

    def use(self, offered: int) -> int:
        """Choose features; the driver uses its rings by them."""
        self.features = offered & self.wanted_features
        for queue in self.queues:
            queue.set_features(self.features)
        return self.features

    def set_table(self) -> None:
        shared = self.ram.shared()
        table = MemoryTable(tuple(region for region, _ in shared))
        self.say(Request.SET_MEM_TABLE, table, [fd for _, fd in shared])

    def set_num(self, index: int) -> None:
        queue = self.queues[index]
        self.say(Request.SET_VRING_NUM, VringState(index, queue.size))

    def set_base(self, index: int) -> None:
        self.say(Request.SET_VRING_BASE, VringState(index, self.queues[index].base))

    def set_addr(self, index: int) -> None:
        self.say(Request.SET_VRING_ADDR, self.queues[index].vring_addr(self.ram))

    def set_call(self, index: int) -> None:
        self.say(Request.SET_VRING_CALL, VringFd(index), [self.queues[index].call_fd])

    def set_kick(self, index: int) -> None:
        """The eventfd has a count of 1 already, as with most VMMs."""
        notify(self.queues[index].kick_fd)
        self.say(Request.SET_VRING_KICK, VringFd(index), [self.queues[index].kick_fd])

    def enable(self, index: int, enable: bool) -> None:
        self.say(Request.SET_VRING_ENABLE, VringState(index, int(enable)))

    def get_base(self, index: int) -> None:
        self.queues[index].base = self.front.get_vring_base(index)

    def open(self, channel: Channel) -> None:
        """From connecting to a driver that can work."""
        raise NotImplementedError

    def stop(self) -> None:
        for queue in self.queues:
            self.enable(queue.index, False)
        for queue in self.queues:
            self.get_base(queue.index)

    def work(self) -> None:
        """Write and read back on every queue, each time something new."""
        for queue in self.queues:
            self._made += 1
            data = self._made.to_bytes(2, "big") * SECTOR
            size = len(data)
            out = self.ram.alloc(size, SECTOR)
            into = self.ram.alloc(size, SECTOR)
            self.ram.view(out, size)[:] = data
            sector = 2 * queue.index
            for kind, segments in (
                (BlkType.OUT, [(out, 100), (out + 100, size - 100)]),
                (BlkType.IN, [(into, size)]),
            ):
                io = queue.submit(kind, sector, segments)
                queue.kick()
                self.finish()
                io.check()
            assert self.ram.view(into, size) == data

    def close(self) -> None:
        super().close()
        for fd in self.spare:
            fd.close()


class Qemu(Vmm):
    """QEMU 11.1.3, vhost-user-blk-pci. It asks for acks only where it needs them."""

    acks = False
    device_queues = 4
    """It enables them all, also those which the guest does not use."""

    def open(self, channel: Channel) -> None:
        front = self.attach(channel)
        front.get_features()
        front.negotiate(self.wanted_protocol | P.RESET_DEVICE | P.STATUS)
        front.get_queue_num()
        front.get_max_mem_slots()
        self.say(Request.SET_OWNER)
        self.offered = front.get_features()
        for index in range(self.device_queues):
            # The call of an interrupt that is masked.
            self.spare.append(eventfd())
            front.set_vring_call(index, self.spare[-1])
            self.spare.append(eventfd())
            front.set_vring_err(index, self.spare[-1])
        front.get_config(0, 57)
        self.start()

    def start(self) -> None:
        front = self.front
        self.say(Request.SET_FEATURES, U64(self.use(self.offered)))
        for queue in self.queues:
            front.set_vring_call(queue.index, queue.call_fd)
        self.say(Request.SET_FEATURES, U64(self.features))
        if not self._memory_is_shared:
            self._share_memory()
        for queue in self.queues:
            self.set_num(queue.index)
            self.set_base(queue.index)
            self.set_addr(queue.index)
            notify(queue.kick_fd)
            front.set_vring_kick(queue.index, queue.kick_fd)
        for index in range(self.device_queues):
            front.set_vring_enable(index, True)

    def stop(self) -> None:
        for index in range(self.device_queues):
            self.front.set_vring_enable(index, False)
        for queue in self.queues:
            self.get_base(queue.index)

    def mask(self, masked: bool) -> None:
        """Interrupts of the first queue go to another eventfd meanwhile."""
        queue = self.queues[0]
        self.front.set_vring_call(0, self.spare[0] if masked else queue.call_fd)


class CloudHypervisor(Vmm):
    """All sizes first, base after address, and everything acked. A pause only disables.

    It sends a table though it could add regions.
    """

    def open(self, channel: Channel) -> None:
        front = self.attach(channel)
        front.set_owner()
        self.offered = front.get_features()
        front.negotiate(self.wanted_protocol)
        front.get_queue_num()
        front.get_config(0, 60)
        self.start()

    def start(self) -> None:
        self.say(Request.SET_FEATURES, U64(self.use(self.offered)))
        self.set_table()
        for queue in self.queues:
            self.set_num(queue.index)
        for queue in self.queues:
            self.set_addr(queue.index)
            self.set_base(queue.index)
            self.set_call(queue.index)
            self.set_kick(queue.index)
        self.pause(False)

    def pause(self, pause: bool = True) -> None:
        for queue in self.queues:
            self.enable(queue.index, not pause)


class Crosvm(Vmm):
    """A table, no acks, and each ring enabled as soon as it is set up."""

    wanted_protocol = P.MQ | P.CONFIG
    acks = False

    def open(self, channel: Channel) -> None:
        front = self.attach(channel)
        front.set_owner()
        self.offered = front.get_features()
        self.say(Request.SET_FEATURES, U64(self.use(self.offered)))
        front.negotiate(self.wanted_protocol)
        front.get_config(0, 60)
        self.start()

    def start(self) -> None:
        self.set_table()
        for queue in self.queues:
            self.set_num(queue.index)
            self.set_addr(queue.index)
            self.set_base(queue.index)
            self.set_call(queue.index)
            self.set_kick(queue.index)
            self.enable(queue.index, True)


class Firecracker(CloudHypervisor):
    """As Cloud Hypervisor, but with the configuration space and nothing else."""

    wanted_protocol = P.CONFIG
    wanted_features = Vmm.wanted_features & ~Feature.INDIRECT_DESC
    acks = False

    def open(self, channel: Channel) -> None:
        front = self.attach(channel)
        front.set_owner()
        self.offered = front.get_features()
        front.negotiate(self.wanted_protocol)
        self.say(Request.SET_FEATURES, U64(self.use(self.offered)))
        front.get_config(0, 60)
        self.start()


class Blkio(Vmm):
    """libblkio: features before protocol features, call after kick, and a region for
    each buffer, at any time, that begins anywhere in its file."""

    wanted_features = Vmm.wanted_features & ~Feature.INDIRECT_DESC

    def __init__(self, *, num_queues: int = 2) -> None:
        super().__init__(BlkioRam(), num_queues=num_queues)

    def open(self, channel: Channel) -> None:
        front = self.attach(channel)
        front.set_owner()
        front.set_features(self.use(front.get_features()))
        front.negotiate(self.wanted_protocol)
        front.get_queue_num()
        for _ in range(4):
            front.get_config(0, 60)
        front.get_max_mem_slots()
        for region, fd in self.ram.shared():
            front.add_mem_region(region, fd)
        for queue in self.queues:
            index = queue.index
            self.set_num(index)
            front.set_vring_base(index, 0)
            self.set_addr(index)
            self.set_kick(index)
            self.set_call(index)
            self.enable(index, True)
        self.add_buffer()

    def add_buffer(self) -> MemoryRegion:
        """A region more, while rings run."""
        assert isinstance(self.ram, BlkioRam)
        region = self.ram.add_buffer()
        self.front.add_mem_region(*self.ram.shared()[-1])
        return region

    def stop(self) -> None:
        """It never stops a ring, but hangs up."""
        self.disconnect()


class BlkioRam(GuestRam):
    """Memory of a process: guest addresses are those of the process. Regions begin
    anywhere in their files, and are no multiples of a page."""

    def __init__(self) -> None:
        super().__init__(MIB, MIB)
        self._at = 0x7F00_0000_0000
        for region in [mapped.region for mapped in self.regions]:
            self.unplug(region)
        self.add_buffer(offset=0)

    def add_buffer(
        self, offset: int = 12345 * 8, size: int = MIB + 560
    ) -> MemoryRegion:
        region = MemoryRegion(self._at, size, self._at, offset)
        self._at += 2 * size // 4096 * 4096
        fd = Fd(os.memfd_create("guest-ram", os.MFD_CLOEXEC))
        os.ftruncate(fd.fileno(), offset + size)
        self._plug(region, fd)
        return region


VMMS = (Qemu, CloudHypervisor, Crosvm, Firecracker, Blkio)
