# SPDX-License-Identifier: Apache-2.0
"""A world for the data plane: guest memory, isolated memory, and lanes through both.

A `Lane` is one ring with all that is around it: the guest's driver, the pump, and the
back's device. Nothing runs by itself: a test offers, steps, takes and completes. The
test sees all memory through views of its own, and every piece has a page of canaries
before and after it, which `World.check()` looks at.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

from tests.support.dirty import LogFile
from vhost_airlock.dataplane.mapping import Mapping
from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.dataplane.pump import FAULTS, Pump, shadow_bytes, slot_bytes
from vhost_airlock.dataplane.regions import GuestMemory
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers import (
    Buffer,
    Chain,
    DeviceRing,
    DriverRing,
    SplitLayout,
    SplitRing,
    TableArea,
)

PAGE = 4096
MIB = 1 << 20
BACK_BASE = 1 << 46
"""Where the back's addresses start; none of the guest's is near."""

RINGS_AT = 1 << 40
"""Guest-physical address from where on lanes have their rings."""

REGIONS = ((0, 2 * MIB), (2 * MIB, 2 * MIB), (8 * MIB, 2 * MIB), (1 << 32, 4 * MIB))
"""Guest memory: two adjacent regions, and two with holes before them."""

CANARY = bytes(range(1, 256)) * 17
GUARD = CANARY[:PAGE]


class Memory:
    """A memfd between two pages of canaries, mapped for the plane and for the test."""

    def __init__(self, size: int) -> None:
        whole = size + 2 * PAGE
        self._fd = fd = os.memfd_create("plane", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, fd)
        os.ftruncate(fd, whole)
        self._mapping = Mapping(fd, whole)
        self._whole = memoryview(mmap.mmap(fd, whole))
        self.size = size
        self.address = self._mapping.address + PAGE
        self.view = self._whole[PAGE : PAGE + size]
        self._whole[:PAGE] = GUARD
        self._whole[PAGE + size :] = GUARD

    def cut(self, size: int = 0) -> None:
        """Only the first `size` bytes are left; to touch the others is a SIGBUS."""
        os.ftruncate(self._fd, PAGE + size)

    def mend(self) -> None:
        """All of it is there again, zeros where it was gone."""
        os.ftruncate(self._fd, self.size + 2 * PAGE)
        self._whole[PAGE + self.size :] = GUARD

    def intact(self) -> bool:
        guards = self._whole[:PAGE], self._whole[PAGE + self.size :]
        return all(bytes(guard) == GUARD for guard in guards)  # quicker than a view


class Record:
    """The record of one ring's chains in flight, at a place in a memfd of its own."""

    HEAD = struct.Struct("<QHHHH")
    ENTRY = struct.Struct("<B5xHQ")

    def __init__(self, entries: int, offset: int = 0) -> None:
        self.entries = entries
        size = offset + self.HEAD.size + entries * self.ENTRY.size
        self.memory = Memory(-(-size // PAGE) * PAGE)
        self.view = self.memory.view[offset:size]
        self.place = self.memory.address + offset, entries

    def set_head(
        self,
        *,
        features: int = 0,
        version: int = 1,
        desc_num: int | None = None,
        last: int = 0,
        used: int = 0,
    ) -> None:
        """Write all words of the head."""
        entries = self.entries if desc_num is None else desc_num
        self.HEAD.pack_into(self.view, 0, features, version, entries, last, used)

    def set_entry(
        self, head: int, *, inflight: int = 0, next: int = 0, counter: int = 0
    ) -> None:
        at = self.HEAD.size + head * self.ENTRY.size
        self.ENTRY.pack_into(self.view, at, inflight, next, counter)

    def entry(self, head: int) -> tuple[int, int, int]:
        """(inflight, next, counter) of a head."""
        at = self.HEAD.size + head * self.ENTRY.size
        inflight, following, counter = self.ENTRY.unpack_from(self.view, at)
        return inflight, following, counter

    @property
    def head(self) -> tuple[int, ...]:
        """(features, version, desc_num, last_batch_head, used_idx)"""
        return self.HEAD.unpack_from(self.view)

    @property
    def used_idx(self) -> int:
        return self.head[-1]

    @property
    def marked(self) -> list[int]:
        """The heads in flight, in the order in which they were taken."""
        found = [(self.entry(i)[2], i) for i in range(self.entries) if self.entry(i)[0]]
        return [head for _, head in sorted(found)]


class AddressSpace:
    """Pieces of memory by address, as somebody sees them."""

    def __init__(self) -> None:
        self.pieces: dict[int, Memory] = {}

    def add(self, address: int, size: int) -> Memory:
        memory = self.pieces[address] = Memory(size)
        return memory

    def _find(self, address: int) -> tuple[int, Memory]:
        for start, memory in self.pieces.items():
            if start <= address < start + memory.size:
                return start, memory
        raise LookupError(f"nothing at {address:#x}")

    def view(self, address: int, length: int) -> memoryview:
        """`length` bytes that lie in one piece."""
        start, memory = self._find(address)
        if address + length > start + memory.size:
            raise LookupError(f"{length} bytes at {address:#x} leave their piece")
        return memory.view[address - start : address - start + length]

    def host(self, address: int) -> int:
        """Where the data plane sees this address."""
        start, memory = self._find(address)
        return memory.address + address - start

    def _runs(self, address: int, length: int) -> Iterator[memoryview]:
        while length:
            start, memory = self._find(address)
            run = min(length, start + memory.size - address)
            yield memory.view[address - start : address - start + run]
            address += run
            length -= run

    def read(self, address: int, length: int) -> bytes:
        return b"".join(self._runs(address, length))

    def write(self, address: int, data: bytes) -> None:
        for run in self._runs(address, len(data)):
            run[:] = data[: len(run)]
            data = data[len(run) :]


class World:
    """Guest memory, a pool of isolated memory, and any number of lanes."""

    def __init__(
        self,
        *,
        pool: int | Sequence[int] = 4 * MIB,
        limit: int | None = None,
        largest: int | None = None,
        lone_limit: int = 0,
        regions: Iterable[tuple[int, int]] = REGIONS,
        rings_at: int = RINGS_AT,
        shared: bool = False,
    ) -> None:
        """`pool`: the sizes of its regions, in bytes; `limit`: its own, if another;
        `lone_limit`: the size of the largest chain, if that is larger; `rings_at`: the
        guest-physical address of the first lane's ring; `shared`: by several workers.
        """
        sizes = [pool] if isinstance(pool, int) else list(pool)
        self.ram = AddressSpace()
        self.isolated = AddressSpace()
        for address, size in regions:
            self.ram.add(address, size)
        self.memory = GuestMemory()
        self.lanes: list[Lane] = []
        self._back = count(BACK_BASE, 1 << 32)
        self._rings = count(rings_at, 1 << 32)
        total = sum(sizes) if limit is None else limit
        if largest is None:
            largest = 1 << (total.bit_length() - 1)
        self._make_pool = partial(
            Pool, total, largest=largest, lone_limit=lone_limit, shared=shared
        )
        self._sizes = sizes
        self._open_pool()
        self.set_regions()

    def _open_pool(self) -> None:
        self.pool = self._make_pool()
        self.pool_regions = [self.grow(size) for size in self._sizes]

    def lose_back(self) -> None:
        """The back is gone with its isolated memory: to touch that is a SIGBUS. There
        is another back, with memory of its own. All lanes are stopped.
        """
        for lane in self.lanes:
            lane.pump.lose_back()
        for memory in self.isolated.pieces.values():
            memory.cut()
        self.isolated.pieces.clear()
        self._open_pool()
        for lane in self.lanes:
            lane.move_in()

    def grow(self, size: int) -> int:
        """One more region for the pool; its number."""
        back = next(self._back)
        return self.pool.add_region(self.isolated.add(back, size).address, back, size)

    def open_lone(self, size: int) -> int:
        """Give the pool a lone region; returns the back's address of it."""
        back = next(self._back)
        self.pool.open_lone(self.isolated.add(back, size).address, back, size)
        return back

    def add_ram(self, size: int) -> int:
        """Guest memory beside all other, for a ring; its guest-physical address."""
        address = next(self._rings)
        self.ram.add(address, -(-size // PAGE) * PAGE)
        self.set_regions()
        return address

    def add_isolated(self, size: int) -> int:
        """Isolated memory for a ring; the back's address."""
        address = next(self._back)
        self.isolated.add(address, size)
        return address

    def set_regions(self, *, without: Iterable[int] = ()) -> None:
        """Tell the plane what guest memory there is: all, less what is taken away."""
        gone = set(without)
        self.memory.set_regions(
            [
                (address, memory.size, memory.address)
                for address, memory in self.ram.pieces.items()
                if address not in gone
            ]
        )

    def log_into(
        self, log: LogFile, *, words: bool = True, buffers: bool = True
    ) -> None:
        """Log stores there from now on: those of all lanes."""
        self.memory.set_log(*log.place)
        for lane in self.lanes:
            lane.pump.set_logging(words=words, buffers=buffers)

    def check(self) -> None:
        """No byte before or after any piece of memory was changed."""
        for space in (self.ram, self.isolated):
            for address, memory in space.pieces.items():
                assert memory.intact(), f"a canary around {address:#x} is dead"


class Lane:
    """One ring from the guest's driver to the back's device."""

    def __init__(
        self,
        world: World,
        *,
        size: int = 16,
        base: int = 0,
        guest_event_idx: bool = True,
        guest_indirect: bool = True,
        back_event_idx: bool = True,
        back_indirect: bool = True,
        policy: str = "full",
        whole_batches: bool = False,
        has_error: bool = False,
        entries: int = 16,
        most: int | None = None,
        start: bool = True,
        record: Record | None = None,
        cached: int = 0,
    ) -> None:
        """`entries`: how many each of the guest's indirect tables has room for;
        `most`: the largest size that reset() may give the ring; `record`: of the chains
        in flight; `cached`: as for Pump.attach().
        """
        self.world = world
        self.guest_event_idx = guest_event_idx
        self.guest_indirect = guest_indirect
        self.back_event_idx = back_event_idx
        self.back_indirect = back_indirect
        self.whole_batches = whole_batches
        self.has_error = has_error
        self.record = record
        self.cached = cached

        most = most or size
        tables_at = -(-SplitLayout(most).end // PAGE) * PAGE
        tables_size = TableArea.length(most, entries)
        self.ring_at = world.add_ram(tables_at + tables_size)
        self.tables_at = self.ring_at + tables_at
        self.tables = TableArea(
            world.ram.view(self.tables_at, tables_size), self.tables_at, entries
        )
        self.reset(base, size)
        self.policy = policy
        self.index = len(world.lanes)
        self._most = most
        self._add_isolated()
        self.renew()
        world.lanes.append(self)
        if start:
            self.start(base)

    def reset(self, base: int = 0, size: int | None = None) -> None:
        """The guest's driver begins anew, with a ring of another size if told."""
        if size is not None:
            self.size = size
            self.layout = SplitLayout(size)
            self.ring = SplitRing.at(
                self.world.ram.view(self.ring_at, self.layout.end), self.layout
            )
        self.driver = DriverRing(
            self.ring, base=base, event_idx=self.guest_event_idx, tables=self.tables
        )

    def _add_isolated(self) -> None:
        ring_size = -(-shadow_bytes(self._most) // PAGE) * PAGE
        size = 2 * ring_size + slot_bytes(self._most)
        self.piece_at = self.world.add_isolated(size)
        self.rings_at = [self.piece_at, self.piece_at + ring_size]
        self.slots_at = self.piece_at + 2 * ring_size

    def renew(self) -> None:
        """A new pump, as for a new session, in the place of the old one."""
        self.pump = Pump(self.index, self.world.memory, self.world.pool, self.policy)

    def move_in(self) -> None:
        """Use the isolated memory of another back from now on."""
        self._add_isolated()
        slots = self.world.isolated.host(self.slots_at)
        self.pump.move_in(self.world.pool, slots, self.slots_at)

    @property
    def guest_parts(self) -> tuple[int, int, int]:
        """Where the data plane sees the guest's descriptors, avail ring, used ring."""
        host = self.world.ram.host(self.ring_at)
        layout = self.layout
        return host + layout.desc, host + layout.avail, host + layout.used

    @property
    def area_at(self) -> int:
        """The back's address of the shadow ring that is in use."""
        return self.rings_at[0]

    @property
    def shadow_parts(self) -> tuple[int, int, int]:
        """The back's addresses of the shadow ring's parts."""
        return self._shadow_parts

    def start(self, base: int | None) -> None:
        """Attach the pump and begin to take; a new device for the back.

        The shadow ring is another one than the last time, as in a session.
        """
        self.rings_at.reverse()
        if self.size > self.pump.slots:
            new = self.slots_at + slot_bytes(self.pump.slots)
            self.pump.add_slots(self.size, self.world.isolated.host(new), new)
        host = self.world.isolated.host(self.area_at)
        _, _, desc, avail, used = self.pump.prepare(self.size, host, self.area_at)
        self._shadow_parts = desc, avail, used
        self.pump.attach(
            size=self.size,
            base=base,
            guest=self.guest_places,
            guest_event_idx=self.guest_event_idx,
            guest_indirect=self.guest_indirect,
            shadow=host,
            shadow_event_idx=self.back_event_idx,
            shadow_indirect=self.back_indirect,
            whole_batches=self.whole_batches,
            has_error=self.has_error,
            record=None if self.record is None else self.record.place,
            cached=self.cached,
        )
        self.pump.set_taking(True)
        size = shadow_bytes(self.size)
        self.shadow = SplitRing(
            self.size,
            *(
                self.world.isolated.view(at, self.area_at + size - at)
                for at in self._shadow_parts
            ),
        )
        self.device = DeviceRing(
            self.shadow, self.world.isolated.view, event_idx=self.back_event_idx
        )

    @property
    def guest_places(self) -> list[tuple[int, int]]:
        """Our addresses of the guest ring's parts, and the guest's."""
        layout = self.layout
        offsets = (layout.desc, layout.avail, layout.used)
        return [
            (self.world.ram.host(self.ring_at) + offset, self.ring_at + offset)
            for offset in offsets
        ]

    def stop(self, fetched: int | None) -> tuple[int, int, bool]:
        """Detach; (the guest's new base, unfinished chains, whether these are last)."""
        return self.pump.detach(fetched)

    # The guest.

    def offer(
        self,
        *buffers: Buffer | tuple[int, int] | tuple[int, int, bool],
        indirect: bool = False,
        direct: int = 0,
    ) -> int:
        """Offer one chain and publish it; its head."""
        head = self.driver.offer(
            [Buffer(*buffer) for buffer in buffers], indirect=indirect, direct=direct
        )
        self.driver.publish()
        return head

    def used(self) -> list[tuple[int, int]]:
        """Return (head, length) of each chain that the guest finds completed."""
        return list(self.driver.used())

    # The pump.

    def step(self, budget: int = 256) -> int:
        """One pass; how many chains moved."""
        return self.pump.step(budget)[0]

    @property
    def fault(self) -> str | None:
        """Why the ring stopped, in words."""
        return FAULTS[self.pump.fault] if self.pump.fault else None

    def counter(self, name: str) -> int:
        return self.pump.counters()[name]

    # The back.

    def take(self) -> Chain:
        """The next chain that the back finds; there must be one."""
        chain = self.device.take()
        assert chain is not None, "the back finds no chain"
        return chain

    def bytes_of(self, chain: Chain) -> bytes:
        """The bytes that the back can read in a chain."""
        return b"".join(
            bytes(self.world.isolated.view(buffer.addr, buffer.length))
            for buffer in chain.buffers
            if not buffer.writable
        )

    def writable(self, chain: Chain) -> list[memoryview]:
        """The buffers that the back may write in a chain."""
        return [
            self.world.isolated.view(buffer.addr, buffer.length)
            for buffer in chain.buffers
            if buffer.writable
        ]

    def complete(
        self, chain: Chain, data: bytes = b"", *, length: int | None = None
    ) -> None:
        """Write `data` into a chain and complete it, with `length` if told."""
        said = len(data) if length is None else length
        for view in self.writable(chain):
            run = data[: len(view)]
            view[: len(run)] = run
            data = data[len(run) :]
        assert not data, "more data than the chain has room for"
        self.device.complete(chain.head, said)
        self.device.publish()


class Wired(Lane):
    """A lane with eventfds, run by a worker.

    Both ends wait as real ones do: they arm, look again, and then only a notification
    wakes them. One that does not come within `PATIENCE` seconds is a lost one.
    """

    PATIENCE = 10.0

    def __init__(self, world: World, worker: Worker, **options: Any) -> None:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.worker = worker
        self.kick_in, self.call_out, self.kick_out, self.call_in = (
            os.eventfd(0, flags) for _ in range(4)
        )
        super().__init__(world, **options)
        worker.watch(self.kick_in)
        worker.watch(self.call_in)
        with worker.pause():
            worker.add(self.pump)

    def renew(self) -> None:
        super().renew()
        self.pump.set_fds(call_out=self.call_out, kick_out=self.kick_out)

    def close(self) -> None:
        """Take the ring from its worker."""
        with self.worker.pause():
            self.worker.remove(self.pump)
        self.worker.unwatch(self.kick_in)
        self.worker.unwatch(self.call_in)
        for fd in (self.kick_in, self.call_out, self.kick_out, self.call_in):
            os.close(fd)

    def kick(self) -> None:
        """The guest kicks, if the pump wants it."""
        if self.driver.kick_needed():
            os.eventfd_write(self.kick_in, 1)

    def call(self) -> None:
        """The back calls, if the pump wants it."""
        if self.device.call_needed():
            os.eventfd_write(self.call_in, 1)

    def await_used(self, count: int = 1) -> list[tuple[int, int]]:
        """The guest waits for so many completions."""
        ends = self.used()
        while len(ends) < count:
            if not self.driver.arm():
                await_event(self.call_out, self.PATIENCE)
            self.driver.disarm()
            ends += self.used()
        return ends

    def await_chain(self) -> Chain:
        """The back waits for a chain."""
        while not (chain := self.device.take()):
            if not self.device.arm():
                await_event(self.kick_out, self.PATIENCE)
            self.device.disarm()
        return chain


def await_event(fd: int, timeout: float) -> None:
    """Wait for an eventfd, and clear it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(timeout * 1000):
        raise TimeoutError("a notification did not come")
    os.eventfd_read(fd)
