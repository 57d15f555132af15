# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t

cdef enum:
    # The two modes: before it sleeps the worker polls, or it does not.
    POLL = 0
    SLEEP = 1

cdef struct Tally:
    # Chains that were moved in a mode, and its time in nanoseconds.
    uint64_t moved
    uint64_t time


cdef class Polling:
    cdef uint64_t longest
    cdef uint64_t window
    cdef int way
    """The mode at present; in a trial not always the better one."""
    cdef int better
    cdef Tally tally[2]
    """The trial's results so far, of each mode."""
    cdef int slices
    """The slices that are left of the trial; 0: there is no trial."""
    cdef uint64_t since
    """The time when the slice began, and in `before` the chains moved by then."""
    cdef uint64_t before
    cdef uint64_t until
    """The time when the slice ends, or the next trial begins."""
    cdef uint64_t rest
    """The time from the end of a trial to the next one."""

    cpdef void learn(self, uint64_t slept) noexcept nogil
    cpdef bint pays(self, uint64_t now, uint64_t moved) noexcept nogil
    cdef void end_slice(self, uint64_t now, uint64_t moved) noexcept nogil
    cdef void judge(self) noexcept nogil
