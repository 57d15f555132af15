# SPDX-License-Identifier: Apache-2.0
"""Measure a vhost-user block device, or two of them side by side.

A guest that only makes requests (peers/blk_load.py) connects to a socket and keeps them
in flight. With a second socket, for example the back-end's own beside an airlock's,
each load runs on one socket right after the other, and these two runs are compared.
Never both at once: they may lead to the same device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from ..errors import UsageError
from ..peers.blk_load import MODES, LoadPlan, measure
from .arguments import number, seconds, size
from .bench_report import Measured, heading, table

SIZE = size("512", "16T")
NUMBER = number(1, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vhost-airlock bench`."""
    parser.description = (
        "Put loads on a vhost-user block device and measure it. Modes that write"
        " destroy the data on the disk."
    )
    parser.add_argument(
        "--socket-path",
        required=True,
        metavar="PATH",
        help="the socket of the device to measure",
    )
    parser.add_argument(
        "--compare",
        metavar="PATH",
        help="the socket of another way to the same device; ratios are to its rate",
    )
    plan = LoadPlan()
    parser.add_argument(
        "--mode",
        type=modes,
        default=[plan.mode],
        metavar="MODE,...",
        help=f"some of {', '.join(MODES)} (default: {plan.mode})",
    )
    parser.add_argument(
        "--size",
        type=sizes,
        default=[4096, 65536],
        metavar="SIZE,...",
        help="sizes of a request (default: 4K,64K)",
    )
    parser.add_argument(
        "--depth",
        type=numbers,
        default=[1, 8, 32, 128],
        metavar="N,...",
        help="requests in flight in each queue (default: 1,8,32,128)",
    )
    parser.add_argument(
        "--queues",
        type=NUMBER,
        default=1,
        metavar="N",
        help="queues to drive at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=NUMBER,
        default=3,
        metavar="N",
        help="times that each load is measured; the table has medians"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=0.5,
        metavar="S",
        help="time of each measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--no-indirect",
        dest="indirect",
        action="store_false",
        help="put all descriptors into the ring itself, and none into indirect tables",
    )
    parser.add_argument(
        "--busy-wait",
        action="store_true",
        help="poll for completions without a pause, and ask for no calls",
    )
    parser.add_argument(
        "--segment",
        type=SIZE,
        default=0,
        metavar="SIZE",
        help="cut requests into segments of this size",
    )
    parser.add_argument(
        "--span",
        type=SIZE,
        default=0,
        metavar="SIZE",
        help="memory over which each queue spreads its buffers; much more than the"
        " caches hold keeps buffers out of them (default: as little as requests need)",
    )
    parser.add_argument(
        "--ram",
        type=SIZE,
        default=0,
        metavar="SIZE",
        help="guest memory that the device is told of and no request uses",
    )
    parser.add_argument(
        "--json", action="store_true", help="print all measurements as JSON"
    )


def run(options: argparse.Namespace) -> int:
    """Measure, and print the results; returns the exit status."""
    plans = plans_of(options)
    paths = [options.socket_path, *([options.compare] if options.compare else [])]
    measured: list[Measured] = []
    try:
        for done in range(options.rounds * len(plans)):
            number, at = divmod(done, len(plans))
            # The first run of a pair may have it harder, so paths take turns at it.
            for path in paths if (number + at) % 2 == 0 else reversed(paths):
                _progress(f"{done}/{options.rounds * len(plans)} {path}")
                result = measure(path, plans[at])
                measured.append(Measured(plans[at], path, number, result))
    finally:
        _progress("")
    if options.json:
        print(json.dumps([each.as_dict() for each in measured], indent=1))
    else:
        print(heading(paths))
        print(table(measured, paths))
    return 0


def plans_of(options: argparse.Namespace) -> list[LoadPlan]:
    """Return the loads of these options: all combinations."""
    names = [field.name for field in dataclasses.fields(LoadPlan)]
    common = {name: getattr(options, name) for name in names if name in options}
    try:
        return [
            LoadPlan(**{**common, "mode": mode, "size": each, "depth": depth})
            for mode in options.mode
            for each in options.size
            for depth in options.depth
        ]
    except ValueError as error:
        raise UsageError(str(error)) from None


def modes(text: str) -> list[str]:
    """Return modes that are separated by commas."""
    found = text.split(",")
    for mode in found:
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"{mode}: none of {', '.join(MODES)}")
    return found


def sizes(text: str) -> list[int]:
    """Return sizes that are separated by commas."""
    return [SIZE(part) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    """Return numbers that are separated by commas."""
    return [NUMBER(part) for part in text.split(",")]


def _progress(text: str) -> None:
    """Show the progress on a terminal, in a line that is overwritten."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
