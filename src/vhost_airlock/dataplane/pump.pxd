# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint64_t, uintptr_t

from vhost_airlock.dataplane.pool cimport Pool
from vhost_airlock.dataplane.regions cimport GuestMemory
from vhost_airlock.dataplane.step cimport PumpState


cdef class Pump:
    cdef PumpState state
    cdef GuestMemory memory
    cdef Pool pool
    cdef int index
    cdef int call_out
    cdef int err_out
    cdef int kick_out
    cdef int log_out
    cdef bint parked
    """A stop has left chains behind, which the guest may still wait for."""
    cdef bint broken
    """The back has broken the ring since, so it may have none of them any more."""
    cdef uint64_t standing
    """If so, where the guest's ring stood."""
    cdef uint64_t resumes_at
    """If so, the position at which the ring goes on."""
    cdef bint left
    """The ring has stopped here before."""
    cdef uint64_t left_base
    """If so, at this base."""
    cdef uint16_t left_used
    """And there its used ring stood."""
    cdef readonly str news
    """For the log, of the last start: about the record of the chains in flight."""
    cdef _grow(self, uint16_t size)
    cdef _show_again(self)
    cdef list _open_record(self, record, base)
    cdef _keep_accused(self, list heads)
    cdef list _at_back(self)
    cdef bint _goes_on(self)
    cdef bint _stands(self)
    cdef _resume(self, list heads)
    cdef _offer_anew(self)
    cdef _hand_back(self, bint told)
    cdef _place_areas(self, uint16_t first, uintptr_t host, uint64_t back)
    cdef str _details(self, int fault)
