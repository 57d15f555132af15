# SPDX-License-Identifier: Apache-2.0
"""Gives an airlock a hostile back-end, and judges the harm that its guest suffers.

In the hostile session another ring must still complete requests, and the attacked one
again when it is set up anew; guest memory outside of requests must not change. The
next session, with a back-end that behaves, must be served, and its data must be right.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import Disconnected
from ..peers.disk import SECTOR, BlkType
from ..peers.events import clear
from ..peers.guest import BlkGuest
from ..peers.ram import MIB, PAGE, GuestRam
from ..vhost.wire import ProtocolFeature
from .back_scene import BackScene, HostileBack
from .catalogue import Attack, Outcome, Verdict
from .driving import await_done, connected
from .front_judge import FAILURES, PAUSE, is_set, outcomes
from .guest_scene import SETTLE
from .program import Program

QUEUE_SIZE = 16
BUFFERS = 8


class Harmed(Exception):
    """Guest memory changed outside of requests, or has wrong data."""


class WatchedGuest:
    """A guest that knows every byte of its memory outside of writable buffers."""

    def __init__(self, path: str, timeout: float) -> None:
        self.timeout = timeout
        ram = GuestRam(MIB, 4 * MIB)
        try:
            for mapped in ram.regions:
                mapped.view[:] = os.urandom(64 << 10) * (len(mapped.view) >> 16)
            self.guest = connected(
                path,
                queue_size=QUEUE_SIZE,
                timeout=timeout,
                ram=ram,
                also=[ProtocolFeature.BACKEND_REQ],
            )
        except BaseException:
            ram.close()
            raise
        # The driver's own memory lies before all that is allocated from now on.
        first = min(queue.ring_addr for queue in self.guest.queues)
        end = ram.alloc(PAGE)
        self._buffers = [ram.alloc(PAGE) + 1024 for _ in range(BUFFERS)]
        self._free = list(self._buffers)
        self._open = [(first, end), *((at, at + SECTOR) for at in self._buffers)]
        self._before = self._rest()

    def _rest(self) -> list[bytes]:
        """Return all memory but buffers that the device may write."""
        copies = []
        for mapped in self.guest.ram.regions:
            copy = bytearray(mapped.view)
            start = mapped.region.guest_addr
            for at, end in self._open:
                if start <= at < start + len(copy):
                    copy[at - start : end - start] = bytes(end - at)
            copies.append(bytes(copy))
        return copies

    def check(self) -> None:
        """Raise `Harmed` if memory outside of those buffers has changed."""
        if self._rest() != self._before:
            raise Harmed("guest memory was changed where no request is")

    def submit(self, index: int) -> None:
        """Offer a read, and do not wait for it."""
        self.guest.queues[index].submit(BlkType.IN, 0, [(self._take(), SECTOR)])
        self.guest.queues[index].kick()

    def _take(self) -> int:
        """Return the buffer that has been unused for the longest time."""
        at = self._free.pop(0)
        self._free.append(at)
        return at

    def transfer(
        self, index: int, kind: BlkType, sector: int, data: bytes = b""
    ) -> bytes:
        """Do one request, and wait for it."""
        at = self._take()
        view = self.guest.ram.view(at, SECTOR)
        view[:] = data or bytes(SECTOR)
        queue = self.guest.queues[index]
        io = queue.submit(kind, sector, [(at, SECTOR)])
        await_done(self.guest, queue, io, self.timeout)
        return bytes(view)

    def verify(self) -> None:
        """Write to the disk on each ring, and read it back."""
        for queue in self.guest.queues:
            data = os.urandom(SECTOR)
            self.transfer(queue.index, BlkType.OUT, 1 + queue.index, data)
            if self.transfer(queue.index, BlkType.IN, 1 + queue.index) != data:
                raise Harmed("other bytes were read than were written")

    def close(self) -> None:
        self.guest.close()


def run(
    program: Program, attacks: Sequence[Attack[BackScene]], path: str
) -> Iterator[Outcome]:
    """Run attacks one after the other, as the back-end at a path."""
    with HostileBack(path) as back, program:
        yield from outcomes(
            program, attacks, lambda attack: _judge(program, back, attack)
        )


def _judge(
    program: Program, back: HostileBack, attack: Attack[Any]
) -> tuple[Verdict, str]:
    back.attack = None
    try:
        program.ensure()
    except FAILURES as error:
        return Verdict.NOT_RUN, str(error)
    back.attack = attack
    try:
        verdict, why = _hostile_session(program)
    except Harmed as error:
        verdict, why = Verdict.GUEST_HARMED, str(error)
    back.attack = None
    worse, reason = _next_session(program)
    return max((verdict, why), (worse, reason), key=lambda found: found[0])


def _hostile_session(program: Program) -> tuple[Verdict, str]:
    try:
        watched = WatchedGuest(program.path, program.timeout)
    except FAILURES as error:
        return Verdict.CONNECTION_LOST, str(error)
    guest = watched.guest
    try:
        verdict, why = _both_rings(watched, guest)
        watched.check()
    finally:
        watched.close()
    return verdict, why


def _both_rings(watched: WatchedGuest, guest: BlkGuest) -> tuple[Verdict, str]:
    try:
        guest.start()
        end = time.monotonic() + SETTLE
        for _ in range(3):
            watched.submit(0)
        while time.monotonic() < end:
            for queue in guest.queues[1:]:
                watched.transfer(queue.index, BlkType.IN, 0)
            guest.front.barrier()
        stopped = is_set(guest.queues[0].err_fd.fileno())
        guest.stop()
        watched.check()
    except FAILURES as error:
        return Verdict.CONNECTION_LOST, str(error)
    time.sleep(PAUSE)  # for writes after the stop
    watched.check()
    try:
        clear(guest.queues[0].err_fd)
        guest.queues[0].reset()
        guest.start()
        for queue in guest.queues:
            watched.transfer(queue.index, BlkType.IN, 0)
        guest.stop()
    except Disconnected as error:
        return Verdict.CONNECTION_LOST, f"set up anew: {error}"
    except FAILURES as error:
        return Verdict.RING_LOST, f"set up anew: {error}"
    return (Verdict.RING_STOPPED if stopped else Verdict.HELD), ""


def _next_session(program: Program) -> tuple[Verdict, str]:
    """With a back-end that behaves."""
    deadline = time.monotonic() + program.timeout
    while True:
        try:
            watched = WatchedGuest(program.path, program.timeout)
            try:
                watched.guest.start()
                watched.verify()
                watched.guest.stop()
                watched.check()
            finally:
                watched.close()
            return Verdict.HELD, ""
        except Harmed as error:
            return Verdict.GUEST_HARMED, str(error)
        except FAILURES as error:
            failure = error
        if program.gone:
            return Verdict.PROCESS_GONE, program.ending()
        if time.monotonic() > deadline:
            return Verdict.HANGS, f"a new connection: {failure}"
        time.sleep(PAUSE)
