# SPDX-License-Identifier: Apache-2.0
"""A disk that stands still for longer than a stop waits, and goes on after that.

qemu-storage-daemon answers GET_VRING_BASE at once, keeps what it has fetched, and
completes it in whatever ring it has then.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.guest import devices
from tests.guest.booted import booted
from tests.guest.inside import blocks
from tests.guest.machine import Guest
from tests.real.airlock import reach
from tests.real.programs import Programs, new_folder
from tests.real.stalling_nbd import NbdDisk, StallingNbd, stalling_nbd
from tests.real.storage import storage_daemon

COUNT = 80
"""Requests in flight, half of them reads."""
AT_ONCE = 16
"""How many of them qemu-storage-daemon has at the NBD server at once."""
OUT_OF_ORDER = (15, 2, 9, 4)
CPUS = 2
"""Of the guest, and queues of its disk."""


class Scene:
    """A guest with a disk that stalls."""

    def __init__(self, nbd: StallingNbd, guest: Guest) -> None:
        self.nbd = nbd
        self.guest = guest

    def stall(self, count: int, seed: int) -> None:
        """Let `count` requests be caught."""
        self.nbd.stall()
        self.guest.call(blocks.start, count, seed)
        self.nbd.wait_for_kept(min(count, AT_ONCE))

    def stop(self) -> None:
        self.guest.qmp("stop")
        self.guest.qmp.wait_for("STOP")

    def cont(self) -> None:
        self.guest.qmp("cont")
        self.guest.qmp.wait_for("RESUME")

    def finish(self, seed: int) -> None:
        assert self.guest.call(blocks.finish) == []
        blocks.check(self.nbd.content, COUNT, seed)


@pytest.fixture(scope="module", params=["direct", "airlock"])
def scene(request: pytest.FixtureRequest, programs: Programs) -> Iterator[Scene]:
    """One guest for all tests, each with a seed of its own."""
    with ExitStack() as stack:
        enter = stack.enter_context
        folder = enter(new_folder())
        path = folder / "nbd.sock"
        nbd = enter(stalling_nbd(path, blocks.image(COUNT)))
        disk = NbdDisk(server=path, queues=CPUS)
        _, back = enter(storage_daemon(programs, disk, folder / "back.sock"))
        front = enter(reach(request.param, back, "--drain-timeout=0.3"))
        guest = enter(booted(programs, folder, devices.disk(front), cpus=CPUS))
        yield Scene(nbd, guest)
        guest.power_off()


through_the_airlock = pytest.mark.parametrize("scene", ["airlock"], indirect=True)


def test_stop_and_cont_during_a_stall(scene):
    """Then all requests are done, the last one first."""
    scene.stall(COUNT, seed=1)
    scene.stop()
    scene.cont()
    scene.nbd.go_on()
    scene.finish(seed=1)


def test_stop_and_cont_with_later_requests_done(scene):
    """No base says which requests are not done."""
    scene.stall(COUNT, seed=2)
    for turn in range(1, 4):
        scene.nbd.let_go(OUT_OF_ORDER)
        scene.guest.call(blocks.wait_for, COUNT - turn * len(OUT_OF_ORDER))
        scene.stop()
        scene.cont()
    scene.nbd.go_on()
    scene.finish(seed=2)


@through_the_airlock
def test_disk_goes_on_while_its_guest_is_stopped(scene):
    """Some requests are done in the first stop, and the others in the second one.

    Through the airlock only: a direct qemu-storage-daemon ends the connection ("Error
    writing eventfd"), for it has no call descriptor then.
    """
    scene.stall(COUNT, seed=3)
    scene.stop()
    scene.nbd.let_go(OUT_OF_ORDER)
    scene.nbd.wait_for_kept(AT_ONCE)
    scene.cont()
    scene.guest.call(blocks.wait_for, COUNT - len(OUT_OF_ORDER))
    scene.stop()
    scene.nbd.go_on()
    scene.nbd.wait_for_done(COUNT)
    scene.cont()
    scene.finish(seed=3)


@through_the_airlock
def test_reboot_during_a_stall(scene):
    """Requests of before the reboot are done after those of the system that boots.

    Through the airlock only: nothing keeps a direct back-end from writing them to the
    memory of that system.
    """
    few = AT_ONCE // 2
    scene.stall(few, seed=4)
    reboot = scene.guest.begin_reboot()
    scene.nbd.wait_for_kept(few + 1)
    scene.nbd.go_on()
    reboot.result()
    scene.stall(COUNT, seed=5)
    scene.nbd.go_on()
    scene.finish(seed=5)
