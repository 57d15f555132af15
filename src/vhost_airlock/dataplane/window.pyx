# SPDX-License-Identifier: Apache-2.0
"""How much a ring has in flight: no more than its back can use, where that pays.

Requests beyond that only wait, and leave the processor's caches meanwhile. So the ring
holds chains while it has its window in flight: they wait in the guest's ring, where
they cost nothing. The window is twice the rate of delivery times the time that a
request takes when few others are there (as congestion control does it), and never less
than the floor, which caches hold. Every REST both are measured:

- the rate, for OPENED slices without any limit;
- the time, by a *probe*: for one SLICE the ring has half of the floor in flight at
  most. That, divided by the rate, is the mean time of a request (Little's law). The
  shortest time would be wrong for a back whose times vary.

So the window is twice what was in flight in the probe, times the rate without a limit,
divided by the rate in the probe. Where it could do harm, or no good, there is none:

- Below the rate FAST, copies cost little with cold caches too. A slow back is never
  held, and not even probed.
- A window of more than ENOUGH floors is no use, since caches don't hold it.
- A window is dropped, until the next REST is over, with which the back delivers less
  than PART of the rate without a limit in GUARD slices, or nothing at all in STILL
  ones.
  The worker wakes once a SLICE for a ring that holds a chain.
- A chain with nothing for the device to read is never held: it is a buffer that waits
  for a packet. Neither is a chain while nothing else is in flight, of whatever size.
- Slices in which the guest ran out of chains don't count.

A back with a fixed time and a highest rate loses by that no more than the probe, half a
percent. One that has any other shape loses some more, but not for more than GUARD
slices, and a twentieth for longer.
"""

from libc.stdint cimport uint64_t

cdef double ENOUGH = 1.5
# Pages a nanosecond: 1 GiB/s.
cdef double FAST = 262_144e-9
cdef double PART = 0.95
cdef uint64_t REST = 10_000_000_000

cdef enum:
    # Nanoseconds for which a rate is measured.
    SLICE = SLICE_MS * 1_000_000
    # Slices that a probe may take, with the time until the ring has no more in flight.
    PATIENCE = 3
    OPENED = 5
    GUARD = 25
    STILL = 4


cdef void begin(WindowState *window, uint64_t floor) noexcept nogil:
    """The ring starts, and nothing is known. floor 0: it never has a window."""
    window.floor = floor
    open_for(window, 0)
    if floor == 0:
        window.mark = NO_LIMIT


cdef void fix(WindowState *window, uint64_t limit) noexcept nogil:
    """The window is this one until the next start."""
    open_for(window, 0)
    window.limit = limit
    window.mark = NO_LIMIT


cdef void look(WindowState *window, uint64_t in_flight, uint64_t now) noexcept nogil:
    """A pass begins with so much in flight: do what is due by now."""
    if window.phase == OPEN:
        measure_open(window, now)
    elif window.phase == PROBE:
        probe(window, in_flight, now)
    elif now >= window.until:
        open_for(window, now)
    else:
        guard(window, now)


cdef void note_held(WindowState *window, uint64_t in_flight) noexcept nogil:
    """A chain is held, with so much in flight."""
    if window.since:
        window.level = max(window.level, in_flight)


cdef void run_dry(WindowState *window) noexcept nogil:
    """The guest has no more to offer: if there is a limit, it was not what counted, and
    the slice is void.
    """
    if window.mark == 0:
        window.since = 0


cdef void open_for(WindowState *window, uint64_t until) noexcept nogil:
    """Have no limit, and measure nothing until then."""
    window.phase = OPEN
    window.limit = NO_LIMIT
    window.mark = window.floor
    window.until = until
    window.since = 0


cdef void measure_open(WindowState *window, uint64_t now) noexcept nogil:
    """Begin the probe, if the slice is over and its rate is worth it."""
    if now < window.until:
        return
    if window.since == 0 or now - window.since >= (OPENED + 1) * <uint64_t> SLICE:
        start_slice(window, now)    # it had too little in flight for a while
    elif now - window.since >= OPENED * <uint64_t> SLICE:
        window.rate = end_slice(window, now)
        if window.rate >= FAST:
            window.phase = PROBE
            window.limit = max(<uint64_t> 1, window.floor // 2)
            window.mark = 0
            window.level = 0
            window.since = 0
            window.until = now + PATIENCE * <uint64_t> SLICE


cdef void probe(WindowState *window, uint64_t in_flight, uint64_t now) noexcept nogil:
    """Measure the time, once there is no more in flight than the probe shall have."""
    if window.since and now - window.since >= <uint64_t> SLICE:
        open_window(window, end_slice(window, now), now)
    elif now >= window.until:
        open_for(window, now + REST)
    elif window.since == 0 and in_flight < window.limit:
        start_slice(window, now)


cdef void open_window(WindowState *window, double rate, uint64_t now) noexcept nogil:
    """The probe is over, and had this rate."""
    cdef double most = <double> window.floor * ENOUGH
    cdef double size = most

    if rate > 0:
        size = 2.0 * window.level * window.rate / rate
    if window.level == 0 or size >= most:
        open_for(window, now + REST)
        return
    window.phase = LEARNT
    window.limit = max(window.floor, <uint64_t> size)
    window.until = now + REST


cdef void guard(WindowState *window, uint64_t now) noexcept nogil:
    """Drop the window if it does harm."""
    if window.since == 0:
        start_slice(window, now)
    if window.seen != window.delivered:
        window.seen = window.delivered
        window.moved = now
    elif now - window.moved >= STILL * <uint64_t> SLICE:
        open_for(window, now + REST)
        return
    if now - window.since >= GUARD * <uint64_t> SLICE:
        if end_slice(window, now) < PART * window.rate:
            open_for(window, now + REST)


cdef void start_slice(WindowState *window, uint64_t now) noexcept nogil:
    window.since = now
    window.before = window.seen = window.delivered
    window.moved = now


cdef double end_slice(WindowState *window, uint64_t now) noexcept nogil:
    """Returns the rate of the slice; the next one has begun."""
    cdef double delivered = window.delivered - window.before
    cdef double rate = delivered / (now - window.since)

    start_slice(window, now)
    return rate


cdef class Window:
    """A window by itself, for simulations: the caller makes up the clock and the back.

    Amounts in pages, times in nanoseconds. `floor`: what caches hold.
    """

    def __init__(self, uint64_t floor):
        begin(&self.state, floor)

    def look(self, uint64_t in_flight, uint64_t delivered, uint64_t now):
        """A pass begins: so much is in flight, and so much was completed in all."""
        self.state.delivered = delivered
        if in_flight >= self.state.mark:
            look(&self.state, in_flight, now)

    def holds(self, uint64_t in_flight):
        """With so much in flight, is the next chain held?"""
        if in_flight < self.state.limit:
            return False
        note_held(&self.state, in_flight)
        return True

    def run_dry(self):
        """The guest has nothing to offer."""
        run_dry(&self.state)

    @property
    def limit(self):
        """None: there is no limit."""
        return None if self.state.limit == NO_LIMIT else self.state.limit
