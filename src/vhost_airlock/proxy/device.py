# SPDX-License-Identifier: Apache-2.0
"""One device in the hands of one front: its memory, its rings, and the back.

Handlers call this; it carries out each message, on both sides. It keeps the values that
the front tells until the back needs to know them: protocol features and owner when the
first message goes to the back, everything about a ring when the ring starts. After each
message it starts the rings for which the front has told all that a start takes.

So when a back is lost, another one can take its place: rings stop without it, and start
again when there is one that is the device that the front knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BackLost, DeadlineExceeded, RequestRefused
from ..log import INFO
from ..vhost.fds import Fd
from ..vhost.wire import (
    DeviceState,
    Feature,
    Inflight,
    Log,
    MemoryRegion,
    ProtocolFeature,
)
from .back import Back
from .back_side import BackSide
from .config import Config
from .dirty_log import DirtyLog, map_log
from .features import front_accepts, front_accepts_protocol, names
from .front_memory import FrontMemory
from .front_requests import FrontRequests
from .inflight import InflightRecord
from .ration import LINES, Ration
from .recovery import Backs
from .relay import Relay
from .rings import Rings
from .transfer import StateTransfer


class Device:
    """All that a session has beside the front's socket. `backs` makes the backs."""

    def __init__(self, config: Config, backs: Backs) -> None:
        self.config = config
        self.log = config.log
        self.memory = FrontMemory()
        self.record = InflightRecord()
        self.dirty_log = DirtyLog(self.memory.guest, self.log)
        self.front_requests = FrontRequests(self.log)
        self.back_side = BackSide(config, backs, self.front_requests, self)
        self.relay = Relay(self.back_side)
        self.rings = Rings(
            config, self.back_side, self.memory, self.record, self.dirty_log
        )
        self._features_told = Ration(LINES)
        self._transfer = StateTransfer()

    @contextmanager
    def message(self) -> Iterator[None]:
        """A context for one message of the front, with one deadline. In the end the
        rings are started that can start then.
        """
        with self.back_side.deadline.message():
            yield
            self.back_side.outlive(self.rings.start)

    # Called by the back's side.

    def stop_without_back(self) -> None:
        self.rings.lose_back()
        self._transfer.close()

    def start_again(self) -> None:
        self.rings.start_again()

    # Features.

    def offer(self) -> int:
        return self.back_side.known.offer

    def accept(self, features: int) -> None:
        """The front accepts features; it may repeat itself while rings run."""
        side = self.back_side
        accepted = front_accepts(self.offer(), features)
        if accepted == side.features:
            return
        changed = accepted ^ (side.features or 0)
        if changed & ~Feature.LOG_ALL:
            for ring in self.rings.values():
                ring.retell(f"SET_FEATURES: {features:#x}")
        with self.logging():
            side.features = accepted
        if changed == Feature.LOG_ALL:
            self._mirror_logging(accepted)
        self._features_told.log(
            self.log,
            "features agreed with the VMM: %s; protocol features: %s",
            names(accepted, Feature),
            names(side.protocol_features, ProtocolFeature),
            level=INFO,
        )

    def _mirror_logging(self, features: int) -> None:
        """Tell the back at once, if it is one that has to know: a migration begins, or
        has ended, and its state is prepared meanwhile.
        """
        back = self.back_side.connected
        if back is not None and back.has.features:
            back.set_features(features)

    def offer_protocol(self) -> ProtocolFeature:
        return self.back_side.known.protocol_offer

    def accept_protocol(self, features: int) -> None:
        accepted = front_accepts_protocol(self.offer_protocol(), features)
        back = self.back_side.settled
        if back is not None and not back.has_features(accepted):
            raise RequestRefused("SET_PROTOCOL_FEATURES: others are in use already")
        self.back_side.protocol_features = accepted

    # Memory.

    @contextmanager
    def changing_memory(self) -> Iterator[FrontMemory]:
        """Change the guest's memory; it has taken effect when this ends.

        The new regions are mapped while the worker still runs with the old ones. A copy
        to memory that goes away is dropped; a ring in such memory is broken.
        """
        yield self.memory
        with self.rings.workers.pause():
            self.memory.publish()
            self.rings.relocate()
        self.memory.prune()

    def set_memory(self, regions: tuple[MemoryRegion, ...], fds: list[Fd]) -> None:
        with self.changing_memory() as memory:
            memory.replace(regions, fds)

    def add_memory(self, region: MemoryRegion, fd: Fd) -> None:
        with self.changing_memory() as memory:
            memory.add(region, fd)

    def remove_memory(self, region: MemoryRegion) -> None:
        with self.changing_memory() as memory:
            memory.remove(region)

    # The dirty log.

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Change what is logged, or where, while no worker runs. When this ends, no
        store is under way that is logged otherwise.
        """
        with self.rings.workers.pause():
            yield
            self.rings.set_logging()

    def use_log(self, told: Log, fd: Fd) -> None:
        new = map_log(told, fd)
        with self.logging():
            old = self.dirty_log.swap(new)
        if old is not None:
            self.dirty_log.retire(old)

    def use_log_fd(self, fd: Fd) -> None:
        with self.rings.workers.pause():
            old = self.dirty_log.swap_fd(fd)
            for ring in self.rings.values():
                ring.coupling.connect_fds()
        if old is not None:
            old.close()

    # All rings.

    def reset(self) -> None:
        """The device is as new. Requests in flight end first, or are let go."""
        side = self.back_side
        self.rings.stop()
        self.rings.disable()
        self.record.erase()
        if not side.away:
            side.informed.reset_device()
        side.known.was_reset()

    def use_record(self, told: Inflight, fd: Fd) -> None:
        """Record the requests in flight there, and take up those that are recorded."""
        if self.rings.attached:
            raise RequestRefused("SET_INFLIGHT_FD: rings are started")
        self.record.use(told, fd)

    # The device's internal state.

    @property
    def transfers(self) -> bool:
        """Is the front about to save or to load the device's state?"""
        return self._transfer.active

    def transfer_state(self, state: DeviceState, fds: list[Fd]) -> None:
        """Begin to carry the state between the front's pipe and one of ours."""
        if self.rings.attached:
            raise RequestRefused("SET_DEVICE_STATE_FD: rings are started")
        if self.back_side.away:
            raise RequestRefused("SET_DEVICE_STATE_FD: the back-end is away")
        self._transfer.begin(state, fds.pop(), self.back_side.peer)

    def check_state(self) -> None:
        """Wait for the end of the transfer, and let the back say if all of it came."""
        self._transfer.check(self.config.timeout, self.back_side.peer)

    # Between messages.

    def look(self, ready: set[int]) -> None:
        """See to messages of the back that have come on these descriptors, to the
        signals of the workers, and to all that is due by now.
        """
        side = self.back_side
        try:
            if side.connected is not None:
                side.connected.look(ready)
            if side.away:
                side.look()
            self.rings.look()
        except BackLost as lost:
            side.lose(lost)

    def next_look(self) -> float | None:
        """Milliseconds until look() has something to do by itself; None: it has not."""
        side = self.back_side
        found = [self.rings.wait()]
        if side.settled and (wait := side.settled.next_look()) is not None:
            found.append(wait)
        if side.away:
            found.append(side.wait())
        first = min(found)
        return first * 1000 if first < math.inf else None

    def counters(self) -> dict[str, dict[str, int]]:
        """The numbers of each ring, by its own, of the workers and of the pool.

        Any thread may ask at any time: it reads, and looks at each thing once.
        """
        found = self.rings.counters()
        found["backend"] = self.back_side.counters()
        if back := self.back_side.settled:
            memory = back.memory
            found["pool"] = {
                "used": memory.pool.used,
                "high_water": memory.pool.high_water,
                "resident": memory.resident,
                "regions": len(memory.regions) - 1,
            }
        return found

    def close(self, *, keep_back: bool = False) -> Back | None:
        """Let go of everything; return the back, if it is to be kept and can be.

        A worker that does not come to rest, since the system keeps it from that, keeps
        its memory: that stays mapped, and nothing of the session can be given back.
        """
        self.front_requests.close()
        self._transfer.close()
        try:
            with self.rings.workers.pause():
                pass
        except DeadlineExceeded as error:
            self.log.error(
                "%s: its memory, rings and descriptors stay as they are", error
            )
            _never_closed.append(self)
            return None
        back = self.back_side.release()
        self.rings.abandon()
        keep = keep_back and not self.rings.quarantined
        self.rings.close()
        self.record.close()
        self.dirty_log.close()
        self.memory.close()
        if back is None:
            return None
        if keep:
            back.memory.forget_rings()
            return back
        back.close()
        return None


_never_closed: list[Device] = []
"""Devices whose worker hangs in the system."""
