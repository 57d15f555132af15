# SPDX-License-Identifier: Apache-2.0
"""The loads that are measured, in the short form and in the long one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from bench.runs import KIB, MIB, Case

RANDOM = ("randread", "randwrite")
IN_ORDER = ("read", "write")
BY_SIZE = {4 * KIB: (1, 8, 32, 128), 64 * KIB: (1, 8, 32, 128), MIB: (1, 8, 32)}


def quick() -> Iterator[Case]:
    """The cases that tell most, in two minutes."""
    for mode in RANDOM:
        yield from (Case(mode, 4 * KIB, depth) for depth in (1, 32, 128))
        yield from (Case(mode, 64 * KIB, depth) for depth in (1, 32))


def compared() -> Iterator[Case]:
    """The cases by which two builds are compared: those of the goals."""
    for mode in RANDOM:
        for size, depths in BY_SIZE.items():
            yield from (Case(mode, size, depth) for depth in depths)


def long() -> Iterator[Case]:
    """All cases."""
    yield from compared()
    # No deeper: with io_uring and 256 requests in flight, qemu-storage-daemon 11.1
    # drops its front-end, of any kind ("vu_panic: kick eventfd_read()").
    for mode in RANDOM:
        yield from (Case(mode, 4 * KIB, depth, queues=2) for depth in (1, 32, 64))
    for mode in RANDOM:
        for size, depths in {4 * KIB: (1, 8, 32, 128), 64 * KIB: (1, 32)}.items():
            yield from (Case(mode, size, depth, indirect=True) for depth in depths)
    for mode in RANDOM:
        for size in (4 * KIB, 64 * KIB, MIB):
            yield Case(mode, size, 32, indirect=True, cold=True)
    for mode in IN_ORDER:
        for size in (4 * KIB, 64 * KIB, MIB):
            yield Case(mode, size, 32, indirect=True)


def chosen(cases: Iterator[Case], pattern: str) -> Sequence[Case]:
    """Return the cases whose name matches a pattern."""
    return [case for case in cases if fnmatch(str(case), pattern)]
