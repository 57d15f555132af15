# SPDX-License-Identifier: Apache-2.0
"""A disk that stands still for longer than a stop waits, and goes on after that.

qemu-storage-daemon answers GET_VRING_BASE at once, keeps what it has fetched, and
completes it in whatever ring it has then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.guest import devices
from tests.guest.inside import blocks
from tests.guest.machine import Guest
from tests.real.airlock import reach
from tests.real.programs import Programs
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


@contextmanager
def scene(programs: Programs, folder: Path, via: str) -> Iterator[Scene]:
    path = folder / "nbd.sock"
    with (
        stalling_nbd(path, blocks.image(COUNT)) as nbd,
        storage_daemon(
            programs, NbdDisk(server=path, queues=CPUS), folder / "back.sock"
        ) as (_, back),
        reach(via, back, "--drain-timeout=0.3") as front,
        Guest(programs, folder, devices.disk(front), cpus=CPUS) as guest,
    ):
        yield Scene(nbd, guest)
        guest.power_off()


def test_stop_and_cont_during_a_stall(programs, folder, via):
    """Then all requests are done, the last one first."""
    with scene(programs, folder, via) as it:
        it.stall(COUNT, seed=1)
        it.stop()
        it.cont()
        it.nbd.go_on()
        it.finish(seed=1)


def test_stop_and_cont_with_later_requests_done(programs, folder, via):
    """No base says which requests are not done."""
    with scene(programs, folder, via) as it:
        it.stall(COUNT, seed=1)
        for turn in range(1, 4):
            it.nbd.let_go(OUT_OF_ORDER)
            it.guest.call(blocks.wait_for, COUNT - turn * len(OUT_OF_ORDER))
            it.stop()
            it.cont()
        it.nbd.go_on()
        it.finish(seed=1)


def test_disk_goes_on_while_its_guest_is_stopped(programs, folder):
    """Some requests are done in the first stop, and the others in the second one.

    Through the airlock only: a direct qemu-storage-daemon ends the connection ("Error
    writing eventfd"), for it has no call descriptor then.
    """
    with scene(programs, folder, "airlock") as it:
        it.stall(COUNT, seed=1)
        it.stop()
        it.nbd.let_go(OUT_OF_ORDER)
        it.nbd.wait_for_kept(AT_ONCE)
        it.cont()
        it.guest.call(blocks.wait_for, COUNT - len(OUT_OF_ORDER))
        it.stop()
        it.nbd.go_on()
        it.nbd.wait_for_done(COUNT)
        it.cont()
        it.finish(seed=1)


def test_reboot_during_a_stall(programs, folder):
    """Requests of before the reboot are done after those of the system that boots.

    Through the airlock only: nothing keeps a direct back-end from writing them to the
    memory of that system.
    """
    few = AT_ONCE // 2
    with scene(programs, folder, "airlock") as it:
        it.stall(few, seed=1)
        reboot = it.guest.begin_reboot()
        it.nbd.wait_for_kept(few + 1)
        it.nbd.go_on()
        reboot.result()
        it.stall(COUNT, seed=2)
        it.nbd.go_on()
        it.finish(seed=2)
