# SPDX-License-Identifier: Apache-2.0
"""Storms of notifications, changes of memory, stops and starts, while the worker runs.

Races in memory are in test_mutators.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.plane import MIB, PAGE, Wired, World
from tests.support.profiles import RACE_SECONDS
from vhost_airlock.dataplane.pump import FAULTS
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers import DriverRing


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


def replace_pump(lane: Wired) -> None:
    """A new pump in the place of a broken one; the guest resets its ring too."""
    with lane.worker.pause():
        lane.worker.remove(lane.pump)
        if lane.pump.attached:
            lane.pump.detach()
        lane.renew()
        tables = lane.driver.tables
        lane.driver = DriverRing(lane.ring, event_idx=True, tables=tables)
        lane.start(0)
        lane.worker.add(lane.pump)


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


def test_what_a_ring_wants_of_the_pool_is_never_lost(worker):
    """The control plane looks while the worker runs: it hears of each wish."""
    world = World(pool=[], limit=MIB)
    lane = Wired(world, worker)
    lane.offer((0, 3 * PAGE))
    end = time.monotonic() + RACE_SECONDS / 4
    while time.monotonic() < end:
        patience = time.monotonic() + Wired.PATIENCE
        os.eventfd_write(lane.kick_in, 1)
        while not (wanted := world.pool.take_wanted()):
            assert time.monotonic() < patience, "a wish was lost"
        assert wanted == 4 * PAGE
    lane.close()


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

        end = time.monotonic() + RACE_SECONDS / 4
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

        end = time.monotonic() + RACE_SECONDS / 2
        rounds = 0
        with meanwhile(serve):
            while time.monotonic() < end:
                while lane.driver.free:
                    lane.offer((8 * MIB, 3000, True))
                os.eventfd_write(lane.kick_in, 1)
                with worker.pause():
                    world.set_regions(without=[8 * MIB])
                world.ram.write(8 * MIB, bytes(3000))
                # Chains in flight complete without it; new ones are a fault.
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
        end = time.monotonic() + RACE_SECONDS / 2
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
                        while lane.pump.step()[0]:
                            pass
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

    end = time.monotonic() + RACE_SECONDS / 2
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
