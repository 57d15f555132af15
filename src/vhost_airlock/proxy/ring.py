# SPDX-License-Identifier: Apache-2.0
"""A ring with all that belongs to it: the front's side, the pump, the back's side.

It is made when the front first speaks of it, and lives as long as the session, with one
pump. The table of state.py says which events change it, and by which actions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Protocol

from ..dataplane.pump import BACK_SIGNALLED, Pump, shadow_bytes, slot_bytes
from ..dataplane.worker import Worker
from ..errors import RequestRefused
from ..record import changeable
from ..vhost.fds import Fd, HasFileno, drain, eventfd
from ..vhost.wire import Feature, VringAddr
from .back import ShadowRing
from .back_side import BackSide
from .config import Config
from .dirty_log import DirtyLog
from .drain import await_done, await_fetched, collect
from .features import require_modern
from .front_memory import FrontMemory
from .inflight import InflightRecord
from .ration import LINES, Ration
from .state import TABLE, Action, Change, Event, State, Turn, Vring

REMEDY = (
    "they end only if this ring goes on; raise --drain-timeout, or let the VMM keep a"
    " record of requests in flight"
)
MEMORY_TIME = 1.0
"""Seconds for which a started ring may wait for memory before the log is told."""


class Owner(Protocol):
    """The device of a ring, as far as the ring needs it."""

    config: Config
    back_side: BackSide
    memory: FrontMemory
    record: InflightRecord
    dirty_log: DirtyLog
    events: HasFileno
    """Signalled by the workers."""

    def share_pool(self) -> None:
        """Set the shares of all rings that have a pump."""


@changeable
class FrontFds:
    """The eventfds that the front sent for a ring."""

    kick: Fd | None = None
    call: Fd | None = None
    err: Fd | None = None

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            if fd is not None:
                fd.close()
        self.kick = self.call = self.err = None


class Ring:
    """One ring of a session, run by `worker`."""

    def __init__(self, index: int, worker: Worker, owner: Owner) -> None:
        self.vring = Vring(index)
        self.state = State.STOPPED
        self.front = FrontFds()
        self.worker = worker
        self.owner = owner
        self.log = owner.config.log
        self.pump: Pump | None = None
        """Made with the first start."""
        self.kick = eventfd()
        self.call = eventfd()
        self.err = eventfd()
        """Ours for the back; signalled by it when it finds the ring broken."""
        self._faults = Ration()
        self._waits = Ration()
        self._course = Ration(LINES)
        self._news = Ration()
        self.waits_for_memory = False
        """The front has started it, and it is not in the guest's memory."""
        self.tell_at = math.inf
        """When the log is told that it waits, in time.monotonic()."""
        self._guesses_base = False
        """It was started without a base that the front had told."""
        self._turn = Turn.FREE
        self._moves = False
        """The isolated memory that the pump has had is gone with its back."""

    @property
    def index(self) -> int:
        return self.vring.index

    @property
    def attached(self) -> bool:
        return self.state is not State.STOPPED

    @property
    def intact(self) -> bool:
        """Is it in use, and not broken?"""
        return self.state in (State.HELD, State.RUNNING)

    @property
    def runs(self) -> bool:
        return self.state is State.RUNNING

    @property
    def suspected(self) -> int:
        """Chains over which backs may have been lost, and that are not done."""
        return 0 if self.pump is None else self.pump.suspected

    @property
    def quarantined(self) -> int:
        """Chains that a stop has left with the back, which may still write to them."""
        if self.pump is None:
            return 0
        self.pump.look_back()
        return self.pump.quarantined

    # Messages of the front. Each may come at any time.

    def set_num(self, num: int) -> None:
        Vring(self.index).set_num(num)  # no reason to stop, if it is to be refused
        self.retell("SET_VRING_NUM")
        self.vring.set_num(num)

    def set_base(self, base: int) -> None:
        """Set the base. A ring that has begun without one begins anew, there."""
        Vring(self.index).set_base(base)
        if self._guesses_base and self.pump is not None and self.attached:
            self._guesses_base = False
            if base == self.pump.base:
                self.vring.base = base
                return
            self._stop(Event.STOP)
        else:
            self.retell("SET_VRING_BASE")
        self.vring.set_base(base)

    def retell(self, request: str) -> None:
        """Stop: the front is about to tell new values. RequestRefused if it is enabled.

        The ring starts again when it is kicked or enabled.
        """
        if self.state is State.STOPPED:
            return
        try:
            self._stop(Event.RETELL)
        except RequestRefused as refused:
            raise RequestRefused(f"{request}: {refused}") from None
        self.vring.started = False

    def set_address(self, addr: VringAddr) -> None:
        """The ring is there. If it is started it goes on there, or is left as it is."""
        old = self.vring.addr
        self.vring.set_addr(addr)
        if self.pump is None or not self.attached:
            return
        try:
            parts = self.locate()
            if parts is None:
                raise RequestRefused(
                    f"SET_VRING_ADDR: ring {self.index} is not in the guest's memory"
                )
        except RequestRefused:
            self.vring.addr = old
            raise
        with self.worker.pause():
            self.pump.move(parts)
            self.set_logging()

    def set_kick(self, fd: Fd) -> None:
        """Start the ring: the guest kicks it here from now on.

        RequestRefused if the descriptor is of no kind that can be waited for.
        """
        try:
            self.worker.watch(fd.fileno())
        except ValueError as error:
            fd.close()
            raise RequestRefused(
                f"SET_VRING_KICK: ring {self.index}: {error}"
            ) from None
        self._drop_kick()
        self.front.kick = fd
        self.vring.started = True

    def set_call(self, fd: Fd | None) -> None:
        """The guest is called here from now on; None: never.

        Returns when the old one is not used any more. A call there may have been
        missed, so the guest is called once at the new one.
        """
        old, self.front.call = self.front.call, fd
        self.connect_fds(call=fd is not None)
        if old is not None:
            old.close()

    def set_err(self, fd: Fd | None) -> None:
        """The front is told here when the ring breaks; None: it is not."""
        old, self.front.err = self.front.err, fd
        self.connect_fds()
        if old is not None:
            old.close()

    def enable(self, enable: bool) -> None:
        """Take chains, or only end those in flight.

        Enabling starts a ring again that was stopped to take new values.
        """
        self.vring.enabled = enable
        if enable and self.front.kick is not None:
            self.vring.started = True
        self._happen(Event.ENABLE if enable else Event.DISABLE)

    def start_if_ready(self) -> None:
        """Start the ring if it is stopped, and all there that a start takes.

        RequestRefused if it can't be: the front has to start it anew then.
        """
        features = self.owner.back_side.features
        if self.state is not State.STOPPED or not self.vring.told or features is None:
            self._set_waits(False)
            return
        try:
            lost = self.locate() is None
            self._set_waits(lost)
            if lost:
                return
            require_modern(features)
            self._happen(Event.READY)
        except RequestRefused:
            self.vring.started = False
            raise
        self._happen(Event.STARTED)
        if self.vring.enabled or not features & Feature.PROTOCOL_FEATURES:
            self._happen(Event.ENABLE)

    def quiesce(self) -> None:
        """Take no more chains; those in flight go on to end. A stop follows."""
        if self.pump is not None and self.attached:
            with self.worker.pause():
                self.pump.set_taking(False)

    def stop(self, *, quietly: bool = False) -> int:
        """Stop the ring for the front, which has to start it anew then.

        Returns the base at which it can go on.

        Chains in flight have until the owner's deadline to end. After this, the memory
        of the guest's ring and of its chains is not touched.
        """
        self._stop(Event.STOP, quietly=quietly)
        self._drop_kick()
        self.vring.started = False
        return self.vring.base or 0

    def halt(self) -> None:
        """Stop the ring, which starts again by start_if_ready() if it is sound: the
        front does not know of it.
        """
        self.check()
        dead = self.state is State.DEAD
        self._stop(Event.STOP)
        if dead:
            self.vring.started = False

    def abandon(self) -> None:
        """Let go of the ring without the back, which is gone."""
        self._happen(Event.LOST)

    def set_turn(self, turn: Turn) -> None:
        """Take chains as this says, now and after every start."""
        self._turn = turn
        if self.pump is not None:
            with self.worker.pause():
                self.pump.set_alone(turn is Turn.ALONE)
                if self.runs:
                    self.pump.set_taking(turn is not Turn.WAITS)

    def collect_last(self) -> int:
        """The back is gone: take its last completions, and no more chains.

        Returns how many chains it has yet over which it may be gone.
        """
        if self.pump is None:
            return 0
        with self.worker.pause():
            self.pump.set_taking(False)
            collect(self.pump)
            return self.pump.at_back

    def lose_back(self, *, others: bool) -> None:
        """The back is gone with its isolated memory, and there may be another one.
        `others`: it had chains of other rings too. collect_last() comes first.

        A started ring starts again when there is a back, and goes on with the chains
        that are not done; one that is dead the front has to start.
        """
        if self.state is State.DEAD:
            self.vring.started = False
        if self.pump is not None:
            self._accuse(self.pump, others=others)
        self.abandon()
        if self.pump is not None:
            with self.worker.pause():
                self.pump.lose_back()
            self._moves = True

    def _accuse(self, pump: Pump, *, others: bool) -> None:
        """Count the loss for the chains that the back still has."""
        with self.worker.pause():
            condemned = pump.accuse(others=others)
        if condemned:
            self.log.error(
                "ring %d: the back-end was lost again with one request, that of head"
                " %d: %s",
                self.index,
                condemned[0],
                "it fails" if self.owner.config.has_error else "the ring ends at it",
            )

    # All else.

    def locate(self) -> list[tuple[int, int]] | None:
        """Return our address and the guest's of descriptors, avail and used ring.

        None: not all of it is in the guest's memory.
        """
        found = []
        for user, size, align in self.vring.parts():
            place = self.owner.memory.find(user, size)
            if place is None:
                return None
            if place[0] % min(align, 8):
                raise RequestRefused(f"ring {self.index} is misaligned in its file")
            found.append(place)
        return found

    def relocate(self) -> None:
        """The guest's memory has changed; the worker must stand still.

        A ring that isn't there any more, or can't be used as it is there, is broken.
        """
        if self.pump is not None and self.attached:
            try:
                parts = self.locate()
            except RequestRefused:
                parts = None
            self.pump.move(parts)

    def set_logging(self) -> None:
        """Log stores, or not, by the front's word as it is now; no worker runs."""
        if self.pump is not None:
            log, features = self.owner.dirty_log, self.owner.back_side.features
            self.pump.set_logging(**log.of_ring(features, self.vring.addr))

    def set_guaranteed(self, size: int) -> None:
        """Set how many bytes of the pool this ring can always have; no worker runs."""
        if self.pump is not None:
            self.pump.set_guaranteed(size)

    def check(self, *, quietly: bool = False) -> None:
        """See if the ring is broken, and say so in the log, once, unless `quietly`."""
        pump, before = self.pump, self.state
        if pump is None or not self.attached:
            return
        if self.intact and drain(self.err):
            with self.worker.pause():
                pump.set_fault(BACK_SIGNALLED)
        if not pump.fault:
            return
        self._happen(Event.GUEST_FAULT if pump.drains else Event.FAULT)
        if self.state is not before and not quietly:
            self._faults.log(self.log, "ring %d is broken: %s", self.index, pump.reason)

    def tell_waiting(self) -> None:
        """Say in the log, once, that it has waited for memory for a while."""
        if time.monotonic() >= self.tell_at:
            self.tell_at = math.inf
            self._waits.log(
                self.log,
                "ring %d is started, and not in the memory that the VMM shares:"
                " is share=on missing?",
                self.index,
            )

    def _set_waits(self, waits: bool) -> None:
        if waits != self.waits_for_memory:
            self.tell_at = time.monotonic() + MEMORY_TIME if waits else math.inf
            self.waits_for_memory = waits

    def counters(self) -> dict[str, int]:
        """The numbers of the session so far and of now, by name. Any thread may ask."""
        return {} if self.pump is None else self.pump.counters()

    def condition(self) -> dict[str, object]:
        """The ring's state, and why it is broken. Any thread may ask."""
        return {
            "phase": "waits for memory"
            if self.waits_for_memory
            else self.state.name.lower(),
            "fault": None if self.pump is None else self.pump.reason,
        }

    def close(self) -> None:
        """Give back all descriptors; the ring is stopped or abandoned."""
        self.front.close()
        for fd in (self.kick, self.call, self.err):
            fd.close()

    # The table, and its actions.

    def _happen(self, event: Event) -> None:
        """Go to the next state, by the action that leads there.

        The ring is STARTING or DRAINING while the action lasts, and stays that if the
        back is lost meanwhile.
        """
        change = TABLE.get((self.state, event), Change(self.state))
        if change.action in (Action.ATTACH, Action.DRAIN):
            self.state = change.state
        _ACTIONS[change.action](self)
        self.state = change.state

    def _stop(self, event: Event, *, quietly: bool = False) -> None:
        self.check(quietly=quietly)
        self._happen(event)
        self._happen(Event.DRAINED)

    def _attach(self) -> None:
        owner, vring, back = self.owner, self.vring, self.owner.back_side.informed
        parts, features = self.locate(), owner.back_side.features or 0
        assert parts is not None, "READY happens to a ring in the guest's memory only"
        if self.pump is None:
            pool, policy = back.memory.pool, owner.config.copy
            self.pump = Pump(self.index, owner.memory.guest, pool, policy)
        pump = self.pump
        if self._moves:
            size = slot_bytes(pump.slots)
            with self.worker.pause():
                memory = back.memory.slot_memory(self.index, size)
                pump.move_in(back.memory.pool, *memory)
            self._moves = False
        if pump.slots < vring.num:
            size = slot_bytes(vring.num - pump.slots)
            pump.add_slots(vring.num, *back.memory.slot_memory(self.index, size))
        host, at = back.memory.ring_memory(self.index, shadow_bytes(vring.num))
        shadow = ShadowRing(self.index, *pump.prepare(vring.num, host, at))
        for fd in (self.kick, self.call, self.err):
            drain(fd)
        back.start_ring(shadow, kick=self.kick, call=self.call, err=self.err)
        self._guesses_base = vring.base is None
        owner.dirty_log.ring_starts()
        with self.worker.pause():
            self.set_logging()
            pump.attach(
                size=vring.num,
                base=vring.base,
                guest=parts,
                guest_event_idx=bool(features & Feature.EVENT_IDX),
                guest_indirect=bool(features & Feature.INDIRECT_DESC),
                shadow=host,
                shadow_event_idx=bool(back.has.features & Feature.EVENT_IDX),
                shadow_indirect=bool(back.has.features & Feature.INDIRECT_DESC),
                whole_batches=bool(features & owner.config.whole_batches),
                has_error=owner.config.has_error,
                record=owner.record.of_ring(self.index),
                cached=owner.config.cached,
            )
            # If an airlock was killed, its last call may be lost.
            self.connect_fds(call=pump.recorded)
            # The specification wants a kick with the start, and rust-vmm needs it. It
            # can wait, if the back has seen to that; let it be the worker that does.
            pump.kick()
        if pump.news:
            self._news.log(self.log, "ring %d: %s", self.index, pump.news)
        self.worker.watch(self.call.fileno())
        owner.share_pool()
        self._tell(
            "ring %d started: %d entries, base %d", self.index, vring.num, pump.base
        )

    def _take(self) -> None:
        assert self.pump is not None
        self.owner.back_side.back.enable_ring(self.index, True)
        with self.worker.pause():
            self.pump.set_taking(self._turn is not Turn.WAITS)
            self.pump.kick()

    def _hold(self) -> None:
        self.quiesce()
        self.owner.back_side.back.enable_ring(self.index, False)

    def _drain(self) -> None:
        pump, side = self.pump, self.owner.back_side
        assert pump is not None
        with self.worker.pause():
            pump.set_taking(False)
            pump.set_draining(True)
            self.worker.add(pump)
        if pump.drains:
            deadline = side.deadline.drains_until()
            await_fetched(pump, side.back, self.owner.events, deadline)

    def _detach(self) -> None:
        pump, side = self.pump, self.owner.back_side
        assert pump is not None
        if pump.drains:
            with self.worker.pause():
                pump.silence()
        base = side.back.stop_ring(self.index)
        if pump.drains:
            if pump.owes(base) > 0:
                side.back.set_call(self.index, self.call)
            deadline = side.deadline.drains_until()
            await_done(pump, side.back, self.worker, base, deadline)
        unfinished, again = self._let_go(base)
        if unfinished:
            more = ""
            if pump.recorded:
                more = ", which stay in the VMM's record"
            elif not again:
                more = f", and later ones done: {REMEDY}"
            self.log.warning(
                "ring %d: stopped with %d requests unfinished%s",
                self.index,
                unfinished,
                more,
            )

    def _abandon(self) -> None:
        pump = self.pump
        if pump is None or not pump.attached:
            return
        with self.worker.pause():
            pump.set_taking(False)
            collect(pump)
        self._let_go(None)

    def _refuse(self) -> None:
        raise RequestRefused(f"ring {self.index} is started and enabled")

    def _let_go(self, base: int | None) -> tuple[int, bool]:
        """Leave both rings. `base` is where the back has stopped; None: not known.

        Returns (how many chains are unfinished, whether the guest offers all of them
        again).
        """
        assert self.pump is not None
        with self.worker.pause():
            self.vring.base, unfinished, again = self.pump.detach(base)
        self.worker.unwatch(self.call.fileno())
        self._tell("ring %d stopped: base %d", self.index, self.vring.base)
        return unfinished, again

    def _tell(self, text: str, *arguments: object) -> None:
        """Say in the log that it has started or stopped."""
        self._course.log(self.log, text, *arguments, level=logging.INFO)

    def connect_fds(self, *, call: bool = False) -> None:
        """Let the worker use the descriptors as they are now, and call the guest once
        if `call`.

        The worker has the pump from its first start on: a call may be due after a stop.
        """
        if self.pump is None:
            return
        with self.worker.pause():
            self.pump.set_fds(
                call_out=_number(self.front.call),
                err_out=_number(self.front.err),
                kick_out=self.kick.fileno(),
                log_out=self.owner.dirty_log.fileno,
            )
            if call and self.pump.attached:
                self.pump.call()
            self.worker.add(self.pump)

    def _drop_kick(self) -> None:
        if self.front.kick is not None:
            self.worker.unwatch(self.front.kick.fileno())
            self.front.kick.close()
            self.front.kick = None


_ACTIONS: dict[Action, Callable[[Ring], None]] = {
    Action.NONE: lambda ring: None,
    Action.ATTACH: Ring._attach,
    Action.TAKE: Ring._take,
    Action.HOLD: Ring._hold,
    Action.DRAIN: Ring._drain,
    Action.DETACH: Ring._detach,
    Action.ABANDON: Ring._abandon,
    Action.REFUSE: Ring._refuse,
}


def _number(fd: Fd | None) -> int:
    return -1 if fd is None else fd.fileno()
