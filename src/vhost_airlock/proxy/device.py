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

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ..errors import BackLost, DeadlineExceeded, RequestRefused
from ..vhost import wire
from ..vhost.fds import Fd, HasFileno, drain, eventfd
from ..vhost.frontend import Frontend
from ..vhost.wire import (
    U64,
    DeviceState,
    Feature,
    Inflight,
    Log,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
)
from .back import Back
from .config import Config
from .dirty_log import DirtyLog, map_log
from .features import (
    front_accepts,
    front_accepts_protocol,
    names,
    require_modern,
)
from .front_memory import FrontMemory
from .front_requests import FrontRequests
from .inflight import InflightRecord
from .known import Known
from .pool_policy import PoolPolicy
from .ration import LINES, Ration
from .recovery import Backs, Recovery
from .ring import Ring
from .transfer import StateTransfer
from .trial import Trial
from .workers import Workers

Result = TypeVar("Result")


class Device:
    """All that a session has beside the front's socket. `backs` makes them."""

    def __init__(self, config: Config, backs: Backs) -> None:
        self.config = config
        self.log = config.log
        self.memory = FrontMemory()
        self.record = InflightRecord()
        self.dirty_log = DirtyLog(self.memory.guest, self.log)
        self.features: int | None = None
        self._features_told = Ration(LINES)
        self.protocol_features = ProtocolFeature(0)
        self._early_status = 0
        """The status that the front has told before it has accepted STATUS."""
        self.rings: dict[int, Ring] = {}
        self._events = eventfd()
        self.events: HasFileno = self._events
        try:
            self.workers = Workers(
                config.workers,
                self.events,
                poll_us=config.poll_us,
                cpus=config.worker_cpus,
                log=config.log,
            )
        except BaseException:
            self._events.close()
            raise
        self.front_requests = FrontRequests(config.log)
        self._backs = backs
        self._back: Back | None = None
        self._known: Known | None = None
        self._recovery = Recovery(config)
        self._trial = Trial(self.rings, config.log, config.drain_timeout)
        self._settled = False
        """Whether the back that was lost was settled: the front may yet choose else."""
        self._swaps = 0
        self._paused = 0.0
        """Seconds in which rings stood still for swaps."""
        self._transfer = StateTransfer()
        self._pool = PoolPolicy(self.workers)
        self._until: float | None = None
        """When the message at hand has to be answered."""
        self._drains_until: float | None = None

    @property
    def back(self) -> Back:
        """The back, connected when it is first needed.

        After a loss it is awaited; RequestRefused if none comes until the message at
        hand has to be answered.
        """
        if self._back is None and not self.away:
            self._back = self._backs.connect(self.on_config_change)
            self._back.peer.until = self._until
        while self._back is None:
            left = (self._until or 0.0) - time.monotonic()
            if left <= 0:
                raise RequestRefused("the back-end is away")
            self._backs.pause(min(left, self._recovery.wait()))
            self._look_for_back()
            if self._back is not None and not self._has_time():
                # A back that is asked now would be late, and lost again for no fault.
                raise RequestRefused("the back-end has only just come back")
        return self._back

    @property
    def connected(self) -> Back | None:
        """The back, if there is one yet."""
        return self._back

    @property
    def away(self) -> bool:
        """Is the back lost, and another one looked for?"""
        return self._recovery.active

    @property
    def known(self) -> Known:
        """The back's answers that the front got, and the values that it has set."""
        if self._known is None:
            self._known = Known(self.back)
        return self._known

    @property
    def informed(self) -> Back:
        """The back, after sending it all that the front has accepted so far.

        Features without VERSION_1 stay here: others will follow, or no ring will ever
        start.
        """
        self.back.settle(self.protocol_features)
        self._tell_features(self.back)
        return self.back

    @property
    def peer(self) -> Frontend:
        """The back for messages that are passed on: ready for them."""
        return self.informed.peer

    # Time.

    @contextmanager
    def message(self) -> Iterator[None]:
        """A context for one message of the front.

        All that it makes us ask the back has one deadline, for however many rings. In
        the end the rings are started that can start then.
        """
        self._set_until(time.monotonic() + self.config.timeout)
        try:
            yield
            self.outlive(self.start_rings)
        finally:
            self._set_until(None)
            self._drains_until = None

    def drain_deadline(self) -> float:
        """When the wait for chains in flight ends, for all rings of a message.

        The message has so much longer.
        """
        if self._drains_until is None:
            self._drains_until = time.monotonic() + self.config.drain_timeout
            if self._until is not None:
                self._set_until(self._until + self.config.drain_timeout)
        return self._drains_until

    def _has_time(self) -> bool:
        """Has a back as much time for the message at hand as it may need, about?"""
        return (self._until or 0.0) - time.monotonic() > self.config.timeout / 2

    def _set_until(self, until: float | None) -> None:
        self._until = until
        if self._back is not None:
            self._back.peer.until = until

    # The loss of a back.

    def outlive(self, act: Callable[[], Result]) -> Result:
        """Do something, and do it again if the back is lost over it.

        BackLost, or another SessionError, if no other back is looked for.
        """
        while True:
            try:
                return act()
            except BackLost as lost:
                self.lose_back(lost)

    def lose_back(self, lost: BackLost) -> None:
        """Go on without a back, or raise what was given: rings stop, with the chains
        that it has completed.
        """
        self._recovery.begin(lost)
        self.let_go_of_back()

    def let_go_of_back(self) -> None:
        """Close the back. Rings stop without it, if they have not stopped yet."""
        back, self._back = self._back, None
        had = {ring: ring.collect_last() for ring in self.rings.values()}
        for ring, count in had.items():
            ring.lose_back(others=sum(had.values()) > count)
        self._transfer.close()
        self._pool = PoolPolicy(self.workers)
        if back is not None:
            self._settled = back.settled
            back.close()

    def _look_for_back(self) -> None:
        """Look for another back, if that is due, and put it in the place of the last.

        SessionError if that can't be, or if none comes.
        """
        back = self._recovery.attempt(
            lambda: self._backs.reconnect(self.on_config_change)
        )
        if back is None:
            return
        self._back = back
        outer = self._until
        self._set_until(time.monotonic() + self.config.timeout)
        try:
            grown = self.introduce(back, settled=self._settled)
            seconds = self._recovery.end()
            self._trial.begin()
            self.start_rings()
            self.known.tell_ready(back.peer)
        except BackLost as another:
            self.lose_back(another)
        else:
            self.log.warning("back-end: it is back, after %.1f s", seconds)
            if grown:
                self.tell_grown()
        finally:
            self._set_until(outer)

    def introduce(self, back: Back, *, settled: bool) -> bool:
        """Tell another back all that the last one knew, but for the rings. `settled`:
        the last one was.

        Returns whether its capacity has grown. SessionError if it is not the device
        that the front knows.
        """
        back.peer.until = self._until
        if settled:
            back.settle(self.protocol_features)
        grown = self.known.require(back)
        if settled:
            self._tell_features(back)
            self.known.tell(back.peer)
            back.show_memory()
        return grown

    def tell_grown(self) -> None:
        """Tell the front, which reads the configuration space again then."""
        self.log.warning("back-end: its capacity has grown; the VMM is told")
        self.front_requests.config_changed(self.protocol_features)

    # The exchange of a back for another one; see swap.py.

    @property
    def until(self) -> float:
        """When the message at hand has to be answered, in time.monotonic()."""
        assert self._until is not None
        return self._until

    def renew_time(self) -> None:
        """Begin the time of the message at hand anew, and that of a drain."""
        self._set_until(time.monotonic() + self.config.timeout)
        self._drains_until = None

    def search_anew(self) -> None:
        """Look for another back at once: it has come by another way."""
        self._recovery.hurry()

    @property
    def transfers(self) -> bool:
        """Is the front about to save or to load the device's state?"""
        return self._transfer.active

    def take_back(self, back: Back) -> None:
        """Go on with a back that was introduced. BackLost if it is gone."""
        self._back = back
        self._set_until(self._until)
        self.start_rings()
        self.known.tell_ready(back.peer)

    def swapped(self, seconds: float) -> None:
        """Another back has taken the place of one, after a pause."""
        self._swaps += 1
        self._paused += seconds

    # Features.

    def offer(self) -> int:
        return self.known.offer

    def accept(self, features: int) -> None:
        """The front accepts features; it may repeat itself while rings run."""
        accepted = front_accepts(self.offer(), features)
        if accepted == self.features:
            return
        changed = accepted ^ (self.features or 0)
        if changed & ~Feature.LOG_ALL:
            for ring in self.rings.values():
                ring.retell(f"SET_FEATURES: {features:#x}")
        with self.logging():
            self.features = accepted
        if changed == Feature.LOG_ALL:
            self._mirror_logging()
        self._features_told.log(
            self.log,
            "features agreed with the VMM: %s; protocol features: %s",
            names(accepted, Feature),
            names(self.protocol_features, ProtocolFeature),
            level=logging.INFO,
        )

    def _mirror_logging(self) -> None:
        """Tell the back at once, if it is one that has to know: a migration begins, or
        has ended, and its state is prepared meanwhile.
        """
        if self._back is not None and self._back.has.features:
            self._back.set_features(self.features or 0)

    def offer_protocol(self) -> ProtocolFeature:
        return self.known.protocol_offer

    def accept_protocol(self, features: int) -> None:
        accepted = front_accepts_protocol(self.offer_protocol(), features)
        back = self._back
        if back is not None and back.settled and not back.has_features(accepted):
            raise RequestRefused("SET_PROTOCOL_FEATURES: others are in use already")
        self.protocol_features = accepted

    def set_status(self, status: int) -> None:
        """Tell the back the status of the device.

        It stays here if the front has not accepted STATUS: it is about the connection
        before, of which this back knows nothing.
        """
        if ProtocolFeature.STATUS not in self.protocol_features:
            self._early_status = status
            return
        if not self.away:
            self.peer.set_status(status)
        if not status:
            self.known.was_reset()
        self.known.status = status

    def get_status(self) -> int:
        """Return the status that the back has, or the one that stayed here."""
        if ProtocolFeature.STATUS not in self.protocol_features:
            return self._early_status
        return self.known.status if self.away else self.peer.get_status()

    # Messages that are passed on.

    def get_queue_num(self) -> int:
        known = self.known
        if known.queue_num is None or not self.away:
            known.queue_num = self.peer.get_queue_num()
        return known.queue_num

    def get_config(self, asked: wire.Config) -> bytes:
        """Return a piece of the configuration space."""
        known = self.known.config(asked.offset, asked.size)
        if known is not None and self.away:
            return known
        data = self.peer.get_config(asked.offset, asked.size, asked.flags)
        self.known.read_config(asked.offset, data)
        return data

    def set_config(self, config: wire.Config) -> None:
        self.peer.set_config(config.offset, config.data, config.flags)
        self.known.wrote_config(config.offset, config.data)

    def set_mtu(self, mtu: int) -> None:
        if not self.away:
            self.peer.net_set_mtu(mtu)
        self.known.mtu = mtu

    def send_rarp(self, mac: U64) -> None:
        if not self.away:
            self.peer.exchange(Request.SEND_RARP, mac)

    def _tell_features(self, back: Back) -> None:
        """Tell a back the features that the front has accepted, if they are final."""
        if self.features is not None and self._is_modern():
            back.set_features(self.features)

    def _is_modern(self) -> bool:
        try:
            require_modern(self.features or 0)
        except RequestRefused:
            return False
        return True

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
                ring.relocate()
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
        with self.workers.pause():
            yield
            for ring in self.rings.values():
                ring.set_logging()

    def use_log(self, told: Log, fd: Fd) -> None:
        new = map_log(told, fd)
        with self.logging():
            old = self.dirty_log.swap(new)
        if old is not None:
            self.dirty_log.retire(old)

    def use_log_fd(self, fd: Fd) -> None:
        with self.workers.pause():
            old = self.dirty_log.swap_fd(fd)
            for ring in self.rings.values():
                ring.connect_fds()
        if old is not None:
            old.close()

    # Rings.

    def ring(self, index: int) -> Ring:
        """The ring with this number, made when it is first asked for."""
        if index not in self.rings:
            ring = self.rings[index] = Ring(index, self.workers.of(index), self)
            self._trial.join(ring)
        return self.rings[index]

    def set_ring_address(self, addr: VringAddr) -> None:
        self.ring(addr.index).set_address(addr)

    def start_rings(self) -> None:
        """Start every ring for which the front has told all that a start takes."""
        if self.away:
            return
        for ring in self.rings.values():
            ring.start_if_ready()

    def stop(self) -> None:
        """Stop all rings. They share one deadline, and nobody wants their bases."""
        rings = self.rings.values()
        for ring in rings:
            ring.quiesce()
        for ring in rings:
            # A guest whose VMM has left, or resets it, may use its memory anew by now.
            ring.stop(quietly=True)

    def reset(self) -> None:
        """The device is as new. Requests in flight end first, or are let go."""
        self.stop()
        for ring in self.rings.values():
            ring.enable(False)
        self.record.erase()
        if not self.away:
            self.informed.reset_device()
        self.known.was_reset()

    def use_record(self, told: Inflight, fd: Fd) -> None:
        """Record the requests in flight there, and take up those that are recorded."""
        if any(ring.attached for ring in self.rings.values()):
            raise RequestRefused("SET_INFLIGHT_FD: rings are started")
        self.record.use(told, fd)

    def share_pool(self) -> None:
        with_pump = [ring for ring in self.rings.values() if ring.pump is not None]
        self._pool.share(self.back, with_pump)

    # The device's internal state.

    def transfer_state(self, state: DeviceState, fds: list[Fd]) -> None:
        """Begin to carry the state between the front's pipe and one of ours."""
        if any(ring.attached for ring in self.rings.values()):
            raise RequestRefused("SET_DEVICE_STATE_FD: rings are started")
        if self.away:
            raise RequestRefused("SET_DEVICE_STATE_FD: the back-end is away")
        self._transfer.begin(state, fds.pop(), self.peer)

    def check_state(self) -> None:
        """Wait for the end of the transfer, and let the back say if all of it came."""
        self._transfer.check(self.config.timeout, self.peer)

    # Between messages.

    def look(self, ready: set[int]) -> None:
        """See to messages of the back that have come on these descriptors, to the
        signals of the workers, and to all that is due by now.
        """
        try:
            self._look(ready)
        except BackLost as lost:
            self.lose_back(lost)

    def _look(self, ready: set[int]) -> None:
        if self._back is not None:
            self._back.look(ready)
        if self.away:
            self._look_for_back()
        drain(self.events)
        for ring in self.rings.values():
            ring.check()
            ring.tell_waiting()
        self.dirty_log.look(ring.pump for ring in self.rings.values() if ring.pump)
        self._trial.look()
        if self._back is not None and self._back.settled:
            self._pool.look(self._back)

    def next_look(self) -> float | None:
        """Milliseconds until look() has something to do by itself; None: it has not."""
        tell_at = min((ring.tell_at for ring in self.rings.values()), default=math.inf)
        found = [max(0.0, tell_at - time.monotonic()), self._trial.wait()]
        if self._back is not None and self._back.settled:
            waits = (self._back.next_look(), self._pool.next_look(self._back))
            found += [wait for wait in waits if wait is not None]
        if self.away:
            found.append(self._recovery.wait())
        wait = min(found)
        return wait * 1000 if wait < math.inf else None

    def counters(self) -> dict[str, dict[str, int]]:
        """The numbers of each ring, by its own, of the workers and of the pool.

        Any thread may ask at any time: it reads, and looks at each thing once.
        """
        found = {
            f"ring {ring.index}": ring.counters()
            for ring in self._rings_in_order()
            if ring.pump is not None
        }
        found |= self.workers.counters()
        found["backend"] = self._recovery.counters() | {
            "swaps": self._swaps,
            "paused": int(self._paused * 1e9),
        }
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
        """The state of each ring, by its number, and its fault. Any thread may ask."""
        return {
            f"ring {ring.index}": ring.condition() for ring in self._rings_in_order()
        }

    def _rings_in_order(self) -> list[Ring]:
        return sorted(self.rings.values(), key=lambda ring: ring.index)

    def close(self, *, keep_back: bool = False) -> Back | None:
        """Let go of everything; return the back, if it is to be kept and can be.

        A worker that does not come to rest, since the system keeps it from that, keeps
        its memory: that stays mapped, and nothing of the session can be given back.
        """
        self.front_requests.close()
        self._transfer.close()
        try:
            with self.workers.pause():
                pass
        except DeadlineExceeded as error:
            self.log.error(
                "%s: its memory, rings and descriptors stay as they are", error
            )
            _never_closed.append(self)
            return None
        back, self._back = self._back, None
        for ring in self.rings.values():
            ring.abandon()
        keep = keep_back and not sum(ring.quarantined for ring in self.rings.values())
        self.workers.close()
        for ring in self.rings.values():
            ring.close()
        # Sessions are parts of cycles: the pool has a descriptor, and shall not wait
        # for the garbage collector.
        self.rings.clear()
        self.record.close()
        self.dirty_log.close()
        self.memory.close()
        self._events.close()
        if back is None:
            return None
        if keep:
            back.memory.forget_rings()
            return back
        back.close()
        return None

    def on_config_change(self) -> None:
        """The back says that its configuration space has changed."""
        self.known.config_changed()
        self.front_requests.config_changed(self.protocol_features)


_never_closed: list[Device] = []
"""Devices whose worker hangs in the system."""
