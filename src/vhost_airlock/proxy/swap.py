# SPDX-License-Identifier: Apache-2.0
"""Another back takes the place of the one that is there, and the VMM sees a pause.

The rings are drained, so no request is done twice. The old back goes on if anything
fails before it is closed. So the new one is taken and judged beside it, where that can
be: if it is there already, or if it gets the old one's state, for then both are made to
be there at the same time, as in a migration. A program that needs the place of the
other one, the lock on an image for one, is started when the old one has ended; if it
does not come, the old one is taken again.

Each step has the time of one message of the VMM: to take the new back, to stop the
rings (and --drain-timeout) and carry the state over, to start the rings, or to take the
old back again. There are three steps at most, and the end of programs beside them.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Protocol

from ..errors import BackLost, RequestRefused, SessionError
from ..vhost.fds import HasFileno
from ..vhost.wire import ProtocolFeature
from .back import Back
from .device import Device
from .recovery import ConfigChanged
from .transfer import load_state, save_state


class Way(Protocol):
    """The way to the next back, and the order to take it."""

    beside: bool
    """The next back is there already, beside the last one."""

    def connect(self, config_changed: ConfigChanged, until: float) -> Back:
        """Return the next back, which has to be there at a time of time.monotonic().
        SessionError if it is not.
        """

    def drop(self) -> None:
        """The next back was closed, and is not wanted."""

    def end_last(self) -> None:
        """The last back was closed; end its process, if it is ours to end."""

    def adopt(self) -> None:
        """All backs come by this way from now on. The last one was closed."""

    def connect_last(self, config_changed: ConfigChanged, until: float) -> Back:
        """Return a back by the way of the last one. BackLost if there is none."""

    def at_work(self) -> str:
        """Return the reason why the last back, which was lost, may be at work on its
        requests; "": it is not.
        """

    def done(self, result: str) -> None:
        """Tell our owner that the order is carried out."""

    def failed(self, reason: str) -> None:
        """Tell our owner that it is not."""


class Orders(HasFileno, Protocol):
    """A descriptor that is readable when there is an order."""

    def take(self) -> Way | None:
        """Return the order; None: there was none, and there may come no more."""


def carry_out(device: Device, way: Way) -> None:
    """Carry an order out, and answer it. SessionError if the session is at its end."""
    try:
        way.done(_swap(device, way))
    except RequestRefused as refused:
        device.log.warning("back-end: not swapped: %s", refused)
        way.failed(str(refused))
    except BackLost as lost:
        way.failed(f"the back-end is lost: {lost}")
        device.back_side.lose(lost)
    except Exception as error:
        way.failed(str(error))
        raise


def _swap(device: Device, way: Way) -> str:
    """Returns words for what was done. RequestRefused: nothing was."""
    if device.back_side.away:
        return _swap_lost(device, way)
    if device.back_side.connected is None:
        way.adopt()
        return "the VMM that is connected gets the new back-end with its first request"
    try:
        with device.message():
            seconds = _Exchange(device, way).run()
    except RequestRefused:
        with device.message():  # after which the rings run again
            pass
        raise
    device.back_side.swapped(seconds)
    device.log.info("back-end: swapped; the guest's queues stood for %.3f s", seconds)
    return f"swapped; the guest's queues stood for {seconds:.3f} s"


def _swap_lost(device: Device, way: Way) -> str:
    """The last back is lost: let the search go on by this way."""
    if reason := way.at_work():
        raise RequestRefused(
            "the back-end is lost, and may still be at work on its requests, which"
            f" another one would get: {reason}"
        )
    way.adopt()
    device.back_side.search_anew()
    return "the back-end is lost; the new one is looked for"


def _halt(device: Device) -> None:
    """Stop all rings, unknown to the front; Rings.start() starts them again.

    RequestRefused if the back does not end all chains that it has fetched in time.
    """
    device.rings.quiesce()
    for ring in device.rings.values():
        ring.halt()
    if left := device.rings.quarantined:
        seconds = device.config.drain_timeout
        raise RequestRefused(f"{left} requests have not ended in {seconds:g} s")


class _Exchange:
    """One exchange of the device's back, within a message's time."""

    def __init__(self, device: Device, way: Way) -> None:
        self.device = device
        self.side = device.back_side
        self.way = way
        self.old = self.side.back
        self.settled = self.old.settled
        features = self.old.peer.protocol_features
        self.carries = bool(features & ProtocolFeature.DEVICE_STATE)
        """Whether the old back's state goes to the new one."""
        self.grown = False
        """Whether the new one has a larger capacity."""

    @property
    def _until(self) -> float:
        """When the step has to be over, in time.monotonic()."""
        until = self.side.deadline.until
        assert until is not None, "an exchange has a message's time"
        return until

    def run(self) -> float:
        """Returns the seconds in which the rings stood. RequestRefused: they can go on
        with the back that is there.
        """
        self._require_state()
        beside = self.way.beside or self.carries
        seconds = self._run_beside() if beside else self._run_one_by_one()
        if self.grown:
            self.side.tell_grown()
        return seconds

    def _require_state(self) -> None:
        """RequestRefused if the new back would lack the old one's state."""
        device = self.device
        if device.transfers:
            raise RequestRefused("the VMM is about to save or load the device's state")
        if device.config.stateful and not self.carries:
            raise RequestRefused(
                f"the back-end has {device.config.stateful}, and the VMM has not agreed"
                " with it on a way to carry them over (DEVICE_STATE)"
            )

    def _run_beside(self) -> float:
        with ExitStack() as undo:
            undo.callback(self.way.drop)
            new = self._reach()
            undo.callback(new.close)
            began = time.monotonic()
            self.side.deadline.renew()
            _halt(self.device)
            if self.carries:
                self._carry_state(new)
            undo.pop_all()
        self.side.let_go()
        self.way.end_last()
        self.way.adopt()
        self.side.deadline.renew()  # a program may have taken long to end
        self._take(new)
        return time.monotonic() - began

    def _run_one_by_one(self) -> float:
        way = self.way
        began = time.monotonic()
        _halt(self.device)
        self.side.let_go()
        way.end_last()
        self.side.deadline.renew()
        try:
            new = self._reach()
        except RequestRefused as refused:
            way.drop()
            try:
                self._return()
            except BackLost as lost:
                raise BackLost(f"{refused}; and without the last one: {lost}") from None
            raise RequestRefused(
                f"{refused}; the last back-end was taken again"
            ) from None
        way.adopt()
        self._take(new)
        return time.monotonic() - began

    def _reach(self) -> Back:
        """Return the new back, which is the device that the front knows."""
        side = self.side
        try:
            new = self.way.connect(side.on_config_change, self._until)
            try:
                self.grown = side.introduce(new, settled=self.settled)
            except BaseException:
                new.close()
                raise
        except SessionError as error:
            raise RequestRefused(str(error)) from None
        return new

    def _return(self) -> None:
        """Take a back by the old way. BackLost if there is none, or another one."""
        side = self.side
        side.deadline.renew()
        old = self.way.connect_last(side.on_config_change, self._until)
        try:
            side.introduce(old, settled=self.settled)
        except SessionError as error:
            old.close()
            raise BackLost(str(error)) from None
        self._take(old)

    def _take(self, back: Back) -> None:
        """Go on with a back that was introduced. BackLost if it is gone."""
        self.side.hold(back)
        self.device.rings.start()
        self.side.known.tell_ready(back.peer)

    def _carry_state(self, new: Back) -> None:
        """Carry the state over. RequestRefused if it did not come, or was not taken."""
        until = self._until
        at = "old"
        try:
            with save_state(self.old.peer, _left(until)) as state:
                at = "new"
                new.peer.until = until
                load_state(new.peer, state, _left(until))
        except (RequestRefused, SessionError) as error:
            self.side.deadline.renew()
            if isinstance(error, SessionError) and not self.old.usable:
                raise
            raise RequestRefused(f"state, at the {at} back-end: {error}") from None


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())
