# SPDX-License-Identifier: Apache-2.0
"""The connection to the back: to it, we are an ordinary front-end with a small guest.

The order of messages is the one that every known back-end takes, and does not depend on
the order of the front's messages: features and owner first, then memory, and a ring all
at once when it starts. See protocol.md in the docs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto

from ..errors import DeadlineExceeded, Disconnected, ProtocolError, SessionError
from ..log import INFO
from ..record import changeable, record
from ..vhost.backend import Responder
from ..vhost.channel import Channel
from ..vhost.fds import Fd
from ..vhost.frontend import Frontend
from ..vhost.message import Answer
from ..vhost.rules import BACKEND_RULES
from ..vhost.wire import BackendRequest, Feature, ProtocolFeature, Request, VringAddr
from .config import Config
from .features import back_features, back_protocol, names
from .isolated import IsolatedMemory, Region
from .ration import LINES, Ration

REQUESTS_INTERVAL = 0.02
"""Seconds between looks at the back's own requests."""
REQUESTS_AT_ONCE = 64
"""How many of them are served in one look."""


class Link(Enum):
    """How far a connection has come."""

    OPEN = auto()
    """The back has told the features that it offers."""
    SETTLED = auto()
    """It has its protocol features and its owner, and there is isolated memory."""
    UP = auto()
    """It knows the isolated memory: rings can start."""
    DOWN = auto()
    """It is closed."""


@record
class ShadowRing:
    """A ring as the back is told of it; addresses are the back's."""

    number: int
    size: int
    base: int
    desc: int
    avail: int
    used: int


@changeable
class Has:
    """Values that the back was told and has not forgotten since."""

    features: int = 0
    """0: none, or forgotten."""


class Back:
    """One connection to a back-end, and the isolated memory that it has.

    `config_changed` is called when the back says that its configuration space did.
    """

    def __init__(
        self,
        channel: Channel,
        config: Config,
        config_changed: Callable[[], None],
        until: float | None = None,
    ) -> None:
        """`until`: the time when its first answers have to be there."""
        self.peer = Frontend(channel, timeout=config.timeout)
        self.peer.until = until
        self.config = config
        self.log = config.log
        self.config_changed = config_changed
        self.link = Link.OPEN
        self.has = Has()
        self._features_told = Ration(LINES)
        self.requests: Responder | None = None
        """The back's own requests."""
        self._memory: IsolatedMemory | None = None
        self._moving: Region | None = None
        """The region of which the back was told, and has not answered yet."""
        self._changed = False
        self._served = 0.0
        try:
            self.offered = self.peer.get_features()
        except DeadlineExceeded as error:
            raise type(error)(
                f"{error}: is it a vhost-user back-end, and free to serve?"
            ) from None
        self.offered_protocol = ProtocolFeature(0)
        if self.offered & Feature.PROTOCOL_FEATURES:
            self.offered_protocol = self.peer.get_protocol_features()
        self.peer.until = None

    @property
    def settled(self) -> bool:
        """Are the protocol features chosen?"""
        return self.link in (Link.SETTLED, Link.UP)

    @property
    def memory(self) -> IsolatedMemory:
        """The isolated memory; there is some once the connection is settled."""
        if self._memory is None:
            raise ProtocolError("VMM: sets up rings before it has set its features")
        return self._memory

    @property
    def usable(self) -> bool:
        """Is it still there, and in step with us?"""
        try:
            self.peer.barrier()
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
            self.peer.set_protocol_features(accepted)
        self.peer.set_owner()
        slots = 0
        if accepted & ProtocolFeature.CONFIGURE_MEM_SLOTS:
            slots = self.peer.get_max_mem_slots()
            if slots < 2:
                raise ProtocolError(f"back-end: GET_MAX_MEM_SLOTS: {slots} are too few")
        self._memory = IsolatedMemory(
            self.config.pool_limit,
            slots=slots,
            lone_limit=self.config.request_limit,
            shared=self.config.workers > 1,
        )
        self.link = Link.SETTLED
        if accepted & ProtocolFeature.BACKEND_REQ:
            self._open_requests(accepted)

    def has_features(self, front: ProtocolFeature) -> bool:
        """Were all features settled that a front needs which has accepted these?"""
        wanted = back_protocol(front, self.offered_protocol)
        return not wanted & ~self.peer.protocol_features

    def set_features(self, front: int) -> None:
        """Accept features, by those that the front has accepted."""
        protocol = self.peer.protocol_features
        features = back_features(front, self.offered, protocol)
        if features != self.has.features:
            self.peer.set_features(features)
            self.has.features = features
            self._features_told.log(
                self.log,
                "features agreed with the back-end: %s; protocol features: %s",
                names(features, Feature),
                names(self.peer.protocol_features, ProtocolFeature),
                level=INFO,
            )

    def reset_device(self) -> None:
        """Reset the device, if the back knows how to; it forgets its features then."""
        if self.peer.protocol_features & ProtocolFeature.RESET_DEVICE:
            self.peer.reset_device()
            self.has.features = 0

    def start_ring(self, ring: ShadowRing, *, kick: Fd, call: Fd, err: Fd) -> None:
        """Start a ring; it is not enabled yet.

        The back gets its descriptors before the ring: it may complete chains there, of
        before a stop, as soon as it has the addresses.
        """
        self.show_memory()
        self.peer.set_vring_num(ring.number, ring.size)
        self.peer.set_vring_base(ring.number, ring.base)
        self.peer.set_vring_call(ring.number, call)
        self.peer.set_vring_err(ring.number, err)
        self.peer.set_vring_addr(
            VringAddr(ring.number, 0, ring.desc, ring.used, ring.avail)
        )
        self.peer.set_vring_kick(ring.number, kick)

    def stop_ring(self, index: int) -> int:
        """Stop a ring; return the base at which the back says it has stopped."""
        return self.peer.get_vring_base(index)

    def set_call(self, index: int, call: Fd) -> None:
        """Let the back notify at `call` for a ring that it has stopped with chains
        unfinished: libvhost-user may have to, and gives the connection up if it can't.
        """
        self.peer.set_vring_call(index, call)

    def enable_ring(self, index: int, enable: bool) -> None:
        """Enable a ring or not, and return when the back has done it."""
        if self.has.features & Feature.PROTOCOL_FEATURES:
            self.peer.set_vring_enable(index, enable)
        if not self.peer.protocol_features & ProtocolFeature.REPLY_ACK:
            self.peer.barrier()

    @property
    def busy(self) -> bool:
        """Has it still to answer announce() or forget()? One of them at a time."""
        return self._moving is not None

    def announce(self, region: Region, then: Callable[[], None]) -> None:
        """Tell the back of a region that was made; `then` is called when it has it."""
        self.log.debug("isolated memory: %d KiB more", region.size >> 10)
        self._move(Request.ADD_MEM_REG, region, [region.fd], then)

    def forget(self, region: Region) -> None:
        """Take a region, which was withdrawn, away from the back, and close it then."""
        self.log.debug("isolated memory: %d KiB less", region.size >> 10)
        self._move(Request.REM_MEM_REG, region, [], region.close)

    def close(self) -> None:
        """Hang up. No pump may use the isolated memory any more."""
        self.link = Link.DOWN
        self.peer.close()
        if self.requests is not None:
            self.requests.channel.close()
            self.requests = None
        if self._moving is not None:
            self._moving.close()
        if self._memory is not None:
            self._memory.close()

    def fileno(self) -> int:
        return self.peer.fileno()

    def waited_for(self) -> list[int]:
        """The descriptors that can have something for look().

        The back's own requests are looked at now and then only, so a flood of them
        takes little time.
        """
        found = [self.peer.fileno()]
        if self.requests is not None and not self.requests_wait():
            found.append(self.requests.channel.fileno())
        return found

    def next_look(self) -> float | None:
        """Seconds until look() has something to do by itself; None: it has not."""
        waits = [self.requests_wait()] if self.requests is not None else []
        if self.peer.owed_until is not None:
            waits.append(self.peer.owed_until - time.monotonic())
        waits = [wait for wait in waits if wait > 0]
        return min(waits, default=None)

    def requests_wait(self) -> float:
        """Seconds until the back's own requests are looked at again."""
        return max(0.0, self._served + REQUESTS_INTERVAL - time.monotonic())

    def look(self, ready: set[int]) -> None:
        """See to messages that have come on these descriptors; waits for none of them.

        BackLost if the back has hung up, DeadlineExceeded if it owes an answer for too
        long.
        """
        late = self.peer.owed_until is not None and (
            self.peer.owed_until <= time.monotonic()
        )
        if late or self.peer.fileno() in ready:
            self.peer.collect()
        if self.requests is not None and self.requests.channel.fileno() in ready:
            self._serve_requests(self.requests)

    def _serve_requests(self, requests: Responder) -> None:
        """Serve the requests that have come; several changes of the configuration space
        are told to the front as one.
        """
        self._served = time.monotonic()
        try:
            for _ in range(REQUESTS_AT_ONCE):
                if not requests.handle_now():
                    break
        except Disconnected:
            self.log.info(
                "back-end: closed its own socket for requests; it tells of no more"
                " changes of the configuration space"
            )
            requests.channel.close()
            self.requests = None
        if self._changed:
            self._changed = False
            self.config_changed()

    def show_memory(self) -> None:
        """Tell the back its memory, once for a connection; no ring uses it yet."""
        if self.link is Link.UP:
            return
        self.link = Link.UP
        if not self.memory.slots:
            self.peer.set_mem_table(
                (region.announced, region.fd) for region in self.memory.regions
            )
            return
        rings = self.memory.rings
        self.peer.add_mem_region(rings.announced, rings.fd)
        if first := self.memory.grow(0):
            self.memory.open(first)
            self.peer.add_mem_region(first.announced, first.fd)
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
        self.peer.post(request, region.announced, fds, answered)

    def _open_requests(self, accepted: ProtocolFeature) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            channel = Channel(ours, peer="back-end")
            self.requests = Responder(
                channel,
                {BackendRequest.CONFIG_CHANGE_MSG: self._on_config_change},
                BACKEND_RULES,
                accepted,
                self.log,
            )
            self.peer.set_backend_req_fd(theirs)

    def _on_config_change(self, payload: object, fds: list[Fd]) -> None:
        self._changed = True
