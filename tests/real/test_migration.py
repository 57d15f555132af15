# SPDX-License-Identifier: Apache-2.0
"""A guest moves from one QEMU to another, with a disk and a shared folder in use.

Each place has back-ends of its own, on the same image and folder, and QEMU reaches them
directly or through airlocks. After each move, all of the guest's memory is compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.devices import Device
from tests.guest.inside import files, load, pages
from tests.guest.machine import Guest
from tests.guest.migration import Migration, move_by_file, wait_for
from tests.real.airlock import airlock
from tests.real.backends import virtiofsd
from tests.real.processes import Process
from tests.real.programs import Programs, new_folder
from tests.real.storage import Disk, storage_daemon
from tests.support.profiles import STRESS
from vhost_airlock.vhost.wire import Feature

MIB = 1 << 20
CPUS = 1
"""So that an emulated guest leaves something to the others."""
LOAD = Device((), (), ("/usr/bin/fio",))
SEED = 7
ROUNDS = 50 if STRESS else 1
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
                    LOAD,
                    cpus=CPUS,
                    memory="384M",
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
        with self.image.open("wb") as file:
            file.truncate(64 * MIB)
        self.places = 0
        self.place = Place(self, "airlock", None, WITHHELD)

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
        self.guest.call(load.go_on)


@pytest.fixture(scope="module")
def journey(programs: Programs) -> Iterator[Journey]:
    """One guest for all tests. Each leaves it somewhere, at its work."""
    with new_folder() as folder:
        journey = Journey(programs, folder)
        guest = journey.guest
        guest.sh("mount -t virtiofs share /mnt && mkdir /mnt/held")
        guest.call(files.hold, "/mnt/held", True)
        guest.call(load.keep, SEED)
        guest.call(load.start, CPUS)
        guest.call(pages.start)
        try:
            yield journey
            journey.check()
            assert journey.guest.call(load.stop) >= 1
            journey.guest.power_off()
        finally:
            journey.place.close()


@pytest.mark.parametrize("number", range(ROUNDS))
def test_there_and_back(journey, number):
    """From an airlock to a direct place, to another one, and back behind an airlock."""
    for via in ("direct", "direct", "airlock"):
        with journey.moving(via) as (there, moving):
            journey.guest.call(pages.go_on)
            moving.finish()
        journey.arrive(there)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_airlock_is_killed_in_the_middle(journey, end):
    """And is started again. QEMU connects again, and the migration goes on.

    The place to go to lacks the feature that the guest does without.
    """
    with journey.moving("airlock", WITHHELD) as (there, moving):
        (journey.place if end == "source" else there).kill_disk_airlock()
        journey.guest.call(pages.go_on)
        moving.finish()
    journey.arrive(there)


def test_cancelled(journey):
    with journey.moving() as (there, moving):
        moving.cancel()
    journey.stay(there)


def test_destination_dies(journey):
    with journey.moving() as (there, _):
        there.guest.kill()
    wait_for(journey.guest, "failed")
    journey.stay(there)


def test_destination_lacks_a_feature_that_the_guest_uses(journey):
    """QEMU says so, and which ones are there."""
    with journey.moving("airlock", "--withhold-features=EVENT_IDX") as (there, moving):
        moving.let_fail()
    said = there.guest.output()
    found = re.search(r"Features 0x\w+ unsupported. Allowed features: 0x(\w+)", said)
    assert found, said
    assert not int(found[1], 16) & Feature.EVENT_IDX
    journey.stay(there)


def test_saved_in_a_file(journey):
    """As virsh save does."""
    there = Place(journey, "airlock", journey.guest)
    try:
        move_by_file(journey.guest, there.guest, journey.folder / "saved")
    except BaseException:
        there.close()
        raise
    journey.arrive(there)
