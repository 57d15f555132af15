# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock stats`: gets the state of running airlocks, and shows it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

from ..errors import StartError, UsageError
from .arguments import interval, number
from .metrics import prometheus
from .stats_document import Answer, Document, NoStats, ask_all
from .stats_table import RATES_HEADING, Rates, rates_line, table

HEADING = 20
"""Lines of rates after which the heading comes again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vhost-airlock stats`."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="the --stats-path of an airlock, or a folder: all airlocks whose sockets"
        " for stats are in it",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="print the answers as they come, a line of JSON for each airlock",
    )
    form.add_argument(
        "--prometheus", action="store_true", help="print the text format of Prometheus"
    )
    form.add_argument(
        "--interval",
        type=interval,
        metavar="S",
        help="print rates every S seconds, a line for each airlock",
    )
    parser.add_argument(
        "--count",
        type=number(1),
        metavar="N",
        help="print rates N times (default: until interrupted)",
    )


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    if options.count is not None and options.interval is None:
        raise UsageError("--count goes with --interval")
    if options.interval is not None:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(options.paths, options.interval, options.count)
        return 0
    answers, failures = ask_all(options.paths)
    if options.prometheus:
        _tell(failures)
        print(prometheus(answers, failures), end="")
        return 0
    _require_some(options.paths, answers, failures)
    if options.json:
        print("\n".join(each.text.rstrip() for each in answers))
    else:
        print("\n\n".join(table(each.document) for each in answers))
    _tell(failures)
    return 1 if failures else 0


def _watch(paths: Sequence[str], interval: float, count: int | None) -> None:
    several = len(paths) > 1 or os.path.isdir(paths[0])
    printed = HEADING
    for before, after in islice(pairwise(_looks(paths, interval)), count):
        if printed >= HEADING:
            print(RATES_HEADING + "  airlock" * several, flush=True)
            printed = 0
        for path, document in after.items():
            if path in before:
                line = rates_line(Rates.between(before[path], document))
                print(line + f"  {document.name}" * several, flush=True)
                printed += 1


def _looks(paths: Sequence[str], interval: float) -> Iterator[dict[str, Document]]:
    """Yield all documents by path, again and again. An airlock that does not answer is
    told once.
    """
    due = time.monotonic()
    told: set[str] = set()
    while True:
        answers, failures = ask_all(paths)
        _require_some(paths, answers, failures)
        _tell(each for each in failures if each.path not in told)
        told = {each.path for each in failures}
        yield {each.path: each.document for each in answers}
        now = time.monotonic()
        due = max(due + interval, now)
        time.sleep(due - now)


def _require_some(
    paths: Sequence[str], answers: Sequence[Answer], failures: Sequence[NoStats]
) -> None:
    """Raise StartError if there is no answer."""
    if answers:
        return
    if len(failures) == 1:
        raise failures[0]
    _tell(failures)
    raise StartError(f"no airlock's stats at {', '.join(paths)}")


def _tell(failures: Iterable[NoStats]) -> None:
    for each in failures:
        print(f"vhost-airlock: {each}", file=sys.stderr, flush=True)
