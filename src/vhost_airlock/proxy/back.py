# SPDX-License-Identifier: Apache-2.0
"""The connection to the back: to it, we are an ordinary front-end with a small guest.

The order of messages is the one that every known back-end takes, whatever order the
real front has: features and owner first, then memory, and a ring all at once when it
starts. See protocol.md in the docs.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Sequence

from ..dataplane.pump import shadow_parts
from ..errors import Disconnected, ProtocolError, SessionError
from ..vhost.backend import Responder
from ..vhost.channel import Channel
from ..vhost.fds import Fd
from ..vhost.frontend import Frontend
from ..vhost.message import Answer
from ..vhost.rules import BACKEND_RULES
from ..vhost.wire import BackendRequest, Feature, ProtocolFeature, Request, VringAddr
from .config import Config
from .isolated import IsolatedMemory, Region
from .state import back_features, back_protocol

log = logging.getLogger(__name__)

REQUESTS_INTERVAL = 0.02
"""Seconds between looks at the back's own requests."""
REQUESTS_AT_ONCE = 64
"""How many of them are served in one look."""


class Back:
    """One connection to a back-end, and the isolated memory that it has.

    `config_changed` is called when the back says that its configuration space did.
    """

    def __init__(
        self, channel: Channel, config: Config, config_changed: Callable[[], None]
    ) -> None:
        self.frontend = Frontend(channel, timeout=config.timeout)
        self.config = config
        self.config_changed = config_changed
        self.features = 0
        """In use, once set_features() was called."""
        self.requests: Responder | None = None
        """The back's own requests."""
        self._memory: IsolatedMemory | None = None
        self._announced = False
        self._moving: Region | None = None
        """The region of which the back was told, and has not answered yet."""
        self._changed = False
        self._served = 0.0
        self.offered = self.frontend.get_features()
        self.offered_protocol = ProtocolFeature(0)
        if self.offered & Feature.PROTOCOL_FEATURES:
            self.offered_protocol = self.frontend.get_protocol_features()

    @property
    def settled(self) -> bool:
        """Are the protocol features chosen?"""
        return self._memory is not None

    @property
    def memory(self) -> IsolatedMemory:
        """The isolated memory; there is some once the connection is settled."""
        if self._memory is None:
            raise ProtocolError("front: sets up rings before it has set its features")
        return self._memory

    @property
    def usable(self) -> bool:
        """Is it still there, and in step with us?"""
        try:
            self.frontend.barrier()
        except SessionError:
            return False
        return True

    def settle(self, front: ProtocolFeature) -> None:
        """Choose protocol features, by those that the front has accepted, and own it.

        Once for a connection.
        """
        if self.settled:
            return
        accepted = back_protocol(front, self.offered_protocol)
        if self.offered & Feature.PROTOCOL_FEATURES:
            self.frontend.set_protocol_features(accepted)
        self.frontend.set_owner()
        slots = 0
        if accepted & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            slots = self.frontend.get_max_mem_slots()
            if slots < 2:
                raise ProtocolError(f"back: GET_MAX_MEM_SLOTS: {slots} are too few")
        self._memory = IsolatedMemory(
            self.config.pool_limit,
            slots=slots,
            lone_limit=self.config.request_limit,
            shared=self.config.workers > 1,
        )
        if accepted & ProtocolFeature.BACKEND_REQ:
            self._open_requests(accepted)

    def has(self, front: ProtocolFeature) -> bool:
        """Does what was settled suffice for a front that has accepted these?"""
        wanted = back_protocol(front, self.offered_protocol)
        return not wanted & ~self.frontend.protocol_features

    def set_features(self, front: int) -> None:
        """Accept features, by those that the front has accepted."""
        features = back_features(front, self.offered)
        if features != self.features:
            self.frontend.set_features(features)
            self.features = features

    def start_ring(
        self, index: int, size: int, area: int, *, kick: Fd, call: Fd, err: Fd
    ) -> None:
        """Start a ring whose shadow is at `area` for the back; not enabled yet."""
        self._announce()
        desc, avail, used = (area + offset for offset in shadow_parts(size))
        self.frontend.set_vring_num(index, size)
        self.frontend.set_vring_base(index, 0)
        self.frontend.set_vring_addr(VringAddr(index, 0, desc, used, avail))
        self.frontend.set_vring_call(index, call)
        self.frontend.set_vring_err(index, err)
        self.frontend.set_vring_kick(index, kick)

    def enable_ring(self, index: int, enable: bool) -> None:
        """Enable a ring or not, and return when the back has done it."""
        if self.features & Feature.PROTOCOL_FEATURES:
            self.frontend.set_vring_enable(index, enable)
        if not self.frontend.protocol_features & ProtocolFeature.REPLY_ACK:
            self.frontend.barrier()

    @property
    def busy(self) -> bool:
        """Has it still to answer announce() or forget()? One of them at a time."""
        return self._moving is not None

    def announce(self, region: Region, then: Callable[[], None]) -> None:
        """Tell the back of a region that was made; `then` is called when it has it."""
        log.info("isolated memory: %d KiB more", region.size >> 10)
        self._move(Request.ADD_MEM_REG, region, [region.fd], then)

    def forget(self, region: Region) -> None:
        """Take a region, which was withdrawn, away from the back, and close it then."""
        log.info("isolated memory: %d KiB less", region.size >> 10)
        self._move(Request.REM_MEM_REG, region, [], region.close)

    def answer_wait(self) -> float | None:
        """Return the seconds that it still has to answer; None: it owes no answer."""
        until = self.frontend.owed_until
        return None if until is None else max(0.0, until - time.monotonic())

    def collect_late(self) -> None:
        """DeadlineExceeded if it owes an answer for too long."""
        if self.answer_wait() == 0:
            self.frontend.collect()

    def close(self) -> None:
        """Hang up. No pump may use the isolated memory any more."""
        self.frontend.close()
        if self.requests is not None:
            self.requests.channel.close()
            self.requests = None
        if self._moving is not None:
            self._moving.close()
        if self._memory is not None:
            self._memory.close()

    def requests_fileno(self) -> int:
        """The socket on which the back's own requests come; -1: don't look there now.

        They are looked at now and then only, so a flood of them is not our problem.
        """
        if self.requests is None or self.requests_wait() > 0:
            return -1
        return self.requests.channel.fileno()

    def requests_wait(self) -> float:
        """Seconds until the back's own requests are looked at again."""
        return max(0.0, self._served + REQUESTS_INTERVAL - time.monotonic())

    def serve_requests(self) -> None:
        """Serve the requests that have come, and pass on once what they mean."""
        if self.requests is None:
            return
        self._served = time.monotonic()
        try:
            for _ in range(REQUESTS_AT_ONCE):
                if not self.requests.handle_now():
                    break
        except Disconnected:
            log.info("back: it will have no requests any more")
            self.requests.channel.close()
            self.requests = None
        if self._changed:
            self._changed = False
            self.config_changed()

    def _announce(self) -> None:
        """Tell the back its memory, once: then no such message is sent for long."""
        if self._announced:
            return
        self._announced = True
        if not self.memory.slots:
            self.frontend.set_mem_table(
                (region.announced, region.fd) for region in self.memory.regions
            )
            return
        rings = self.memory.rings
        self.frontend.add_mem_region(rings.announced, rings.fd)
        if first := self.memory.grow(0):
            self.memory.open(first)
            self.frontend.add_mem_region(first.announced, first.fd)
        self.memory.pool.set_may_grow(True)

    def _move(
        self,
        request: Request,
        region: Region,
        fds: Sequence[Fd],
        then: Callable[[], None],
    ) -> None:
        def answered(_: Answer) -> None:
            self._moving = None
            then()

        self._moving = region
        self.frontend.post(request, region.announced, fds, answered)

    def _open_requests(self, accepted: ProtocolFeature) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            channel = Channel(ours, peer="back")
            self.requests = Responder(
                channel,
                {BackendRequest.CONFIG_CHANGE_MSG: self._on_config_change},
                BACKEND_RULES,
                accepted,
            )
            self.frontend.set_backend_req_fd(theirs)

    def _on_config_change(self, payload: object, fds: list[Fd]) -> None:
        self._changed = True
