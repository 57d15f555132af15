# SPDX-License-Identifier: Apache-2.0
"""The dirty log: a bit for each page of guest memory that was written.

While the VMM migrates the guest, it takes words out of the log, each by an exchange
with zero, and sends the pages again whose bits it finds. Bit n % 8 of byte n / 8 stands
for the 4096 bytes at the guest-physical address 4096 n, whatever pages the memory is
made of. Other devices share the log, so all that we do to it is an atomic OR.

A store comes first, then its bit. The other way round, the VMM could take the bit and
send the page between the two, and would never send the bytes that were stored then. The
OR releases the store: a VMM that sees the bit sees the bytes. (Non-temporal stores end
in a fence of their own, see copying.pxd.)

Each store sets its bit, also one to the same page as the last: the VMM may have taken
that bit since. A look at the bit before would need a full fence, which costs no less
than the OR.
"""

from libc.stdint cimport UINT64_MAX, uint8_t, uint64_t

from vhost_airlock.dataplane.layout cimport PAGE, or8_release, or64_release

cdef struct DirtyLog:
    # The log of one guest, as a VMM gave it last. `size` in bytes; 0: there is none.
    uint64_t size
    # Where we see it: const, since only set_bits() may write there.
    const uint8_t *bits
    # Bytes that `bits` lies behind a multiple of 8.
    uint64_t skew

cdef struct Marker:
    # One kind of a ring's stores: to its own words, or to buffers.
    # NULL: they are not logged.
    const DirtyLog *log
    # For the counters: pages marked, and pages that lie beyond the log.
    uint64_t logged
    uint64_t unlogged


cdef inline void set_bits(
    const DirtyLog *log, uint64_t page, uint64_t end
) noexcept nogil:
    """Set the bits of the pages from `page` up to, not including, `end`. They are in
    the log.
    """
    cdef uint64_t byte, count

    while page < end:
        byte = page // 8
        if page % 8 == 0 and end - page >= 64 and (byte + log.skew) % 8 == 0:
            # Little-endian: these are the same bits as in 8 bytes.
            or64_release(<uint64_t *> (log.bits + byte), UINT64_MAX)
            page += 64
        else:
            count = min(8 - page % 8, end - page)
            or8_release(
                <uint8_t *> (log.bits + byte), ((1 << count) - 1) << (page % 8)
            )
            page += count


cdef inline void mark(Marker *marker, uint64_t guest, uint64_t size) noexcept nogil:
    """Log a store of `size` bytes, not 0, to the guest-physical address `guest`."""
    cdef uint64_t page = guest // PAGE
    cdef uint64_t end = (guest + (size - 1)) // PAGE + 1
    cdef uint64_t room = marker.log.size * 8

    if end > room:
        marker.unlogged += end - max(page, room)
        end = max(page, room)
    if page < end:
        set_bits(marker.log, page, end)
        marker.logged += end - page
