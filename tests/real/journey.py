# SPDX-License-Identifier: Apache-2.0
"""A guest that moves from place to place, with a disk and a shared folder in use.

A place has back-ends of its own, on the same image and folder as all the others.

Some of the guest's pages only the disk writes, for the kernel does not clear those that
it allocates. Stores to a used ring that are not logged can't be seen here: QEMU marks
all of the ring when it stops a device.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.guest import devices
from tests.guest.inside import cached, files, load, pages
from tests.guest.machine import Guest
from tests.guest.migration import Migration
from tests.real.airlock import airlock
from tests.real.backends import virtiofsd
from tests.real.processes import Process
from tests.real.programs import Programs
from tests.real.storage import Disk, storage_daemon

MIB = 1 << 20
CPUS = 1
"""So that an emulated guest leaves something to the others."""
SEED = 7
BOOT_WORDS = "init_on_alloc=0"
CACHED_AT, CACHED = 16, 8
"""A part of the disk that is not zeros, and that nobody writes: where, and its size, in
MiB.
"""
WITHHELD = "--withhold-features=0x4000"
"""WRITE_ZEROES, which the guest does without from its start on."""
HANDLES = ("--migration-mode=file-handles", "--modcaps=+dac_read_search")
"""virtiofsd finds a file without a name at the destination only by its handle."""


class Place:
    """Back-ends, maybe airlocks, and a QEMU in which the guest is, or will be."""

    def __init__(
        self, journey: Journey, via: str, source: Guest | None, *options: str
    ) -> None:
        journey.places += 1
        self.folder = journey.folder / f"{journey.places}"
        self.folder.mkdir()
        self.options = options
        """Of the disk's airlock."""
        self.disk_airlock: Process | None = None
        programs = journey.programs
        locking = "auto" if source is None else "off"
        image = Disk(journey.image, queues=CPUS, locking=locking)
        with ExitStack() as stack:
            disk = self.folder / "disk.sock"
            stack.enter_context(storage_daemon(programs, image, disk))
            share = self.folder / "fs.sock"
            fs = virtiofsd(programs, journey.share, share, *HANDLES)
            stack.enter_context(fs)
            if via == "airlock":
                self.airlocks = stack.enter_context(ExitStack())
                self.start_disk_airlock()
                disk = self.disk_front
                front = self.folder / "fs.front"
                stack.enter_context(airlock(share, front, "--device-type=fs"))
                share = front
            self.guest = stack.enter_context(
                Guest(
                    programs,
                    self.folder,
                    devices.disk(disk, reconnect=True),
                    devices.file_system(share, "share"),
                    devices.FIO,
                    cpus=CPUS,
                    memory="384M",
                    boot_words=BOOT_WORDS,
                    source=source,
                )
            )
            self._stack = stack.pop_all()

    @property
    def disk_front(self) -> Path:
        return self.folder / "disk.front"

    def start_disk_airlock(self) -> None:
        back = self.folder / "disk.sock"
        options = ("--device-type=block", *self.options)
        proxy = airlock(back, self.disk_front, *options)
        self.disk_airlock = self.airlocks.enter_context(proxy)

    def kill_disk_airlock(self) -> None:
        """As by SIGKILL, and start it again."""
        assert self.disk_airlock is not None
        self.disk_airlock.kill()
        self.airlocks.close()
        self.start_disk_airlock()

    def close(self) -> None:
        self.guest.kill()
        self._stack.close()


class Journey:
    """A guest, at a place."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.programs = programs
        self.folder = folder
        self.share = folder / "share"
        self.share.mkdir()
        self.image = folder / "disk.img"
        content = random.Random(SEED).randbytes(CACHED * MIB)
        self.cached = zlib.crc32(content)
        with self.image.open("wb") as file:
            file.seek(CACHED_AT * MIB)
            file.write(content)
            file.truncate(64 * MIB)
        self.places = 0
        self.lost = False
        """The guest has ended, for a test has failed."""
        self.place = Place(self, "airlock", None, WITHHELD)
        try:
            self._set_out()
        except BaseException:
            self.place.close()
            raise

    def _set_out(self) -> None:
        guest = self.guest
        guest.sh("mount -t virtiofs share /mnt && mkdir /mnt/held")
        guest.call(files.hold, "/mnt/held", True)
        guest.call(load.keep, SEED)
        guest.call(load.start, CPUS)
        guest.call(pages.start)

    def end(self) -> None:
        """Check once more, and switch the guest off."""
        self.check()
        assert self.guest.call(load.stop) >= 1
        self.guest.power_off()

    def lose(self) -> None:
        self.lost = True
        self.guest.kill()

    def close(self) -> None:
        self.place.close()

    @property
    def guest(self) -> Guest:
        return self.place.guest

    @contextmanager
    def moving(
        self, via: str = "airlock", *options: str
    ) -> Iterator[tuple[Place, Migration]]:
        """Begin to move to a new place, in the middle of all work."""
        there = Place(self, via, self.guest, *options)
        try:
            path = self.folder / "migration"
            with Migration(self.guest, there.guest, path) as moving:
                yield there, moving
        except BaseException:
            there.close()
            raise

    def arrive(self, there: Place) -> None:
        self.place.close()
        self.place = there
        self.check()

    def stay(self, there: Place) -> None:
        """The other place is of no use any more."""
        there.close()
        self.check()

    def check(self) -> None:
        """All is right, and goes on, in the guest."""
        self.guest.call(pages.check, SEED)
        self.guest.call(pages.start)
        self.guest.call(files.check_held)
        assert self.guest.call(cached.read, CACHED_AT, CACHED) == self.cached
        self.guest.call(load.go_on)
