# SPDX-License-Identifier: Apache-2.0
"""Isolated memory for bounce buffers.

The pool is a handful of regions, each a memfd that the back has mapped. A region is
cut into blocks of 2^order pages, in the manner of a buddy allocator, but blocks are
joined again only when one is not to be had otherwise: until then a block that came
back is the first to go out again, while it is still in the processor's caches. Small
pieces of a chain share one block, see bounce.pyx.

All bookkeeping is in memory of our own. The back can write what it likes into the
regions: nothing here ever looks there.

Rings share a pool. Half of it is split evenly as what each ring can always have; the
other half is for whoever comes first. So a ring full of posted receive buffers
can't starve another.
"""

from libc.errno cimport errno
from libc.stdint cimport int8_t, int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc

from vhost_airlock.dataplane.layout cimport PAGE, load64
from vhost_airlock.dataplane.sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd, pthread_mutex_destroy,
    pthread_mutex_init,
)


cdef bint reserve(PoolState *pool, Share *share, uint64_t pages) noexcept nogil:
    """May this ring have so many more pages? They are then counted as its own."""
    cdef uint64_t before = over(share.used, share.guaranteed)
    cdef uint64_t after = over(share.used + pages, share.guaranteed)

    # The guaranteed part is there even when shares changed and others have too much.
    if after != before and pool.common_used + (after - before) > pool.common:
        return False
    pool.common_used += after - before
    share.used += pages
    return True


cdef void unreserve(PoolState *pool, Share *share, uint64_t pages) noexcept nogil:
    cdef uint64_t before = over(share.used, share.guaranteed)

    share.used -= pages
    pool.common_used -= before - over(share.used, share.guaranteed)


cdef bint take_block(PoolState *pool, int order, Block *block) noexcept nogil:
    """Take a block from the first region that has one."""
    cdef int i

    for i in range(pool.count):
        if take_from(pool, i, order, block):
            return True
    return False


cdef bint join_free(PoolState *pool, uint64_t pages) noexcept nogil:
    """Make free blocks as large as can be. False: not so many pages are free at all."""
    cdef PoolRegion *region
    cdef uint64_t free_pages = 0
    cdef int i

    for i in range(pool.count):
        region = &pool.region[i]
        if not region.closed:
            free_pages += region.pages - region.used
    if free_pages < pages:
        return False
    for i in range(pool.count):
        if pool.region[i].freed:
            join_blocks(&pool.region[i])
    return True


cdef void give_block(PoolState *pool, Block *block) noexcept nogil:
    """Give a block back. The next one of its order to go out is this one."""
    cdef PoolRegion *region = &pool.region[block.region]

    push_block(region, block.page, block.order)
    region.used -= 1 << block.order
    region.freed = True
    pool.used -= <uint64_t> 1 << block.order
    block.order = NO_BLOCK


cdef bint take_from(
    PoolState *pool, int number, int order, Block *block
) noexcept nogil:
    cdef PoolRegion *region = &pool.region[number]
    cdef int32_t page
    cdef int larger

    if region.closed or (region.orders >> order) == 0:
        return False
    larger = order
    while region.free[larger] < 0:
        larger += 1
    page = pop_block(region, larger)
    while larger > order:
        larger -= 1
        push_block(region, page + (1 << larger), larger)

    region.used += 1 << order
    pool.used += <uint64_t> 1 << order
    pool.high_water = max(pool.high_water, pool.used)
    block.order = order
    block.region = number
    block.page = page
    block.host = region.host + <uint64_t> page * PAGE
    block.back = region.back + <uint64_t> page * PAGE
    return True


cdef void push_block(PoolRegion *region, uint32_t page, int order) noexcept nogil:
    region.order[page] = order
    region.next[page] = region.free[order]
    region.free[order] = page
    region.orders |= <uint32_t> 1 << order


cdef int32_t pop_block(PoolRegion *region, int order) noexcept nogil:
    cdef int32_t page = region.free[order]

    region.free[order] = region.next[page]
    if region.free[order] < 0:
        region.orders &= ~(<uint32_t> 1 << order)
    region.order[page] = -1
    return page


cdef void join_blocks(PoolRegion *region) noexcept nogil:
    """Join neighbouring free blocks into the largest there can be."""
    cdef uint32_t page = 0
    cdef uint32_t start
    cdef int order

    region.freed = False
    region.orders = 0
    for order in range(MAX_ORDER + 1):
        region.free[order] = -1
    while page < region.pages:
        if region.order[page] < 0:
            page += 1
            continue
        start = page
        while page < region.pages and region.order[page] >= 0:
            order = region.order[page]
            region.order[page] = -1
            page += 1 << order
        push_run(region, start, page)


cdef void push_run(PoolRegion *region, uint32_t start, uint32_t end) noexcept nogil:
    """Make the free pages [start, end) into blocks, each aligned to its size."""
    cdef int order

    while start < end:
        order = 0
        while (
            order < MAX_ORDER
            and not start & (1 << order)
            and start + (<uint64_t> 2 << order) <= end
        ):
            order += 1
        push_block(region, start, order)
        start += 1 << order


cdef class Pool:
    """Blocks for bounce buffers, up to `limit` bytes in regions added one by one.

    Call the methods only while the workers of all pumps with this pool are paused;
    the properties may be read at any time.
    """

    def __cinit__(self, uint64_t limit, *, uint64_t largest, bint shared=False):
        """Sizes in bytes; no buffer will be larger than `largest`, a power of two.

        `shared`: pumps of more than one worker will use it.
        """
        pthread_mutex_init(&self.state.mutex, NULL)
        self.state.shared = shared
        self.state.room = -1
        if shared:
            self.state.room = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
            if self.state.room < 0:
                raise OSError(errno, "cannot make a pool's descriptor")
        self.state.limit = limit // PAGE
        self.state.common = self.state.limit
        self.state.largest = largest // PAGE

    def __dealloc__(self):
        cdef int i
        for i in range(self.state.count):
            free(self.state.region[i].order)
            free(self.state.region[i].next)
        if self.state.shared and self.state.room >= 0:
            close(self.state.room)
        pthread_mutex_destroy(&self.state.mutex)

    def add_region(self, uintptr_t host, uint64_t back, uint64_t size):
        """Add memory: our address, the back's, bytes. Returns the region's number."""
        cdef int number = 0
        cdef PoolRegion *region
        cdef uint32_t page

        if size % PAGE or not 0 < size <= <uint64_t> PAGE << MAX_ORDER:
            raise ValueError(f"region of {size} bytes")
        while number < self.state.count and self.state.region[number].pages:
            number += 1
        if number == MAX_POOL_REGIONS:
            raise ValueError(f"more than {MAX_POOL_REGIONS} regions")
        region = &self.state.region[number]
        region.pages = size // PAGE
        region.order = <int8_t *> malloc(region.pages)
        region.next = <int32_t *> malloc(region.pages * sizeof(int32_t))
        if region.order == NULL or region.next == NULL:
            self._forget(region)  # not reached: no memory
            raise MemoryError  # not reached: no memory
        region.host = <uint8_t *> host
        region.back = back
        region.used = 0
        region.closed = False
        for page in range(region.pages):
            region.order[page] = 0
        join_blocks(region)
        if number == self.state.count:
            self.state.count += 1
        self.state.wanted = 0
        return number

    def close_region(self, int number):
        """No new blocks from this region. True when none is out: it may be removed."""
        self._check(number)
        self.state.region[number].closed = True
        return self.state.region[number].used == 0

    def remove_region(self, int number):
        """Forget a region of which no block is out."""
        self._check(number)
        if self.state.region[number].used:
            raise ValueError(f"region {number} has blocks in use")
        self._forget(&self.state.region[number])

    def used_pages(self, int number):
        """Pages of this region that are in use."""
        self._check(number)
        return self.state.region[number].used

    def set_common(self, uint64_t size):
        """How many bytes are for any ring, besides the rings' guaranteed parts."""
        self.state.common = size // PAGE

    def set_may_grow(self, bint may):
        """May a worker ask for more memory? It asks once, then this is off."""
        self.state.may_grow = may

    def take_wanted(self):
        """Bytes of the largest block that was asked for in vain since the last call."""
        cdef uint64_t wanted = self.state.wanted
        self.state.wanted = 0
        return wanted * PAGE

    @property
    def used(self):
        """Bytes in use."""
        return load64(&self.state.used) * PAGE

    @property
    def high_water(self):
        """The most bytes that ever were in use."""
        return load64(&self.state.high_water) * PAGE

    cdef _forget(self, PoolRegion *region):
        free(region.order)
        free(region.next)
        region.order = NULL
        region.next = NULL
        region.pages = 0
        region.orders = 0

    cdef _check(self, int number):
        if not 0 <= number < self.state.count or not self.state.region[number].pages:
            raise ValueError(f"no region {number}")
