# SPDX-License-Identifier: Apache-2.0
"""A guest's block driver that only makes requests: as fast as a queue can be driven.

The chains are laid out once, one for each request that may be in flight; from then on a
request costs a sector number, an entry in the available ring and a look at the clock.
So the device is measured, and hardly the driver.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from vhost_airlock.dataplane.layout cimport (
    AVAIL_NO_INTERRUPT, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, USED_NO_NOTIFY, Avail,
    Desc, Used, fence, load16, load16_acquire, load32, load_int, need_event, store16,
    store16_release, store_int,
)
from vhost_airlock.dataplane.sys cimport now_ns, read, signal_fd

from vhost_airlock.errors import (
    DeadlineExceeded, Disconnected, SessionError, Stopped,
)
from vhost_airlock.peers.ring import RingFault

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)
    enum:
        POLLIN
        POLLRDHUP

cdef enum:
    HEADER = 16                 # of a request: its type and its first sector
    STATUS = 16                 # where the status byte is, after the header
    TABLE = 32                  # where its indirect table is
    SECTOR = 512
    PENDING = 0xff
    TICK = 100                  # milliseconds between looks if stop() was called
    STEPS = 16                  # of latencies, for each power of two
    BUCKETS = 61 * STEPS

cdef enum Outcome:
    DONE = 0
    STOPPED = 1
    HUNG = 2
    LOST = 3
    BROKEN = 4
    BAD_USED = 5
    FAILED = 6

# Nanoseconds in which at least one request must be done.
cdef uint64_t PATIENCE = 30_000_000_000


cdef struct Slot:
    # A request that can be in flight.
    uint64_t started            # 0: it is not
    uint8_t *header
    Desc *data                  # descriptors of its data
    uint64_t place              # where its buffer is now, from the start of its stripe


cdef class Load:
    """Keeps requests in flight in one queue.

    `ring` is the ring's memory, and `private` memory for headers and descriptor tables,
    of `private_size()` bytes; `data` has the buffers, of which each request uses a
    stripe, one piece after the other. `private` and `data` are pairs of memory and its
    guest address. Requests go to `blocks` blocks from block `first` of the device.
    """

    cdef Py_buffer buffers[3]
    cdef int held
    cdef Desc *desc
    cdef Avail *avail
    cdef Used *used
    cdef Slot *slots
    cdef uint64_t[BUCKETS] histogram
    cdef uint16_t mask, seen, next_avail, published
    cdef uint16_t *used_event
    cdef uint16_t *avail_event
    cdef bint event_idx, indirect, random_order, busy_wait
    cdef int stride, segments, depth, kick, call, stopping
    cdef int inflight
    cdef int fds[3]
    cdef uint64_t size, segment, stripe, data_addr, first, blocks, cursor, state
    cdef uint64_t requests, kicks, calls, sleeps, cpu, slowest

    def __cinit__(
        self, *, ring, int queue_size, int base, bint event_idx, bint indirect, private,
        data, int depth, uint64_t size, uint64_t segment, bint write, bint random_order,
        uint64_t first, uint64_t blocks, uint64_t seed, int kick, int call, int err,
        int connection, bint busy_wait,
    ):
        cdef uint8_t *memory
        cdef uint64_t private_addr
        cdef uint64_t step
        cdef int i

        self.segments = (size + segment - 1) // segment
        self.stride = 1 if indirect else self.segments + 2
        if depth < 1 or depth * self.stride > queue_size or blocks < 1:
            raise ValueError(
                f"{depth} requests of {self.segments + 2} descriptors"
                f" in a queue of {queue_size}, over {blocks} blocks"
            )
        private, private_addr = private
        data, self.data_addr = data
        for i, owner in enumerate((ring, private, data)):
            PyObject_GetBuffer(owner, &self.buffers[i], PyBUF_WRITABLE)
            self.held += 1
        step = slot_size(self.segments)
        self.stripe = self.buffers[2].len // depth // size * size
        if <uint64_t> self.buffers[1].len < step * depth or self.stripe == 0:
            raise ValueError("too little memory for so many requests")
        memory = <uint8_t *> self.buffers[0].buf
        self.desc = <Desc *> memory
        self.avail = <Avail *> (memory + 16 * queue_size)
        i = 16 * queue_size + 6 + 2 * queue_size
        self.used = <Used *> (memory + ((i + 3) & ~3))
        if self.buffers[0].len < ((i + 3) & ~3) + 6 + 8 * queue_size:
            raise ValueError("too little memory for the ring")
        self.mask = queue_size - 1
        self.used_event = &self.avail.ring[queue_size]
        self.avail_event = <uint16_t *> &self.used.ring[queue_size]
        self.seen = self.next_avail = self.published = base
        self.event_idx, self.indirect = event_idx, indirect
        self.random_order, self.busy_wait = random_order, busy_wait
        self.depth, self.size, self.segment = depth, size, segment
        self.first, self.blocks, self.state = first, blocks, seed
        self.kick, self.call = kick, call
        self.fds[0], self.fds[1], self.fds[2] = call, err, connection
        self.slots = <Slot *> calloc(depth, sizeof(Slot))
        if self.slots == NULL:
            raise MemoryError
        memset(memory, 0, self.buffers[0].len)
        self.avail.idx = self.used.idx = base
        # Calls are wanted only just before a sleep.
        self.avail.flags = 0 if event_idx else AVAIL_NO_INTERRUPT
        self.used_event[0] = base - 1
        memory = <uint8_t *> self.buffers[1].buf
        for i in range(depth):
            lay_out(self, i, memory + step * i, private_addr + step * i, write)

    def __dealloc__(self):
        self.close()
        free(self.slots)

    def close(self):
        """Let go of the memory. run() can't be called any more."""
        while self.held:
            self.held -= 1
            PyBuffer_Release(&self.buffers[self.held])

    def run(self, uint64_t begin, uint64_t end):
        """Drive the queue until `end`; measure from `begin`, by the monotonic clock.

        Returns when all requests are done. The target of the queue's thread.
        """
        cdef int outcome

        if not self.held:
            raise ValueError("closed")
        with nogil:
            outcome = drive(self, begin, end)
        if outcome == STOPPED:
            raise Stopped("stopped")
        if outcome == HUNG:
            raise DeadlineExceeded(f"no request was done in {PATIENCE // 10**9} s")
        if outcome == LOST:
            raise Disconnected("the device has hung up")
        if outcome == BROKEN:
            raise RingFault("the device says that the ring is broken")
        if outcome == BAD_USED:
            raise SessionError("the device completed a chain that was not in flight")
        if outcome == FAILED:
            raise SessionError("a request failed")

    def stop(self):
        """Make run() return soon, whatever is in flight."""
        store_int(&self.stopping, 1)

    def counters(self):
        """Return the counts from `begin` to `end`; CPU time in nanoseconds."""
        return {
            "requests": self.requests,
            "kicks": self.kicks,
            "calls": self.calls,
            "sleeps": self.sleeps,
            "cpu": self.cpu,
            "slowest": self.slowest,
        }

    def latencies(self):
        """Return {nanoseconds: requests that took them}, rounded down by up to 1/16."""
        return {
            lowest(i): self.histogram[i] for i in range(BUCKETS) if self.histogram[i]
        }


def private_size(depth, size, segment):
    """Return the bytes of memory for headers and tables of `depth` requests."""
    return depth * slot_size((size + segment - 1) // segment)


cdef uint64_t slot_size(uint64_t segments) noexcept nogil:
    return (TABLE + 16 * (segments + 2) + 63) // 64 * 64


cdef void lay_out(
    Load load, int index, uint8_t *header, uint64_t addr, bint write
) noexcept nogil:
    """Write the chain of a request: header, data, status."""
    cdef Slot *slot = &load.slots[index]
    cdef int head = index * load.stride
    cdef Desc *desc = &load.desc[head]
    cdef uint16_t at = head
    cdef uint16_t data_flags = DESC_NEXT if write else DESC_NEXT | DESC_WRITE
    cdef uint64_t left = load.size
    cdef uint32_t length
    cdef int i

    slot.header = header
    (<uint32_t *> header)[0] = write            # VIRTIO_BLK_T_IN is 0, T_OUT is 1
    (<uint32_t *> header)[1] = 0
    if load.indirect:
        desc[0] = Desc(addr + TABLE, 16 * (load.segments + 2), DESC_INDIRECT, 0)
        desc = <Desc *> (header + TABLE)
        at = 0
    desc[0] = Desc(addr, HEADER, DESC_NEXT, at + 1)
    slot.data = desc + 1
    for i in range(load.segments):
        length = left if left < load.segment else load.segment
        slot.data[i] = Desc(0, length, data_flags, at + i + 2)
        left -= length
    desc[load.segments + 1] = Desc(addr + STATUS, 1, DESC_WRITE, 0)
    place(load, index)


cdef inline void place(Load load, int index) noexcept nogil:
    """Move a request's data to its next place in its stripe."""
    cdef Slot *slot = &load.slots[index]
    cdef uint64_t addr = load.data_addr + load.stripe * index + slot.place
    cdef int i

    for i in range(load.segments):
        slot.data[i].addr = addr + load.segment * i


cdef inline void submit(Load load, int index, uint64_t now) noexcept nogil:
    """Put a request into the ring, for the next block."""
    cdef Slot *slot = &load.slots[index]
    cdef uint64_t block

    if load.random_order:
        load.state += 0x9e3779b97f4a7c15ULL
        block = load.state
        block = (block ^ (block >> 30)) * 0xbf58476d1ce4e5b9ULL
        block = (block ^ (block >> 27)) * 0x94d049bb133111ebULL
        block = (block ^ (block >> 31)) % load.blocks
    else:
        block = load.cursor
        load.cursor = block + 1 if block + 1 < load.blocks else 0
    (<uint64_t *> slot.header)[1] = (load.first + block) * (load.size // SECTOR)
    slot.header[STATUS] = PENDING
    slot.started = now
    load.avail.ring[load.next_avail & load.mask] = index * load.stride
    load.next_avail += 1
    load.inflight += 1


cdef inline bint publish(Load load) noexcept nogil:
    """Let the device see the submitted requests. True: it was kicked."""
    cdef uint16_t old = load.published
    cdef bint wanted

    if old == load.next_avail:
        return False
    load.published = load.next_avail
    # The entries before the index that tells of them.
    store16_release(&load.avail.idx, load.published)
    # The index stored, then the device's wish loaded.
    fence()
    if load.event_idx:
        wanted = need_event(load16(load.avail_event), load.published, old)
    else:
        wanted = not load16(&load.used.flags) & USED_NO_NOTIFY
    if wanted:
        signal_fd(load.kick)
    return wanted


cdef int reap(Load load, uint64_t now, bint more, bint measured) noexcept nogil:
    """Take requests that are done, and with `more` submit each again. Returns the
    number of requests, or minus an Outcome.
    """
    cdef uint16_t end = load16_acquire(&load.used.idx)
    cdef Slot *slot
    cdef uint64_t taken
    cdef uint32_t head, index
    cdef uint32_t stride = load.stride
    cdef uint32_t depth = load.depth
    cdef int done = 0

    while load.seen != end:
        head = load32(&load.used.ring[load.seen & load.mask].id)
        index = head // stride
        if index >= depth or head % stride or not load.slots[index].started:
            return -BAD_USED
        slot = &load.slots[index]
        if slot.header[STATUS] != 0:
            return -FAILED
        if measured:
            taken = now - slot.started
            load.histogram[bucket(taken)] += 1
            if taken > load.slowest:
                load.slowest = taken
        slot.started = 0
        load.seen += 1
        load.inflight -= 1
        done += 1
        if more:
            if load.stripe > load.size:
                slot.place = (slot.place + load.size) % load.stripe
                place(load, index)
            submit(load, index, now)
    return done


cdef int sleep(Load load) noexcept nogil:
    """Wait for a call. Returns DONE, or another Outcome that came first."""
    cdef pollfd[3] fds
    cdef uint64_t value = 0
    cdef int i
    cdef int outcome = DONE

    if load.event_idx:
        store16(load.used_event, load.seen)
    else:
        store16(&load.avail.flags, 0)
    # The wish stored, then the device's index loaded.
    fence()
    if load16(&load.used.idx) == load.seen:
        for i in range(3):
            fds[i].fd = load.fds[i]
            fds[i].events = POLLIN
            fds[i].revents = 0
        # On the connection there may be answers to messages of another thread.
        fds[2].events = POLLRDHUP
        load.sleeps += 1
        poll(fds, 3, TICK)
        if fds[0].revents and read(load.call, &value, sizeof(value)) > 0:
            load.calls += value
        elif fds[1].revents:
            outcome = BROKEN
        elif fds[2].revents:
            outcome = LOST
    if not load.event_idx:
        store16(&load.avail.flags, AVAIL_NO_INTERRUPT)
    return outcome


cdef int drive(Load load, uint64_t begin, uint64_t end) noexcept nogil:
    """Keep `depth` requests in flight until the end, then see all of them done."""
    cdef uint64_t now = now_ns()
    cdef uint64_t progress = now
    cdef uint64_t cpu = 0
    cdef bint measured = False
    cdef bint more = True
    cdef int i, done, outcome

    for i in range(load.depth):
        submit(load, i, now)
    load.kicks += publish(load)
    while load.inflight:
        if load_int(&load.stopping):
            return STOPPED
        now = now_ns()
        if not measured and more and now >= begin:
            measured = True
            forget_warmup(load)
            cpu = thread_cpu()
        if more and now >= end:
            more = measured = False
            load.cpu = thread_cpu() - cpu
        done = reap(load, now, more, measured)
        if done < 0:
            return -done
        if done:
            progress = now
            if measured:
                load.requests += done
            i = publish(load)
            if more:
                load.kicks += i
        elif now - progress > PATIENCE:
            return HUNG
        elif not load.busy_wait:
            outcome = sleep(load)
            if outcome != DONE:
                return outcome
    return DONE


cdef void forget_warmup(Load load) noexcept nogil:
    load.requests = load.kicks = load.calls = load.sleeps = load.slowest = 0
    memset(load.histogram, 0, sizeof(load.histogram))


cdef inline int bucket(uint64_t taken) noexcept nogil:
    """Return the bucket of a time: linear up to 32 ns, then 16 steps a power of two."""
    cdef int shift = 0

    while (taken >> shift) >= 2 * STEPS:
        shift += 1
    return shift * STEPS + <int> (taken >> shift)


cdef uint64_t lowest(int bucket) noexcept nogil:
    """The lowest time of a bucket."""
    cdef int shift = bucket // STEPS - 1 if bucket >= 2 * STEPS else 0

    return <uint64_t> (bucket - shift * STEPS) << shift


cdef uint64_t thread_cpu() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)
    return <uint64_t> t.tv_sec * 1000000000 + <uint64_t> t.tv_nsec
