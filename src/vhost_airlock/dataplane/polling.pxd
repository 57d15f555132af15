# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t

cdef enum:
    # The two ways: before it sleeps the worker polls, or it does not.
    POLL = 0
    SLEEP = 1

cdef struct Tally:
    # Chains that were moved, and the nanoseconds that it took.
    uint64_t moved
    uint64_t time


cdef class Polling:
    cdef uint64_t longest
    cdef uint64_t window
    cdef int way
    """The one at present; in a trial not always the better one."""
    cdef int better
    cdef Tally tally[2]
    """What the trial has found so far, of each way."""
    cdef int slices
    """So many are left of the trial; 0: there is none."""
    cdef uint64_t since
    """When the slice began, and what had been moved by then."""
    cdef uint64_t before
    cdef uint64_t until
    """When the slice ends, or the next trial begins."""
    cdef uint64_t rest
    """How long after a trial the next one begins."""

    cpdef void learn(self, uint64_t slept) noexcept nogil
    cpdef bint pays(self, uint64_t now, uint64_t moved) noexcept nogil
    cdef void end_slice(self, uint64_t now, uint64_t moved) noexcept nogil
    cdef void judge(self) noexcept nogil
