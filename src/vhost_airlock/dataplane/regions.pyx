# SPDX-License-Identifier: Apache-2.0
"""The guest's memory: a table that is replaced whole, while no worker runs.

Addresses are looked up anew for every copy, so nothing that was computed from an old
table outlives it: a buffer in a region that went away is simply not there any more.
"""

from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcmp

from vhost_airlock.dataplane.copying cimport copy
from vhost_airlock.dataplane.dirty_log cimport DirtyLog, Marker, set_bits
from vhost_airlock.dataplane.guard cimport guarded

cdef struct Logs:
    # The log in use, and another one that has been.
    const DirtyLog *log
    const uint8_t *bits
    uint64_t size


cdef bint copy_in(
    RegionTable *table, int *hint, uint8_t *to, uint64_t guest, uint64_t size,
    bint past_caches,
) noexcept nogil:
    """Copy guest memory into ours: each byte is read once. False: not all is there."""
    cdef Region *region
    cdef uint64_t run

    while size:
        region = find(table, hint, guest)
        if region == NULL:
            return False
        run = min(size, region.size - (guest - region.guest))
        copy(to, region.host + (guest - region.guest), run, past_caches)
        to += run
        guest += run
        size -= run
    return True


cdef bint copy_out(
    RegionTable *table, int *hint, uint64_t guest, const uint8_t *source, uint64_t size,
    bint past_caches, Marker *marker,
) noexcept nogil:
    """Copy our memory into the guest's. False: not all is there."""
    cdef Region *region
    cdef uint64_t run

    while size:
        region = find(table, hint, guest)
        if region == NULL:
            return False
        run = min(size, region.size - (guest - region.guest))
        write_guest(
            marker, guest, region.host + (guest - region.guest), source, run,
            PAST_CACHES if past_caches else THROUGH_CACHES,
        )
        source += run
        guest += run
        size -= run
    return True


cdef bint same_bytes(
    RegionTable *table, int *hint, uint64_t guest, const uint8_t *other, uint64_t size
) noexcept nogil:
    """Are these bytes of guest memory the same as ours? False if one is not there."""
    cdef Region *region
    cdef uint64_t run

    while size:
        region = find(table, hint, guest)
        if region == NULL:
            return False
        run = min(size, region.size - (guest - region.guest))
        if memcmp(region.host + (guest - region.guest), other, run) != 0:
            return False
        other += run
        guest += run
        size -= run
    return True


cdef class GuestMemory:
    """The table itself, and the log of stores into the memory. Pumps hold it; the
    control plane replaces its content.
    """

    def set_regions(self, regions):
        """Regions as (guest-physical address, size, our address), in bytes.

        They must not overlap and not wrap round, which the caller has checked. Call
        it only while the workers of all pumps with this memory are paused.
        """
        cdef int i
        cdef uintptr_t host

        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} regions, more than {MAX_REGIONS}")
        self.table.count = 0
        for i, (guest, size, address) in enumerate(sorted(regions)):
            host = address
            self.table.region[i] = Region(guest, size, <const uint8_t *> host)
        self.table.count = len(regions)

    def set_log(self, uintptr_t address, uint64_t size):
        """The dirty log: `size` bytes at our address; 0: there is none.

        It is only used by pumps that were told to log, see Pump.set_logging(). Call it
        only while the workers of all pumps with this memory are paused.
        """
        self.log = DirtyLog(size, <const uint8_t *> address, address % 8)

    def carry_over(self, uintptr_t address, uint64_t size):
        """Set the bits in the log that are set in the one of before, `size` bytes at
        our address. Workers may run. False: a page of either is not there.
        """
        cdef Logs logs = Logs(&self.log, <const uint8_t *> address, size)
        cdef int done

        return guarded(carry, &logs, 0, &done)


cdef int carry(void *what, int _) noexcept nogil:
    cdef Logs *logs = <Logs *> what
    cdef uint64_t end = 8 * min(logs.size, logs.log.size)
    cdef uint64_t page = 0

    while page < end:
        if logs.bits[page // 8] == 0:
            page += 8 - page % 8
            continue
        if logs.bits[page // 8] & (1 << page % 8):
            set_bits(logs.log, page, page + 1)
        page += 1
    return 0
