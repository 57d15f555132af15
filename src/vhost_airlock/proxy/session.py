# SPDX-License-Identifier: Apache-2.0
"""A session: one front, its back, and all between; from the connection to its end.

One thread waits for the front's messages, for the worker's signals and for the back,
one thing at a time: a message is answered when it has taken effect on both sides. The
data plane runs in the worker's thread meanwhile.
"""

from __future__ import annotations

import json
import logging
import select
from collections.abc import Callable

from ..errors import AirlockError, FrontLost, SessionError, Stopped
from ..vhost.backend import Backend
from ..vhost.channel import Channel
from ..vhost.fds import HasFileno
from .back import Back
from .config import Config
from .device import Device
from .handlers import bind

log = logging.getLogger(__name__)

Connect = Callable[[Callable[[], None]], Back]
"""Makes the back; its argument is called when the configuration space has changed."""


class Session:
    """Serves one front until it leaves, until the back is gone, or until `stop`."""

    def __init__(
        self,
        front: Channel,
        config: Config,
        connect: Connect,
        stop: HasFileno,
        *,
        keep_backend: bool = False,
    ) -> None:
        self.front = front
        self.config = config
        self.connect = connect
        self.stop = stop
        self.keep_backend = keep_backend
        """Whether the back is left to the next session when the front leaves."""
        self.device = Device(config, self._connect)
        self.backend = Backend(front, bind(self.device))
        self.back_lost = False
        """Whether the back was why it ended."""
        self.stopped = False
        """Whether `stop` was why it ended."""

    def run(self) -> Back | None:
        """Serve. Returns the back, if it is to be kept and in a state to be."""
        keep = False
        try:
            self._serve()
        except Stopped:
            self.stopped = True
        except SessionError as error:
            front_left = isinstance(error, FrontLost)
            log.log(logging.INFO if front_left else logging.ERROR, "%s", error)
            keep = front_left and self.keep_backend
        except OSError as error:
            log.error("the system has no more of what a session takes: %s", error)
        finally:
            self._stop_rings()
            log.info("counters: %s", json.dumps(self.device.counters()))
            # The front may only learn of the end once its memory is not used any more.
            kept = self.device.close(keep_back=keep and not self.back_lost)
            self.front.close()
        return kept

    def describe(self) -> dict[str, object]:
        """What is going on, as JSON can hold it. Any thread may ask."""
        return {
            "backend_connected": self.device.connected is not None,
            "rings": self.device.conditions(),
            "counters": self.device.counters(),
        }

    def _serve(self) -> None:
        while True:
            ready = self._wait()
            back = self.device.connected
            if self.stop.fileno() in ready:
                raise Stopped("stopped")
            if back is not None and back.frontend.fileno() in ready:
                back.frontend.collect()
            if back is not None and back.requests_fileno() in ready:
                back.serve_requests()
            if self.front.fileno() in ready:
                self.backend.handle_one()
            self.device.look()

    def _wait(self) -> set[int]:
        """Wait for whatever comes first; return the descriptors that are ready."""
        poll = select.poll()
        for waited in (self.stop, self.front, self.device.events):
            poll.register(waited.fileno(), select.POLLIN)
        for ring in self.device.rings.values():
            if ring.intact:
                poll.register(ring.err.fileno(), select.POLLIN)
        back = self.device.connected
        if back is not None:
            poll.register(back.frontend.fileno(), select.POLLIN)
            if back.requests_fileno() >= 0:
                poll.register(back.requests_fileno(), select.POLLIN)
        return {fd for fd, _ in poll.poll(self.device.next_look())}

    def _connect(self, config_changed: Callable[[], None]) -> Back:
        try:
            return self.connect(config_changed)
        except SessionError:
            self.back_lost = True
            raise

    def _stop_rings(self) -> None:
        """End what is in flight, if the back is still there to end it."""
        back = self.device.connected
        if back is None:
            return
        self.back_lost = not back.usable
        if not self.back_lost:
            try:
                self.device.stop()
            except AirlockError as error:
                log.error("%s", error)
                self.back_lost = True
