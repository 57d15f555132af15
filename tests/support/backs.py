# SPDX-License-Identifier: Apache-2.0
"""Back-ends for the airlock to talk to, in threads, with a record of all they get.

`DiskBack` is the block back-end of the package. `ScriptedBack` only answers messages:
what happens in its rings is the test's business, and it can be told to misbehave.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from vhost_airlock.errors import AirlockError
from vhost_airlock.peers.device import DeviceRing
from vhost_airlock.peers.disk import SECTOR, Disk
from vhost_airlock.peers.events import clear
from vhost_airlock.peers.memory import Memory
from vhost_airlock.peers.ring import Chain
from vhost_airlock.peers.server import PROTOCOL_FEATURES, RING_FEATURES, DeviceServer
from vhost_airlock.peers.vring import Vring
from vhost_airlock.vhost.backend import Backend, Handler, Result
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, HasFileno, close_all, notify
from vhost_airlock.vhost.frontend import Requester
from vhost_airlock.vhost.message import Limit, Message, any_payload
from vhost_airlock.vhost.rules import BACKEND_RULES, RULES
from vhost_airlock.vhost.wire import (
    U64,
    Config,
    Feature,
    Payload,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFd,
    VringState,
)

PATIENCE = 10.0
"""Seconds that a test waits for what should come at once."""


@dataclass
class Seen:
    """A message that the back-end got. It owns copies of the descriptors."""

    request: Request
    flags: int
    data: bytes
    fds: list[Fd] = field(default_factory=list)

    @property
    def payload(self) -> Any:
        return RULES[self.request].payload.unpack(self.data)

    def __str__(self) -> str:
        return self.request.name


class RecordingChannel(Channel):
    """Notes every message before anybody acts on it."""

    seen: list[Seen]

    def recv(
        self, deadline: float | None = None, limit: Limit = any_payload
    ) -> Message:
        message = super().recv(deadline, limit)
        copies = [Fd.dup(fd) for fd in message.fds]
        request = Request(message.request)
        self.seen.append(Seen(request, message.flags, message.payload, copies))
        return message


class RecordedBack:
    """The common part of the back-ends: the record, and threads that end."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.errors: list[AirlockError] = []
        """Why it ended a connection, if it did."""
        self.connections = 0
        self._threads: list[threading.Thread] = []

    def start(self, sock: socket.socket) -> None:
        """Serve a connection in a thread, when the one before it has ended."""
        self.connections += 1
        last = self._threads[-1:]
        thread = threading.Thread(target=self._run, args=[sock, last], name="back")
        self._threads.append(thread)
        thread.start()

    def _run(self, sock: socket.socket, last: list[threading.Thread]) -> None:
        for thread in last:
            thread.join(PATIENCE)
        with RecordingChannel(sock, peer="front", timeout=PATIENCE) as channel:
            channel.seen = self.seen
            try:
                self.serve(channel)
            except AirlockError as error:
                self.errors.append(error)

    def serve(self, channel: Channel) -> None:
        raise NotImplementedError

    def requests(self, since: int = 0) -> list[Request]:
        """The requests that came, in order."""
        return [seen.request for seen in self.seen[since:]]

    def got(self, request: Request) -> list[Seen]:
        return [seen for seen in self.seen if seen.request == request]

    def memory_fds(self) -> list[Fd]:
        """The descriptors that came with memory."""
        kinds = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG)
        return [fd for seen in self.seen if seen.request in kinds for fd in seen.fds]

    def join(self) -> None:
        """Wait until the connections have ended: the front-end must have hung up."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the back-end still has its front-end"
        self._threads.clear()

    def forget_seen(self) -> None:
        """Begin a new record."""
        for seen in self.seen:
            close_all(seen.fds)
        self.seen.clear()

    def close(self) -> None:
        self.join()
        self.forget_seen()


class DiskBack(RecordedBack):
    """The package's block back-end, over a disk in memory."""

    def __init__(
        self,
        *,
        sectors: int = 16384,
        num_queues: int = 1,
        without: Collection[Feature | ProtocolFeature] = (),
    ) -> None:
        super().__init__()
        self._file = Fd(os.memfd_create("disk", os.MFD_CLOEXEC))
        os.ftruncate(self._file.fileno(), sectors * SECTOR)
        self.disk = Disk(Fd.dup(self._file), num_queues=num_queues)
        self.without = without

    def serve(self, channel: Channel) -> None:
        DeviceServer(channel, self.disk, without=self.without).run()

    def content(self, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, 0)

    def close(self) -> None:
        super().close()
        self.disk.close()
        self._file.close()


class ScriptedBack(RecordedBack):
    """Answers messages as a good back-end does, but for what `instead` has.

    `instead` maps requests to handlers, which may also send what they like on
    `channel`, or close it. Rings are for the test: take(), read(), write(), complete().
    """

    def __init__(
        self,
        *,
        features: int = RING_FEATURES,
        protocol_features: int = PROTOCOL_FEATURES,
        num_queues: int = 4,
        slots: int = 64,
        config: bytes = bytes(60),
        instead: dict[Request, Handler] | None = None,
    ) -> None:
        super().__init__()
        self.offered = features
        self.protocol_offered = protocol_features
        self.num_queues = num_queues
        self.slots = slots
        self.config = config
        self.instead = instead or {}
        self.features = 0
        self.protocol_features = 0
        self.memory = Memory()
        self.vrings: defaultdict[int, Vring] = defaultdict(Vring)
        self._old_rings: list[DeviceRing] = []
        self.channel: Channel | None = None
        self.asking: Requester | None = None
        """For requests of its own, on the socket that it got for these."""

    def serve(self, channel: Channel) -> None:
        self.channel = channel
        try:
            Backend(channel, dict(map(self._handler, Request))).serve()
        finally:
            self.forget()

    def forget(self) -> None:
        """Let go of all that came from this front-end, but for the record."""
        for vring in self.vrings.values():
            vring.stop()
            vring.close()
        self.vrings.clear()
        for ring in self._old_rings:
            ring.ring.release()
        self._old_rings.clear()
        self.memory.clear()
        if self.asking is not None:
            self.asking.close()
            self.asking = None

    # Messages.

    def _handler(self, request: Request) -> tuple[Request, Handler]:
        def handler(payload: Payload, fds: list[Fd]) -> Result:
            if request in self.instead:
                return self.instead[request](payload, fds)
            return self.answer(request, payload, fds)

        return request, handler

    def answer(self, request: Request, payload: Payload, fds: list[Fd]) -> Result:
        """As a good back-end does."""
        usual = self._usual().get(request)
        return usual(payload, fds) if usual else None

    def _usual(self) -> dict[Request, Handler]:
        return {
            Request.GET_FEATURES: lambda _, fds: U64(self.offered),
            Request.SET_FEATURES: self._on_features,
            Request.GET_PROTOCOL_FEATURES: lambda _, fds: U64(self.protocol_offered),
            Request.SET_PROTOCOL_FEATURES: self._on_protocol_features,
            Request.GET_QUEUE_NUM: lambda _, fds: U64(self.num_queues),
            Request.GET_MAX_MEM_SLOTS: lambda _, fds: U64(self.slots),
            Request.GET_STATUS: lambda _, fds: U64(0),
            Request.GET_CONFIG: self._on_get_config,
            Request.SET_MEM_TABLE: self._on_table,
            Request.ADD_MEM_REG: lambda region, fds: self.memory.add(region, fds[0]),
            Request.REM_MEM_REG: lambda region, fds: self.memory.remove(region),
            Request.SET_VRING_NUM: self._on_num,
            Request.SET_VRING_BASE: self._on_base,
            Request.SET_VRING_ADDR: self._on_addr,
            Request.SET_VRING_KICK: self._on_kick,
            Request.SET_VRING_CALL: self._on_call,
            Request.SET_VRING_ERR: self._on_err,
            Request.SET_VRING_ENABLE: self._on_enable,
            Request.GET_VRING_BASE: self.stop_ring,
            Request.SET_BACKEND_REQ_FD: self._on_socket,
        }

    def _on_features(self, payload: U64, fds: list[Fd]) -> None:
        self.features = payload.value

    def _on_protocol_features(self, payload: U64, fds: list[Fd]) -> None:
        self.protocol_features = payload.value

    def _on_get_config(self, asked: Config, fds: list[Fd]) -> Config:
        data = self.config.ljust(asked.offset + asked.size, b"\0")[asked.offset :]
        return Config(asked.offset, asked.size, asked.flags, data[: asked.size])

    def _on_table(self, table: Any, fds: list[Fd]) -> None:
        self.memory.clear()
        for region, fd in zip(table.regions, fds, strict=True):
            self.memory.add(region, fd)

    def _on_num(self, payload: VringState, fds: list[Fd]) -> None:
        """The first message of a start."""
        vring = self.vrings[payload.index]
        if vring.ring is not None:
            self._old_rings.append(vring.ring)
            vring.ring = None
        vring.num = payload.num

    def _on_base(self, payload: VringState, fds: list[Fd]) -> None:
        self.vrings[payload.index].base = payload.num

    def _on_addr(self, payload: VringAddr, fds: list[Fd]) -> None:
        self.vrings[payload.index].addr = payload

    def _on_kick(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self.vrings[payload.index]
        vring.set_kick(fds.pop())
        vring.start(self.memory, bool(self.features & Feature.EVENT_IDX))

    def _on_call(self, payload: VringFd, fds: list[Fd]) -> None:
        vring = self.vrings[payload.index]
        vring.set_call(fds.pop())

    def _on_err(self, payload: VringFd, fds: list[Fd]) -> None:
        self.vrings[payload.index].set_err(fds.pop())

    def _on_enable(self, payload: VringState, fds: list[Fd]) -> None:
        self.vrings[payload.index].enabled = bool(payload.num)

    def stop_ring(self, payload: VringState, fds: list[Fd]) -> VringState:
        """Do as qemu-storage-daemon does: say how much was taken, and wait for nothing.

        The test can still complete what was taken, but no call goes out any more.
        """
        vring = self.vrings[payload.index]
        vring.close()
        return VringState(payload.index, self.ring(payload.index).next_avail)

    def _on_socket(self, _: Payload, fds: list[Fd]) -> None:
        sock = socket.socket(fileno=fds.pop().release())
        features = ProtocolFeature(self.protocol_features)
        self.asking = Requester(Channel(sock, peer="front"), BACKEND_RULES, features)

    # Rings.

    def ring(self, index: int = 0) -> DeviceRing:
        ring = self.vrings[index].ring
        assert ring is not None, f"ring {index} is not started"
        return ring

    def take(self, index: int = 0) -> Chain:
        """The next chain of a ring; it is waited for."""
        ring, kick = self.ring(index), self.vrings[index].kick
        while True:
            if chain := ring.take():
                return chain
            if not ring.arm():
                assert kick is not None
                assert readable(kick), f"no chain comes in ring {index}"
                clear(kick)

    def take_all(self, index: int = 0) -> Iterator[Chain]:
        """All that is there now."""
        while chain := self.ring(index).take():
            yield chain

    def read(self, chain: Chain) -> bytes:
        """The content of a request."""
        return b"".join(
            bytes(piece)
            for addr, length, writable in chain.buffers
            if not writable
            for piece in self.memory.views(addr, length)
        )

    def room(self, chain: Chain) -> list[memoryview]:
        """Where the answer goes."""
        return [
            piece
            for addr, length, writable in chain.buffers
            if writable
            for piece in self.memory.views(addr, length)
        ]

    def complete(
        self,
        chain: Chain,
        data: bytes = b"",
        *,
        index: int = 0,
        status: int = 0,
        length: int | None = None,
    ) -> None:
        """Answer a block request: data, then the status in its last byte."""
        room = self.room(chain)
        written = len(data)
        for piece in room:
            piece[: len(data)] = data[: len(piece)]
            data = data[len(piece) :]
        room[-1][-1] = status
        for piece in room:
            piece.release()
        self.ring(index).complete(chain.head, written + 1 if length is None else length)
        self.publish(index)

    def publish(self, index: int = 0) -> None:
        """Let the airlock see what is completed, and call it if it wants."""
        ring, call = self.ring(index), self.vrings[index].call
        ring.publish()
        # An airlock that looked by itself may have stopped the ring since, and ended.
        with contextlib.suppress(OSError, ValueError):
            if ring.call_needed() and call is not None:
                notify(call)


def readable(fd: HasFileno, timeout: float = PATIENCE) -> bool:
    """Does it become readable in time?"""
    poll = select.poll()
    poll.register(fd.fileno(), select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what has no event to wait for; it should be the case soon."""
    ticks = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        ticks.wait(0.001)
    raise AssertionError(f"it does not come to this: {what}")
