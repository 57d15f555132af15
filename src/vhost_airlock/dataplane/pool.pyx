# SPDX-License-Identifier: Apache-2.0
"""Isolated memory for bounce buffers.

The pool has a few regions, each a memfd that the back has mapped. A region is cut
into blocks of 2^order pages by a buddy allocator that joins late: a block that was
given back is loose, and is the first of its order to be taken again, while it is still
in the processor's caches. Loose blocks are joined when a chain can't be placed
otherwise, or when there are many of them. Small segments of a chain share one block,
see bounce.pyx.

All bookkeeping is in memory of our own. The back can write what it likes into the
regions: nothing here ever looks there.

A chain that does not fit into its ring's share gets the lone region: memory beside the
pool that the control plane makes for this one chain, of the chain's size. There is one
at a time, and other such chains wait for theirs.

Rings share a pool. Each ring has a guaranteed part, which it can always have. The
rest is the common part, for the ring that asks first. So a ring full of posted receive
buffers can't starve another.
"""

from libc.errno cimport errno
from libc.stdint cimport int8_t, int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from vhost_airlock.dataplane.layout cimport PAGE, load64, store_int
from vhost_airlock.dataplane.sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, close, eventfd, pthread_mutex_destroy,
    pthread_mutex_init,
)

DEBUG = bool(CHECKS)
"""Whether this is a debug build, see must_stand_still()."""


cdef bint reserve(PoolState *pool, Share *share, uint64_t pages) noexcept nogil:
    """Charge the ring with `pages` more. False: that is more than its share."""
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
    """Take a block from the first region that has one. False: none has."""
    cdef int i

    for i in range(pool.count):
        if take_from(pool, i, order, block):
            return True
    return False


cdef bint join_free(PoolState *pool, uint64_t pages, int order) noexcept nogil:
    """Join loose blocks of smaller orders than `order`.

    Each block is joined once after it was given back, and no list of loose ones is
    longer than MAX_LOOSE: the time that this takes does not depend on regions' sizes.

    False: fewer pages than `pages` are free in all, and nothing was done.
    """
    cdef PoolRegion *region
    cdef uint64_t free_pages = 0
    cdef int i, smaller

    for i in range(pool.count):
        free_pages += pool.region[i].pages - pool.region[i].used
    if free_pages < pages:
        return False
    for i in range(pool.count):
        region = &pool.region[i]
        if region.loose_orders & ((<uint32_t> 1 << order) - 1):
            for smaller in range(order):
                join_loose(region, smaller)
    return True


cdef void give_block(PoolState *pool, Block *block) noexcept nogil:
    """Give a block back. The next one of its order to go out is this one."""
    cdef PoolRegion *region = &pool.region[block.region]
    cdef int order = block.order

    region.links[block.page].next = region.loose[order]
    region.loose[order] = block.page
    region.loose_orders |= <uint32_t> 1 << order
    region.loose_count[order] += 1
    if region.loose_count[order] > MAX_LOOSE:
        join_loose(region, order)
    region.used -= 1 << order
    pool.used -= <uint64_t> 1 << order
    block.order = NO_BLOCK


cdef bint take_lone(PoolState *pool, Share *share, uint64_t pages) noexcept nogil:
    """Take the lone region for a chain of this ring. False: the ring has to wait.

    Rings get it in the order in which they ask, each for one chain.
    """
    cdef LoneRegion *lone = &pool.lone
    cdef Share **last = &pool.first

    if share.alone == 0:
        while last[0] != NULL:
            last = &last[0].after
        last[0] = share
        share.after = NULL
    share.alone = pages
    if pool.first == share and lone.pages >= pages and not lone.used:
        unlink_share(pool, share)
        lone.used = lone.busy = True
        return True
    store_int(&pool.news, 1)
    return False


cdef void give_lone(PoolState *pool) noexcept nogil:
    """The chain in the lone region is done."""
    pool.lone.busy = False
    store_int(&pool.news, 1)


cdef void leave_queue(PoolState *pool, Share *share) noexcept nogil:
    if share.alone:
        lock_pool(pool)
        unlink_share(pool, share)
        store_int(&pool.news, 1)
        unlock_pool(pool)


cdef void unlink_share(PoolState *pool, Share *share) noexcept nogil:
    cdef Share **link = &pool.first

    while link[0] != share:
        link = &link[0].after
    link[0] = share.after
    share.alone = 0


cdef bint lone_is_due(PoolState *pool) noexcept nogil:
    """Is there something to do for the control plane: to make the lone region, to make
    it anew after use, or to make a larger one?
    """
    if pool.lone.pages and pool.lone.used:
        return not pool.lone.busy
    return pool.first != NULL and pool.first.alone > pool.lone.pages


cdef bint take_from(
    PoolState *pool, int number, int order, Block *block
) noexcept nogil:
    """Take a block of this order, cut from the smallest one that is large enough."""
    cdef PoolRegion *region = &pool.region[number]
    cdef int32_t page
    cdef int larger = order

    if ((region.loose_orders | region.joined_orders) >> order) == 0:
        return False
    while region.loose[larger] < 0 and region.joined[larger] < 0:
        larger += 1
    if region.loose[larger] >= 0:
        page = pop_loose(region, larger)
    else:
        page = region.joined[larger]
        unlink_joined(region, page, larger)
    while larger > order:
        larger -= 1
        push_joined(region, page + (1 << larger), larger)

    region.used += 1 << order
    pool.used += <uint64_t> 1 << order
    pool.high_water = max(pool.high_water, pool.used)
    block.order = order
    block.region = number
    block.page = page
    block.host = region.host + <uint64_t> page * PAGE
    block.back = region.back + <uint64_t> page * PAGE
    return True


cdef inline int32_t pop_loose(PoolRegion *region, int order) noexcept nogil:
    """Take the first loose block of an order; returns its page."""
    cdef int32_t page = region.loose[order]

    region.loose[order] = region.links[page].next
    region.loose_count[order] -= 1
    if region.loose[order] < 0:
        region.loose_orders &= ~(<uint32_t> 1 << order)
    return page


cdef void join_loose(PoolRegion *region, int order) noexcept nogil:
    """Join all loose blocks of an order with their neighbours."""
    while region.loose[order] >= 0:
        join_block(region, pop_loose(region, order), order)


cdef void join_block(PoolRegion *region, uint32_t page, int order) noexcept nogil:
    """Join a block with its buddy for as long as that is a joined block, too."""
    cdef uint32_t buddy

    while order < MAX_ORDER:
        buddy = page ^ (<uint32_t> 1 << order)
        if buddy >= region.pages or region.joined_order[buddy] != order:
            break
        unlink_joined(region, buddy, order)
        page = min(page, buddy)
        order += 1
    push_joined(region, page, order)


cdef void push_joined(PoolRegion *region, uint32_t page, int order) noexcept nogil:
    cdef int32_t after = region.joined[order]

    region.joined_order[page] = order
    region.links[page] = Links(after, -1)
    if after >= 0:
        region.links[after].before = page
    region.joined[order] = page
    region.joined_orders |= <uint32_t> 1 << order


cdef void unlink_joined(PoolRegion *region, uint32_t page, int order) noexcept nogil:
    cdef Links links = region.links[page]

    region.joined_order[page] = -1
    if links.next >= 0:
        region.links[links.next].before = links.before
    if links.before >= 0:
        region.links[links.before].next = links.next
        return
    region.joined[order] = links.next
    if links.next < 0:
        region.joined_orders &= ~(<uint32_t> 1 << order)


cdef void make_blocks(PoolRegion *region) noexcept nogil:
    """Cut a new region into joined blocks, each aligned to its size."""
    cdef uint32_t page = 0
    cdef int order

    memset(region.joined_order, 0xff, region.pages)
    region.loose_orders = region.joined_orders = 0
    for order in range(MAX_ORDER + 1):
        region.loose[order] = region.joined[order] = -1
        region.loose_count[order] = 0
    for order in range(MAX_ORDER, -1, -1):
        while region.pages - page >= <uint32_t> 1 << order:
            push_joined(region, page, order)
            page += 1 << order


cdef class Pool:
    """Blocks for bounce buffers, up to `limit` bytes in regions added one by one.

    Call the methods only while the workers of all pumps with this pool are paused, but
    for take_wanted(); a debug build raises RuntimeError otherwise. The properties may
    be read at any time.
    """

    def __cinit__(
        self, uint64_t limit, *, uint64_t largest, uint64_t lone_limit=0,
        bint shared=False,
    ):
        """Sizes in bytes; no block will be larger than `largest`, a power of two.

        lone_limit: a chain with so many bytes may have the lone region, as may one that
        is no larger than the pool. shared: pumps of more than one worker will use it.
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
        self.state.largest_chain = max(self.state.limit * PAGE, lone_limit)

    def __dealloc__(self):
        cdef int i
        for i in range(self.state.count):
            free(self.state.region[i].joined_order)
            free(self.state.region[i].links)
        if self.state.shared and self.state.room >= 0:
            close(self.state.room)
        pthread_mutex_destroy(&self.state.mutex)

    def add_region(self, uintptr_t host, uint64_t back, uint64_t size):
        """Add memory: our address, the back's, bytes. Returns the region's number."""
        cdef int number = 0
        cdef PoolRegion *region

        must_stand_still(&self.state.running)
        if size % PAGE or not 0 < size <= <uint64_t> PAGE << MAX_ORDER:
            raise ValueError(f"region of {size} bytes")
        while number < self.state.count and self.state.region[number].pages:
            number += 1
        if number == MAX_POOL_REGIONS:
            raise ValueError(f"more than {MAX_POOL_REGIONS} regions")
        region = &self.state.region[number]
        region.pages = size // PAGE
        region.joined_order = <int8_t *> malloc(region.pages)
        region.links = <Links *> malloc(region.pages * sizeof(Links))
        if region.joined_order == NULL or region.links == NULL:
            self._forget(region)  # not reached: no memory
            raise MemoryError  # not reached: no memory
        region.host = <uint8_t *> host
        region.back = back
        region.used = 0
        make_blocks(region)
        if number == self.state.count:
            self.state.count += 1
        exchange(&self.state.wanted, 0)
        return number

    def remove_region(self, int number):
        """Forget a region of which no block is out. ValueError if one is."""
        must_stand_still(&self.state.running)
        self._check(number)
        if self.state.region[number].used:
            raise ValueError(f"region {number} has blocks in use")
        self._forget(&self.state.region[number])

    def used_pages(self, int number):
        """Pages of this region that are in use."""
        must_stand_still(&self.state.running)
        self._check(number)
        return self.state.region[number].used

    def set_common(self, uint64_t size):
        """How many bytes are for any ring, besides the rings' guaranteed parts."""
        must_stand_still(&self.state.running)
        self.state.common = size // PAGE

    def set_may_grow(self, bint may):
        """May a worker ask for more memory? It asks once, then this is off."""
        must_stand_still(&self.state.running)
        store_int(&self.state.may_grow, may)

    def take_wanted(self):
        """Bytes of the largest block that was asked for in vain since the last call.

        Workers may run meanwhile: what one asks for is in this answer or in the next.
        """
        return exchange(&self.state.wanted, 0) * PAGE

    def open_lone(self, uintptr_t host, uint64_t back, uint64_t size):
        """There is a lone region, for one chain: our address, the back's, bytes."""
        must_stand_still(&self.state.running)
        if self.state.lone.busy:
            raise ValueError("the lone region is in use")
        self.state.lone = LoneRegion(<uint8_t *> host, back, size // PAGE, False, False)

    def close_lone(self):
        """Forget the lone region, unless a chain is in it.

        Returns the bytes that the first ring waiting for one needs; 0: no ring waits.
        """
        must_stand_still(&self.state.running)
        if self.state.lone.busy:
            raise ValueError("the lone region is in use")
        self.state.lone.pages = 0
        return self.state.first.alone * PAGE if self.state.first != NULL else 0

    @property
    def lone_due(self):
        """Is there something to do about the lone region? See close_lone()."""
        return lone_is_due(&self.state)

    @property
    def largest_chain(self):
        """Bytes of the largest chain that is placed at all."""
        return self.state.largest_chain

    @property
    def used(self):
        """Bytes in use."""
        return load64(&self.state.used) * PAGE

    @property
    def high_water(self):
        """The most bytes that ever were in use."""
        return load64(&self.state.high_water) * PAGE

    cdef _forget(self, PoolRegion *region):
        free(region.joined_order)
        free(region.links)
        region.joined_order = NULL
        region.links = NULL
        region.pages = 0
        region.loose_orders = region.joined_orders = 0

    cdef _check(self, int number):
        if not 0 <= number < self.state.count or not self.state.region[number].pages:
            raise ValueError(f"no region {number}")
