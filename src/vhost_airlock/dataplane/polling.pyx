# SPDX-License-Identifier: Apache-2.0
"""Whether a worker that has nothing to do polls before it sleeps, and for how long.

For how long is learned from its sleeps: one that ended within the longest time which
polling may take would have been spared by polling, so the window grows; after a longer
one it is zero again. An idle device is never polled.

Whether at all is tried out, for it depends on the host and on who else is busy. Where
a core takes long to wake from idleness, polling more than doubles the rate; where VMM
or back poll as well and there is no core for each, it keeps them from working. So from
time to time the worker does both in turns, and goes on with what has moved more.
"""

cimport cython
from libc.stdint cimport uint64_t

from vhost_airlock.dataplane.layout cimport load64, load_int

cdef enum:
    # Nanoseconds of polling to start from.
    FIRST_WINDOW = 20_000
    # A trial is so many slices of so many nanoseconds. One that took much longer says
    # nothing, for then the guest had nothing to do.
    SLICES = 12
    SLICE = 10_000_000
    TOO_LONG = 40_000_000
    # Less than so many chains in all say nothing either.
    ENOUGH = 200
    # Nanoseconds from a trial to the next, which double as long as nothing changes.
    REST = 200_000_000
cdef uint64_t LONGEST_REST = 8_000_000_000


@cython.final
cdef class Polling:
    """What one worker has learned. Times are in nanoseconds.

    `longest` is the most that it may poll before it sleeps; 0: never.
    """

    def __init__(self, uint64_t longest):
        self.longest = longest
        self.way = self.better = POLL
        self.rest = REST

    cpdef void learn(self, uint64_t slept) noexcept nogil:
        """Something moved again, after so much sleep: would polling have spared it?"""
        if slept > self.longest:
            self.window = 0
        else:
            self.window = min(
                self.longest, max(<uint64_t> FIRST_WINDOW, 2 * self.window)
            )

    cpdef bint pays(self, uint64_t now, uint64_t moved) noexcept nogil:
        """Is it time to poll? By now so many chains were moved in all."""
        if now >= self.until:
            self.end_slice(now, moved)
        return self.way == POLL and self.window != 0

    @property
    def now(self):
        """How long to poll at present. Any thread may ask."""
        return load64(&self.window) if load_int(&self.way) == POLL else 0

    cdef void end_slice(self, uint64_t now, uint64_t moved) noexcept nogil:
        """Begin the next one, or a trial, or end it."""
        cdef uint64_t time = now - self.since

        if self.slices == 0:
            self.tally[POLL] = self.tally[SLEEP] = Tally(0, 0)
            self.slices = SLICES
        else:
            if time < TOO_LONG:
                self.tally[self.way].moved += moved - self.before
                self.tally[self.way].time += time
            self.slices -= 1
        self.since = now
        self.before = moved
        if self.slices:
            self.way = 1 - self.way
            self.until = now + SLICE
        else:
            self.judge()
            self.way = self.better
            self.until = now + self.rest

    cdef void judge(self) noexcept nogil:
        """Change to the other way if it was faster, by a tenth: not for noise."""
        cdef Tally *better = &self.tally[self.better]
        cdef Tally *other = &self.tally[1 - self.better]

        if better.moved + other.moved < ENOUGH:
            self.rest = REST
        elif other.moved * better.time * 10 > better.moved * other.time * 11:
            self.better = 1 - self.better
            self.rest = REST
        else:
            self.rest = min(LONGEST_REST, 2 * self.rest)
