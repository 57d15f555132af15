# SPDX-License-Identifier: Apache-2.0
"""One device in the hands of one front: its memory, its rings, and the back.

Handlers call this; it does what a message asks for, on both sides. It keeps what the
front says until the back needs to know it: protocol features and owner when the first
message goes to the back, everything about a ring when the ring starts.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import DeadlineExceeded, RequestRefused, SessionError
from ..vhost.channel import Channel
from ..vhost.fds import Fd, drain, eventfd
from ..vhost.frontend import Frontend, Requester
from ..vhost.rules import BACKEND_RULES
from ..vhost.wire import (
    BackendRequest,
    DeviceState,
    Feature,
    MemoryRegion,
    ProtocolFeature,
    StateDirection,
    VringAddr,
)
from .back import Back
from .config import Config
from .front_memory import FrontMemory
from .pool_policy import PoolPolicy
from .ring import Ring
from .state import (
    Event,
    front_accepts,
    front_accepts_protocol,
    front_offer,
    front_protocol_offer,
)
from .transfer import Transfer
from .workers import Workers

log = logging.getLogger(__name__)


class Device:
    """All that a session has beside the front's socket. `connect` makes the back."""

    def __init__(
        self,
        config: Config,
        connect: Callable[[Callable[[], None]], Back],
    ) -> None:
        self.config = config
        self.memory = FrontMemory()
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.rings: dict[int, Ring] = {}
        self.events = eventfd()
        self.workers = Workers(
            config.workers,
            self.events,
            poll_us=config.poll_us,
            cpus=config.worker_cpus,
        )
        self._connect = connect
        self._back: Back | None = None
        self._front_requests: Requester | None = None
        self._transfer: Transfer | None = None
        self._pool = PoolPolicy(self.workers)

    @property
    def back(self) -> Back:
        """The back, connected when it is first needed."""
        if self._back is None:
            self._back = self._connect(self._on_config_change)
        return self._back

    @property
    def connected(self) -> Back | None:
        """The back, if there is one yet."""
        return self._back

    @property
    def informed(self) -> Back:
        """The back, which knows all that the front has chosen so far."""
        self.back.settle(self.protocol_features)
        if self.features:
            self.back.set_features(self.features)
        return self.back

    @property
    def frontend(self) -> Frontend:
        """The back for messages that are passed on: ready for them."""
        return self.informed.frontend

    # Features.

    def offer(self) -> int:
        return front_offer(self.back.offered)

    def accept(self, features: int) -> None:
        """The front accepts features; it may repeat itself while rings run."""
        accepted = front_accepts(self.offer(), features)
        if accepted == self.features:
            return
        if any(ring.attached for ring in self.rings.values()):
            raise RequestRefused(f"SET_FEATURES: {features:#x} while rings are started")
        self.features = accepted

    def offer_protocol(self) -> ProtocolFeature:
        return front_protocol_offer(self.back.offered_protocol)

    def accept_protocol(self, features: int) -> None:
        accepted = front_accepts_protocol(self.offer_protocol(), features)
        if self.back.settled and not self.back.has(accepted):
            raise RequestRefused("SET_PROTOCOL_FEATURES: others are in use already")
        self.protocol_features = accepted

    # Memory.

    @contextmanager
    def changing_memory(self) -> Iterator[FrontMemory]:
        """Change the guest's memory; it has taken effect when this ends.

        The new regions are mapped while the worker still runs with the old ones. A copy
        to memory that goes away is dropped; a ring in such memory is broken.
        """
        yield self.memory
        with self.workers.pause():
            self.memory.publish()
            for ring in self.rings.values():
                ring.relocate(self.memory)
        self.memory.prune()
        self.start_rings()

    def set_memory(self, regions: tuple[MemoryRegion, ...], fds: list[Fd]) -> None:
        with self.changing_memory() as memory:
            memory.replace(regions, fds)

    def add_memory(self, region: MemoryRegion, fd: Fd) -> None:
        with self.changing_memory() as memory:
            memory.add(region, fd)

    def remove_memory(self, region: MemoryRegion) -> None:
        with self.changing_memory() as memory:
            memory.remove(region)

    # Rings.

    def ring(self, index: int) -> Ring:
        """The ring with this number, made when it is first asked for."""
        if index not in self.rings:
            self.rings[index] = Ring(index, self.workers.of(index), self.events)
        return self.rings[index]

    def set_ring_address(self, addr: VringAddr) -> None:
        self.ring(addr.index).set_address(addr, self.memory)
        self.start_rings()

    def kick_ring(self, index: int, fd: Fd) -> None:
        """Start a ring: the guest kicks it here."""
        ring = self.ring(index)
        if not self.features:
            fd.close()
            raise RequestRefused(f"SET_VRING_KICK: ring {index} before SET_FEATURES")
        ring.replace_kick(fd)
        ring.vring.happen(Event.START)
        if not self.features & Feature.PROTOCOL_FEATURES:
            ring.vring.happen(Event.ENABLE)  # there is no message to enable it
        self.start_rings()

    def enable_ring(self, index: int, enable: bool) -> None:
        ring = self.ring(index)
        ring.vring.happen(Event.ENABLE if enable else Event.DISABLE)
        if ring.attached:
            ring.enable(self.back, enable)

    def stop_ring(self, index: int, deadline: float | None = None) -> int:
        """Stop a ring, and return the base at which it can go on."""
        if deadline is None:
            deadline = time.monotonic() + self.config.drain_timeout
        ring = self.ring(index)
        base = ring.vring.base
        if ring.attached:
            base = ring.stop(self.back, deadline)
        ring.vring.happen(Event.STOP)
        ring.vring.base = base
        return base

    def stop(self) -> None:
        """Stop all rings as the front would; they have the time of one to drain."""
        deadline = time.monotonic() + self.config.drain_timeout
        attached = [ring for ring in self.rings.values() if ring.attached]
        for ring in attached:
            ring.quiesce()
        for ring in attached:
            self.stop_ring(ring.index, deadline)

    def start_rings(self) -> None:
        """Start every ring for which the front has said all that it takes.

        Front-ends send the parts of this in any order.
        """
        for ring in self.rings.values():
            vring = ring.vring
            ready = vring.phase.started and vring.configured and not ring.attached
            if ready and ring.locate(self.memory) is not None:
                ring.start(self.informed, self.memory, self.features, self.config.copy)
                self._share_pool()

    def reset(self) -> None:
        """The device is as new. Requests in flight end first, or are let go."""
        self.stop()
        for ring in self.rings.values():
            ring.vring.happen(Event.STOP)
            ring.vring.happen(Event.DISABLE)
        if self.back.offered_protocol & ProtocolFeature.RESET_DEVICE:
            self.frontend.reset_device()

    # The device's internal state.

    def transfer_state(self, state: DeviceState, front: Fd) -> None:
        """Begin to carry the state between the front's pipe and one of ours."""
        with front:
            if any(ring.attached for ring in self.rings.values()):
                raise RequestRefused("SET_DEVICE_STATE_FD: rings are started")
            self._end_transfer()
            saves = state.direction == StateDirection.SAVE
            out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
            ours, theirs = (out, into) if saves else (into, out)
            with ours, theirs:
                other = self.frontend.set_device_state_fd(
                    state.direction, theirs, state.phase
                )
                back = other or Fd(ours.release())
            ends = (back, Fd(front.release()))
            self._transfer = Transfer(*(ends if saves else reversed(ends)))

    def check_state(self) -> None:
        """Wait for the end of the transfer, and let the back say if all of it came."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise RequestRefused("CHECK_DEVICE_STATE: nothing was transferred")
        transfer.finish(self.config.timeout)
        self.frontend.check_device_state()

    def _end_transfer(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    # What happens between messages.

    def look(self) -> None:
        """See to what the worker has signalled, and to what time has brought."""
        drain(self.events)
        for ring in self.rings.values():
            if reason := ring.check():
                log.error("ring %d is broken: %s", ring.index, reason)
        if self._back is not None and self._back.settled:
            self._back.collect_late()
            self._pool.look(self._back)

    def next_look(self) -> float | None:
        """Milliseconds until look() has something to do by itself; None: it has not."""
        back = self._back
        if back is None or not back.settled:
            return None
        waits = (
            back.requests_wait() or None,
            back.answer_wait(),
            self._pool.next_look(back),
        )
        return min((wait * 1000 for wait in waits if wait is not None), default=None)

    def set_front_requests(self, fd: Fd) -> None:
        """The front's socket for requests of the back; it replaces an older one."""
        self._close_front_requests()
        sock = socket.socket(fileno=fd.release())
        channel = Channel(sock, peer="front", timeout=self.config.timeout)
        self._front_requests = Requester(channel, BACKEND_RULES, self.protocol_features)

    def counters(self) -> dict[str, dict[str, int]]:
        """What each ring has done, by its number, and the worker and the pool.

        Any thread may ask at any time: it reads, and looks at each thing once.
        """
        found = {
            f"ring {ring.index}": ring.counters()
            for ring in self._rings_in_order()
            if ring.pump is not None
        }
        found |= self.workers.counters()
        back = self._back
        if back is not None and back.settled:
            memory = back.memory
            found["pool"] = {
                "used": memory.pool.used,
                "high_water": memory.pool.high_water,
                "resident": memory.resident,
                "regions": len(memory.regions) - 1,
            }
        return found

    def conditions(self) -> dict[str, dict[str, object]]:
        """The phase of each ring, by its number, and its fault. Any thread may ask."""
        return {
            f"ring {ring.index}": ring.condition() for ring in self._rings_in_order()
        }

    def _rings_in_order(self) -> list[Ring]:
        return sorted(self.rings.values(), key=lambda ring: ring.index)

    def close(self, *, keep_back: bool = False) -> Back | None:
        """Let go of everything; return the back, if it is to be kept and can be."""
        for ring in self.rings.values():
            ring.abandon()
        keep = keep_back and not self._quarantined()
        self.workers.close()
        for ring in self.rings.values():
            ring.close()
        self.rings.clear()
        self.memory.close()
        self._close_front_requests()
        self._end_transfer()
        self.events.close()
        # Sessions are parts of cycles: the pool has a descriptor, and shall not wait
        # for the garbage collector.
        back, self._back = self._back, None
        if back is None or keep:
            return back
        back.close()
        return None

    def _quarantined(self) -> int:
        return sum(ring.quarantined for ring in self.rings.values())

    def _share_pool(self) -> None:
        with_pump = [ring for ring in self.rings.values() if ring.pump is not None]
        self._pool.share(self.back, with_pump)

    def _on_config_change(self) -> None:
        """Tell the front. It must not be asked to ack: it may be asking us just now."""
        if self._front_requests is None:
            return
        try:
            self._front_requests.exchange(
                BackendRequest.CONFIG_CHANGE_MSG, need_reply=False, timeout=0
            )
        except DeadlineExceeded:
            pass  # its socket is full: of the same message, which says it as well
        except SessionError as error:
            log.warning("front: its socket for requests is of no use: %s", error)
            self._close_front_requests()

    def _close_front_requests(self) -> None:
        if self._front_requests is not None:
            self._front_requests.close()
            self._front_requests = None
