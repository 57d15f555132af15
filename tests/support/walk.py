# SPDX-License-Identifier: Apache-2.0
"""A real session that is led through the lives of its rings, beside a model of them.

`Walk` has the VMM, the guest and the back-end. After each message every ring has to be
in the state in which the model has it. The guest's requests have to come out once, each
with its own data, and what a reset driver has forgotten must not be written to.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from tests.support.airlock import Airlock
from tests.support.backs import PATIENCE, ScriptedBack, readable, wait_until
from tests.support.life import DeviceLife
from tests.support.order import check_order
from tests.support.profiles import SANITIZED
from vhost_airlock.errors import Disconnected, PeerRefused
from vhost_airlock.peers.disk import HEADER, SECTOR, BlkFeature, BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue, Io
from vhost_airlock.peers.ram import MIB, GuestRam
from vhost_airlock.peers.ring import Chain, RingFull
from vhost_airlock.peers.server import PROTOCOL_FEATURES, RING_FEATURES
from vhost_airlock.proxy.ring import Ring
from vhost_airlock.proxy.state import Event, State
from vhost_airlock.vhost.fds import Fd, HasFileno, drain, eventfd, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import (
    U64,
    Empty,
    Feature,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
)

R = Request
RINGS = (0, 1)
ENTRIES = 16
TIMEOUT = 2.5
"""Nothing in a walk waits for so long, unless the machine is busy elsewhere."""
DRAIN = 0.05
LATE = (20 if SANITIZED else 4) * TIMEOUT
"""Other tests run at the same time."""
SIZES = (SECTOR, 4096, 5 * SECTOR)
NOTHING = Empty()
SET_UP = (
    R.SET_VRING_NUM,
    R.SET_VRING_BASE,
    R.SET_VRING_ADDR,
    R.SET_VRING_CALL,
    R.SET_VRING_KICK,
    R.SET_VRING_ENABLE,
)


class SessionOver(Exception):
    """The session has ended, as it had to."""


def pattern(number: int, size: int) -> bytes:
    """The data of the request with this number."""
    return number.to_bytes(4, "big") * (size // 4)


@dataclass(frozen=True)
class Held:
    """A request that the back has taken."""

    index: int
    chain: Chain
    number: int
    kind: int


class LateBack(ScriptedBack):
    """It takes requests, and completes them in any order, at any time: also after a
    stop of their ring, in the ring that there is then. RESET_DEVICE makes it forget its
    features. `moments` are done once, each before the answer to a request.
    """

    def __init__(self, *, event_idx: bool) -> None:
        super().__init__(
            features=RING_FEATURES & ~(0 if event_idx else Feature.EVENT_IDX)
            | BlkFeature.FLUSH,
            protocol_features=PROTOCOL_FEATURES | ProtocolFeature.RESET_DEVICE,
        )
        self.moments: dict[Request, Callable[[], None]] = {}
        self.has: list[Held] = []
        self.leaves = False
        """It has hung up, or is about to."""
        self.taken: Counter[int] = Counter()
        self.done: set[int] = set()
        self.given_up: dict[int, set[int]] = {}
        """Requests of rings that it has said are broken: it may get them again."""

    def begin(self) -> None:
        """It is another process from now on."""
        self.join()
        check_order(self.seen)
        self.forget_seen()
        self.moments.clear()
        self.has.clear()
        self.leaves = False
        self.taken.clear()
        self.given_up.clear()

    def answer(self, request: Request, payload: Payload, fds: list[Fd]) -> object:  # type: ignore[override]
        if moment := self.moments.pop(request, None):
            moment()
        if request == R.RESET_DEVICE:
            self.features = 0
        if request == R.SET_VRING_KICK:
            assert self.features, "the back is told again what it has forgotten"
            assert isinstance(payload, VringFd)
            for number in self.given_up.pop(payload.index, ()):
                self.taken[number] = 0
        return super().answer(request, payload, fds)

    def leave(self) -> None:
        """Hang up. As a moment: instead of the answer."""
        raise Disconnected("the back leaves")

    def take_some(self, index: int, most: int) -> int:
        """Take what there is, up to so many requests; return how many there were."""
        vring = self.vrings[index]
        before = len(self.has)
        while vring.enabled and len(self.has) - before < most:
            chain = self.ring(index).take()
            if chain is None:
                break
            self._note(index, chain)
        return len(self.has) - before

    def _note(self, index: int, chain: Chain) -> None:
        data = self.read(chain)
        kind, _, number = HEADER.unpack(data[: HEADER.size])
        assert data[HEADER.size :] == (
            pattern(number, len(data) - HEADER.size) if kind == BlkType.OUT else b""
        )
        self.taken[number] += 1
        assert self.taken[number] == 1, "a request that the back has is sent again"
        self.has.append(Held(index, chain, number, kind))
        if index in self.given_up:
            self.given_up[index].add(number)

    def give_up(self, index: int) -> None:
        """It is about to say that a ring is broken, and may forget its requests."""
        has = {held.number for held in self.has if held.index == index}
        self.given_up.setdefault(index, set()).update(has)

    def finish(self, which: int) -> None:
        """Complete one of the requests that it has."""
        held = self.has.pop(which % len(self.has))
        room = self.room(held.chain)
        size = sum(map(len, room)) - 1
        for piece in room:
            piece.release()
        self.done.add(held.number)
        data = pattern(held.number, size)
        self.complete(held.chain, data, index=held.index)

    def finish_some(self, count: int, which: int = 0) -> None:
        for step in range(min(count, len(self.has))):
            self.finish(which + 7 * step)


@dataclass
class Asked:
    """A request of the guest."""

    number: int
    io: Io
    addr: int
    size: int

    def expected(self) -> bytes:
        """The data in its buffer when it is done."""
        return pattern(self.number, self.size)


class Walk:
    """One guest with two rings, and one session after another."""

    def __init__(self, *, event_idx: bool = True, drain_timeout: float = DRAIN) -> None:
        self.back = LateBack(event_idx=event_idx)
        self.airlock = Airlock(self.back, timeout=TIMEOUT, drain_timeout=drain_timeout)
        ram = GuestRam(MIB, 8 * MIB)
        self.guest = BlkGuest(
            ram=ram,
            num_queues=1,
            queue_size=ENTRIES,
            seg_max=14,
            also=[ProtocolFeature.RESET_DEVICE],
        )
        self.regions = {0: ram.regions[-1].region, 1: ram.plug(8 << 30, 16 * MIB)}
        self.guest.queues.append(GuestQueue(ram, 1, ENTRIES, 14))
        self.asked: dict[Io, Asked] = {}
        """What the guest waits for."""
        self.forgotten: list[tuple[Asked, bytes]] = []
        """What it waited for before its driver was reset, and what was there then."""
        self.bases: dict[int, int | None] = dict.fromkeys(RINGS, 0)
        """Where the VMM knows that a stopped ring goes on."""
        self.is_amid = False
        """A step has begun, and not come to its end."""
        self.number = 0
        self.left_behind = 0
        """So many requests the guest waited for when a ring started or stopped."""
        self._begin()

    # The VMM.

    @property
    def front(self) -> Frontend:
        return self.guest.front

    def queue(self, index: int) -> GuestQueue:
        return self.guest.queues[index]

    def ring(self, index: int) -> Ring:
        """The airlock's."""
        return self.airlock.session.device.rings[index]

    def state(self, index: int) -> State:
        """The one that the model has for a ring."""
        return self.life.state(index)

    def _begin(self) -> None:
        self.life = DeviceLife(lambda index: self.queue(index).driver.ring.used_idx)
        self.guest.connect(self.airlock.channel())
        for queue in self.guest.queues:
            queue.set_features(self.guest.features)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step: if the session ends in it, the VMM has begun a new one afterwards."""
        self.is_amid = True
        try:
            yield
        except SessionOver:
            self._begin_anew()
        self._agree()
        self.is_amid = False

    def _begin_anew(self) -> None:
        """With a back-end that has nothing: the driver offers anew what is not done."""
        self.guest.disconnect()
        self.airlock.join()
        self.back.begin()
        for index in RINGS:
            self.reap(index)
            self.bases[index] = self.queue(index).driver.reoffer()
        self._begin()

    def _agree(self) -> None:
        """Is each ring in the state in which the model has it?"""
        self.front.barrier()  # the session looks at its rings after each message
        rings = self.airlock.session.device.rings
        states = {index: ring.state for index, ring in rings.items()}
        assert states == {i: ring.state for i, ring in self.life.rings.items()}
        for index in RINGS:
            if self.life.state(index) is not State.STOPPED:
                self.bases[index] = None

    def _say(
        self,
        message: Callable[[], None],
        request: Request,
        payload: Payload = NOTHING,
        fds: Sequence[HasFileno] = (),
    ) -> None:
        """Send a message. It is done or refused as the model says."""
        before = [ring.attached for ring in self.life.rings.values()]
        done = True
        try:
            self.front.exchange(request, payload, fds)
        except PeerRefused:
            done = False
        except Disconnected:
            assert self.back.leaves, f"the session ends with {request.name}"
            raise SessionOver from None
        assert done == self.life.answers(message), request.name
        if before != [ring.attached for ring in self.life.rings.values()]:
            self.left_behind += len(self.asked)
        self._agree()

    def tell(self, index: int, request: Request, *, on: bool = True) -> None:
        """One message about a ring; `on`: enable it, or have a descriptor."""
        ring, queue = self.life.ring, self.queue(index)
        number = VringState(index, int(on))
        fd = VringFd(index, nofd=not on)
        match request:
            case R.SET_VRING_NUM:
                size = VringState(index, queue.size)
                self._say(lambda: ring(index).set_num(), request, size)
            case R.SET_VRING_BASE:
                self._tell_base(index)
            case R.SET_VRING_ADDR:
                addr = queue.vring_addr(self.guest.ram)
                self._say(lambda: ring(index).set_addr(), request, addr)
            case R.SET_VRING_KICK:
                notify(queue.kick_fd)
                fds = [queue.kick_fd]
                self._say(lambda: ring(index).set_kick(), request, VringFd(index), fds)
            case R.SET_VRING_CALL:
                queue.call_fd.close()
                queue.call_fd = eventfd()
                fds = [queue.call_fd] if on else []
                self._say(lambda: void(ring(index)), request, fd, fds)
            case R.SET_VRING_ERR:
                fds = [queue.err_fd] if on else []
                self._say(lambda: void(ring(index)), request, fd, fds)
            case R.SET_VRING_ENABLE:
                self._say(lambda: ring(index).enable(on), request, number)
            case R.GET_VRING_BASE:
                self.stop(index)

    def _tell_base(self, index: int) -> None:
        """Where the ring goes on, if the VMM can know it."""
        base, driver = self.bases[index], self.queue(index).driver
        if self.state(index) is State.RUNNING:
            base = 0  # which is refused, whatever it is
            if self.life.ring(index).guessed is not None:
                return
        elif self.state(index) is not State.STOPPED and not driver.outstanding:
            base = driver.next_avail
        if base is not None:
            self._say(
                lambda: self.life.ring(index).set_base(base),
                R.SET_VRING_BASE,
                VringState(index, base),
            )

    def set_up(
        self,
        index: int,
        order: Sequence[Request] = SET_UP,
        *,
        enable: bool = True,
    ) -> None:
        """Start a ring, however it is, by messages in this order."""
        if self.state(index) in (State.BROKEN, State.DEAD):
            self.stop(index)
        self.set_table(self.life.there | {index})
        if self.life.features is None:
            self.set_features()
        if self.state(index) is State.RUNNING and not enable:
            self.tell(index, R.SET_VRING_ENABLE, on=False)
        for request in order:
            running = self.state(index) is State.RUNNING
            if not running or request in (R.SET_VRING_CALL, R.SET_VRING_KICK):
                self.tell(index, request, on=enable or request is R.SET_VRING_CALL)
        wanted = State.RUNNING if enable else State.HELD
        if self.state(index) is not wanted:
            # What came last made it stop, or enabled it before it was kicked.
            self.tell(index, R.SET_VRING_KICK)
            self.tell(index, R.SET_VRING_ENABLE, on=enable)
        assert self.state(index) is wanted

    def stop(self, index: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """GET_VRING_BASE; `meanwhile` is done once the stop has begun."""
        rule, channel = RULES[R.GET_VRING_BASE], self.front.channel
        attached = self.life.ring(index).attached
        ring = self.airlock.session.device.rings[index] if attached else None
        channel.send(R.GET_VRING_BASE, VringState(index, 0).pack())
        if ring is not None:
            running = (State.RUNNING, State.HELD, State.BROKEN)
            wait_until(lambda: ring.state not in running, "the stop begins")
        meanwhile()
        try:
            with channel.recv(time.monotonic() + PATIENCE) as answer:
                base = rule.reply.unpack(answer.payload)
        except Disconnected:
            assert self.back.leaves
            raise SessionOver from None
        assert self.life.answers(self.life.ring(index).stop)
        assert isinstance(base, VringState)
        if attached:
            self.left_behind += len(self.asked)
            self._check_base(index, base.num)
            self.bases[index] = base.num
        self._agree()

    def _check_base(self, index: int, base: int) -> None:
        """What is behind the base the guest has offered and is not done."""
        driver = self.queue(index).driver
        offered = (driver.next_avail - base) & 0xFFFF
        assert offered <= len(driver.outstanding)

    def set_features(self, *, others: bool = False) -> None:
        """Those that are set, or others; the ring's features stay as they are."""
        if others:
            self.guest.features ^= BlkFeature.FLUSH
        features = self.guest.features
        try:
            self._say(
                lambda: self.life.set_features(features),
                R.SET_FEATURES,
                U64(features),
            )
        finally:
            if self.life.features is not None:
                self.guest.features = self.life.features

    def set_table(self, there: set[int]) -> None:
        """The guest's memory, with these rings in it."""
        shared = [
            (region, fd)
            for region, fd in self.guest.ram.shared()
            if all(region != self.regions[i] for i in set(RINGS) - there)
        ]
        table = MemoryTable(tuple(region for region, _ in shared))
        self._say(
            lambda: self.life.set_memory(there),
            R.SET_MEM_TABLE,
            table,
            [fd for _, fd in shared],
        )

    def reset_device(self) -> None:
        self._say(self.life.reset_device, R.RESET_DEVICE)

    def reset_owner(self) -> None:
        self._say(self.life.reset_owner, R.RESET_OWNER)

    def front_leaves(self) -> None:
        raise SessionOver

    # The guest.

    def offer(self, index: int, kind: BlkType, size: int, count: int = 1) -> None:
        """Requests with numbers of their own: reads to memory that is full of 'g'."""
        queue = self.queue(index)
        for _ in range(count):
            addr = self.guest.ram.alloc(size, SECTOR, self.regions[index])
            before = b"g" * size
            if kind is BlkType.OUT:
                before = pattern(self.number, size)
            self.guest.ram.view(addr, size)[:] = before
            try:
                io = queue.submit(kind, self.number, [(addr, size)])
            except RingFull:
                break
            self.asked[io] = Asked(self.number, io, addr, size)
            self.number += 1
        queue.kick()

    def reap(self, index: int) -> None:
        """Take what is done: requests that the back has done, with their own data."""
        for io in self.queue(index).reap():
            asked = self.asked.pop(io)
            assert asked.number in self.back.done
            assert io.status == BlkStatus.OK
            read = io.kind == BlkType.IN
            assert io.written == 1 + asked.size * read
            assert self.guest.ram.view(asked.addr, asked.size) == asked.expected()

    def break_ring(self, index: int) -> None:
        """The guest breaks its ring, and puts it right when that was noticed."""
        self._make_room(index)
        with self._broken(index):
            wait_until(lambda: self.ring(index).state is State.BROKEN, "it is noticed")
        self.life.ring(index).happen(Event.GUEST_FAULT)

    def _make_room(self, index: int) -> None:
        """The back does all: a ring that waits for room does not look at its guest."""
        while self.back.has or self.take(index, ENTRIES):
            self.back.finish_some(ENTRIES)

    @contextmanager
    def _broken(self, index: int) -> Iterator[None]:
        queue = self.queue(index)
        words = queue.driver.ring
        before = words.avail_idx
        words.avail_idx = before + 3 * ENTRIES & 0xFFFF
        notify(queue.kick_fd)
        yield
        words.avail_idx = before

    def break_while_disabled(self, index: int) -> None:
        """One message disables both rings: one breaks before its turn comes."""
        first = next(iter(self.life.rings))
        assert index != first
        self._make_room(index)

        def breaks() -> None:
            with self._broken(index):
                pump = self.ring(index).pump
                assert pump is not None
                wait_until(lambda: bool(pump.fault), "the worker notices it")

        def disables() -> None:
            self.life.reset_owner()
            self.life.ring(index).happen(Event.GUEST_FAULT)

        self.back.moments[R.SET_VRING_ENABLE] = breaks
        self._say(disables, R.RESET_OWNER)

    def reset_driver(self, index: int) -> None:
        """The driver of a stopped ring begins anew, and waits for nothing any more."""
        assert self.state(index) is State.STOPPED
        self.reap(index)
        queue = self.queue(index)
        for io in [io for _, io in queue._pending.values()]:
            asked = self.asked.pop(io)
            view = self.guest.ram.view(asked.addr, asked.size)
            self.forgotten.append((asked, bytes(view)))
        queue.reset()
        self.bases[index] = 0
        self.tell(index, R.SET_VRING_BASE)

    # The back-end.

    def take(self, index: int, most: int) -> int:
        """The back takes requests of a ring in use, and waits a little if none come.

        Returns how many it took.
        """
        vring = self.back.vrings[index]
        if self.state(index) is State.STOPPED or vring.ring is None:
            return 0
        taken = self.back.take_some(index, most)
        if not taken and self.state(index) is State.RUNNING:
            assert vring.kick is not None
            if not vring.ring.arm():
                readable(vring.kick, 0.005)
                drain(vring.kick)
            taken = self.back.take_some(index, most)
        vring.ring.arm()  # which tells how far it has taken
        return taken

    def signal_error(self, index: int) -> None:
        """The back says that a ring in use is broken."""
        err = self.back.vrings[index].err
        in_use = (State.HELD, State.RUNNING)
        if self.state(index) in in_use and err is not None:
            self.back.give_up(index)
            notify(err)
            wait_until(lambda: self.ring(index).state is State.DEAD, "it is noticed")
            self.life.ring(index).happen(Event.FAULT)

    def back_leaves(self, at: Request, then: Callable[[], None]) -> None:
        """The back hangs up instead of answering this request, which `then` causes; or
        instead of the next one, if it doesn't."""
        self.back.leaves = True
        self.back.moments[at] = self.back.leave
        then()
        self.back.moments = {R.GET_CONFIG: self.back.leave}
        with suppress(Disconnected):
            self.front.get_config(0, 8)
        raise SessionOver

    # The end.

    def settle(self, chosen: int = 0) -> None:
        """If everybody does their part, all comes out that the guest waits for."""
        for index in RINGS:
            self.set_up(index)
            self.tell(index, R.SET_VRING_CALL)
        for index in RINGS:
            self._serve(index, chosen)
        assert not self.asked
        for index in RINGS:
            wait_until(partial(self._is_idle, index), "nothing is held any more")
        assert self._adopted() <= self.left_behind
        for asked, before in self.forgotten:
            assert self.guest.ram.view(asked.addr, asked.size) == before
        self._agree()

    def _serve(self, index: int, chosen: int) -> None:
        queue, ring = self.queue(index), self.back.ring(index)
        call, kick = queue.call_fd, self.back.vrings[index].kick
        assert kick is not None
        queue.kick()
        while True:
            drain(call)
            drain(kick)
            self.back.take_some(index, ENTRIES)
            self.back.finish_some(ENTRIES, chosen)
            self.reap(index)
            if not queue.pending:
                break
            if not (ring.arm() or queue.driver.arm()):
                assert readable_one(call, kick), f"ring {index} stands still"

    def _is_idle(self, index: int) -> bool:
        counters = self.airlock.counters(index)
        return counters["quarantined"] == counters["outstanding"] == 0

    def _adopted(self) -> int:
        return sum(self.airlock.counters(index)["adopted"] for index in RINGS)

    def close(self) -> None:
        """All ends; no message has taken longer than it may."""
        try:
            self.guest.disconnect()
            self.airlock.__exit__(None, None, None)
        finally:
            self.guest.close()
        self.airlock.assert_no_message_took_longer(LATE)


def void(_: object) -> None:
    """A message of which the model knows no effect."""


def readable_one(*fds: HasFileno) -> bool:
    """Does one of them become readable in time?"""
    poll = select.poll()
    for fd in fds:
        poll.register(fd.fileno(), select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))
