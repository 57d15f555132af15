"""What is measured: one back-end, reached directly and through airlocks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.machine import cpu_clock, io_uring_works, tmpfs
from bench.runs import MIB
from tests.real.airlock import airlock
from tests.real.programs import Programs
from tests.real.storage import Disk, storage_daemon

DIRECT = "direct"
AIRLOCKS = {"airlock": (), "blocking": ("--poll-us=0",)}
"""Options of the airlocks that are measured, by the name that tables give them."""

DISK_SIZE = 1 << 30


@dataclass(frozen=True)
class FileInMemory(Disk):
    """The file with the fastest way to it that there is."""

    def blockdev(self) -> str:
        aio = "io_uring" if io_uring_works() else "threads"
        return f"{super().blockdev()},aio={aio}"


@dataclass(frozen=True)
class Target:
    """Where the load program connects, and whose CPU time is looked at."""

    name: str
    front: Path
    clocks: dict[str, int]


@contextmanager
def targets(programs: Programs, folder: Path) -> Iterator[list[Target]]:
    """Start the back-end and the airlocks.

    All connect to the same socket: an airlock does so when a front-end comes.
    """
    with ExitStack() as stack:
        disk = FileInMemory(stack.enter_context(image(folder)))
        daemon, back = stack.enter_context(
            storage_daemon(programs, disk, folder / "back.sock")
        )
        clocks = {"back": cpu_clock(daemon.pid)}
        found = [Target(DIRECT, back, clocks)]
        for name, options in AIRLOCKS.items():
            front = folder / f"{name}.sock"
            proxy = stack.enter_context(airlock(back, front, *options))
            both = {"airlock": cpu_clock(proxy.pid), **clocks}
            found.append(Target(name, front, both))
        yield found


@contextmanager
def image(folder: Path) -> Iterator[Path]:
    """A file in memory, in huge pages where we may have them."""
    where = folder / "memory"
    where.mkdir()
    with ExitStack() as stack:
        if not stack.enter_context(tmpfs(where, DISK_SIZE + 16 * MIB)):
            in_shm = tempfile.TemporaryDirectory(prefix="airlock-", dir="/dev/shm")
            where = Path(stack.enter_context(in_shm))
        path = where / "disk.img"
        with path.open("wb") as file:
            block = bytes(range(256)) * (MIB // 256)
            for _ in range(DISK_SIZE // MIB):
                file.write(block)
        yield path
