"""The airlock against a direct connection, side by side on the same back-end.

    python -m bench.bench [--long] [--only PATTERN] [--json FILE]

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
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

from bench.machine import be_prompt, cpu_clock, describe, take_sample
from bench.runs import (
    KIB,
    MIB,
    BenchError,
    Case,
    Run,
    Sample,
    make_run,
    steady,
    summarize,
)
from bench.table import heading, report
from bench.targets import AIRLOCKS, DIRECT, Target, targets
from tests.real.blkdrive import BlkDrive
from tests.real.processes import Process
from tests.real.programs import PROJECT, Programs, find

MODES = ("randread", "randwrite")
QUICK = {4 * KIB: (1, 8, 32, 128), 64 * KIB: (1, 8, 32), MIB: (8, 32)}
LONG = {4 * KIB: (1, 8, 32, 128), 64 * KIB: (1, 8, 32, 128), MIB: (1, 8, 32)}

QUEUE_SIZE = 512
"""libblkio has no indirect descriptors: 128 requests take 384 of them."""
TICK = 0.01
"""Seconds between samples of CPU time."""
FOREIGN = 0.3
"""Cores busy with something else that make a run worthless."""
ATTEMPTS = 3
"""Times that runs are made if they are disturbed each time."""
QUIET = 0.2
"""Seconds in which nothing else ran: so the machine is quiet again."""


class Bench:
    """The targets, ready to be measured."""

    def __init__(
        self, drive: BlkDrive, targets: Sequence[Target], ms: int, patience: float
    ) -> None:
        self.drive = drive
        self.targets = targets
        self.ms = ms
        self.patience = patience
        """Seconds left to lose to other programs: for disturbed runs and waiting."""

    def measure(self, case: Case, number: int, turn: int) -> list[Run]:
        """Run a load on all targets, beginning with another one at each `turn`.

        If any was disturbed all are run again, since they are to be compared with each
        other; but not for ever.
        """
        first = turn % len(self.targets)
        order = [*self.targets[first:], *self.targets[:first]]
        tries: list[list[Run]] = []
        while len(tries) < ATTEMPTS:
            start = time.monotonic()
            tries.append([self.run(case, target, number) for target in order])
            if not any(run.disturbed for run in tries[-1]) or self.patience <= 0:
                break
            wait_for_quiet(self.patience)
            self.patience -= time.monotonic() - start
        return min(tries, key=lambda runs: max(run.foreign for run in runs))

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


def wait_for_quiet(limit: float) -> None:
    """Wait until nothing keeps the machine busy, or no longer than that."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        before = take_sample({})
        time.sleep(QUIET)
        after = take_sample({})
        if (after.machine - before.machine) / (after.at - before.at) < FOREIGN / 2:
            break


def watch(load: Process, clocks: dict[str, int]) -> list[Sample]:
    """Take samples until the load program ends."""
    samples = []
    while not load.ended(TICK):
        samples.append(take_sample(clocks))
    return samples


def main() -> int:
    options = parse()
    programs = find()
    if isinstance(programs, str):
        print(f"bench: needs qemu-storage-daemon and libblkio: {programs}")
        return 1
    cases = cases_of(LONG if options.long else QUICK, options.only)
    if not cases:
        print(f"bench: no case is named like {options.only}")
        return 2
    machine = describe(programs)
    print(heading(machine), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runs = measure_all(programs, cases, options)
    except (AssertionError, BenchError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 1

    rows = summarize(runs, DIRECT)
    names = [DIRECT, *AIRLOCKS]
    rows.sort(key=lambda row: (cases.index(row.case), names.index(row.target)))
    print(report(rows, AIRLOCKS))
    results = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine,
        "options": vars(options) | {"json": str(options.json)},
        "rows": [dataclasses.asdict(row) for row in rows],
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nall runs are in {options.json}")
    return 0


def cases_of(depths: Mapping[int, Sequence[int]], pattern: str) -> list[Case]:
    """All cases of these sizes and depths whose name is like that."""
    cases = [
        Case(mode, size, depth)
        for mode in MODES
        for size in depths
        for depth in depths[size]
    ]
    return [case for case in cases if fnmatch(str(case), pattern)]


def measure_all(
    programs: Programs, cases: Sequence[Case], options: argparse.Namespace
) -> list[Run]:
    runs: list[Run] = []
    todo = list(product(range(options.rounds), enumerate(cases)))
    with (
        tempfile.TemporaryDirectory(prefix="airlock-", dir="/tmp") as name,
        targets(programs, Path(name)) as found,
    ):
        drive = BlkDrive(programs, Path(name))
        be_prompt()
        bench = Bench(drive, found, options.ms, options.patience)
        for done, (number, (at, case)) in enumerate(todo):
            progress(f"{done}/{len(todo)} {case}")
            runs += bench.measure(case, number, turn=number + at)
        progress("")
    return runs


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure the airlock against a direct connection."
    )
    parser.add_argument("--long", action="store_true", help="more cases, longer runs")
    parser.add_argument("--rounds", type=int, help="runs of each case and target")
    parser.add_argument("--ms", type=int, help="length of a run in milliseconds")
    parser.add_argument(
        "--patience",
        type=float,
        metavar="S",
        help="seconds to lose, all in all, to what else keeps the machine busy",
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="cases named like this, as 'randread-4K-*'",
    )
    parser.add_argument(
        "--json", type=Path, default=PROJECT / "build" / "bench.json", metavar="FILE"
    )
    parser.set_defaults(rounds=3, ms=300, patience=30.0)
    if parser.parse_known_args()[0].long:
        parser.set_defaults(rounds=7, ms=1000, patience=600.0)
    return parser.parse_args()


def progress(text: str) -> None:
    """Show on a terminal how far we are, in a line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
