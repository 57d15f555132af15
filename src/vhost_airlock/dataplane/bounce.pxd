# SPDX-License-Identifier: Apache-2.0
"""A chain's doubles in isolated memory: place, copy in, copy back, release."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.guest cimport Chain
from vhost_airlock.dataplane.layout cimport Desc, MAX_SEGMENTS
from vhost_airlock.dataplane.pool cimport Block, PoolState, Share
from vhost_airlock.dataplane.regions cimport RegionTable

cdef enum:
    # Bytes of isolated memory that each slot has for small things.
    AREA = 512
    # Segments below this are packed together; from here on they have a block each.
    SMALL = 512
    FEW = 4
    TAIL = 64
    # Pages of the pool: of a chain that counts as large, and of all that a ring has in
    # flight when it is more than caches hold.
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
    # What we keep of a chain in flight; index: the slot's number in its ring.
    # Its place in the order in which chains were offered, modulo 2^16.
    uint16_t position
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

cdef int place(
    Slot *slot, const Chain *chain, bint table, PoolState *pool, Share *share
) noexcept nogil
cdef bint copy_to_back(
    Slot *slot, const Share *share, RegionTable *memory, int *hint
) noexcept nogil
cdef uint64_t copy_to_guest(
    Slot *slot, uint32_t length, CopyPolicy policy, const Share *share,
    RegionTable *memory, int *hint,
) noexcept nogil
cdef uint16_t describe(Slot *slot, Desc *desc) noexcept nogil
cdef void release(Slot *slot, PoolState *pool, Share *share) noexcept nogil
