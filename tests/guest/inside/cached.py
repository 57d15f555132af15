# SPDX-License-Identifier: Apache-2.0
"""Pages that only the disk has written since the machine was started: those of the page
cache, if the kernel does not clear memory for it (init_on_alloc=0).
"""

import zlib

from tests.guest.inside.agent import sh
from tests.guest.inside.load import DEVICE, MIB


def read_anew(start: int, size: int) -> int:
    """Let the disk write a part of itself, in MiB, into fresh pages: its CRC."""
    sh("echo 1 > /proc/sys/vm/drop_caches")
    return read(start, size)


def read(start: int, size: int) -> int:
    """Read that part, or what is there of it: its CRC."""
    found = 0
    with open(DEVICE, "rb", buffering=0) as disk:
        disk.seek(start * MIB)
        for _ in range(size):
            found = zlib.crc32(disk.read(MIB), found)
    return found
