# SPDX-License-Identifier: Apache-2.0
"""A ring's pump with all that it is coupled to: the guest's ring, the back's ring, and
the worker that runs it.

The actions of the table of state.py are methods here; ring.py knows when they are due.
"""

from __future__ import annotations

from typing import Protocol

from ..dataplane.pump import BACK_SIGNALLED, Pump, shadow_bytes, slot_bytes
from ..dataplane.worker import Worker
from ..errors import RequestRefused
from ..log import INFO
from ..record import changeable
from ..vhost.fds import Fd, HasFileno, drain, eventfd
from ..vhost.wire import Feature
from .back import ShadowRing
from .back_side import BackSide
from .config import Config
from .dirty_log import DirtyLog
from .drain import await_done, await_fetched, collect
from .front_memory import FrontMemory
from .inflight import InflightRecord
from .ration import LINES, Ration
from .state import Turn, Vring

REMEDY = (
    "they end only if this ring goes on; raise --drain-timeout, or let the VMM keep a"
    " record of requests in flight"
)


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


class Coupling:
    """The coupling of one ring, which the front describes by `vring` and `front`."""

    def __init__(
        self, vring: Vring, front: FrontFds, worker: Worker, owner: Owner
    ) -> None:
        self.vring = vring
        self.front = front
        self.worker = worker
        self.owner = owner
        self.log = owner.config.log
        self.pump: Pump | None = None
        """Made with the first start."""
        self.kick = eventfd()
        self.call = eventfd()
        self.err = eventfd()
        """Ours for the back; signalled by it when it finds the ring broken."""
        self._course = Ration(LINES)
        self._news = Ration()
        self._turn = Turn.FREE
        self._moves = False
        """The isolated memory that the pump has had is gone with its back."""

    @property
    def index(self) -> int:
        return self.vring.index

    @property
    def quarantined(self) -> int:
        """Chains that a stop has left with the back, which may still write to them."""
        if self.pump is None:
            return 0
        self.pump.look_back()
        return self.pump.quarantined

    # The places of the guest's ring, and descriptors. They may change at any time.

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

    def move(self, parts: list[tuple[int, int]]) -> None:
        """The guest's ring is there now, with other addresses for the log."""
        if self.pump is not None:
            with self.worker.pause():
                self.pump.move(parts)
                self.set_logging()

    def relocate(self) -> None:
        """The guest's memory has changed; the worker must stand still.

        A ring that isn't there any more, or can't be used as it is there, is broken.
        """
        if self.pump is not None:
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

    # The actions of the table.

    def attach(self) -> None:
        """Attach the pump to both rings, and let the back have the shadow ring."""
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

    def take(self) -> None:
        """Enable the back's ring, and take chains, if it has its turn."""
        assert self.pump is not None
        self.owner.back_side.back.enable_ring(self.index, True)
        with self.worker.pause():
            self.pump.set_taking(self._turn is not Turn.WAITS)
            self.pump.kick()

    def hold(self) -> None:
        """Take no more chains, and disable the back's ring."""
        self.quiesce()
        self.owner.back_side.back.enable_ring(self.index, False)

    def drain(self) -> None:
        """Take no more chains, and wait for those that the back has fetched."""
        pump, side = self.pump, self.owner.back_side
        assert pump is not None
        with self.worker.pause():
            pump.set_taking(False)
            pump.set_draining(True)
            self.worker.add(pump)
        if pump.drains:
            deadline = side.deadline.drains_until()
            await_fetched(pump, side.back, self.owner.events, deadline)

    def detach(self) -> None:
        """Ask the back for its base, and let go of both rings."""
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
        unfinished, again = self._let_go(pump, base)
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

    def abandon(self) -> None:
        """Let go of both rings without the back."""
        pump = self.pump
        if pump is None or not pump.attached:
            return
        with self.worker.pause():
            pump.set_taking(False)
            collect(pump)
        self._let_go(pump, None)

    def _let_go(self, pump: Pump, base: int | None) -> tuple[int, bool]:
        """Leave both rings. `base` is where the back has stopped; None: not known.

        Returns (how many chains are unfinished, whether the guest offers all of them
        again).
        """
        with self.worker.pause():
            self.vring.base, unfinished, again = pump.detach(base)
        self.worker.unwatch(self.call.fileno())
        self._tell("ring %d stopped: base %d", self.index, self.vring.base)
        return unfinished, again

    def _tell(self, text: str, *arguments: object) -> None:
        """Say in the log that it has started or stopped."""
        self._course.log(self.log, text, *arguments, level=INFO)

    # Between the actions.

    def quiesce(self) -> None:
        """Take no more chains; those in flight go on to end."""
        if self.pump is not None:
            with self.worker.pause():
                self.pump.set_taking(False)

    def set_turn(self, turn: Turn, *, runs: bool) -> None:
        """Take chains as this says, now if the ring `runs`, and after every start."""
        self._turn = turn
        if self.pump is not None:
            with self.worker.pause():
                self.pump.set_alone(turn is Turn.ALONE)
                if runs:
                    self.pump.set_taking(turn is not Turn.WAITS)

    def hear_back(self) -> None:
        """Set the ring's fault, if the back has said that it finds the ring broken."""
        if self.pump is not None and drain(self.err):
            with self.worker.pause():
                self.pump.set_fault(BACK_SIGNALLED)

    # The loss of a back.

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

    def accuse(self, *, others: bool) -> None:
        """Count the loss for the chains that the back still has. `others`: it had
        chains of other rings too.
        """
        if self.pump is None:
            return
        with self.worker.pause():
            condemned = self.pump.accuse(others=others)
        if condemned:
            self.log.error(
                "ring %d: the back-end was lost again with one request, that of head"
                " %d: %s",
                self.index,
                condemned[0],
                "it fails" if self.owner.config.has_error else "the ring ends at it",
            )

    def lose_back(self) -> None:
        """The back is gone with its isolated memory, and the ring is abandoned."""
        if self.pump is not None:
            with self.worker.pause():
                self.pump.lose_back()
            self._moves = True

    def close(self) -> None:
        """Give back our descriptors; the ring is stopped or abandoned."""
        for fd in (self.kick, self.call, self.err):
            fd.close()


def _number(fd: Fd | None) -> int:
    return -1 if fd is None else fd.fileno()
