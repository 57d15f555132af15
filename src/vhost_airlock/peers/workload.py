# SPDX-License-Identifier: Apache-2.0
"""Fills a disk from a guest, reads all of it back, and checks every byte."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import AirlockError
from .disk import SECTOR, BlkType
from .guest import BlkGuest
from .guest_queue import Io, Segment
from .ram import MIB

KIB = 1 << 10


class WrongData(AirlockError):
    """Other bytes were read than were written."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Requests of one size, `depth` of them in flight at a time."""

    size: int
    depth: int
    total: int

    def __str__(self) -> str:
        large, small = divmod(self.size, MIB)
        return f"{f'{small // KIB} KiB' if small else f'{large} MiB'} x {self.depth}"


STAGES = (
    Stage(4 * KIB, 1, 2 * MIB),
    Stage(4 * KIB, 64, 16 * MIB),
    Stage(16 * KIB, 32, 32 * MIB),
    Stage(64 * KIB, 8, 64 * MIB),
    Stage(256 * KIB, 4, 80 * MIB),
    Stage(1 * MIB, 4, 96 * MIB),
)


def disk_size(stages: Sequence[Stage]) -> int:
    """Return the bytes that the disk must have."""
    return sum(stage.total for stage in stages)


@dataclass(frozen=True, slots=True)
class Result:
    """The time and the requests of a stage."""

    stage: Stage
    kind: BlkType
    seconds: float

    @property
    def requests(self) -> int:
        return self.stage.total // self.stage.size

    @property
    def mib_per_second(self) -> float:
        return self.stage.total / MIB / self.seconds


class Workload:
    """Each stage has a part of the disk, whose blocks it writes or reads in any order.

    Each place on the disk gets a piece of a random pattern, from an offset that depends
    on the place. So a block, or a part of one, that ends up at another place is
    noticed.
    """

    def __init__(
        self, guest: BlkGuest, stages: Sequence[Stage] = STAGES, seed: int = 0
    ) -> None:
        self.guest = guest
        self.stages = stages
        self._random = random.Random(seed)
        self._largest = max(stage.size for stage in stages)
        self._pattern = memoryview(self._random.randbytes(2 * self._largest + 9973))
        room = max(stage.depth * stage.size for stage in stages)
        self._buffer = guest.ram.alloc(room)

    def expected(self, offset: int, size: int) -> memoryview:
        """Return the bytes for this place on the disk."""
        start = offset // SECTOR * 4099 % (len(self._pattern) - self._largest)
        return self._pattern[start : start + size]

    def write(self, stage: Stage, progress: Callable[[int], None]) -> Result:
        """Write a stage's part; `progress` is called with the bytes of each request."""
        return self._run(BlkType.OUT, stage, progress)

    def read(self, stage: Stage, progress: Callable[[int], None]) -> Result:
        """Read a stage's part back; `WrongData` if other bytes were written."""
        return self._run(BlkType.IN, stage, progress)

    def _run(
        self, kind: BlkType, stage: Stage, progress: Callable[[int], None]
    ) -> Result:
        first = disk_size(self.stages[: self.stages.index(stage)])
        places = list(range(first, first + stage.total, stage.size))
        self._random.shuffle(places)
        idle = [self._buffer + i * stage.size for i in range(stage.depth)]
        queues = self.guest.queues
        started = time.monotonic()
        while places or len(idle) < stage.depth:
            while places and idle:
                queue = queues[len(places) % len(queues)]
                offset, addr = places.pop(), idle.pop()
                self._prepare(kind, offset, addr, stage.size)
                queue.submit(
                    kind, offset // SECTOR, self._cut(addr, stage.size), self._check
                )
            for queue in queues:
                queue.kick()
            done = [io for queue in queues for io in queue.reap()]
            idle += [io.segments[0][0] for io in done]
            if done:
                progress(len(done) * stage.size)
            else:
                self.guest.wait()
        return Result(stage, kind, time.monotonic() - started)

    def _prepare(self, kind: BlkType, offset: int, addr: int, size: int) -> None:
        """Fill a buffer with the bytes to write, or before a read with wrong ones."""
        data = self.expected(offset if kind == BlkType.OUT else offset + SECTOR, size)
        self.guest.ram.view(addr, size)[:] = data

    def _cut(self, addr: int, size: int) -> list[Segment]:
        """Cut a buffer into up to four segments, as a guest's page cache does."""
        cuts = sorted({self._random.randrange(SECTOR, size, SECTOR) for _ in range(3)})
        return [
            (addr + start, end - start)
            for start, end in zip([0, *cuts], [*cuts, size], strict=True)
        ]

    def _check(self, io: Io) -> None:
        io.check()
        if io.kind == BlkType.OUT:
            return
        offset, addr = io.sector * SECTOR, io.segments[0][0]
        size = sum(length for _, length in io.segments)
        if bytes(self.guest.ram.view(addr, size)) != self.expected(offset, size):
            raise WrongData(f"other bytes were read at {offset:#x} than were written")
