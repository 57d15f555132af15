# SPDX-License-Identifier: Apache-2.0
"""The driver side of a split virtqueue in isolated memory (virtio 1.3, 2.7).

The back is hostile: it can rewrite all of the ring at any time. We write descriptors
and the avail ring and never read them back. Of the words that the back writes, the used
index is fetched once and bounded, a used element is fetched once, and its id is looked
up in our own record. A completion of something that is not with the back is counted and
skipped, since real devices repeat some; more of them in a row than the ring has entries
is a fault.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.layout cimport (
    AVAIL_NO_INTERRUPT, Avail, BAD_USED_ID, BAD_USED_INDEX, DESC_NEXT, Desc,
    USED_NO_NOTIFY, Used, UsedElem, blame, fence, load16, load16_acquire, load32,
    need_event, store16, store16_release,
)
from vhost_airlock.dataplane.shadow cimport (
    FOLLOWER, IN_FLIGHT, RingForBack, ShadowOps, ShadowRing, is_with_back, take_slot,
)

cdef ShadowOps OPS


cdef const ShadowOps *split_shadow() noexcept nogil:
    """The operations of this format."""
    return &OPS


cdef uint64_t bytes(uint16_t size) noexcept nogil:
    return used_offset(size) + 6 + size * sizeof(UsedElem)


cdef uint64_t avail_offset(uint64_t size) noexcept nogil:
    return size * sizeof(Desc)


cdef uint64_t used_offset(uint64_t size) noexcept nogil:
    return (avail_offset(size) + 6 + 2 * size + 63) & ~<uint64_t> 63


cdef RingForBack describe(uint16_t size, uint64_t back) noexcept nogil:
    return RingForBack(
        size, 0, back, back + avail_offset(size), back + used_offset(size)
    )


cdef void start(ShadowRing *ring, uint8_t *host) noexcept nogil:
    ring.split.desc = <Desc *> host
    ring.split.avail = <Avail *> (host + avail_offset(ring.size))
    ring.split.used = <Used *> (host + used_offset(ring.size))
    ring.split.avail_idx = 0
    ring.split.published = 0
    ring.split.used_seen = 0
    ring.split.used_idx = 0
    ring.strikes = 0
    ring.armed = False


cdef void offer(
    ShadowRing *ring, uint16_t slot, const Desc *chain, uint16_t count
) noexcept nogil:
    cdef Desc *desc
    cdef uint16_t at = slot
    cdef uint16_t following
    cdef uint16_t i

    ring.state[slot] = IN_FLIGHT
    for i in range(count):
        desc = &ring.split.desc[at]
        desc.addr = chain[i].addr
        desc.len = chain[i].len
        if i + 1 < count:
            following = take_slot(ring)
            ring.state[following] = FOLLOWER
            desc.flags = chain[i].flags | DESC_NEXT
            desc.next = following
        else:
            following = slot
            desc.flags = chain[i].flags
            desc.next = 0
        ring.next[at] = following
        at = following

    ring.split.avail.ring[ring.split.avail_idx & (ring.size - 1)] = slot
    ring.split.avail_idx += 1


cdef bint publish(ShadowRing *ring) noexcept nogil:
    cdef uint16_t old = ring.split.published
    cdef uint16_t new = ring.split.avail_idx

    # Release: descriptors and entries must be there before the index is.
    store16_release(&ring.split.avail.idx, new)
    ring.split.published = new
    # The back arms and then looks at the index; we move the index and then look
    # whether it is armed. Without a full fence both could miss the other.
    fence()
    if not ring.event_idx:
        return not load16(&ring.split.used.flags) & USED_NO_NOTIFY
    # avail_event stands behind the used ring.
    return need_event(
        load16(<uint16_t *> &ring.split.used.ring[ring.size]), new, old
    )


cdef bint amid(ShadowRing *ring) noexcept nogil:
    return ring.split.used_seen != ring.split.used_idx


cdef bint pending(ShadowRing *ring) noexcept nogil:
    return (
        amid(ring)
        or load16(&ring.split.used.idx) != ring.split.used_seen
    )


cdef int reap(ShadowRing *ring, uint16_t *slot, uint32_t *length) noexcept nogil:
    cdef uint16_t waiting
    cdef uint32_t id

    while True:
        if not amid(ring):
            # Acquire: elements and data below the index must be read after it.
            ring.split.used_idx = load16_acquire(&ring.split.used.idx)
            waiting = ring.split.used_idx - ring.split.used_seen
            if waiting == 0:
                return 0
            if waiting > ring.size:
                ring.split.used_idx = ring.split.used_seen
                return blame(
                    &ring.blamed, BAD_USED_INDEX,
                    <uint16_t> (ring.split.used_seen + waiting), ring.split.used_seen,
                )

        id = load32(&ring.split.used.ring[ring.split.used_seen & (ring.size - 1)].id)
        length[0] = load32(
            &ring.split.used.ring[ring.split.used_seen & (ring.size - 1)].len
        )
        ring.split.used_seen += 1
        if id < ring.slots and is_with_back(ring.state[id]):
            ring.strikes = 0
            slot[0] = id
            return 1
        ring.violations += 1
        ring.strikes += 1
        if ring.strikes > ring.size:
            return blame(&ring.blamed, BAD_USED_ID, id, ring.strikes)


cdef void arm(ShadowRing *ring) noexcept nogil:
    if ring.event_idx:
        # used_event stands behind the avail ring.
        store16(&ring.split.avail.ring[ring.size], ring.split.used_seen)
    else:
        store16(&ring.split.avail.flags, 0)
    ring.armed = True


cdef void disarm(ShadowRing *ring) noexcept nogil:
    # With EVENT_IDX the event index just stays behind: no call till it is moved.
    if not ring.event_idx:
        store16(&ring.split.avail.flags, AVAIL_NO_INTERRUPT)
    ring.armed = False


cdef void silence(ShadowRing *ring) noexcept nogil:
    disarm(ring)
    if ring.event_idx:
        # Further away than the back can get: no ring has so many entries.
        store16(&ring.split.avail.ring[ring.size], ring.split.used_seen + 0x7fff)


cdef int64_t unfetched(const ShadowRing *ring) noexcept nogil:
    """avail_event says it: exactly for libvhost-user, late for others."""
    if not ring.event_idx:
        return -1
    return unfetched_at(ring, load16(<uint16_t *> &ring.split.used.ring[ring.size]))


cdef int64_t unfetched_at(const ShadowRing *ring, uint64_t base) noexcept nogil:
    return <uint16_t> (ring.split.avail_idx - base)


OPS.bytes = bytes
OPS.describe = describe
OPS.start = start
OPS.offer = offer
OPS.publish = publish
OPS.reap = reap
OPS.amid = amid
OPS.arm = arm
OPS.disarm = disarm
OPS.silence = silence
OPS.pending = pending
OPS.unfetched = unfetched
OPS.unfetched_at = unfetched_at
