# SPDX-License-Identifier: Apache-2.0
"""A vhost-user back-end for any virtio device that does each request at once.

    class Echo:
        features = 0
        num_queues = 1

        def config(self) -> bytes:
            return b""

        def serve(self, readable, writable) -> int:
            data = b"".join(readable)
            writable[0][: len(data)] = data
            return len(data)

    with Channel(listener.accept()[0], peer="front") as channel:
        DeviceServer(channel, Echo()).run()

One thread does all: messages, kicks and requests. So nothing is ever in flight when a
message arrives: rings stop at once, and memory can go away at any time.
"""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Protocol

from ..errors import Disconnected, RequestRefused, Stopped
from ..log import Logger
from ..vhost.backend import Backend, Handler
from ..vhost.channel import Channel
from ..vhost.fds import Fd, HasFileno, notify
from ..vhost.wire import (
    U64,
    Config,
    Feature,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFd,
    VringState,
)
from .device import DeviceRing
from .events import clear
from .memory import Memory
from .ring import INDEX_MASK, RingFault, SplitLayout
from .vring import Vring

log = Logger(__name__)

MAX_MEM_SLOTS = 64
BUDGET = 64
"""Requests of one ring that are done before other rings and messages have a turn."""

RING_FEATURES = (
    Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


class Device(Protocol):
    """The device that a server serves."""

    @property
    def features(self) -> int:
        """The feature bits of its type."""

    @property
    def num_queues(self) -> int: ...

    def config(self) -> bytes:
        """Its configuration space."""

    def serve(
        self, readable: Sequence[memoryview], writable: Sequence[memoryview]
    ) -> int:
        """Do a request; return the bytes written to it. RingFault: it is malformed."""


class DeviceServer:
    """Serves one front-end.

    `without` are features that it would have otherwise. `stop`, an eventfd, ends it.
    """

    def __init__(
        self,
        channel: Channel,
        device: Device,
        *,
        without: Collection[Feature | ProtocolFeature] = (),
        stop: HasFileno | None = None,
    ) -> None:
        self.device = device
        self.memory = Memory()
        self.features = 0
        self.offered = int(RING_FEATURES) | int(device.features)
        self.protocol_offered = int(PROTOCOL_FEATURES)
        for feature in without:
            if isinstance(feature, ProtocolFeature):
                self.protocol_offered &= ~int(feature)
            else:
                self.offered &= ~int(feature)
        self._vrings = [Vring() for _ in range(device.num_queues)]
        self._busy: set[int] = set()
        self._backend = Backend(channel, self._handlers())
        self._selector = selectors.DefaultSelector()
        self._watch(channel, self._backend.handle_one)
        if stop is not None:
            self._watch(stop, self._stop)

    def run(self) -> None:
        """Serve until the front-end is gone. `Stopped`: `stop` was signalled."""
        try:
            while True:
                for key, _ in self._selector.select(0 if self._busy else None):
                    key.data()
                for index in list(self._busy):
                    self._serve(index)
        except Disconnected as error:
            log.debug("%s", error)
        finally:
            self._selector.close()
            for vring in self._vrings:
                vring.stop()
                vring.close()
            self.memory.clear()

    def _watch(self, fd: HasFileno, ready: Callable[[], None]) -> None:
        self._selector.register(fd.fileno(), selectors.EVENT_READ, ready)

    def _stop(self) -> None:
        raise Stopped("told to stop")

    # Requests in rings.

    def _kicked(self, index: int) -> None:
        kick = self._vrings[index].kick
        if kick:
            clear(kick)
            self._busy.add(index)

    def _serve(self, index: int) -> None:
        """Do the requests of a ring, within the budget."""
        vring = self._vrings[index]
        self._busy.discard(index)
        enabled = vring.enabled or not self.features & Feature.PROTOCOL_FEATURES
        if vring.ring is None or not enabled:
            return
        try:
            if self._serve_some(vring.ring, vring.call):
                self._busy.add(index)
        except (RingFault, LookupError) as error:
            self._give_up(index, str(error))

    def _serve_some(self, ring: DeviceRing, call: Fd | None) -> bool:
        """One pass of the service loop of device.py; True if there is more to do."""
        ring.disarm()
        for _ in range(BUDGET):
            chain = ring.take()
            if chain is None:
                break
            readable: list[memoryview] = []
            writable: list[memoryview] = []
            for addr, length, is_writable in chain.buffers:
                pieces = writable if is_writable else readable
                pieces += self.memory.views(addr, length)
            ring.complete(chain.head, self.device.serve(readable, writable))
        ring.publish()
        if ring.call_needed() and call:
            notify(call)
        return ring.arm()

    def _give_up(self, index: int, reason: str) -> None:
        # The reason alone: an exception kept in a log record holds views of memory.
        log.error("ring %d is broken: %s", index, reason)
        vring = self._vrings[index]
        vring.stop()
        self._set_kick(index, None)
        if vring.err:
            notify(vring.err)

    # Messages.

    def _handlers(self) -> dict[Request, Handler]:
        return {
            Request.GET_FEATURES: lambda _, fds: U64(self.offered),
            Request.SET_FEATURES: self._on_features,
            Request.GET_PROTOCOL_FEATURES: lambda _, fds: U64(self.protocol_offered),
            Request.SET_PROTOCOL_FEATURES: self._on_protocol_features,
            Request.SET_OWNER: lambda _, fds: None,
            Request.GET_QUEUE_NUM: lambda _, fds: U64(len(self._vrings)),
            Request.GET_CONFIG: self._on_get_config,
            Request.GET_MAX_MEM_SLOTS: lambda _, fds: U64(MAX_MEM_SLOTS),
            Request.SET_MEM_TABLE: self._on_mem_table,
            Request.ADD_MEM_REG: self._on_add_region,
            Request.REM_MEM_REG: self._on_remove_region,
            Request.SET_VRING_NUM: self._on_num,
            Request.SET_VRING_BASE: self._on_base,
            Request.SET_VRING_ADDR: self._on_addr,
            Request.GET_VRING_BASE: self._on_get_base,
            Request.SET_VRING_KICK: self._on_kick,
            Request.SET_VRING_CALL: self._on_call,
            Request.SET_VRING_ERR: self._on_err,
            Request.SET_VRING_ENABLE: self._on_enable,
        }

    def _on_features(self, payload: U64, fds: list[Fd]) -> None:
        if surplus := payload.value & ~self.offered:
            raise RequestRefused(f"features {surplus:#x} were not offered")
        self.features = payload.value

    def _on_protocol_features(self, payload: U64, fds: list[Fd]) -> None:
        if surplus := payload.value & ~self.protocol_offered:
            raise RequestRefused(f"protocol features {surplus:#x} were not offered")

    def _on_get_config(self, payload: Config, fds: list[Fd]) -> Config:
        """Bytes beyond the end of the space read as 0."""
        start, end = payload.offset, payload.offset + payload.size
        data = self.device.config().ljust(end, b"\0")[start:end]
        return Config(payload.offset, payload.size, payload.flags, data)

    @contextlib.contextmanager
    def _changing_memory(self) -> Iterator[None]:
        """Release the rings' views of memory, with which it couldn't be unmapped."""
        for vring in self._vrings:
            vring.let_go()
        try:
            yield
        finally:
            for index, vring in enumerate(self._vrings):
                try:
                    vring.find_again(self.memory)
                except LookupError as error:
                    self._give_up(index, str(error))

    def _on_mem_table(self, payload: MemoryTable, fds: list[Fd]) -> None:
        with self._changing_memory():
            self.memory.clear()
            for region, fd in zip(payload.regions, fds, strict=True):
                self.memory.add(region, fd)

    def _on_add_region(self, payload: MemoryRegion, fds: list[Fd]) -> None:
        if len(self.memory.regions) == MAX_MEM_SLOTS:
            raise RequestRefused("all memory slots are in use")
        self.memory.add(payload, fds[0])

    def _on_remove_region(self, payload: MemoryRegion, fds: list[Fd]) -> None:
        with self._changing_memory():
            self.memory.remove(payload)

    def _vring(self, index: int) -> Vring:
        if index >= len(self._vrings):
            raise RequestRefused(f"there is no ring {index}")
        return self._vrings[index]

    def _stopped_vring(self, index: int) -> Vring:
        if self._vring(index).ring:
            raise RequestRefused(f"ring {index} is running")
        return self._vrings[index]

    def _start(self, index: int) -> None:
        """Start a ring if all of its parts are there; it may have requests already."""
        event_idx = bool(self.features & Feature.EVENT_IDX)
        if self._vrings[index].start(self.memory, event_idx):
            self._busy.add(index)

    def _on_num(self, payload: VringState, fds: list[Fd]) -> None:
        vring = self._stopped_vring(payload.index)
        try:
            vring.num = SplitLayout(payload.num).size
        except ValueError as error:
            raise RequestRefused(str(error)) from None
        self._start(payload.index)

    def _on_base(self, payload: VringState, fds: list[Fd]) -> None:
        self._stopped_vring(payload.index).base = payload.num & INDEX_MASK

    def _on_addr(self, payload: VringAddr, fds: list[Fd]) -> None:
        """Set a ring's addresses. The message may come again while the ring runs, to
        turn on logging, which is not supported.
        """
        vring = self._vring(payload.index)
        if vring.ring is None:
            vring.addr = payload
            self._start(payload.index)

    def _on_get_base(self, payload: VringState, fds: list[Fd]) -> VringState:
        vring = self._vring(payload.index)
        vring.stop()
        self._set_kick(payload.index, None)
        vring.set_call(None)
        return VringState(payload.index, vring.base)

    def _set_kick(self, index: int, fd: Fd | None) -> None:
        vring = self._vrings[index]
        if vring.kick:
            self._selector.unregister(vring.kick.fileno())
        vring.set_kick(fd)
        if fd:
            try:
                self._watch(fd, partial(self._kicked, index))
            except OSError as error:
                vring.set_kick(None)
                raise RequestRefused(f"can't wait for that fd: {error}") from None

    def _on_kick(self, payload: VringFd, fds: list[Fd]) -> None:
        self._vring(payload.index)
        if payload.nofd:
            raise RequestRefused("no polling: rings need a kick eventfd")
        self._set_kick(payload.index, fds.pop())
        self._start(payload.index)

    def _on_call(self, payload: VringFd, fds: list[Fd]) -> None:
        self._vring(payload.index).set_call(fds.pop() if fds else None)

    def _on_err(self, payload: VringFd, fds: list[Fd]) -> None:
        self._vring(payload.index).set_err(fds.pop() if fds else None)

    def _on_enable(self, payload: VringState, fds: list[Fd]) -> None:
        self._vring(payload.index).enabled = bool(payload.num)
        self._busy.add(payload.index)
