# SPDX-License-Identifier: Apache-2.0
"""Guests that go on where another one has booted, which takes a tenth of the time.

with booted(programs, folder, devices.disk(front), cpus=2) as guest:
    guest.sh("mkfs.ext4 /dev/vda")

A guest without devices boots once for all tests, and QEMU saves it in a file. Guests
that load this file find their devices when they look at the PCI bus again. No firmware
has used these devices before: tests that are about a boot make a Guest.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from pathlib import Path

from tests.guest.devices import FIO, Device
from tests.guest.inside.agent import settle
from tests.guest.machine import BOOT_WORDS, CPU, Guest, initramfs_for
from tests.guest.migration import tell_events, wait_for
from tests.real.programs import Programs, new_folder

ALL = Device(
    (),
    ("virtio_blk", "ext4", "virtiofs", "virtio_net"),
    ("/sbin/mke2fs", "/sbin/e2fsck", "/sbin/sfdisk"),
)
"""Drivers and tools for every device but vsock, with which QEMU waits for no state."""
WITH_FIO = Device((), ALL.modules, (*ALL.tools, *FIO.tools))
"""The same with fio, whose libraries take 70 MB of the guest's memory."""


def booted(
    programs: Programs,
    folder: Path,
    *devices: Device,
    cpus: int = 1,
    fio: bool = False,
) -> Guest:
    """Return a guest with these devices, ready for calls."""
    has, memory = (WITH_FIO, "384M") if fio else (ALL, "256M")
    state = _state(programs, has, cpus, memory)
    guest = Guest(programs, folder, *devices, cpus=cpus, memory=memory, waits=True)
    try:
        tell_events(guest)
        guest.qmp("migrate-incoming", uri=f"file:{state}")
        wait_for(guest, "completed")
        guest.qmp("cont")
        guest.call(settle, time.time())
    except BaseException:
        guest.kill()
        raise
    return guest


def _state(programs: Programs, has: Device, cpus: int, memory: str) -> str:
    """The file with a booted guest, as the programs see it; it is made if need be."""
    kept = programs.path(f"{programs.cache}/guests")
    kept.mkdir(parents=True, exist_ok=True)
    name = f"{cpus}-{memory}"
    parts = [initramfs_for(programs, has), f"{CPU} {BOOT_WORDS}".encode()]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    file = kept / f"{name}-{digest}"
    with (kept / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests want it at the same time
        if not file.exists():
            for old in kept.glob(f"{name}-*"):
                old.unlink()
            _save(programs, has, cpus, memory, f"{programs.cache}/guests/{name}.new")
            (kept / f"{name}.new").rename(file)
    return f"{programs.cache}/guests/{file.name}"


def _save(programs: Programs, has: Device, cpus: int, memory: str, path: str) -> None:
    with (
        new_folder() as folder,
        Guest(programs, folder, has, cpus=cpus, memory=memory) as guest,
    ):
        tell_events(guest)
        guest.qmp("migrate", uri=f"file:{path}")
        wait_for(guest, "completed")
        guest.kill()
