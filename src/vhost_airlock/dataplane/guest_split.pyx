# SPDX-License-Identifier: Apache-2.0
"""The device side of a split virtqueue in guest memory (virtio 1.3, 2.7).

The guest is hostile: it can rewrite the ring while we look. Every word is fetched
once, by the accessors of layout.pxd, and only our copy is judged. An index out of
range is a fault and never the same as 'nothing there'.

What stands in the used ring is ours to write and never read back, save the index
once, when the ring starts.
"""

from libc.stdint cimport uint16_t, uint32_t, uint8_t

from vhost_airlock.dataplane.guest cimport Chain, GuestOps, GuestRing, add_segment
from vhost_airlock.dataplane.layout cimport (
    AVAIL_NO_INTERRUPT, Avail, BAD_ADDRESS, BAD_AVAIL_INDEX, BAD_HEAD, BAD_INDIRECT,
    BAD_NEXT, DESC_INDIRECT, DESC_NEXT, Desc, EMPTY_CHAIN, HEAD_IN_USE, LOOP,
    MAX_SEGMENTS, NESTED_INDIRECT, USED_NO_NOTIFY, Used, fence, fetch_desc, forget,
    load16, load16_acquire, need_event, store16, store16_release,
)
from vhost_airlock.dataplane.regions cimport copy_in

cdef GuestOps OPS


cdef void start_split(
    GuestRing *ring, Desc *desc, Avail *avail, Used *used, uint16_t base
) noexcept nogil:
    """Begin at position `base` of the avail ring. resume_split() must follow."""
    ring.ops = &OPS
    ring.split.seen = base
    ring.split.avail_idx = base
    ring.split.called = False
    move_split(ring, desc, avail, used)


cdef void resume_split(GuestRing *ring) noexcept nogil:
    """Go on where the used ring says that it is."""
    ring.split.used_idx = load16(&ring.split.used.idx)


cdef void move_split(
    GuestRing *ring, Desc *desc, Avail *avail, Used *used
) noexcept nogil:
    """The same ring is at other addresses now, where it has yet to be armed."""
    ring.split.desc = desc
    ring.split.avail = avail
    ring.split.used = used
    ring.armed = False


cdef bint pending(GuestRing *ring) noexcept nogil:
    return (
        ring.split.seen != ring.split.avail_idx
        or load16(&ring.split.avail.idx) != ring.split.seen
    )


cdef int take(GuestRing *ring, Chain *chain) noexcept nogil:
    cdef uint16_t waiting
    cdef uint16_t head
    cdef int rc

    if ring.split.seen == ring.split.avail_idx:
        # Acquire: the entries below the index must be read after it.
        ring.split.avail_idx = load16_acquire(&ring.split.avail.idx)
        waiting = ring.split.avail_idx - ring.split.seen
        if waiting == 0:
            return 0
        if waiting > ring.size:
            ring.split.avail_idx = ring.split.seen
            return BAD_AVAIL_INDEX

    head = load16(&ring.split.avail.ring[ring.split.seen & (ring.size - 1)])
    if head >= ring.size:
        return BAD_HEAD
    if ring.busy[head]:
        return HEAD_IN_USE
    rc = walk(ring, chain, head)
    if rc < 0:
        return rc
    ring.busy[head] = True
    ring.split.seen += 1
    return 1


cdef int walk(GuestRing *ring, Chain *chain, uint16_t head) noexcept nogil:
    """Copy the chain that starts at `head`. 0 or a Fault."""
    cdef Desc desc
    cdef uint16_t index = head
    cdef uint32_t _step
    cdef int rc

    chain.head = head
    chain.count = 0
    chain.readable = 0
    chain.bytes_readable = 0
    chain.bytes_writable = 0
    for _step in range(ring.size):
        fetch_desc(&desc, &ring.split.desc[index])
        if desc.flags & DESC_INDIRECT:
            if not ring.indirect or desc.flags & DESC_NEXT:
                return BAD_INDIRECT
            rc = walk_table(ring, chain, &desc)
            return rc if rc < 0 else check_end(chain)
        rc = add_segment(ring, chain, &desc)
        if rc < 0:
            return rc
        if not desc.flags & DESC_NEXT:
            return check_end(chain)
        index = desc.next
        if index >= ring.size:
            return BAD_NEXT
    return LOOP


cdef int walk_table(GuestRing *ring, Chain *chain, const Desc *table) noexcept nogil:
    """Append the chain in an indirect table, which is copied before it is read."""
    cdef uint32_t entries = table.len // sizeof(Desc)
    cdef uint32_t _step
    cdef uint32_t index = 0
    cdef Desc *desc
    cdef int rc

    if entries == 0 or entries > MAX_SEGMENTS or table.len % sizeof(Desc):
        return BAD_INDIRECT
    if not copy_in(
        ring.memory, &ring.hint, <uint8_t *> ring.table, table.addr, table.len, False
    ):
        return BAD_ADDRESS
    forget()
    for _step in range(entries):
        desc = &ring.table[index]
        if desc.flags & DESC_INDIRECT:
            return NESTED_INDIRECT
        rc = add_segment(ring, chain, desc)
        if rc < 0:
            return rc
        if not desc.flags & DESC_NEXT:
            return 0
        index = desc.next
        if index >= entries:
            return BAD_NEXT
    return LOOP


cdef int check_end(const Chain *chain) noexcept nogil:
    return 0 if chain.count else EMPTY_CHAIN


cdef void complete(GuestRing *ring, uint16_t head, uint32_t length) noexcept nogil:
    cdef uint16_t at = ring.split.used_idx & (ring.size - 1)

    ring.split.used.ring[at].id = head
    ring.split.used.ring[at].len = length
    ring.split.used_idx += 1
    ring.busy[head] = False


cdef bint publish(GuestRing *ring) noexcept nogil:
    cdef uint16_t old = ring.split.published
    cdef uint16_t new = ring.split.used_idx
    cdef bint called = ring.split.called

    # Release: data and used elements must be there before the index is.
    store16_release(&ring.split.used.idx, new)
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
    if ring.event_idx:
        # avail_event stands behind the used ring.
        store16(<uint16_t *> &ring.split.used.ring[ring.size], ring.split.seen)
    else:
        store16(&ring.split.used.flags, 0)
    ring.armed = True


cdef void disarm(GuestRing *ring) noexcept nogil:
    # With EVENT_IDX the event index just stays behind: no kick till it is moved.
    if not ring.event_idx:
        store16(&ring.split.used.flags, USED_NO_NOTIFY)
    ring.armed = False


OPS.take = take
OPS.complete = complete
OPS.publish = publish
OPS.arm = arm
OPS.disarm = disarm
OPS.pending = pending
