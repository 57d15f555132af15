# SPDX-License-Identifier: Apache-2.0
"""Four workers set bits in the same words of a dirty log, while the VMM takes them out.

The VMM has a copy of the guest's memory. As in a migration, it copies each page whose
bit it has taken, and when the workers stand still, those that are left: then the copy
has to be the same as the memory. A bit that is lost, or that comes before its store,
leaves an old page in the copy.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import pytest

from tests.support.dirty import LogFile
from tests.support.plane import MIB, PAGE, Wired, World
from tests.support.profiles import RACE_SECONDS
from tests.support.racers import Racers, back_of, guest_of
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers.ring import DESC_F_NEXT, DESC_F_WRITE

LANES = 4
SIZE = 128
HEADS = 16
"""Chains of 8 descriptors, each for a page of its own."""
LENGTH = 8
LONGEST = 0.002
"""Seconds between two looks of the VMM at the log, at the most."""
RINGS_AT = 16 * MIB
END = RINGS_AT + LANES * (1 << 32)


@pytest.fixture(scope="module")
def racers(tmp_path_factory: pytest.TempPathFactory) -> Racers:
    return Racers(tmp_path_factory.mktemp("racers"))


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    with contextlib.ExitStack() as stack:
        made = []
        for _ in range(LANES):
            events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(os.close, events)
            worker = Worker(events, poll_us=50)
            thread = threading.Thread(target=worker.run)
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(worker.stop)
            made.append(worker)
        yield made


@contextlib.contextmanager
def paused(workers: Sequence[Worker]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.enter_context(worker.pause())
        yield


def lane_of(world: World, worker: Worker, number: int) -> Wired:
    """Its chains have each fifth page of the guest's, so that each byte of the log has
    bits of all lanes, and one of another device, or two.
    """
    lane = Wired(world, worker, size=SIZE)
    lane.pump.set_guaranteed(MIB)
    for i in range(SIZE):
        # The heads are the first ones, and the others stand behind them.
        following = i + HEADS
        flags = DESC_F_WRITE | (DESC_F_NEXT if following < SIZE else 0)
        lane.ring.write_desc(i, page_of(number, i) * PAGE, LENGTH, flags, following)
    return lane


def page_of(lane: int, descriptor: int) -> int:
    return descriptor * (LANES + 1) + lane


class Vmm:
    """The copy of what devices write, by pieces of at most a page."""

    def __init__(self, world: World, lanes: Sequence[Wired], log: LogFile) -> None:
        self.world = world
        self.log = log
        self.pieces: dict[int, list[tuple[int, int]]] = {}
        for lane in lanes:
            used = lane.ring_at + lane.layout.used
            self.add(used, lane.layout.used_size)
            for i in range(SIZE):
                self.add(page_of(lane.index, i) * PAGE, LENGTH)
        self.copy = {
            piece: self.world.ram.read(*piece)
            for pieces in self.pieces.values()
            for piece in pieces
        }

    def add(self, address: int, size: int) -> None:
        while size:
            run = min(size, PAGE - address % PAGE)
            self.pieces.setdefault(address // PAGE, []).append((address, run))
            address, size = address + run, size - run

    def sync(self) -> None:
        for page in self.log.take():
            for piece in self.pieces[page]:
                self.copy[piece] = self.world.ram.read(*piece)

    def check(self) -> None:
        for piece, copied in self.copy.items():
            assert self.world.ram.read(*piece) == copied, f"stale at {piece[0]:#x}"


def test_four_workers_lose_no_bit(workers, racers):
    world = World(pool=8 * MIB, rings_at=RINGS_AT, shared=True)
    lanes = [lane_of(world, worker, i) for i, worker in enumerate(workers)]
    chance = random.Random(2)
    with contextlib.ExitStack() as stack:
        logs = [
            stack.enter_context(closing(LogFile.up_to(END, offset)))
            for offset in (0, 3)
        ]
        vmm = Vmm(world, lanes, logs[0])
        with paused(workers):
            world.log_into(logs[0])
        sides = [guest_of(lane, HEADS) for lane in lanes]
        backs = [back_of(lane) for lane in lanes]
        end = time.monotonic() + RACE_SECONDS
        rounds = 0
        with racers.racing(*sides, *backs):
            while time.monotonic() < end or rounds < 10:
                for _ in range(chance.randrange(4)):
                    time.sleep(chance.random() * LONGEST)
                    vmm.sync()
                with paused(workers):
                    vmm.sync()
                    vmm.check()
                    if chance.random() < 0.5:
                        logs.reverse()
                        vmm.log = logs[0]
                        world.log_into(vmm.log)
                    assert logs[1].take() == set(), "marked in a log of before"
                rounds += 1
        for lane in lanes:
            assert lane.fault is None
            assert lane.counter("completions") > rounds
            assert lane.counter("unlogged") == 0
            lane.close()
        for log in logs:
            assert log.intact()
    world.check()


@pytest.mark.parametrize("offset", [0, 3])
def test_four_workers_take_no_bit_from_another_device(workers, racers, offset):
    world = World(pool=8 * MIB, rings_at=RINGS_AT, shared=True)
    lanes = [lane_of(world, worker, i) for i, worker in enumerate(workers)]
    with closing(LogFile.up_to(END, offset)) as log:
        with paused(workers):
            world.log_into(log)
        guests = [guest_of(lane, HEADS) for lane in lanes]
        backs = [back_of(lane) for lane in lanes]
        others = {page_of(LANES, i) for i in range(SIZE)}
        end = time.monotonic() + RACE_SECONDS
        with racers.racing(*guests, *backs), log.hammered(others):
            while time.monotonic() < end or not all(
                lane.counter("completions") > 100 for lane in lanes
            ):
                time.sleep(0.01)
        with paused(workers):
            pass
        mine = {page_of(lane.index, i) for lane in lanes for i in range(SIZE)}
        assert mine <= log.take()
        for lane in lanes:
            lane.close()
