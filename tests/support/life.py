# SPDX-License-Identifier: Apache-2.0
"""A model of a device's rings: which messages are refused, and what each ring then is.

It has the front's words and the table of states, and nothing of what carries them out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from vhost_airlock.proxy import ring as ring_module
from vhost_airlock.proxy.state import TABLE, Action, Change, Event, State


class Refused(Exception):
    """The model expects a message to be refused."""


class RingLife:
    """One ring. `used_idx` tells the used index that stands in the guest's ring."""

    def __init__(self, used_idx: Callable[[], int]) -> None:
        self.used_idx = used_idx
        self.state = State.STOPPED
        self.sized = self.addressed = self.based = False
        self.kick = self.started = self.enabled = False
        self.there = False
        """Its memory is in the table of the guest's memory."""
        self.guessed: int | None = None
        """The base at which it was started, if the front had told none."""

    @property
    def attached(self) -> bool:
        return self.state is not State.STOPPED

    def happen(self, event: Event) -> None:
        change = TABLE.get((self.state, event), Change(self.state))
        if change.action is Action.REFUSE:
            raise Refused
        self.state = change.state

    def leave(self, event: Event) -> None:
        """RETELL or STOP, and what follows from it."""
        before = self.state
        self.happen(event)
        self.happen(Event.DRAINED)
        if before is not self.state:
            self.based = True

    def retell(self) -> None:
        if self.attached:
            self.leave(Event.RETELL)
            self.started = False

    def set_num(self) -> None:
        self.retell()
        self.sized = True

    def set_base(self, base: int) -> None:
        if self.guessed is not None and self.attached:
            same, self.guessed = base == self.guessed, None
            if not same:
                self.leave(Event.STOP)
        else:
            self.retell()
        self.based = True

    def set_addr(self) -> None:
        if self.attached and not self.there:
            raise Refused
        self.addressed = True

    def set_kick(self) -> None:
        self.kick = self.started = True

    def enable(self, enable: bool) -> None:
        self.enabled = enable
        if enable and self.kick:
            self.started = True
        self.happen(Event.ENABLE if enable else Event.DISABLE)

    def stop(self) -> None:
        self.leave(Event.STOP)
        self.kick = self.started = False

    def set_there(self, there: bool) -> None:
        self.there = there
        if self.attached and not there:
            self.happen(Event.FAULT)

    def start_if_ready(self) -> None:
        told = self.started and self.sized and self.addressed and self.there
        if self.attached or not told:
            return
        self.guessed = None if self.based else self.used_idx()
        self.happen(Event.READY)
        self.happen(Event.STARTED)
        if self.enabled:
            self.happen(Event.ENABLE)


class DeviceLife:
    """The rings of which the front has spoken, in that order."""

    def __init__(self, used_idx: Callable[[int], int]) -> None:
        self._used_idx = used_idx
        self.rings: dict[int, RingLife] = {}
        self.there: set[int] = set()
        """The rings whose memory is in the table."""
        self.features: int | None = None

    def ring(self, index: int) -> RingLife:
        if index not in self.rings:
            self.rings[index] = RingLife(lambda: self._used_idx(index))
            self.rings[index].there = index in self.there
        return self.rings[index]

    def state(self, index: int) -> State:
        return self.rings[index].state if index in self.rings else State.STOPPED

    def set_features(self, features: int) -> None:
        if features != self.features:
            for ring in self.rings.values():
                ring.retell()
            self.features = features

    def set_memory(self, there: set[int]) -> None:
        self.there = there
        for index, ring in self.rings.items():
            ring.set_there(index in there)

    def reset_owner(self) -> None:
        for ring in self.rings.values():
            ring.enable(False)

    def reset_device(self) -> None:
        for ring in self.rings.values():
            ring.stop()
        self.reset_owner()

    def answers(self, message: Callable[[], None]) -> bool:
        """Do what a message says; is it done, or refused?"""
        try:
            message()
        except Refused:
            return False
        if self.features is not None:
            for ring in self.rings.values():
                ring.start_if_ready()
        return True


class Walked(dict[tuple[State, Event], Change]):
    """The table, and how often each of its changes was made."""

    def __init__(self) -> None:
        super().__init__(TABLE)
        self.times: Counter[tuple[State, Event]] = Counter()

    def get(self, key, default=None):
        if key in self:
            self.times[key] += 1
        return super().get(key, default)


@contextmanager
def walking() -> Iterator[Walked]:
    """The sessions in this context are driven by a table that notes each change."""
    walked = Walked()
    with patch.object(ring_module, "TABLE", walked):
        yield walked
