# SPDX-License-Identifier: Apache-2.0
"""A Linux guest in QEMU on a real back-end, and its disk looked at from outside."""

import hashlib
import secrets
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.inside import disk
from tests.guest.machine import Guest
from tests.real.processes import run
from tests.real.storage import Disk
from tests.support.profiles import STRESS
from vhost_airlock.peers.scan import search


def files_on(programs, image: Path, folder: Path) -> dict[str, bytes]:
    """The files in the first partition of an image, by e2fsprogs."""
    partition = f"{image}?offset={disk.PARTITIONS[0]}"
    log = folder / "e2fs.log"
    run(programs("e2fsck", "-f", "-n", partition), log)
    copy = folder / "copy"
    copy.mkdir()
    run(programs("debugfs", "-R", f"rdump / {copy}", partition), log)
    return {
        str(path.relative_to(copy)): path.read_bytes()
        for path in copy.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("via", ["direct", "airlock"])
@pytest.mark.parametrize(
    ("cpus", "queue_size"), [(2, 1024), (1, 128)] if STRESS else [(2, 1024)]
)
def test_guest_keeps_a_file_system_over_a_reboot(
    serve, programs, folder, via, same_as_direct, cpus, queue_size
):
    """Meanwhile its command line must not be in the back-end's memory (I1)."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    served = serve(Disk(image, queues=4))
    marker = secrets.token_hex(16)
    device = devices.disk(served.front, queue_size=queue_size)
    words = f"marker={marker}"
    with Guest(programs, folder, device, cpus=cpus, boot_words=words) as guest:
        assert guest.call(disk.queues) == cpus
        guest.call(disk.fill)
        guest.reboot()
        assert guest.call(disk.queues) == cpus
        guest.call(disk.check)
        scan = search(served.backend.pid, [marker.encode()])
        assert bool(scan.found) == (via == "direct")
        guest.power_off()

    payload = disk.payload()
    assert image.read_bytes()[disk.PARTITIONS[1] :][: len(payload)] == payload
    files = files_on(programs, image, folder)
    second = {
        name.replace("small", "second"): data
        for name, data in disk.small_files().items()
    }
    assert files == disk.small_files() | disk.parallel_files() | second
    same_as_direct({name: hashlib.sha256(files[name]).digest() for name in files})
