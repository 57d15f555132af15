# SPDX-License-Identifier: Apache-2.0
"""The airlock against a direct connection, side by side on the same back-end.

    python -m bench.bench [--long] [--only PATTERN] [--targets NAME,...]
    python -m bench.bench --against REVISION

One qemu-storage-daemon exports a file in memory. Load programs drive it directly,
through airlocks, and by NBD, in turn and never at the same time. Each round goes
through all cases; the order of targets changes from run to run. Figures are medians
over rounds, ratios medians of the ratios in each round, with how sure they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import against, cases, document, extras, goals
from bench.extras import ExtraRow, in_rounds
from bench.fronts import Fronts
from bench.goals import Goal, measure_goals
from bench.html import page
from bench.machine import be_prompt, describe, idle_cores_poll
from bench.measure import Bench
from bench.network import Network
from bench.rows import Row, means, summarize
from bench.runs import BenchError, Case, Run
from bench.shared_folder import SharedFolder
from bench.sure import ENOUGH
from bench.table import heading, report
from bench.targets import AIRLOCKS, DIRECT, NAMES, QUICK, targets
from tests.real.programs import PROJECT, Programs, find

BUDGET = 285.0
"""Seconds that the comparison of two builds takes, compiling included."""
PARTS = ("disk", "goals", "net", "folder")


@dataclass
class Results:
    """All results."""

    machine: Mapping[str, object]
    when: str
    runs: list[Run] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    extras: list[ExtraRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> int:
    options = parse()
    programs = find()
    if isinstance(programs, str):
        print(f"bench: needs qemu-storage-daemon and libblkio: {programs}")
        return 1
    loads = cases.chosen(forms(options), options.only)
    if "disk" in options.parts and not loads:
        print(f"bench: no case is named like {options.only}")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with idle_cores_poll(options.idle_poll_us):
            return measure_and_show(programs, loads, options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def measure_and_show(
    programs: Programs, loads: Sequence[Case], options: argparse.Namespace
) -> int:
    """Measure, and show the results even if a part fails; returns the exit status."""
    begin = time.monotonic()
    results = Results(describe(programs), time.strftime("%-d %B %Y"))
    print(heading(results.machine), flush=True)
    status = 0
    try:
        if options.against:
            until = begin + options.seconds
            measure_builds(programs, loads, options, results, until)
        else:
            measure_all(programs, loads, options, results)
    except (AssertionError, BenchError) as error:
        print(f"bench: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        status = 1
    for failure in results.failures:
        print(f"bench: {failure}", file=sys.stderr)
        status = 1
    # Results from before a failure are not lost.
    results.rows = summarize(results.runs, options.targets[0])
    order = [(case, name) for case in loads for name in options.targets]
    results.rows.sort(key=lambda row: order.index((row.case, row.target)))
    if results.rows or results.goals or results.extras:
        show(results, options)
    return status


def forms(options: argparse.Namespace) -> Iterator[Case]:
    """Return the cases of the form that was chosen."""
    if options.long:
        return cases.long()
    return cases.compared() if options.against else cases.quick()


def measure_builds(
    programs: Programs,
    loads: Sequence[Case],
    options: argparse.Namespace,
    results: Results,
    until: float,
) -> None:
    """Measure this build and another one in turns, and nothing else."""
    progress(f"building {options.against}")
    sources = against.build(options.against), PROJECT / against.SOURCE
    be_prompt()
    if time.monotonic() > until:
        raise BenchError(
            f"to build {options.against} took all of the {options.seconds:.0f} s; the"
            " build is kept, so it can be measured now"
        )
    with tempfile.TemporaryDirectory(prefix="airlock-", dir="/tmp") as name:
        found = against.measure_both(
            programs,
            Path(name),
            loads,
            sources,
            options.ms,
            until,
            results.failures,
            progress,
        )
        for run in found:
            results.runs.append(run)
    progress("")


def measure_all(
    programs: Programs,
    loads: Sequence[Case],
    options: argparse.Namespace,
    results: Results,
) -> None:
    """Measure all chosen parts, one after the other."""
    with tempfile.TemporaryDirectory(prefix="airlock-", dir="/tmp") as name:
        folder = Path(name)
        airlocks = [each for each in options.targets if each in (DIRECT, *AIRLOCKS)]
        if "disk" in options.parts:
            front, back = (0, 1) if options.place else (None, None)
            with targets(programs, folder, options.targets, back) as found:
                be_prompt()
                fronts = Fronts(programs, folder, options.ms, front)
                bench = Bench(fronts, found, results.failures)
                for run in bench.measure_all(loads, options.rounds, progress):
                    results.runs.append(run)
        if "goals" in options.parts:
            for goal in measure_goals(programs, folder):
                progress(goal.name)
                results.goals.append(goal)
        for part, kind in (("net", Network), ("folder", SharedFolder)):
            if part in options.parts:
                progress(part)
                measure = kind(programs, folder)
                results.extras += in_rounds(airlocks, min(3, options.rounds), measure)
    progress("")


def show(results: Results, options: argparse.Namespace) -> None:
    """Print everything, and keep it in files."""
    reference, *others = options.targets
    if results.rows:
        ratios = {name: means(results.runs, name, reference) for name in others}
        print(report(results.rows, reference, others, ratios))
    for title, text in (
        ("Goals", goals.as_text(results.goals)),
        ("Other devices", extras.as_text(results.extras)),
    ):
        if text:
            print(f"\n{title}\n\n{text}")
    options.out.mkdir(parents=True, exist_ok=True)
    kept, plots = options.out / "bench.json", options.out / "bench.html"
    content = {
        **dataclasses.asdict(results),
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    kept.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nall runs: {kept}")
    if options.against:
        return
    plots.write_text(
        page(results.machine, results.when, results.rows, results.goals, results.extras)
    )
    print(f"plots: {plots}")
    if options.document:
        for part, text in document.parts(
            results.machine,
            results.when,
            results.rows,
            others,
            results.goals,
            results.extras,
        ):
            polled = options.idle_poll_us is not None
            document.update(part + document.POLLED * polled, text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description="Measure the airlock against a direct connection."
    )
    parser.add_argument("--long", action="store_true", help="everything: an hour")
    parser.add_argument("--rounds", type=int, help="runs of each case and target")
    parser.add_argument("--ms", type=int, help="length of a run in milliseconds")
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help="compare this tree with that revision, instead of ways to the disk",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=BUDGET,
        metavar="S",
        help="time of that comparison, building included (default: %(default).0f)",
    )
    parser.add_argument(
        "--place",
        action="store_true",
        help="front-end and back-end have a core each (--against: they always have)",
    )
    parser.add_argument(
        "--only",
        default="*",
        metavar="GLOB",
        help="cases named like this, as 'randread-4K-*'",
    )
    parser.add_argument(
        "--targets",
        type=target_names,
        metavar="NAME,...",
        help=f"of {', '.join(NAMES)}; {DIRECT} is always measured",
    )
    parser.add_argument(
        "--parts",
        type=part_names,
        metavar="NAME,...",
        help=f"some of {', '.join(PARTS)} (default: disk; with --long all)",
    )
    parser.add_argument(
        "--idle-poll-us",
        type=int,
        metavar="N",
        help="microseconds for which idle cores of this virtual machine poll for work"
        " before they halt, as long as the bench runs (the kernel's default is 200)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=PROJECT / "build",
        metavar="FOLDER",
        help="for bench.json and bench.html (default: build)",
    )
    parser.add_argument(
        "--document",
        action="store_true",
        help="put figures into docs/benchmark-tables.md",
    )
    parser.set_defaults(rounds=ENOUGH, ms=200, targets=list(QUICK), parts=["disk"])
    if parser.parse_known_args(argv)[0].long:
        parser.set_defaults(rounds=12, targets=list(NAMES), parts=list(PARTS))
    options = parser.parse_args(argv)
    if options.against:
        options.targets = [against.BEFORE, against.NOW]
        options.parts = ["disk"]
        if options.document:
            parser.error("--document: its tables are of ways, and not of builds")
    return options


def target_names(text: str) -> list[str]:
    """Return names of targets in their order, the reference among them."""
    wanted = {DIRECT, *text.split(",")}
    if unknown := wanted - set(NAMES):
        raise argparse.ArgumentTypeError(f"no target {', '.join(sorted(unknown))}")
    return [name for name in NAMES if name in wanted]


def part_names(text: str) -> list[str]:
    """Return names of parts."""
    found = text.split(",")
    if unknown := set(found) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}")
    return found


def progress(text: str) -> None:
    """Show the progress on a terminal, in a line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
