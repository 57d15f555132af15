# SPDX-License-Identifier: Apache-2.0
"""Shared memory that is cut short while rings run: the ring ends, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.plane import MIB, PAGE, Lane, Wired, World, await_event
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers import DriverRing
from vhost_airlock.vhost.fds import eventfd

LOST = "a page of memory that the ring or a request is in can't be had"
GOOD, BAD = 0, 8 * MIB
"""Guest addresses in two regions, of which the second will be cut."""
SIZE = 2 * PAGE


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def lane(world: World) -> Lane:
    return Lane(world)


def cut(world: World, address: int, size: int = 0) -> None:
    world.ram.pieces[address].cut(size)


def assert_lost(lane: Lane) -> None:
    """It stands still for good, and nothing of the pool is with it any more."""
    assert lane.fault == LOST
    assert lane.step() == 0
    assert not lane.pump.rest()
    lane.stop(None)


def assert_works(lane: Lane) -> None:
    lane.offer((GOOD, SIZE, True))
    assert lane.step() == 1
    lane.complete(lane.take(), b"x" * SIZE)
    assert lane.step() == 1
    assert len(lane.used()) == 1
    assert lane.world.ram.read(GOOD, SIZE) == b"x" * SIZE


def test_buffer_to_read_is_gone(world: World, lane: Lane) -> None:
    lane.offer((GOOD, SIZE), (BAD, SIZE), (GOOD, SIZE, True))
    cut(world, BAD)
    assert lane.step() == 0
    assert world.pool.used == 0
    assert lane.device.take() is None
    assert_lost(lane)


def test_buffer_to_write_is_gone(world: World, lane: Lane) -> None:
    lane.offer((GOOD, SIZE, True), (BAD, SIZE, True))
    assert lane.step() == 1
    assert world.pool.used > 0
    cut(world, BAD)
    lane.complete(lane.take(), b"x" * 2 * SIZE)
    assert lane.step() == 0
    assert world.pool.used == 0
    assert lane.used() == []
    assert_lost(lane)


def test_ring_is_gone(world: World, lane: Lane) -> None:
    lane.offer((GOOD, SIZE))
    cut(world, lane.ring_at)
    assert lane.step() == 0
    assert_lost(lane)


def test_ring_is_gone_with_a_completion_to_write(world: World, lane: Lane) -> None:
    lane.offer((GOOD, SIZE, True))
    lane.step()
    cut(world, lane.ring_at)
    lane.complete(lane.take(), b"x")
    assert lane.step() == 0
    assert world.pool.used == 0
    assert_lost(lane)


def test_indirect_table_is_gone(world: World, lane: Lane) -> None:
    lane.offer((GOOD, SIZE), (GOOD, SIZE, True), indirect=True)
    cut(world, lane.ring_at, lane.tables_at - lane.ring_at)
    assert lane.step() == 0
    assert_lost(lane)


def test_ring_is_gone_when_it_is_to_be_armed(world: World, lane: Lane) -> None:
    cut(world, lane.ring_at)
    assert not lane.pump.rest()
    assert_lost(lane)


def test_ring_is_gone_when_it_starts(world: World) -> None:
    lane = Lane(world, start=False)
    cut(world, lane.ring_at)
    lane.start(0)
    assert_lost(lane)


def test_ring_is_gone_when_it_stops(world: World, lane: Lane) -> None:
    cut(world, lane.ring_at)
    assert lane.stop(0) == (0, 0, True)


def test_pool_has_no_page(world: World, lane: Lane) -> None:
    """The back can't do that, as it is sealed; the system can."""
    (pool,) = world.pool_regions
    lane.offer((GOOD, SIZE))
    list(world.isolated.pieces.values())[pool].cut()
    assert lane.step() == 0
    assert world.pool.used == 0
    assert_lost(lane)


@pytest.mark.parametrize("keep", [0, 2 * PAGE])
def test_shadow_ring_has_no_page(world: World, lane: Lane, keep: int) -> None:
    """Its descriptors and rings, or the places for small buffers."""
    lane.offer((GOOD, 100), indirect=True)
    world.isolated.pieces[lane.piece_at].cut(keep)
    assert lane.step() == 0
    assert world.pool.used == 0
    assert_lost(lane)


def test_shadow_ring_has_no_page_when_it_is_made(world: World) -> None:
    """It is an error of the start, which has not begun then."""
    lane = Lane(world, start=False)
    world.isolated.pieces[lane.piece_at].cut()
    before = world.ram.read(lane.ring_at, lane.layout.end)
    with pytest.raises(MemoryError, match="ring 0: a page of memory can't be had"):
        lane.start(7)
    assert not lane.pump.attached
    assert world.ram.read(lane.ring_at, lane.layout.end) == before


def test_shadow_ring_has_no_page_when_late_completions_are_looked_for(
    world: World, lane: Lane
) -> None:
    """They come no more; all else is as at any start."""
    head = lane.offer((GOOD, SIZE, True))
    lane.step()
    chain = lane.take()
    assert lane.stop(1) == (0, 1, True)
    before = world.ram.read(lane.ring_at, lane.layout.end)
    world.isolated.pieces[lane.piece_at].cut()
    lane.pump.look_back()
    assert lane.pump.quarantined == 1
    assert world.ram.read(lane.ring_at, lane.layout.end) == before
    world.isolated.pieces[lane.piece_at].mend()
    lane.start(0)
    assert lane.pump.fault == 0
    assert lane.step() == 1
    assert lane.counter("adopted") == 1
    lane.complete(chain, b"late")
    assert lane.step() == 1
    assert lane.used() == [(head, 4)]


def test_shadow_ring_has_no_page_when_the_back_is_asked_for(
    world: World, lane: Lane
) -> None:
    """It can't say how far it has come then."""
    lane.device.arm()
    assert lane.pump.tells
    world.isolated.pieces[lane.piece_at].cut()
    assert not lane.pump.tells
    lane.step()
    assert_lost(lane)


def test_nothing_else_ends(world: World, lane: Lane) -> None:
    other = Lane(world)
    lane.offer((BAD, SIZE))
    cut(world, BAD)
    lane.step()
    assert lane.fault == LOST
    for _ in range(2 * other.size):
        assert_works(other)


def test_guest_gets_to_know_what_was_done_before(world: World, lane: Lane) -> None:
    """In the same step, and is called for it."""
    head = lane.offer((GOOD, SIZE, True))
    lane.offer((BAD, SIZE, True))
    lane.offer((GOOD, SIZE, True))
    lane.step()
    first, second, _third = lane.take(), lane.take(), lane.take()
    cut(world, BAD)
    lane.complete(first, b"x")
    lane.complete(second, b"x")
    assert lane.pump.step() == (0, True, False)
    assert lane.used() == [(head, 1)]
    # One was done; one is with the back still; one was cut off, so it is not done.
    assert lane.pump.outstanding == 2
    assert lane.pump.detach(3) == (3, 2, False)
    assert lane.pump.quarantined == 1


@pytest.mark.parametrize("last", [True, False])
def test_buffer_is_gone_when_a_late_completion_is_taken_back(
    world: World, lane: Lane, last: bool
) -> None:
    """In the step that adopts the chain, or at the start if later ones were done."""
    heads = [lane.offer((at, SIZE, True)) for at in (GOOD, BAD, GOOD)[: 3 - last]]
    lane.step()
    good, bad, *others = [lane.take() for _ in heads]
    lane.complete(good)
    for chain in others:
        lane.complete(chain)
    lane.step()
    assert len(lane.used()) == len(heads) - 1
    base, unfinished, is_last = lane.stop(len(heads))
    assert (base, unfinished, is_last) == (1 if last else 3, 1, last)
    lane.complete(bad, b"x")
    cut(world, BAD)
    lane.start(base)
    assert lane.step() == 0
    assert lane.fault == LOST
    assert lane.used() == []
    assert world.pool.used == 0
    # It is not done. The guest offers it again if it was the last one.
    assert lane.stop(None) == (1 if last else len(heads), 1, False)


@pytest.mark.parametrize("writable", [False, True])
def test_ring_that_is_set_up_anew_has_all_its_slots(
    world: World, writable: bool
) -> None:
    """Also those of the chain that was cut off."""
    lane = Lane(world, size=4, back_indirect=False)
    lane.offer((GOOD, SIZE, writable), (BAD, SIZE, writable))
    if writable:
        lane.step()
        lane.complete(lane.take(), b"x" * 2 * SIZE, length=0)
    cut(world, BAD)
    lane.step()
    assert_lost(lane)
    world.ram.pieces[BAD].mend()
    world.ram.view(lane.ring_at, lane.layout.end)[:] = bytes(lane.layout.end)
    lane.driver = DriverRing(lane.ring)
    lane.start(0)
    for _ in range(lane.size):
        lane.offer((BAD, SIZE, writable))
    assert lane.step() == lane.size
    assert len([lane.take() for _ in range(lane.size)]) == lane.size


def test_worker_goes_on_and_tells_of_it(world: World) -> None:
    with eventfd() as events:
        worker = Worker(events.fileno(), poll_us=1000)
        thread = threading.Thread(target=worker.run)
        thread.start()
        lanes = [Wired(world, worker) for _ in range(2)]
        try:
            broken, other = lanes
            cut(world, broken.ring_at)
            os.eventfd_write(broken.kick_in, 1)
            await_event(events.fileno(), Wired.PATIENCE)
            assert broken.fault == LOST
            for _ in range(3):
                other.offer((GOOD, SIZE, True))
                other.kick()
                other.complete(other.await_chain(), b"x" * SIZE)
                other.call()
                other.await_used()
        finally:
            for lane in lanes:
                lane.close()
            worker.stop()
            thread.join()


def test_c10_loss_that_is_found_on_the_way_to_sleep_is_told_at_once(
    world: World,
) -> None:
    """Of the used ring, which is written when the worker asks for the next kick."""
    with eventfd() as events, eventfd() as err:
        worker = Worker(events.fileno())
        lane = Wired(world, worker, size=2048)
        lane.pump.set_fds(kick_out=lane.kick_out, err_out=err.fileno())
        worker.add(lane.pump)
        used = lane.layout.used
        assert lane.layout.avail // PAGE < used // PAGE
        cut(world, lane.ring_at, used // PAGE * PAGE)
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            await_event(err.fileno(), Wired.PATIENCE)
            await_event(events.fileno(), Wired.PATIENCE)
            assert lane.fault == LOST
        finally:
            lane.close()
            worker.stop()
            thread.join()


# Everywhere else, a SIGBUS is what it was.

OUTSIDE = """
import faulthandler, mmap, os
import vhost_airlock.dataplane.pump
fd = os.memfd_create("x")
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
os.ftruncate(fd, 0)
"""


@pytest.mark.parametrize(
    "code",
    ["memory[0]", "os.kill(os.getpid(), 7)"],
    ids=["access", "signal"],
)
@pytest.mark.parametrize("handler", ["", "faulthandler.enable()\n"], ids=["", "told"])
def test_outside_of_a_step_it_ends_the_process(code: str, handler: str) -> None:
    # A sanitizer would see to it that it is another signal.
    options = os.environ.get("ASAN_OPTIONS", "") + ":handle_sigbus=0"
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE + handler + code],
        env={**os.environ, "ASAN_OPTIONS": options},
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(handler)
