# SPDX-License-Identifier: Apache-2.0
"""The record of the chains in flight of one ring, in memory that outlives us.

The VMM keeps this memory and gives it to the next back-end that it connects to, which
may be ours or another one: the layout and the order of the stores are those of the
vhost-user specification, "Inflight I/O tracking", for split rings. An entry stands for
a head. A record that is found at a start is the matter of recorded.pyx.

We can be killed after any instruction. Stores that were made by then are there, those
after it are not; so what counts is the order that the compiler gives them, and note()
keeps it. Of a chain these are, with its other steps between:

1. (The chain is fetched, and checked in memory of our own.)
2. counter, then inflight = 1. From here on the chain is done again. The position in the
   avail ring is not in the record: it is the used index and the number of chains that
   are marked. So chains are marked in the order of the avail ring, each when it is
   taken, also if it then waits for room.
3. (Copies, the back, the copies to the guest, the used element.)
4. next, then last_batch_head. The list that begins there tells which chains were in the
   batch; so it has to be whole before the guest sees the batch.
5. (The used index of the ring: the one store by which the guest sees the batch. If we
   are killed before it, the whole batch is done again: the guest still owns the chains.
   After it, the used index is ahead of used_idx, by as many as the list has to name.)
6. inflight = 0 for each chain of the batch, then used_idx: the list is not needed any
   more. No chain of the next batch may be listed before that.
"""

from libc.stdint cimport uint8_t, uint16_t, uint64_t

from vhost_airlock.dataplane.layout cimport forget, store8, store16, store64

cdef extern from * nogil:
    """
    typedef struct {
        uint8_t inflight, padding[5]; uint16_t next; uint64_t counter;
    } airlock_entry;
    typedef struct {
        uint64_t features;
        uint16_t version, desc_num, last_batch_head, used_idx;
        airlock_entry entry[];
    } airlock_table;
    """
    ctypedef struct Entry "airlock_entry":
        uint8_t inflight
        uint16_t next
        uint64_t counter

    ctypedef struct Table "airlock_table":
        uint64_t features
        uint16_t version
        uint16_t desc_num
        uint16_t last_batch_head
        uint16_t used_idx
        Entry *entry

cdef enum:
    # Of a table that has been set up; 0: it has not.
    VERSION = 1

cdef struct Record:
    # Where we see the table: const, since only note() may write there. NULL: the ring
    # is not recorded.
    const Table *table
    # Our copy of it while the ring starts, and how many entries it has room for.
    Table *copy
    uint16_t room
    # Of the next chain that is taken.
    uint64_t counter
    # Our own words for last_batch_head and used_idx.
    uint16_t last
    uint16_t used_idx
    # The heads of the batch at hand.
    uint16_t *ended
    uint16_t ended_count
    # The heads of the chains of before the start that are to be taken first, how many
    # there are, and how many of them were taken.
    uint16_t *again
    uint16_t again_count
    uint16_t again_done


cdef inline void note(const void *at, uint64_t value, size_t size) noexcept nogil:
    """Write a word of 1, 2 or 8 bytes. Every store into a record goes through here, and
    the compiler moves no other store across it.
    """
    forget()
    if size == 1:
        store8(<uint8_t *> at, <uint8_t> value)
    elif size == 2:
        store16(<uint16_t *> at, <uint16_t> value)
    else:
        store64(<uint64_t *> at, value)
    forget()


cdef inline void mark(Record *record, uint16_t head) noexcept nogil:
    """A chain was taken from the guest's ring."""
    note(&record.table.entry[head].counter, record.counter, 8)
    note(&record.table.entry[head].inflight, True, 1)
    record.counter += 1


cdef inline void unmark(Record *record, uint16_t head) noexcept nogil:
    """A chain is the guest's again."""
    note(&record.table.entry[head].inflight, False, 1)


cdef inline void add_to_batch(Record *record, uint16_t head) noexcept nogil:
    """The used element of a chain was written; the guest does not see it yet."""
    note(&record.table.entry[head].next, record.last, 2)
    note(&record.table.last_batch_head, head, 2)
    record.last = head
    record.ended[record.ended_count] = head
    record.ended_count += 1


cdef inline void end_batch(Record *record) noexcept nogil:
    """The guest sees the used elements of the batch."""
    cdef uint16_t i

    for i in range(record.ended_count):
        unmark(record, record.ended[i])
    record.used_idx += record.ended_count
    note(&record.table.used_idx, record.used_idx, 2)
    record.ended_count = 0
