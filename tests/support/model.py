# SPDX-License-Identifier: Apache-2.0
"""A model of a pump, in plain Python, beside the real one.

A `Model` holds one lane and queues of what should be where in it. Every method does one
thing to the lane, foretells the outcome, and compares: what one step completes, what
may have changed in guest memory and in isolated memory, who had to be notified, what a
stop hands back, how full the pool is. Only how many chains find room is not foretold;
as many as do must be right.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tests.support.dirty import LogFile, pages_of
from tests.support.plane import MIB, PAGE, AddressSpace, Lane, World
from vhost_airlock.dataplane.pump import shadow_bytes
from vhost_airlock.peers import Buffer, Chain, DeviceRing
from vhost_airlock.peers.ring import DESC_F_INDIRECT, need_event

SMALL = 512
"""Buffers below this are packed together, up to as much in the slot itself."""
TAIL = 64
"""The largest last buffer that the policy used+tail copies always."""
DESCS_A_STEP = 2048
"""A step takes no more chains when it has taken so many descriptors."""
RINGS_AT = 16 * MIB
"""Guest-physical address of the first ring: low, so that a dirty log is small."""
ENTRIES = 8
"""The most buffers of a chain."""

Span = tuple[int, int]
"""An address and a length."""


def power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def up_to(step: int, size: int) -> int:
    return -(-size // step) * step


@dataclass(eq=False)
class Request:
    """One chain of the guest's, from its offer to its end."""

    head: int
    buffers: list[Buffer]
    """Without those of no bytes."""
    pages: range
    """The guest's pages where the buffers lie."""
    given: bytes
    """The bytes that the back is to read."""
    descs: int = 1
    """Descriptors of the guest's that it is made of."""
    position: int = -1
    """Its place among all chains of the ring, in the guest's order."""
    seen: Chain | None = None
    """The chain as the back has it."""
    table: Span | None = None
    """The indirect table which the back has it in."""
    wrote: bytes = b""
    said: int = 0
    returned: bool = False
    """The back has completed it while no ring was there to tell the guest."""

    def is_same(self, other: Request) -> bool:
        """Could nobody tell whether the guest offers this chain or the other one?"""
        return (self.head, self.buffers, self.given) == (
            other.head,
            other.buffers,
            other.given,
        )

    @property
    def size(self) -> int:
        return sum(buffer.length for buffer in self.buffers)

    @property
    def room(self) -> int:
        return sum(buffer.length for buffer in self.buffers if buffer.writable)

    def pool_pages(self, indirect: bool) -> int:
        """How many pages of the pool it takes."""
        pages = small = 0
        for buffer in self.buffers:
            if buffer.length < SMALL:
                small += up_to(64, buffer.length)
            else:
                within = buffer.addr % PAGE + buffer.length
                pages += power_above(-(-within // PAGE))
        if indirect and len(self.buffers) > 1:
            small += up_to(64, 16 * len(self.buffers))
        return pages + (power_above(-(-small // PAGE)) if small > SMALL else 0)

    def expected(self, policy: str, old: bytes) -> bytes:
        """All writable bytes after completion, where `old` stood before."""
        wrote = self.wrote + bytes(self.room - len(self.wrote))
        copied = self.room if policy == "full" else min(self.said, self.room)
        after = wrote[:copied] + old[copied:]
        last = self.buffers[-1]
        if policy == "used+tail" and last.writable and last.length <= TAIL:
            after = after[: -last.length] + wrote[-last.length :]
        return after

    def doubles(self) -> list[Span]:
        """All of isolated memory that is this chain's."""
        assert self.seen is not None
        spans = [(buffer.addr, buffer.length) for buffer in self.seen.buffers]
        return spans if self.table is None else [*spans, self.table]


class Snapshot:
    """Memory at one moment, to say later where it changed: all of it, or a piece."""

    def __init__(self, space: AddressSpace, only: int | None = None) -> None:
        self.space = space
        pieces = space.pieces if only is None else {only: space.pieces[only]}
        self.pieces = {at: bytes(piece.view) for at, piece in pieces.items()}

    def read(self, space: AddressSpace, buffer: Buffer) -> bytes:
        """The bytes of a buffer at that moment."""
        data = b""
        for start, old in self.pieces.items():
            at = buffer.addr + len(data) - start
            if 0 <= at < len(old):
                data += old[at : at + buffer.length - len(data)]
        return data

    def changed_outside(self, allowed: list[Span]) -> list[str]:
        """Where memory changed, other than in `allowed`."""
        return [
            f"{start + where:#x}"
            for start, old in self.pieces.items()
            if (new := bytes(self.space.pieces[start].view)) != old
            for where in self._differences(start, old, new, allowed)
        ]

    @staticmethod
    def _differences(
        start: int, old: bytes, new: bytes, allowed: list[Span]
    ) -> Iterator[int]:
        blank = bytearray(new)
        for address, length in allowed:
            low = max(address - start, 0)
            high = min(address + length - start, len(new))
            if low < high:
                blank[low:high] = old[low:high]
        if blank != old:
            yield next(i for i in range(len(old)) if blank[i] != old[i])

    def changed_pages(self) -> set[int]:
        """The numbers of the pages in which a byte has changed."""
        return {
            (start + at) // PAGE
            for start, old in self.pieces.items()
            if (new := bytes(self.space.pieces[start].view)) != old
            for at in range(0, len(old), PAGE)
            if new[at : at + PAGE] != old[at : at + PAGE]
        }


class GuestPages:
    """Which pages of the guest's are in use by chains, and fresh bytes to put there."""

    def __init__(self, world: World, pages: int, chance: Random) -> None:
        self.chance = chance
        self._noise = chance.randbytes(4 * MIB)
        self._free = [True] * pages
        self._next = 0
        for page in range(pages):
            world.ram.write(page * PAGE, self.noise(PAGE))

    def noise(self, length: int) -> bytes:
        start = self.chance.randrange(len(self._noise) - length + 1)
        return self._noise[start : start + length]

    def take(self, count: int) -> range | None:
        """Take this number of free pages in a row; None: there are not as many."""
        for start in (*range(self._next, len(self._free)), *range(self._next)):
            if len(self._free) - start >= count and all(
                self._free[start : start + count]
            ):
                self._free[start : start + count] = [False] * count
                self._next = start + count
                return range(start, start + count)
        return None

    def give(self, pages: range) -> None:
        self._free[pages.start : pages.stop] = [True] * len(pages)


class Plane:
    """A world, and the models of its lanes, which share its pool."""

    def __init__(
        self, chance: Random, *, pool: Sequence[int], regions: Sequence[int]
    ) -> None:
        """`pool` and `regions`: sizes in pages; the guest's regions are adjacent."""
        starts = [sum(regions[:i]) for i in range(len(regions))]
        self.world = World(
            pool=[pages * PAGE for pages in pool],
            largest=PAGE << (pool[0].bit_length() - 1),
            regions=[
                (start * PAGE, pages * PAGE)
                for start, pages in zip(starts, regions, strict=True)
            ],
            rings_at=RINGS_AT,
        )
        self.pages = GuestPages(self.world, sum(regions), chance)
        self.chain_pages = pool[0]
        """The pages that the largest chain may take, so that it fits an empty pool."""
        self.models: list[Model] = []
        self.log: LogFile | None = None
        self._changed: set[int] = set()
        self._may_be_marked: set[int] = set()

    # The dirty log.

    def log_into(self, log: LogFile | None) -> None:
        """The VMM has a new log; None: it wants none."""
        self.look_at_log()
        old, self.log = self.log, log
        before = Snapshot(self.world.ram)
        if log is None:
            for model in self.models:
                model.lane.pump.set_logging(words=False, buffers=False)
        else:
            self.world.log_into(log)
        allowed = [model.used_ring() for model in self.models if model.running]
        assert before.changed_pages() == set(), "a log changes the guest's memory"
        self.wrote(before, allowed)
        if old is not None:
            assert old.take() == set(), "a page is marked in the log of before"
            assert old.intact()
            old.close()

    def wrote(self, before: Snapshot, allowed: list[Span]) -> None:
        """A pump may have written there since this snapshot, and nobody else has."""
        if self.log is not None:
            self._changed |= before.changed_pages()
            self._may_be_marked |= pages_of(allowed)

    def look_at_log(self) -> None:
        """All pages are marked that pumps have changed since the last look, and none
        that they have not written.
        """
        if self.log is not None:
            marked = self.log.take()
            assert self._changed <= marked, "a change is not marked"
            assert marked <= self._may_be_marked, "a page is marked that nobody wrote"
            self._changed.clear()
            self._may_be_marked.clear()

    def check_pool(self) -> None:
        assert self.world.pool.used == PAGE * sum(m.pool_pages for m in self.models)

    def check_doubles(self) -> None:
        """No two chains have a byte of isolated memory in common."""
        spans = [
            span
            for model in self.models
            for request in model.held()
            for span in request.doubles()
        ]
        spans += [model.shadow_span() for model in self.models]
        end = 0
        for start, length in sorted(spans):
            assert start >= end, "two chains share isolated memory"
            end = start + length

    def settle(self) -> None:
        """The backs complete all that they have, until nothing is left anywhere."""
        for _ in range(100_000):
            busy = False
            for model in self.models:
                if model.awaited and not model.pending:
                    # A ring that was reset is like one that goes on, till it is used.
                    busy |= model.offer([(16, None)], 0, "direct")
                model.take(1 << 16)
                for request in model.with_back():
                    if model.can_finish(request):
                        model.finish(request, 0, 0)
                busy |= bool(model.finished)
                busy |= model.step(256) > 0
                model.reap()
            if not busy:
                break
        for model in self.models:
            assert not model.pending, "chains wait though there is all room"
            assert not model.held()
            assert model.lane.pump.quarantined == 0
        assert self.world.pool.used == 0
        self.look_at_log()
        self.world.check()


class Model:
    """One ring: the real lane, and what we know about it."""

    def __init__(self, plane: Plane, lane: Lane, policy: str) -> None:
        self.plane = plane
        self.world = plane.world
        self.lane = lane
        self.policy = policy
        # Offered by the guest; not in the shadow ring.
        self.pending: deque[Request] = deque()
        # In the shadow ring; the back has not taken them.
        self.visible: deque[Request] = deque()
        self.taken: list[Request] = []
        # Completed by the back; the pump has not looked. None: a bad completion.
        self.finished: deque[Request | None] = deque()
        # In the guest's used ring, with what is said there; it has not looked.
        self.completed: deque[tuple[Request, int]] = deque()
        # By slot: offered to the back and not completed for the guest.
        self.flight: dict[int, Request] = {}
        # By slot: left behind by a stop, and the guest may wait for it.
        self.parked: dict[int, Request] = {}
        # Those of them that the guest has yet to offer again, in its order.
        self.awaited: deque[Request] = deque()
        # By slot: left behind by a stop, and the guest waits for it no more.
        self.quarantine: dict[int, Request] = {}
        # The guest never gets these back.
        self.lost: list[Request] = []
        self.totals = {"chains": 0, "completions": 0, "violations": 0, "adopted": 0}
        # The position of the next chain to take, and where the ring began.
        self.next = self.began = 0
        self.base = lane.pump.base
        self.running = True
        self.guest_sleeps = False
        # Pages with which it has enough in flight.
        self.window: float = math.inf
        # The guest was called in this ring's life; it is to be called already.
        self.called = self.call_due = False
        self._started()

    def set_window(self, pages: int) -> None:
        """The ring may have so much in flight until its next start."""
        self.window = pages
        self.lane.pump.set_window(pages * PAGE)

    def _started(self) -> None:
        lane = self.lane
        self.window = math.inf
        self.spy = DeviceRing(lane.shadow, self.world.isolated.view)
        # Of chains in this shadow ring: where they began, how many were offered, and
        # how many of these the back has fetched for sure.
        self.first = self.next
        self.offered = 0
        self.least_fetched = 0
        # Bad completions since the start, and those in a row.
        self.bad = self.strikes = 0
        self.stalled = False
        # The pump rests: guest and back must notify it of chains.
        self.asleep = False
        self.guest_armed: bool | None = None
        self.back_armed: bool | None = None
        self.back_sleeps = False

    def held(self) -> list[Request]:
        """All chains that have a slot, and buffers in isolated memory."""
        return [
            *self.flight.values(),
            *self.parked.values(),
            *self.quarantine.values(),
        ]

    def with_back(self) -> list[Request]:
        """The chains that the back has taken and may complete, of any of its rings."""
        left = (*self.parked.values(), *self.quarantine.values())
        return [*self.taken, *(request for request in left if not request.returned)]

    @property
    def pool_pages(self) -> int:
        return sum(r.pool_pages(self.lane.back_indirect) for r in self.held())

    # The guest.

    def offer(
        self, lengths: Sequence[tuple[int, int | None]], readable: int, form: str
    ) -> bool:
        """Offer a chain, cut to what is possible at all. False: no room for it now.

        `lengths`: bytes and the offset in the page, None: right behind the one before.
        """
        lane = self.lane
        wanted = self._fitting(lengths, readable)
        present = [buffer for buffer in wanted if buffer.length]
        indirect = form != "direct" and lane.guest_indirect
        direct = min(2, len(wanted) - 1) if form == "both" else 0
        if len(wanted) - direct > 1 and not indirect:
            direct = len(wanted)
        if (direct + indirect if indirect else len(wanted)) > len(lane.driver.free):
            return False
        pages = self.plane.pages.take(
            1 + max(b.addr + b.length for b in wanted) // PAGE
        )
        if pages is None:
            return False
        self.plane.pages.chance.shuffle(lane.driver.free)
        moved = [b._replace(addr=b.addr + pages.start * PAGE) for b in wanted]
        present = [buffer for buffer in moved if buffer.length]
        given = b""
        for buffer in present:
            if not buffer.writable:
                data = self.plane.pages.noise(buffer.length)
                self.world.ram.write(buffer.addr, data)
                given += data
        head = lane.offer(*moved, indirect=indirect, direct=direct)
        descs = len(wanted) + (indirect and len(wanted) > direct)
        self.pending.append(Request(head, present, pages, given, descs))
        kicked = lane.driver.kick_needed()
        if self.guest_armed is not None:
            assert not (kicked and not self.guest_armed), "a kick that nobody wants"
            assert kicked or not (self.asleep and self.guest_armed), "a kick is missing"
            self.asleep = self.asleep and not kicked
        return True

    def _fitting(
        self, lengths: Sequence[tuple[int, int | None]], readable: int
    ) -> list[Buffer]:
        """Buffers from address 0 on, as many as could ever find room."""
        buffers: list[Buffer] = []
        end = 0
        for i, (length, offset) in enumerate(lengths[:ENTRIES]):
            start = end if offset is None else up_to(PAGE, end) + offset
            buffers.append(Buffer(start, length, i >= readable))
            end = start + length
        if not self.lane.guest_indirect:
            del buffers[self.lane.size :]
        while buffers and not self._possible(buffers):
            buffers.pop()
        if not any(buffer.length for buffer in buffers):
            return [Buffer(0, 16, readable == 0)]
        return buffers

    def _possible(self, buffers: list[Buffer]) -> bool:
        present = [buffer for buffer in buffers if buffer.length]
        indirect = self.lane.back_indirect
        pages = Request(0, present, range(0), b"").pool_pages(indirect)
        enough = indirect or len(present) <= self.lane.size
        return pages <= self.plane.chain_pages and enough

    def rewrite(self, request: Request) -> None:
        """The guest puts other bytes into a chain that it has offered already."""
        request.given = b""
        for buffer in request.buffers:
            if not buffer.writable:
                data = self.plane.pages.noise(buffer.length)
                self.world.ram.write(buffer.addr, data)
                request.given += data

    def reap(self) -> None:
        """The guest takes back what was completed."""
        expected = [(request.head, length) for request, length in self.completed]
        assert self.lane.used() == expected
        for request, _ in self.completed:
            self.plane.pages.give(request.pages)
        self.completed.clear()
        self.guest_sleeps = False

    def guest_waits(self) -> None:
        """The guest wants a call for what comes next."""
        self.guest_sleeps = not self.lane.driver.arm()
        assert self.guest_sleeps == (not self.completed)

    def guest_looks(self) -> None:
        """The guest looks by itself."""
        self.lane.driver.disarm()
        self.guest_sleeps = False

    # The pump.

    def step(self, budget: int) -> int:
        """One pass; how many chains moved."""
        lane = self.lane
        if not self.running:
            assert lane.pump.step(budget) == (0, self.call_due, False)
            self.call_due = False
            return 0
        ram, isolated = Snapshot(self.world.ram), Snapshot(self.world.isolated)
        used_idx, avail_idx = lane.ring.used_idx, lane.shadow.avail_idx
        before = self.totals["violations"]
        reaped, done = self._reap(budget)
        skipped = self.totals["violations"] - before

        moved, call, kick = lane.pump.step(budget)
        adopted = self._adopt(budget, done)
        fresh = self._look_at_fresh()
        taken = [*adopted, *fresh]
        assert lane.pump.fault == 0, lane.fault
        assert moved == reaped + len(taken)
        assert len(taken) <= budget
        self._check_guest_memory(ram, done)
        self._check_isolated_memory(isolated, fresh)
        self._check_call(call, len(done), used_idx)
        self._check_kick(kick, len(fresh), avail_idx)

        self.stalled = bool(self.pending) and not self._enough(taken, budget)
        if self.stalled:
            self._check_stall()
        if taken or self.stalled:
            self.guest_armed = self.guest_armed and False
        if reaped or skipped:
            self.back_armed = self.back_armed and False
        self.asleep = False
        self.totals["chains"] += len(taken)
        self._check_numbers()
        if fresh:
            self.plane.check_doubles()
        return moved

    @staticmethod
    def _enough(taken: list[Request], budget: int) -> bool:
        """Has a step passed on so much that it ends?"""
        return (
            len(taken) >= budget
            or sum(request.size for request in taken) >= MIB
            or sum(request.descs for request in taken) >= DESCS_A_STEP
        )

    def _check_numbers(self) -> None:
        pump = self.lane.pump
        counters = pump.counters()
        assert {name: counters[name] for name in self.totals} == self.totals
        assert pump.outstanding == len(self.flight)
        returned = sum(request.returned for request in self.parked.values())
        left = len(self.parked) + len(self.quarantine)
        assert pump.quarantined == left - returned
        self.plane.check_pool()

    def _reap(self, budget: int | None) -> tuple[int, list[Request]]:
        """Return (number of chains that will be found completed in the shadow ring,
        those of them that the guest gets).

        In whole batches these are all chains that the back shows now, whatever the
        budget is; so they are after a stop, where there is no budget.
        """
        size = self.lane.size
        done: list[Request] = []
        reaped = 0
        most = size
        if budget is None and not self.with_back():
            return 0, []
        if budget is not None and not self.lane.whole_batches:
            most = min(budget, max(4, len(self.flight) // 4))
        while self.finished and reaped < most:
            request = self.finished.popleft()
            if request is None or request not in self.held():
                self.totals["violations"] += 1
                self.strikes += 1
                if self.strikes > size:
                    break
                continue
            self.strikes = 0
            reaped += 1
            if self._end(request):
                done.append(request)
        return reaped, done

    def _end(self, request: Request) -> bool:
        """The back has completed a chain. Does the guest get it at once?"""
        assert request.seen is not None
        slot = request.seen.head
        if slot in self.parked:
            request.returned = True
            return False
        if self.quarantine.pop(slot, None) is not None:
            return False
        del self.flight[slot]
        if request.position >= self.first:
            place = request.position - self.first
            self.least_fetched = max(self.least_fetched, place + 1)
        self._complete(request)
        return True

    def _complete(self, request: Request) -> None:
        self.completed.append((request, min(request.said, request.room)))
        self.totals["completions"] += 1

    def _adopt(self, budget: int, done: list[Request]) -> list[Request]:
        """What a step takes for chains that the back has still, in the guest's order.

        Those of them that have come back already are done too.
        """
        adopted: list[Request] = []
        while self.pending and self.awaited and not self._enough(adopted, budget):
            request, offered = self.awaited[0], self.pending[0]
            if not request.is_same(offered):
                self._disown(self.awaited)
                break
            self.pending.popleft()
            self.awaited.popleft()
            request.pages, request.descs = offered.pages, offered.descs
            request.position = self.next
            self.next += 1
            self._resume(request, done)
            adopted.append(request)
            self.first = self.next
        self.totals["adopted"] += len(adopted)
        return adopted

    def _resume(self, request: Request, done: list[Request]) -> None:
        """The guest waits for a chain again that was left behind."""
        assert request.seen is not None
        del self.parked[request.seen.head]
        if request.returned:
            self._complete(request)
            done.append(request)
        else:
            self.flight[request.seen.head] = request
            if request not in self.finished:
                self.taken.append(request)

    def _disown(self, left: deque[Request]) -> None:
        """The guest waits for none of these chains any more."""
        for request in left:
            assert request.seen is not None
            del self.parked[request.seen.head]
            if not request.returned:
                self.quarantine[request.seen.head] = request
        self.lost += left
        left.clear()

    def _look_at_fresh(self) -> list[Request]:
        """Return the chains that a step has put in the shadow ring, in order."""
        fresh = []
        slots = {r.seen.head for r in self.held() if r.seen is not None}
        while chain := self.spy.take():
            assert self.pending, "a chain that the guest did not offer"
            assert not self.awaited, "a chain that the back has still"
            request = self.pending.popleft()
            request.seen, request.position = chain, self.next
            self._check_chain(request, chain)
            assert chain.head not in slots, "the back has this slot's chain still"
            slots.add(chain.head)
            self.flight[chain.head] = request
            self.visible.append(request)
            self.next += 1
            self.offered += 1
            fresh.append(request)
        return fresh

    def _check_chain(self, request: Request, chain: Chain) -> None:
        """Check that the back sees the guest's chain, and that its memory is clean."""
        assert [(b.length, b.writable) for b in chain.buffers] == [
            (b.length, b.writable) for b in request.buffers
        ]
        for double, buffer in zip(chain.buffers, request.buffers, strict=True):
            grain, offset = (64, 0) if buffer.length < SMALL else (PAGE, buffer.addr)
            assert double.addr % grain == offset % grain
        assert self.lane.bytes_of(chain) == request.given
        for view in self.lane.writable(chain):
            assert not any(view)
        desc = self.lane.shadow.read_desc(chain.head)
        if desc.flags & DESC_F_INDIRECT:
            request.table = desc.addr, desc.length

    def _check_guest_memory(self, before: Snapshot, done: list[Request]) -> None:
        allowed = [self.used_ring()]
        for request in done:
            buffers = [buffer for buffer in request.buffers if buffer.writable]
            old = b"".join(before.read(self.world.ram, buffer) for buffer in buffers)
            new = b"".join(self.world.ram.read(b.addr, b.length) for b in buffers)
            assert new == request.expected(self.policy, old)
            allowed += [(buffer.addr, buffer.length) for buffer in buffers]
        assert before.changed_outside(allowed) == []
        self.plane.wrote(before, allowed)

    def _check_isolated_memory(self, before: Snapshot, fresh: list[Request]) -> None:
        allowed = [self.shadow_span()]
        for request in fresh:
            allowed += request.doubles()
        assert before.changed_outside(allowed) == []

    def used_ring(self) -> Span:
        layout = self.lane.layout
        return self.lane.ring_at + layout.used, layout.used_size

    def shadow_span(self) -> Span:
        """The shadow ring that is in use."""
        return self.lane.area_at, shadow_bytes(self.lane.size)

    def _check_call(self, call: bool, done: int, old: int) -> None:
        """`call`: the pump says so. A call that was due from the start counts too."""
        wanted = self._completions_shown(done, old) or self.call_due
        self.call_due = False
        assert call == wanted
        assert call or not (self.guest_sleeps and done), "a call is missing"
        self.guest_sleeps = self.guest_sleeps and not call

    def _completions_shown(self, done: int, old: int) -> bool:
        """So many were shown, from this used index on. Does the guest want a call?"""
        ring = self.lane.ring
        assert ring.used_idx == (old + done) & 0xFFFF
        if self.lane.guest_event_idx:
            wanted = need_event(ring.used_event, ring.used_idx, old)
            wanted = wanted or not self.called
        else:
            wanted = not ring.avail_flags & 1
        self.called = self.called or done > 0
        return done > 0 and wanted

    def _check_kick(self, kick: bool, fresh: int, old: int) -> None:
        ring = self.lane.shadow
        assert ring.avail_idx == (old + fresh) & 0xFFFF
        if self.lane.back_event_idx:
            wanted = need_event(ring.avail_event, ring.avail_idx, old)
        else:
            wanted = not ring.used_flags & 1
        assert kick == (fresh > 0 and wanted)
        assert kick or not (self.back_sleeps and fresh), "a kick to the back is missing"
        self.back_sleeps = self.back_sleeps and not kick

    def _check_stall(self) -> None:
        """A chain that waits has a reason."""
        indirect = self.lane.back_indirect
        needed = 1 if indirect else len(self.pending[0].buffers)
        # One of an earlier ring has its slot, but no descriptors.
        taken = sum(
            1 if indirect or r.position < self.first else len(r.buffers)
            for r in self.flight.values()
        )
        left = [*self.parked, *self.quarantine]
        slots = self.lane.size - taken - sum(slot < self.lane.size for slot in left)
        used = self.lane.counter("used")
        enough = bool(self.flight) and used >= self.window * PAGE
        assert needed > slots or self.world.pool.used or enough, (
            "a chain waits without need"
        )

    def rest(self) -> None:
        """The pump asks for notifications, or finds that there is something."""
        waits = self.running and bool(self.pending) and not self.stalled
        more = self.running and bool(self.finished)
        before = Snapshot(self.world.ram, only=self.lane.ring_at)
        assert self.lane.pump.rest() == (waits or more)
        if not self.running:
            return
        assert before.changed_outside([self.used_ring()]) == []
        self.plane.wrote(before, [self.used_ring()])
        self.asleep = not (waits or more)
        self.back_armed = True
        if not self.stalled:
            self.guest_armed = True

    # The back.

    def take(self, count: int) -> None:
        """The back fetches chains, at most so many."""
        while self.visible and count:
            request = self.visible.popleft()
            assert self.lane.device.take() == request.seen
            self.taken.append(request)
            self.back_sleeps = False
            count -= 1
        if not self.visible and self.running:
            assert self.lane.device.take() is None

    def can_finish(self, request: Request) -> bool:
        """Has the used ring room, and is this not there already?"""
        room = len(self.finished) < self.lane.size
        return room and request not in self.finished

    def finish(self, request: Request, length: int, said: int) -> None:
        """The back writes so many bytes, as far as there is room, and completes."""
        lane = self.lane
        assert request.seen is not None
        request.wrote = self.plane.pages.noise(min(length, request.room))
        request.said = said
        if request in self.taken:
            self.taken.remove(request)
        self.finished.append(request)
        lane.complete(request.seen, request.wrote, length=said)
        self._completed()

    def finish_bad(self, slot: int) -> None:
        """The back completes what can't be in flight."""
        self.lane.device.complete(slot, 1)
        self.lane.device.publish()
        self.finished.append(None)
        self.bad += 1
        self._completed()

    def _completed(self) -> None:
        called = self.lane.device.call_needed()
        if self.back_armed is not None:
            assert not (called and not self.back_armed), "a call that nobody wants"
            assert called or not self.asleep, "a call is missing"
            self.asleep = self.asleep and not called

    def back_waits(self) -> None:
        self.back_sleeps = not self.lane.device.arm()
        assert self.back_sleeps == (not self.visible)

    def back_looks(self) -> None:
        self.lane.device.disarm()
        self.back_sleeps = False

    # Stop and start.

    def stop(self, said: int | None) -> tuple[int, bool]:
        """The ring stops, and the back says so. (Unfinished chains, are they last?)"""
        fetched = self.least_fetched
        if said is not None:
            claimed = fetched + ((said - fetched) & 0xFFFF)
            fetched = claimed if claimed <= self.offered else fetched
        end = self.first + fetched
        by_position = sorted(self.flight.values(), key=lambda r: r.position)
        back = [request for request in by_position if request.position >= end]
        left = [request for request in by_position if request.position < end]
        first = end - len(left)
        last = [request.position for request in left] == [*range(first, end)]
        self.goes_on_at = first if last else end
        base = (self.base + self.goes_on_at - self.began) & 0xFFFF

        ram, isolated = Snapshot(self.world.ram), Snapshot(self.world.isolated)
        assert self.lane.stop(said) == (base, len(left), last)
        layout = self.lane.layout
        used = self.lane.ring_at + layout.used
        flags, event = (used, 2), (used + 4 + 8 * self.lane.size, 2)
        assert ram.changed_outside([flags, event]) == []
        self.plane.wrote(ram, [flags, event])
        assert isolated.changed_outside([]) == []

        self.stopped_at = base, self.lane.ring.used_idx, self.lane.size
        for request in reversed(back):
            self.pending.appendleft(self._offered_again(request))
        self.parked |= {r.seen.head: r for r in left if r.seen is not None}
        self.left = left if last else []
        self.flight.clear()
        self.visible.clear()
        self.taken.clear()
        self.running = False
        self.asleep = self.stalled = False
        self.guest_armed = self.back_armed = None
        self._check_numbers()
        return len(left), last

    def look_back(self) -> None:
        """While the ring is stopped, see what the back has completed in it."""
        before = Snapshot(self.world.ram), Snapshot(self.world.isolated)
        self._reap(None)
        self.lane.pump.look_back()
        for snapshot in before:
            assert snapshot.changed_outside([]) == []
        self._check_numbers()

    def start(self, *, skip: bool = False) -> None:
        """The ring goes on where it stopped; with `skip` behind what is unfinished."""
        base, _, _ = self.stopped_at
        if skip:
            base += len(self.left)
        else:
            for request in reversed(self.left):
                self.pending.appendleft(self._offered_again(request))
        self._start(base & 0xFFFF)

    @staticmethod
    def _offered_again(request: Request) -> Request:
        """The same chain of the guest, to which its pages go."""
        again = Request(
            request.head, request.buffers, request.pages, request.given, request.descs
        )
        request.pages = range(0)
        return again

    def start_anew(self, base: int, size: int) -> None:
        """The guest resets its driver: whatever it had offered is forgotten."""
        gone = [*self.lost, *self.parked.values(), *self.pending]
        for request in (*gone, *(request for request, _ in self.completed)):
            self.plane.pages.give(request.pages)
            request.pages = range(0)
        self.lost.clear()
        self.pending.clear()
        self.completed.clear()
        self._reap(None)
        self.finished.clear()
        self.lane.reset(base, size)
        self.guest_sleeps = False
        self._start(base)

    def _start(self, base: int) -> None:
        """The ring starts. What the last stop left behind is the guest's again, or
        nobody's, if it does not start just where and as it has stopped.
        """
        lane = self.lane
        self._reap(None)
        self.finished.clear()
        if self.stopped_at == (base, lane.ring.used_idx, lane.size) and self.parked:
            self.next = self.goes_on_at
        else:
            self._disown(deque(self.parked.values()))
        self.called = False
        done: list[Request] = []
        for _, request in sorted(self.parked.items()):
            if request.position < self.next:
                self._resume(request, done)
        in_order = sorted(self.parked.values(), key=lambda r: r.position)
        self.awaited = deque(in_order)

        ram, isolated = Snapshot(self.world.ram), Snapshot(self.world.isolated)
        used_idx = lane.ring.used_idx
        lane.start(base)
        self.base, self.began = base, self.next
        self._check_guest_memory(ram, done)
        self._check_isolated_memory(isolated, [])
        self.call_due |= self._completions_shown(len(done), used_idx)
        assert self.call_due or not (self.guest_sleeps and done), "a call is missing"
        self.running = True
        self.left = []
        self._started()
        self._check_numbers()
