# SPDX-License-Identifier: Apache-2.0
"""Isolated memory for bounce buffers: blocks of 2^order pages."""

from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.layout cimport load_int, store_int
from vhost_airlock.dataplane.sys cimport (
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, signal_fd,
)

cdef enum:
    MAX_POOL_REGIONS = 64
    MAX_ORDER = 20
    NO_BLOCK = -1

cdef struct Block:
    # NO_BLOCK when there is none.
    int8_t order
    uint16_t region
    uint32_t page
    # Where we see it.
    uint8_t *host
    # Where the back sees it.
    uint64_t back

cdef struct PoolRegion:
    uint8_t *host
    uint64_t back
    # 0: this entry is not in use.
    uint32_t pages
    uint32_t used
    # No new blocks: it is about to be given back.
    bint closed
    # A block came back since blocks were last joined.
    bint freed
    # For each page where a free block starts its order, else -1.
    int8_t *order
    # Links the free blocks of an order.
    int32_t *next
    # Bit n: free[n] is not empty.
    uint32_t orders
    int32_t free[MAX_ORDER + 1]

cdef struct Share:
    # What one ring has taken, in pages, and how much it can always have.
    uint64_t used
    uint64_t guaranteed
    # The most that it ever had.
    uint64_t high_water

cdef struct PoolState:
    pthread_mutex_t mutex
    # Pumps of several workers use it: they take the mutex.
    bint shared
    # If so, an eventfd that wakes them all.
    int room
    # A pump found no room since something was given back the last time.
    bint waited_for
    # Something was given back since, of which the others do not know yet.
    int room_due
    uint64_t limit
    # Pages that are nobody's guaranteed part.
    uint64_t common
    uint64_t common_used
    uint64_t used
    uint64_t high_water
    # Pages of the largest block there can ever be.
    uint64_t largest
    # Pages of a block that was not to be had: the pool should grow.
    uint64_t wanted
    # Cleared when the control plane has been told that it should.
    bint may_grow
    int count
    PoolRegion region[MAX_POOL_REGIONS]


cdef inline int order_of(uint64_t pages) noexcept nogil:
    """The smallest order whose blocks have so many pages (>= 1)."""
    cdef int order = 0
    while (<uint64_t> 1 << order) < pages:
        order += 1
    return order

cdef inline uint64_t over(uint64_t used, uint64_t guaranteed) noexcept nogil:
    return used - guaranteed if used > guaranteed else 0

# No guest or isolated memory may be touched while it is locked: see guard.pyx.
cdef inline void lock_pool(PoolState *pool) noexcept nogil:
    if pool.shared:
        pthread_mutex_lock(&pool.mutex)

cdef inline void unlock_pool(PoolState *pool) noexcept nogil:
    if pool.shared:
        pthread_mutex_unlock(&pool.mutex)

cdef inline void tell_room(PoolState *pool) noexcept nogil:
    """If there is room again that another worker's ring waits for, wake it."""
    if load_int(&pool.room_due):
        store_int(&pool.room_due, 0)
        signal_fd(pool.room)

# To be called with the pool locked.
cdef bint reserve(PoolState *pool, Share *share, uint64_t pages) noexcept nogil
cdef void unreserve(PoolState *pool, Share *share, uint64_t pages) noexcept nogil
cdef bint take_block(PoolState *pool, int order, Block *block) noexcept nogil
cdef bint join_free(PoolState *pool, uint64_t pages) noexcept nogil
cdef void give_block(PoolState *pool, Block *block) noexcept nogil


cdef class Pool:
    cdef PoolState state
    cdef _forget(self, PoolRegion *region)
    cdef _check(self, int number)
