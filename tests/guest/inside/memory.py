# SPDX-License-Identifier: Apache-2.0
"""Memory that comes and goes."""

import mmap
import re

from tests.guest.inside.waiting import wait


def total() -> int:
    """Bytes that the kernel can use."""
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) << 10


def movable_in_use() -> int:
    """How many bytes are in use of the memory that came later, and may go again."""
    with open("/proc/zoneinfo") as file:
        zone = re.split(r"Node \d+, zone +Movable", file.read())[1]
    found = (re.search(rf"{word} +(\d+)", zone) for word in ("managed", "pages free"))
    managed, free = (int(one[1]) for one in found if one)
    return (managed - free) * mmap.PAGESIZE


def wait_for_total(size: int) -> None:
    """Wait until there is just so much."""
    wait(lambda: total() == size, lambda: f"{total()} bytes, not {size}")


def wait_for_use(least: int) -> None:
    """Wait until so much is used of the memory that came later."""
    wait(lambda: movable_in_use() >= least, lambda: f"{movable_in_use()} bytes in use")
