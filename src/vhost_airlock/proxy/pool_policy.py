# SPDX-License-Identifier: Apache-2.0
"""How large a device's pool is, and how much of it each ring may have.

The pool grows by a region when a worker asks for one, and gives regions back which
no request has used for a while. Half of its limit is split evenly among the rings, the
other half is for the ring that comes first. A request that is larger than that gets a
lone region, which is there for this request only.

Nothing here waits for the back: it is told of one region at a time, and the next step
is taken when its answer has come. So the pool is always in one of few states:

| state | how it ends |
|---|---|
| settled | a worker asks for memory, or regions are idle |
| the back is told of a region | it has it: the region is opened |
| the back is told to forget a region | it has: the region is closed |
"""

from __future__ import annotations

import time
from collections.abc import Collection

from ..dataplane.pump import Pump
from .back import Back
from .isolated import Region
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
        self._wanted = 0
        """Bytes of the block that the pool is to have room for; 0: it has."""
        self._idle_regions: set[int] = set()
        """The regions that were idle at the last check."""
        self._leaving: list[int] = []
        """Regions that were idle for so long that they are withdrawn."""
        self._next_idle_check = time.monotonic() + IDLE_CHECK
        self._next_growth: float | None = None
        """When to try once more to grow the pool, after it was not possible."""

    def look(self, back: Back) -> None:
        """Serve the requests of the workers, and do all that is due by now."""
        for act in (self._serve_lone, self._grow, self._check_idle, self._shrink):
            if back.busy:
                return
            act(back)

    def next_look(self, back: Back) -> float | None:
        """Return the seconds until look() has something to do by itself.

        None: it has not, unless a worker asks or the back answers.
        """
        times = []
        if not back.memory.small:
            times.append(self._next_idle_check)
        if self._next_growth is not None:
            times.append(self._next_growth)
        if back.busy or not times:
            return None
        return max(0.0, min(times) - time.monotonic())

    def share(self, back: Back, pumps: Collection[Pump]) -> None:
        """Split the pool anew among these pumps, which are all of the device."""
        memory = back.memory
        each = memory.limit // 2 // len(pumps)
        with self._workers.pause():
            for pump in pumps:
                pump.set_guaranteed(each)
            memory.pool.set_common(memory.limit - each * len(pumps))
            memory.pool.set_may_grow(memory.slots > 0)

    def _serve_lone(self, back: Back) -> None:
        """Make the lone region, or make it anew after use."""
        memory = back.memory
        if not memory.pool.lone_due:
            return
        with self._workers.pause():
            wanted, closed = memory.close_lone()
        if not memory.lone_has_slot:
            memory.clear_lone()
            self._open_lone(back, memory.rings)
        elif closed is not None:
            back.forget(closed)
        else:
            region = memory.make_lone(wanted)
            back.announce(region, lambda: self._open_lone(back, region))

    def _open_lone(self, back: Back, region: Region) -> None:
        with self._workers.pause():
            back.memory.open_lone(region)

    def _grow(self, back: Back) -> None:
        """Do so, if a worker has asked for it; where there is no room, others make way.

        If that is not possible, the worker may ask again in a while and not before.
        """
        memory = back.memory
        if self._next_growth is not None:
            if time.monotonic() < self._next_growth:
                return
            self._next_growth = None
            self._allow_growth(back)
            return
        self._wanted = max(self._wanted, memory.pool.take_wanted())
        if not self._wanted or not memory.slots:
            return
        region = memory.grow(self._wanted)
        if region is not None:
            self._wanted = 0
            back.announce(region, lambda: self._open(back, region))
        elif idle := self._idle(back):
            self._withdraw(back, max(idle))  # and then it is tried once more
        else:
            self._wanted = 0
            self._next_growth = time.monotonic() + GROWTH_RETRY

    def _open(self, back: Back, region: Region) -> None:
        with self._workers.pause():
            back.memory.open(region)
            back.memory.pool.set_may_grow(True)

    def _allow_growth(self, back: Back) -> None:
        with self._workers.pause():
            back.memory.pool.set_may_grow(True)

    def _check_idle(self, back: Back) -> None:
        """Find the regions that were idle at the last check too, but for the first."""
        if time.monotonic() < self._next_idle_check:
            return
        self._next_idle_check = time.monotonic() + IDLE_CHECK
        idle = self._idle(back)
        if back.memory.slots:
            self._leaving = sorted(idle & self._idle_regions - {0})
        self._idle_regions = idle

    def _shrink(self, back: Back) -> None:
        """Withdraw the regions that were idle for long, one after the other."""
        while self._leaving and not back.busy:
            self._withdraw(back, self._leaving.pop())

    def _idle(self, back: Back) -> set[int]:
        """Return the numbers of the regions that no request is in just now."""
        with self._workers.pause():
            return set(back.memory.idle())

    def _withdraw(self, back: Back, number: int) -> None:
        """Take a region out of the pool, if it still is idle, and from the back."""
        with self._workers.pause():
            if number not in back.memory.idle():
                return
            region = back.memory.withdraw(number)
        back.forget(region)
