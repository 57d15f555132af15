# SPDX-License-Identifier: Apache-2.0
"""The command line: the choice of the command, and its exit status.

Only the module of that command is imported: `run`, which is trusted with a guest's
memory, loads nothing of the demo, the benchmark or the attacks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Container, Sequence

from .. import __version__
from ..errors import AirlockError, UsageError
from .arguments import Parser

COMMANDS = {
    "run": "stand between a VMM and a back-end",
    "qemu": "start QEMU with an airlock in front of each vhost-user back-end",
    "demo": "see it work, without any other program",
    "stats": "show the state of a running airlock",
    "swap": "let a running airlock take another back-end",
    "bench": "measure a block device",
    "attack": "be a hostile guest, VMM or back-end, and see if a program holds",
}
"""Each command with its help text; the module of the same name has add_arguments() and
run()."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return run(argv)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # The reader of our output, `head` for one, has gone. Python flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def run(argv: list[str]) -> int:
    """Run the command; an error is one line and a status."""
    try:
        options = parse(argv)
        return int(options.run(options))
    except AirlockError as error:
        print(f"vhost-airlock: {error}", file=sys.stderr)
        return error.status


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options; the words after '--' are a command, the back-end's or
    QEMU's.
    """
    command: list[str] = []
    if "--" in argv:
        at = argv.index("--")
        argv, command = argv[:at], argv[at + 1 :]
        if not command:
            raise UsageError("no command after --")
    parser, commands = parsers(argv[:1])
    options, unknown = parser.parse_known_args(argv)
    options.rest = tuple(unknown)
    if unknown and "takes_rest" not in options:
        chosen = commands.get(argv[0], parser)
        chosen.error(f"unknown arguments: {' '.join(unknown)}")
    options.command = tuple(command)
    return options


def parsers(loaded: Container[str]) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and that of each command by its name; only
    those of the commands in `loaded` have options.
    """
    parser = Parser(
        prog="vhost-airlock",
        description="Keep a vhost-user back-end out of the guest's memory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"vhost-airlock {__version__}",
        help="print the version, and end",
    )
    commands = parser.add_subparsers(
        title="commands", dest="chosen", required=True, metavar="COMMAND"
    )
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
        )
        if name in loaded:
            module = importlib.import_module(f"..{name}", __name__)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser, commands.choices
