# SPDX-License-Identifier: Apache-2.0
"""The airlock against a direct connection, side by side on the same back-end.

    python -m bench.bench [--long] [--only PATTERN] [--targets NAME,...]

One qemu-storage-daemon exports a file in memory. Load programs drive it directly,
through airlocks, and by NBD, in turn and never at the same time. Each round goes
through all cases; the order of targets changes from run to run. Figures are medians
over rounds, ratios medians of the ratios in each round.

Runs during which other programs kept the machine busy are repeated a few times; if they
were disturbed again, the row has a star.
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
from dataclasses import dataclass, field
from pathlib import Path

from bench import cases, document, extras, goals
from bench.extras import ExtraRow, in_rounds
from bench.fronts import Fronts
from bench.goals import Goal, measure_goals
from bench.html import page
from bench.machine import be_prompt, describe, idle_cores_poll
from bench.measure import Bench
from bench.network import Network
from bench.runs import BenchError, Case, Row, Run, summarize
from bench.shared_folder import SharedFolder
from bench.table import heading, report
from bench.targets import AIRLOCKS, DIRECT, NAMES, QUICK, targets
from tests.real.programs import PROJECT, Programs, find

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
    loads = cases.chosen(cases.long() if options.long else cases.quick(), options.only)
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
    results = Results(describe(programs), time.strftime("%-d %B %Y"))
    print(heading(results.machine), flush=True)
    status = 0
    try:
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
    results.rows = summarize(results.runs, DIRECT)
    results.rows.sort(key=lambda r: (loads.index(r.case), NAMES.index(r.target)))
    if results.rows or results.goals or results.extras:
        show(results, options)
    return status


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
            with targets(programs, folder, options.targets) as found:
                be_prompt()
                fronts = Fronts(programs, folder, options.ms)
                bench = Bench(fronts, found, options.patience)
                for run in bench.measure_all(loads, options.rounds, progress):
                    results.runs.append(run)
                results.failures += bench.failures
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
    others = [name for name in options.targets if name != DIRECT]
    if results.rows:
        print(report(results.rows, others))
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
    plots.write_text(
        page(results.machine, results.when, results.rows, results.goals, results.extras)
    )
    print(f"\nplots: {plots}\nall runs: {kept}")
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
        "--patience",
        type=float,
        metavar="S",
        help="seconds to wait, in all, for other programs to leave the machine quiet",
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
    parser.set_defaults(
        rounds=3, ms=250, patience=30.0, targets=list(QUICK), parts=["disk"]
    )
    if parser.parse_known_args(argv)[0].long:
        parser.set_defaults(
            rounds=5, ms=500, patience=600.0, targets=list(NAMES), parts=list(PARTS)
        )
    return parser.parse_args(argv)


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
