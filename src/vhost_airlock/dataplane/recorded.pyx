# SPDX-License-Identifier: Apache-2.0
"""Starts and stops a ring whose chains in flight are recorded, see inflight.pxd.

A record that is found at a start is memory of another process, and may be anybody's: it
is read once, into a copy, and only the copy is judged. Nothing in it is an address. At
worst it names heads that are not in flight; the guest's ring is then read there with
the checks that all chains get.

A start can be cut off by a kill as well. All that it stores leads to the same decision
when the record is read again.

- A record that was never used (version 0) becomes this ring's, from the ring's used
  index on. If the ring's base is another number, chains are in flight that no record
  has, and the ring is not recorded.
- The used index of the ring is ahead of the one in the record: the last batch had been
  shown to the guest. Its chains are done; the others that are marked are not.
- If the list of the last batch is no such list, the record is of another ring, or the
  ring was reset. The record is made a new one then.
- The base that the VMM tells counts for nothing: front-ends tell the used index, or the
  avail index, or the base that they were told. The record says it exactly.
- A ring that has stopped in this session may have left chains with the back. Those go
  on, the back does not get them a second time; all others are taken again, in the order
  in which they were taken first.
"""

from libc.stdint cimport uint16_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free

from vhost_airlock.dataplane.guard cimport guarded
from vhost_airlock.dataplane.inflight cimport (
    Entry, Record, Table, VERSION, end_batch, note, unmark,
)
from vhost_airlock.dataplane.layout cimport Desc, fetch_desc, load16, load64
from vhost_airlock.dataplane.shadow cimport PARKED, RECALLED, RETURNED
from vhost_airlock.dataplane.step cimport PumpState, disown, run

NOT_RECORDED = "requests in flight are not recorded: {}"
OTHER_RING = (
    "the record of requests in flight does not fit to the ring, and is begun anew"
)


def erase(uintptr_t at):
    """The chains in the record at this address are forgotten; its ring is stopped.

    False: the memory is not there.
    """
    cdef int done

    return guarded(make_unused, <void *> at, 0, &done)


cdef int make_unused(void *what, int _) noexcept nogil:
    cdef const Table *table = <const Table *> what

    note(&table.version, 0, 2)
    return 0


cdef tuple open_record(PumpState *pump, uintptr_t at, uint16_t room, bint reset):
    """Use the record at this address for a ring that has just been attached.

    It has `room` entries, and is aligned to 8. `reset`: it is of chains of before a
    reset of the ring.

    Returns (the heads of the chains that are in flight, in their order; None or a text
    for the log). If the ring can't be recorded, record.table is NULL then.
    """
    cdef Record *record = &pump.record
    cdef list heads = []

    record.ended_count = record.again_count = record.again_done = 0
    if room < pump.guest.size:
        return [], NOT_RECORDED.format(
            f"the record has room for {room} of its {pump.guest.size} entries"
        )
    record.copy = <Table *> calloc(1, sizeof(Table) + room * sizeof(Entry))
    if record.copy == NULL:
        raise MemoryError  # not reached: no memory
    record.table = <const Table *> at
    record.room = room
    try:
        text = begin_record(pump, reset, heads)
    finally:
        free(record.copy)
    return heads, text


cdef str begin_record(PumpState *pump, bint reset, list heads):
    """Judge our copy of the record, begin with it, and find the heads in flight."""
    cdef Record *record = &pump.record
    cdef const Table *copy = record.copy
    cdef uint16_t used = pump.guest.ops.used_at(&pump.guest)
    cdef list marked = []
    cdef bint fits = True
    cdef uint16_t i

    reason = text = None
    if not run(pump, read_table, 0):
        reason = "a page of the record can't be had"
    elif copy.version > VERSION:
        reason = f"the record has version {copy.version}, not {VERSION}"
    elif copy.version and copy.features:
        reason = f"the record has features {copy.features:#x}, not 0"
    elif copy.version and not pump.guest.size <= copy.desc_num <= record.room:
        reason = (
            f"the record says that it has {copy.desc_num} entries,"
            f" not {pump.guest.size} to {record.room}"
        )
    if reason:
        record.table = NULL
        return NOT_RECORDED.format(reason)

    record.counter = 0
    record.last = copy.last_batch_head
    for i in range(record.room):
        record.counter = max(record.counter, copy.entry[i].counter + 1)
        if copy.entry[i].inflight:
            marked.append((copy.entry[i].counter, i))
            fits = fits and i < pump.guest.size
    if copy.version and not (reset and marked):
        done = last_batch(copy, pump.guest.size, used) if marked else {}
        if done is not None and fits:
            for i, head in enumerate(done):
                record.ended[i] = head
            record.ended_count = len(done)
            record.used_idx = used - record.ended_count
            run(pump, settle, 0)
            heads += [head for _, head in sorted(marked) if head not in done]
            return None
        text = None if reset else OTHER_RING
    base = pump.guest.ops.base_after(&pump.guest, 0)
    if base != used:
        run(pump, leave_unused, 0)  # it would be out of date at the next start
        record.table = NULL
        return NOT_RECORDED.format(
            f"its base is {base} and its used index {used}, and the record has none of"
            " the requests between"
        )
    record.used_idx = used
    run(pump, make_new, 0)
    return text


cdef dict last_batch(const Table *copy, uint16_t size, uint16_t used):
    """The heads of the last batch, as keys, if the guest had been shown it, and
    used_idx has not moved yet. None: the list has not as many heads of this ring.
    """
    cdef dict found = {}
    cdef uint16_t head = copy.last_batch_head
    cdef uint16_t count = used - copy.used_idx

    while len(found) < count:
        if head >= size or head in found:
            return None
        found[head] = True
        head = copy.entry[head].next
    return found


cdef int read_table(void *what, int _) noexcept nogil:
    """Copy the record: each word of it is read here, and only once."""
    cdef Record *record = &(<PumpState *> what).record
    cdef const Table *table = record.table
    cdef Table *copy = record.copy
    cdef uint16_t i

    copy.features = load64(&table.features)
    copy.version = load16(&table.version)
    copy.desc_num = load16(&table.desc_num)
    copy.last_batch_head = load16(&table.last_batch_head)
    copy.used_idx = load16(&table.used_idx)
    for i in range(record.room):
        # An entry is as long as a descriptor: two words of 8 bytes.
        fetch_desc(<Desc *> &copy.entry[i], <const Desc *> &table.entry[i])
    return True


cdef int settle(void *what, int _) noexcept nogil:
    """Make the stores that the last batch lacks."""
    end_batch(&(<PumpState *> what).record)
    return True


cdef int leave_unused(void *what, int _) noexcept nogil:
    """Let the next start find no chains in it."""
    note(&(<PumpState *> what).record.table.version, 0, 2)
    return True


cdef int make_new(void *what, int _) noexcept nogil:
    """Make it a new record. It counts as unused until it is all there."""
    cdef Record *record = &(<PumpState *> what).record
    cdef const Table *table = record.table
    cdef uint16_t i

    note(&table.version, 0, 2)
    note(&table.features, 0, 8)
    note(&table.desc_num, record.room, 2)
    for i in range(record.room):
        if record.copy.entry[i].inflight:
            unmark(record, i)
    note(&table.used_idx, record.used_idx, 2)
    note(&table.version, VERSION, 2)
    return True


cdef set_apart(PumpState *pump, list heads):
    """Of the chains in flight, those that slots have go on; the others are taken again.

    Chains of slots that are not in flight by the record are nobody's any more.
    """
    cdef Record *record = &pump.record
    cdef uint16_t i
    cdef int held = 0

    left = dict.fromkeys(heads)
    for i in range(pump.shadow.slots):
        if pump.shadow.state[i] not in (PARKED, RETURNED, RECALLED):
            continue
        if pump.slot[i].head in left:
            del left[pump.slot[i].head]
            held += 1
        else:
            disown(pump, i)
    for i, head in enumerate(left):
        record.again[i] = head
    record.again_count = len(left)
    pump.guest.ops.begin_behind(&pump.guest, held, record.again_count)


cdef uint64_t first_of_ring(const PumpState *pump) noexcept nogil:
    """The first position from which on the guest's ring has the chains that were taken.

    Of those that were taken by their heads, the ring may have others there. So the
    guest can't offer them again; they stay in the record, and in slots.
    """
    if pump.record.table == NULL:
        return 0
    return pump.began + pump.record.again_count


cdef void take_out(PumpState *pump, uint16_t head) noexcept nogil:
    """A chain is the guest's again, and not in the record any more."""
    run(pump, unmark_head, head)


cdef int unmark_head(void *what, int head) noexcept nogil:
    unmark(&(<PumpState *> what).record, head)
    return True
