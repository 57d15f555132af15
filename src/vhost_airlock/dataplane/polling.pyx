# SPDX-License-Identifier: Apache-2.0
"""The decision if and how long a worker polls before it sleeps.

Each of its parts brings something that the others don't, on two cores:

- polling: 4 KiB reads one at a time have 1.7 to 2.5 of the direct rate, without it 0.5;
- the window: an idle device costs no CPU time, and storage that is slow next to none;
  that it grows bit by bit spares a tenth of the CPU time with 32 requests of 64 KiB;
- trials: between two ends of DPDK that poll, 4 to 14 times the packets; on a host that
  is short of processors 1.16 times the rate of a disk, for 0.7 of the airlock's CPU
  time (benchmarks.md, "Tried", has the rules that were tried instead).

The time to poll, the window, is learned from the worker's sleeps: after a sleep of at
most `longest`, which polling would have saved, the window grows; after a longer sleep
it is zero again. An idle device is never polled.

Trials decide if the worker polls at all, for that depends on the host and on its other
busy processes. Where a core takes long to wake from idleness, polling more than doubles
the rate. Where VMM and back poll as well, and there is no core for each, polling takes
processor time from them. So in a trial the worker alternates both modes for 120 ms, and
keeps the faster. The next trial is after a rest, which grows while the mode stays.
"""

cimport cython
from libc.stdint cimport uint64_t

from vhost_airlock.dataplane.layout cimport load64, load_int

cdef enum:
    # The smallest window but zero, in nanoseconds.
    FIRST_WINDOW = 20_000
    # A trial has SLICES slices of SLICE nanoseconds. A slice that took TOO_LONG is not
    # counted, for then the guest had no requests for a while.
    SLICES = 12
    SLICE = 10_000_000
    TOO_LONG = 40_000_000
    # A trial with fewer chains in all changes nothing.
    ENOUGH = 200
    # Nanoseconds from a trial to the next, doubled as long as the mode stays.
    REST = 200_000_000
cdef uint64_t LONGEST_REST = 8_000_000_000


@cython.final
cdef class Polling:
    """The polling of one worker: its window, mode and trials. Times in nanoseconds.

    `longest` is the most that it may poll before it sleeps; 0: never.
    """

    def __init__(self, uint64_t longest):
        self.longest = longest
        self.way = self.better = POLL
        self.rest = REST

    cpdef void learn(self, uint64_t slept) noexcept nogil:
        """A chain moved again, after this time of sleep: adapt the window to it."""
        if slept > self.longest:
            self.window = 0
        else:
            self.window = min(
                self.longest, max(<uint64_t> FIRST_WINDOW, 2 * self.window)
            )

    cpdef bint pays(self, uint64_t now, uint64_t moved) noexcept nogil:
        """Shall the worker poll? `moved`: chains that it has moved in all by `now`."""
        if now >= self.until:
            self.end_slice(now, moved)
        return self.way == POLL and self.window != 0

    @property
    def now(self):
        """The time to poll at present; 0: none. Any thread may ask."""
        return load64(&self.window) if load_int(&self.way) == POLL else 0

    cdef void end_slice(self, uint64_t now, uint64_t moved) noexcept nogil:
        """End a slice or a rest: begin the next slice, or judge the trial and rest."""
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
        """Change to the other mode if it was faster by a tenth: less may be noise."""
        cdef Tally *better = &self.tally[self.better]
        cdef Tally *other = &self.tally[1 - self.better]

        if better.moved + other.moved < ENOUGH:
            self.rest = REST
        elif other.moved * better.time * 10 > better.moved * other.time * 11:
            self.better = 1 - self.better
            self.rest = REST
        else:
            self.rest = min(LONGEST_REST, 2 * self.rest)
