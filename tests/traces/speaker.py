# SPDX-License-Identifier: Apache-2.0
"""Says what a trace has, on one connection after the other.

The content of a message comes from the guest, from the back-end's earlier answers, and
from the word's value where it has one:

| word | values |
| --- | --- |
| BASE | none: 0; told: what GET_VRING_BASE returned; avail, used: the ring's index |
| CALL | none: the guest's; masked: an eventfd that nobody listens to |
| ENABLE | 0, 1 |
| SET_FEATURES | none: what the driver accepts; low: 32 bits of it; once: not again |
| SET_MEM_TABLE | none: all regions; once: not again |
| SET_STATUS | the status; with a `+`, beside that which the back-end has |

ADD_MEM_REG is sent for each region which the back-end does not have.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.client import SIZE
from tests.traces.guests import Guest, Ring
from tests.traces.notation import Say, parse
from tests.traces.vmms import Vmm
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, close_all, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import (
    U64,
    Config,
    Empty,
    Inflight,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
)

P = ProtocolFeature
R = Request
LOW = 0xFFFF_FFFF
EMPTY = Empty()


class Refused(Exception):
    """The front-end does not want a back-end that lacks these features."""


@dataclass(slots=True)
class Part:
    """The content of one message."""

    payload: Payload = EMPTY
    fds: tuple[Fd, ...] = ()


class Speaker:
    """The mouth of a front-end, and what it remembers."""

    front: Frontend

    def __init__(self, vmm: Vmm, guest: Guest) -> None:
        self.vmm = vmm
        self.guest = guest
        self.offered = 0
        """Features that the back-end offers."""
        self.features = 0
        """Features that the driver has accepted."""
        self.protocol_offered = P(0)
        self.protocol = P(0)
        """The protocol features that were negotiated last."""
        self.status = 0
        self.announced: list[MemoryRegion] = []
        """Regions that the back-end has."""
        self.gone: MemoryRegion | None = None
        """A region that the guest has no more, and the back-end still has."""
        self.inflight: tuple[Inflight, Fd] | None = None
        self._requests: list[socket.socket] = []
        """Our ends of the sockets for requests of the back-end."""

    def connect(self, channel: Channel) -> None:
        """Take a new connection, whose end ends all waits of the guest."""
        self.front = Frontend(channel)
        if self.vmm.remembers:
            self.front.protocol_features = self.protocol
        self.announced.clear()
        for ring in self.guest.rings:
            ring.watched = [self.front, ring.err]

    def hang_up(self) -> None:
        self.front.close()
        while self._requests:
            self._requests.pop().close()

    def close(self) -> None:
        self.hang_up()
        if self.inflight is not None:
            self.inflight[1].close()

    # Messages and their replies.

    def say(self, text: str) -> None:
        """Send all messages of a text."""
        for step in parse(text):
            if isinstance(step, Say):
                self._send(step, None)
                continue
            rings = self.guest.rings
            for ring in rings if step.unused_too else rings[: self.guest.used]:
                for said in step.said:
                    self._send(said, ring)

    def _possible(self, request: Request) -> bool:
        """Can it be sent, with the protocol features in use?"""
        if request is R.GET_CONFIG and not self.guest.config_size:
            return False
        return RULES[request].needs in self.front.protocol_features

    def _send(self, said: Say, ring: Ring | None) -> None:
        request = next(filter(self._possible, said.requests), None)
        if request is None:
            return
        ack = said.need_reply
        if request is R.SET_PROTOCOL_FEATURES:
            # Before it is sent: it may ask for the first ack.
            self.protocol = self.vmm.protocol & self.protocol_offered
            self.front.protocol_features = self.protocol
        else:
            ack |= self.vmm.acks
        for part in self._parts(request, said.value, ring):
            reply = self.front.exchange(request, part.payload, part.fds, need_reply=ack)
            self._take(request, reply.payload, reply.fds, ring)
            if request is R.SET_BACKEND_REQ_FD:
                close_all(part.fds)

    def _take(
        self, request: Request, payload: Payload, fds: list[Fd], ring: Ring | None
    ) -> None:
        match request, payload:
            case R.GET_FEATURES, U64(value):
                self.offered = value
            case R.GET_PROTOCOL_FEATURES, U64(value):
                self.protocol_offered = P(value)
                if missing := self.vmm.required & ~P(value):
                    raise Refused(f"{self.vmm.name} wants {missing!r}")
            case R.GET_STATUS, U64(value):
                self.status = value
            case R.GET_VRING_BASE, VringState(_, num):
                assert ring is not None
                ring.base = num
            case R.GET_INFLIGHT_FD, Inflight():
                self.inflight = payload, fds[0]

    # The content of messages.

    def _parts(self, request: Request, value: str, ring: Ring | None) -> Iterator[Part]:
        """Yield what a message says: nothing if it isn't sent, or several times."""
        match request:
            case R.ADD_MEM_REG:
                for region, fd in self.guest.ram.shared():
                    if region not in self.announced:
                        self.announced.append(region)
                        yield Part(region, (fd,))
            case R.REM_MEM_REG:
                assert self.gone is not None
                self.announced.remove(self.gone)
                yield Part(self.gone)
            case R.SET_MEM_TABLE:
                if value != "once" or not self.announced:
                    yield self._table()
            case R.SET_FEATURES:
                before, features = self.features, self._accept()
                if value != "once" or features != before:
                    yield Part(U64(features & LOW if value == "low" else features))
            case R.GET_INFLIGHT_FD:
                if self.inflight is None:
                    yield Part(Inflight(0, 0, self.guest.all, SIZE))
            case _ if ring is not None:
                yield self._part_of_ring(request, value, ring)
            case _:
                yield self._part(request, value)

    def _table(self) -> Part:
        shared = self.guest.ram.shared()
        self.announced[:] = [region for region, _ in shared]
        return Part(MemoryTable(tuple(self.announced)), tuple(fd for _, fd in shared))

    def _accept(self) -> int:
        """Return what the driver accepts of what is offered, and use its rings so."""
        self.features = self.offered & self.guest.wanted & ~int(self.vmm.without)
        for ring in self.guest.rings:
            ring.use(self.features)
        return self.features

    def _part(self, request: Request, value: str) -> Part:
        match request:
            case R.SET_PROTOCOL_FEATURES:
                return Part(U64(self.protocol))
            case R.SET_STATUS:
                before = self.status if value.startswith("+") else 0
                return Part(U64(before | int(value.lstrip("+"), 16)))
            case R.GET_CONFIG:
                size = self.guest.config_size
                return Part(Config(0, size, 0, bytes(size)))
            case R.SET_BACKEND_REQ_FD:
                ours, theirs = socket.socketpair()
                self._requests.append(ours)
                return Part(fds=(Fd(theirs.detach()),))
            case R.SET_INFLIGHT_FD:
                assert self.inflight is not None
                return Part(self.inflight[0], (self.inflight[1],))
            case _:
                return Part()  # it has none

    def _part_of_ring(self, request: Request, value: str, ring: Ring) -> Part:
        match request:
            case R.SET_VRING_NUM:
                return Part(VringState(ring.index, SIZE))
            case R.SET_VRING_BASE:
                bases = {"told": ring.base, "avail": ring.avail, "used": ring.used}
                return Part(VringState(ring.index, bases[value] if value else 0))
            case R.SET_VRING_ADDR:
                return Part(ring.vring_addr())
            case R.SET_VRING_KICK:
                if self.vmm.kicks:
                    notify(ring.kick)
                return Part(VringFd(ring.index), (ring.kick,))
            case R.SET_VRING_CALL:
                call = ring.masked if value == "masked" else ring.call
                return Part(VringFd(ring.index), (call,))
            case R.SET_VRING_ERR:
                return Part(VringFd(ring.index), (ring.err,))
            case R.SET_VRING_ENABLE:
                return Part(VringState(ring.index, int(value)))
            case R.GET_VRING_BASE:
                return Part(VringState(ring.index))
            case _:
                raise ValueError(f"{request.name} is not said of a ring")
