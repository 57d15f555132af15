# SPDX-License-Identifier: Apache-2.0
"""A ring with all that belongs to it: the front's side, the pump, the back's side.

It is made when the front first speaks of it. When it starts, the pump takes both
sides; when it stops, what is in flight is waited for, and what the back has not taken
is the guest's again. Between, the worker runs it and this module is not involved.
"""

from __future__ import annotations

import contextlib
import logging
import select
import time
from collections import Counter
from dataclasses import dataclass

from ..dataplane.pump import BACK_SIGNALLED, Pump, area_bytes
from ..dataplane.worker import Worker
from ..errors import RequestRefused, SessionError
from ..vhost.fds import Fd, HasFileno, drain, eventfd, notify
from ..vhost.wire import Feature, VringAddr
from .back import Back
from .front_memory import FrontMemory
from .state import Vring

log = logging.getLogger(__name__)

QUIET = 0.1
"""Seconds without a completion after which a back that does not tell how far it has
fetched is asked to stop."""
MRG_RXBUF = 1 << 15
"""VIRTIO_NET_F_MRG_RXBUF: a packet may be in several chains, which the guest must see
all at once (virtio 1.3, 5.1.6.4). Another device's feature of this number costs speed
at most."""
TICK = 0.002
"""Seconds between looks at a ring whose back signals no completions any more."""


@dataclass(slots=True)
class FrontFds:
    """The eventfds that the front sent for a ring."""

    kick: Fd | None = None
    call: Fd | None = None
    err: Fd | None = None

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            if fd is not None:
                fd.close()
        self.kick = self.call = self.err = None


class Ring:
    """One ring of a session. `events` is what the worker signals."""

    def __init__(self, index: int, worker: Worker, events: HasFileno) -> None:
        self.vring = Vring(index)
        self.front = FrontFds()
        self.worker = worker
        self.events = events
        self.pumps: list[Pump] = []
        """The one in use is the last; the back may still write to buffers of others."""
        self.kick = eventfd()
        self.call = eventfd()
        self.err = eventfd()
        """Ours for the back; signalled by it when it finds the ring broken."""
        self._told_fault = 0

    @property
    def index(self) -> int:
        return self.vring.index

    @property
    def pump(self) -> Pump | None:
        return self.pumps[-1] if self.pumps else None

    @property
    def attached(self) -> bool:
        return self.pump is not None and self.pump.attached

    @property
    def intact(self) -> bool:
        """Is it in use, and not broken?"""
        return self.pump is not None and self.pump.attached and not self.pump.fault

    @property
    def quarantined(self) -> int:
        """How many requests a stop left behind: the back may still write to them."""
        return sum(pump.quarantined for pump in self.pumps)

    def counters(self) -> dict[str, int]:
        """What was done since the ring was made, and what it holds now, by name.

        Any thread may ask.
        """
        total: Counter[str] = Counter()
        for pump in list(self.pumps):
            total.update(pump.counters())
        return dict(total)

    def condition(self) -> dict[str, object]:
        """What the front has made of it, and why it is broken. Any thread may ask."""
        pump = self.pump
        return {
            "phase": self.vring.phase.name.lower(),
            "fault": None if pump is None else pump.reason,
        }

    def set_guaranteed(self, size: int) -> None:
        """So much of the pool, in bytes, is this ring's; while no worker runs."""
        for pump in self.pumps:
            pump.set_guaranteed(size if pump is self.pump else 0)

    def locate(self, memory: FrontMemory) -> tuple[int, int, int] | None:
        """Return our addresses of descriptors, avail ring and used ring, if mapped."""
        found = [memory.find(address, size) for address, size in self.vring.parts()]
        desc, avail, used = found
        if desc is None or avail is None or used is None:
            return None
        if desc % 8 or avail % 2 or used % 4:
            raise RequestRefused(f"ring {self.index} is misaligned in its file")
        return desc, avail, used

    def start(
        self, back: Back, memory: FrontMemory, features: int, policy: str
    ) -> None:
        """Set up both sides and begin."""
        parts = self.locate(memory)
        if parts is None:
            raise RequestRefused(f"ring {self.index} is not in the guest's memory")
        size = self.vring.num
        fresh = self.pump is not None and self.pump.quarantined > 0
        area = back.memory.ring_area(self.index, area_bytes(size), fresh=fresh)
        if self.pump is None or fresh:
            pool = back.memory.pool
            self.pumps.append(Pump(self.index, memory.guest, pool, policy))
        pump = self.pumps[-1]
        with self.worker.pause():
            pump.attach(
                size=size,
                base=self.vring.base,
                guest=parts,
                guest_event_idx=bool(features & Feature.EVENT_IDX),
                guest_indirect=bool(features & Feature.INDIRECT_DESC),
                shadow=area,
                shadow_event_idx=bool(back.features & Feature.EVENT_IDX),
                shadow_indirect=bool(back.features & Feature.INDIRECT_DESC),
                whole_batches=bool(features & MRG_RXBUF),
            )
        for fd in (self.kick, self.call, self.err):
            drain(fd)
        self._told_fault = 0
        back.start_ring(
            self.index, size, area[1], kick=self.kick, call=self.call, err=self.err
        )
        self.worker.watch(self.call.fileno())
        self.connect_fds()
        self.enable(back, self.vring.phase.enabled)
        # The specification wants a kick with the start, and rust-vmm needs it. It can
        # wait, if the back has seen to that; let it be the worker who does.
        with self.worker.pause():
            pump.kick()

    def enable(self, back: Back, enable: bool) -> None:
        """Take new chains from the guest, or only end what is in flight."""
        if self.pump is None:
            return
        if not enable:
            with self.worker.pause():
                self.pump.set_taking(False)
        back.enable_ring(self.index, enable)
        if enable:
            with self.worker.pause():
                self.pump.set_taking(True)

    def connect_fds(self) -> None:
        """Let the worker use the descriptors as they are now."""
        if self.pump is None or not self.pump.attached:
            return
        with self.worker.pause():
            self.pump.set_fds(
                kick_in=_number(self.front.kick),
                call_out=_number(self.front.call),
                kick_out=self.kick.fileno(),
                call_in=self.call.fileno(),
            )
            self.worker.add(self.pump)

    def replace_kick(self, fd: Fd) -> None:
        """The guest kicks here from now on. RequestRefused if one can't wait for it."""
        try:
            self.worker.watch(fd.fileno())
        except ValueError as error:
            fd.close()
            raise RequestRefused(f"SET_VRING_KICK: {error}") from None
        self._drop_kick()
        self.front.kick = fd
        self.connect_fds()

    def replace_call(self, fd: Fd | None) -> None:
        """The guest is called here from now on; None: never.

        Returns when the old one is not used any more. What was signalled there may have
        been missed, so the new one is signalled once.
        """
        old, self.front.call = self.front.call, fd
        self.connect_fds()
        if old is not None:
            old.close()
        if fd is not None and self.attached:
            _tell(fd)

    def replace_err(self, fd: Fd | None) -> None:
        """The front is told here when the ring breaks."""
        if self.front.err is not None:
            self.front.err.close()
        self.front.err = fd

    def set_address(self, addr: VringAddr, memory: FrontMemory) -> None:
        """The ring is there. If it is started it goes on there, or is left as it is."""
        old = self.vring.addr
        self.vring.set_addr(addr)
        if self.pump is None or not self.pump.attached:
            return
        try:
            parts = self.locate(memory)
            if parts is None:
                raise RequestRefused(
                    f"SET_VRING_ADDR: ring {self.index} is not in the guest's memory"
                )
        except RequestRefused:
            self.vring.addr = old
            raise
        with self.worker.pause():
            self.pump.move(parts)

    def relocate(self, memory: FrontMemory) -> None:
        """The guest's memory has changed; the worker must stand still.

        A ring that isn't there any more, or can't be used as it is there, is broken.
        """
        if self.pump is not None and self.pump.attached:
            try:
                parts = self.locate(memory)
            except RequestRefused:
                parts = None
            self.pump.move(parts)

    def quiesce(self) -> None:
        """Take nothing new from the guest; what is in flight goes on to end."""
        if self.pump is not None:
            with self.worker.pause():
                self.pump.set_taking(False)

    def stop(self, back: Back, deadline: float) -> int:
        """Stop the ring; return the base at which it can go on.

        Requests in flight have until `deadline`, of time.monotonic(), to end. After
        this, the memory of the guest's ring and of its requests is not touched.
        SessionError if no base can say which ones ended. Of a broken ring, then, those
        that did not are lost: the guest has to reset it, and no request is done twice.
        """
        pump = self.pump
        if pump is None or not pump.attached:
            return self.vring.base
        with self.worker.pause():
            pump.set_taking(False)
            pump.set_draining(True)
            self.worker.add(pump)
        broken = pump.fault
        if not broken:
            self._await_drained(pump, back, deadline)
        fetched = back.frontend.get_vring_base(self.index) & 0xFFFF
        if not broken:
            self._await_fetched(pump, fetched, deadline)
        return self._detach(pump, fetched)

    def abandon(self) -> None:
        """Let go of the ring without the back, which is gone."""
        if self.pump is not None and self.pump.attached:
            self._detach(self.pump, None)

    def check(self) -> str | None:
        """Return why the ring is broken, once; the front is told by its descriptor."""
        pump = self.pump
        if pump is None:
            return None
        if self.intact and drain(self.err):
            with self.worker.pause():
                pump.set_fault(BACK_SIGNALLED)
        if pump.fault in (0, self._told_fault):
            return None
        self._told_fault = pump.fault
        if self.front.err is not None:
            _tell(self.front.err)
        return pump.reason

    def close(self) -> None:
        """Give back all descriptors; the ring is stopped or abandoned."""
        self.front.close()
        for fd in (self.kick, self.call, self.err):
            fd.close()

    def _await_drained(self, pump: Pump, back: Back, deadline: float) -> None:
        """Wait until what the back has fetched is done, as far as it tells."""
        poll = select.poll()
        poll.register(self.events.fileno(), select.POLLIN)
        poll.register(back.frontend.fileno(), select.POLLRDHUP)
        quiet_since, seen = time.monotonic(), pump.outstanding
        while not pump.drained:
            now = time.monotonic()
            if pump.outstanding != seen:
                quiet_since, seen = now, pump.outstanding
            end = deadline if pump.tells else min(deadline, quiet_since + QUIET)
            if now >= end:
                return
            for fd, _ in poll.poll((end - now) * 1000):
                if fd == self.events.fileno():
                    drain(self.events)
                else:
                    raise SessionError("back: closed the connection")

    def _await_fetched(self, pump: Pump, fetched: int, deadline: float) -> None:
        """Wait until as much is done as the back says it has fetched.

        It does not signal completions any more, so they are looked for.
        """
        while True:
            with self.worker.pause():
                _, call, _ = pump.step()
                owed = pump.owes(fetched)
            if call and self.front.call is not None:
                _tell(self.front.call)
            done = owed == 0 or owed > pump.outstanding  # which can't be true
            if done or time.monotonic() >= deadline:
                return
            time.sleep(TICK)

    def _detach(self, pump: Pump, fetched: int | None) -> int:
        with self.worker.pause():
            broken = pump.fault
            done, unfinished, last = pump.detach(fetched)
            self.worker.remove(pump)
        self._drop_kick()
        self.worker.unwatch(self.call.fileno())
        if unfinished:
            log.warning(
                "ring %d: stopped with %d requests unfinished", self.index, unfinished
            )
            if last:
                done -= unfinished
            elif not broken and fetched is not None:
                raise SessionError(
                    f"ring {self.index}: {unfinished} requests did not end in time,"
                    " and later ones did: no base says that"
                )
        return (self.vring.base + done) & 0xFFFF

    def _drop_kick(self) -> None:
        if self.front.kick is not None:
            self.worker.unwatch(self.front.kick.fileno())
            self.front.kick.close()
            self.front.kick = None


def _tell(fd: Fd) -> None:
    """Signal a descriptor of the front's, if it is of a kind that can be signalled."""
    with contextlib.suppress(OSError):
        notify(fd)


def _number(fd: Fd | None) -> int:
    return -1 if fd is None else fd.fileno()
