# SPDX-License-Identifier: Apache-2.0
"""How much a ring has in flight: back-ends that are made up, and so is the clock."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_airlock.dataplane.window import Window

MIB = 256
"""In pages."""
FLOOR = 4 * MIB
MS = 1_000_000
SECOND = 1_000_000_000
SLICE = 20 * MS
OPENED = 5 * SLICE
REST = 10 * SECOND
PAGES_OF_GB = 1e9 / 4096
"""A gigabyte in pages."""
WORD = st.integers(min_value=0, max_value=(1 << 64) - 1)


@dataclass
class BackEnd:
    """It moves `rate` gigabytes a second at most, and each request takes `time` ms more
    than that. Times in nanoseconds.

    `every`: it shows completions only each so many ms. `batch`: it completes nothing
    until it has so many requests. `lanes`: it is so many disks in truth, and chance
    says which one has a request.
    """

    rate: float
    time: Callable[[], float]
    every: float = 0
    batch: int = 1
    lanes: int = 1

    def __post_init__(self) -> None:
        self._chance = random.Random(2)
        self._free = [0.0] * self.lanes
        self._waiting: list[int] = []

    def take(self, now: int, pages: int) -> list[int]:
        """Take a request; return the times when requests will be done."""
        self._waiting.append(pages)
        if len(self._waiting) < self.batch:
            return []
        done = []
        for size in self._waiting:
            lane = self._chance.randrange(self.lanes)
            takes = size / PAGES_OF_GB / self.rate * SECOND * self.lanes
            self._free[lane] = max(self._free[lane], now) + takes
            at = self._free[lane] + self.time() * MS
            if self.every:
                at += -at % (self.every * MS)
            done.append(int(at))
        self._waiting.clear()
        return done


class Run:
    """A guest that always has `depth` requests of `size` pages, and its ring."""

    def __init__(self, back: BackEnd, *, size: int, depth: int, window: bool) -> None:
        self.back = back
        self.size = size
        self.window = Window(FLOOR if window else 0)
        self.now = SECOND
        self.delivered = 0
        self.in_flight = 0
        self.most = 0
        """The most pages in flight since it was set to zero."""
        self.longest = 0
        """The longest time without a completion."""
        self._offered = deque([size] * depth)
        self._done: list[int] = []
        self._held = False

    def run(self, seconds: float) -> int:
        """Let time go on; return the pages that were delivered."""
        before, end = self.delivered, self.now + int(seconds * SECOND)
        last = self.now
        while self.now < end:
            self._step()
            due = self._done[0] if self._done else end
            if self._held:
                due = min(due, self.now + SLICE)
            self.now = min(end, max(due, self.now + 1))
            while self._done and self._done[0] <= self.now:
                heapq.heappop(self._done)
                self.in_flight -= self.size
                self.delivered += self.size
                self._offered.append(self.size)
                self.longest = max(self.longest, self.now - last)
                last = self.now
        return self.delivered - before

    def _step(self) -> None:
        self.window.look(self.in_flight, self.delivered, self.now)
        self._held = False
        while self._offered:
            self._held = self.in_flight > 0 and self.window.holds(self.in_flight)
            if self._held:
                return
            for at in self.back.take(self.now, self._offered.popleft()):
                heapq.heappush(self._done, at)
            self.in_flight += self.size
            self.most = max(self.most, self.in_flight)
        self.window.run_dry()


def steady(time: float) -> Callable[[], float]:
    return lambda: time


def jittery(time: float) -> Callable[[], float]:
    """Nine of ten take a tenth of `time`, one takes nine times as long as `time`."""
    chance = random.Random(1)
    return lambda: time * (0.1 if chance.random() < 0.9 else 9)


TIMES = [0.1, 1, 10]
RATES = [0.05, 0.5, 2, 10]
KINDS = {
    "steady": lambda rate, time: BackEnd(rate, steady(time)),
    "jittery": lambda rate, time: BackEnd(rate, jittery(time)),
    "bursty": lambda rate, time: BackEnd(rate, steady(time), every=2 * time),
}


class TestNothingIsLost:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rate", RATES)
    @pytest.mark.parametrize("time", TIMES)
    @pytest.mark.parametrize(
        ("size", "depth"), [(MIB, 32), (MIB, 128), (16 * MIB, 16)], ids=str
    )
    def test_whatever_the_back_end(self, kind, rate, time, size, depth):
        """With the first probe among them, three seconds bring as much as without."""
        make = KINDS[kind]
        shape = {"size": size, "depth": depth}
        with_window = Run(make(rate, time), window=True, **shape).run(3)
        without = Run(make(rate, time), window=False, **shape).run(3)
        assert with_window >= 0.97 * without - 4 * size

    def test_one_that_waits_for_more_than_it_gets(self):
        """It stands still for a moment, and moves on."""
        back = BackEnd(4, steady(0.1), batch=64)
        run = Run(back, size=MIB, depth=128, window=True)
        free = Run(BackEnd(4, steady(0.1), batch=64), size=MIB, depth=128, window=False)
        assert run.run(9) >= 0.97 * free.run(9)
        assert run.longest <= 6 * SLICE

    @pytest.mark.parametrize("lanes", [2, 4, 8, 32])
    def test_little_is_lost_where_each_request_more_helps_a_little(self, lanes):
        def run(window):
            back = BackEnd(8, steady(0.1), lanes=lanes)
            return Run(back, size=MIB, depth=64, window=window).run(9)

        assert run(True) >= 0.94 * run(False)

    def test_a_slow_one_is_never_held(self):
        run = Run(BackEnd(0.9, steady(0.1)), size=MIB, depth=16, window=True)
        run.run(1)
        assert run.window.limit is None
        run.most = 0
        run.run(30)
        assert run.most == 16 * MIB
        assert run.window.limit is None


class TestWhatItLearns:
    def test_a_quick_one_gets_what_caches_hold(self):
        run = Run(BackEnd(8, steady(0.1)), size=MIB, depth=32, window=True)
        run.run(0.3)
        assert run.window.limit == FLOOR
        run.most = 0
        run.run(1)
        assert run.most == FLOOR

    def test_it_is_never_less_than_what_caches_hold(self):
        """Not even if the back-end was faster in the probe."""
        window, now = Window(FLOOR), SECOND
        window.look(FLOOR, 0, now)
        window.look(FLOOR, 8 * MIB * 20, now + OPENED)
        assert window.limit == FLOOR // 2
        now += OPENED + MS
        window.look(FLOOR // 2 - MIB, 8 * MIB * 20, now)
        assert window.holds(FLOOR // 2)
        window.look(FLOOR // 2 - MIB, 8 * MIB * 60, now + SLICE)
        assert window.limit == FLOOR

    def test_it_opens_to_twice_rate_times_time(self):
        """8 GB/s for 0.28 ms, and the requests' own 0.03, are 2.5 MB."""
        run = Run(BackEnd(8, steady(0.28)), size=MIB // 4, depth=400, window=True)
        run.run(0.5)
        product = 8 * PAGES_OF_GB * 0.00031
        assert run.window.limit is not None
        assert 1.9 * product < run.window.limit < 2.2 * product

    def test_more_than_caches_hold_is_no_use(self):
        run = Run(BackEnd(8, steady(1)), size=MIB // 4, depth=400, window=True)
        run.run(0.5)
        assert run.window.limit is None

    def test_requests_that_are_larger_than_half_of_it(self):
        """Two of them are a little less than the window: a third one may go."""
        run = Run(BackEnd(8, steady(0.01)), size=640, depth=16, window=True)
        run.run(1)
        run.most = 0
        run.run(1)
        assert run.most == 3 * 640

    def test_requests_that_no_cache_holds_are_not_held(self):
        run = Run(BackEnd(8, steady(0.01)), size=16 * MIB, depth=16, window=True)
        run.run(1)
        assert run.window.limit is None

    def test_little_in_flight_is_never_looked_at(self):
        run = Run(BackEnd(8, steady(0.1)), size=1, depth=128, window=True)
        run.run(0.3)
        assert run.window.limit is None

    def test_it_is_dropped_when_the_back_end_needs_more(self):
        back = BackEnd(8, steady(0.1))
        run = Run(back, size=MIB, depth=64, window=True)
        run.run(1)
        assert run.window.limit == FLOOR
        back.time = steady(5)
        run.run(1)
        assert run.window.limit is None
        assert run.run(1) > 0.95 * 8 * PAGES_OF_GB

    def test_it_is_dropped_when_nothing_is_completed(self):
        back = BackEnd(8, steady(0.1))
        run = Run(back, size=MIB, depth=32, window=True)
        run.run(1)
        assert run.window.limit == FLOOR
        back.batch = 32
        run.longest = 0
        run.run(1)
        assert run.window.limit is None
        assert SLICE <= run.longest < 110 * MS

    def test_a_guest_with_less_to_do_does_not_end_it(self):
        run = Run(BackEnd(8, steady(0.1)), size=MIB, depth=32, window=True)
        run.run(1)
        for _ in range(50):
            run.window.run_dry()
            run.now += SLICE
            run.window.look(0, run.delivered, run.now)
        assert run.window.limit == FLOOR

    def test_it_probes_again(self):
        """The first window is a little too small for the back's new time."""
        back = BackEnd(8, steady(0.1))
        run = Run(back, size=MIB, depth=64, window=True)
        run.run(1)
        back.time = steady(0.2)
        run.run(8)
        assert run.window.limit == FLOOR
        run.run(2)
        assert run.window.limit is not None
        assert 1.1 * FLOOR < run.window.limit < 1.5 * FLOOR


@given(
    floor=st.integers(min_value=1, max_value=(1 << 64) - 1),
    steps=st.lists(st.tuples(WORD, WORD, WORD, st.booleans()), max_size=60),
)
def test_no_number_breaks_it(floor, steps):
    """Half of the floor in a probe, else the floor at least; no division by zero."""
    window = Window(floor)
    for in_flight, delivered, now, dry in steps:
        window.look(in_flight, delivered, now)
        window.holds(in_flight)
        if dry:
            window.run_dry()
        assert window.limit is None or window.limit >= max(1, floor // 2)


@given(
    floor=st.integers(min_value=1, max_value=1 << 50),
    pace=st.lists(
        st.tuples(
            st.integers(min_value=0, max_value=1 << 40),
            st.integers(min_value=1, max_value=3 * SLICE),
        ),
        max_size=100,
    ),
)
def test_no_pace_breaks_it(floor, pace):
    """The same, with a clock that goes on as clocks do."""
    window, now, delivered = Window(floor), SECOND, 0
    for pages, time in pace:
        now += time
        delivered += pages
        for in_flight in (0, floor, 4 * floor):
            window.look(in_flight, delivered, now)
            window.holds(in_flight)
            assert window.limit is None or window.limit >= max(1, floor // 2)


def test_without_a_floor_there_is_none():
    run = Run(BackEnd(8, steady(0.1)), size=MIB, depth=32, window=False)
    run.run(1)
    assert run.window.limit is None
    assert run.most == 32 * MIB
