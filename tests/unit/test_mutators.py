# SPDX-License-Identifier: Apache-2.0
"""G5, G6, B3: guest and back rewrite everything they can, as fast as the worker looks.

A mutator of either side changes rings, tables and buffers millions of times a second,
while chains go round. All the time:

- guest memory that nobody gave to be written stays as it is;
- each chain is completed once, or its ring is broken, with a fault of the mutator's;
- the other ring of the worker moves the right bytes;
- and in the end the pool has all of its blocks again.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.support.plane import MIB, PAGE, Wired, World
from tests.support.profiles import RACE_SECONDS
from tests.support.racers import (
    CBack,
    CGuest,
    CPlace,
    Racers,
    back_of,
    guest_of,
    place,
)
from vhost_airlock.dataplane.pump import FAULTS
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers.ring import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    SplitLayout,
)

GUEST_FAULTS = {fault for fault in FAULTS if -32 < fault < 0}
BACK_FAULTS = {fault for fault in FAULTS if -34 < fault <= -32}

SIZE, HEADS = 128, 64
SPAN = 0.05
"""Seconds between two looks at everything."""

LENGTH = 3000
READABLE = [2 * MIB - (HEADS // 2 - i) * LENGTH - 7 for i in range(HEADS)]
"""Of each chain; two regions meet among them."""
WRITABLE = [10 * MIB - (HEADS - i) * LENGTH for i in range(HEADS)]
"""Of each chain; the last one ends where there is a hole."""
GIVEN = [(READABLE[0], HEADS * LENGTH), (WRITABLE[0], HEADS * LENGTH)]
"""The memory of chains: a mutated chain may have all of it written to."""
HEALTHY = 9 * MIB
SECRET = 0xA5

N, W, T = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT


@pytest.fixture(scope="module")
def racers(tmp_path_factory: pytest.TempPathFactory) -> Racers:
    return Racers(tmp_path_factory.mktemp("racers"))


class Arena:
    """A ring under attack, one that is left alone, and what must stay as it is."""

    def __init__(self, worker: Worker, *, back_indirect: bool = True) -> None:
        self.world = World(pool=8 * MIB)
        self.worker = worker
        options = {"size": SIZE, "back_indirect": back_indirect}
        self.lane = Wired(self.world, worker, base=0xFFF0, **options)
        self.healthy = Wired(self.world, worker)
        for lane in (self.lane, self.healthy):
            lane.pump.set_guaranteed(4 * MIB)
        for address, memory in self.world.ram.pieces.items():
            if address not in (self.lane.ring_at, self.healthy.ring_at):
                memory.view[:] = bytes([SECRET]) * memory.size
        self.chains = [self.chain(head) for head in range(HEADS)]
        self.canaries = self.untouched()
        self.end = time.monotonic() + RACE_SECONDS
        self.number = 0
        self.totals: Counter[str] = Counter()
        self.faults: Counter[int] = Counter()

    def chain(self, head: int) -> list[tuple[int, bytes]]:
        """Write one: descriptors by their guest address. Every other has a table."""
        first = DESC.pack(READABLE[head], LENGTH, N, 1 if head % 2 else head + HEADS)
        second = DESC.pack(WRITABLE[head], LENGTH, W, 0)
        if not head % 2:
            places = [(self.desc_at(head), first), (self.desc_at(head + HEADS), second)]
        else:
            table = self.table_at(head)
            indirect = DESC.pack(table, 3 * DESC.size, T, 0)
            places = [(self.desc_at(head), indirect), (table, first)]
            places += [(table + DESC.size, second), (table + 2 * DESC.size, second)]
        for at, data in places:
            self.world.ram.write(at, data)
        return places

    def desc_at(self, index: int) -> int:
        return self.lane.ring_at + SplitLayout(SIZE).desc + index * DESC.size

    def table_at(self, head: int) -> int:
        return self.lane.tables_at + head * 16 * DESC.size

    def untouched(self) -> list[bytes]:
        """All guest memory that is in no chain, but for the rings themselves."""
        found = []
        for address, memory in self.world.ram.pieces.items():
            if address in (self.lane.ring_at, self.healthy.ring_at):
                continue
            view = bytearray(memory.view)
            for at, length in [*GIVEN, (HEALTHY, 2 * PAGE)]:
                start = max(at, address) - address
                end = min(at + length, address + memory.size) - address
                if start < end:
                    view[start:end] = bytes(end - start)
            found.append(bytes(view))
        return found

    def places_of_the_guest(self) -> list[CPlace]:
        """Descriptors and tables that change, into good ones mostly; and buffers."""
        places = []
        ram = self.world.ram
        last = WRITABLE[-1] + LENGTH
        for head, chain in enumerate(self.chains):
            for at, good in chain:
                addr, length, flags, next_ = DESC.unpack(good)
                bad = [
                    DESC.pack(last - 64, length, flags, next_),
                    DESC.pack(2 * MIB + PAGE, 0xFFFFFFFF, flags, next_),
                    DESC.pack((1 << 64) - 8, length, flags, next_),
                    DESC.pack(1 << 46, length, flags, next_),
                    DESC.pack(addr, 1 << 31, flags, next_),
                    DESC.pack(addr, 0, flags, next_),
                    DESC.pack(addr, length, flags | N, 0xFFFF),
                    DESC.pack(addr, length, flags | N, 0),
                    DESC.pack(addr, length, flags | N, SIZE),
                    DESC.pack(self.table_at(head), 16 * 1025, T, 0),
                    DESC.pack(self.table_at(head), 0xFFFFFFF0, T, 0),
                    DESC.pack(self.table_at(head), 24, T | N, 1),
                ]
                if flags & T:
                    also_good = [DESC.pack(addr, 4 * DESC.size, T, 0)]
                else:
                    also_good = [
                        DESC.pack(addr, length // 2, flags, next_),
                        DESC.pack(READABLE[3], 1, flags, next_),
                        DESC.pack(WRITABLE[5], length, flags, next_),
                        DESC.pack(addr, length, flags ^ (flags & W), next_),
                    ]
                host = ram.host(at)
                places.append(place(host, good, *also_good))
                places.append(place(host, good, *bad, odds=2))
            if head % 2:  # not the one that lies over two regions
                places.append(place(ram.host(READABLE[head]), noise=600))
        return places

    def places_of_the_back(self) -> list[CPlace]:
        """Everything in isolated memory but what the other ring has there."""
        isolated = self.world.isolated
        area = isolated.host(self.lane.area_at)
        desc, avail, used = (at - self.lane.area_at for at in self.lane.shadow_parts)
        slots = isolated.host(self.lane.slots_at)
        places = [
            place(area + desc, noise=16 * SIZE, odds=4),
            # Not its index: by that the back knows itself what to do.
            place(area + avail, b"\0\0", b"\1\0"),
            place(area + used + 4 + 8 * SIZE, b"\0\0", b"\xff\xff", b"\0\x80"),
            place(area + used + 8, noise=8, odds=5000),
        ]
        places += [place(slots + 512 * i, noise=512) for i in range(SIZE)]
        for piece in list(isolated.pieces.values())[:1]:
            places += [
                place(piece.address + at, noise=512)
                for at in range(0, 2 * HEADS * 3 * PAGE, 512)
            ]
        return places

    def request(self) -> None:
        """One through the ring that nobody attacks."""
        self.number += 1
        lane, payload = self.healthy, self.number.to_bytes(8, "little") * 8
        lane.world.ram.write(HEALTHY, payload)
        lane.offer((HEALTHY, 64), (HEALTHY + PAGE, 64, True))
        lane.kick()
        chain = lane.await_chain()
        assert lane.bytes_of(chain) == payload
        lane.complete(chain, payload[::-1])
        lane.call()
        assert [length for _, length in lane.await_used()] == [64]
        assert lane.world.ram.read(HEALTHY + PAGE, 64) == payload[::-1]

    def wait(self) -> None:
        """Until the ring is broken, or for a while; the other one is in use."""
        end = time.monotonic() + SPAN
        while time.monotonic() < end and not self.lane.pump.fault:
            self.request()

    def settle(self) -> None:
        """Until all is done that was taken, unless the back has broken the ring."""
        end = time.monotonic() + 10
        pump = self.lane.pump
        while pump.outstanding and pump.fault not in BACK_FAULTS:
            assert time.monotonic() < end, "what is in flight does not end"
            self.request()

    def check(self, guest: CGuest, back: CBack, allowed: set[int]) -> None:
        """Look at everything, and begin anew."""
        lane = self.lane
        with self.worker.pause():
            fault = lane.pump.fault
            counters = lane.pump.counters()
            left = counters["chains"] - counters["completions"]
            assert left == lane.pump.outstanding
            self.worker.remove(lane.pump)
            lane.pump.detach()
            lane.renew()
            lane.pump.set_guaranteed(4 * MIB)
            assert self.world.pool.used == 0
            # A driver that begins anew has nothing in flight.
            lane.ring.used_idx = lane.ring.avail_idx
            lane.start(lane.ring.avail_idx)
            self.worker.add(lane.pump)
        assert fault in {0, *allowed}, FAULTS.get(fault)
        assert self.healthy.pump.fault == 0
        assert guest.completed <= counters["completions"] <= counters["chains"]
        assert self.untouched() == self.canaries
        self.world.check()
        self.faults[fault] += 1
        self.totals.update(
            chains=counters["chains"], completions=counters["completions"], spans=1
        )
        for name in ("violations", "clamped"):
            self.totals[name] += counters[name]
        self.totals["writes"] += guest.mutator.writes + back.mutator.writes

    def goes_on(self) -> bool:
        """Until the time is over, and the attack has reached far enough."""
        if time.monotonic() < self.end:
            return True
        return len(self.faults) < 2 or self.totals["completions"] < 1000

    def close(self) -> None:
        """The end, with figures of how much it was."""
        self.totals["rounds"] = self.worker.counters()["rounds"]
        self.totals["requests"] = self.number
        faults = {FAULTS.get(k, "none"): count for k, count in self.faults.items()}
        print(dict(self.totals), faults, sep="\n")
        for lane in (self.lane, self.healthy):
            lane.close()


def test_i6_a_guest_that_rewrites_its_ring(worker: Worker, racers: Racers) -> None:
    """The back only ever sees good chains, each of them once."""
    arena = Arena(worker)
    places = arena.places_of_the_guest()
    while arena.goes_on():
        guest = guest_of(arena.lane, HEADS, odds=1000, places=places)
        back = back_of(arena.lane)
        with racers.racing(back):
            with racers.racing(guest):
                arena.wait()
            arena.settle()
        assert back.malformed == 0
        assert guest.doubled == 0
        arena.check(guest, back, GUEST_FAULTS)
    arena.close()


@pytest.mark.parametrize("back_indirect", [False, True])
def test_i5_a_back_that_rewrites_isolated_memory(
    worker: Worker, racers: Racers, back_indirect: bool
) -> None:
    """The guest gets back what it has offered, each chain once, and no more bytes."""
    arena = Arena(worker, back_indirect=back_indirect)
    places = arena.places_of_the_back()
    while arena.goes_on():
        guest = guest_of(arena.lane, HEADS, room=LENGTH)
        back = back_of(arena.lane, odds=20, lies=10, places=places)
        with racers.racing(guest, back):
            arena.wait()
        assert guest.doubled == 0
        assert guest.too_long == 0
        arena.check(guest, back, BACK_FAULTS)
    arena.close()


def test_both_at_the_same_time(worker: Worker, racers: Racers) -> None:
    arena = Arena(worker)
    guests, backs = arena.places_of_the_guest(), arena.places_of_the_back()
    while arena.goes_on():
        guest = guest_of(arena.lane, HEADS, odds=1000, places=guests)
        back = back_of(arena.lane, odds=20, lies=10, places=backs)
        with racers.racing(guest, back):
            arena.wait()
        assert guest.doubled == 0
        arena.check(guest, back, GUEST_FAULTS | BACK_FAULTS)
    arena.close()
