# SPDX-License-Identifier: Apache-2.0
"""Whole sessions: a front that may send any message, a guest with good and bad
requests, and a back that writes anywhere in its memory. All of them act when the
session waits, and in its thread, so no side waits for another, and an input always has
the same effect. The invariants that are checked at the end:

- I1, I2: the back has no byte of the guest's but those it may read, and no address.
- I3: the guest finds each request completed once at most, and no other completions.
- I4, I5, I6: guest memory is unchanged, but for rings and writable buffers; memory that
  was taken away is not touched.
- I9: no descriptor is left.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
from collections import defaultdict
from collections.abc import Callable
from random import Random
from typing import Any
from unittest.mock import patch

from fuzz.playedback import PROTOCOL, PlayedBack
from fuzz.playedworker import PlayedWorkers
from fuzz.source import Source
from fuzz.talk import PAGE, all_closed, memory, open_fds, replies, send_any
from fuzz.targets.front_messages import P, good, send_good
from vhost_airlock.peers.device import DeviceRing
from vhost_airlock.peers.driver import DriverRing
from vhost_airlock.peers.ring import Buffer, Chain, RingFault, SplitRing
from vhost_airlock.peers.vring import Vring
from vhost_airlock.proxy.back import Back
from vhost_airlock.proxy.config import Config
from vhost_airlock.proxy.device import Device
from vhost_airlock.proxy.session import Session
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, eventfd, notify
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import MemoryRegion, MemoryTable, Payload, Request

CONFIG = Config(timeout=0, drain_timeout=0, poll_us=0, pool_limit=1 << 20)
"""A message that has not come when the session looks for it never comes."""
Step = tuple[Request, Payload, str]
SIZE = 16
RING = range(0x1000, 0x2000)
"""The place of the ring by front_messages.good()."""
USED = 0x1C00
"""From here on only the airlock writes to it."""
SCRATCH = range(15 * PAGE, 16 * PAGE)
"""Places at which a guest that misbehaves points, other than outside."""
BUFFERS = 2 * PAGE
SECRET = b"not for any back"
LENGTHS = (16, 1, 64, 512, 513, 2000)
ACTS_AT_MOST = 40
MORE = 64
"""Bytes behind those of the input."""
START = [step for step in good(0) if step[0] is not Request.SET_VRING_BASE]
"""The airlock knows by itself where a ring goes on."""
STOP = START.pop()
AGAIN = START[[step[0] for step in START].index(Request.SET_MEM_TABLE) :]
"""The messages of a start when features were chosen."""


class Guest:
    """A driver in memory that is filled with a secret."""

    def __init__(self) -> None:
        self.map = mmap.mmap(memory().fileno(), 16 * PAGE)
        self.view = memoryview(self.map)
        self.view[:] = SECRET * (len(self.view) // len(SECRET))
        for span in (RING, SCRATCH):
            self.view[span.start : span.stop] = bytes(len(span))
        self.before = bytearray(self.view)
        parts = (self.view[start:] for start in (0x1000, 0x1800, 0x1C00))
        self.ring = SplitRing(SIZE, *parts)
        self.driver = DriverRing(self.ring)
        self.requests: dict[int, tuple[int, Buffer]] = {}
        """By head: (the request's number, its buffer that the device may write)."""
        self.writable: list[Buffer] = []
        """All that ever were: a hostile guest may have offered old ones again."""
        self.ended: set[int] = set()
        self.next = BUFFERS
        self.offered = 0
        self.hostile = False
        """Did it break its own ring? Then the words in the ring mean nothing."""
        self.misled = False
        """Did the front send any messages? Then it is not known where memory is."""
        self.gone_from = 16 * PAGE
        self.gone = bytearray()
        """The bytes from `gone_from` on, when that memory was taken away."""
        self.beyond: set[int] = set()
        """Which requests were offered since then, but are in that memory."""

    def leave(self, size: int) -> None:
        """From now on the airlock has this much of the memory, from its start."""
        self.check()
        self.gone_from = max(size, USED)
        self.gone = bytearray(self.view[self.gone_from :])
        self.beyond.clear()

    def put(self, at: int, data: bytes) -> None:
        self.view[at : at + len(data)] = data
        self.before[at : at + len(data)] = data
        start, end = max(at, self.gone_from), at + len(data)
        if start < end:
            gone = slice(start - self.gone_from, end - self.gone_from)
            self.gone[gone] = data[start - at :]

    def reap(self) -> None:
        """Take back completed chains, which must have been outstanding."""
        if self.hostile or self.misled:
            return
        try:
            used = list(self.driver.used())
        except RingFault as fault:
            raise AssertionError(fault) from None  # of a kind that nobody catches
        for head, written in used:
            number, buffer = self.requests.pop(head)
            assert written <= buffer.length, "more was written than there is room"
            self.ended.add(number)
            span = slice(buffer.addr, buffer.addr + buffer.length)
            self.before[span] = self.view[span]

    def taken(self, number: int) -> None:
        """The back has taken this request."""
        self.reap()
        if not (self.hostile or self.misled):
            assert number not in self.ended, "it had ended"
            assert number not in self.beyond, "it is in memory that was taken away"

    def offer(self, source: Source) -> None:
        self.reap()
        if self.hostile or len(self.driver.free) < 2 or self.next > 14 * PAGE:
            return
        out, into = source.choice(LENGTHS), source.choice(LENGTHS)
        chain = [Buffer(self.next, out), Buffer(self.next + out, into, True)]
        self.put(self.next, bytes([self.offered]) * out)
        self.next += out + into
        self.requests[self.driver.offer(chain)] = self.offered, chain[1]
        self.writable.append(chain[1])
        if self.next > self.gone_from:
            self.beyond.add(self.offered)
        self.offered += 1
        self.driver.publish()

    def misbehave(self, source: Source) -> None:
        """Offer a bad chain. It may be written to, so it points away from the rest."""
        self.hostile = True
        at = source.below(SIZE)
        address = source.choice((SCRATCH.start, SCRATCH.stop, 1 << 63, RING.start))
        length = source.choice((0, 16, 256, PAGE, 0xFFFFFFFF))
        self.ring.write_desc(at, address, length, source.below(8), source.below(32))
        self.ring.set_avail_entry(self.ring.avail_idx % SIZE, at)
        self.ring.avail_idx = (self.ring.avail_idx + source.choice((1, 2, 99))) & 0xFFFF

    def check(self) -> None:
        """Each request ended once at most; bytes changed where they may have."""
        self.reap()
        if self.misled:
            return
        assert self.view[self.gone_from :] == self.gone, "memory was taken away"
        may_change = [RING, SCRATCH]
        outstanding = [buffer for _, buffer in self.requests.values()]
        for buffer in self.writable if self.hostile else outstanding:
            may_change.append(range(buffer.addr, buffer.addr + buffer.length))
        after = bytearray(self.view)
        for span in may_change:
            after[span.start : span.stop] = self.before[span.start : span.stop]
        assert after == self.before, "guest memory was changed"

    def close(self) -> None:
        self.ring.release()
        self.view.release()
        self.map.close()


class BusyBack(PlayedBack):
    """A back that works, or does harm, in its rings."""

    def __init__(
        self, protocol: int, source: Source, took: Callable[[int], None]
    ) -> None:
        super().__init__(protocol, CONFIG)
        self.source = source
        self.took = took
        self.served = 0
        self.hostile = False
        self.left: defaultdict[Vring, list[Chain]] = defaultdict(list)
        """The chains of each ring that it has taken and not done, over all stops."""

    def act_on_ring(
        self, request: Request, vring: Vring, payload: Any, fds: list[Fd]
    ) -> Payload | None:
        if request is Request.GET_VRING_BASE and self.source.flag():
            self.work()
        return super().act_on_ring(request, vring, payload, fds)

    def work(self) -> None:
        """Serve all chains, or only some, or take one more and leave it."""
        for vring in self.vrings.values():
            ring, call = vring.ring, vring.call
            if ring is None or call is None:
                continue
            with contextlib.suppress(RingFault, LookupError, ValueError):
                while self.source.below(8) != 6 and (chain := ring.take()):
                    self.look_at(chain)
                    if self.source.below(8) == 7:
                        self.left[vring].append(chain)
                        break
                    self.end_chain(ring, chain)
                while self.left[vring] and self.source.below(4) == 3:
                    self.end_chain(ring, self.left[vring].pop(0))
                ring.publish()
                notify(call)

    def end_chain(self, ring: DeviceRing, chain: Chain) -> None:
        self.write_to(chain)
        ring.complete(chain.head, self.source.choice((513, 0, 0xFFFFFFFF)))

    def look_at(self, chain: Chain) -> None:
        """Note the request of a chain, which a back that does harm may have made up."""
        address, _, writable = chain.buffers[0]
        if not (writable or self.hostile):
            self.took(self.memory.view(address, 1)[0])

    def write_to(self, chain: Chain) -> None:
        """Not twice the same."""
        self.served += 1
        for address, length, writable in chain.buffers:
            if writable:
                for view in self.memory.views(address, length):
                    view[:] = bytes([self.served & 0xFF]) * len(view)

    def misbehave(self) -> None:
        """In a ring that was stopped too."""
        self.hostile = True
        for vring in self.vrings.values():
            ring, source = vring.ring, self.source
            if ring is None:
                continue
            with contextlib.suppress(ValueError):
                kind = source.below(4)
                if kind == 0:
                    ring.complete(source.number(4), source.number(4))
                    ring.publish()
                elif kind == 1:
                    ring.ring.used_idx = source.number(2)
                elif kind == 2:
                    ring.ring.desc[:] = source.take(16) * SIZE
                else:
                    ring.ring.avail_event = source.number(2)


class Play(Session):
    """A session that lets all others act before it waits."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stop_event = eventfd()
        self.guest = Guest()
        protocol = PROTOCOL if source.flag() else P.MQ | P.CONFIG
        self.busy_back = BusyBack(protocol, source, self.guest.taken)
        ours, self.peer = socket.socketpair()
        channel = Channel(ours, stop=self.stop_event, peer="VMM", timeout=0)
        super().__init__(channel, CONFIG, self.busy_back, self.stop_event)
        self.acts = 0

    def run(self) -> Back | None:
        with patch("vhost_airlock.proxy.rings.Workers", PlayedWorkers):
            return super().run()

    def _wait(self, device: Device) -> set[int]:
        while not self._has_message():
            replies(self.peer)
            self.turn()
            if not self.source.more or self.acts == ACTS_AT_MOST:
                self.peer.close()
                break
            self.acts += 1
            self.source.choice(ACTS)(self)
        return super()._wait(device)

    def _has_message(self) -> bool:
        poll = select.poll()
        poll.register(self.front.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def turn(self) -> None:
        workers = self.device.rings.workers
        assert isinstance(workers, PlayedWorkers)
        workers.turn()

    def say(self, *steps: Step) -> None:
        for request, payload, _ in steps:
            if request is Request.SET_MEM_TABLE:
                assert isinstance(payload, MemoryTable)
                self.guest.leave(payload.regions[0].size)
        send_good(self.peer, list(steps))

    # The events of a session.

    def front_starts(self) -> None:
        """For the first time, or again, which needs a stop before it."""
        ring = self.device.rings.get(0)
        stop = [STOP] if ring is not None and ring.attached else []
        self.say(*stop, *(AGAIN if self.device.back_side.features else START))

    def front_stops(self) -> None:
        self.say(STOP)

    def front_speaks(self) -> None:
        """A part of what is right, or anything."""
        if self.source.below(8):
            first = self.source.below(len(START))
            self.say(*START[first : first + 1 + self.source.below(4)])
        else:
            self.guest.misled = True
            send_any(self.peer, self.source, RULES)

    def front_takes_memory(self) -> None:
        """That of the ring too, or of the buffers, or of some of them."""
        size = self.source.choice((BUFFERS, 4 * PAGE, PAGE))
        table = MemoryTable((MemoryRegion(0, size, 0),))
        self.say((Request.SET_MEM_TABLE, table, "memory"))

    def guest_offers(self) -> None:
        for _ in range(1 + self.source.below(3)):
            self.guest.offer(self.source)

    def guest_misbehaves(self) -> None:
        self.guest.misbehave(self.source)

    def back_works(self) -> None:
        self.busy_back.work()

    def back_misbehaves(self) -> None:
        self.busy_back.misbehave()

    def end(self) -> None:
        self.peer.close()
        self.guest.check()
        for data in self.busy_back.all_it_has():
            assert self.guest.misled or SECRET not in data, "the back has a secret"
        self.busy_back.close()
        self.guest.close()
        self.stop_event.close()


ACTS = (
    *[Play.guest_offers, Play.back_works] * 6,
    *[Play.front_starts, Play.front_stops] * 3,
    *[Play.front_takes_memory] * 2,
    *[Play.front_speaks] * 2,
    Play.back_misbehaves,
    Play.guest_misbehaves,
)
"""After harm is done there is less to find, so most acts do none."""


def one(data: bytes) -> None:
    """The order of events counts most here, and the engine likes its inputs short: so
    each input is continued at random, the same way each time."""
    before = open_fds()
    play = Play(Source(data + Random(data).randbytes(MORE)))
    assert play.run() is None
    play.end()
    del play
    all_closed(before)
