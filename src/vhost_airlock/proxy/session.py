# SPDX-License-Identifier: Apache-2.0
"""A session: one front, its back, and all between; from the connection to its end.

One thread waits for the front's messages, for the worker's signals and for the back,
one thing at a time: a message is answered when it has taken effect on both sides. The
data plane runs in the workers' threads meanwhile.

No deed of a peer, and no want of the system, ends more than the session.
"""

from __future__ import annotations

import json
import select
import time
from typing import Protocol

from ..errors import AirlockError, BackLost, FrontLost, Stopped
from ..vhost.backend import Backend
from ..vhost.channel import Channel
from ..vhost.fds import HasFileno
from ..vhost.wire import ProtocolFeature
from .back import Back
from .config import Config
from .device import Device
from .handlers import bind
from .recovery import Backs
from .swap import Orders, carry_out


class Others(HasFileno, Protocol):
    """A socket that is readable while another front waits there."""

    def tell(self) -> None:
        """Say in the log that one waits."""


class Session:
    """Serves one front until it leaves, until the back is gone, or until `stop`."""

    def __init__(
        self,
        front: Channel,
        config: Config,
        backs: Backs,
        stop: HasFileno,
        *,
        keep_backend: bool = False,
        others: Others | None = None,
        orders: Orders | None = None,
    ) -> None:
        self.front = front
        self.config = config
        self.log = config.log
        self.backs = backs
        self.stop = stop
        self.keep_backend = keep_backend
        """Whether the back is left to the next session when the front leaves."""
        self.others = others
        """Fronts that wait for this one to leave; None: there can be none, or the log
        was told of one."""
        self.orders = orders
        """Orders to swap the back; None: there can be none."""
        self._device: Device | None = None
        """Made by run(), where want of anything ends the session alone."""
        self.front_lost = False
        """Whether the front left, which is how most sessions end."""
        self.back_lost = False
        """Whether the back is gone, or of no use any more."""
        self.stopped = False
        """Whether `stop` was why it ended."""
        self._reason = ""
        """Why it ended, for the log."""
        self._started = time.monotonic()

    def run(self) -> Back | None:
        """Serve. Returns the back, if it is to be kept and in a state to be."""
        try:
            self._device = Device(self.config, self.backs)
            self._serve(self._device)
        except Stopped:
            self.stopped = True
            self._reason = "the airlock is told to end"
        except FrontLost as error:
            self.front_lost = True
            self._reason = str(error)
        except AirlockError as error:
            self._reason = str(error)
            self.back_lost = isinstance(error, BackLost)
            self.log.error("%s", error)
            self.log.debug("where the session ended", exc_info=True)
        except (OSError, MemoryError, RuntimeError) as error:
            # RuntimeError is how Python says that there can be no more threads.
            self._reason = str(error)
            self.log.error(
                "the system lacks a resource that a session takes: %s", error
            )
            self.log.debug("where the session ended", exc_info=True)
        return self._end()

    @property
    def device(self) -> Device:
        """The device, once run() has made it."""
        assert self._device is not None
        return self._device

    def describe(self) -> dict[str, object]:
        """The session, as JSON can hold it. Any thread may ask."""
        device = self._device
        if device is None:
            return {"backend_connected": False, "rings": {}, "counters": {}}
        return {
            "backend_connected": device.back_side.connected is not None,
            "rings": device.rings.conditions(),
            "counters": device.counters(),
        }

    def _serve(self, device: Device) -> None:
        """Serve the front first, then the back, then see to the workers."""
        backend = Backend(self.front, bind(device), ProtocolFeature.STATUS, self.log)
        while True:
            ready = self._wait(device)
            if self.stop.fileno() in ready:
                raise Stopped("stopped")
            if self.front.fileno() in ready:
                backend.handle_one()
            device.look(ready)
            if self.others is not None and self.others.fileno() in ready:
                self.others.tell()
                self.others = None
            # The last one: descriptors of another back may have these numbers.
            if self.orders is not None and self.orders.fileno() in ready:
                self._obey(self.orders, device)

    def _obey(self, orders: Orders, device: Device) -> None:
        way = orders.take()
        if way is None:
            self.orders = None
        else:
            carry_out(device, way)

    def _wait(self, device: Device) -> set[int]:
        """Wait until a descriptor is ready, or look() is due; return the ready ones."""
        poll = select.poll()
        inputs = (self.stop, self.front, device.rings.events, self.others, self.orders)
        for waited in inputs:
            if waited is not None:
                poll.register(waited.fileno(), select.POLLIN)
        for ring in device.rings.values():
            if ring.intact:
                poll.register(ring.coupling.err.fileno(), select.POLLIN)
        back = device.back_side.connected
        if back is not None:
            for fd in back.waited_for():
                poll.register(fd, select.POLLIN)
        return {fd for fd, _ in poll.poll(device.next_look())}

    def _end(self) -> Back | None:
        """Stop the rings, if the back is still there, and let go of everything.

        Returns the back, if it is to be kept.
        """
        device = self._device
        kept = None
        if device is not None:
            self.back_lost = self.back_lost or device.back_side.away
            self._stop_rings(device)
            self._tell_end(device.counters())
            keep = self.keep_backend and self.front_lost and not self.back_lost
            kept = device.close(keep_back=keep)
        # The front may only learn of the end once its memory is not used any more.
        self.front.close()
        return kept

    def _tell_end(self, counters: dict[str, dict[str, int]]) -> None:
        """Say in the log why it ended, how long it was, and how much it has done."""
        rings = [each for name, each in counters.items() if name.startswith("ring")]

        def total(name: str) -> int:
            return sum(ring[name] for ring in rings)

        self.log.info(
            "session ended after %.1f s: %s; %d requests, %d KiB to the back-end,"
            " %d KiB from it, rings broke %d times",
            time.monotonic() - self._started,
            self._reason,
            total("completions"),
            total("bytes_in") >> 10,
            total("bytes_out") >> 10,
            total("faults"),
        )
        self.log.debug("counters: %s", json.dumps(counters))

    def _stop_rings(self, device: Device) -> None:
        back = device.back_side.connected
        if back is None:
            return
        self.back_lost = self.back_lost or not back.usable
        if not self.back_lost:
            try:
                device.rings.stop()
            except AirlockError as error:
                self.log.error("%s", error)
                self.back_lost = True
