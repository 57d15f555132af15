# SPDX-License-Identifier: Apache-2.0
"""A plan of what a guest does, made of a seed, and what came of it.

The same plan can be carried out in several worlds, and its outcome must be the same in
each, however requests overtake each other: between two pauses, no two requests are for
the same place.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vhost_airlock.peers.disk import ID_SIZE, SECTOR, BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue, Io, Segment
from vhost_airlock.peers.ring import RingFull

PLACES = 24
PLACE = 64
"""Sectors of each place on the disk."""
SECTORS = PLACES * PLACE
NOWHERE = 1 << 40
ROOM = 2 * PLACE * SECTOR
"""Bytes of guest memory for each place: the data, and gaps between its pieces."""
UNKNOWN = 99
"""A kind of request that there is not."""


@dataclass
class Op:
    """One request. Pieces are (offset in the place's memory, length)."""

    queue: int
    kind: int
    sector: int
    place: int
    pieces: list[Segment]
    indirect: bool
    direct: int
    seed: int


@dataclass
class Plan:
    """Requests in rounds: within one, each is for a place of its own."""

    rounds: list[list[Op]] = field(default_factory=list)

    @classmethod
    def make(cls, seed: int, rounds: int = 12, queues: int = 2) -> Plan:
        chance = random.Random(seed)
        return cls(
            [
                [
                    _op(chance, place, queues)
                    for place in chance.sample(range(PLACES), chance.randint(1, PLACES))
                ]
                for _ in range(rounds)
            ]
        )


def _op(chance: random.Random, place: int, queues: int) -> Op:
    kinds = [BlkType.IN, BlkType.OUT, BlkType.FLUSH, BlkType.GET_ID, UNKNOWN]
    kind = chance.choices(kinds, [10, 10, 1, 1, 1])[0]
    first = chance.randrange(PLACE)
    sectors = min(chance.choice([1, 1, 8, 9, PLACE]), PLACE - first)
    size = sectors * SECTOR
    sector = place * PLACE + first
    if kind in (BlkType.FLUSH, UNKNOWN):
        size = 0
    elif kind == BlkType.GET_ID:
        size = ID_SIZE
    elif chance.random() < 0.05:
        size, sector = chance.choice([(size, NOWHERE), (size - 1, sector)])
    return Op(
        chance.randrange(queues),
        kind,
        sector,
        place,
        list(_pieces(chance, size)),
        indirect=chance.random() < 0.5,
        direct=chance.choice([0, 0, 1, 3]),
        seed=chance.randrange(1 << 32),
    )


def _pieces(chance: random.Random, size: int) -> Iterator[Segment]:
    at, cuts = (
        0,
        sorted(
            chance.randrange(1, size) for _ in range(chance.randrange(5)) if size > 1
        ),
    )
    for start, end in zip([0, *cuts], [*cuts, size], strict=True):
        at += chance.choice([0, 0, 1, 8, 500])
        if end > start:
            yield at, end - start
        at += end - start


class Traffic:
    """Carries out a plan with a guest. `results` is what came of each request."""

    def __init__(self, guest: BlkGuest, plan: Plan) -> None:
        self.guest = guest
        self.plan = plan
        self.results: list[object] = []
        self.disk = bytearray(SECTORS * SECTOR)
        self._memory = [guest.ram.alloc(ROOM) for _ in range(PLACES)]

    def run(self, between: Callable[[int], None] = lambda round: None) -> None:
        """`between` is called with requests in flight."""
        for number, ops in enumerate(self.plan.rounds):
            ios = []
            for count, op in enumerate(ops):
                ios.append(self._submit(op))
                if count == len(ops) // 2:
                    self._kick()
                    between(number)
            self.guest.finish()
            for op, io in zip(ops, ios, strict=True):
                self.results.append(self._result(op, io))

    def _kick(self) -> None:
        for queue in self.guest.queues:
            queue.kick()

    def _submit(self, op: Op) -> Io:
        queue = self.guest.queues[op.queue]
        memory = self._memory[op.place]
        segments = [(memory + at, length) for at, length in op.pieces]
        data = random.Random(op.seed).randbytes(sum(n for _, n in op.pieces))
        rest = memoryview(data)
        for addr, length in segments:
            self.guest.ram.view(addr, length)[:] = rest[:length]
            rest = rest[length:]
        if op.kind == BlkType.OUT and self._possible(op):
            start = op.sector * SECTOR
            self.disk[start : start + len(data)] = data
        indirect = op.indirect and queue.indirect
        while True:
            try:
                return queue.submit(
                    op.kind, op.sector, segments, indirect=indirect, direct=op.direct
                )
            except RingFull:
                self._make_room(queue)

    def _make_room(self, queue: GuestQueue) -> None:
        self._kick()
        while not queue.reap():
            self.guest.wait()
            for other in self.guest.queues:
                if other is not queue:
                    other.reap()

    def _possible(self, op: Op) -> bool:
        size = sum(length for _, length in op.pieces)
        return size % SECTOR == 0 and op.sector * SECTOR + size <= len(self.disk)

    def _result(self, op: Op, io: Io) -> object:
        memory = self._memory[op.place]
        data = self._gather(memory, op.pieces)
        if op.kind in (BlkType.IN, BlkType.OUT):
            possible = self._possible(op)
            assert io.status == (BlkStatus.OK if possible else BlkStatus.IOERR)
            if op.kind == BlkType.IN and possible:
                start = op.sector * SECTOR
                assert data == self.disk[start : start + len(data)]
            elif not possible:
                data = b""  # what is there is nobody's business then
        return op.kind, op.sector, io.status, io.written, hashlib.sha1(data).hexdigest()

    def _gather(self, memory: int, pieces: Sequence[Segment]) -> bytes:
        return b"".join(self.guest.ram.view(memory + at, n) for at, n in pieces)
