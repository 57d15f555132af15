"""A Linux guest in QEMU on a real back-end, and its disk looked at from outside."""

import hashlib
import random
import secrets
from pathlib import Path

import pytest

from tests.guest.machine import Guest
from tests.real.processes import run
from tests.real.storage import Disk
from vhost_airlock.peers.scan import search

PAYLOAD = random.Random("payload").randbytes(4 << 20)
PARTITION = 2048 * 512, 100352 * 512
"""Where the guest's two partitions begin; tests/guest/init makes them."""


def expected_files() -> dict[str, bytes]:
    """What the guest's init makes of the payload."""
    files = {"whole": PAYLOAD}
    for i in range(200):
        size = i * 37 + 1
        files[f"small/{i}"] = files[f"second/{i}"] = PAYLOAD[size : 2 * size]
    for i in range(4):
        files[f"parallel/{i}"] = PAYLOAD[i << 19 :][: 1 << 20]
    return files


def files_on(programs, image: Path, folder: Path) -> dict[str, bytes]:
    """The files in the first partition of an image, by e2fsprogs."""
    partition = f"{image}?offset={PARTITION[0]}"
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


@pytest.mark.parametrize(("cpus", "queue_size"), [(1, 128), (2, 1024)])
def test_guest_keeps_a_file_system_over_a_reboot(
    serve, programs, folder, via, same_as_direct, cpus, queue_size
):
    """Meanwhile its command line must not be in the back-end's memory (I1)."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    served = serve(Disk(image, queues=4))
    marker = secrets.token_hex(16)
    options = {"cpus": cpus, "queue_size": queue_size, "payload": PAYLOAD}
    options["boot_words"] = f"marker={marker}"
    with Guest(programs, folder, served.front, **options) as guest:
        guest.wait_for("ready", timeout=90)
        assert guest.said() == [
            f"queues {cpus}",
            "rebooting",
            f"queues {cpus}",
            "ready",
        ]
        scan = search(served.backend.pid, [marker.encode()])
        assert bool(scan.found) == (via == "direct")
        guest.answer()
        assert guest.wait(timeout=30) == 0
        assert guest.said()[-1] == "done"

    data = image.read_bytes()
    assert data[PARTITION[1] :][: len(PAYLOAD)] == PAYLOAD
    files = files_on(programs, image, folder)
    assert files == expected_files()
    same_as_direct({name: hashlib.sha256(files[name]).digest() for name in files})
