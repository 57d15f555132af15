# SPDX-License-Identifier: Apache-2.0
"""Moves the chains of one guest ring through one shadow ring and back.

Trust. There is a hostile party at either end. The guest owns its ring and its
buffers, the back owns every byte of isolated memory, and both may change anything at
any moment. So this module and those below it hold to three rules:

- what decides something is fetched once, into memory of our own, and judged there;
- heads, lengths, guest addresses and free lists live in memory of our own only;
- a guest's address is looked up in the table of its memory for every single copy.

One step is one pass without I/O: completions first, since they make room, then new
chains. It only notes that a kick or a call is due; the worker sends them. A chain that
finds no room waits here, and the ones behind it in the guest's ring: nothing fails, and
order is kept.

Order is what a stop rests on. The shadow ring starts at position 0 and each chain of
the guest takes exactly one position in it, in the guest's order. So when the back says
how far it has fetched, that many chains past the guest's start are done, and all others
are the guest's again, untouched.

Faults of the guest end the taking of chains; what is in flight is still completed.
Faults of the back end all use of the shadow ring.

Shared memory is only touched in jobs that guard.pyx calls, since a page of it may be
gone: a fault too, which ends all use of both rings. The pool's mutex is not held then.
"""

cimport cython
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from vhost_airlock.dataplane.bounce cimport (
    AREA, COPY_FULL, COPY_USED, COPY_USED_TAIL, FEW, Slot, copy_to_back, copy_to_guest,
    describe, place, release,
)
from vhost_airlock.dataplane.guard cimport Job, guarded
from vhost_airlock.dataplane.guest_split cimport move_split, resume_split, start_split
from vhost_airlock.dataplane.layout cimport (
    Avail, BACK_ERROR, BAD_ADDRESS, BAD_AVAIL_INDEX, BAD_HEAD, BAD_INDIRECT, BAD_NEXT,
    BAD_ORDER, BAD_USED_ID, BAD_USED_INDEX, CHAIN_TOO_LONG, Desc, EMPTY_CHAIN,
    HEAD_IN_USE, LOOP, MAX_SEGMENTS, MEMORY_LOST, NESTED_INDIRECT, NEVER_FITS,
    OUT_OF_MEMORY, PAGE, RING_UNMAPPED, UsedElem, Used, fence, load16, load32, load64,
)
from vhost_airlock.dataplane.pool cimport Pool, leave_queue, over, tell_room
from vhost_airlock.dataplane.regions cimport GuestMemory
from vhost_airlock.dataplane.shadow cimport (
    FREE, IN_FLIGHT, QUARANTINED, free_chain, give_slot, take_slot,
)
from vhost_airlock.dataplane.shadow_split cimport start_split as start_shadow

POLICIES = {"full": COPY_FULL, "used": COPY_USED, "used+tail": COPY_USED_TAIL}
"""The copy policies by name: how much of what the device may write is copied back."""

FAULTS = {
    BAD_AVAIL_INDEX: "the guest's avail index jumps by more than the ring holds",
    BAD_HEAD: "a head in the guest's avail ring is beyond the ring",
    HEAD_IN_USE: "the guest offered a head that is still in flight",
    BAD_NEXT: "a descriptor's next is beyond its table",
    LOOP: "a chain has a loop or too many descriptors",
    BAD_INDIRECT: "an indirect descriptor is malformed or was not negotiated",
    NESTED_INDIRECT: "an indirect table holds an indirect descriptor",
    BAD_ADDRESS: "a descriptor points outside of the guest's memory",
    BAD_ORDER: "a descriptor to read from follows one to write to",
    EMPTY_CHAIN: "a chain has no bytes at all",
    CHAIN_TOO_LONG: "a chain has more than 2^32 - 1 bytes",
    NEVER_FITS: "a chain is larger than the pool allows",
    BAD_USED_INDEX: "the back's used index jumps by more than the ring holds",
    BAD_USED_ID: "the back completes what is not in flight, again and again",
    BACK_ERROR: "the back signalled an error of the ring",
    RING_UNMAPPED: "the ring's own memory is not there any more",
    OUT_OF_MEMORY: "the airlock has no memory left",
    MEMORY_LOST: "a page of memory that the ring or a request is in can't be had",
}
"""What each fault means."""

BACK_SIGNALLED = BACK_ERROR
"""The fault to set when the back says by its descriptor that a ring is broken."""

cdef enum:
    # A step ends after moving so much, if it may: other rings want their turn.
    BYTES_A_STEP = 1 << 20
    # And after completing one of so many parts of what is in flight, but a few chains.
    PARTS = 4
    FEW_CHAINS = 4


cdef int step(PumpState *pump, int budget) noexcept nogil:
    """Move what there is, up to `budget` chains each way; how many were moved.

    More are completed in whole batches, if the back has shown more at once.
    """
    return run(pump, move, budget) if pump.attached else 0


cdef int run(PumpState *pump, Job job, int number) noexcept nogil:
    """Do a job that touches shared memory. 0 if that is not there, which is a fault."""
    cdef int result

    if guarded(job, pump, number, &result):
        return result
    lose_memory(pump)
    return 0


cdef void lose_memory(PumpState *pump) noexcept nogil:
    """A job was cut off: end all use of both rings, and put right what it left."""
    cdef int call

    fail(pump, MEMORY_LOST)
    pump.waiting = False
    pump.stalled = False
    leave_queue(pump.pool, &pump.share)
    if pump.at_hand != NULL:
        release(pump.at_hand, pump.pool, &pump.share)
        # The list of free slots is made anew when the ring is.
        pump.shadow.state[pump.at_hand - pump.slot] = FREE
        pump.at_hand = NULL
    # What was completed before, the guest may still get to know.
    if pump.untold and guarded(tell_guest, pump, 0, &call):
        pump.call_due = pump.call_due or call
    pump.untold = False


cdef int tell_guest(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    return pump.guest.ops.publish(&pump.guest)


cdef int move(void *what, int budget) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what
    cdef int moved = 0

    if pump.fault > BAD_USED_INDEX or pump.fault == 0:
        moved = collect(pump, budget)
    if pump.taking and pump.fault == 0:
        moved += forward(pump, budget)
    if pump.share.alone and (pump.fault or not pump.taking):
        leave_queue(pump.pool, &pump.share)
    return moved


cdef int collect(PumpState *pump, int budget) noexcept nogil:
    """Give the guest what the back has completed, and call it once if it wants.

    In whole batches it sees at once what the back has shown at once. Else it gets a
    part, and can go on, and so can the back, while the rest is copied.
    """
    cdef uint16_t slot
    cdef uint32_t length
    cdef uint64_t bytes = 0
    cdef uint32_t violations = pump.shadow.violations
    cdef int done = 0
    cdef int reaped = 0
    cdef int rc

    if not pump.whole_batches:
        budget = min(budget, max(<int> FEW_CHAINS, pump.outstanding // PARTS))
    while (
        (reaped < budget and bytes < BYTES_A_STEP)
        or (pump.whole_batches and pump.shadow.ops.amid(&pump.shadow))
    ):
        rc = pump.shadow.ops.reap(&pump.shadow, &slot, &length)
        if rc < 0:
            fail(pump, rc)
        if rc <= 0:
            break
        reaped += 1
        if pump.shadow.state[slot] == IN_FLIGHT:
            pump.at_hand = &pump.slot[slot]
            bytes += finish(pump, slot, length)
            pump.at_hand = NULL
            pump.untold = True
            pump.done += 1
            pump.outstanding -= 1
            pump.counters.completions += 1
            done += 1
        release(&pump.slot[slot], pump.pool, &pump.share)
        free_chain(&pump.shadow, slot)

    # What was skipped counts too: we are past the position that was armed.
    if pump.shadow.armed and (reaped or pump.shadow.violations != violations):
        pump.shadow.ops.disarm(&pump.shadow)
    if done:
        pump.counters.bytes_out += bytes
        if pump.guest.ops.publish(&pump.guest):
            pump.call_due = True
            pump.counters.calls += 1
        pump.untold = False
    return reaped


cdef uint64_t finish(PumpState *pump, uint16_t number, uint32_t length) noexcept nogil:
    """Copy back and complete one chain in the guest's ring."""
    cdef Slot *slot = &pump.slot[number]
    cdef uint64_t copied = copy_to_guest(
        slot, length, pump.policy, &pump.share, pump.memory, &pump.hint
    )

    if length > slot.writable:
        pump.counters.clamped += 1
        length = slot.writable
    pump.guest.ops.complete(&pump.guest, slot.head, length)
    return copied


cdef int forward(PumpState *pump, int budget) noexcept nogil:
    """Pass on the chains which the guest has offered, and kick the back once."""
    cdef bint stalled = pump.stalled
    cdef uint64_t bytes = 0
    cdef int moved = 0
    cdef int rc

    pump.stalled = False
    while moved < budget and bytes < BYTES_A_STEP:
        if not pump.waiting:
            rc = pump.guest.ops.take(&pump.guest, &pump.chain)
            if rc < 0:
                fail(pump, rc)
            if rc <= 0:
                break
            pump.waiting = True
        rc = bounce(pump)
        if rc < 0:
            fail(pump, rc)
        if rc <= 0:
            break
        pump.waiting = False
        bytes += pump.chain.bytes_readable + pump.chain.bytes_writable
        moved += 1

    if pump.stalled and (moved or not stalled):
        pump.counters.stalls += 1
    if pump.guest.armed and (moved or pump.stalled):
        pump.guest.ops.disarm(&pump.guest)
    if moved:
        pump.counters.chains += moved
        if pump.shadow.ops.publish(&pump.shadow):
            pump.kick_due = True
            pump.counters.kicks += 1
    return moved


cdef int bounce(PumpState *pump) noexcept nogil:
    """Offer the chain at hand to the back: 1 done, 0 no room, or a Fault."""
    cdef bint table = pump.shadow.indirect and pump.chain.count > 1
    cdef uint16_t needed = 1 if table else pump.chain.count
    cdef uint16_t number
    cdef Slot *slot
    cdef int rc

    if needed > pump.shadow.size:
        return NEVER_FITS
    if needed > pump.shadow.free_count:
        pump.stalled = True
        return 0
    number = take_slot(&pump.shadow)
    slot = &pump.slot[number]
    rc = place(slot, &pump.chain, table, pump.pool, &pump.share)
    if rc <= 0:
        give_slot(&pump.shadow, number)
        pump.stalled = rc == 0
        return rc
    pump.at_hand = slot
    if not copy_to_back(slot, &pump.share, pump.memory, &pump.hint):
        pump.at_hand = NULL
        release(slot, pump.pool, &pump.share)
        give_slot(&pump.shadow, number)
        return BAD_ADDRESS
    pump.shadow.ops.offer(
        &pump.shadow, number, pump.desc, describe(slot, pump.desc)
    )
    pump.at_hand = NULL
    slot.position = pump.offered
    pump.order[pump.offered & (pump.shadow.size - 1)] = number
    pump.offered += 1
    pump.outstanding += 1
    pump.counters.bytes_in += pump.chain.bytes_readable
    return 1


cdef void fail(PumpState *pump, int fault) noexcept nogil:
    """The ring stops, for this reason."""
    if pump.fault != fault:
        pump.fault = fault
        pump.counters.faults += 1


cdef bint rest(PumpState *pump) noexcept nogil:
    """Ask both sides to be woken. A fence, then pending(), must follow."""
    return pump.attached and run(pump, arm, 0)


cdef int arm(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    if pump.fault == 0 and pump.taking and not pump.stalled and not pump.guest.armed:
        pump.guest.ops.arm(&pump.guest)
    if not pump.shadow.armed and pump.fault != MEMORY_LOST:
        pump.shadow.ops.arm(&pump.shadow)
    return True


cdef bint pending(PumpState *pump) noexcept nogil:
    """Is there anything that a step would move?"""
    return pump.attached and run(pump, look, 0)


cdef int look(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    if pump.fault > BAD_USED_INDEX or pump.fault == 0:
        if pump.shadow.ops.pending(&pump.shadow):
            return True
    return (
        pump.fault == 0 and pump.taking and not pump.stalled
        and pump.guest.ops.pending(&pump.guest)
    )


cdef bint is_drained(PumpState *pump) noexcept nogil:
    """Is all done that the back has fetched, as far as it lets us know?

    How far it has fetched is its own word. A lie can only cost it its own requests.
    """
    cdef int drained

    if not pump.attached or pump.outstanding == 0:
        return True
    # The worker may be in a step: only it may find that memory is lost.
    return guarded(look_drained, pump, 0, &drained) and drained


cdef int look_drained(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    return (
        pump.shadow.ops.fetched(&pump.shadow) == pump.done
        and not pump.shadow.ops.pending(&pump.shadow)
    )


# __dealloc__ needs the pool, which the garbage collector could clear away before.
@cython.no_gc_clear
cdef class Pump:
    """One guest ring, its shadow ring, and the chains between.

    All methods but step() and counters() are for the control plane, while no worker
    runs the pump.
    Addresses are our own, in bytes, unless they say otherwise.
    """

    def __cinit__(self, int index, GuestMemory memory, Pool pool, str policy="full"):
        """`index` is the ring's number; `policy` one of POLICIES."""
        self.index = index
        self.memory = memory
        self.pool = pool
        self.state.memory = &memory.table
        self.state.pool = &pool.state
        self.state.policy = POLICIES[policy]
        self.state.guest.memory = &memory.table
        self.state.guest.table = <Desc *> calloc(MAX_SEGMENTS, sizeof(Desc))
        if self.state.guest.table == NULL:
            raise MemoryError  # not reached: no memory
        self.kick_in = self.call_out = self.kick_out = self.call_in = -1

    def __dealloc__(self):
        cdef int i

        for i in range(self.state.slots):
            if self.state.slot[i].pages or self.state.slot[i].count:
                release(&self.state.slot[i], self.state.pool, &self.state.share)
        if self.state.pool != NULL:
            leave_queue(self.state.pool, &self.state.share)
            tell_room(self.state.pool)
        free(self.state.guest.table)
        free(self.state.guest.busy)
        free(self.state.shadow.free)
        free(self.state.shadow.next)
        free(self.state.shadow.state)
        free(self.state.order)
        free(self.state.slot)

    def attach(
        self, *, uint16_t size, uint16_t base, guest, bint guest_event_idx,
        bint guest_indirect, shadow, bint shadow_event_idx, bint shadow_indirect,
        bint whole_batches=False,
    ):
        """Set up both rings, `size` entries each; the guest's starts at `base`.

        guest: the addresses of its descriptor table, avail ring and used ring.
        shadow: (our address, the back's address) of area_bytes(size) bytes of isolated
        memory. It is zeroed here, and no chain of before may lie in it, unless it is
        the same area as the last time.

        whole_batches: what the back shows at once the guest is to see at once.
        """
        cdef PumpState *pump = &self.state
        cdef uintptr_t desc, avail, used, host
        cdef uint64_t back, offset
        cdef int i

        if pump.attached:
            raise ValueError(f"ring {self.index} is attached already")
        if size == 0 or size & (size - 1) or size > 32768:
            raise ValueError(f"ring {self.index}: size {size}")
        desc, avail, used = guest
        host, back = shadow
        self._reserve_slots(size)

        pump.guest.size = size
        pump.guest.event_idx = guest_event_idx
        pump.guest.indirect = guest_indirect
        memset(pump.guest.busy, 0, size)
        start_split(
            &pump.guest, <Desc *> desc, <Avail *> avail, <Used *> used, base
        )

        pump.shadow.size = size
        pump.shadow.event_idx = shadow_event_idx
        pump.shadow.indirect = shadow_indirect
        pump.counters.violations += pump.shadow.violations
        pump.shadow.violations = 0
        pump.shadow.free_count = 0
        for i in range(size - 1, -1, -1):
            if pump.shadow.state[i] != QUARANTINED:
                pump.shadow.state[i] = FREE
                give_slot(&pump.shadow, i)
        offset = slots_offset(size)
        for i in range(size):
            pump.slot[i].area = <uint8_t *> host + offset + i * AREA
            pump.slot[i].area_back = back + offset + i * AREA
        start_shadow(
            &pump.shadow, <Desc *> host, <Avail *> (host + avail_offset(size)),
            <Used *> (host + used_offset(size)),
        )

        pump.whole_batches = whole_batches
        pump.offered = pump.done = pump.outstanding = 0
        pump.waiting = False
        pump.stalled = False
        pump.draining = False
        pump.taking = False
        pump.fault = 0
        pump.kick_due = False
        pump.call_due = False
        pump.attached = True
        run(pump, begin, 0)

    def detach(self, fetched=None):
        """Leave both rings; guest memory is not touched from here on.

        `fetched` is how many chains the back says it has taken since the start, as the
        16 bits of GET_VRING_BASE. None: not known. It is not believed beyond what can
        be: what was completed, and all before that, has been taken.

        Returns (chains that are done or the back's, counted from the start and modulo
        2^16; how many of them are unfinished; whether these are the last ones).
        What the back did not fetch is the guest's again. The buffers of what it did not
        finish stay out of use until it does, or the pump is gone.
        """
        cdef PumpState *pump = &self.state
        cdef uint16_t least, end, position, number
        cdef bint last = True

        if not pump.attached:
            raise ValueError(f"ring {self.index} is not attached")
        least = least_fetched(pump)
        end = least if fetched is None else fetched & 0xffff
        if <uint16_t> (end - least) > <uint16_t> (pump.offered - least):
            end = least
        position = end
        while position != pump.offered:
            number = pump.order[position & (pump.shadow.size - 1)]
            release(&pump.slot[number], pump.pool, &pump.share)
            free_chain(&pump.shadow, number)
            pump.outstanding -= 1
            position += 1

        position = end - pump.outstanding
        while position != end:
            last = last and in_flight(pump, position)
            position += 1
        unfinished = pump.outstanding
        for number in range(pump.shadow.size):
            if pump.shadow.state[number] == IN_FLIGHT:
                pump.shadow.state[number] = QUARANTINED
                pump.shadow.next[number] = number
        if pump.fault not in (RING_UNMAPPED, MEMORY_LOST):
            run(pump, arm_guest, 0)     # whoever comes next wants kicks
        leave_queue(pump.pool, &pump.share)
        tell_room(pump.pool)
        pump.outstanding = 0
        pump.attached = False
        pump.taking = False
        pump.waiting = False
        pump.stalled = False
        return end, unfinished, last

    def move(self, guest):
        """The guest ring is at other addresses now: (descriptors, avail, used).

        None: it is gone, which is a fault.
        """
        cdef uintptr_t desc, avail, used

        if guest is None:
            fail(&self.state, RING_UNMAPPED)
            return
        desc, avail, used = guest
        move_split(&self.state.guest, <Desc *> desc, <Avail *> avail, <Used *> used)

    def step(self, int budget=256):
        """One pass: up to `budget` chains each way, or all of a whole batch.

        Returns (chains moved, whether the guest is to be called, the back kicked).
        """
        cdef int moved = step(&self.state, budget)
        cdef bint call = self.state.call_due
        cdef bint kick = self.state.kick_due

        self.state.call_due = self.state.kick_due = False
        return moved, call, kick

    def rest(self):
        """Ask both sides for notifications. True: there is something to do still."""
        rest(&self.state)
        fence()
        return pending(&self.state)

    def set_taking(self, bint taking):
        """Move chains of the guest, or only completions."""
        self.state.taking = taking

    def kick(self):
        """Let the worker kick the back, with its next round."""
        self.state.kick_due = True

    def set_draining(self, bint draining):
        """While set, the worker signals its events when this pump is drained."""
        self.state.draining = draining

    def set_fault(self, int fault):
        """Stop the ring for a reason that was seen elsewhere, one of FAULTS."""
        if fault not in FAULTS:
            raise ValueError(f"fault {fault}")
        if self.state.fault == 0:
            fail(&self.state, fault)

    def set_guaranteed(self, uint64_t size):
        """How many bytes of the pool this ring can always have."""
        cdef uint64_t used = self.state.share.used
        cdef uint64_t before = over(used, self.state.share.guaranteed)

        self.state.share.guaranteed = size // 4096
        self.state.pool.common_used += over(used, size // 4096)
        self.state.pool.common_used -= before

    def set_fds(
        self, *, int kick_in=-1, int call_out=-1, int kick_out=-1, int call_in=-1
    ):
        """The eventfds of guest (kick_in, call_out) and back (kick_out, call_in)."""
        self.kick_in = kick_in
        self.call_out = call_out
        self.kick_out = kick_out
        self.call_in = call_in

    @property
    def attached(self):
        return self.state.attached

    @property
    def fault(self):
        """0, or why the ring stopped: a key of FAULTS."""
        return self.state.fault

    @property
    def reason(self):
        """Why the ring stopped, in words; None if it did not."""
        cdef uint64_t refused = self.state.share.refused

        if self.state.fault == NEVER_FITS and refused:
            return (
                f"a request has {refused} bytes, and those with more than"
                f" {self.state.pool.largest_chain} are not placed: see --request-limit"
            )
        return FAULTS.get(self.state.fault)

    @property
    def drained(self):
        """Is all done that the back has fetched, as far as it lets us know?"""
        return is_drained(&self.state)

    @property
    def tells(self):
        """Does the back say how far it has fetched, and can that be true?"""
        cdef int fetched

        if not self.state.attached:
            return False
        if not guarded(look_fetched, &self.state, 0, &fetched):
            return False
        return fetched >= 0 and self.owes(fetched) <= self.state.outstanding

    def owes(self, uint16_t fetched):
        """How many chains are not done of so many that the back has fetched."""
        return <uint16_t> (fetched - self.state.done)

    @property
    def outstanding(self):
        """Chains offered to the back and not done."""
        return self.state.outstanding

    @property
    def quarantined(self):
        """Slots that the back may still write to, of chains that a stop left behind."""
        cdef int i
        cdef int count = 0

        for i in range(self.state.slots):
            count += self.state.shadow.state[i] == QUARANTINED
        return count

    def counters(self):
        """What was done since the pump was made, and what is held now, by name.

        Any thread may ask at any time, while a worker runs the pump too: each number
        is whole, but they may be of different moments.
        """
        cdef Counters seen
        cdef uint64_t *to = <uint64_t *> &seen
        cdef uint64_t *source = <uint64_t *> &self.state.counters
        cdef size_t i

        for i in range(sizeof(Counters) // sizeof(uint64_t)):
            to[i] = load64(&source[i])
        counters = dict(seen)
        counters["violations"] += load32(&self.state.shadow.violations)
        counters["outstanding"] = load16(&self.state.outstanding)
        counters["quarantined"] = self.quarantined
        counters["used"] = load64(&self.state.share.used) * PAGE
        counters["high_water"] = load64(&self.state.share.high_water) * PAGE
        return counters

    cdef _reserve_slots(self, uint16_t size):
        """Memory for `size` slots; what there is stays where it is by index."""
        cdef PumpState *pump = &self.state
        cdef uint16_t old = pump.slots
        cdef uint16_t i

        if size <= old:
            return
        pump.guest.busy = <uint8_t *> grown(pump.guest.busy, old, size, 1)
        pump.shadow.free = <uint16_t *> grown(pump.shadow.free, old, size, 2)
        pump.shadow.next = <uint16_t *> grown(pump.shadow.next, old, size, 2)
        pump.order = <uint16_t *> grown(pump.order, old, size, 2)
        pump.shadow.state = <uint8_t *> grown(pump.shadow.state, old, size, 1)
        pump.slot = <Slot *> grown(pump.slot, old, size, sizeof(Slot))
        for i in range(old):
            if pump.slot[i].count <= FEW:
                pump.slot[i].buffer = pump.slot[i].few
        pump.slots = size


cdef bint in_flight(PumpState *pump, uint16_t position) noexcept nogil:
    """Is the chain at this position, one of the last `size`, not done?"""
    cdef uint16_t number = pump.order[position & (pump.shadow.size - 1)]

    return (
        pump.shadow.state[number] == IN_FLIGHT
        and pump.slot[number].position == position
    )


cdef uint16_t least_fetched(PumpState *pump) noexcept nogil:
    """How many chains the back must have taken: all up to the last that it did."""
    cdef uint16_t least = pump.offered

    while least != pump.done and in_flight(pump, least - 1):
        least -= 1
    return least


cdef int begin(void *what, int _) noexcept nogil:
    """The shadow ring begins at zero, the guest's where its used ring says."""
    cdef PumpState *pump = <PumpState *> what

    memset(pump.shadow.split.desc, 0, slots_offset(pump.shadow.size))
    resume_split(&pump.guest)
    return 0


cdef int arm_guest(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    pump.guest.ops.arm(&pump.guest)
    return 0


cdef int look_fetched(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    return pump.shadow.ops.fetched(&pump.shadow)


cdef void *grown(void *memory, size_t old, size_t new, size_t each) except NULL:
    """Reallocate an array; what is new is zero."""
    cdef char *bigger = <char *> realloc(memory, new * each)

    if bigger == NULL:
        raise MemoryError  # not reached: no memory
    memset(bigger + old * each, 0, (new - old) * each)
    return bigger


cdef uint64_t avail_offset(uint64_t size) noexcept nogil:
    return size * sizeof(Desc)


cdef uint64_t used_offset(uint64_t size) noexcept nogil:
    return (avail_offset(size) + 2 * (3 + size) + 63) & ~<uint64_t> 63


cdef uint64_t slots_offset(uint64_t size) noexcept nogil:
    return (used_offset(size) + 6 + size * sizeof(UsedElem) + 4095) & ~<uint64_t> 4095


def shadow_parts(size):
    """Offsets in bytes of the shadow ring's descriptors, avail ring and used ring."""
    return 0, avail_offset(size), used_offset(size)


def area_bytes(size):
    """How much isolated memory a shadow ring of so many entries needs, in bytes."""
    return slots_offset(size) + size * AREA
