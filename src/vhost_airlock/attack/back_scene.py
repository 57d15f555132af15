# SPDX-License-Identifier: Apache-2.0
"""A block back-end that misbehaves when an attack says so."""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import AirlockError, Disconnected
from ..peers.device import DeviceRing
from ..peers.disk import SECTOR, Disk
from ..peers.ring import Chain
from ..peers.server import DeviceServer
from ..peers.vring import Vring
from ..process.sockets import Listener
from ..vhost.backend import Handler, Result
from ..vhost.channel import Channel
from ..vhost.fds import Fd, close_all, eventfd, notify
from ..vhost.frontend import Requester
from ..vhost.rules import BACKEND_RULES
from ..vhost.wire import Payload, ProtocolFeature, Request, VringState
from .catalogue import Attack

SECTORS = 2048
NUM_QUEUES = 2
PATIENCE = 5.0
"""Seconds for which a hostile back-end waits for the program to hang up."""


class BackScene(DeviceServer):
    """One connection. A deed arms it, and from then on the program sets it off.

    `instead` has a function for a request, called in place of answering it: a result is
    the answer, None answers as usual, an exception hangs up. `on_chain` is called with
    each chain of ring 0, in place of serving it, until that ring stops or `behave()` is
    called.
    """

    def __init__(self, channel: Channel, disk: Disk, stop: Fd) -> None:
        self.channel = channel
        self.instead: dict[Request, Callable[[BackScene], Result]] = {}
        self.on_chain: Callable[[BackScene, DeviceRing, Chain], None] | None = None
        self.on_stop: Callable[[BackScene], None] | None = None
        self.fds: list[Fd] = []
        """Duplicates of all descriptors of isolated memory."""
        self.asking: Requester | None = None
        """The channel for requests of its own."""
        self.ended = threading.Event()
        self._threads: list[threading.Thread] = []
        super().__init__(channel, disk, stop=stop)
        self.protocol_offered |= int(ProtocolFeature.BACKEND_REQ)

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._calm_down()
            close_all(self.fds)
            if self.asking is not None:
                self.asking.close()

    def spawn(self, step: Callable[[], None], seconds: float = 0.3) -> None:
        """Take a step over and over in a thread, for a while.

        It ends before ring 0 stops, or before the connection does.
        """

        def go() -> None:
            end = time.monotonic() + seconds
            with contextlib.suppress(OSError, ValueError, AirlockError):
                while time.monotonic() < end and not self.ended.is_set():
                    step()

        thread = threading.Thread(target=go, name="hostile")
        self._threads.append(thread)
        thread.start()

    def _calm_down(self) -> None:
        self.ended.set()
        while self._threads:
            self._threads.pop().join()

    # Messages.

    def _handlers(self) -> dict[Request, Handler]:
        usual = super()._handlers()
        usual[Request.SET_BACKEND_REQ_FD] = self._on_socket
        return {request: self._wrapped(request, usual[request]) for request in usual}

    def _wrapped(self, request: Request, usual: Handler) -> Handler:
        def handler(payload: Any, fds: list[Fd]) -> Result:
            if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG):
                self.fds += [Fd.dup(fd) for fd in fds]
            if request is Request.SET_VRING_CALL:
                for fd in fds:
                    os.set_blocking(fd.fileno(), False)  # or it would block us here
            if deed := self.instead.get(request):
                result = deed(self)
                if result is not None:
                    return result
            return usual(payload, fds)

        return handler

    def _on_socket(self, _: Payload, fds: list[Fd]) -> None:
        sock = socket.socket(fileno=fds.pop().release())
        features = ProtocolFeature((1 << 64) - 1 & ~int(ProtocolFeature.REPLY_ACK))
        channel = Channel(sock, peer="program", timeout=0.5)
        self.asking = Requester(channel, BACKEND_RULES, features)

    def send(self, data: bytes) -> None:
        """Write bytes on the connection, as no message."""
        with socket.socket(fileno=os.dup(self.channel.fileno())) as sock:
            sock.sendall(data, socket.MSG_NOSIGNAL)

    def hold(self) -> None:
        """Send no more until the program hangs up, and then hang up too."""
        poll = select.poll()
        poll.register(self.channel, select.POLLIN)
        poll.poll(PATIENCE * 1000)
        raise Disconnected("the hostile back-end hangs up")

    # Rings.

    def vring(self, index: int = 0) -> Vring:
        return self._vrings[index]

    def _serve_some(self, ring: DeviceRing, call: Fd | None) -> bool:
        if self.on_chain is None or ring is not self._vrings[0].ring:
            return super()._serve_some(ring, call)
        chain = ring.take()
        if chain is None:
            return ring.arm()
        self.on_chain(self, ring, chain)
        return True

    def _on_get_base(self, payload: VringState, fds: list[Fd]) -> VringState:
        if payload.index == 0:
            self._calm_down()
            self.ended.clear()
            self.behave()
            if self.on_stop is not None:
                self.on_stop(self)
                self.on_stop = None
        return super()._on_get_base(payload, fds)

    def behave(self) -> None:
        """Serve ring 0 well from now on."""
        self.on_chain = None

    def ignore_kicks(self) -> None:
        """Leave the kick eventfd of ring 0 as it is."""
        kick = self._vrings[0].kick
        if kick is not None:
            self._selector.modify(kick.fileno(), selectors.EVENT_WRITE, lambda: None)

    def room(self, chain: Chain) -> list[memoryview]:
        """Return the buffers that the device may write."""
        return [
            piece
            for addr, length, writable in chain.buffers
            if writable
            for piece in self.memory.views(addr, length)
        ]

    def complete(
        self, ring: DeviceRing, chain: Chain, length: int = SECTOR + 1
    ) -> None:
        """End a read of one sector well, as far as the data goes."""
        room = self.room(chain)
        room[-1][-1] = 0
        ring.complete(chain.head, length)
        self.publish(ring)

    def publish(self, ring: DeviceRing) -> None:
        ring.publish()
        self.call()

    def call(self, index: int = 0) -> None:
        call = self._vrings[index].call
        if call is not None:
            notify(call)


class HostileBack:
    """Serves each connection to a path, with the attack that is set at that time."""

    def __init__(self, path: str) -> None:
        self.attack: Attack[BackScene] | None = None
        self._listener = Listener(path)
        file = Fd(os.memfd_create("disk", os.MFD_CLOEXEC))
        os.ftruncate(file.fileno(), SECTORS * SECTOR)
        self._disk = Disk(file, num_queues=NUM_QUEUES)
        self._stop = eventfd()
        self._accepting = threading.Thread(target=self._accept, name="accept")
        self._accepting.start()

    def _accept(self) -> None:
        poll = select.poll()
        for fd in (self._listener.fileno(), self._stop.fileno()):
            poll.register(fd, select.POLLIN)
        threads = []
        while self._stop.fileno() not in {fd for fd, _ in poll.poll()}:
            args = (self._listener.accept(), self.attack)
            threads.append(threading.Thread(target=self._serve, args=args, name="back"))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _serve(self, sock: socket.socket, attack: Attack[BackScene] | None) -> None:
        with Channel(
            sock, peer="program", timeout=PATIENCE, stop=self._stop
        ) as channel:
            scene = BackScene(channel, self._disk, self._stop)
            if attack is not None:
                attack.deed(scene)
            # It may have broken its own rings, or itself.
            with contextlib.suppress(
                AirlockError, OSError, ValueError, TypeError, LookupError, BufferError
            ):
                scene.run()

    def close(self) -> None:
        notify(self._stop)
        self._accepting.join()
        self._stop.close()
        self._listener.close()
        self._disk.close()

    def __enter__(self) -> HostileBack:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
