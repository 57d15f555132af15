"""The airlock against a direct connection, side by side on the same back-end.

    python -m bench.bench [--long] [--only TEXT] [--json FILE]

One qemu-storage-daemon exports a file in memory. The load program (libblkio's
vhost-user-blk driver) drives it directly, through the airlock as it is by default, and
through one that never polls, in turn and never at the same time. Each round goes
through all cases; the order of targets changes from run to run. Figures are medians
over rounds, ratios medians of the ratios in each round.

Runs during which something else kept the machine busy are repeated a few times; if it
was no better then, the row has a star.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from bench.machine import cpu_clock, describe, io_uring_works, take_sample, tmpfs
from bench.runs import KIB, MIB, Case, Run, Sample, make_run, steady, summarize
from bench.table import full_table, heading, ratio_table
from tests.real.airlock import airlock
from tests.real.blkdrive import BlkDrive
from tests.real.processes import Process
from tests.real.programs import PROJECT, Programs, find
from tests.real.storage import Disk, storage_daemon

MODES = ("randread", "randwrite")
QUICK = {4 * KIB: (1, 8, 32, 128), 64 * KIB: (1, 8, 32), MIB: (8, 32)}
LONG = {4 * KIB: (1, 8, 32, 128), 64 * KIB: (1, 8, 32, 128), MIB: (1, 8, 32)}

AIRLOCKS = {"airlock": (), "blocking": ("--poll-us=0",)}
"""Options of the airlocks that are measured, by the name that tables give them."""
DIRECT = "direct"

DISK_SIZE = 1 << 30
QUEUE_SIZE = 512
"""libblkio has no indirect descriptors: 128 requests take 384 of them."""
TICK = 0.01
"""Seconds between samples of CPU time."""
FOREIGN = 0.3
"""Cores busy with something else that make a run worthless."""
ATTEMPTS = 3


@dataclass(frozen=True)
class FileInMemory(Disk):
    """The file with the fastest way to it that there is."""

    def blockdev(self) -> str:
        return (
            f"{super().blockdev()},aio={'io_uring' if io_uring_works() else 'threads'}"
        )


@dataclass(frozen=True)
class Target:
    """Where the load program connects, and whose CPU time is looked at."""

    name: str
    front: Path
    clocks: dict[str, int]


class Bench:
    """The targets, ready to be measured."""

    def __init__(self, drive: BlkDrive, targets: Sequence[Target], ms: int) -> None:
        self.drive = drive
        self.targets = targets
        self.ms = ms

    def measure(self, case: Case, target: Target, number: int) -> Run:
        """Run a load on a target; again if it was disturbed, but not for ever."""
        runs = []
        for _ in range(ATTEMPTS):
            runs.append(self.run(case, target, number))
            if not runs[-1].disturbed:
                break
        return min(runs, key=lambda run: run.foreign)

    def run(self, case: Case, target: Target, number: int) -> Run:
        load = self.drive.start(
            target.front,
            case.mode,
            bs=case.size,
            qd=case.depth,
            queue_size=QUEUE_SIZE,
            ms=self.ms,
            warmup=100,
        )
        with load:
            clocks = {"front": cpu_clock(load.pid), **target.clocks}
            samples = watch(load, clocks)
            end = time.monotonic_ns()
            assert load.wait(timeout=0) == 0, load.describe()
            said = json.loads(load.output())
        first, last = steady(samples, end, self.ms * 1_000_000)
        return make_run(case, target.name, number, said, first, last, FOREIGN)

    def round(self, cases: Sequence[Case], number: int) -> Iterator[Run]:
        """All cases on all targets, in another order each time."""
        for at, case in enumerate(cases):
            turn = (number + at) % len(self.targets)
            for target in [*self.targets[turn:], *self.targets[:turn]]:
                yield self.measure(case, target, number)


def watch(load: Process, clocks: dict[str, int]) -> list[Sample]:
    """Take samples until the load program ends."""
    samples = []
    while not load.ended(TICK):
        samples.append(take_sample(clocks))
    return samples


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


def main() -> int:
    options = parse()
    programs = find()
    if isinstance(programs, str):
        print(f"bench: needs qemu-storage-daemon and libblkio: {programs}")
        return 1
    cases = [
        Case(mode, size, depth)
        for mode, (size, depths) in product(
            MODES, (LONG if options.long else QUICK).items()
        )
        for depth in depths
    ]
    cases = [case for case in cases if options.only in str(case)]
    if not cases:
        print(f"bench: no case has '{options.only}' in its name")
        return 1
    machine = describe(programs)
    print(heading(machine), flush=True)

    runs: list[Run] = []
    folder = Path(tempfile.mkdtemp(prefix="airlock-", dir="/tmp"))
    try:
        with targets(programs, folder) as found:
            bench = Bench(BlkDrive(programs, folder), found, options.ms)
            total = len(cases) * len(found) * options.rounds
            for number in range(options.rounds):
                for run in bench.round(cases, number):
                    runs.append(run)
                    progress(len(runs), total, run)
    except AssertionError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder)

    rows = summarize(runs, DIRECT)
    names = [DIRECT, *AIRLOCKS]
    rows.sort(key=lambda row: (cases.index(row.case), names.index(row.target)))
    print(full_table(rows))
    for name in AIRLOCKS:
        print(f"\n{ratio_table(rows, name)}")
    if any(row.disturbed for row in rows):
        print("\n* other programs kept the machine busy meanwhile")
    results = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine,
        "options": vars(options) | {"json": str(options.json)},
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nall runs are in {options.json}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure the airlock against a direct connection."
    )
    parser.add_argument("--long", action="store_true", help="more cases, longer runs")
    parser.add_argument("--rounds", type=int, help="runs of each case and target")
    parser.add_argument("--ms", type=int, help="length of a run in milliseconds")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases with this name"
    )
    parser.add_argument(
        "--json", type=Path, default=PROJECT / "build" / "bench.json", metavar="FILE"
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (7 if options.long else 3)
    options.ms = options.ms or (1000 if options.long else 300)
    return options


def progress(done: int, total: int, run: Run) -> None:
    """Show on a terminal how far we are."""
    if sys.stderr.isatty():
        end = "\r" if done < total else "\r\033[K"
        text = f"{done}/{total} {run.case} {run.target}"
        print(f"\033[K{text}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
