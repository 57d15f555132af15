# SPDX-License-Identifier: Apache-2.0
"""A lane under watch, and the names of all words in it that another side can write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.proof.watching import Access, Watcher
from tests.support.plane import PAGE, AddressSpace, Lane, World
from vhost_airlock.peers.ring import DESC_F_WRITE as WRITE
from vhost_airlock.peers.ring import DESC_SIZE

SIZE = 8
COPY = 128
"""Bytes of each buffer; an indirect table of as many has 8 descriptors."""

BUFFERS = 0x10000
"""Guest-physical address of the buffers, a page for each."""


def pieces_of(*spaces: AddressSpace) -> list[tuple[int, int]]:
    """Where the data plane sees this memory: addresses and sizes."""
    return [
        (memory.address, memory.size)
        for space in spaces
        for memory in space.pieces.values()
    ]


class Bench:
    """A lane, and the names of all words that another side can write."""

    def __init__(self, watcher: Watcher, **options: Any) -> None:
        self.watcher = watcher
        self.world = World()
        self.lane = lane = Lane(self.world, size=SIZE, **options)
        self.names: dict[int, str] = {}
        desc, avail, used = lane.guest_parts
        self.name_ring("guest", desc, avail, used)
        area = self.world.isolated.host(lane.area_at)
        desc, avail, used = (area + at - lane.area_at for at in lane.shadow_parts)
        self.name_ring("shadow", desc, avail, used)
        self.tables = self.world.ram.host(lane.tables_at)
        self.buffers = self.world.ram.host(BUFFERS)

    def name_ring(self, ring: str, desc: int, avail: int, used: int) -> None:
        names = self.names
        for i in range(SIZE):
            names[desc + DESC_SIZE * i] = f"{ring} desc[{i}] first half"
            names[desc + DESC_SIZE * i + 8] = f"{ring} desc[{i}] second half"
            names[avail + 4 + 2 * i] = f"{ring} avail.ring[{i}]"
            names[used + 4 + 8 * i] = f"{ring} used.ring[{i}].id"
            names[used + 8 + 8 * i] = f"{ring} used.ring[{i}].len"
        names[avail] = f"{ring} avail.flags"
        names[avail + 2] = f"{ring} avail.idx"
        names[avail + 4 + 2 * SIZE] = f"{ring} used_event"
        names[used] = f"{ring} used.flags"
        names[used + 2] = f"{ring} used.idx"
        names[used + 4 + 8 * SIZE] = f"{ring} avail_event"

    def loads(self, call: Callable[[], object]) -> list[Access]:
        """All loads from memory that another side can write."""
        pieces = pieces_of(self.world.ram, self.world.isolated)
        return [each for each in self.watcher.during(call, pieces) if not each.write]

    def stores(self, call: Callable[[], object]) -> list[Access]:
        """All stores into the guest's memory."""
        pieces = pieces_of(self.world.ram)
        return [each for each in self.watcher.during(call, pieces) if each.write]

    def words(self, accesses: list[Access]) -> list[tuple[str, int]]:
        """Those of ring words: which one, and how many bytes at once."""
        return [
            (self.names[each.address], each.width)
            for each in accesses
            if each.address in self.names
        ]

    def copied(self, accesses: list[Access]) -> Counter[int]:
        """How often each other byte was loaded, or stored."""
        return Counter(
            byte
            for each in accesses
            if each.address not in self.names
            for byte in each.bytes
        )

    def offer(self, *flags: int, indirect: bool = False) -> int:
        return self.lane.offer(
            *(
                (BUFFERS + PAGE * i, COPY, bool(flag & WRITE))
                for i, flag in enumerate(flags)
            ),
            indirect=indirect,
        )

    def buffer(self, number: int) -> range:
        start = self.buffers + PAGE * number
        return range(start, start + COPY)


def once(*ranges: range) -> Counter[int]:
    return Counter(byte for each in ranges for byte in each)
