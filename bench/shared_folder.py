# SPDX-License-Identifier: Apache-2.0
"""A guest's shared folder: virtiofsd, and a guest under QEMU's own emulation.

The emulated guest takes most of the time, so the cost of an airlock shows less here
than it would under KVM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.extras import Figure, way_to
from bench.runs import MIB
from tests.guest import devices
from tests.guest.inside import speed
from tests.guest.machine import Guest
from tests.real.backends import virtiofsd
from tests.real.programs import Programs

LARGE = 64 * MIB
SMALL = 200


class SharedFolder:
    """Measures one target after the other, each with a guest of its own."""

    def __init__(self, programs: Programs, folder: Path) -> None:
        self.programs = programs
        self.folder = folder
        self.runs = 0

    def __call__(self, name: str) -> Mapping[str, Figure]:
        self.runs += 1
        folder = self.folder / f"fs-{self.runs}"
        share = folder / "share"
        share.mkdir(parents=True)
        path = folder / "fs.sock"
        with (
            virtiofsd(self.programs, share, path),
            way_to(name, path) as (front, _),
            Guest(self.programs, folder, devices.file_system(front, "share")) as guest,
        ):
            guest.sh("mount -t virtiofs share /mnt")
            written, read = guest.call(speed.large, "/mnt", LARGE, timeout=300)
            small = guest.call(speed.small, "/mnt", SMALL, timeout=300)
            guest.sh("umount /mnt")
            guest.power_off()
        return {
            "folder, write a large file": Figure(written / 1e6, "MB/s"),
            "folder, read a large file": Figure(read / 1e6, "MB/s"),
            "folder, small files": Figure(small, "files/s"),
        }
