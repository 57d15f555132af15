# SPDX-License-Identifier: Apache-2.0
"""A back-end that is started after its front-end, or is away when one comes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.guest import devices
from tests.guest.inside import disk
from tests.guest.machine import Guest
from tests.real.airlock import airlock
from tests.real.processes import Process
from tests.real.storage import Disk, storage_daemon

MIB = 1 << 20


def wait_for_a_front(proxy: Process, times: int = 1) -> None:
    """Until so many front-ends have come, and found the back-end away."""
    proxy.wait_until(lambda: proxy.output().count("trying again") >= times)


def make_image(folder: Path) -> Path:
    image = folder / "disk.img"
    image.write_bytes(bytes(64 * MIB))
    return image


def test_libblkio_finds_a_back_end_that_comes_later(programs, drive, folder):
    """At first, and each time after it was away; libblkio itself tries but once."""
    back, front = folder / "back.sock", folder / "front.sock"
    image = make_image(folder)
    with airlock(back, front) as proxy:
        for turn in range(1, 4):
            with drive.start(front, "verify", qd=8, seed=turn) as program:
                wait_for_a_front(proxy, turn)
                assert not program.ended(), program.describe()
                with storage_daemon(programs, Disk(image), back):
                    assert program.wait(timeout=100) == 0, program.describe()


def test_guest_boots_before_its_back_end(programs, folder):
    back, front = folder / "back.sock", folder / "front.sock"
    image = make_image(folder)
    with airlock(back, front) as proxy, ThreadPoolExecutor(1) as pool:
        boots = pool.submit(Guest, programs, folder, devices.disk(front))
        wait_for_a_front(proxy)
        with storage_daemon(programs, Disk(image), back), boots.result() as guest:
            guest.call(disk.fill)
            guest.call(disk.check)
            guest.power_off()
