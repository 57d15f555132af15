# SPDX-License-Identifier: Apache-2.0
"""The device side of a split virtqueue in guest memory (virtio 1.3, 2.7).

The guest is hostile: it can rewrite the ring while we look. Every word is fetched
once, by the accessors of layout.pxd, and only our copy is judged. An index out of
range is a fault and never the same as 'nothing there'.

The used ring is ours to write and never read back, save the index once, when the ring
starts.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uint8_t

from vhost_airlock.dataplane.guest cimport (
    Chain, GuestOps, GuestRing, NO_BASE, Part, add_segment,
)
from vhost_airlock.dataplane.layout cimport (
    AVAIL_NO_INTERRUPT, Avail, BAD_ADDRESS, BAD_AVAIL_INDEX, BAD_HEAD, BAD_INDIRECT,
    BAD_NEXT, DESC_INDIRECT, DESC_NEXT, Desc, EMPTY_CHAIN, HEAD_IN_USE, LOOP,
    MAX_SEGMENTS, NESTED_INDIRECT, USED_NO_NOTIFY, Used, UsedElem, blame, fence,
    fetch_desc, forget, load16, load16_acquire, need_event,
)
from vhost_airlock.dataplane.regions cimport (
    AS_WORD, THROUGH_CACHES, copy_in, write_guest,
)

MAX_SIZE = 32768
"""The most entries of a split ring (virtio 1.3, 2.7)."""

cdef enum:
    # Offsets in a used ring, in bytes.
    USED_FLAGS = 0
    USED_IDX = 2
    USED_RING = 4

cdef GuestOps OPS


cdef const GuestOps *split_guest() noexcept nogil:
    """The operations of this format."""
    return &OPS


def layout(int64_t size):
    """Return (bytes, alignment) of descriptor table, avail ring and used ring.

    ValueError if a split ring can't have this size.
    """
    if not 0 < size <= MAX_SIZE or size & (size - 1):
        raise ValueError(f"{size} entries are no power of two up to {MAX_SIZE}")
    return (16 * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4)


def check_base(uint64_t base):
    """ValueError if it is no base of a split ring: an avail index of 16 bits."""
    if base > 0xffff:
        raise ValueError(f"{base:#x} has more than 16 bits")


cdef void start(GuestRing *ring, const Part *parts, int64_t base) noexcept nogil:
    move(ring, parts)
    ring.split.called = False
    ring.split.baseless = base == NO_BASE
    ring.split.base = <uint16_t> base


cdef void begin(GuestRing *ring) noexcept nogil:
    cdef uint16_t used_idx = load16(&ring.split.used.idx)

    ring.split.used_idx = used_idx
    # No ring has completed more chains than it has taken, nor has it taken so many
    # more. DPDK's virtio-user says 0 after a reconnect, whatever the ring has done.
    if ring.split.baseless or <uint16_t> (ring.split.base - used_idx) > ring.size:
        ring.split.base = used_idx
    ring.split.seen = ring.split.base
    ring.split.avail_idx = ring.split.base


cdef void move(GuestRing *ring, const Part *parts) noexcept nogil:
    ring.split.desc = <const Desc *> parts[0].host
    ring.split.avail = <const Avail *> parts[1].host
    ring.split.used = <const Used *> parts[2].host
    ring.split.used_guest = parts[2].guest
    ring.armed = False


cdef uint16_t used_at(const GuestRing *ring) noexcept nogil:
    return ring.split.used_idx


cdef void begin_behind(GuestRing *ring, uint16_t held, uint16_t again) noexcept nogil:
    ring.split.base = ring.split.used_idx + held
    ring.split.seen = ring.split.base
    ring.split.avail_idx = ring.split.base + again


cdef uint64_t base_after(const GuestRing *ring, int64_t chains) noexcept nogil:
    return <uint16_t> (ring.split.base + chains)


cdef uint64_t standing(const GuestRing *ring, uint64_t base) noexcept nogil:
    return <uint64_t> ring.split.used_idx << 16 | <uint16_t> base


cdef bint pending(GuestRing *ring) noexcept nogil:
    return (
        ring.split.seen != ring.split.avail_idx
        or load16(&ring.split.avail.idx) != ring.split.seen
    )


cdef int take(GuestRing *ring, Chain *chain) noexcept nogil:
    cdef uint16_t waiting
    cdef uint16_t head

    if ring.split.seen == ring.split.avail_idx:
        # Acquire: the entries below the index must be read after it.
        ring.split.avail_idx = load16_acquire(&ring.split.avail.idx)
        waiting = ring.split.avail_idx - ring.split.seen
        if waiting == 0:
            return 0
        if waiting > ring.size:
            ring.split.avail_idx = ring.split.seen
            return blame(
                &ring.blamed, BAD_AVAIL_INDEX,
                <uint16_t> (ring.split.seen + waiting), ring.split.seen,
            )

    head = load16(&ring.split.avail.ring[ring.split.seen & (ring.size - 1)])
    if head >= ring.size:
        return blame(&ring.blamed, BAD_HEAD, head, ring.size)
    return take_head(ring, chain, head)


cdef int take_head(GuestRing *ring, Chain *chain, uint16_t head) noexcept nogil:
    cdef int rc

    if ring.busy[head]:
        return blame(&ring.blamed, HEAD_IN_USE, head, ring.size)
    rc = walk(ring, chain, head)
    if rc < 0:
        return rc
    ring.busy[head] = True
    ring.split.seen += 1
    return 1


cdef void retake(GuestRing *ring, uint16_t head) noexcept nogil:
    ring.busy[head] = True


cdef int walk(GuestRing *ring, Chain *chain, uint16_t head) noexcept nogil:
    """Copy the chain that starts at `head`. 0 or a Fault."""
    cdef Desc desc
    cdef uint16_t index = head
    cdef uint32_t _step
    cdef int rc

    chain.head = head
    chain.count = 0
    chain.readable = 0
    chain.descs = 0
    chain.bytes_readable = 0
    chain.bytes_writable = 0
    for _step in range(ring.size):
        fetch_desc(&desc, &ring.split.desc[index])
        chain.descs += 1
        if desc.flags & DESC_INDIRECT:
            if not ring.indirect or desc.flags & DESC_NEXT:
                return blame(&ring.blamed, BAD_INDIRECT, desc.flags, desc.len)
            rc = walk_table(ring, chain, &desc)
            return rc if rc < 0 else check_end(chain)
        rc = add_segment(ring, chain, &desc)
        if rc < 0:
            return rc
        if not desc.flags & DESC_NEXT:
            return check_end(chain)
        index = desc.next
        if index >= ring.size:
            return blame(&ring.blamed, BAD_NEXT, index, ring.size)
    return LOOP


cdef int walk_table(GuestRing *ring, Chain *chain, const Desc *table) noexcept nogil:
    """Append the chain in an indirect table, which is copied before it is read."""
    cdef uint32_t entries = table.len // sizeof(Desc)
    cdef uint32_t _step
    cdef uint32_t index = 0
    cdef Desc *desc
    cdef int rc

    if entries == 0 or entries > MAX_SEGMENTS or table.len % sizeof(Desc):
        return blame(&ring.blamed, BAD_INDIRECT, table.flags, table.len)
    if not copy_in(
        ring.memory, &ring.hint, <uint8_t *> ring.table, table.addr, table.len, False
    ):
        return blame(&ring.blamed, BAD_ADDRESS, table.addr, table.len)
    forget()
    for _step in range(entries):
        desc = &ring.table[index]
        chain.descs += 1
        if desc.flags & DESC_INDIRECT:
            return blame(&ring.blamed, NESTED_INDIRECT, index, entries)
        rc = add_segment(ring, chain, desc)
        if rc < 0:
            return rc
        if not desc.flags & DESC_NEXT:
            return 0
        index = desc.next
        if index >= entries:
            return blame(&ring.blamed, BAD_NEXT, index, entries)
    return LOOP


cdef int check_end(const Chain *chain) noexcept nogil:
    return 0 if chain.count else EMPTY_CHAIN


cdef inline void write_used(
    GuestRing *ring, size_t offset, const void *source, uint64_t size
) noexcept nogil:
    """Write to the guest's used ring, `offset` bytes from its beginning.

    Two bytes are a word of the ring, seen after everything that was written before it.
    """
    write_guest(
        &ring.marker, ring.split.used_guest + offset,
        <const uint8_t *> ring.split.used + offset, source, size,
        AS_WORD if size == 2 else THROUGH_CACHES,
    )


cdef void complete(GuestRing *ring, uint16_t head, uint32_t length) noexcept nogil:
    cdef UsedElem element = UsedElem(head, length)
    cdef uint16_t at = ring.split.used_idx & (ring.size - 1)

    write_used(ring, USED_RING + at * sizeof(UsedElem), &element, sizeof(UsedElem))
    ring.split.used_idx += 1
    ring.busy[head] = False


cdef bint publish(GuestRing *ring) noexcept nogil:
    cdef uint16_t old = ring.split.published
    cdef uint16_t new = ring.split.used_idx
    cdef bint called = ring.split.called

    # Data and used elements must be there before the index is.
    write_used(ring, USED_IDX, &new, 2)
    # The guest arms and then looks at the index; we move the index and then look
    # whether it is armed. Without a full fence both could miss the other.
    fence()
    if not ring.event_idx:
        return not load16(&ring.split.avail.flags) & AVAIL_NO_INTERRUPT
    ring.split.published = new
    ring.split.called = True
    # used_event stands behind the avail ring.
    return not called or need_event(
        load16(&ring.split.avail.ring[ring.size]), new, old
    )


cdef void arm(GuestRing *ring) noexcept nogil:
    cdef uint16_t notify = 0

    if ring.event_idx:
        # avail_event stands behind the used ring.
        write_used(
            ring, USED_RING + ring.size * sizeof(UsedElem), &ring.split.seen, 2
        )
    else:
        write_used(ring, USED_FLAGS, &notify, 2)
    ring.armed = True


cdef void show_again(GuestRing *ring) noexcept nogil:
    write_used(ring, USED_IDX, &ring.split.used_idx, 2)
    if ring.armed:
        arm(ring)


cdef void disarm(GuestRing *ring) noexcept nogil:
    cdef uint16_t no_notify = USED_NO_NOTIFY

    # With EVENT_IDX the event index just stays behind: no kick till it is moved.
    if not ring.event_idx:
        write_used(ring, USED_FLAGS, &no_notify, 2)
    ring.armed = False


OPS.start = start
OPS.begin = begin
OPS.move = move
OPS.show_again = show_again
OPS.base_after = base_after
OPS.standing = standing
OPS.take = take
OPS.retake = retake
OPS.used_at = used_at
OPS.begin_behind = begin_behind
OPS.take_head = take_head
OPS.complete = complete
OPS.publish = publish
OPS.arm = arm
OPS.disarm = disarm
OPS.pending = pending
