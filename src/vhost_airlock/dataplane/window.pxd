# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t

from vhost_airlock.dataplane.layout cimport load64

cdef extern from "<stdint.h>" nogil:
    const uint64_t NO_LIMIT "UINT64_MAX"

cdef enum:
    # Milliseconds for which a rate is measured.
    SLICE_MS = 20

cdef enum Phase:
    # The ring has no limit; above the floor, its rate is measured.
    OPEN
    # It has half of the floor at most, and its rate is measured.
    PROBE
    # It has the window that the probe has shown.
    LEARNT

cdef struct WindowState:
    # All amounts are in pages of the pool, all times in nanoseconds.
    # With so much in flight the next chain is held.
    uint64_t limit
    # With so much in flight at the beginning of a pass, look() is due.
    uint64_t mark
    # Caches hold so much: no window is smaller.
    uint64_t floor
    # All that the back has completed.
    uint64_t delivered
    Phase phase
    # The time when the phase ends; while OPEN, before which nothing is measured.
    uint64_t until
    # The time when the slice began, or 0: there is none; and `delivered` by then.
    uint64_t since
    uint64_t before
    # `delivered` at the last look, and the time when it changed.
    uint64_t seen
    uint64_t moved
    # The rate without a limit, in pages a nanosecond.
    double rate
    # The most that was in flight when a chain was held in the probe's slice.
    uint64_t level

cdef void begin(WindowState *window, uint64_t floor) noexcept nogil
cdef void fix(WindowState *window, uint64_t limit) noexcept nogil
cdef void look(WindowState *window, uint64_t in_flight, uint64_t now) noexcept nogil
cdef void note_held(WindowState *window, uint64_t in_flight) noexcept nogil
cdef void run_dry(WindowState *window) noexcept nogil

cdef inline uint64_t shown(const WindowState *window) noexcept nogil:
    """The window, or 0 if there is none. Any thread may ask."""
    cdef uint64_t limit = load64(&window.limit)

    return 0 if limit == NO_LIMIT else limit


cdef class Window:
    cdef WindowState state
