# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.bounce cimport CopyPolicy, Slot
from vhost_airlock.dataplane.dirty_log cimport Marker
from vhost_airlock.dataplane.guard cimport Job
from vhost_airlock.dataplane.guest cimport Chain, GuestRing
from vhost_airlock.dataplane.inflight cimport Record
from vhost_airlock.dataplane.layout cimport Desc, load64
from vhost_airlock.dataplane.pool cimport PoolState, Share
from vhost_airlock.dataplane.regions cimport RegionTable
from vhost_airlock.dataplane.shadow cimport ShadowRing
from vhost_airlock.dataplane.suspects cimport Suspects
from vhost_airlock.dataplane.window cimport WindowState

cdef struct Counters:
    # Written by the thread that runs the pump, and read by any.
    uint64_t chains
    uint64_t completions
    # Copied from the guest to the back.
    uint64_t bytes_in
    uint64_t bytes_out
    uint64_t kicks
    uint64_t calls
    # Chains that had to wait for room.
    uint64_t stalls
    # Completions that claimed more bytes than there was room for.
    uint64_t clamped
    uint64_t faults
    # Chains that the guest offered again while the back still had them.
    uint64_t adopted
    # Chains that were offered again, since the back that had them is gone.
    uint64_t replayed
    # Chains of before the start that were taken by the record of chains in flight.
    uint64_t recovered
    # Chains that ended with an error, since backs were lost over them.
    uint64_t poisoned

cdef struct PumpState:
    RegionTable *memory
    int hint
    # For stores to buffers of the guest.
    Marker marker
    PoolState *pool
    Share share
    CopyPolicy policy
    GuestRing guest
    ShadowRing shadow
    Record record
    Suspects suspects
    Slot *slot
    # Positions count the guest's chains, in its order, from the beginning of the
    # session. The next one to take.
    uint64_t next
    # Where the ring was started.
    uint64_t began
    # How many chains shadow rings were offered.
    uint64_t offers
    # The back has fetched all of them before this one for sure: it had them from before
    # the start, or a later one is done.
    uint64_t reached
    # Chains that the back has and that are not done.
    uint16_t outstanding
    # Chains of before the start that the guest has to offer again, in its order: their
    # slots, how many there are, and how many of them were adopted.
    uint16_t *awaited
    uint16_t awaited_count
    uint16_t adopted
    # The slots of recalled chains, in the guest's order, how many there were at the
    # start, and how many were offered again since.
    uint16_t *recalled
    uint16_t recalled_count
    uint16_t replayed
    # The chain at hand: taken from the guest, not yet offered to the back.
    Chain chain
    bint waiting
    # It waits for room.
    bint stalled
    # That is room in the window.
    bint held
    # How much the ring may have in flight.
    WindowState window
    # The slot of a chain that is being copied, or NULL: neither the back's nor free.
    Slot *at_hand
    # Used elements are written, but the used index is not yet published.
    bint untold
    Desc desc[1024]
    # Completions that the back shows at once the guest is to see at once.
    bint whole_batches
    # Both rings are set up.
    bint attached
    # Chains of the guest are moved; else only completions are.
    bint taking
    # The back gets one chain at a time, while the ring has suspects.
    bint alone
    # The device has an error for a request: a one in its last byte.
    bint has_error
    # The control plane waits for the chains in flight.
    bint draining
    # The back is asked for no calls: it has no descriptor for them any more.
    bint silent
    int fault
    bint kick_due
    bint call_due
    Counters counters

cdef int step(PumpState *pump, int budget) noexcept nogil
cdef bint rest(PumpState *pump) noexcept nogil
cdef bint pending(PumpState *pump) noexcept nogil
cdef bint is_drained(PumpState *pump) noexcept nogil
cdef int run(PumpState *pump, Job job, int number) noexcept nogil
cdef void fail(PumpState *pump, int fault) noexcept nogil
cdef uint64_t end_chain(
    PumpState *pump, uint16_t number, uint32_t length
) noexcept nogil
cdef uint64_t finish(PumpState *pump, uint16_t number, uint32_t length) noexcept nogil
cdef void disown(PumpState *pump, uint16_t number) noexcept nogil
cdef void let_go(PumpState *pump, uint16_t number) noexcept nogil
cdef void recall(PumpState *pump, uint16_t number) noexcept nogil
cdef int64_t owed(const PumpState *pump, int64_t unfetched) noexcept nogil
cdef void go_on_with(PumpState *pump, uint16_t number) noexcept nogil
cdef void tell(PumpState *pump) noexcept nogil
cdef int look_unfetched(void *what, int _) noexcept nogil


cdef inline uint64_t logged(const PumpState *pump) noexcept nogil:
    """How often a page was marked in the dirty log. Any thread may ask."""
    return load64(&pump.marker.logged) + load64(&pump.guest.marker.logged)
