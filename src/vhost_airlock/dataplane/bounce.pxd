# SPDX-License-Identifier: Apache-2.0
"""A chain's record, and its doubles in isolated memory: place, copy, release."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.dirty_log cimport Marker
from vhost_airlock.dataplane.guest cimport Chain
from vhost_airlock.dataplane.layout cimport Desc, MAX_SEGMENTS
from vhost_airlock.dataplane.pool cimport Block, PoolState, Share
from vhost_airlock.dataplane.regions cimport RegionTable

cdef enum:
    # Bytes of isolated memory that each slot has for its table and small segments.
    AREA = 512
    # Segments with fewer bytes are packed together; each of the others has a block.
    SMALL = 512
    # A slot has room for the buffers of a chain with no more segments than this.
    FEW = 4
    # Bytes of the largest buffer that counts as a status, for COPY_USED_TAIL.
    TAIL = 64
    # A chain with this many pages or more is copied past the processor's caches
    # (non-temporal stores), if its ring has CACHED pages or more in use.
    LARGE = 64
    CACHED = 1024

cdef enum CopyPolicy:
    COPY_FULL = 0
    COPY_USED = 1
    COPY_USED_TAIL = 2

cdef struct Buffer:
    # One segment of guest memory and its double.
    uint64_t guest
    uint8_t *host
    uint64_t back
    uint32_t len
    Block block

cdef struct Slot:
    # Our record of a chain; index: the slot's number in its ring. It is all that is
    # needed to offer the chain to a back once more, and nothing else knows it.
    # The chain's place in the order in which the guest offered its chains.
    uint64_t position
    # Its place among the chains that shadow rings were offered.
    uint64_t order
    # The used length that the back has said, of a chain that waits for the guest.
    uint32_t length
    uint16_t head
    uint16_t count
    uint16_t readable
    # Bytes that the device may write.
    uint64_t writable
    # Pages of the pool that this chain is charged with.
    uint64_t pages
    # It is in the lone region.
    bint alone
    uint8_t *area
    uint64_t area_back
    # Takes the place of the area when that is too small.
    Block scratch
    # Where the indirect table is to be written, or NULL.
    uint8_t *table
    uint64_t table_back
    Buffer *buffer
    Buffer few[FEW]

cdef bint record(Slot *slot, const Chain *chain) noexcept nogil
cdef int place(Slot *slot, bint table, PoolState *pool, Share *share) noexcept nogil
cdef int copy_to_back(
    Slot *slot, const Share *share, RegionTable *memory, int *hint
) noexcept nogil
cdef uint64_t copy_to_guest(
    Slot *slot, uint32_t length, CopyPolicy policy, const Share *share,
    RegionTable *memory, int *hint, Marker *marker,
) noexcept nogil
cdef bint is_same(
    const Slot *slot, const Chain *chain, RegionTable *memory, int *hint
) noexcept nogil
cdef uint16_t describe(Slot *slot, Desc *desc) noexcept nogil
cdef void vacate(Slot *slot, PoolState *pool, Share *share) noexcept nogil
cdef void release(Slot *slot, PoolState *pool, Share *share) noexcept nogil
cdef void forget_buffers(Slot *slot) noexcept nogil
