# SPDX-License-Identifier: Apache-2.0
"""Tight and rough conditions, through the airlock only: a direct back-end may die."""

from functools import partial
from pathlib import Path

import pytest

from tests.real.storage import Disk

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
