"""Whole sessions: a front that may say anything, a guest with good and bad requests,
and a back that does what it likes in its memory. Of the invariants, at the end:

- I1, I2: the back has no byte of the guest's but what it may read, and no address.
- I3: the guest finds each request completed once at most, and nothing else.
- I4, I5, I6: guest memory is what it was, but for rings and writable buffers.
- I8, I9: the session ends in time, and no thread and no descriptor is left.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import threading

from fuzz.playedback import PROTOCOL, PlayedBack
from fuzz.source import Source
from fuzz.talk import PAGE, all_closed, memory, open_fds, send_any
from fuzz.targets.front_messages import CONFIG, P, good, send_good
from vhost_airlock.errors import RingFault
from vhost_airlock.peers.driver import DriverRing
from vhost_airlock.peers.ring import Buffer, SplitRing
from vhost_airlock.session import Session
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import eventfd, notify
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import Header, Payload, Request

SIZE = 16
RING = range(0x1000, 0x2000)
"""Where front_messages.good() says that the ring is."""
SCRATCH = range(15 * PAGE, 16 * PAGE)
"""What a guest that misbehaves points at, other than outside."""
BUFFERS = 2 * PAGE
SECRET = b"not for any back"
LENGTHS = (16, 1, 64, 512, 513, 2000)
PATIENCE = 20.0
START = [step for step in good(0) if step[0] is not Request.SET_VRING_BASE]
"""The airlock knows by itself where a ring goes on."""
STOP = START.pop()
KICK = START[-2]
"""An eventfd that was signalled: it takes the old one's place."""


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
        self.writable: list[Buffer] = []
        self.next = BUFFERS
        self.hostile = False
        """Did it break its own ring? Then what is in there means nothing."""
        self.misled = False
        """Did the front say where memory is? Then nobody knows."""

    def reap(self) -> None:
        """Take back what was completed. RingFault: it was not outstanding."""
        if not (self.hostile or self.misled):
            list(self.driver.used())

    def offer(self, source: Source) -> None:
        self.reap()
        if self.hostile or len(self.driver.free) < 2 or self.next > 14 * PAGE:
            return
        out, into = source.choice(LENGTHS), source.choice(LENGTHS)
        chain = [Buffer(self.next, out), Buffer(self.next + out, into, True)]
        self.before[self.next : self.next + out] = b"r" * out
        self.view[self.next : self.next + out] = b"r" * out
        self.next += out + into
        self.writable.append(chain[1])
        self.driver.offer(chain)
        self.driver.publish()

    def misbehave(self, source: Source) -> None:
        """What it offers may be written to, so it has to point away from the rest."""
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
        may_change = [RING, SCRATCH]
        may_change += [range(b.addr, b.addr + b.length) for b in self.writable]
        after = bytearray(self.view)
        for span in may_change:
            after[span.start : span.stop] = self.before[span.start : span.stop]
        assert self.misled or after == self.before, "guest memory was changed"

    def close(self) -> None:
        self.ring.release()
        self.view.release()
        self.map.close()


class Play:
    """One session, and the hands of all who take part."""

    def __init__(self, source: Source) -> None:
        self.stop = eventfd()
        self.guest = Guest()
        self.back = PlayedBack(
            PROTOCOL if source.flag() else P.MQ | P.CONFIG, self.stop
        )
        self.failures: list[BaseException] = []
        self.inbox = bytearray()
        self.asked = self.answered = 0
        ours, self.front = socket.socketpair()
        channel = Channel(ours, stop=self.stop, peer="front", timeout=CONFIG.timeout)
        self.session = Session(
            channel,
            CONFIG,
            lambda changed: self.back.connect(CONFIG, changed),
            self.stop,
        )
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            assert self.session.run() is None
        except BaseException as error:
            self.failures.append(error)

    def say(self, *steps: tuple[Request, Payload, str]) -> None:
        """Send messages, and wait until all have been served, or the session ends."""
        steps = (*steps, START[0])
        self.asked += steps.count(START[0])
        send_good(self.front, list(steps))
        self.front.settimeout(PATIENCE)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while self.answered < self.asked and (data := self.front.recv(1 << 16)):
                self.inbox += data
                self.count()

    def count(self) -> None:
        while len(self.inbox) >= Header.LAYOUT.size:
            header = Header.unpack(bytes(self.inbox[: Header.LAYOUT.size]))
            if len(self.inbox) < Header.LAYOUT.size + header.size:
                break
            del self.inbox[: Header.LAYOUT.size + header.size]
            self.answered += header.request == Request.GET_FEATURES

    # What may happen.

    def front_starts(self, source: Source) -> None:
        self.say(*START)

    def front_stops(self, source: Source) -> None:
        self.say(STOP)

    def front_speaks(self, source: Source) -> None:
        """A part of what is right, or anything."""
        if source.below(8):
            first = source.below(len(START))
            self.say(*START[first : first + 1 + source.below(4)])
        else:
            self.guest.misled = True
            send_any(self.front, source, RULES)
            self.say()

    def guest_offers(self, source: Source) -> None:
        for _ in range(1 + source.below(3)):
            self.guest.offer(source)
        self.say(KICK)

    def guest_misbehaves(self, source: Source) -> None:
        self.guest.misbehave(source)
        self.say(KICK)

    def back_works(self, source: Source) -> None:
        for vring in list(self.back.vrings.values()):
            ring, call = vring.ring, vring.call
            if ring is None or call is None:
                continue
            with contextlib.suppress(RingFault, LookupError, ValueError):
                while chain := ring.take():
                    if source.below(8) == 7:
                        break
                    for address, length, writable in chain.buffers:
                        if writable:
                            for view in self.back.memory.views(address, length):
                                view[:] = b"w" * len(view)
                    ring.complete(chain.head, source.choice((513, 0, 0xFFFFFFFF)))
                ring.publish()
                notify(call)

    def back_misbehaves(self, source: Source) -> None:
        for vring in list(self.back.vrings.values()):
            ring, call = vring.ring, vring.call
            if ring is None or call is None:
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
                notify(call)

    def end(self) -> None:
        self.front.close()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the session goes on"
        if self.failures:
            raise self.failures[0]
        self.guest.check()
        for data in self.back.all_it_has():
            assert self.guest.misled or SECRET not in data, "the back has a secret"
        self.back.close()
        self.guest.close()
        self.stop.close()


ACTS = (
    Play.front_starts,
    Play.guest_offers,
    Play.back_works,
    Play.front_speaks,
    Play.front_stops,
    Play.back_works,
    Play.back_misbehaves,
    Play.guest_misbehaves,
)


def one(data: bytes) -> None:
    source = Source(data)
    before, threads = open_fds(), threading.active_count()
    play = Play(source)
    try:
        for _ in range(30):
            if not source.more:
                break
            source.choice(ACTS)(play, source)
    finally:
        play.end()
    del play
    assert threading.active_count() == threads
    all_closed(before)
