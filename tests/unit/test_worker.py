# SPDX-License-Identifier: Apache-2.0
"""The worker: notifications through real eventfds, sleep, pause, turns."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import select
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.limits import no_more_fds
from tests.support.plane import MIB, PAGE, Wired, World
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.errors import DeadlineExceeded

QUIET = 0.15
"""Seconds in which an idle worker must not wake."""


@contextlib.contextmanager
def running(worker: Worker) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield thread
    finally:
        worker.stop()
        thread.join(10)
        assert not thread.is_alive(), "the worker does not stop"


@pytest.fixture
def events():
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture(params=[0, 200], ids=["blocking", "polling"])
def worker(request, events):
    """One that runs."""
    worker = Worker(events, poll_us=request.param)
    with running(worker):
        yield worker


@pytest.fixture
def world():
    world = World()
    yield world
    world.check()


@pytest.fixture
def wire(world, worker):
    """Makes lanes of the worker, and takes them apart."""
    lanes: list[Wired] = []

    def make(**options) -> Wired:
        lanes.append(Wired(world, worker, **options))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


def signalled(fd: int, timeout: float = 5.0) -> bool:
    return bool(select.select([fd], [], [], timeout)[0])


def count(fd: int) -> int:
    """The count of an eventfd."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def until(what, timeout=5.0):
    """Wait for something that nobody notifies of."""
    end = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.001)


def at_rest(worker: Worker) -> None:
    """Wait until the worker has done all there is, and sleeps."""
    with worker.pause():
        before = worker.counters()["sleeps"]
    until(lambda: worker.counters()["sleeps"] > before)
    seen = None
    while seen != (seen := worker.counters()["rounds"]):
        time.sleep(0.02)


def assert_still(worker: Worker) -> None:
    """Nothing wakes the worker, not even a time-out of its own: of what does not happen
    there is no event."""
    before = worker.counters()
    time.sleep(QUIET)
    assert worker.counters() == before


def one_request(lane: Wired, payload: bytes) -> None:
    """From the guest through the back, and an answer back."""
    lane.world.ram.write(0x1000, payload)
    head = lane.offer((0x1000, len(payload)), (0x2000, len(payload), True))
    lane.kick()
    chain = lane.await_chain()
    assert lane.bytes_of(chain) == payload
    lane.complete(chain, payload[::-1])
    lane.call()
    assert lane.await_used() == [(head, len(payload))]
    assert lane.world.ram.read(0x2000, len(payload)) == payload[::-1]


class TestNotifications:
    @pytest.mark.parametrize("guest_event_idx", [False, True])
    @pytest.mark.parametrize("back_event_idx", [False, True])
    def test_none_is_lost(self, wire, guest_event_idx, back_event_idx):
        """5,000 single requests each, with delays that hit every gap."""
        lane = wire(
            size=4,
            base=0xFF00,
            guest_event_idx=guest_event_idx,
            back_event_idx=back_event_idx,
        )
        chance = random.Random(1)

        def linger():
            if chance.random() < 0.3:
                end = time.perf_counter_ns() + chance.randrange(40_000)
                while time.perf_counter_ns() < end:
                    pass

        for _ in range(5000):
            lane.offer((0, 16))
            linger()
            lane.kick()
            linger()
            chain = lane.await_chain()
            linger()
            lane.complete(chain)
            linger()
            lane.call()
            linger()
            lane.await_used()

    @pytest.mark.parametrize("event_idx", [False, True])
    def test_none_is_lost_with_more_in_flight(self, wire, event_idx):
        """Guest and back each in a thread of its own, up to 16 chains between them."""
        lane = wire(size=16, guest_event_idx=event_idx, back_event_idx=event_idx)
        total = 3000
        errors: list[BaseException] = []

        def back():
            try:
                for _ in range(total):
                    lane.complete(lane.await_chain())
                    lane.call()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=back)
        thread.start()
        offered = done = 0
        while done < total and not errors:
            while offered < total and lane.driver.free:
                lane.offer((0, 16), indirect=True)
                offered += 1
                lane.kick()
            done += len(lane.await_used())
        thread.join()
        assert errors == []
        assert lane.counter("completions") == total

    def test_payload_arrives(self, wire):
        lane = wire()
        for length in (1, 100, 600, 4096):
            one_request(lane, random.Random(length).randbytes(length))

    def test_a_batch_costs_one_of_each(self, wire, worker):
        lane = wire(size=64)
        with worker.pause():
            for _ in range(50):
                lane.offer((0, 16))
            lane.device.arm()
        at_rest(worker)
        assert count(lane.kick_out) == 1
        chains = [lane.await_chain() for _ in range(50)]
        with worker.pause():
            for chain in chains:
                lane.complete(chain)
            lane.driver.arm()
        at_rest(worker)
        assert lane.counter("kicks") == 1
        assert lane.counter("calls") == 1
        assert len(lane.await_used(50)) == 50

    def test_a_sleeping_worker_is_called_once_for_a_batch(self, wire, worker):
        lane = wire(size=64)
        one_request(lane, b"x")
        at_rest(worker)
        lane.driver.kick_needed()
        kicks = 0
        for _ in range(30):
            lane.offer((0, 16))
            kicks += lane.driver.kick_needed()
        assert kicks == 1
        os.eventfd_write(lane.kick_in, 1)
        for _ in range(30):
            lane.complete(lane.await_chain())
        lane.call()
        assert len(lane.await_used(30)) == 30

    def test_eventfds_are_not_read(self, wire, worker):
        """So nobody who shares their description can make the worker block."""
        lane = wire()
        for _ in range(3):
            os.eventfd_write(lane.kick_in, 1)
            os.eventfd_write(lane.call_in, 1)
            at_rest(worker)
        assert (count(lane.kick_in), count(lane.call_in)) == (3, 3)

    def test_eventfds_that_would_block_do_no_harm(self, wire, worker):
        lane = wire()
        os.set_blocking(lane.kick_in, True)
        os.set_blocking(lane.call_in, True)
        for _ in range(10):
            one_request(lane, b"request")

    def test_a_ring_without_eventfds_still_moves(self, world, worker):
        lane = Wired(world, worker)
        with worker.pause():
            lane.pump.set_fds()
            worker.add(lane.pump)
        lane.offer((0, 16))
        os.eventfd_write(lane.kick_in, 1)
        until(lambda: lane.shadow.avail_idx == 1)
        lane.complete(lane.take())
        os.eventfd_write(lane.call_in, 1)
        until(lambda: lane.ring.used_idx == 1)
        lane.close()


class TestSleep:
    def test_an_idle_worker_does_not_wake(self, wire, worker):
        lanes = [wire() for _ in range(3)]
        for lane in lanes:
            one_request(lane, b"wake up")
        at_rest(worker)
        assert_still(worker)

    def test_a_worker_without_rings_sleeps(self, worker):
        at_rest(worker)
        assert_still(worker)

    @pytest.mark.parametrize("posted", ["unfetched", "fetched"])
    def test_posted_buffers_keep_nobody_awake(self, wire, worker, posted):
        lane = wire()
        for _ in range(4):
            lane.offer((0, PAGE, True))
        lane.kick()
        for _ in range(4 if posted == "fetched" else 1):
            lane.await_chain()
        at_rest(worker)
        assert_still(worker)

    def test_a_ring_that_waits_for_room_keeps_nobody_awake(self, events, worker):
        world = World(pool=2 * PAGE)
        lane = Wired(world, worker)
        for _ in range(4):
            lane.offer((0, PAGE, True))
        lane.kick()
        chain = lane.await_chain()
        at_rest(worker)
        assert_still(worker)
        lane.complete(chain)
        lane.call()
        lane.await_used()
        lane.close()

    def test_it_looks_again_at_a_ring_that_has_enough_in_flight(self, wire, worker):
        """With no notification: if that is enough still depends on the time."""
        lane = wire()
        with worker.pause():
            lane.pump.set_window(PAGE)
        for _ in range(2):
            lane.offer((0, 16), (PAGE, PAGE, True))
        lane.kick()
        chain = lane.await_chain()
        before = worker.counters()["sleeps"]
        until(lambda: worker.counters()["sleeps"] > before + 5)
        assert worker.counters()["vain"] <= 1, "the kick may have come late"
        assert lane.counter("chains") == 1
        lane.complete(chain)
        lane.call()
        lane.await_used()
        lane.await_chain()
        at_rest(worker)
        assert_still(worker)

    @pytest.mark.parametrize("fault", ["guest", "back", "unmapped"])
    def test_a_broken_ring_keeps_nobody_awake(self, wire, worker, fault):
        lane = wire(size=4)
        with worker.pause():
            if fault == "guest":
                lane.ring.avail_idx = 9
            elif fault == "back":
                lane.shadow.used_idx = 9
            else:
                lane.pump.move(None)
        until(lambda: lane.pump.fault)
        at_rest(worker)
        assert_still(worker)

    def test_polling_begins_when_it_pays_and_ends_when_it_does_not(self, events):
        worker = Worker(events, poll_us=20_000)
        with running(worker):
            lane = Wired(World(), worker)

            def polls() -> bool:
                one_request(lane, b"x")
                return worker.counters()["window"] > 0

            until(polls)
            assert worker.counters()["window"] <= 20_000_000
            time.sleep(0.1)
            one_request(lane, b"x")
            time.sleep(0.1)
            one_request(lane, b"x")
            at_rest(worker)
            lane.close()
        # The worker learned from its last sleep, which was long.
        assert worker.counters()["sleeps"] > 0

    def test_waking_in_vain_teaches_nothing(self, events):
        """These sleeps are short, but polling would not have spared them."""
        worker = Worker(events, poll_us=1_000_000)
        with running(worker):
            lane = Wired(World(), worker)
            at_rest(worker)
            for number in range(1, 11):
                os.eventfd_write(lane.kick_in, 1)
                until(lambda n=number: worker.counters()["vain"] == n)
            assert worker.counters()["window"] == 0
            lane.close()

    def test_without_polling_there_is_no_window(self, events):
        worker = Worker(events)
        with running(worker):
            lane = Wired(World(), worker)
            for _ in range(50):
                one_request(lane, b"x")
            assert worker.counters()["window"] == 0
            lane.close()


class TestCounters:
    """Facts that only the counters can tell."""

    def test_polling_is_counted(self, events):
        worker = Worker(events, poll_us=20_000)
        with running(worker):
            lane = Wired(World(), worker)
            began = time.monotonic_ns()
            while worker.counters()["polled"] < 20_000:
                one_request(lane, b"x")
            lane.close()
        assert worker.counters()["spins"] > 0
        assert worker.counters()["polled"] < time.monotonic_ns() - began

    def test_without_polling_none_is_counted(self, events):
        worker = Worker(events)
        with running(worker):
            lane = Wired(World(), worker)
            for _ in range(20):
                one_request(lane, b"x")
            lane.close()
        counters = worker.counters()
        assert (counters["spins"], counters["polled"]) == (0, 0)

    def test_waking_in_vain_is_counted(self, events):
        worker = Worker(events)
        with running(worker):
            lane = Wired(World(), worker)
            at_rest(worker)
            before = worker.counters()
            assert before["vain"] == 0, "only the control plane has woken it"
            for number in range(1, 4):
                os.eventfd_write(lane.kick_in, 1)
                until(
                    lambda n=number: worker.counters()["sleeps"] == before["sleeps"] + n
                )
                assert worker.counters()["vain"] == number
            lane.offer((0, 16))
            os.eventfd_write(lane.kick_in, 1)
            lane.await_chain()
            at_rest(worker)
            assert worker.counters()["vain"] == 3
            lane.close()


class TestStorm:
    """Somebody notifies without end, and there is nothing to move."""

    @contextlib.contextmanager
    def storm(self, fd):
        stop = threading.Event()

        def kick():
            while not stop.is_set():
                os.eventfd_write(fd, 1)

        thread = threading.Thread(target=kick)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @pytest.mark.timing
    @pytest.mark.parametrize("side", ["guest", "back"])
    def test_b4_the_worker_wakes_once_a_millisecond_at_most(self, wire, worker, side):
        lane = wire()
        one_request(lane, b"x")
        at_rest(worker)
        fd = lane.kick_in if side == "guest" else lane.call_in
        before, start = worker.counters()["vain"], time.monotonic()
        with self.storm(fd):
            until(lambda: worker.counters()["vain"] > before + 200, 30)
        woken = worker.counters()["vain"] - before
        assert woken < 64 + 1000 * (time.monotonic() - start) + 2

    def test_what_comes_in_a_storm_is_served(self, wire, worker):
        """Of the ring that is stormed, too; and pauses do not wait for long."""
        lane, other = wire(), wire()
        with self.storm(lane.kick_in):
            before = worker.counters()["vain"]
            until(lambda: worker.counters()["vain"] > before + 100, 30)
            for _ in range(20):
                one_request(other, b"other")
                one_request(lane, b"stormed")
                with worker.pause():
                    pass


class TestEvents:
    """The events that one eventfd tells the control plane."""

    def test_of_a_fault_once(self, wire, worker, events):
        lane = wire(size=4)
        lane.ring.avail_idx = 9
        os.eventfd_write(lane.kick_in, 1)
        assert signalled(events)
        assert lane.pump.fault != 0
        at_rest(worker)
        assert count(events) == 1
        os.eventfd_write(lane.kick_in, 1)
        at_rest(worker)
        assert count(events) == 0

    def test_of_the_same_fault_after_a_new_start(self, wire, worker, events):
        """Also if the worker has made no round in between."""
        lane = wire(size=4)
        lane.ring.avail_idx = 9
        os.eventfd_write(lane.kick_in, 1)
        assert signalled(events)
        at_rest(worker)
        assert count(events) == 1
        with worker.pause():
            lane.stop(0)
            lane.start(0)
            worker.add(lane.pump)
        assert signalled(events), "a fault that nobody hears of"
        assert lane.pump.fault != 0

    def test_of_a_drained_ring(self, wire, worker, events):
        lane = wire()
        lane.offer((0, 16))
        lane.kick()
        chain = lane.await_chain()
        lane.device.arm()
        with worker.pause():
            lane.pump.set_taking(False)
            lane.pump.set_draining(True)
            worker.add(lane.pump)
        at_rest(worker)
        assert count(events) == 0
        lane.complete(chain)
        lane.call()
        assert signalled(events)
        assert lane.pump.drained

    def test_of_a_ring_that_is_drained_already(self, wire, worker, events):
        lane = wire()
        with worker.pause():
            lane.pump.set_draining(True)
            worker.add(lane.pump)
        assert signalled(events)

    def test_of_a_ring_that_is_drained_a_second_time(self, wire, worker, events):
        lane = wire()
        for _ in range(2):
            with worker.pause():
                lane.pump.set_draining(True)
            assert signalled(events)
            count(events)
            with worker.pause():
                lane.pump.set_draining(False)
            one_request(lane, b"between")

    def test_of_a_pool_that_is_too_small(self, worker, events):
        world = World(pool=[], limit=64 * PAGE)
        world.pool.set_may_grow(True)
        lane = Wired(world, worker)
        lane.offer((0, 3 * PAGE))
        lane.kick()
        assert signalled(events)
        assert count(events) == 1
        # Only once, until it is told that it may ask again.
        os.eventfd_write(lane.kick_in, 1)
        at_rest(worker)
        assert count(events) == 0
        assert world.pool.take_wanted() == 4 * PAGE
        with worker.pause():
            world.grow(4 * PAGE)
            world.pool.set_may_grow(True)
        lane.complete(lane.await_chain())
        lane.call()
        lane.await_used()
        lane.close()


class TestPause:
    def test_nothing_moves_meanwhile(self, wire, worker):
        lane = wire()
        with worker.pause():
            lane.offer((0, 16))
            os.eventfd_write(lane.kick_in, 1)
            assert_still(worker)
            assert lane.shadow.avail_idx == 0
        lane.complete(lane.await_chain())
        lane.call()
        lane.await_used()

    def test_under_load(self, wire, worker):
        """A pause sees whole rounds only, and nothing is lost by it."""
        lane = wire(size=64)
        stop = threading.Event()
        errors: list[BaseException] = []
        done = 0

        def traffic():
            nonlocal done
            try:
                while not stop.is_set():
                    while lane.driver.free:
                        lane.offer((0, 700), (PAGE, 700, True), indirect=True)
                    lane.kick()
                    lane.complete(lane.await_chain())
                    lane.call()
                    done += len(lane.await_used())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=traffic)
        thread.start()
        for _ in range(300):
            with worker.pause():
                before = lane.pump.counters(), worker.counters()
                time.sleep(0)
                assert (lane.pump.counters(), worker.counters()) == before
        until(lambda: done > 100 or errors)
        stop.set()
        thread.join()
        assert errors == []

    def test_pauses_nest(self, wire, worker):
        lane = wire()
        with worker.pause(), worker.pause():
            lane.offer((0, 16))
        with worker.pause():
            with worker.pause():
                pass
            os.eventfd_write(lane.kick_in, 1)
            assert_still(worker)
        lane.await_chain()

    def test_several_threads_may_pause(self, wire, worker):
        lane = wire()
        inside: list[int] = []
        errors: list[BaseException] = []

        def pauses():
            try:
                for _ in range(200):
                    with worker.pause():
                        inside.append(worker.counters()["rounds"])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=pauses) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            one_request(lane, b"meanwhile")
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(inside) == 600

    def test_an_error_inside_ends_it(self, wire, worker):
        lane = wire()
        with pytest.raises(KeyError), worker.pause():
            raise KeyError
        one_request(lane, b"goes on")

    def test_one_that_is_not_had_in_time_changes_nothing(self, wire, worker):
        lane = wire()
        one_request(lane, b"it runs")
        with pytest.raises(DeadlineExceeded), worker.pause(0):
            pytest.fail("no time, but a pause")
        one_request(lane, b"goes on")

    def test_before_the_worker_runs(self, events):
        worker = Worker(events)
        with worker.pause():
            thread = threading.Thread(target=worker.run)
            thread.start()
            assert_still(worker)
            assert worker.counters()["rounds"] == 0
        until(lambda: worker.counters()["rounds"])
        worker.stop()
        thread.join()

    def test_after_the_worker_has_stopped(self, events):
        worker = Worker(events)
        with running(worker):
            pass
        with worker.pause(0.1):
            pass

    def test_stop_during_a_pause_waits_for_its_end(self, events):
        worker = Worker(events)
        with running(worker) as thread:
            with worker.pause():
                worker.stop()
                thread.join(0.02)
                assert thread.is_alive()
            thread.join(5)
            assert not thread.is_alive()

    @pytest.mark.timing
    def test_i5_a_kick_that_the_back_makes_wait_is_interrupted(self, world, events):
        """It can fill the counter of its eventfd, and make a write to that wait."""
        worker = Worker(events)
        with running(worker):
            lane, other = Wired(world, worker), Wired(world, worker)
            for _ in range(3):
                os.set_blocking(lane.kick_out, False)
                count(lane.kick_out)
                os.eventfd_write(lane.kick_out, (1 << 64) - 2)
                os.set_blocking(lane.kick_out, True)
                lane.device.arm()
                lane.offer((0, 16))
                lane.kick()
                until(lambda: lane.shadow.avail_idx != lane.device.next_avail)
                start = time.monotonic()
                with worker.pause(5):
                    assert time.monotonic() - start < 1
                lane.take()
                one_request(other, b"goes on")
            # Nor does it keep the worker from its end.
            lane.device.arm()
            lane.offer((0, 16))
            lane.kick()
            until(lambda: lane.shadow.avail_idx != lane.device.next_avail)
            lane.close()
            other.close()


class TestTurns:
    def test_each_ring_has_its_turn_in_each_round(self, events):
        """However much the first one has to do: 1 MiB is the most in one turn."""
        world = World(pool=128 * MIB)
        worker = Worker(events)
        with running(worker):
            busy, other = Wired(world, worker, size=64), Wired(world, worker)
            with worker.pause():
                for _ in range(60):
                    busy.offer((1 << 32, MIB // 4))
                other.offer((0, 16))
            seen = set()
            while busy.shadow.avail_idx < 60:
                with worker.pause():
                    moved = busy.shadow.avail_idx
                    assert moved % 4 == 0
                    assert moved == 0 or other.shadow.avail_idx
                    seen.add(moved)
            assert seen - {0, 60}, "never seen in the middle"
            busy.close()
            other.close()

    def test_rings_come_and_go_while_others_run(self, wire, worker):
        steady = wire()
        for i in range(50):
            lane = Wired(steady.world, worker, size=4)
            one_request(lane, bytes([i]))
            one_request(steady, b"steady")
            lane.close()
            lane.world.lanes.remove(lane)
            one_request(steady, b"goes on")

    def test_24_rings(self, wire):
        lanes = [wire(size=8) for _ in range(24)]
        for i in range(200):
            one_request(lanes[i * 7 % 24], b"one of many")
        for lane in lanes:
            lane.offer((0, 16))
            lane.kick()
        for lane in lanes:
            lane.complete(lane.await_chain())
            lane.call()
        for lane in lanes:
            lane.await_used()

    def test_a_ring_that_was_removed_is_left_alone(self, wire, worker):
        lane = wire()
        with worker.pause():
            worker.remove(lane.pump)
        lane.offer((0, 16))
        os.eventfd_write(lane.kick_in, 1)
        at_rest(worker)
        assert lane.shadow.avail_idx == 0
        with worker.pause():
            worker.remove(lane.pump)
            worker.add(lane.pump)
        lane.await_chain()

    def test_a_ring_may_stop_and_start(self, wire, worker):
        lane = wire(size=4)
        for _ in range(30):
            lane.offer((0, 16))
            lane.kick()
            chain = lane.await_chain()
            with worker.pause():
                base, unfinished, last = lane.stop(lane.device.next_avail)
                assert (unfinished, last) == (1, True)
                lane.start(base)
            # The back has this chain still, and ends it in the ring that it has now.
            lane.complete(chain)
            lane.call()
            assert len(lane.await_used()) == 1
            assert lane.device.take() is None

    def test_a_call_goes_out_for_what_was_done_while_the_ring_was_stopped(
        self, wire, worker
    ):
        """The first of two chains comes late, and behind the base the ring goes on."""
        lane = wire(size=4)
        heads = [lane.offer((PAGE * i, 16, True)) for i in range(2)]
        lane.kick()
        slow, quick = lane.await_chain(), lane.await_chain()
        lane.complete(quick)
        lane.call()
        assert [head for head, _ in lane.await_used()] == heads[1:]
        with worker.pause():
            base, unfinished, last = lane.stop(lane.device.next_avail)
            assert (base, unfinished, last) == (2, 1, False)
            lane.complete(slow)
            lane.start(base)
        assert [head for head, _ in lane.await_used()] == heads[:1]

    @pytest.mark.parametrize("poll_us", [0, 200])
    def test_a_ring_goes_on_when_another_workers_ring_gives_room(self, events, poll_us):
        world = World(pool=2 * PAGE, shared=True)
        one, other = Worker(events, poll_us=poll_us), Worker(events, poll_us=poll_us)
        with running(one), running(other):
            full, waits = Wired(world, one), Wired(world, other)
            for _ in range(20):
                full.offer((0, 2 * PAGE, True))
                full.kick()
                chain = full.await_chain()
                waits.offer((0, PAGE, True))
                waits.kick()
                at_rest(other)
                full.complete(chain)
                full.call()
                full.await_used()
                waits.complete(waits.await_chain())
                waits.call()
                waits.await_used()
            full.close()
            waits.close()


class TestDescriptors:
    def test_what_can_not_be_waited_for_is_refused(self, worker, tmp_path):
        with (
            (tmp_path / "file").open("wb") as file,
            pytest.raises(ValueError, match="1"),
        ):
            worker.watch(file.fileno())
        with pytest.raises(ValueError, match=r"-1 cannot be waited for \(errno 9\)"):
            worker.watch(-1)

    def test_twice_is_once(self, worker):
        fd = os.eventfd(0)
        worker.watch(fd)
        worker.watch(fd)
        worker.unwatch(fd)
        worker.unwatch(fd)
        os.close(fd)

    def test_a_closed_one_can_not_be_unwatched(self, worker):
        fd = os.eventfd(0)
        os.close(fd)
        with pytest.raises(OSError, match="cannot stop to wait"):
            worker.unwatch(fd)

    def test_i9_a_worker_leaves_no_descriptors_and_threads(self, events):
        gc.collect()
        fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(20):
            worker = Worker(events)
            with running(worker):
                pass
            del worker
        assert len(os.listdir("/proc/self/fd")) == fds
        assert threading.active_count() == threads

    def test_without_room_for_them_there_is_no_worker(self, events):
        gc.collect()
        before = os.listdir("/proc/self/fd")
        for room in range(2):
            with no_more_fds(room), pytest.raises(OSError, match="cannot make") as told:
                Worker(events)
            assert told.value.errno == errno.EMFILE
        assert os.listdir("/proc/self/fd") == before

    def test_i9_a_closed_one_has_none_though_somebody_holds_it(self, events):
        """As an error that was logged does, as long as the log keeps its record."""
        gc.collect()
        gc.collect()
        fds = os.listdir("/proc/self/fd")
        worker = Worker(events)
        with running(worker):
            pass
        worker.close()
        assert os.listdir("/proc/self/fd") == fds
        others = [os.eventfd(0), os.eventfd(0)]  # they have the same numbers now
        worker.close()
        del worker
        for fd in others:
            os.close(fd)

    def test_regression_a_worker_that_was_not_made_closes_nothing(self, events):
        """It had 0 for its descriptors then, and closed stdin."""
        spare = os.dup(0) if os.path.exists("/proc/self/fd/0") else None
        mine = os.open("/dev/null", os.O_RDONLY)
        os.dup2(mine, 0)
        try:
            with pytest.raises(OverflowError):
                Worker(events, poll_us=-1)
            assert os.fstat(0)
        finally:
            os.close(mine)
            if spare is not None:
                os.dup2(spare, 0)
                os.close(spare)


def test_call_that_is_due_is_sent_though_the_worker_is_to_end():
    """A ring that was drained at the end of its session: its guest may sleep."""
    world = World()
    worker = Worker(-1)
    thread = threading.Thread(target=worker.run)
    thread.start()
    lane = Wired(world, worker)
    with worker.pause():
        lane.pump.call()
        lane.stop(0)
        worker.stop()
    thread.join()
    assert count(lane.call_out) == 1
    lane.close()
    worker.close()
