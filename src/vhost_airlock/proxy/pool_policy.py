# SPDX-License-Identifier: Apache-2.0
"""How large a device's pool is, and how much of it each ring may have.

The pool grows by a region when a worker asks for one, and gives regions back which
no request has used for a while. Half of its limit is split evenly among the rings, the
other half is for the ring that comes first.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from .back import Back
from .isolated import Region
from .ring import Ring
from .workers import Workers

IDLE_CHECK = 10.0
"""Seconds between looks for regions of the pool that no request uses."""
GROWTH_RETRY = 0.05
"""Seconds until a pool that could not grow may be asked to again."""


class PoolPolicy:
    """Growth, shrinking and shares of the pool of one device.

    `workers` run the rings of the device: they are paused while the pool changes.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._idle_regions: set[int] = set()
        """The regions that were idle at the last check."""
        self._next_idle_check = time.monotonic() + IDLE_CHECK
        self._next_growth: float | None = None
        """When to try once more to grow the pool, after it was not possible."""

    def look(self, back: Back) -> None:
        """Do what a worker has asked for, and what is due by the time."""
        self._grow(back)
        if time.monotonic() >= self._next_idle_check:
            self._next_idle_check = time.monotonic() + IDLE_CHECK
            self._shrink(back)

    def next_look(self, back: Back) -> float | None:
        """Return the seconds until look() has something to do by itself.

        None: it has not, unless a worker asks.
        """
        times = []
        if not back.memory.small:
            times.append(self._next_idle_check)
        if self._next_growth is not None:
            times.append(self._next_growth)
        return max(0.0, min(times) - time.monotonic()) if times else None

    def share(self, back: Back, rings: Collection[Ring]) -> None:
        """Split the pool anew among these rings, which are all that have a pump."""
        memory = back.memory
        each = memory.limit // 2 // len(rings)
        with self._workers.pause():
            for ring in rings:
                ring.set_guaranteed(each)
            memory.pool.set_common(memory.limit - each * len(rings))
            memory.pool.set_may_grow(memory.slots > 0)

    def _grow(self, back: Back) -> None:
        """Do so, if a worker has asked for it; where there is no room, others make way.

        If that is not possible, the worker may ask again in a while and not before.
        """
        if self._next_growth is not None:
            if time.monotonic() < self._next_growth:
                return
            self._next_growth = None
            with self._workers.pause():
                back.memory.pool.set_may_grow(True)
            return
        wanted = back.memory.pool.take_wanted()
        if not wanted or not back.memory.slots:
            return
        region = back.grow(wanted)
        if region is None:
            self._withdraw(back, self._idle(back))
            region = back.grow(wanted)
        if region is None:
            self._next_growth = time.monotonic() + GROWTH_RETRY
            return
        with self._workers.pause():
            back.memory.open(region)
            back.memory.pool.set_may_grow(True)

    def _shrink(self, back: Back) -> None:
        """Take regions back that were idle at the last look too, but for the first."""
        idle = self._idle(back)
        long_idle = sorted(idle & self._idle_regions - {0})
        self._idle_regions = idle
        if back.memory.slots and long_idle:
            self._withdraw(back, long_idle)

    def _idle(self, back: Back) -> set[int]:
        """Return the numbers of the regions that no request is in just now."""
        with self._workers.pause():
            return set(back.memory.idle())

    def _withdraw(self, back: Back, numbers: Collection[int]) -> None:
        """Take regions out of the pool, if they still are idle, and from the back."""
        gone: list[Region] = []
        with self._workers.pause():
            for number in set(numbers) & set(back.memory.idle()):
                gone.append(back.memory.withdraw(number))
        for region in gone:
            back.forget(region)
