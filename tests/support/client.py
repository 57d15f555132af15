# SPDX-License-Identifier: Apache-2.0
"""A front-end and driver for any device: it says and asks whatever a test wants."""

from __future__ import annotations

import select
from collections.abc import Iterator, Sequence
from typing import Self

from vhost_airlock.peers.driver import DriverRing
from vhost_airlock.peers.events import clear
from vhost_airlock.peers.ram import GuestRam
from vhost_airlock.peers.ring import Buffer, SplitLayout, SplitRing, TableArea
from vhost_airlock.vhost.fds import HasFileno, eventfd, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import Feature, ProtocolFeature, VringAddr

TIMEOUT = 20.0
REQUIRED = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES
SIZE = 64
LONGEST = 8
"""Buffers of an indirect request."""


class Queue:
    """A ring in guest memory, and chains of buffers in it."""

    def __init__(self, ram: GuestRam, index: int) -> None:
        self.ram = ram
        self.index = index
        self.kick = eventfd()
        self.call = eventfd()
        self.base = 0
        layout = SplitLayout(SIZE)
        self._addr = ram.alloc(layout.end)
        self._ring = SplitRing.at(ram.view(self._addr, layout.end), layout)
        length = TableArea.length(SIZE, LONGEST)
        at = ram.alloc(length)
        self._tables = TableArea(ram.view(at, length), at, LONGEST)
        self.indirect = False
        self._driver = DriverRing(self._ring, tables=self._tables)
        self._writable: dict[int, list[memoryview]] = {}
        self._done: dict[int, int] = {}
        self.patience = TIMEOUT
        """Seconds for one request."""
        self.watched: list[HasFileno] = []
        """The bytes that are readable once no request has an end any more."""

    def vring_addr(self) -> VringAddr:
        layout = SplitLayout(SIZE, self.ram.user_addr(self._addr))
        return VringAddr(self.index, 0, layout.desc, layout.used, layout.avail)

    def offer(self, readable: Sequence[bytes], writable: Sequence[int]) -> int:
        """Offer a request, a buffer for each item, and kick; its head."""
        chain = []
        views = []
        for data in readable:
            addr = self.ram.alloc(len(data), 64)
            self.ram.view(addr, len(data))[:] = data
            chain.append(Buffer(addr, len(data)))
        for length in writable:
            addr = self.ram.alloc(length, 64)
            views.append(self.ram.view(addr, length))
            chain.append(Buffer(addr, length, True))
        head = self._driver.offer(chain, indirect=self.indirect)
        self._writable[head] = views
        self._driver.publish()
        notify(self.kick)
        return head

    def wait(self, head: int) -> tuple[int, list[bytes]]:
        """The end of a request: how much was written, and what."""
        poll = select.poll()
        for fd in (self.call, *self.watched):
            poll.register(fd, select.POLLIN)
        while head not in self._done:
            clear(self.call)
            self._done.update(self._driver.used())
            if head not in self._done and not self._driver.arm():
                ready = [fd for fd, _ in poll.poll(self.patience * 1000)]
                what = f"request {head} of queue {self.index} has no end"
                assert ready == [self.call.fileno()], what
        written = self._done.pop(head)
        return written, [bytes(view) for view in self._writable.pop(head)]

    def finished(self) -> Iterator[int]:
        """Heads of requests which are done and nobody has waited for."""
        self._done.update(self._driver.used())
        yield from list(self._done)

    @property
    def outstanding(self) -> int:
        """Requests that the device has."""
        return len(self._driver.outstanding)

    def close(self) -> None:
        self.kick.close()
        self.call.close()
        for views in self._writable.values():
            for view in views:
                view.release()
        self._ring.release()
        self._tables.memory.release()


class Client:
    """The front-end. Its driver uses indirect descriptors if `features` has them."""

    def __init__(
        self, path: object, queues: int, *, features: int = 0, protocol: int = 0
    ) -> None:
        self.front = Frontend.connect(str(path))
        self.ram = GuestRam()
        self.queues = [Queue(self.ram, index) for index in range(queues)]
        self.offered = self.front.get_features()
        self.features = self.offered & (REQUIRED | features)
        assert self.features & Feature.VERSION_1
        self.front.negotiate(ProtocolFeature.REPLY_ACK | protocol)
        self.front.set_owner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.front.close()
        for queue in self.queues:
            queue.close()
        self.ram.close()

    def start(self) -> None:
        """Share the memory, and start the queues where they are."""
        front = self.front
        front.set_features(self.features)
        front.set_mem_table(self.ram.shared())
        for queue in self.queues:
            queue.indirect = bool(self.features & Feature.INDIRECT_DESC)
            front.set_vring_num(queue.index, SIZE)
            front.set_vring_base(queue.index, queue.base)
            front.set_vring_addr(queue.vring_addr())
            front.set_vring_call(queue.index, queue.call)
            notify(queue.kick)
            front.set_vring_kick(queue.index, queue.kick)
        for queue in self.queues:
            front.set_vring_enable(queue.index, True)
        front.barrier()

    def stop(self) -> None:
        for queue in self.queues:
            self.front.set_vring_enable(queue.index, False)
        for queue in self.queues:
            queue.base = self.front.get_vring_base(queue.index)

    def request(
        self, queue: int, readable: Sequence[bytes], writable: Sequence[int] = ()
    ) -> tuple[int, list[bytes]]:
        """Make a request and wait for its end: how much was written, and what."""
        return self.queues[queue].wait(self.queues[queue].offer(readable, writable))
