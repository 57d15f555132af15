# SPDX-License-Identifier: Apache-2.0
"""The device side of a guest ring: the operations of a ring format.

guest_split.pyx is the one format there is. Another one is a module with a GuestOps of
its own and its state beside SplitGuest below.

The pump counts chains. How a position in the ring is told to the VMM (its *base*), and
which parts a ring has, is the format's own business.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.dirty_log cimport Marker
from vhost_airlock.dataplane.layout cimport (
    Avail, BAD_ADDRESS, BAD_ORDER, Blamed, CHAIN_TOO_LONG, DESC_WRITE, Desc, LOOP,
    MAX_SEGMENTS, Used, blame,
)
from vhost_airlock.dataplane.regions cimport RegionTable, mapped

cdef enum:
    # In place of a base: the VMM has told none.
    NO_BASE = -1

cdef struct Part:
    # A part of a ring: where we see it, and its guest-physical address.
    const uint8_t *host
    uint64_t guest

cdef struct Segment:
    uint64_t addr
    uint32_t len

cdef struct Chain:
    # A chain as we fetched it, checked; segments of length zero are left out.
    uint16_t head
    uint16_t count
    # The first `readable` segments are for the device to read, the rest to write.
    uint16_t readable
    # Descriptors that were fetched for it, those of a table and empty ones too.
    uint32_t descs
    uint64_t bytes_readable
    uint64_t bytes_writable
    Segment segment[MAX_SEGMENTS]

cdef struct GuestRing

cdef struct GuestOps:
    # The ring starts at a base, or at its used index if that is NO_BASE, or impossible.
    # begin() must follow, which looks at the ring.
    void (*start)(GuestRing *, const Part *parts, int64_t base) noexcept nogil
    void (*begin)(GuestRing *) noexcept nogil
    # The same ring is at other addresses now, where it has yet to be armed.
    void (*move)(GuestRing *, const Part *parts) noexcept nogil
    # Write the words again that the guest follows, as they are.
    void (*show_again)(GuestRing *) noexcept nogil
    # The base that lies this many chains behind the one where the ring began.
    uint64_t (*base_after)(const GuestRing *, int64_t chains) noexcept nogil
    # Where the ring stands when chains are taken from this base on. A ring that is
    # started where another one has stopped is the same ring, not one that was reset.
    uint64_t (*standing)(const GuestRing *, uint64_t base) noexcept nogil
    # Fetch the next chain: 1 taken, 0 none left, or a Fault.
    int (*take)(GuestRing *, Chain *) noexcept nogil
    # A chain that was taken before the ring began is in flight.
    void (*retake)(GuestRing *, uint16_t head) noexcept nogil
    # Where the used ring stood when the ring began, and how many chains it had since.
    uint16_t (*used_at)(const GuestRing *) noexcept nogil
    # The ring begins where it has not yet used `held` chains that are in flight, and
    # `again` more that are taken by their heads, with take_head(), before all others.
    void (*begin_behind)(GuestRing *, uint16_t held, uint16_t again) noexcept nogil
    # Fetch the chain with this head, as take() does.
    int (*take_head)(GuestRing *, Chain *, uint16_t head) noexcept nogil
    # Write the used element of a chain; the guest does not see it yet.
    void (*complete)(GuestRing *, uint16_t head, uint32_t len) noexcept nogil
    # Show the guest the used elements. True: it wants to be called.
    bint (*publish)(GuestRing *) noexcept nogil
    # Ask for a kick with the next chain. A fence, then pending(), must follow.
    void (*arm)(GuestRing *) noexcept nogil
    # Kicks are not needed for now.
    void (*disarm)(GuestRing *) noexcept nogil
    # Is there a chain to take?
    bint (*pending)(GuestRing *) noexcept nogil

cdef struct SplitGuest:
    const Desc *desc
    const Avail *avail
    const Used *used
    # Guest-physical address of the used ring.
    uint64_t used_guest
    # The VMM has told none: it is where the used ring says.
    bint baseless
    # Where the ring began.
    uint16_t base
    # The next position of the avail ring to take.
    uint16_t seen
    # Our copy of the guest's avail index: up to there is ours to take.
    uint16_t avail_idx
    # The next position of the used ring to fill.
    uint16_t used_idx
    # Our used index as the guest saw it when it was last called.
    uint16_t published
    bint called

cdef struct GuestRing:
    const GuestOps *ops
    RegionTable *memory
    int hint
    # For stores to the ring's own words.
    Marker marker
    uint16_t size
    bint event_idx
    bint indirect
    bint armed
    # For each head: is its chain in flight?
    uint8_t *busy
    # Our copy of the indirect table at hand, MAX_SEGMENTS entries.
    Desc *table
    # Of the fault that was found.
    Blamed blamed
    SplitGuest split


cdef inline uint64_t last_byte_of(const Chain *chain) noexcept nogil:
    """The guest's address of the last byte of a chain."""
    cdef const Segment *segment = &chain.segment[chain.count - 1]

    return segment.addr + segment.len - 1


cdef inline int add_segment(
    GuestRing *ring, Chain *chain, const Desc *desc
) noexcept nogil:
    """Check one descriptor (our copy of it) and append it. 0 or a Fault."""
    if desc.len == 0:
        return 0                # qemu-storage-daemon dies of them
    if chain.count == MAX_SEGMENTS:
        return LOOP
    if desc.flags & DESC_WRITE:
        chain.bytes_writable += desc.len
    else:
        if chain.bytes_writable:
            return blame(&ring.blamed, BAD_ORDER, desc.addr, desc.len)
        chain.readable += 1
        chain.bytes_readable += desc.len
    if chain.bytes_readable + chain.bytes_writable > <uint64_t> 0xffffffff:
        return CHAIN_TOO_LONG
    if not mapped(ring.memory, &ring.hint, desc.addr, desc.len):
        return blame(&ring.blamed, BAD_ADDRESS, desc.addr, desc.len)
    chain.segment[chain.count] = Segment(desc.addr, desc.len)
    chain.count += 1
    return 0
