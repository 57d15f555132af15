# SPDX-License-Identifier: Apache-2.0
"""A guest that rewrites its rings while they are read."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterator

from ..peers.disk import SECTOR
from ..peers.ring import DESC
from .catalogue import Catalogue, Verdict
from .guest_scene import GuestScene, N, Raw, T, W

RACES = Catalogue[GuestScene](Verdict.RING_STOPPED)

_LENGTH = struct.Struct("<I")


def flipping(memory: memoryview, *values: bytes) -> Callable[[], None]:
    """A step that writes the next one of some values of one size."""
    following = itertools.cycle(values)
    size = len(values[0])

    def flip() -> None:
        memory[:size] = next(following)

    return flip


def offering(scene: GuestScene, head: int, rest: Iterator[float]) -> None:
    """Offer one head as fast as the program takes it, until something breaks."""
    ring = scene.ring
    for _ in rest:
        room = (ring.avail_idx - ring.used_idx) & 0xFFFF < ring.size // 2
        if room:
            scene.offer(head)
        if scene.settle(0 if room else 0.01):
            return
        scene.kick()


def row(raw: Raw) -> bytes:
    return DESC.pack(*raw)


def race_descriptor(scene: GuestScene, *others: Raw) -> None:
    """Flip the data descriptor of a good request between that and others."""
    good = (scene.data, SECTOR, W | N, 10)
    scene.write((scene.header, 16, N, 9), good, (scene.status, 1, W, 0))
    memory = scene.ring.desc[9 * DESC.size :]
    with scene.racing(flipping(memory, row(good), *map(row, others))) as rest:
        offering(scene, 8, rest)
    memory.release()


def race_table(scene: GuestScene, *others: Raw) -> None:
    """The same in an indirect table."""
    good = (scene.data, SECTOR, W | N, 2)
    scene.write_table((scene.header, 16, N, 1), good, (scene.status, 1, W, 0))
    scene.write((scene.table, 48, T, 0))
    memory = scene.view(scene.table + DESC.size, DESC.size)
    with scene.racing(flipping(memory, row(good), *map(row, others))) as rest:
        offering(scene, 8, rest)
    memory.release()


RACES.add(
    "race-next",
    "a descriptor's next flips to beyond the ring",
    lambda s: race_descriptor(s, (s.data, SECTOR, W | N, 0xFFFF)),
)
RACES.add(
    "race-length",
    "a descriptor's length flips to 0 and to 2^32 - 1",
    lambda s: race_descriptor(
        s, (s.data, 0, W | N, 10), (s.data, 0xFFFFFFFF, W | N, 10)
    ),
)
RACES.add(
    "race-address",
    "a descriptor's address flips to nowhere",
    lambda s: race_descriptor(s, (1 << 60, SECTOR, W | N, 10)),
)
RACES.add(
    "race-flags",
    "a descriptor flips between data and an indirect table",
    lambda s: race_descriptor(s, (s.table, 48, T, 0), (s.data, SECTOR, N, 8)),
)
RACES.add(
    "race-table-next",
    "a next in a table flips to beyond it",
    lambda s: race_table(s, (s.data, SECTOR, W | N, 0xFFFF)),
)
RACES.add(
    "race-table-entry",
    "a descriptor in a table flips to other lengths, tables and loops",
    lambda s: race_table(
        s,
        (s.data, 0, W | N, 2),
        (s.table, 48, T, 0),
        (s.data, 0xFFFFFFFF, W | N, 1),
        (1 << 60, SECTOR, W | N, 2),
    ),
)


@RACES.attack()
def race_table_length(scene: GuestScene) -> None:
    """A table's length flips to 0, to 16 MiB and to no multiple of 16"""
    good = (scene.data, SECTOR, W | N, 2)
    scene.write_table((scene.header, 16, N, 1), good, (scene.status, 1, W, 0))
    scene.write((scene.table, 48, T, 0))
    memory = scene.ring.desc[8 * DESC.size + 8 :]
    values = [_LENGTH.pack(value) for value in (48, 0, 1 << 24, 47, 16)]
    with scene.racing(flipping(memory, *values)) as rest:
        offering(scene, 8, rest)
    memory.release()


@RACES.attack()
def race_heads(scene: GuestScene) -> None:
    """The entries of the avail ring flip to beyond the ring"""
    ring = scene.ring
    good = (scene.data, SECTOR, W | N, 10)
    scene.write((scene.header, 16, N, 9), good, (scene.status, 1, W, 0))
    values = itertools.cycle([8, 0xFFFF, ring.size, 8])
    slots = itertools.cycle(range(ring.size))

    def flip() -> None:
        ring.set_avail_entry(next(slots), next(values))

    with scene.racing(flip) as rest:
        offering(scene, 8, rest)


@RACES.attack()
def race_index(scene: GuestScene) -> None:
    """The avail index flips to half of 65536 ahead"""
    ring = scene.ring
    good = (scene.data, SECTOR, W | N, 10)
    scene.write((scene.header, 16, N, 9), good, (scene.status, 1, W, 0))

    def flip() -> None:
        ring.avail_idx ^= 0x8000

    with scene.racing(flip) as rest:
        for _ in rest:
            ring.set_avail_entry(ring.avail_idx & ring.mask, 8)
            scene.kick()
            if scene.settle(0.005):
                return
