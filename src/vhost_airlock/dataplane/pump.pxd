# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.bounce cimport CopyPolicy, Slot
from vhost_airlock.dataplane.guest cimport Chain, GuestRing
from vhost_airlock.dataplane.layout cimport Desc
from vhost_airlock.dataplane.pool cimport Pool, PoolState, Share
from vhost_airlock.dataplane.regions cimport GuestMemory, RegionTable
from vhost_airlock.dataplane.shadow cimport ShadowRing

cdef struct Counters:
    # Written by whoever runs the pump, and by nobody else; read by anybody.
    uint64_t chains
    uint64_t completions
    # Copied from the guest to the back.
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t kicks
    uint64_t calls
    # Chains that had to wait for room.
    uint64_t stalls
    uint64_t violations
    # Completions that claimed more bytes than there was room for.
    uint64_t clamped
    uint64_t faults

cdef struct PumpState:
    RegionTable *memory
    int hint
    PoolState *pool
    Share share
    CopyPolicy policy
    GuestRing guest
    ShadowRing shadow
    Slot *slot
    # For each position of the shadow ring the slot that was offered there.
    uint16_t *order
    # How many there is memory for; at least the size of the ring.
    uint16_t slots
    # Chains offered since the start, modulo 2^16.
    uint16_t offered
    # Chains completed since the start, modulo 2^16.
    uint16_t done
    # Chains offered and not done.
    uint16_t outstanding
    # The chain at hand: taken from the guest, not yet offered to the back.
    Chain chain
    bint waiting
    # It waits for room.
    bint stalled
    # The slot of a chain that is being copied, or NULL: neither the back's nor free.
    Slot *at_hand
    # Something was completed in the guest's ring that it does not see yet.
    bint untold
    Desc desc[1024]
    # What the back shows at once the guest is to see at once.
    bint whole_batches
    # Both rings are set up.
    bint attached
    # Chains of the guest are moved; else only completions are.
    bint taking
    # Somebody waits for the chains in flight.
    bint draining
    int fault
    bint kick_due
    bint call_due
    Counters counters

cdef int step(PumpState *pump, int budget) noexcept nogil
cdef bint rest(PumpState *pump) noexcept nogil
cdef bint pending(PumpState *pump) noexcept nogil
cdef bint is_drained(PumpState *pump) noexcept nogil


cdef class Pump:
    cdef PumpState state
    cdef GuestMemory memory
    cdef Pool pool
    cdef int index
    cdef int kick_in
    cdef int call_out
    cdef int kick_out
    cdef int call_in
    cdef _reserve_slots(self, uint16_t size)
