# SPDX-License-Identifier: Apache-2.0
"""The pump of one ring, as the control plane sees it: start, stop, look, change.

A ring has one pump for the whole session. Each start gets a shadow ring in other memory
than the last one, so nothing that a back writes late to the old one does harm. The
slots stay: a chain that a stop left with the back keeps its slot, its buffers and its
number until the back completes it, by that number, in whatever ring there is then.

A stop says at which base the guest's ring can go on. When it does go on there, the
chains that were left behind are the guest's again: those before the base are in flight
as before, and those behind it the guest offers anew, see adopt() in step.pyx. A ring
that begins elsewhere was reset, and nobody waits for these chains. A back that has
broken the ring may have forgotten them: it gets those that the guest offers anew.

When the back is gone, lose_back() recalls the chains that it had: those before the base
are offered again when the ring goes on, with the isolated memory of another back, see
replay() in step.pyx.
"""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from vhost_airlock.dataplane.bounce cimport (
    AREA, COPY_FULL, COPY_USED, COPY_USED_TAIL, FEW, Slot, release,
)
from vhost_airlock.dataplane.guard cimport guarded
from vhost_airlock.dataplane.guest cimport Chain, GuestRing, NO_BASE, Part
from vhost_airlock.dataplane.guest_split cimport split_guest
from vhost_airlock.dataplane.layout cimport (
    BACK_ERROR, BAD_USED_INDEX, Blamed, Desc, MAX_SEGMENTS, MEMORY_LOST, NEVER_FITS,
    PAGE, RING_UNMAPPED, back_usable, fence, load16, load32, load64, load_int,
)
from vhost_airlock.dataplane.pool cimport Pool, leave_queue, over, tell_room
from vhost_airlock.dataplane.recorded cimport (
    first_of_ring, open_record, set_apart, take_out,
)
from vhost_airlock.dataplane.regions cimport GuestMemory
from vhost_airlock.dataplane.shadow cimport (
    FOLLOWER, FREE, IN_FLIGHT, PARKED, QUARANTINED, RECALLED, RETURNED, RingForBack,
    give_slot, is_with_back,
)
from vhost_airlock.dataplane.shadow_split cimport split_shadow
from vhost_airlock.dataplane.step cimport (
    Counters, PumpState, disown, end_chain, fail, go_on_with, is_drained, let_go,
    logged, look_unfetched, owed, pending, recall, rest, run, step, tell,
)
from vhost_airlock.dataplane.suspects cimport accuse, acquit
from vhost_airlock.dataplane.window cimport begin as begin_window
from vhost_airlock.dataplane.window cimport fix, shown

from vhost_airlock.dataplane import guest_split
from vhost_airlock.dataplane.faults import DETAILS, FAULTS

layout = guest_split.layout
check_base = guest_split.check_base

POLICIES = {"full": COPY_FULL, "used": COPY_USED, "used+tail": COPY_USED_TAIL}
"""The copy policies by name: how much of the writable buffers is copied back."""

BACK_SIGNALLED = BACK_ERROR
"""The fault to set when the back says by its descriptor that a ring is broken."""


def shadow_bytes(uint16_t size):
    """Return the bytes of isolated memory that a shadow ring of this size takes."""
    return split_shadow().bytes(size)


def slot_bytes(uint16_t count):
    """Return the bytes of isolated memory that this many slots take."""
    return <int> count * AREA


# __dealloc__ needs the pool, which the garbage collector could clear away before.
@cython.no_gc_clear
cdef class Pump:
    """One guest ring, its shadow ring, and the chains between, for a whole session.

    Methods are for the control plane, while no worker runs the pump. While one does,
    any thread may ask counters(), and the control plane the properties. Addresses are
    our own, in bytes, unless they say otherwise.
    """

    def __cinit__(self, int index, GuestMemory memory, Pool pool, str policy="full"):
        """`index` is the ring's number; `policy` one of POLICIES."""
        self.index = index
        self.memory = memory
        self.pool = pool
        self.state.memory = &memory.table
        self.state.pool = &pool.state
        self.state.policy = POLICIES[policy]
        self.state.guest.ops = split_guest()
        self.state.guest.memory = &memory.table
        self.state.guest.table = <Desc *> calloc(MAX_SEGMENTS, sizeof(Desc))
        if self.state.guest.table == NULL:
            raise MemoryError  # not reached: no memory
        self.state.shadow.ops = split_shadow()
        self.call_out = self.err_out = self.kick_out = self.log_out = -1

    def __dealloc__(self):
        cdef int i

        for i in range(self.state.shadow.slots):
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
        free(self.state.awaited)
        free(self.state.recalled)
        free(self.state.record.ended)
        free(self.state.record.again)
        free(self.state.suspects.losses)
        free(self.state.slot)

    @property
    def slots(self):
        """How many slots there are: a ring has as many entries at the most."""
        return self.state.shadow.slots

    def add_slots(self, uint16_t size, uintptr_t host, uint64_t back):
        """Have slots for `size` entries, if there are fewer.

        Those that are wanting have their small buffers in slot_bytes() of isolated
        memory at `host`, where the back sees `back`.
        """
        cdef uint16_t old = self.state.shadow.slots

        if size <= old:
            return
        self._grow(size)
        self._place_areas(old, host, back)

    cdef _place_areas(self, uint16_t first, uintptr_t host, uint64_t back):
        """Let the slots from `first` on have their areas in this memory."""
        cdef uint16_t i

        for i in range(first, self.state.shadow.slots):
            self.state.slot[i].area = <uint8_t *> host + (i - first) * AREA
            self.state.slot[i].area_back = back + (i - first) * AREA

    def move_in(self, Pool pool, uintptr_t host, uint64_t back):
        """Use another back's isolated memory, after lose_back(): its pool, and for all
        slots slot_bytes() at `host`, where the back sees `back`.
        """
        self.pool = pool
        self.state.pool = &pool.state
        self._place_areas(0, host, back)

    def prepare(self, uint16_t size, uintptr_t host, uint64_t back):
        """Make a shadow ring for attach() in shadow_bytes(size) bytes at `host`.

        `back` is the back's address of that memory. No ring that is in use may be
        there. Returns what the back is to be told: entries, base, and its addresses of
        descriptors, avail ring and used ring.
        """
        cdef RingForBack ring = self.state.shadow.ops.describe(size, back)
        cdef int done

        if not guarded(zero, <void *> host, self.state.shadow.ops.bytes(size), &done):
            raise MemoryError(f"ring {self.index}: a page of memory can't be had")
        return ring.size, ring.base, ring.desc, ring.avail, ring.used

    def attach(
        self, *, uint16_t size, base, guest, bint guest_event_idx, bint guest_indirect,
        uintptr_t shadow, bint shadow_event_idx, bint shadow_indirect,
        bint whole_batches=False, bint has_error=False, record=None,
        uint64_t cached=0,
    ):
        """Set up both rings, `size` entries each.

        base: where the guest's ring starts; None: where the ring itself says.
        guest: for its descriptor table, avail ring and used ring our address and the
        guest-physical one.
        shadow: where prepare() has made the shadow ring. The back uses it by now, and
        not the last one any more, where its late completions are looked for.
        whole_batches: completions that the back shows at once the guest sees at once.
        has_error: a request of this device fails by a one in its last byte.
        record: our address of the record of chains in flight, and its entries; None:
        there is none. It goes before the base. `news` has what the log is to be told.
        cached: as many bytes as processors' caches hold the ring may always have in
        flight, and more where the back can use it; 0: it may always have more.
        """
        cdef PumpState *pump = &self.state
        cdef Part part[3]
        cdef uintptr_t at
        cdef int i

        if pump.attached:
            raise ValueError(f"ring {self.index} is attached already")
        if size > pump.shadow.slots:
            raise ValueError(f"ring {self.index}: {size} entries, but fewer slots")
        layout(size)
        self.look_back()
        for i, (at, address) in enumerate(guest):
            part[i] = Part(<const uint8_t *> at, address)
        self.parked = self.parked and size == pump.guest.size
        pump.guest.size = pump.shadow.size = size
        pump.guest.event_idx = guest_event_idx
        pump.guest.indirect = guest_indirect
        pump.guest.ops.start(&pump.guest, part, NO_BASE if base is None else base)
        pump.shadow.event_idx = shadow_event_idx
        pump.shadow.indirect = shadow_indirect
        pump.shadow.ops.start(&pump.shadow, <uint8_t *> shadow)
        pump.whole_batches = whole_batches
        pump.has_error = has_error
        begin_window(&pump.window, cached // PAGE)
        pump.fault = 0
        pump.silent = False
        pump.attached = True
        run(pump, begin, 0)
        self._show_again()
        heads = self._open_record(record, base)
        self._keep_accused(heads)
        self._resume(heads)

    cdef _show_again(self):
        """Let the log have the words of the ring that were written before it was there.

        Another airlock may have been killed between such a store and its bit, and a
        VMM that starts a ring while it migrates gives the log last.
        """
        if (
            self.state.guest.marker.log != NULL and self.state.attached
            and back_usable(self.state.fault)
        ):
            run(&self.state, show_again, 0)

    cdef list _open_record(self, record, base):
        """Return the heads of the chains that are in flight by the record."""
        cdef PumpState *pump = &self.state
        cdef uintptr_t at
        cdef list heads = []
        cdef bint reset = (
            self.left and base is not None and base != self.left_base
            and pump.guest.ops.used_at(&pump.guest) != self.left_used
        )

        pump.record.table = NULL
        self.news = None
        if record is not None and pump.fault == 0:
            at, room = record
            heads, self.news = open_record(pump, at, room, reset)
        return heads

    cdef _keep_accused(self, list heads):
        """Acquit the heads that may not stand for the chains of before the start."""
        cdef PumpState *pump = &self.state
        cdef bint stood = self.left and self._stands()
        cdef int i

        for i in range(pump.shadow.slots if pump.suspects.accused else 0):
            kept = i in heads if self.recorded else stood and i < pump.guest.size
            if not kept:
                acquit(&pump.suspects, i)

    cdef _resume(self, list heads):
        """Decide on the chains that the last stop left behind; then count anew.

        `heads` are those of the record, if there is one.
        """
        cdef PumpState *pump = &self.state
        cdef bint goes_on = self.recorded or self._goes_on()
        cdef int i

        if goes_on and self.broken:
            self._offer_anew()
        if self.recorded:
            set_apart(pump, heads)
        elif goes_on:
            pump.next = self.resumes_at
        pump.began = pump.next
        pump.reached = pump.offers
        pump.outstanding = pump.adopted = pump.awaited_count = 0
        pump.replayed = pump.recalled_count = 0
        memset(pump.guest.busy, 0, pump.guest.size)
        for i in range(pump.shadow.slots):
            if pump.shadow.state[i] not in (PARKED, RETURNED, RECALLED):
                continue
            if not goes_on:
                disown(pump, i)
            elif pump.slot[i].position >= pump.next:
                pump.awaited[pump.slot[i].position - pump.next] = i
                pump.awaited_count += 1
            else:
                pump.guest.ops.retake(&pump.guest, pump.slot[i].head)
                if pump.shadow.state[i] == RECALLED:
                    pump.recalled[pump.recalled_count] = i
                    pump.recalled_count += 1
                else:
                    run(pump, take_back, i)
        sort_by_position(pump.recalled, pump.recalled_count, pump.slot)
        self.parked = False
        run(pump, show, 0)
        pump.shadow.free_count = 0
        for i in range(pump.shadow.size - 1, -1, -1):
            if pump.shadow.state[i] in (FREE, FOLLOWER):
                pump.shadow.state[i] = FREE
                give_slot(&pump.shadow, i)

    cdef _offer_anew(self):
        """The back has broken the ring, and may have forgotten the chains that it had:
        it gets all those anew that are taken again, by the record or from the guest.
        """
        cdef PumpState *pump = &self.state
        cdef uint64_t first = 0 if self.recorded else self.resumes_at
        cdef int i

        for i in range(pump.shadow.slots):
            if pump.slot[i].position >= first:
                disown(pump, i)

    cdef bint _goes_on(self):
        """Does the ring go on where the last stop has left it?"""
        return self.parked and self.state.fault == 0 and self._stands()

    cdef bint _stands(self):
        """Does the ring stand where the last stop has left it?"""
        cdef const GuestRing *guest = &self.state.guest

        return self.standing == guest.ops.standing(guest, self.base)

    def detach(self, base=None):
        """Leave both rings; guest memory is not touched from here on.

        `base` is the one at which the back says that it has stopped. None: not known.
        It is not believed beyond the possible: a chain that was completed, and all
        before it, has been fetched.

        Returns (the base at which the guest's ring can go on; how many chains the back
        has fetched and not completed; whether these are the last ones fetched). If they
        are, the base lies before them, and the guest offers them again. If they are
        not, no base says that: it lies behind them, and they end only if the ring goes
        on with this pump. Chains that the back did not fetch are the guest's again, or
        recalled if others behind them are done. Buffers that the back may still write
        to stay out of use until it completes them.

        If chains in flight are recorded, those that the back has fetched stay in the
        record, which goes before the base. If it is not known, all of them stay.
        """
        cdef PumpState *pump = &self.state
        cdef int64_t most = pump.offers - pump.reached
        cdef int64_t unfetched = most
        cdef uint64_t end, before
        cdef int recalled
        cdef int last = 0
        cdef int i

        if not pump.attached:
            raise ValueError(f"ring {self.index} is not attached")
        if base is not None:
            unfetched = min(most, pump.shadow.ops.unfetched_at(&pump.shadow, base))
        for i in range(pump.shadow.size):
            if (
                pump.shadow.state[i] == IN_FLIGHT
                and pump.slot[i].order >= pump.offers - unfetched
            ):
                recall(pump, i)
                pump.outstanding -= 1
        end, recalled = self._hand_back(base is not None)
        before = end - pump.outstanding
        for i in range(pump.shadow.size):
            if pump.shadow.state[i] == IN_FLIGHT:
                last += pump.slot[i].position >= before
                pump.shadow.state[i] = PARKED
                pump.shadow.next[i] = i
        unfinished = pump.outstanding + recalled
        self.parked = unfinished != 0 or pump.adopted < pump.awaited_count
        self.broken = BAD_USED_INDEX >= pump.fault >= BACK_ERROR
        self.resumes_at = before if last == unfinished else end
        if self.recorded:
            self.resumes_at = max(self.resumes_at, first_of_ring(pump))
        if pump.fault not in (RING_UNMAPPED, MEMORY_LOST):
            run(pump, arm_guest, 0)     # the next device of this ring wants kicks
        leave_queue(pump.pool, &pump.share)
        tell_room(pump.pool)
        pump.outstanding = 0
        pump.attached = False
        pump.taking = False
        pump.draining = False
        pump.waiting = False
        pump.stalled = pump.held = False
        found = pump.guest.ops.base_after(
            &pump.guest, <int64_t> (self.resumes_at - pump.began)
        )
        self.standing = pump.guest.ops.standing(&pump.guest, found)
        self.left = True
        self.left_base = found
        self.left_used = pump.guest.ops.used_at(&pump.guest)
        return found, unfinished, last == unfinished or self.recorded

    cdef _hand_back(self, bint told):
        """Give the last recalled chains back to the guest. `told`: it is sure that the
        back has not fetched them, so they go out of the record, the last one first.

        Returns (the position from which on the guest has all chains again, the number
        of chains before it that are recalled).
        """
        cdef PumpState *pump = &self.state
        cdef uint64_t end = pump.next
        cdef uint64_t first = first_of_ring(pump)
        cdef int count = 0
        cdef int i

        told = told and self.recorded
        if told and pump.waiting and end >= first:
            take_out(pump, pump.chain.head)
        for i in range(pump.shadow.size):
            if pump.shadow.state[i] == RECALLED:
                pump.recalled[count] = i
                count += 1
        sort_by_position(pump.recalled, count, pump.slot)
        while count and end > first:
            if pump.slot[pump.recalled[count - 1]].position != end - 1:
                break
            count -= 1
            end -= 1
            if told:
                take_out(pump, pump.slot[pump.recalled[count]].head)
            let_go(pump, pump.recalled[count])
        pump.replayed = pump.recalled_count = 0
        return end, count

    def lose_back(self):
        """The back is gone, and its isolated memory goes: chains that it had are
        recalled, or the guest's again. move_in() must follow before the next start.

        The pump is detached. Returns the number of chains that are recalled.
        """
        cdef PumpState *pump = &self.state
        cdef int count = 0
        cdef int i

        if pump.attached:
            raise ValueError(f"ring {self.index} is attached")
        for i in range(pump.shadow.slots):
            if pump.shadow.state[i] in (PARKED, RETURNED):
                if self.parked and pump.slot[i].position < self.resumes_at:
                    recall(pump, i)
                else:
                    let_go(pump, i)
            elif pump.shadow.state[i] == QUARANTINED:
                let_go(pump, i)
            count += pump.shadow.state[i] == RECALLED
        return count

    def accuse(self, *, bint others=False):
        """The back is lost: count that for the chains that it has, see suspects.pxd.
        `others`: it has chains of other rings as well.

        Its last completions were taken. Returns the heads that are condemned by it.
        """
        cdef PumpState *pump = &self.state
        cdef list heads = self._at_back()
        cdef bint alone = pump.alone and not others and len(heads) == 1
        cdef uint16_t head

        return [head for head in heads if accuse(&pump.suspects, head, alone)]

    cdef list _at_back(self):
        """The heads of the chains at the back over which it can be lost."""
        cdef PumpState *pump = &self.state
        cdef int i

        return [
            pump.slot[i].head for i in range(pump.shadow.slots)
            if pump.shadow.state[i] in (IN_FLIGHT, PARKED) and pump.slot[i].readable
        ]

    def look_back(self):
        """See which chains the back has completed since the ring has stopped."""
        if not self.state.attached and self.quarantined:
            run(&self.state, reap_late, 0)

    def move(self, guest):
        """The guest ring is at other addresses now, given as for attach().

        None: it is gone, which is a fault.
        """
        cdef Part part[3]
        cdef uintptr_t at
        cdef int i

        if guest is None:
            fail(&self.state, RING_UNMAPPED)
            return
        for i, (at, address) in enumerate(guest):
            part[i] = Part(<const uint8_t *> at, address)
        self.state.guest.ops.move(&self.state.guest, part)

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

    def set_alone(self, bint alone):
        """The back gets one chain at a time, as long as there are suspects."""
        self.state.alone = alone

    def kick(self):
        """Let the worker kick the back, with its next round."""
        self.state.kick_due = True

    def call(self):
        """Let the worker call the guest, with its next round."""
        self.state.call_due = True

    def silence(self):
        """Ask the back for no calls until the next start; completions are taken still.

        A back that stops a ring lets go of its call descriptor, and libvhost-user gives
        the connection up when it calls without one.
        """
        self.state.silent = True
        run(&self.state, silence, 0)

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

    def set_window(self, uint64_t size):
        """How many bytes the ring may have in flight until its next start. For tests:
        else it learns that.
        """
        fix(&self.state.window, size // PAGE)

    def set_logging(self, *, bint words, bint buffers):
        """Log stores into the guest's memory, or not, in the log that it has: those to
        the words of the ring, and those to buffers of its chains.

        Call it again when the memory has another log.
        """
        self.state.guest.marker.log = &self.memory.log if words else NULL
        self.state.marker.log = &self.memory.log if buffers else NULL
        self._show_again()

    def set_fds(
        self, *, int call_out=-1, int err_out=-1, int kick_out=-1, int log_out=-1
    ):
        """The eventfds by which the worker calls the guest, tells the front of a fault,
        kicks the back, and tells the front that a page was logged; -1: none.
        """
        self.call_out = call_out
        self.err_out = err_out
        self.kick_out = kick_out
        self.log_out = log_out

    @property
    def attached(self):
        return self.state.attached

    @property
    def recorded(self):
        """Are its chains in flight recorded? Of a ring that has stopped: were they?"""
        return self.state.record.table != NULL

    @property
    def suspected(self):
        """How many chains were in flight at so many losses that the back is to get them
        alone, or not at all.
        """
        return load16(&self.state.suspects.suspected)

    @property
    def at_back(self):
        """How many chains the back has that it can be lost over."""
        return len(self._at_back())

    @property
    def fault(self):
        """0, or why the ring stopped: a key of FAULTS."""
        return load_int(&self.state.fault)

    @property
    def base(self):
        """The base at which the guest's ring was started last."""
        return self.state.guest.ops.base_after(&self.state.guest, 0)

    @property
    def drains(self):
        """Can chains in flight still end? A fault of the guest does not keep them."""
        return self.state.attached and back_usable(load_int(&self.state.fault))

    @property
    def reason(self):
        """Why the ring stopped, in words, and at which numbers; None if it did not."""
        cdef uint64_t refused = self.state.share.refused
        cdef int fault = load_int(&self.state.fault)

        if fault == NEVER_FITS and refused:
            return (
                f"a request has {refused} bytes, and those with more than"
                f" {self.state.pool.largest_chain} are not placed: see --request-limit"
            )
        if fault in DETAILS:
            return f"{FAULTS[fault]}: {self._details(fault)}"
        return FAULTS.get(fault)

    cdef str _details(self, int fault):
        """The numbers at which a fault of the guest or the back was found."""
        cdef const Chain *chain = &self.state.chain
        cdef Blamed blamed = self.state.shadow.blamed

        if back_usable(fault):
            blamed = self.state.guest.blamed
        return DETAILS[fault].format(
            head=chain.head, descs=chain.descs,
            bytes=chain.bytes_readable + chain.bytes_writable,
            number=blamed.number, other=blamed.other,
        )

    @property
    def drained(self):
        """Is all done that the back has fetched, as far as it lets us know?"""
        return is_drained(&self.state)

    @property
    def tells(self):
        """Does the back say how far it has fetched, and can that be true?"""
        cdef int unfetched

        return (
            self.state.attached
            and guarded(look_unfetched, &self.state, 0, &unfetched)
            and unfetched >= 0 and owed(&self.state, unfetched) >= 0
        )

    def owes(self, uint64_t base):
        """How many chains are not done of those that the back has fetched, if it has
        stopped at this base. Negative if that can't be.
        """
        return owed(
            &self.state, self.state.shadow.ops.unfetched_at(&self.state.shadow, base)
        )

    @property
    def outstanding(self):
        """Chains that the back has, or is offered, and that are not done."""
        return load16(&self.state.outstanding)

    @property
    def quarantined(self):
        """Slots that the back may still write to, of chains that a stop left behind."""
        cdef int i
        cdef int count = 0

        for i in range(self.state.shadow.slots):
            if self.state.shadow.state[i] != IN_FLIGHT:
                count += is_with_back(self.state.shadow.state[i])
        return count

    @property
    def unlogged(self):
        """How often a page was written for which the dirty log has no bit."""
        return (
            load64(&self.state.marker.unlogged)
            + load64(&self.state.guest.marker.unlogged)
        )

    def counters(self):
        """The numbers of the session so far, and of the present, by name.

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
        counters["violations"] = load32(&self.state.shadow.violations)
        counters["outstanding"] = self.outstanding
        counters["quarantined"] = self.quarantined
        counters["used"] = load64(&self.state.share.used) * PAGE
        counters["high_water"] = load64(&self.state.share.high_water) * PAGE
        counters["window"] = shown(&self.state.window) * PAGE
        counters["logged"] = logged(&self.state)
        counters["unlogged"] = self.unlogged
        return counters

    cdef _grow(self, uint16_t size):
        """Memory for `size` slots; those that there are keep their numbers."""
        cdef PumpState *pump = &self.state
        cdef uint16_t old = pump.shadow.slots
        cdef uint16_t i

        pump.guest.busy = <uint8_t *> grown(pump.guest.busy, old, size, 1)
        pump.shadow.free = <uint16_t *> grown(pump.shadow.free, old, size, 2)
        pump.shadow.next = <uint16_t *> grown(pump.shadow.next, old, size, 2)
        pump.awaited = <uint16_t *> grown(pump.awaited, old, size, 2)
        pump.recalled = <uint16_t *> grown(pump.recalled, old, size, 2)
        pump.record.ended = <uint16_t *> grown(pump.record.ended, old, size, 2)
        pump.record.again = <uint16_t *> grown(pump.record.again, old, size, 2)
        pump.suspects.losses = <uint8_t *> grown(pump.suspects.losses, old, size, 1)
        pump.shadow.state = <uint8_t *> grown(pump.shadow.state, old, size, 1)
        pump.slot = <Slot *> grown(pump.slot, old, size, sizeof(Slot))
        for i in range(old):
            if pump.slot[i].count <= FEW:
                pump.slot[i].buffer = pump.slot[i].few
        pump.shadow.slots = size


cdef void sort_by_position(
    uint16_t *slots, int count, const Slot *slot
) noexcept:
    """Sort numbers of slots by the order in which the guest offered their chains."""
    cdef int i

    numbers = sorted([(slot[slots[i]].position, slots[i]) for i in range(count)])
    for i, (_, number) in enumerate(numbers):
        slots[i] = number


cdef int zero(void *what, int size) noexcept nogil:
    memset(what, 0, size)
    return 0


cdef int begin(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    pump.guest.ops.begin(&pump.guest)
    return 0


cdef int show_again(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    pump.guest.ops.show_again(&pump.guest)
    return 0


cdef int silence(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    pump.shadow.ops.silence(&pump.shadow)
    return 0


cdef int arm_guest(void *what, int _) noexcept nogil:
    cdef PumpState *pump = <PumpState *> what

    pump.guest.ops.arm(&pump.guest)
    return 0


cdef int take_back(void *what, int number) noexcept nogil:
    go_on_with(<PumpState *> what, number)
    return 0


cdef int show(void *what, int _) noexcept nogil:
    tell(<PumpState *> what)
    return 0


cdef int reap_late(void *what, int _) noexcept nogil:
    """Take the completions that came after the stop from the last shadow ring."""
    cdef PumpState *pump = <PumpState *> what
    cdef uint16_t slot
    cdef uint32_t length

    while pump.shadow.ops.reap(&pump.shadow, &slot, &length) > 0:
        end_chain(pump, slot, length)
    return 0


cdef void *grown(void *memory, size_t old, size_t new, size_t each) except NULL:
    """Reallocate an array; its new part is zero."""
    cdef char *bigger = <char *> realloc(memory, new * each)

    if bigger == NULL:
        raise MemoryError  # not reached: no memory
    memset(bigger + old * each, 0, (new - old) * each)
    return bigger
