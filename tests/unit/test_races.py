"""Guest and back rewrite everything they can while the worker looks at it.

Nothing crashes, ends differ only in the faults that are named, no byte outside of what
was given is touched, and a healthy ring of the same worker never notices.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest

from tests.support.plane import BACK_BASE, MIB, PAGE, Wired, World
from tests.support.profiles import STRESS
from vhost_airlock.dataplane.pump import FAULTS
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers import Buffer, DriverRing, SplitRing
from vhost_airlock.peers.ring import DESC

SECONDS = 60.0 if STRESS else 2.0
GUEST_FAULTS = {fault for fault in FAULTS if -32 < fault < 0}
BACK_FAULTS = {fault for fault in FAULTS if -34 < fault <= -32}


@pytest.fixture
def worker() -> Iterator[Worker]:
    events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    worker = Worker(events, poll_us=50)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield worker
    worker.stop()
    thread.join(10)
    assert not thread.is_alive()
    os.close(events)


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Let Python's threads take turns more often than every 5 ms."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(20e-6)
    yield
    sys.setswitchinterval(interval)


@contextlib.contextmanager
def meanwhile(*actions: Callable[[], object]) -> Iterator[None]:
    """Each action again and again, in a thread of its own; no error is lost."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def repeat(action: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=[action]) for action in actions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert errors == []


def replace_pump(lane: Wired, base: int | None = None) -> int:
    """A new pump in the place of a broken one; why that was broken.

    Without a `base` the guest resets its ring too, and forgets what it has offered.
    """
    with lane.worker.pause():
        fault = lane.pump.fault
        lane.worker.remove(lane.pump)
        if lane.pump.attached:
            lane.pump.detach()
        lane.renew()
        if base is None:
            tables = lane.driver.tables
            lane.driver = DriverRing(lane.ring, event_idx=True, tables=tables)
        lane.start(base or 0)
        lane.worker.add(lane.pump)
    return fault


def request(lane: Wired, number: int) -> None:
    """One through a ring that nobody attacks."""
    payload = number.to_bytes(8, "little") * 100
    lane.world.ram.write(8 * MIB, payload)
    lane.offer((8 * MIB, 800), (8 * MIB + PAGE, 800, True))
    lane.kick()
    chain = lane.await_chain()
    assert lane.bytes_of(chain) == payload
    lane.complete(chain, payload[::-1])
    lane.call()
    assert [length for _, length in lane.await_used()] == [800]
    assert lane.world.ram.read(8 * MIB + PAGE, 800) == payload[::-1]


class TestGuest:
    """G5, G6: descriptors, tables and the avail ring change under our eyes."""

    ADDRESSES = (0, 1, PAGE - 1, 2 * MIB - 8, 4 * MIB - 16, 5 * MIB, 1 << 32, 1 << 63)
    LENGTHS = (0, 1, 16, 32, 600, PAGE, 20_000, 1 << 20, 1 << 31, 0xFFFFFFFF)

    def attack(self, lane: Wired, chance: random.Random) -> None:
        """Make chains that are good or bad, and change them at once."""
        size = lane.size
        if lane.pump.fault:
            time.sleep(0)
            return
        for _ in range(10):
            index = chance.randrange(size)
            good = DESC.pack(index * PAGE, 16 + 100 * index, 2 * (index % 2), 0)
            table = lane.tables_at + 16 * chance.randrange(64)
            entries = chance.choice([1, 2, 8, 1024, 1025, 1 << 28])
            indirect = DESC.pack(table, 16 * entries & 0xFFFFFFFF, 4, 0)
            bad = DESC.pack(
                chance.choice([*self.ADDRESSES, lane.tables_at]),
                chance.choice(self.LENGTHS),
                chance.choice([0, 1, 1, 2, 3, 4, 5]),
                chance.choice([0, index, (index + 1) % size, size, 0xFFFF]),
            )
            at = slice(16 * index, 16 * index + 16)
            lane.ring.desc[at] = chance.choice([good, indirect])
            slot = lane.ring.avail_idx & lane.ring.mask
            lane.ring.set_avail_entry(slot, index)
            step = 1 if chance.random() < 0.997 else chance.choice([2, 9999, 65535])
            lane.ring.avail_idx = (lane.ring.avail_idx + step) & 0xFFFF
            for _ in range(chance.choice([0, 0, 0, 0, 1, 3])):
                lane.ring.desc[at] = bad
                lane.ring.desc[at] = chance.choice([good, indirect])
            tables = self.world.ram.view(lane.tables_at, 64 * 16)
            where = 16 * chance.randrange(64)
            tables[where : where + 16] = chance.choice([good, good, good, bad])
            if chance.random() < 0.003:
                lane.ring.set_avail_entry(slot, chance.choice([size, 0xFFFF]))
        os.eventfd_write(lane.kick_in, 1)

    def serve(self, lane: Wired) -> None:
        """The back sees good chains only, whatever the guest does."""
        with self.swapping:
            while chain := lane.device.take():
                written = 0
                lengths = [buffer.length for buffer in chain.buffers]
                assert 0 not in lengths
                assert 1 <= len(lengths) <= 1024
                for buffer in chain.buffers:
                    assert buffer.addr >= BACK_BASE
                    view = self.world.isolated.view(buffer.addr, buffer.length)
                    if buffer.writable:
                        view[:1] = b"w"
                        written += buffer.length
                lane.device.complete(chain.head, written)
                self.served += 1
            lane.device.publish()
            os.eventfd_write(lane.call_in, 1)

    def test_i6_a_guest_that_rewrites_its_ring(self, worker):
        self.world = World(pool=32 * MIB)
        self.swapping = threading.Lock()
        self.served = 0
        lane = Wired(self.world, worker, size=16)
        healthy = Wired(self.world, worker)
        for victim, size in ((lane, 24 * MIB), (healthy, 4 * MIB)):
            victim.pump.set_guaranteed(size)
        self.world.pool.set_common(4 * MIB)
        chance = random.Random(6)
        faults: set[int] = set()
        number = 0
        end = time.monotonic() + SECONDS
        with meanwhile(lambda: self.attack(lane, chance), lambda: self.serve(lane)):
            while time.monotonic() < end:
                number += 1
                request(healthy, number)
                if lane.pump.fault:
                    with self.swapping:
                        faults.add(replace_pump(lane, lane.ring.avail_idx))
                        lane.pump.set_guaranteed(24 * MIB)
        assert faults <= GUEST_FAULTS
        assert len(faults) > 1, "the attack did not reach far"
        assert self.served > 0
        assert healthy.pump.fault == 0
        lane.close()
        healthy.close()
        self.world.check()


class TestBack:
    """B3: used ring and buffers change under our eyes."""

    def attack(self, lane: Wired, chance: random.Random) -> None:
        """Take what there is, complete it with lies, and scribble."""
        ring = lane.shadow
        if lane.pump.fault:
            time.sleep(0)
            return
        while self.taken[ring] != ring.avail_idx:
            head = ring.avail_entry(self.taken[ring] & ring.mask)
            self.taken[ring] = (self.taken[ring] + 1) & 0xFFFF
            slot = ring.used_idx & ring.mask
            length = chance.choice([0, 1, 512, 5000, 1 << 31, 0xFFFFFFFF])
            ring.set_used_entry(slot, head, length)
            ring.used_idx = (ring.used_idx + 1) & 0xFFFF
            for _ in range(chance.choice([0, 1, 4])):
                ring.set_used_entry(slot, chance.randrange(1 << 32), 0xFFFFFFFF)
                ring.set_used_entry(slot, head, length)
            ring.desc[:] = self.noise[: len(ring.desc)]
            pool = next(iter(self.world.isolated.pieces.values()))
            at = chance.randrange(pool.size - 9000)
            pool.view[at : at + 9000] = self.noise[at % 1000 :][:9000]
            area = self.world.isolated.pieces[lane.area_at].view
            at = chance.randrange(PAGE, len(area) - 600)
            area[at : at + 600] = self.noise[:600]
            ring.avail_event = chance.randrange(1 << 16)
            match chance.randrange(150):
                case 0:
                    ring.used_idx = chance.randrange(1 << 16)
                case 1:
                    area[:] = self.noise[: PAGE // 2] * (2 * len(area) // PAGE)
                case 2 | 3 | 4 | 5 | 6 | 7:
                    ring.used_idx = (ring.used_idx + 1) & 0xFFFF
        os.eventfd_write(lane.call_in, 1)

    @pytest.mark.parametrize("back_indirect", [False, True])
    def test_i5_a_back_that_rewrites_isolated_memory(self, worker, back_indirect):
        self.world = world = World(pool=8 * MIB)
        chance = random.Random(5)
        self.noise = chance.randbytes(10_000)
        self.taken: defaultdict[SplitRing, int] = defaultdict(int)
        lane = Wired(world, worker, size=16, back_indirect=back_indirect)
        healthy = Wired(world, worker)
        # The back's writes to the other ring's buffers are its own affair, so that one
        # has small buffers only, in an area of its own.
        world.ram.write(0, b"\xa5" * (4 * MIB))
        room = range(16 * PAGE, 48 * PAGE)
        before = world.ram.read(0, 4 * MIB)
        faults: set[int] = set()
        completed = number = idle = 0
        end = time.monotonic() + SECONDS
        rooms: dict[int, int] = {}
        with meanwhile(lambda: self.attack(lane, chance)):
            while time.monotonic() < end:
                number += 1
                self.small_request(healthy, number)
                idle += 1
                if lane.pump.fault or idle > 20:
                    rooms.clear()
                    faults.add(replace_pump(lane))
                    idle = 0
                for _ in range(6):
                    self.offer(lane, chance, room, rooms)
                for head, length in lane.used():
                    completed += 1
                    idle = 0
                    assert length <= rooms.pop(head)
        assert faults <= {0, *BACK_FAULTS}
        assert len(faults) > 1, "the attack did not reach far"
        assert completed > 0
        assert healthy.pump.fault == 0
        lane.close()
        healthy.close()
        after = world.ram.read(0, 4 * MIB)
        assert after[: room.start] == before[: room.start]
        assert after[room.stop :] == before[room.stop :]
        world.check()

    def small_request(self, lane: Wired, number: int) -> None:
        world = lane.world
        payload = number.to_bytes(8, "little") * 8
        world.ram.write(8 * MIB, payload)
        lane.offer((8 * MIB, 64), (8 * MIB + PAGE, 64, True))
        lane.kick()
        lane.complete(lane.await_chain(), payload)
        lane.call()
        lane.await_used()

    def offer(
        self, lane: Wired, chance: random.Random, room: range, rooms: dict[int, int]
    ) -> None:
        """A chain whose writable buffers are all in `room`."""
        sizes = [chance.choice([1, 64, 600, 5000]) for _ in range(3)]
        if len(lane.driver.free) < 3:
            return
        buffers = [Buffer(8 * MIB, sizes[0])] + [
            Buffer(chance.randrange(room.start, room.stop - size), size, True)
            for size in sizes[1:]
        ]
        # Noted first: it may be completed before this goes on.
        rooms[lane.driver.free[-1]] = sum(sizes[1:])
        lane.offer(*buffers)
        os.eventfd_write(lane.kick_in, 1)


class TestStorms:
    """B4: notifications without end, of which nothing comes."""

    @pytest.mark.parametrize("side", ["guest", "back"])
    def test_a_storm_is_not_passed_on(self, worker, side):
        world = World()
        lane, healthy = Wired(world, worker), Wired(world, worker)
        # Something is in flight, and both ends want to hear of it.
        lane.offer((0, 16))
        lane.kick()
        lane.await_chain()
        lane.device.arm()
        lane.driver.arm()
        with worker.pause(), contextlib.suppress(BlockingIOError):
            os.eventfd_read(lane.kick_out)
        before = lane.pump.counters()
        fd = lane.kick_in if side == "guest" else lane.call_in

        def storm() -> None:
            for _ in range(100):
                os.eventfd_write(fd, 1)

        end = time.monotonic() + SECONDS / 4
        number = 0
        with meanwhile(storm):
            while time.monotonic() < end or number < 10:
                number += 1
                request(healthy, number)
        with worker.pause():
            assert lane.pump.counters() == before
            for quiet in (lane.kick_out, lane.call_out):
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(quiet)
        lane.close()
        healthy.close()


class TestControl:
    """Regions come and go, and rings stop and start, under traffic."""

    def test_i8_memory_that_is_taken_away_is_not_written_again(self, worker):
        world = World(pool=8 * MIB)
        lane = Wired(world, worker, size=16)
        taken = threading.Lock()

        def serve() -> None:
            with taken:
                while chain := lane.device.take():
                    lane.complete(chain, b"w" * 3000)
            os.eventfd_write(lane.call_in, 1)

        end = time.monotonic() + SECONDS / 2
        rounds = 0
        with meanwhile(serve):
            while time.monotonic() < end:
                while lane.driver.free:
                    lane.offer((8 * MIB, 3000, True))
                os.eventfd_write(lane.kick_in, 1)
                with worker.pause():
                    world.set_regions(without=[8 * MIB])
                world.ram.write(8 * MIB, bytes(3000))
                # What is in flight ends without it; what is new is a fault.
                time.sleep(0.001)
                assert world.ram.read(8 * MIB, 3000) == bytes(3000)
                with worker.pause():
                    world.set_regions()
                lane.used()
                if lane.pump.fault:
                    assert "outside of the guest" in FAULTS[lane.pump.fault]
                    with taken:
                        replace_pump(lane)
                rounds += 1
        assert rounds > 0
        lane.close()
        world.check()

    def test_i3_stops_and_starts_lose_nothing(self, worker):
        """Every chain is completed once, though the ring stops all the time."""
        world = World(pool=8 * MIB)
        lane = Wired(world, worker, size=32, base=0xFF80)
        chance = random.Random(3)
        swapping = threading.Lock()

        def serve() -> None:
            with swapping:
                for _ in range(chance.randrange(8)):
                    if chain := lane.device.take():
                        number = int.from_bytes(lane.bytes_of(chain), "little")
                        lane.complete(chain, (number * 3).to_bytes(8, "little"))
                lane.device.arm()
            os.eventfd_write(lane.call_in, 1)

        numbers: dict[int, int] = {}
        offered = completed = stops = 0
        end = time.monotonic() + SECONDS / 2
        with meanwhile(serve):
            while time.monotonic() < end or numbers:
                while time.monotonic() < end and len(lane.driver.free) > 1:
                    head = lane.driver.free[-1]
                    offered += 1
                    numbers[head] = offered
                    world.ram.write(head * 64, offered.to_bytes(8, "little"))
                    lane.offer((head * 64, 8), (MIB + head * 64, 8, True))
                os.eventfd_write(lane.kick_in, 1)
                for head, length in lane.used():
                    answer = world.ram.read(MIB + head * 64, length)
                    number = numbers.pop(head)
                    assert int.from_bytes(answer, "little") == 3 * number
                    completed += 1
                if chance.random() < 0.2:
                    with swapping, worker.pause():
                        lane.pump.step(1 << 15)
                        base, unfinished, _ = lane.stop(lane.device.next_avail)
                        assert unfinished == 0
                        lane.start(base)
                    stops += 1
        assert offered == completed
        assert completed > 0
        assert stops > 0
        lane.close()
        world.check()


@pytest.mark.parametrize("poll_us", [0, 50])
def test_workers_that_share_a_pool(poll_us):
    """It holds two of the four rings' requests, so there is always one that waits."""
    world = World(pool=[16 * PAGE, 4 * PAGE], shared=True)
    events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    workers = [Worker(events, poll_us=poll_us) for _ in range(2)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    lanes = [Wired(world, workers[i % 2], size=8) for i in range(4)]
    done = [0] * 4

    def traffic(i: int) -> None:
        lane, number, at = lanes[i], done[i], i * 32 * PAGE
        for j in range(3):
            data = bytes([i, number % 256, j]) * 1500
            world.ram.write(at + j * 8 * PAGE, data)
            lane.offer((at + j * 8 * PAGE, 4500), (at + j * 8 * PAGE, 4500, True))
        lane.kick()
        for j in range(3):
            chain = lane.await_chain()
            assert lane.bytes_of(chain) == bytes([i, number % 256, j]) * 1500
            lane.complete(chain, bytes([j, i, number % 256]) * 1500)
            lane.call()
        lane.await_used(3)
        for j in range(3):
            answer = bytes([j, i, number % 256]) * 1500
            assert world.ram.read(at + j * 8 * PAGE, 4500) == answer
        done[i] += 1

    end = time.monotonic() + SECONDS / 2
    with meanwhile(*[functools.partial(traffic, i) for i in range(4)]):
        while time.monotonic() < end:
            with contextlib.ExitStack() as paused:
                for worker in workers:
                    paused.enter_context(worker.pause())
                assert world.pool.used <= 20 * PAGE
            time.sleep(0.001)
    assert all(done), done
    assert sum(lane.counter("stalls") for lane in lanes) > 0
    assert world.pool.used == 0
    for lane in lanes:
        lane.close()
    for worker, thread in zip(workers, threads, strict=True):
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()
    os.close(events)
    world.check()
