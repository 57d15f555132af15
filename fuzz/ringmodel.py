# SPDX-License-Identifier: Apache-2.0
"""One ring through a real pump, and beside it a model of the pump.

Guest and back both are hostile here: a target writes any bytes into guest memory and
into isolated memory. Before each step the model reads the same memory, by the
specification and in the plainest way, and foretells all of the guest's memory, the
chains that the back gets, and whether the ring is broken. Only the number of chains
that find room is not foretold.

This tests I1, I3, I4, I5 to I8 for any content of these memories. With a dirty log, the
pages that are marked are exactly those that the model has written.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from tests.support.dirty import LogFile, pages_of
from tests.support.model import SMALL, TAIL, Request
from tests.support.plane import MIB, PAGE, AddressSpace, Lane, World
from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.peers import Buffer
from vhost_airlock.peers.ring import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

REGIONS = ((0, 2 * PAGE), (2 * PAGE, 2 * PAGE), (1 << 32, 2 * PAGE))
"""Two adjacent regions, and one behind a hole."""
RING_AT = (1 << 32) + MIB
LOGGED = RING_AT + 8 * MIB
"""Where the memory of the largest ring has ended for sure."""
POOL = 48 * PAGE
LARGEST = 32 * PAGE
MOST_SEGMENTS = 1024
DESCS_A_STEP, BYTES_A_STEP = 2048, 1 << 20
"""A step takes or completes no more chains after this number of descriptors, or bytes.
"""
TABLE_ENTRIES = 1040
"""Descriptors in the memory for the guest's indirect tables."""
PATTERN = bytes(range(1, 252)) * 600


class Malformed(Exception):
    """The guest broke its ring."""


class GuestImage:
    """A copy of the guest's memory, in which the model does what the pump shall do."""

    def __init__(self, ram: AddressSpace, log: LogFile | None) -> None:
        self.ram = ram
        self.log = log
        self.written: set[int] = set()
        """Pages that were written since the last look at the log."""
        self.load()

    def load(self) -> None:
        """Take over what the guest has changed."""
        pieces = sorted(self.ram.pieces.items())
        self.pieces = [(at, bytearray(memory.view)) for at, memory in pieces]

    def check(self) -> None:
        """Check that the real memory is as foretold, and the dirty log."""
        for at, data in self.pieces:
            assert bytes(self.ram.pieces[at].view) == data, f"guest memory at {at:#x}"
        if self.log is not None:
            assert self.log.take() == self.written
        self.written.clear()

    def read(self, address: int, size: int) -> bytes:
        data = b""
        for start, piece in self.pieces:
            at = address + len(data) - start
            if 0 <= at < len(piece):
                data += piece[at : at + size - len(data)]
        if len(data) < size:
            raise Malformed("outside of memory")
        return data

    def write(self, address: int, data: bytes) -> None:
        self.written |= pages_of([(address, len(data))])
        for start, piece in self.pieces:
            at = address - start
            if 0 <= at < len(piece):
                run = data[: len(piece) - at]
                piece[at : at + len(run)] = run
                address += len(run)
                data = data[len(run) :]
        assert not data


@dataclass(frozen=True)
class Options:
    size: int
    base: int = 0
    guest_event_idx: bool = False
    guest_indirect: bool = True
    back_event_idx: bool = False
    back_indirect: bool = True
    policy: str = "full"
    whole_batches: bool = False
    logs: bool = False


@cache
def kept_log() -> LogFile:
    """A dirty log, shared from run to run too."""
    return LogFile.up_to(LOGGED, offset=3)


@cache
def kept_lane(size: int) -> Lane:
    """Memory for rings of one size, shared from run to run, for it is expensive."""
    world = World(pool=POOL, largest=LARGEST, regions=REGIONS, rings_at=RING_AT)
    return Lane(world, size=size, entries=-(-TABLE_ENTRIES // size), start=False)


class RingModel:
    """One run of one ring."""

    def __init__(self, options: Options) -> None:
        self.lane = lane = kept_lane(options.size)
        self.world = lane.world
        for memory in self.world.ram.pieces.values():
            memory.view[:] = PATTERN[: memory.size]
        lane.ring.desc[:] = bytes(len(lane.ring.desc))
        lane.ring.avail_flags = 0
        lane.ring.avail_idx = options.base
        lane.ring.used_idx = options.base
        self._renew_pool()
        lane.policy = options.policy
        lane.guest_event_idx = options.guest_event_idx
        lane.guest_indirect = options.guest_indirect
        lane.back_event_idx = options.back_event_idx
        lane.back_indirect = options.back_indirect
        lane.whole_batches = options.whole_batches
        lane.renew()
        log = kept_log() if options.logs else None
        if log is not None:
            log.take()
            self.world.memory.set_log(*log.place)
            lane.pump.set_logging(words=True, buffers=True)
        self.image = GuestImage(self.world.ram, log)
        # Chains by slot: in flight, parked by a stop, in quarantine.
        self.flight: dict[int, Request] = {}
        self.parked: dict[int, Request] = {}
        self.quarantine: dict[int, Request] = {}
        self.awaited: list[Request] = []
        self.doubles: dict[int, list[bytes]] = {}
        self.violations = 0
        self.next = 0
        self.goes_on_at = 0
        self.busy: set[int] = set()
        self.stopped_at: tuple[int, int] | None = None
        self._begin(options.base, options.base)

    def _renew_pool(self) -> None:
        """Use the same memory again, emptied."""
        self.world.pool = Pool(POOL, largest=LARGEST)
        back, memory = next(iter(self.world.isolated.pieces.items()))
        self.pool_memory = memory
        self.world.pool.add_region(memory.address, back, memory.size)

    def start(self, told: int) -> None:
        """Start the ring once more; parked chains go on, or are in quarantine.

        `told`: the base that the VMM tells.
        """
        self._reap_left()
        self.image.load()
        done = False
        self.used_idx = self._guest_word(self.lane.layout.used + 2)
        if self.image.log is not None:
            self._show_used()
        # No ring has completed more chains than it has taken.
        possible = (told - self.used_idx) & 0xFFFF <= self.lane.size
        base = told if possible else self.used_idx
        if self.parked and self.stopped_at == (base, self.used_idx):
            self.next = self.goes_on_at
        else:
            self._disown([*self.parked])
        self.busy = set()
        self._see_doubles()
        for slot, request in sorted(self.parked.items()):
            if request.position < self.next:
                self.busy.add(request.head)
                done |= self._resume(slot)
        self.awaited = sorted(self.parked.values(), key=lambda r: r.position)
        if done:
            self._show_used()
        self._begin(base, told)
        assert self.lane.pump.base == base
        self.image.check()
        self._check_held()

    def _begin(self, base: int, told: int) -> None:
        self.lane.start(told)
        if self.stopped_at is None:
            self.image.load()
            self.used_idx = self._guest_word(self.lane.layout.used + 2)
            if self.image.log is not None:
                self._show_used()
            self.image.check()
        self.base = self.seen = self.limit = base
        self.began = self.first = self.next
        self.held: list[Buffer] | None = None
        self.held_head = self.held_descs = 0
        self.reaped = self.reap_limit = 0
        self.strikes = 0
        self.broken = self.back_broken = False

    def look_back(self) -> None:
        """The back may have completed parked chains in the old ring."""
        self._reap_left()
        self.lane.pump.look_back()
        self._check_held()

    def _reap_left(self) -> None:
        if any(not r.returned for r in self._left()):
            while self._reap() is not None:
                pass

    def _left(self) -> list[Request]:
        return [*self.parked.values(), *self.quarantine.values()]

    def _all_held(self) -> list[Request]:
        return [*self.flight.values(), *self._left()]

    def _resume(self, slot: int) -> bool:
        """The guest waits for this chain again. Has it come back already?"""
        request = self.parked.pop(slot)
        if request.returned:
            self._finish(request, request.said, self.doubles[slot])
        else:
            self.flight[slot] = request
        return request.returned

    def _disown(self, slots: list[int]) -> None:
        """The guest waits for these chains no more."""
        for slot in slots:
            request = self.parked.pop(slot)
            if not request.returned:
                self.quarantine[slot] = request
        self.awaited = []

    def _see_doubles(self) -> None:
        """The bytes in isolated memory of chains that the guest may offer again."""
        view = self.world.isolated.view
        self.doubles = {
            slot: [bytes(view(b.addr, b.length)) for b in request.seen.buffers]
            for slot, request in self.parked.items()
            if request.seen is not None
        }

    # The guest's ring by the specification.

    def _guest_word(self, offset: int) -> int:
        return int.from_bytes(self.image.read(self.lane.ring_at + offset, 2), "little")

    def _next_head(self) -> int | None:
        """Return the place where the next chain begins; None: there is none."""
        layout, size = self.lane.layout, self.lane.size
        if self.seen == self.limit:
            limit = self._guest_word(layout.avail + 2)
            if (limit - self.seen) & 0xFFFF > size:
                raise Malformed("index")
            self.limit = limit
            if self.seen == limit:
                return None
        head = self._guest_word(layout.avail + 4 + 2 * (self.seen % size))
        if head >= size or head in self.busy:
            raise Malformed(f"head {head}")
        return head

    def _chain(self, head: int) -> list[Buffer]:
        lane = self.lane
        self.held_descs = 0
        table = self.image.read(lane.ring_at + lane.layout.desc, 16 * lane.size)
        buffers = self._walk(table, head, lane.guest_indirect)
        if not buffers or len(buffers) > MOST_SEGMENTS:
            raise Malformed(f"{len(buffers)} buffers")
        if any(a.writable and not b.writable for a, b in pairwise(buffers)):
            raise Malformed("order")
        if sum(buffer.length for buffer in buffers) >= 1 << 32:
            raise Malformed("too long")
        return buffers

    def _walk(self, table: bytes, index: int, may_nest: bool) -> list[Buffer]:
        buffers: list[Buffer] = []
        count = len(table) // DESC.size
        for _ in range(count):
            if index >= count:
                raise Malformed(f"next {index}")
            self.held_descs += 1
            addr, length, flags, index = DESC.unpack_from(table, DESC.size * index)
            if flags & DESC_F_INDIRECT:
                entries, odd = divmod(length, DESC.size)
                possible = 0 < entries <= MOST_SEGMENTS and not odd
                if not may_nest or flags & DESC_F_NEXT or not possible:
                    raise Malformed("indirect")
                return buffers + self._walk(self.image.read(addr, length), 0, False)
            if length:
                if length > sum(size for _, size in REGIONS) * 4:
                    raise Malformed("longer than all memory")
                self.image.read(addr, length)
                buffers.append(Buffer(addr, length, bool(flags & DESC_F_WRITE)))
            if not flags & DESC_F_NEXT:
                return buffers
        raise Malformed("loop")

    # A step.

    def step(self) -> None:
        """Step until no chain moves."""
        while self._one_step():
            pass

    def _one_step(self) -> int:
        lane = self.lane
        self.image.load()
        self._see_doubles()
        done = 0 if self.back_broken else self._collect()
        before = lane.pump.counters()
        moved, _, _ = lane.pump.step(1 << 15)
        after = lane.pump.counters()
        fresh = after["chains"] - before["chains"]
        if self.broken or self.back_broken:
            assert fresh == 0
        else:
            adopted = self._forward(fresh)
            assert after["adopted"] - before["adopted"] == adopted
            if fresh:
                self._check_doubles()
        self.image.check()
        assert moved == done + fresh
        assert bool(lane.pump.fault) == (self.broken or self.back_broken), lane.fault
        self._check_held()
        return moved

    def _check_held(self) -> None:
        pump = self.lane.pump
        assert self.lane.counter("violations") == self.violations
        assert pump.outstanding == len(self.flight)
        assert pump.quarantined == sum(not r.returned for r in self._left())
        pages = sum(r.pool_pages(self.lane.back_indirect) for r in self._all_held())
        assert self.world.pool.used == PAGE * pages

    def _collect(self) -> int:
        """The chains that the back says are done, as far as that is possible."""
        reaped = segments = 0
        finished = False
        most = max(4, len(self.flight) // 4)
        whole = self.lane.whole_batches
        while whole or (reaped < most and segments < DESCS_A_STEP):
            taken = self._reap()
            if taken is None:
                break
            request, was_in_flight = taken
            finished |= was_in_flight
            segments += len(request.buffers)
            reaped += 1
        if finished:
            self._show_used()
        return reaped

    def _reap(self) -> tuple[Request, bool] | None:
        """Return (the next chain that the back has completed, is it for the guest?)."""
        lane, shadow = self.lane, self.lane.shadow
        while True:
            if self.reaped == self.reap_limit:
                limit = shadow.used_idx
                if (limit - self.reaped) & 0xFFFF > lane.size:
                    self.back_broken = True
                    return None
                self.reap_limit = limit
                if self.reaped == limit:
                    return None
            slot, said = shadow.used_entry(self.reaped % lane.size)
            self.reaped = (self.reaped + 1) & 0xFFFF
            ended = self._end(slot, said)
            if ended is not None:
                self.strikes = 0
                return ended
            self.violations += 1
            self.strikes += 1
            if self.strikes > lane.size:
                self.back_broken = True
                return None

    def _end(self, slot: int, said: int) -> tuple[Request, bool] | None:
        """The back completes the chain in this slot, if it has one."""
        if slot in self.flight:
            request = self.flight.pop(slot)
            assert request.seen is not None
            view = self.world.isolated.view
            doubles = [bytes(view(b.addr, b.length)) for b in request.seen.buffers]
            self._finish(request, said, doubles)
            return request, True
        if slot in self.quarantine:
            return self.quarantine.pop(slot), False
        if slot in self.parked and not self.parked[slot].returned:
            request = self.parked[slot]
            request.returned, request.said = True, said
            return request, False
        return None

    def _show_used(self) -> None:
        self._set_used(2, self.used_idx.to_bytes(2, "little"))

    def _set_used(self, offset: int, data: bytes) -> None:
        self.image.write(self.lane.ring_at + self.lane.layout.used + offset, data)

    def _finish(self, request: Request, said: int, doubles: list[bytes]) -> None:
        left = request.room if self.lane.policy == "full" else min(said, request.room)
        for buffer, data in zip(request.buffers, doubles, strict=True):
            if buffer.writable:
                size = min(left, buffer.length)
                left -= size
                last = buffer is request.buffers[-1]
                if self.lane.policy == "used+tail" and last and buffer.length <= TAIL:
                    size = buffer.length
                self.image.write(buffer.addr, data[:size])
        element = struct.pack("<II", request.head, min(said, request.room))
        self._set_used(4 + 8 * (self.used_idx % self.lane.size), element)
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.busy.discard(request.head)

    def _forward(self, fresh: int) -> int:
        """`fresh` chains were taken, which must be the guest's next. Return the number
        of chains that the back had still.
        """
        adopted = size = descs = 0
        done = False
        try:
            while size < BYTES_A_STEP and descs < DESCS_A_STEP:
                if self.held is None:
                    head = self._next_head()
                    if head is None:
                        break
                    self.held = self._chain(head)
                    self.held_head = head
                    self.busy.add(head)
                    self.seen = (self.seen + 1) & 0xFFFF
                again = self._awaited_slot(self.held_head, self.held)
                if again is None and self._never_fits(self.held):
                    raise Malformed("it never fits")
                if not fresh:
                    self._check_stall(self.held)
                    break
                fresh -= 1
                if again is None:
                    self._offered(self.held_head, self.held)
                else:
                    done |= self._adopt(again)
                    adopted += 1
                size += sum(buffer.length for buffer in self.held)
                descs += self.held_descs
                self.held = None
        except Malformed:
            self.broken = True
        assert not fresh, f"chains that the guest never offered: {self.lane.fault}"
        if done:
            self._show_used()
        return adopted

    def _awaited_slot(self, head: int, buffers: list[Buffer]) -> int | None:
        """Return the slot of this chain, if it is the next that the back has still.

        If it is another one, the guest waits for none of them any more.
        """
        if not self.awaited:
            return None
        request = self.awaited[0]
        assert request.seen is not None
        slot = request.seen.head
        if (request.head, request.buffers) == (head, buffers) and all(
            buffer.writable or self.image.read(buffer.addr, buffer.length) == data
            for buffer, data in zip(buffers, self.doubles[slot], strict=True)
        ):
            return slot
        self._disown([r.seen.head for r in self.awaited if r.seen is not None])
        return None

    def _adopt(self, slot: int) -> bool:
        """Has the chain come back already?"""
        request = self.awaited.pop(0)
        request.position = self.next
        self.next += 1
        self.first = self.next
        return self._resume(slot)

    def _needs(self, buffers: list[Buffer]) -> int:
        return 1 if self.lane.back_indirect else len(buffers)

    def _never_fits(self, buffers: list[Buffer]) -> bool:
        size = sum(buffer.length for buffer in buffers if buffer.length >= SMALL)
        too_large = self._is_alone(buffers) and size > POOL
        return too_large or self._needs(buffers) > self.lane.size

    def _is_alone(self, buffers: list[Buffer]) -> bool:
        """Does the chain wait for a region of its own? There is none here."""
        indirect = self.lane.back_indirect
        pages = Request(0, buffers, range(0), b"").pool_pages(indirect)
        blocks = [
            Request(0, [buffer], range(0), b"").pool_pages(False)
            for buffer in buffers
            if buffer.length >= SMALL
        ]
        blocks.append(pages - sum(blocks))
        return max(blocks) > LARGEST // PAGE or pages > POOL // PAGE

    def _check_stall(self, buffers: list[Buffer]) -> None:
        if self._is_alone(buffers):
            return
        # A chain of an earlier ring has its slot, but no descriptors.
        taken = sum(
            self._needs(request.buffers) if request.position >= self.first else 1
            for request in self.flight.values()
        )
        free = self.lane.size - taken - len(self._left())
        assert self._needs(buffers) > free or self.world.pool.used, "it waits in vain"

    def _offered(self, head: int, buffers: list[Buffer]) -> None:
        """Check that the back sees exactly this chain, and no other bytes of memory."""
        lane, isolated = self.lane, self.world.isolated
        chain = lane.device.take()
        assert chain is not None
        assert [b[1:] for b in chain.buffers] == [b[1:] for b in buffers]
        given = b""
        for buffer, double in zip(buffers, chain.buffers, strict=True):
            data = bytes(isolated.view(double.addr, double.length))
            if buffer.writable:
                assert data == bytes(len(data)), "what the back may write isn't zero"
            else:
                given += data
                assert data == self.image.read(buffer.addr, buffer.length)
            grain = 64 if buffer.length < 512 else PAGE
            within = 0 if buffer.length < 512 else buffer.addr % PAGE
            assert double.addr % grain == within
        table = None
        if lane.shadow.read_desc(chain.head).flags & DESC_F_INDIRECT:
            table = lane.shadow.read_desc(chain.head)[:2]
        held = {r.seen.head for r in self._all_held() if r.seen is not None}
        assert chain.head not in held, "the back has this slot's chain still"
        self.flight[chain.head] = Request(
            head,
            buffers,
            range(0),
            given,
            position=self.next,
            seen=chain,
            table=table,
        )
        self.next += 1

    def _check_doubles(self) -> None:
        """I7: no two chains share isolated memory."""
        spans = sorted(span for r in self._all_held() for span in r.doubles())
        for (start, length), (after, _) in pairwise(spans):
            assert start + length <= after, "two chains share isolated memory"

    # Stop and start.

    def stop(self, said: int | None) -> int:
        """The ring stops; the base at which it can go on."""
        lane = self.lane
        slots = {request.position: slot for slot, request in self.flight.items()}
        fetched = self.next
        while fetched > self.first and fetched - 1 in slots:
            fetched -= 1
        end = fetched
        if said is not None:
            claimed = fetched + ((said - (fetched - self.first)) & 0xFFFF)
            end = claimed if claimed <= self.next else fetched
        left = sorted(position for position in slots if position < end)
        first = end - len(left)
        last = left == list(range(first, end))
        self.goes_on_at = first if last else end
        self.image.load()
        if lane.guest_event_idx:
            # The chain that waits for room was taken from the ring, but not offered.
            event = self.seen.to_bytes(2, "little")
            self._set_used(4 + 8 * lane.size, event)
        else:
            self._set_used(0, bytes(2))
        base = (self.base + self.goes_on_at - self.began) & 0xFFFF
        assert lane.stop(said) == (base, len(left), last)
        self.image.check()
        self.parked |= {slots[p]: self.flight[slots[p]] for p in left}
        self.flight.clear()
        self.awaited = []
        self.stopped_at = base, self.used_idx
        self._check_held()
        return base

    # Deeds of a good back.

    def complete(self, slot: int, said: int, data: bytes = b"") -> None:
        """Finish the chain of a slot, if it is in flight."""
        request = self.flight.get(slot)
        if request is None or request.seen is None:
            return
        for view in self.lane.writable(request.seen):
            run = data[: len(view)]
            view[: len(run)] = run
            data = data[len(run) :]
        self.lane.device.complete(slot, said)
        self.lane.device.publish()

    def end(self) -> None:
        """The back completes its chains, if it still can; then none is left."""
        self.step()
        while self.flight and not self.back_broken:
            self.lane.device.next_used = self.reaped
            for slot in list(self.flight):
                self.complete(slot, 0xFFFFFFFF, PATTERN)
            before = len(self.flight), self.next
            self.step()
            assert (len(self.flight), self.next) != before, "nothing moves"
        self.world.check()
        lane = self.lane
        lane.pump.detach(None)
        lane.renew()
        assert self.world.pool.used == 0, "blocks of the pool were lost"
