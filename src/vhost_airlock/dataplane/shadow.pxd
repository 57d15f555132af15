# SPDX-License-Identifier: Apache-2.0
"""The driver side of a shadow ring: the operations of a ring format.

shadow_split.pyx is the one format there is. Another one is a module with a ShadowOps of
its own and its state beside SplitShadow below.

A chain in the shadow ring is named by its slot, a number. The back names it too when it
is done, so a slot is only believed after a look at `state`, which is in memory of our
own, like everything in this struct. A slot that the back may still complete is never
used for another chain, however often the ring is stopped and started: back-ends keep
requests when a ring stops, and complete them by the old number in the ring that there
is then.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.layout cimport Avail, Blamed, Desc, Used

cdef enum SlotState:
    FREE = 0
    IN_FLIGHT = 1
    # A descriptor in the middle of a chain.
    FOLLOWER = 2
    # Left behind by a stop. The back may still complete it, and the guest waits for it
    # if the ring goes on where it has stopped.
    PARKED = 3
    # The same, and the back has completed it since.
    RETURNED = 4
    # Left behind by a stop, and the guest waits for it no more. The back may still
    # write to its buffers, so they are not used until it completes it.
    QUARANTINED = 5
    # No back has it any more, and the guest waits for it: it is to be offered again.
    RECALLED = 6

cdef struct ShadowRing

cdef struct RingForBack:
    # A ring as the back is told of it: entries, base, and its own addresses.
    uint16_t size
    uint64_t base
    uint64_t desc
    uint64_t avail
    uint64_t used

cdef struct ShadowOps:
    # How many bytes of isolated memory a ring of this size takes.
    uint64_t (*bytes)(uint16_t size) noexcept nogil
    # The ring for the back that lies at this address of the back's.
    RingForBack (*describe)(uint16_t size, uint64_t back) noexcept nogil
    # Begin with an empty ring in memory that the caller has zeroed.
    void (*start)(ShadowRing *, uint8_t *host) noexcept nogil
    # Add a chain of `count` descriptors; the back does not see it yet.
    void (*offer)(
        ShadowRing *, uint16_t slot, const Desc *, uint16_t count
    ) noexcept nogil
    # Show the back the chains that were added. True: it wants a kick.
    bint (*publish)(ShadowRing *) noexcept nogil
    # Take a completion: 1 taken, 0 none left, or a Fault.
    int (*reap)(ShadowRing *, uint16_t *slot, uint32_t *len) noexcept nogil
    # Are there more completions of those that the back showed at once?
    bint (*amid)(ShadowRing *) noexcept nogil
    # Ask for a call with the next completion. A fence, then pending() must follow.
    void (*arm)(ShadowRing *) noexcept nogil
    void (*disarm)(ShadowRing *) noexcept nogil
    # Ask for no call until the ring is armed again, whatever is completed.
    void (*silence)(ShadowRing *) noexcept nogil
    # Is there a completion to take?
    bint (*pending)(ShadowRing *) noexcept nogil
    # How many chains that were offered the back has not fetched: by its event index, -1
    # if there is none; by the base at which it has stopped. Any number up to 65535, for
    # the back may lie.
    int64_t (*unfetched)(const ShadowRing *) noexcept nogil
    int64_t (*unfetched_at)(const ShadowRing *, uint64_t base) noexcept nogil

cdef struct SplitShadow:
    Desc *desc
    Avail *avail
    Used *used
    # Where the next chain goes: the number of chains offered since the start.
    uint16_t avail_idx
    uint16_t published
    # The next position of the used ring to take.
    uint16_t used_seen
    # Our copy of the back's used index.
    uint16_t used_idx

cdef struct ShadowRing:
    const ShadowOps *ops
    uint16_t size
    bint event_idx
    bint indirect
    bint armed
    # A stack of slots that are free, the one used last on top.
    uint16_t *free
    uint16_t free_count
    # How many slots there are: at least `size`, more if it was larger before.
    uint16_t slots
    # Links the slots which a chain of several descriptors occupies.
    uint16_t *next
    # For each slot a SlotState.
    uint8_t *state
    # Completions of something that was not in flight.
    uint32_t violations
    # As many of them came since the last good one.
    uint32_t strikes
    # Of the fault that was found.
    Blamed blamed
    SplitShadow split


cdef inline uint16_t take_slot(ShadowRing *ring) noexcept nogil:
    """A slot for a new chain; the caller has seen that free_count allows it."""
    ring.free_count -= 1
    return ring.free[ring.free_count]

cdef inline void give_slot(ShadowRing *ring, uint16_t slot) noexcept nogil:
    """Give back a slot that no chain took."""
    ring.free[ring.free_count] = slot
    ring.free_count += 1

cdef inline bint is_with_back(uint8_t state) noexcept nogil:
    """May the back still complete the chain in a slot of this state?"""
    return state == IN_FLIGHT or state == PARKED or state == QUARANTINED

cdef inline void free_chain(ShadowRing *ring, uint16_t slot) noexcept nogil:
    """Free all that the chain of this slot occupies, its own slot on top."""
    cdef uint16_t follower = ring.next[slot]
    cdef uint16_t after

    while follower != slot:
        after = ring.next[follower]
        ring.state[follower] = FREE
        give_slot(ring, follower)
        follower = after
    ring.state[slot] = FREE
    if slot < ring.size:        # else it is of a time when the ring was larger
        give_slot(ring, slot)
