# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock attack`: its options, and the attacks that they choose."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..attack import back_judge, front_judge
from ..attack.back_messages import BACK_MESSAGES
from ..attack.back_rings import BACK_RINGS
from ..attack.catalogue import Attack, Outcome, select
from ..attack.guest_chains import CHAINS
from ..attack.guest_races import RACES
from ..attack.guest_requests import REQUESTS
from ..attack.guest_scene import GuestScene
from ..attack.program import Program
from ..attack.report import Report, listing
from ..attack.vmm import MESSAGES, VmmScene
from ..attack.vmm_log import LOGS
from ..errors import StartError, UsageError
from ..process.signals import ending_on_signals
from ..vhost.fds import Fd
from .arguments import seconds

GUEST: list[Attack[GuestScene]] = [*CHAINS.attacks, *REQUESTS.attacks, *RACES.attacks]
VMM: list[Attack[VmmScene]] = [*MESSAGES.attacks, *LOGS.attacks]
BACK: list[Attack[Any]] = [*BACK_RINGS.attacks, *BACK_MESSAGES.attacks]
GROUPS: list[tuple[str, Sequence[Attack[Any]]]] = [
    ("--as-guest", GUEST),
    ("--as-vmm", VMM),
    ("--as-backend", BACK),
]
TIMEOUT = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vhost-airlock attack`."""
    parser.usage = (
        "vhost-airlock attack (--as-guest PATH | --as-vmm PATH |"
        " --as-backend PATH --front PATH | --list) [options] [NAME ...]"
        " [-- COMMAND ...]"
    )
    parser.epilog = (
        "After --, the command that starts the program: it is started again when"
        " an attack has ended it. Only attack a disk whose data you don't need."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="attacks, or patterns such as 'race-*'"
    )
    parser.add_argument(
        "--as-guest",
        metavar="PATH",
        help="attack the block back-end or airlock that listens here, as its guest",
    )
    parser.add_argument(
        "--as-vmm",
        metavar="PATH",
        help="attack the program that listens here, as its VMM",
    )
    parser.add_argument(
        "--as-backend",
        metavar="PATH",
        help="listen here, and attack the airlock that connects, as its back-end",
    )
    parser.add_argument(
        "--front", metavar="PATH", help="the socket of that airlock for its VMM"
    )
    parser.add_argument(
        "--list", action="store_true", help="print all attacks, and end"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, and nothing else"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=TIMEOUT,
        metavar="S",
        help="seconds in which the program has to serve a good request; set more than"
        " its own time-outs (default: %(default)s)",
    )
    parser.add_argument(
        "--log", metavar="FILE", help="write the output of COMMAND to this file"
    )


def run(options: argparse.Namespace) -> int:
    """Run attacks; 0 when the program held against all of them."""
    if options.list:
        print(listing(GROUPS))
        return 0
    chosen = _chosen(options)
    # The peers of this command log the errors that the attacks cause.
    logging.getLogger("vhost_airlock").setLevel(logging.CRITICAL)
    report = Report(chosen, None if options.json else sys.stdout)
    with ending_on_signals():
        for outcome in _outcomes(options, chosen):
            report.add(outcome)
    if options.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        report.conclude()
    return 0 if report.held else 1


def _chosen(options: argparse.Namespace) -> list[Attack[Any]]:
    given = [
        attacks
        for path, (_, attacks) in zip(
            (options.as_guest, options.as_vmm, options.as_backend), GROUPS, strict=True
        )
        if path is not None
    ]
    if not given:
        raise UsageError("one of --as-guest, --as-vmm, --as-backend, --list is needed")
    if len(given) > 1:
        raise UsageError("--as-guest, --as-vmm and --as-backend exclude each other")
    if (options.as_backend is None) != (options.front is None):
        raise UsageError("--as-backend and --front go together")
    return select(given[0], options.names)


def _outcomes(
    options: argparse.Namespace, attacks: Sequence[Attack[Any]]
) -> Iterator[Outcome]:
    path = options.as_guest or options.as_vmm or options.front
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(_open(options.log or os.devnull))
        program = Program(path, options.command, options.timeout, log.fileno())
        program.require()
        if options.as_backend is not None:
            yield from back_judge.run(program, attacks, options.as_backend)
            return
        stack.enter_context(program)
        scene = GuestScene if options.as_guest is not None else VmmScene
        yield from front_judge.run(program, attacks, scene)


def _open(path: str) -> Fd:
    """Open the file for COMMAND's output. StartError if that can't be."""
    try:
        return Fd(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        raise StartError(f"--log {path}: {error.strerror}") from None
