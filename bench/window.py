# SPDX-License-Identifier: Apache-2.0
"""The cost of the window for slow and jittery back-ends.

    python -m bench.window [SECONDS]

A ring with 64 requests of 1 MiB in flight, and a back-end of known rate and time, both
ends of which are this program; it never sleeps. Runs with and without a window
alternate, each with a new pump and worker, so the first measurements of the window are
among them. It prints the ratio of what they moved, and the window that was found.
"""

from __future__ import annotations

import heapq
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product

from tests.support.plane import MIB, PAGE, Wired, World
from vhost_airlock.dataplane.worker import Worker

DEPTH = 64
PAIRS = 5
RATES = (0.05, 0.5, 2, 10)
"""Gigabytes a second."""
TIMES = (0.1, 1, 10)
"""Milliseconds."""
KINDS = ("steady", "jittery", "bursty")
CACHED = 4 * MIB


class Clock:
    """When the requests of a back-end are done, in seconds."""

    def __init__(self, kind: str, rate: float, ms: float) -> None:
        self._kind = kind
        self._each = MIB / rate / 1e9
        self._time = ms / 1e3
        self._free = 0.0
        self._chance = random.Random(1)

    def due(self, now: float) -> float:
        """When is a request done that comes now?"""
        self._free = max(self._free, now) + self._each
        time = self._time
        if self._kind == "jittery":
            time *= 0.1 if self._chance.random() < 0.9 else 9
        due = self._free + time
        if self._kind == "bursty":
            due += -due % (2 * self._time)
        return due


def run(clock: Clock, cached: int, seconds: float) -> tuple[float, int]:
    """Return the requests a second, and the window in bytes; 0: there is none."""
    regions = ((0, MIB), (MIB, DEPTH * MIB))
    world = World(regions=regions, pool=2 * DEPTH * MIB, rings_at=1 << 40)
    events = os.eventfd(0, os.EFD_NONBLOCK)
    worker = Worker(events, poll_us=200)
    thread = threading.Thread(target=worker.run)
    thread.start()
    lane = Wired(world, worker, size=4 * DEPTH, cached=cached)
    try:
        done = 0
        end = 0.0
        for count in traffic(lane, clock):
            now = time.perf_counter()
            end = end or now + seconds
            done += count
            if now >= end:
                break
        return done / seconds, lane.counter("window")
    finally:
        lane.close()
        worker.stop()
        thread.join()
        os.close(events)


def traffic(lane: Wired, clock: Clock) -> Iterator[int]:
    """Keep DEPTH requests in flight; yield how many the guest has found completed."""
    waiting: list[tuple[float, int]] = []
    free = list(range(DEPTH))
    at: dict[int, int] = {}
    while True:
        for number in free:
            where = (number * PAGE, 16), ((1 + number) * MIB, MIB, True)
            at[lane.offer(*where, indirect=True)] = number
        if free:
            lane.kick()
        now = time.perf_counter()
        while chain := lane.device.take():
            heapq.heappush(waiting, (clock.due(now), chain.head))
        ends = 0
        while waiting and waiting[0][0] <= now:
            lane.device.complete(heapq.heappop(waiting)[1], MIB)
            ends += 1
        if ends:
            lane.device.publish()
            lane.call()
        free = [at.pop(head) for head, _ in lane.used()]
        yield len(free)


def main(seconds: float) -> None:
    print(f"{'kind':8} {'GB/s':>5} {'ms':>5} {'ratio':>6} {'moved/s':>9}  window")
    for kind, rate, ms in product(KINDS, RATES, TIMES):
        ratios, found, moved = [], set(), []
        for pair in range(PAIRS):
            results = {}
            for cached in (0, CACHED) if pair % 2 else (CACHED, 0):
                results[cached] = run(Clock(kind, rate, ms), cached, seconds)
            found.add(results[CACHED][1] / MIB)
            moved.append(results[0][0])
            if results[0][0]:
                ratios.append(results[CACHED][0] / results[0][0])
        ratio = statistics.median(ratios) if ratios else float("nan")
        windows = " ".join(f"{size:.1f}" for size in sorted(found))
        print(
            f"{kind:8} {rate:5} {ms:5} {ratio:6.3f} {statistics.median(moved):9.0f}"
            f"  {windows}",
            flush=True,
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 2.0)
