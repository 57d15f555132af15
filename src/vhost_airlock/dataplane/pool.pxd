# SPDX-License-Identifier: Apache-2.0
"""Isolated memory for bounce buffers: blocks of 2^order pages."""

from libc.stdint cimport int8_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.layout cimport load_int, store_int
from vhost_airlock.dataplane.sys cimport (
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, signal_fd,
)

cdef extern from * nogil:
    """
    #if defined(AIRLOCK_DEBUG) || defined(__SANITIZE_ADDRESS__)
    #define AIRLOCK_CHECKS 1
    #else
    #define AIRLOCK_CHECKS 0
    #endif
    #define airlock_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
    #define airlock_add(p, v) ((void)__atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL))

    static inline void airlock_raise(uint64_t *to, uint64_t value)
    {
        uint64_t old = __atomic_load_n(to, __ATOMIC_RELAXED);
        while (old < value && !__atomic_compare_exchange_n(
                   to, &old, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            ;
    }
    """
    # Whether this is a debug build, which checks that methods are called as they say.
    const bint CHECKS "AIRLOCK_CHECKS"
    uint64_t exchange "airlock_exchange"(uint64_t *, uint64_t)
    void add_int "airlock_add"(int *, int)
    int leading_zeros "__builtin_clzll"(uint64_t)
    # Raise it to a value, if it is smaller; atomically.
    void raise_to "airlock_raise"(uint64_t *, uint64_t)

cdef enum:
    MAX_POOL_REGIONS = 64
    MAX_ORDER = 20
    NO_BLOCK = -1
    # The most loose blocks of one order in a region.
    MAX_LOOSE = 1024

cdef struct Block:
    # NO_BLOCK when there is none.
    int8_t order
    uint16_t region
    uint32_t page
    # Where we see it.
    uint8_t *host
    # Where the back sees it.
    uint64_t back

cdef struct Links:
    # Pages where the neighbours in a list of blocks start; -1: there is none.
    int32_t next
    int32_t before

cdef struct PoolRegion:
    uint8_t *host
    uint64_t back
    # 0: this entry is not in use.
    uint32_t pages
    uint32_t used
    # By page, where a block starts: the order of a joined block; -1 for all others.
    int8_t *joined_order
    # By page, where a free block starts.
    Links *links
    # The first block of each order's list, or -1; bit n of the masks: list n has one.
    # Loose blocks: given back, not joined yet; the last one given back is the first.
    int32_t loose[MAX_ORDER + 1]
    uint32_t loose_orders
    uint16_t loose_count[MAX_ORDER + 1]
    # Joined blocks: the largest there can be, as far as loose ones are not counted.
    int32_t joined[MAX_ORDER + 1]
    uint32_t joined_orders

cdef struct Share:
    # Pages that one ring has taken, and pages that it can always have.
    uint64_t used
    uint64_t guaranteed
    # The most that it ever had.
    uint64_t high_water
    # A worker runs the ring: it is not paused. Kept in debug builds only.
    int running
    # Pages that its chain at hand needs in the lone region; 0: it does not wait for it.
    uint64_t alone
    # The next ring that waits for the lone region.
    Share *after
    # Bytes of a chain that was too large to be placed at all.
    uint64_t refused

cdef struct LoneRegion:
    # Memory for one chain that does not fit into its ring's share of the pool.
    uint8_t *host
    uint64_t back
    # 0: there is none.
    uint64_t pages
    # A chain has been placed in it: it has to be made anew for the next one.
    bint used
    # That chain is still in it.
    bint busy

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
    # Bytes of the largest chain that is placed at all; small segments do not count.
    uint64_t largest_chain
    LoneRegion lone
    # The first of the rings that wait for the lone region, in the order of asking.
    Share *first
    # Pages of a block that was not to be had: the pool should grow. Changed by workers
    # and the control plane at once, hence by raise_to() and exchange() only.
    uint64_t wanted
    # Cleared when the control plane has been told that it should.
    int may_grow
    # The lone region has changed, or the rings that wait for it: the control plane
    # should look.
    int news
    # How many rings with this pool workers run. Kept in debug builds only.
    int running
    int count
    PoolRegion region[MAX_POOL_REGIONS]


cdef inline int order_of(uint64_t pages) noexcept nogil:
    """The smallest order whose blocks have at least this many pages."""
    return 64 - leading_zeros(pages - 1) if pages > 1 else 0

cdef inline int must_stand_still(const int *running) except -1:
    """In a debug build, raise RuntimeError if a worker runs what needs a pause."""
    if CHECKS and load_int(running):
        raise RuntimeError("called without a pause of the workers")
    return 0

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
cdef bint join_free(PoolState *pool, uint64_t pages, int order) noexcept nogil
cdef void give_block(PoolState *pool, Block *block) noexcept nogil
cdef bint take_lone(PoolState *pool, Share *share, uint64_t pages) noexcept nogil
cdef void give_lone(PoolState *pool) noexcept nogil
# To be called without the lock: the ring does not wait for the lone region any more.
cdef void leave_queue(PoolState *pool, Share *share) noexcept nogil
cdef bint lone_is_due(PoolState *pool) noexcept nogil


cdef class Pool:
    cdef PoolState state
    cdef _forget(self, PoolRegion *region)
    cdef _check(self, int number)
