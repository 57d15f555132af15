# SPDX-License-Identifier: Apache-2.0
"""A guest's disk under load while memory comes and goes, and more happens."""

import json
import os
from pathlib import Path

import pytest

from tests.guest import devices
from tests.guest.devices import Device
from tests.guest.inside import load, memory
from tests.guest.machine import Guest
from tests.real.processes import Process
from tests.real.storage import Disk
from vhost_airlock.peers.scan import mappings

MIB = 1 << 20
QUEUES = 4
IMAGE = 128 * MIB
FREE = 64 * MIB
"""From here on, fio does not use the disk."""
DIMM = 128 * MIB

MEMORY = Device(
    (
        *("-m", "slots=4,maxmem=2G"),
        *("-object", f"memory-backend-memfd,id=resizable,size={2 * DIMM},share=on"),
        "-device",
        "virtio-mem-pci,id=resized,memdev=resizable,dynamic-memslots=on",
    ),
    ("virtio_mem",),
)
LOAD = Device((), (), ("/usr/bin/fio", "/sbin/blkdiscard"))


def guest_memories(pid: int) -> int:
    """How many pieces of guest memory a process has mapped."""
    name = "memfd:memory-backend-memfd"
    return len({found.inode for found in mappings(pid) if found.name == name})


@pytest.fixture
def image(folder: Path) -> Path:
    """All ones, where fio does not write."""
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(FREE)
        file.seek(FREE)
        file.write(b"\xff" * (IMAGE - FREE))
    return path


def holes(image: Path, start: int, size: int) -> bool:
    """Is there nothing in this part of a file?"""
    with image.open("rb") as file:
        try:
            return os.lseek(file.fileno(), start, os.SEEK_DATA) >= start + size
        except OSError:
            return True


def test_disk_is_used_while_memory_and_disk_change(serve, programs, folder, via, image):
    served = serve(Disk(image, queues=QUEUES), "--workers=2", "--log-level=debug")
    mapped_by = (served.proxy or served.backend).pid
    disk = devices.disk(served.front)
    with Guest(
        programs,
        folder,
        *(disk, LOAD, MEMORY),
        cpus=QUEUES,
        memory="512M",
        boot_words="memhp_default_state=online_movable",
    ) as guest:
        guest.call(load.start, QUEUES)
        assert guest_memories(mapped_by) == 1

        # A memory module. Rounds of fio which begin now have their buffers there.
        before = guest.call(memory.total)
        guest.qmp(
            "object-add",
            qom_type="memory-backend-memfd",
            id="module",
            size=DIMM,
            share=True,
        )
        guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="module")
        guest.call(memory.wait_for_total, before + DIMM)
        assert guest_memories(mapped_by) == 2
        guest.call(memory.wait_for_use, 24 * MIB)
        pause(guest)
        guest.qmp("device_del", id="dimm")
        guest.qmp.wait_for("DEVICE_DELETED", device="dimm", timeout=60)
        guest.qmp("object-del", id="module")
        guest.call(memory.wait_for_total, before)
        assert guest_memories(mapped_by) == 1
        pause(guest)

        # Memory in small blocks.
        for size in (DIMM, 2 * DIMM, 0):
            guest.qmp("qom-set", path="resized", property="requested-size", value=size)
            guest.qmp.wait_for("MEMORY_DEVICE_SIZE_CHANGE", size=size, timeout=60)
            assert guest_memories(mapped_by) == (2 if size else 1)
            pause(guest)

        # Other requests than reads and writes.
        guest.call(load.discard, FREE, 16 * MIB)
        guest.call(load.zero, FREE + 16 * MIB, 16 * MIB)
        assert holes(image, FREE, 16 * MIB)

        # A change of the configuration space.
        for size in (2 * IMAGE, IMAGE):
            served.backend.qmp("block_resize", node_name="disk", size=size)
            guest.call(load.wait_for_size, size)
        guest.call(load.go_on)
        if via == "airlock":
            assert guest_memories(served.backend.pid) == 0
        assert guest.call(load.stop) >= 3
        guest.power_off()
    if served.proxy is not None:
        rings = counters(served.proxy)
        assert all(rings[f"ring {i}"]["completions"] > 100 for i in range(QUEUES))

    content = image.read_bytes()
    assert content[FREE : FREE + 32 * MIB] == bytes(32 * MIB)
    assert content[FREE + 32 * MIB :] == b"\xff" * (IMAGE - FREE - 32 * MIB)


def counters(proxy: Process) -> dict[str, dict[str, int]]:
    """The airlock's counters at the end of a session."""
    proxy.wait_until(lambda: "counters: " in proxy.output())
    line = proxy.output().split("counters: ")[1].splitlines()[0]
    found: dict[str, dict[str, int]] = json.loads(line)
    return found


def pause(guest: Guest) -> None:
    """Stop the machine and let it go on, a few times."""
    for _ in range(3):
        guest.call(load.busy)
        guest.qmp("stop")
        guest.qmp.wait_for("STOP")
        guest.qmp("cont")
        guest.qmp.wait_for("RESUME")
