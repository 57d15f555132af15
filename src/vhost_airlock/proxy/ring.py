# SPDX-License-Identifier: Apache-2.0
"""A ring as the front speaks of it: its messages, the ring's state, its faults.

It is made when the front first speaks of it, and lives as long as the session, with one
pump. The table of state.py says which events change it, and by which actions: those are
in coupling.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from ..dataplane.pump import Pump
from ..dataplane.worker import Worker
from ..errors import RequestRefused
from ..vhost.fds import Fd
from ..vhost.wire import Feature, VringAddr
from .coupling import Coupling, FrontFds, Owner
from .features import require_modern
from .ration import Ration
from .state import TABLE, Action, Change, Event, State, Turn, Vring

MEMORY_TIME = 1.0
"""Seconds for which a started ring may wait for memory before the log is told."""


class Ring:
    """One ring of a session, run by `worker`."""

    def __init__(self, index: int, worker: Worker, owner: Owner) -> None:
        self.vring = Vring(index)
        self.state = State.STOPPED
        self.front = FrontFds()
        self.coupling = Coupling(self.vring, self.front, worker, owner)
        self.worker = worker
        self.owner = owner
        self.log = owner.config.log
        self._faults = Ration()
        self._waits = Ration()
        self.waits_for_memory = False
        """The front has started it, and it is not in the guest's memory."""
        self.tell_at = math.inf
        """When the log is told that it waits, in time.monotonic()."""
        self._guesses_base = False
        """It was started without a base that the front had told."""

    @property
    def index(self) -> int:
        return self.vring.index

    @property
    def pump(self) -> Pump | None:
        """None: it was not started yet."""
        return self.coupling.pump

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
            parts = self.coupling.locate()
            if parts is None:
                raise RequestRefused(
                    f"SET_VRING_ADDR: ring {self.index} is not in the guest's memory"
                )
        except RequestRefused:
            self.vring.addr = old
            raise
        self.coupling.move(parts)

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
        self.coupling.connect_fds(call=fd is not None)
        if old is not None:
            old.close()

    def set_err(self, fd: Fd | None) -> None:
        """The front is told here when the ring breaks; None: it is not."""
        old, self.front.err = self.front.err, fd
        self.coupling.connect_fds()
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
            lost = self.coupling.locate() is None
            self._set_waits(lost)
            if lost:
                return
            require_modern(features)
            self._happen(Event.READY)
            self._guesses_base = self.vring.base is None
        except RequestRefused:
            self.vring.started = False
            raise
        self._happen(Event.STARTED)
        if self.vring.enabled or not features & Feature.PROTOCOL_FEATURES:
            self._happen(Event.ENABLE)

    def quiesce(self) -> None:
        """Take no more chains; those in flight go on to end. A stop follows."""
        if self.attached:
            self.coupling.quiesce()

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
        self.coupling.set_turn(turn, runs=self.runs)

    def lose_back(self, *, others: bool) -> None:
        """The back is gone with its isolated memory, and there may be another one.
        `others`: it had chains of other rings too. Coupling.collect_last() comes first.

        A started ring starts again when there is a back, and goes on with the chains
        that are not done; one that is dead the front has to start.
        """
        if self.state is State.DEAD:
            self.vring.started = False
        self.coupling.accuse(others=others)
        self.abandon()
        self.coupling.lose_back()

    # All else.

    def relocate(self) -> None:
        """The guest's memory has changed; the worker must stand still.

        A ring that isn't there any more, or can't be used as it is there, is broken.
        """
        if self.attached:
            self.coupling.relocate()

    def check(self, *, quietly: bool = False) -> None:
        """See if the ring is broken, and say so in the log, once, unless `quietly`."""
        pump, before = self.pump, self.state
        if pump is None or not self.attached:
            return
        if self.intact:
            self.coupling.hear_back()
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
        self.coupling.close()

    # The table.

    def _happen(self, event: Event) -> None:
        """Go to the next state, by the action that leads there.

        The ring is STARTING or DRAINING while the action lasts, and stays that if the
        back is lost meanwhile.
        """
        change = TABLE.get((self.state, event), Change(self.state))
        if change.action in (Action.ATTACH, Action.DRAIN):
            self.state = change.state
        _ACTIONS[change.action](self.coupling)
        self.state = change.state

    def _stop(self, event: Event, *, quietly: bool = False) -> None:
        self.check(quietly=quietly)
        self._happen(event)
        self._happen(Event.DRAINED)

    def _drop_kick(self) -> None:
        if self.front.kick is not None:
            self.worker.unwatch(self.front.kick.fileno())
            self.front.kick.close()
            self.front.kick = None


def _refuse(coupling: Coupling) -> None:
    raise RequestRefused(f"ring {coupling.index} is started and enabled")


_ACTIONS: dict[Action, Callable[[Coupling], None]] = {
    Action.NONE: lambda coupling: None,
    Action.ATTACH: Coupling.attach,
    Action.TAKE: Coupling.take,
    Action.HOLD: Coupling.hold,
    Action.DRAIN: Coupling.drain,
    Action.DETACH: Coupling.detach,
    Action.ABANDON: Coupling.abandon,
    Action.REFUSE: _refuse,
}
