# SPDX-License-Identifier: Apache-2.0
"""How many bytes processors' caches hold, by sysfs.

Only caches that a processor has for itself count: a virtual machine is told of all of
its host's last cache, of which it has a part that nobody knows.
"""

from __future__ import annotations

MIB = 1 << 20
LEAST = 4 * MIB
"""Bytes, on every machine, also on one that says nothing: measurements found it good
where the second level has 1 MiB."""
SHARERS = 2
"""Processors through whose caches a request goes: the worker's, and the back-end's."""
SYSFS = "/sys/devices/system/cpu/cpu0/cache"
MOST_CACHES = 16
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cached_bytes(sysfs: str = SYSFS) -> int:
    """Return the bytes in flight that the caches on their way hold, LEAST at least."""
    for number in range(MOST_CACHES):
        try:
            if _word(sysfs, number, "level") == "2":
                return max(LEAST, SHARERS * _bytes(_word(sysfs, number, "size")))
        except (OSError, ValueError, KeyError, IndexError):
            break
    return LEAST


def _word(sysfs: str, number: int, name: str) -> str:
    with open(f"{sysfs}/index{number}/{name}", encoding="utf-8") as file:
        return file.read(64).strip()


def _bytes(size: str) -> int:
    """Return the bytes of a size like 1024K."""
    return int(size[:-1]) * UNITS[size[-1]]
