# SPDX-License-Identifier: Apache-2.0
"""The guest's memory as the data plane sees it: a sorted table of regions."""

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from vhost_airlock.dataplane.copying cimport copy
from vhost_airlock.dataplane.dirty_log cimport DirtyLog, Marker, mark
from vhost_airlock.dataplane.layout cimport store16_release

cdef enum:
    MAX_REGIONS = 512

cdef struct Region:
    # Guest-physical address of the first byte.
    uint64_t guest
    uint64_t size
    # Where we see it: const, since only write_guest() may write there.
    const uint8_t *host

cdef struct RegionTable:
    int count
    Region region[MAX_REGIONS]


cdef enum Way:
    # How bytes are written: by ordinary stores, by non-temporal ones, or as one aligned
    # word of 16 bits, which is seen after everything that was written before it.
    THROUGH_CACHES = 0
    PAST_CACHES = 1
    AS_WORD = 2


cdef inline void write_guest(
    Marker *marker, uint64_t guest, const void *host, const void *source, uint64_t size,
    Way way
) noexcept nogil:
    """Write `size` bytes, not 0, to the guest-physical address `guest`, which we see at
    `host`, and log that.

    Every store into guest memory goes through here. All other pointers there are const,
    and the compiler refuses to drop that, so it is the compiler that proves it.
    """
    if way == AS_WORD:
        store16_release(<uint16_t *> host, (<const uint16_t *> source)[0])
    else:
        copy(<uint8_t *> host, <const uint8_t *> source, size, way == PAST_CACHES)
    if marker.log != NULL:
        mark(marker, guest, size)


cdef inline Region *find(RegionTable *table, int *hint, uint64_t guest) noexcept nogil:
    """The region with this guest-physical address, or NULL.

    `hint` is the caller's: the index of the region that was right the last time.
    """
    cdef Region *region
    cdef int low = 0
    cdef int high = table.count
    cdef int middle

    if hint[0] < high:
        region = &table.region[hint[0]]
        if guest - region.guest < region.size:
            return region
    while low < high:
        middle = (low + high) >> 1
        region = &table.region[middle]
        if guest - region.guest < region.size:
            hint[0] = middle
            return region
        if guest < region.guest:
            high = middle
        else:
            low = middle + 1
    return NULL


cdef inline bint mapped(
    RegionTable *table, int *hint, uint64_t guest, uint64_t size
) noexcept nogil:
    """Is every byte of [guest, guest + size) memory of the guest?"""
    cdef Region *region
    cdef uint64_t run

    if guest + size < guest:
        return False
    while True:
        region = find(table, hint, guest)
        if region == NULL:
            return False
        run = region.size - (guest - region.guest)
        if size <= run:
            return True
        guest += run
        size -= run


cdef bint copy_in(
    RegionTable *table, int *hint, uint8_t *to, uint64_t guest, uint64_t size,
    bint past_caches,
) noexcept nogil
cdef bint copy_out(
    RegionTable *table, int *hint, uint64_t guest, const uint8_t *source, uint64_t size,
    bint past_caches, Marker *marker,
) noexcept nogil
cdef bint same_bytes(
    RegionTable *table, int *hint, uint64_t guest, const uint8_t *other, uint64_t size
) noexcept nogil


cdef class GuestMemory:
    cdef RegionTable table
    cdef DirtyLog log
