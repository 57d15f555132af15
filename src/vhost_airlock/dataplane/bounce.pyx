# SPDX-License-Identifier: Apache-2.0
"""A chain's doubles in isolated memory.

Each segment of a guest's chain gets one contiguous buffer, since real back-ends look
at the framing: number, order, direction and size of descriptors stay as they are. A
large one lies at the same offset in its page as the guest's, so that a back-end may
do direct I/O with it. Small ones, and the table of an indirect chain, are packed at
steps of 64 bytes into the slot's own area, or into one block if that is too small.

Buffers that the device may write are zeroed before the back sees them, so that nothing
of an earlier request can come out again; the guest's bytes there never go to the back.
Copying back reads each isolated byte once.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from vhost_airlock.dataplane.dirty_log cimport Marker
from vhost_airlock.dataplane.guest cimport Chain
from vhost_airlock.dataplane.layout cimport (
    DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Desc, NEVER_FITS, PAGE, store_int,
)
from vhost_airlock.dataplane.pool cimport (
    MAX_ORDER, NO_BLOCK, PoolState, Share, give_block, give_lone, join_free,
    leave_queue, lock_pool, order_of, raise_to, reserve, take_block, take_lone,
    unlock_pool, unreserve,
)
from vhost_airlock.dataplane.regions cimport RegionTable, copy_in, copy_out, same_bytes


cdef inline uint64_t step64(uint64_t size) noexcept nogil:
    return (size + 63) & ~<uint64_t> 63


cdef inline uint64_t pages_of(uint64_t size) noexcept nogil:
    return (size + PAGE - 1) // PAGE


cdef inline uint64_t segment_pages(uint64_t guest, uint32_t size) noexcept nogil:
    """The pages of a large segment, at its offset in the first one."""
    return pages_of((guest & (PAGE - 1)) + size)


cdef inline int segment_order(uint64_t guest, uint32_t size) noexcept nogil:
    """The order of the block for a large segment."""
    return order_of(segment_pages(guest, size))


cdef bint record(Slot *slot, const Chain *chain) noexcept nogil:
    """Let a free slot have this chain. False: there is no memory for the record."""
    cdef int i

    if chain.count > FEW:
        slot.buffer = <Buffer *> malloc(chain.count * sizeof(Buffer))
        if slot.buffer == NULL:
            slot.buffer = slot.few  # not reached: no memory
            return False  # not reached: no memory
    else:
        slot.buffer = slot.few
    slot.head = chain.head
    slot.count = chain.count
    slot.readable = chain.readable
    slot.writable = chain.bytes_writable
    slot.pages = 0
    slot.alone = False
    slot.scratch.order = NO_BLOCK
    for i in range(chain.count):
        slot.buffer[i].guest = chain.segment[i].addr
        slot.buffer[i].len = chain.segment[i].len
        slot.buffer[i].block.order = NO_BLOCK
    return True


cdef int place(Slot *slot, bint table, PoolState *pool, Share *share) noexcept nogil:
    """Find room for the slot's chain, with an indirect table if `table`.

    Returns 1 when it is placed; 0 when there is no room now, NEVER_FITS when it is
    larger than any chain that is placed: then nothing is taken.
    """
    cdef uint64_t small = step64(slot.count * sizeof(Desc)) if table else 0
    cdef uint64_t largest = 0
    cdef uint64_t pages = 0
    cdef uint64_t block
    cdef bint alone, placed
    cdef int i

    for i in range(slot.count):
        if slot.buffer[i].len < SMALL:
            small += step64(slot.buffer[i].len)
        else:
            block = <uint64_t> 1 << segment_order(
                slot.buffer[i].guest, slot.buffer[i].len
            )
            pages += block
            largest = max(largest, block)
    if small > AREA:
        block = <uint64_t> 1 << order_of(pages_of(small))
        pages += block
        largest = max(largest, block)
    alone = largest > pool.largest or pages > share.guaranteed + pool.common
    if alone and is_refused(slot, pool, share):
        return NEVER_FITS
    if alone:
        placed = place_alone(slot, small, pool, share)
    else:
        placed = place_in_blocks(slot, small, pages, largest, pool, share)
    if placed:
        lay_out(slot, table, small)
    return placed


cdef bint is_refused(
    const Slot *slot, PoolState *pool, Share *share
) noexcept nogil:
    """Have the chain's large segments more bytes than any chain that is placed?"""
    cdef uint64_t size = 0
    cdef int i

    for i in range(slot.count):
        if slot.buffer[i].len >= SMALL:
            size += slot.buffer[i].len
    if size <= pool.largest_chain:
        return False
    share.refused = size
    return True


cdef bint place_in_blocks(
    Slot *slot, uint64_t small, uint64_t pages, uint64_t largest, PoolState *pool,
    Share *share,
) noexcept nogil:
    """Take blocks of the pool. False: no room now, nothing is taken.

    small: bytes of the table and of small segments. pages: of all blocks. largest: of
    the largest block.
    """
    cdef bint placed

    if share.alone:
        leave_queue(pool, share)
    lock_pool(pool)
    placed = reserve(pool, share, pages)
    if placed:
        slot.pages = pages
        placed = take_blocks(slot, small, pages, largest, pool)
        if placed:
            share.high_water = max(share.high_water, share.used)
        else:
            raise_to(&pool.wanted, largest)
    if not placed:
        give_blocks(slot, pool)
        unreserve(pool, share, slot.pages)
        slot.pages = 0
        pool.waited_for = pool.shared
    unlock_pool(pool)
    return placed


cdef bint place_alone(
    Slot *slot, uint64_t small, PoolState *pool, Share *share
) noexcept nogil:
    """Take the lone region, and lay buffers out one behind the other.

    False: the ring has to wait for it.
    """
    cdef uint64_t needed = pages_of(small) if small > AREA else 0
    cdef uint64_t page = needed
    cdef Buffer *buffer
    cdef int i

    for i in range(slot.count):
        buffer = &slot.buffer[i]
        if buffer.len >= SMALL:
            needed += segment_pages(buffer.guest, buffer.len)
    lock_pool(pool)
    slot.alone = take_lone(pool, share, needed)
    unlock_pool(pool)
    if not slot.alone:
        return False
    slot.scratch.host = pool.lone.host
    slot.scratch.back = pool.lone.back
    for i in range(slot.count):
        buffer = &slot.buffer[i]
        if buffer.len >= SMALL:
            buffer.block.host = pool.lone.host + page * PAGE
            buffer.block.back = pool.lone.back + page * PAGE
            page += segment_pages(buffer.guest, buffer.len)
    return True


cdef bint take_blocks(
    Slot *slot, uint64_t small, uint64_t pages, uint64_t largest, PoolState *pool
) noexcept nogil:
    """Take all blocks that the slot needs; `pages`: of all, `largest`: of one.

    False: they are not to be had. The caller gives back those that were taken.
    """
    cdef int order

    if take_blocks_of(slot, small, 0, MAX_ORDER, pool):
        return True
    # Joined, and the largest first, every chain that can fit does. Else, small
    # blocks of the chain itself could stand in the way of its large ones for ever.
    give_blocks(slot, pool)
    if not join_free(pool, pages, order_of(largest)):
        return False
    for order in range(order_of(largest), -1, -1):
        if not take_blocks_of(slot, small, order, order, pool):
            return False
    return True


cdef bint take_blocks_of(
    Slot *slot, uint64_t small, int least, int most, PoolState *pool
) noexcept nogil:
    """Take those blocks whose order is in [least, most]."""
    cdef Buffer *buffer
    cdef int order
    cdef int i

    if small > AREA:
        order = order_of(pages_of(small))
        if least <= order <= most and not take_block(pool, order, &slot.scratch):
            return False
    for i in range(slot.count):
        buffer = &slot.buffer[i]
        if buffer.len < SMALL:
            continue
        order = segment_order(buffer.guest, buffer.len)
        if least <= order <= most and not take_block(pool, order, &buffer.block):
            return False
    return True


cdef void lay_out(Slot *slot, bint table, uint64_t small) noexcept nogil:
    """Give the table and each buffer its place, now that there are all blocks."""
    cdef uint8_t *at = slot.area
    cdef uint64_t back = slot.area_back
    cdef Buffer *buffer
    cdef uint64_t offset
    cdef int i

    if small > AREA:
        at = slot.scratch.host
        back = slot.scratch.back
    slot.table = NULL
    if table:
        slot.table = at
        slot.table_back = back
        at += step64(slot.count * sizeof(Desc))
        back += step64(slot.count * sizeof(Desc))

    for i in range(slot.count):
        buffer = &slot.buffer[i]
        if buffer.len < SMALL:
            buffer.host = at
            buffer.back = back
            at += step64(buffer.len)
            back += step64(buffer.len)
        else:
            offset = buffer.guest & (PAGE - 1)
            buffer.host = buffer.block.host + offset
            buffer.back = buffer.block.back + offset


cdef inline bint past_caches(const Slot *slot, const Share *share) noexcept nogil:
    """Is a large chain's ring at work with more than caches hold?"""
    return slot.alone or (slot.pages >= LARGE and share.used >= CACHED)


cdef int copy_to_back(
    Slot *slot, const Share *share, RegionTable *memory, int *hint
) noexcept nogil:
    """Fill the doubles: buffers to read are copied, buffers to write are zeroed.

    The lone region is new for each chain, so there are zeros in it already. Returns
    how many doubles were filled: fewer than there are if the guest's memory of the next
    one is not there any more.
    """
    cdef bint past = past_caches(slot, share)
    cdef Buffer *buffer
    cdef int i

    for i in range(slot.count):
        buffer = &slot.buffer[i]
        if i >= slot.readable:
            if not slot.alone or buffer.len < SMALL:
                # The back is about to write there: that belongs into the caches.
                memset(buffer.host, 0, buffer.len)
        elif not copy_in(memory, hint, buffer.host, buffer.guest, buffer.len, past):
            return i
    return slot.count


cdef uint64_t copy_to_guest(
    Slot *slot, uint32_t length, CopyPolicy policy, const Share *share,
    RegionTable *memory, int *hint, Marker *marker,
) noexcept nogil:
    """Copy the bytes that the device wrote to the guest, by the policy; returns their
    number.

    `length` is the number of bytes that the back says it has written, and never more
    than a hint: addresses and sizes come from our own record. A buffer that is not
    memory any more is left out.
    """
    cdef uint64_t left = min(<uint64_t> length, slot.writable)
    cdef uint64_t copied = 0
    cdef bint past = past_caches(slot, share)
    cdef uint64_t size
    cdef Buffer *buffer
    cdef int i

    if policy == COPY_FULL:
        left = slot.writable
    for i in range(slot.readable, slot.count):
        buffer = &slot.buffer[i]
        size = min(left, <uint64_t> buffer.len)
        left -= size
        if policy == COPY_USED_TAIL and i + 1 == slot.count and buffer.len <= TAIL:
            size = buffer.len
        if size and copy_out(
            memory, hint, buffer.guest, buffer.host, size, past, marker
        ):
            copied += size
    return copied


cdef bint is_same(
    const Slot *slot, const Chain *chain, RegionTable *memory, int *hint
) noexcept nogil:
    """Is this chain the one that the slot has: the same buffers of the guest, and the
    same bytes in those which the device reads?
    """
    cdef const Buffer *buffer
    cdef int i

    if slot.count != chain.count or slot.readable != chain.readable:
        return False
    for i in range(chain.count):
        buffer = &slot.buffer[i]
        if buffer.guest != chain.segment[i].addr or buffer.len != chain.segment[i].len:
            return False
    for i in range(chain.readable):
        buffer = &slot.buffer[i]
        if not same_bytes(memory, hint, buffer.guest, buffer.host, buffer.len):
            return False
    return True


cdef uint16_t describe(Slot *slot, Desc *desc) noexcept nogil:
    """The chain as the shadow ring is to offer it; returns how many descriptors.

    `desc` is memory of ours with room for slot.count entries.
    """
    cdef int i

    for i in range(slot.count):
        desc[i].addr = slot.buffer[i].back
        desc[i].len = slot.buffer[i].len
        desc[i].flags = DESC_WRITE if i >= slot.readable else 0
        desc[i].next = 0
    if slot.table == NULL:
        return slot.count

    for i in range(slot.count - 1):
        desc[i].flags |= DESC_NEXT
        desc[i].next = i + 1
    memcpy(slot.table, desc, slot.count * sizeof(Desc))
    desc[0] = Desc(slot.table_back, slot.count * sizeof(Desc), DESC_INDIRECT, 0)
    return 1


cdef void give_blocks(Slot *slot, PoolState *pool) noexcept nogil:
    cdef int i

    for i in range(slot.count):
        if slot.buffer[i].block.order != NO_BLOCK:
            give_block(pool, &slot.buffer[i].block)
    if slot.scratch.order != NO_BLOCK:
        give_block(pool, &slot.scratch)


cdef void release(Slot *slot, PoolState *pool, Share *share) noexcept nogil:
    """The slot is free: give back all that place() and record() took."""
    vacate(slot, pool, share)
    forget_buffers(slot)


cdef void vacate(Slot *slot, PoolState *pool, Share *share) noexcept nogil:
    """Give back all that place() took; the record of the chain stays."""
    lock_pool(pool)
    give_blocks(slot, pool)
    unreserve(pool, share, slot.pages)
    if slot.alone:
        slot.alone = False
        give_lone(pool)
    if pool.waited_for:
        pool.waited_for = False
        store_int(&pool.room_due, 1)
    unlock_pool(pool)
    slot.pages = 0


cdef void forget_buffers(Slot *slot) noexcept nogil:
    """The slot is free: it has no record of a chain."""
    if slot.buffer != slot.few:
        free(slot.buffer)
        slot.buffer = slot.few
    slot.count = 0
