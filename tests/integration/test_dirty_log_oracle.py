# SPDX-License-Identifier: Apache-2.0
"""A VMM that migrates its guest all the time, under traffic: its copy is never stale.

It takes bits out of the dirty log at random moments, and copies the pages. It has
another log now and then, stops logging and begins again, stops the rings with requests
in flight and goes on. When rings are stopped, and the last bits are taken, the copy has
to be the same as the memory; and then nothing is written or marked.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, readable
from tests.support.dirty import PAGE, LogFile
from tests.support.profiles import RACE_SECONDS
from vhost_airlock.peers.disk import SECTOR, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue
from vhost_airlock.peers.ram import HIGH, MIB, GuestRam
from vhost_airlock.peers.ring import RingFull, SplitLayout
from vhost_airlock.record import replaced
from vhost_airlock.vhost.fds import drain
from vhost_airlock.vhost.wire import Feature, ProtocolFeature, VringFlag

ARENA = 2 * MIB
"""Bytes of guest memory that requests read into, each anywhere in it."""
LARGEST = 600 * 1024
SECTORS = 4 * MIB // SECTOR


class Traffic:
    """The guest's requests on one queue: of all sizes, in all kinds of chains."""

    def __init__(self, guest: BlkGuest, index: int, seed: int) -> None:
        self.ram: GuestRam = guest.ram
        self.queue: GuestQueue = guest.queues[index]
        self.chance = random.Random(seed)
        self.arena = guest.ram.alloc(ARENA)
        self.source = guest.ram.alloc(LARGEST)
        self.ram.view(self.source, LARGEST)[:] = self.chance.randbytes(LARGEST)
        self.ended = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guest")
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        queue = self.queue
        while not self._stop.is_set() or queue.pending:
            if not self._stop.is_set():
                with contextlib.suppress(RingFull):
                    for _ in range(self.chance.randint(1, queue.size // 2)):
                        self._submit()
                queue.kick()
            drain(queue.call_fd)
            if queue.driver.arm():
                done = queue.reap()
                self.ended += len(done)
                for io in done:
                    io.check()
            elif queue.pending:
                assert readable(queue.call_fd), "no completion comes"

    def _submit(self) -> None:
        chance = self.chance
        kind = chance.choice([BlkType.IN, BlkType.IN, BlkType.OUT])
        at = self.arena if kind is BlkType.IN else self.source
        room = ARENA if kind is BlkType.IN else LARGEST
        size = chance.choice([1, 1, 1, 2, 8, 9, 64, 1000]) * SECTOR
        if kind is BlkType.OUT:
            changed = at + chance.randrange(LARGEST - SECTOR)
            self.ram.view(changed, SECTOR)[:] = chance.randbytes(SECTOR)
        segments: list[tuple[int, int]] = []
        left = size // SECTOR
        while left:
            length = left * SECTOR
            if len(segments) < 13:
                length = chance.randint(1, left) * SECTOR
            start = at + chance.randrange(room - length + 1)
            segments.append((start, length))
            left -= length // SECTOR
        sector = chance.randrange(SECTORS - size // SECTOR + 1)
        indirect = chance.random() < 0.6 or len(segments) > 2
        self.queue.submit(kind, sector, segments, indirect=indirect)


class Migration:
    """The VMM's part: a log, and a copy of all memory that only devices write."""

    def __init__(self, guest: BlkGuest, traffic: list[Traffic]) -> None:
        self.guest = guest
        self.ram = guest.ram
        self.log = self._new_log()
        self.old: list[LogFile] = []
        self.pieces: dict[int, list[tuple[int, int]]] = {}
        for each in traffic:
            for start in range(each.arena, each.arena + ARENA, PAGE):
                self.pieces[start // PAGE] = [(start, PAGE)]
        for queue in guest.queues:
            layout = SplitLayout(queue.size)
            used = queue.ring_addr + layout.used
            assert used // PAGE == (used + layout.used_size - 1) // PAGE
            self.pieces[used // PAGE] = [(used, layout.used_size)]
        self.copy: dict[tuple[int, int], bytes] = {}
        self.looks = 0

    @staticmethod
    def _new_log() -> LogFile:
        return LogFile.up_to(HIGH + 192 * MIB, random.choice([0, 0, 5, 4096]))

    def begin(self) -> None:
        """Have stores logged, then copy all memory."""
        self._tell_log()
        self._switch(True)
        self._copy(set(self.pieces))

    def end(self) -> None:
        """Have none logged any more."""
        self._switch(False)
        self.log.take()

    def _tell_log(self) -> None:
        told = self.log.told
        self.guest.front.set_log_base(told.size, told.offset, self.log.fd)

    def _switch(self, on: bool) -> None:
        guest = self.guest
        if on:
            guest.features |= Feature.LOG_ALL
        else:
            guest.features &= ~Feature.LOG_ALL
        guest.front.set_features(guest.features)
        for queue in guest.queues:
            addr = queue.vring_addr(guest.ram)
            flags = VringFlag.LOG if on else 0
            guest.front.set_vring_addr(replaced(addr, flags=flags))

    def look(self) -> None:
        self._copy(self.log.take())

    def have_another_log(self) -> None:
        """The last log has all of its marks when the new one is in use."""
        last, self.log = self.log, self._new_log()
        self._tell_log()
        self._copy(last.take())
        self.old.append(last)

    def check_old_logs(self) -> None:
        for log in self.old:
            assert log.take() == set(), "marked in a log of before"
            assert log.intact()
            log.close()
        self.old.clear()

    def _copy(self, pages: set[int]) -> None:
        for page in pages & self.pieces.keys():
            for piece in self.pieces[page]:
                self.copy[piece] = bytes(self.ram.view(*piece))
        self.looks += 1

    def check_copy(self) -> None:
        """Rings are stopped, and the last bits taken."""
        for piece, copied in self.copy.items():
            assert self.ram.view(*piece) == copied, f"stale at {piece[0]:#x}"


@pytest.mark.parametrize("seed", [1, 2])
def test_the_copy_is_never_stale(seed: int) -> None:
    chance = random.Random(seed)
    airlock = Airlock(DiskBack(num_queues=2, sectors=SECTORS), workers=2)
    guest = BlkGuest(
        num_queues=2, queue_size=64, seg_max=16, also=[ProtocolFeature.LOG_SHMFD]
    )
    stops = 0
    with airlock, guest:
        guest.connect(airlock.channel())
        guest.start()
        traffic = [Traffic(guest, i, seed + i) for i in range(2)]
        vmm = Migration(guest, traffic)
        try:
            vmm.begin()
            end = time.monotonic() + RACE_SECONDS
            while time.monotonic() < end or stops < 4:
                time.sleep(chance.random() * 0.01)
                match chance.choice("lllllaaos"):
                    case "l":
                        vmm.look()
                    case "a":
                        vmm.have_another_log()
                    case "o":
                        vmm.end()
                        time.sleep(chance.random() * 0.005)
                        assert vmm.log.take() == set(), "marked though it is off"
                        vmm.begin()
                    case "s":
                        guest.stop()
                        vmm.look()
                        time.sleep(chance.random() * 0.005)
                        vmm.check_copy()
                        assert vmm.log.take() == set(), "marked though rings stand"
                        guest.start()
                        vmm.begin()
                        stops += 1
                vmm.check_old_logs()
        finally:
            for each in traffic:
                each.stop()
        guest.stop()
        vmm.look()
        vmm.check_copy()
        assert all(each.ended > stops for each in traffic)
        for name, ring in airlock.session.device.counters().items():
            if name.startswith("ring"):
                assert ring["unlogged"] == ring["faults"] == 0
        guest.disconnect()
        vmm.check_old_logs()
        vmm.log.close()
