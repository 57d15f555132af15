# SPDX-License-Identifier: Apache-2.0
"""Tight and rough conditions, through the airlock only: a direct back-end may die."""

from functools import partial
from pathlib import Path

import pytest

from tests.real.storage import Disk
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.ram import GuestRam

MIB = 1 << 20


@pytest.fixture
def via() -> str:
    return "airlock"


@pytest.fixture
def disk(folder) -> Disk:
    image = folder / "disk.img"
    image.write_bytes(bytes(32 * MIB))
    return Disk(image, queues=2)


@pytest.mark.parametrize("option", ["--pool-limit=4M", "--poll-us=200"])
def test_data_survives(serve, drive, disk, option):
    """Far more in flight than the pool has room for; polling instead of sleeping."""
    served = serve(disk, option)
    drive.run(served.front, "verify", queues=2, qd=32, queue_size=1024)


@pytest.mark.parametrize(
    ("size", "queues", "options"),
    [(300, 1, []), (8, 1, ["--pool-limit=4M"]), (129, 4, [])],
    ids=["defaults", "small pool", "four queues"],
)
def test_one_request_larger_than_its_share_of_the_pool(
    serve, folder, size, queues, options
):
    """As firmware reads a boot image; two in a row, and others beside."""
    image = folder / "image.img"
    with image.open("wb") as file:
        for mebibyte in range(size):
            file.seek(mebibyte * MIB)
            file.write(mebibyte.to_bytes(4, "little"))
        file.truncate(size * MIB)
    served = serve(Disk(image, queues=queues), *options)
    with BlkGuest(ram=GuestRam(MIB, (2 * size + 16) * MIB), num_queues=queues) as guest:
        guest.connect(str(served.front))
        guest.start()
        for _ in range(2):
            buffer = guest.ram.alloc(size * MIB - 4096)
            guest.read(0, [(buffer, size * MIB - 4096)])
            marks = [
                int.from_bytes(guest.ram.view(buffer + number * MIB, 4), "little")
                for number in range(size)
            ]
            assert marks == list(range(size))
            guest.read(0, [(guest.ram.alloc(4096), 4096)])
        guest.stop()


def moved(pid: int, goal: int) -> bool:
    return io_bytes(pid) >= goal


def io_bytes(pid: int) -> int:
    """How much a process has read and written so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    counts = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return counts["rchar"] + counts["wchar"]


@pytest.mark.parametrize("mode", ["randread", "randwrite"])
def test_front_end_killed_under_load(serve, drive, disk, mode):
    """Requests are in flight each time; back-end and airlock serve the next front-end.

    qemu-storage-daemon aborts when a connection goes away under it with requests in
    flight, so the airlock must have waited for them.
    """
    served = serve(disk)
    for _ in range(5):
        options = {"queues": 2, "qd": 64, "bs": 65536, "queue_size": 1024}
        with drive.start(served.front, mode, **options) as front_end:
            goal = io_bytes(served.backend.pid) + MIB
            front_end.wait_until(partial(moved, served.backend.pid, goal))
            front_end.kill()
    drive.run(served.front, "verify", queues=2, qd=8)
