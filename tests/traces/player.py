# SPDX-License-Identifier: Apache-2.0
"""Plays the trace of a front-end, with a guest that works between its phases.

with BlkGuest() as guest, Player(QEMU, guest, airlock.channel) as player:
    player.play()
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

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
NONE = P(0)
LOW = 0xFFFF_FFFF

PHASES = (
    ("start",),
    ("pause", "resume"),
    ("reset", "start"),
    ("plug", "unplug"),
    ("reconnect",),
    ("pause", "resume"),
    ("reset", "start"),
    ("close",),
)
"""Phases that are played in one go. A VMM that lacks the first leaves all out."""


class Refused(Exception):
    """The VMM does not want a back-end that lacks these features."""


@dataclass(slots=True)
class Part:
    """A message, but for its request."""

    payload: Payload = Empty()  # noqa: RUF009 (it can't change)
    fds: tuple[Fd, ...] = ()


class Player:
    """One front-end with its guest.

    `dial` makes a connection to the back-end, or to an airlock before it.
    """

    def __init__(self, vmm: Vmm, guest: Guest, dial: Callable[[], Channel]) -> None:
        self.vmm = vmm
        self.guest = guest
        self.dial = dial
        self.front = self.connected()
        self.offered = 0
        """What the back-end offers."""
        self.features = 0
        """What the driver has accepted of it."""
        self.protocol = NONE
        """The protocol features that the back-end offers."""
        self.status = 0
        self.announced: list[MemoryRegion] = []
        """Regions that the back-end has."""
        self.gone: MemoryRegion | None = None
        """A region that the guest has no more, and the back-end still has."""
        self.inflight: tuple[Inflight, Fd] | None = None
        self.requests: list[socket.socket] = []
        """Our ends of the sockets for requests of the back-end."""

    # Phases.

    def play(self) -> None:
        """Play all phases, and let the guest work wherever its rings run."""
        self.say(self.vmm.connect)
        for phases in PHASES:
            if getattr(self.vmm, phases[0]):
                for phase in phases:
                    getattr(self, phase)()
                    self.settle()
                if phases[0] != "close":
                    self.guest.work()

    def start(self) -> None:
        self.say(self.vmm.start)

    def pause(self) -> None:
        self.say(self.vmm.pause)

    def resume(self) -> None:
        self.say(self.vmm.resume)

    def reset(self) -> None:
        self.say(self.vmm.reset)
        self.settle()
        self.guest.reset()

    def plug(self) -> None:
        region = self.guest.plug()
        self.say(self.vmm.plug)
        self.settle()
        self.guest.work()
        if self.vmm.unplug:
            self.gone = region

    def unplug(self) -> None:
        if self.gone is not None:
            self.guest.unplug(self.gone)
            self.say(self.vmm.unplug)
            self.gone = None

    def reconnect(self) -> None:
        """Lose the connection. Meanwhile the guest, which doesn't know, goes on."""
        self.hang_up()
        self.announced.clear()
        remembered = self.front.protocol_features if self.vmm.remembers else NONE
        self.front = self.connected()
        self.front.protocol_features = remembered
        self.guest.lost()
        end = self.guest.begin() if self.vmm.offers_again else None
        self.say(self.vmm.reconnect)
        if end is not None:
            end()

    def close(self) -> None:
        self.say(self.vmm.close)

    def connected(self) -> Frontend:
        """Return a new connection, whose end ends all waits of the guest."""
        front = Frontend(self.dial())
        for ring in self.guest.rings:
            ring.watched = [front, ring.err]
        return front

    def settle(self) -> None:
        """Let all that was said take effect, by a message that real front-ends lack.

        Those which ask for no acks don't know when it has, but a real guest takes its
        time before it does the next thing.
        """
        self.front.barrier()

    def hang_up(self) -> None:
        self.front.close()
        while self.requests:
            self.requests.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.hang_up()
        if self.inflight is not None:
            self.inflight[1].close()

    # Messages.

    def say(self, text: str) -> None:
        """Send what a text has."""
        for step in parse(text):
            if isinstance(step, Say):
                self.send(step, None)
                continue
            used = None if step.unused_too else self.guest.used
            for ring in self.guest.rings[:used]:
                for said in step.said:
                    self.send(said, ring)

    def possible(self, request: Request) -> bool:
        """Can it be sent, with the protocol features in use?"""
        if request is R.GET_CONFIG and not self.guest.config_size:
            return False
        needs = RULES[request].needs
        return needs in self.front.protocol_features

    def send(self, said: Say, ring: Ring | None) -> None:
        """Send a message, if the features in use allow it, and take its reply."""
        request = next(filter(self.possible, said.requests), None)
        if request is None:
            return
        ack = said.need_reply or self.vmm.acks
        for part in self.parts(request, said.value, ring):
            if request is R.SET_PROTOCOL_FEATURES:
                # Before it is sent: it may ask for the first ack.
                self.front.protocol_features = P(part.payload.value)  # type: ignore[attr-defined]
                ack = said.need_reply
            reply = self.front.exchange(request, part.payload, part.fds, need_reply=ack)
            self.take(request, reply.payload, reply.fds, ring)
            if request is R.SET_BACKEND_REQ_FD:
                close_all(part.fds)

    def take(
        self, request: Request, payload: Payload, fds: list[Fd], ring: Ring | None
    ) -> None:
        """Take what came in return."""
        match request, payload:
            case R.GET_FEATURES, U64(value):
                self.offered = value
            case R.GET_PROTOCOL_FEATURES, U64(value):
                self.protocol = P(value)
                if missing := self.vmm.required & ~P(value):
                    raise Refused(f"{self.vmm.name} wants {missing!r}")
            case R.GET_STATUS, U64(value):
                self.status = value
            case R.GET_VRING_BASE, VringState(_, num):
                assert ring is not None
                ring.base = num
            case R.GET_INFLIGHT_FD, Inflight():
                self.inflight = payload, fds[0]

    # What messages say.

    def parts(self, request: Request, value: str, ring: Ring | None) -> Iterator[Part]:
        """Yield the payload and descriptors; for each region, where it is one."""
        if request is R.ADD_MEM_REG:
            for region, fd in self.guest.ram.shared():
                if region not in self.announced:
                    self.announced.append(region)
                    yield Part(region, (fd,))
        elif request is R.REM_MEM_REG:
            assert self.gone is not None
            self.announced.remove(self.gone)
            yield Part(self.gone)
        elif request is R.SET_MEM_TABLE:
            if value != "once" or not self.announced:
                yield self.table()
        elif request is R.SET_FEATURES:
            before, features = self.features, self.accept()
            if value != "once" or features != before:
                yield Part(U64(features & LOW if value == "low" else features))
        elif request is R.GET_INFLIGHT_FD:
            if self.inflight is None:
                yield Part(Inflight(0, 0, self.guest.all, SIZE))
        elif ring is not None:
            yield self.part_of_ring(request, value, ring)
        else:
            yield self.part(request, value)

    def table(self) -> Part:
        shared = self.guest.ram.shared()
        self.announced[:] = [region for region, _ in shared]
        return Part(MemoryTable(tuple(self.announced)), tuple(fd for _, fd in shared))

    def part(self, request: Request, value: str) -> Part:
        match request:
            case R.SET_PROTOCOL_FEATURES:
                return Part(U64(self.vmm.protocol & self.protocol))
            case R.SET_STATUS:
                before = self.status if value.startswith("+") else 0
                self.status = before | int(value.lstrip("+"), 16)
                return Part(U64(self.status))
            case R.GET_CONFIG:
                size = self.guest.config_size
                return Part(Config(0, size, 0, bytes(size)))
            case R.SET_BACKEND_REQ_FD:
                ours, theirs = socket.socketpair()
                self.requests.append(ours)
                return Part(fds=(Fd(theirs.detach()),))
            case R.SET_INFLIGHT_FD:
                assert self.inflight is not None
                return Part(self.inflight[0], (self.inflight[1],))
            case _:
                return Part()  # it has none

    def accept(self) -> int:
        """Return what the driver accepts of what is offered, and use its rings so."""
        self.features = self.offered & self.guest.wanted & ~int(self.vmm.without)
        for ring in self.guest.rings:
            ring.use(self.features)
        return self.features

    def part_of_ring(self, request: Request, value: str, ring: Ring) -> Part:
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
