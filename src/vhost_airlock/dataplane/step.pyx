# SPDX-License-Identifier: Apache-2.0
"""One pass over a guest ring and its shadow ring: completions, then new chains.

Trust. There is a hostile party at either end. The guest owns its ring and its
buffers, the back owns every byte of isolated memory, and both may change anything at
any moment. So this module and those below it hold to three rules:

- a word that decides something is fetched once, and our copy of it is judged;
- heads, lengths, guest addresses and free lists live in memory of our own only;
- a guest's address is looked up in the table of its memory for every single copy.

A step does no I/O. It moves completions first, since they make room, then new chains,
and only notes that a kick or a call is due: the worker sends them. A chain that finds
no room, or more in flight than the back can use (window.pyx), waits here, and the ones
behind it in the guest's ring: nothing fails, and order is kept.

A stop rests on order. Each chain of the guest takes exactly one position in the
shadow ring, in the guest's order. So when the back says how far it has fetched, that
many chains are the back's or done, and all others are the guest's again, untouched.

Chains that a stop left with the back are *adopted* when the ring goes on where it has
stopped: the guest offers them again, first of all and in the same order, and the back,
which has them still, does not get them a second time.

Chains that no back has any more are *recalled*: they are offered again from the slots'
own records, before any other, in the guest's order. Where all chains behind a recalled
one are recalled too, the guest's ring has them still, and they are taken from there.

A chain over which backs are lost goes to the next one alone, and to no other after
that, see suspects.pxd.

Faults of the guest end the taking of chains; those in flight are still completed.
Faults of the back end all use of the shadow ring.

Shared memory is only touched in jobs that guard.pyx calls, since a page of it may be
gone: a fault too, which ends all use of both rings. The pool's mutex is not held then.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

from vhost_airlock.dataplane.bounce cimport (
    Buffer, Slot, copy_to_back, copy_to_guest, describe, forget_buffers, is_same, place,
    record, release, vacate,
)
from vhost_airlock.dataplane.guard cimport Job, guarded
from vhost_airlock.dataplane.guest cimport last_byte_of
from vhost_airlock.dataplane.inflight cimport (
    Record, add_to_batch, end_batch, mark,
)
from vhost_airlock.dataplane.layout cimport (
    BAD_ADDRESS, MEMORY_LOST, NEVER_FITS, OUT_OF_MEMORY, POISON, back_usable, blame,
    load16, store_int,
)
from vhost_airlock.dataplane.pool cimport leave_queue
from vhost_airlock.dataplane.regions cimport copy_out
from vhost_airlock.dataplane.shadow cimport (
    FREE, IN_FLIGHT, PARKED, QUARANTINED, RECALLED, RETURNED, free_chain, give_slot,
    take_slot,
)
from vhost_airlock.dataplane.suspects cimport CONDEMNED, acquit
from vhost_airlock.dataplane.sys cimport now_ns
from vhost_airlock.dataplane.window cimport look as look_at_window
from vhost_airlock.dataplane.window cimport note_held, run_dry

cdef enum:
    # A step ends after moving so much each way, if it may: other rings want their turn.
    BYTES_A_STEP = 1 << 20
    # And after this many descriptors, or segments, each way: they cost time, not bytes.
    DESCS_A_STEP = 2048
    # And after completing one of PARTS parts of the chains in flight, but a few chains.
    PARTS = 4
    FEW_CHAINS = 4
    # The last byte of a request that failed: VIRTIO_BLK_S_IOERR (virtio 1.3, 5.2.6),
    # VIRTIO_NET_ERR (5.1.6.5).
    FAILED = 1


cdef int step(PumpState *pump, int budget) noexcept nogil:
    """Move up to `budget` chains each way; returns how many were moved.

    More are completed in whole batches, if the back has shown more at once.
    """
    return run(pump, move, budget) if pump.attached else 0


cdef int run(PumpState *pump, Job job, int number) noexcept nogil:
    """Do a job that touches shared memory. Returns its result, and 0 if that memory is
    not there, which is a fault.
    """
    cdef int result

    if guarded(job, pump, number, &result):
        return result
    lose_memory(pump)
    return 0


cdef void lose_memory(PumpState *pump) noexcept nogil:
    """A job was cut off: end all use of both rings, and put right its remains."""
    cdef int told

    fail(pump, MEMORY_LOST)
    pump.waiting = False
    pump.stalled = pump.held = False
    leave_queue(pump.pool, &pump.share)
    if pump.at_hand != NULL:
        release(pump.at_hand, pump.pool, &pump.share)
        # The list of free slots is made anew when the ring is.
        pump.shadow.state[pump.at_hand - pump.slot] = FREE
        pump.at_hand = NULL
    # Chains that were completed before, the guest may still get to know.
    if pump.untold:
        guarded(tell_guest, pump, 0, &told)
    pump.untold = False


cdef int tell_guest(void *what, int _) noexcept nogil:
    """Publish the used elements, and note if the guest wants to be called."""
    cdef PumpState *pump = <PumpState *> what

    if pump.guest.ops.publish(&pump.guest):
        pump.call_due = True
        pump.counters.calls += 1
    pump.untold = False
    if pump.record.table != NULL:
        end_batch(&pump.record)
    return 0


cdef int move(void *what, int budget) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what
    cdef int moved = 0

    if back_usable(pump.fault):
        moved = collect(pump, budget)
    if pump.taking and pump.fault == 0:
        moved += forward(pump, budget)
    if pump.share.alone and (pump.fault or not pump.taking):
        leave_queue(pump.pool, &pump.share)
    return moved


cdef int collect(PumpState *pump, int budget) noexcept nogil:
    """Give the guest the chains that the back has completed, and call it once if it
    wants. Returns how many were collected.

    In whole batches the guest sees at once the chains that the back has shown at once.
    Else it gets a part, and can go on, and so can the back, while the rest is copied.
    """
    cdef uint16_t slot
    cdef uint32_t length
    cdef uint64_t bytes = 0
    cdef uint32_t segments = 0
    cdef uint32_t violations = pump.shadow.violations
    cdef int reaped = 0
    cdef int rc

    if not pump.whole_batches:
        budget = min(budget, max(<int> FEW_CHAINS, pump.outstanding // PARTS))
    while (
        (reaped < budget and bytes < BYTES_A_STEP and segments < DESCS_A_STEP)
        or (pump.whole_batches and pump.shadow.ops.amid(&pump.shadow))
    ):
        rc = pump.shadow.ops.reap(&pump.shadow, &slot, &length)
        if rc < 0:
            fail(pump, rc)
        if rc <= 0:
            break
        reaped += 1
        segments += pump.slot[slot].count
        bytes += end_chain(pump, slot, length)

    # A completion that was skipped counts too: we are past the position that was armed.
    if pump.shadow.armed and (reaped or pump.shadow.violations != violations):
        pump.shadow.ops.disarm(&pump.shadow)
    pump.counters.bytes_out += bytes
    tell(pump)
    return reaped


cdef uint64_t end_chain(
    PumpState *pump, uint16_t number, uint32_t length
) noexcept nogil:
    """The back has completed a chain. Returns the bytes that were copied out."""
    cdef Slot *slot = &pump.slot[number]
    cdef uint64_t copied = 0

    if pump.shadow.state[number] == PARKED:
        slot.length = length        # for when the guest offers it again
        pump.shadow.state[number] = RETURNED
        return 0
    if pump.shadow.state[number] == IN_FLIGHT:
        pump.reached = max(pump.reached, slot.order + 1)
        copied = finish(pump, number, length)
        pump.outstanding -= 1
        pump.window.delivered += slot.pages
    let_go(pump, number)
    return copied


cdef uint64_t finish(PumpState *pump, uint16_t number, uint32_t length) noexcept nogil:
    """Copy back and complete one chain in the guest's ring. The guest does not see it
    yet. Returns how many bytes were copied.
    """
    cdef Slot *slot = &pump.slot[number]
    cdef uint64_t copied

    pump.at_hand = slot
    copied = copy_to_guest(
        slot, length, pump.policy, &pump.share, pump.memory, &pump.hint, &pump.marker
    )
    if length > slot.writable:
        pump.counters.clamped += 1
        length = slot.writable
    complete(pump, slot.head, length)
    pump.at_hand = NULL
    return copied


cdef void complete(PumpState *pump, uint16_t head, uint32_t length) noexcept nogil:
    """A chain is done. The guest does not see it yet."""
    pump.guest.ops.complete(&pump.guest, head, length)
    if pump.record.table != NULL:
        add_to_batch(&pump.record, head)
    if pump.suspects.accused and acquit(&pump.suspects, head):
        store_int(&pump.pool.news, 1)
    pump.untold = True
    pump.counters.completions += 1


cdef void let_go(PumpState *pump, uint16_t number) noexcept nogil:
    """A slot's chain is no more: its buffers and the slot are free."""
    release(&pump.slot[number], pump.pool, &pump.share)
    free_chain(&pump.shadow, number)


cdef void recall(PumpState *pump, uint16_t number) noexcept nogil:
    """No back has a slot's chain any more; its record stays, and all else is free.

    The list of free slots is made anew when the ring is.
    """
    vacate(&pump.slot[number], pump.pool, &pump.share)
    pump.shadow.state[number] = RECALLED
    pump.shadow.next[number] = number


cdef void tell(PumpState *pump) noexcept nogil:
    """Show the guest all that was completed, and note if it wants to be called."""
    if pump.untold:
        tell_guest(pump, 0)


cdef int forward(PumpState *pump, int budget) noexcept nogil:
    """Pass on chains which the guest has offered, and kick the back once. Returns how
    many were passed on.
    """
    cdef bint stalled = pump.stalled
    cdef uint64_t bytes = 0
    cdef uint32_t descs = 0
    cdef bint offered = False
    cdef int moved = 0
    cdef bint adopted
    cdef int rc

    pump.stalled = pump.held = False
    if pump.replayed < pump.recalled_count:
        return replay(pump, budget)
    if pump.share.used >= pump.window.mark:
        look_at_window(&pump.window, pump.share.used, now_ns())
    while moved < budget and bytes < BYTES_A_STEP and descs < DESCS_A_STEP:
        if not pump.waiting:
            rc = take(pump)
            if rc < 0:
                fail(pump, rc)
            if rc <= 0:
                run_dry(&pump.window)
                break
            pump.waiting = True
        if pump.suspects.accused and is_condemned(pump, pump.chain.head):
            rc = end_condemned(
                pump, pump.chain.head, last_byte_of(&pump.chain),
                pump.chain.bytes_writable,
            )
            if rc < 0:
                fail(pump, rc)
                break
            pump.waiting = False
            pump.next += 1
            moved += 1
            continue
        adopted = adopt(pump)
        rc = adopted or bounce(pump)
        if rc < 0:
            fail(pump, rc)
        if rc <= 0:
            break
        pump.waiting = False
        offered = offered or not adopted
        pump.next += 1
        bytes += pump.chain.bytes_readable + pump.chain.bytes_writable
        descs += pump.chain.descs
        moved += 1

    if pump.stalled and not pump.held and not pump.alone and (moved or not stalled):
        pump.counters.stalls += 1
    if pump.guest.armed and (moved or pump.stalled):
        pump.guest.ops.disarm(&pump.guest)
    if moved:
        pump.counters.chains += moved
        tell(pump)
    if offered:
        show_back(pump)
    return moved


cdef void show_back(PumpState *pump) noexcept nogil:
    """Show the back all that it was offered, and note if it wants to be kicked."""
    if pump.shadow.ops.publish(&pump.shadow):
        pump.kick_due = True
        pump.counters.kicks += 1


cdef int replay(PumpState *pump, int budget) noexcept nogil:
    """Offer recalled chains to the back again. Returns how many were offered."""
    cdef uint16_t number
    cdef bint offered = False
    cdef bint ended = False
    cdef int moved = 0
    cdef int rc

    while moved < budget and pump.replayed < pump.recalled_count:
        number = pump.recalled[pump.replayed]
        if needed(pump, pump.slot[number].count) > pump.shadow.free_count + 1:
            pump.stalled = True  # not reached: all of them were in a ring of this size
            break
        if pump.suspects.accused and is_condemned(pump, pump.slot[number].head):
            rc = end_recalled(pump, number)
            ended = ended or rc > 0
        else:
            rc = offer(pump, number)
            offered = offered or rc > 0
            pump.counters.replayed += rc > 0
        if rc < 0:
            fail(pump, rc)
        if rc <= 0:
            break
        pump.replayed += 1
        moved += 1
    if ended:
        tell(pump)
    if offered:
        show_back(pump)
    return moved


cdef inline bint is_condemned(const PumpState *pump, uint16_t head) noexcept nogil:
    return pump.suspects.losses[head] == CONDEMNED


cdef int end_recalled(PumpState *pump, uint16_t number) noexcept nogil:
    """End the condemned chain of a slot. 1 done, or a Fault."""
    cdef const Slot *slot = &pump.slot[number]
    cdef const Buffer *buffer = &slot.buffer[slot.count - 1]
    cdef uint64_t last = buffer.guest + buffer.len - 1
    cdef int rc = end_condemned(pump, slot.head, last, slot.writable)

    if rc > 0:
        let_go(pump, number)
    return rc


cdef int end_condemned(
    PumpState *pump, uint16_t head, uint64_t last, uint64_t writable
) noexcept nogil:
    """End a chain that no back gets again with an error in its last byte, which is at
    `last` if any bytes are `writable`. 1 done, or a Fault if the device has no error.
    """
    cdef uint8_t error = FAILED

    if not pump.has_error:
        return blame(&pump.guest.blamed, POISON, head, CONDEMNED)
    if writable:
        copy_out(
            pump.memory, &pump.hint, last, &error, 1, False, &pump.marker
        )
    # A length promises that so many bytes were written from the first one on.
    complete(pump, head, 1 if writable == 1 else 0)
    pump.counters.poisoned += 1
    return 1


cdef inline uint16_t needed(const PumpState *pump, uint16_t count) noexcept nogil:
    """The descriptors that a chain of this many buffers takes in the shadow ring."""
    return 1 if pump.shadow.indirect else count


cdef inline int take(PumpState *pump) noexcept nogil:
    """Take the next chain: 1 taken, 0 none left, or a Fault."""
    if pump.record.table != NULL:
        return take_recorded(pump)
    return pump.guest.ops.take(&pump.guest, &pump.chain)


cdef int take_recorded(PumpState *pump) noexcept nogil:
    """The same for a ring whose chains in flight are recorded: those that were in the
    record when the ring started come first.
    """
    cdef Record *found = &pump.record
    cdef int rc

    if found.again_done < found.again_count:
        rc = pump.guest.ops.take_head(
            &pump.guest, &pump.chain, found.again[found.again_done]
        )
        if rc > 0:
            found.again_done += 1
            pump.counters.recovered += 1
        return rc
    rc = pump.guest.ops.take(&pump.guest, &pump.chain)
    if rc > 0:
        mark(found, pump.chain.head)
    return rc


cdef int bounce(PumpState *pump) noexcept nogil:
    """Offer the chain at hand to the back: 1 done, 0 no room, or a Fault."""
    cdef uint16_t number
    cdef int rc

    if needed(pump, pump.chain.count) > pump.shadow.size:
        return NEVER_FITS
    if needed(pump, pump.chain.count) > pump.shadow.free_count:
        pump.stalled = True
        return 0
    if pump.share.used >= pump.window.limit and hold(pump):
        return 0
    number = take_slot(&pump.shadow)
    if not record(&pump.slot[number], &pump.chain):
        give_slot(&pump.shadow, number)  # not reached: no memory
        return OUT_OF_MEMORY  # not reached: no memory
    rc = offer(pump, number)
    if rc <= 0:
        forget_buffers(&pump.slot[number])
        give_slot(&pump.shadow, number)
        return rc
    pump.slot[number].position = pump.next
    pump.counters.bytes_in += pump.chain.bytes_readable
    return 1


cdef bint hold(PumpState *pump) noexcept nogil:
    """The ring has its window in flight: does the chain at hand wait?"""
    if pump.outstanding == 0 or pump.chain.readable == 0:
        return False
    pump.stalled = pump.held = True
    note_held(&pump.window, pump.share.used)
    return True


cdef int offer(PumpState *pump, uint16_t number) noexcept nogil:
    """Offer the chain that a slot has a record of: 1 done, 0 no room, or a Fault."""
    cdef Slot *slot = &pump.slot[number]
    cdef bint table = pump.shadow.indirect and slot.count > 1
    cdef const Buffer *missing
    cdef int rc

    if pump.alone and pump.outstanding and pump.suspects.suspected:
        pump.stalled = True
        return 0
    rc = place(slot, table, pump.pool, &pump.share)
    if rc <= 0:
        pump.stalled = rc == 0
        return rc
    pump.at_hand = slot
    rc = copy_to_back(slot, &pump.share, pump.memory, &pump.hint)
    if rc < slot.count:
        missing = &slot.buffer[rc]
        rc = blame(&pump.guest.blamed, BAD_ADDRESS, missing.guest, missing.len)
        pump.at_hand = NULL
        vacate(slot, pump.pool, &pump.share)
        return rc
    pump.shadow.ops.offer(
        &pump.shadow, number, pump.desc, describe(slot, pump.desc)
    )
    pump.at_hand = NULL
    slot.order = pump.offers
    pump.offers += 1
    pump.outstanding += 1
    return 1


cdef inline bint adopt(PumpState *pump) noexcept nogil:
    """Is the chain at hand one that the back has still, and is now taken for that?"""
    return pump.adopted < pump.awaited_count and adopt_awaited(pump)


cdef bint adopt_awaited(PumpState *pump) noexcept nogil:
    """Adopt the chain at hand, if it is the next one that was awaited.

    If it is another one, the guest has begun anew, and waits for none of them.
    """
    cdef uint16_t number = pump.awaited[pump.adopted]
    cdef Slot *slot = &pump.slot[number]
    cdef int i

    if slot.head != pump.chain.head or not is_same(
        slot, &pump.chain, pump.memory, &pump.hint
    ):
        for i in range(pump.adopted, pump.awaited_count):
            disown(pump, pump.awaited[i])
        pump.awaited_count = 0
        return False
    pump.adopted += 1
    pump.counters.adopted += 1
    go_on_with(pump, number)
    return True


cdef void go_on_with(PumpState *pump, uint16_t number) noexcept nogil:
    """The guest waits for a chain again that a stop has left with the back; it is done
    if the back has completed it since.
    """
    pump.outstanding += 1
    if pump.shadow.state[number] == PARKED:
        pump.shadow.state[number] = IN_FLIGHT
        return
    pump.counters.bytes_out += finish(pump, number, pump.slot[number].length)
    pump.outstanding -= 1
    let_go(pump, number)


cdef void disown(PumpState *pump, uint16_t number) noexcept nogil:
    """The guest waits no more for a chain that a stop has left behind."""
    if pump.shadow.state[number] == PARKED:
        pump.shadow.state[number] = QUARANTINED
    elif pump.shadow.state[number] in (RETURNED, RECALLED):
        let_go(pump, number)


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
    if not pump.shadow.armed and not pump.silent and pump.fault != MEMORY_LOST:
        pump.shadow.ops.arm(&pump.shadow)
    return True


cdef bint pending(PumpState *pump) noexcept nogil:
    """Is there anything that a step would move?"""
    return pump.attached and run(pump, look, 0)


cdef int look(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    if back_usable(pump.fault):
        if pump.shadow.ops.pending(&pump.shadow):
            return True
    return (
        pump.fault == 0 and pump.taking and not pump.stalled
        and (
            pump.replayed < pump.recalled_count
            or pump.guest.ops.pending(&pump.guest)
        )
    )


cdef bint is_drained(PumpState *pump) noexcept nogil:
    """Is all done that the back has fetched, as far as it lets us know?

    How far it has fetched is its own word. A lie can only cost it its own requests.
    """
    cdef int drained

    if not pump.attached or load16(&pump.outstanding) == 0:
        return True
    # The worker may be in a step: only it may find that memory is lost.
    return guarded(look_drained, pump, 0, &drained) and drained


cdef int look_drained(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what
    cdef int64_t unfetched = pump.shadow.ops.unfetched(&pump.shadow)

    return (
        unfetched >= 0 and owed(pump, unfetched) == 0
        and not pump.shadow.ops.pending(&pump.shadow)
    )


cdef int64_t owed(const PumpState *pump, int64_t unfetched) noexcept nogil:
    """How many chains are not done of those that the back has fetched, if it has not
    fetched `unfetched` of them. Negative if that can't be true.
    """
    return <int64_t> load16(&pump.outstanding) - unfetched


cdef int look_unfetched(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    return pump.shadow.ops.unfetched(&pump.shadow)
