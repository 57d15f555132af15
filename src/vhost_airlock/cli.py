"""The command line: arguments to Config, Config to Daemon."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import bench, demo, watch
from .arguments import cpus, number, seconds, size, switch
from .attack import command as attack
from .config import CONNECTED_FD, LISTENING_FD, Config
from .daemon import Daemon
from .dataplane.pump import POLICIES
from .devices import find_type
from .errors import AirlockError, StartError, UsageError

LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and how to learn more."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(argv)
        return int(options.run(options))
    except UsageError as error:
        status = 2
        print(f"vhost-airlock: {error}", file=sys.stderr)
    except AirlockError as error:
        status = 1
        print(f"vhost-airlock: {error}", file=sys.stderr)
    return status


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options; what follows '--' is the back-end's command."""
    command: list[str] = []
    if "--" in argv:
        at = argv.index("--")
        argv, command = argv[:at], argv[at + 1 :]
        if not command:
            raise UsageError("no command after --")
    parser = Parser(
        prog="vhost-airlock",
        description="Keep a vhost-user back-end out of the guest's memory.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="stand between a VMM and a back-end"))
    demo_parser = commands.add_parser("demo", help="see it work, nothing else needed")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    stats_parser = commands.add_parser("stats", help="what a running airlock is doing")
    watch.add_arguments(stats_parser)
    stats_parser.set_defaults(run=watch.run)
    bench_parser = commands.add_parser("bench", help="measure a block device")
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.run)
    attack_parser = commands.add_parser(
        "attack", help="be a hostile guest, VMM or back-end, and see what holds"
    )
    attack.add_arguments(attack_parser)
    attack_parser.set_defaults(run=attack.run)
    options = parser.parse_args(argv)
    options.command = tuple(command)
    return options


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.usage = (
        "vhost-airlock run (--socket-path PATH | --fd N | --front-connect PATH)"
        " (--backend PATH | --backend-listen PATH | -- COMMAND ...) [options]"
    )
    front = parser.add_argument_group("the VMM's side, one of")
    front.add_argument("--socket-path", metavar="PATH", help="listen here for the VMM")
    front.add_argument(
        "--fd", type=int, metavar="N", help="a socket, listening or connected to it"
    )
    front.add_argument(
        "--front-connect", metavar="PATH", help="connect to the VMM, which listens here"
    )
    back = parser.add_argument_group(
        "the back-end's side, one of",
        f"Or, after --, the command that starts it, with {CONNECTED_FD} where it wants"
        f" the number of a connected socket, or {LISTENING_FD} of a listening one.",
    )
    back.add_argument("--backend", metavar="PATH", help="connect to it here")
    back.add_argument("--backend-listen", metavar="PATH", help="wait for it here")
    parser.add_argument(
        "--keep-backend",
        action="store_true",
        help="hold the connection to the back-end from one VMM to the next",
    )
    parser.add_argument(
        "--exit-with-backend",
        action="store_true",
        help="end when the back-end goes away, with status 1",
    )
    parser.add_argument(
        "--copy",
        choices=sorted(POLICIES),
        help="what is copied back of a request's writable part"
        f" (default: {Config.copy}, or what fits the device type)",
    )
    parser.add_argument(
        "--device-type",
        type=find_type,
        metavar="TYPE",
        help="choose defaults for this type of device, as net or block",
    )
    parser.add_argument(
        "--workers",
        type=number(1, 64),
        default=Config.workers,
        metavar="N",
        help="threads over which the queues are spread (default: %(default)s)",
    )
    parser.add_argument(
        "--worker-cpus",
        type=cpus,
        default=Config.worker_cpus,
        metavar="LIST",
        help="bind these threads to processors, in turn, as 2,4-6 (default: any)",
    )
    parser.add_argument(
        "--pool-limit",
        type=size("4K", "4G"),
        default=Config.pool_limit,
        metavar="SIZE",
        help="the most memory for bounce buffers, as 64M or 1G (default: 256M)",
    )
    parser.add_argument(
        "--poll-us",
        type=number(0, 1_000_000),
        default=Config.poll_us,
        metavar="N",
        help="poll so long before sleeping, where it pays (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=Config.timeout,
        metavar="S",
        help="what the back-end has to answer a message (default: %(default)s s)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=seconds,
        default=Config.drain_timeout,
        metavar="S",
        help="what requests have to end when a ring stops (default: %(default)s s)",
    )
    parser.add_argument(
        "--stats-path", metavar="PATH", help="listen here for `vhost-airlock stats`"
    )
    parser.add_argument("--log-level", choices=LEVELS, default=Config.log_level)
    parser.add_argument(
        "--sandbox",
        type=switch,
        default=Config.sandbox,
        metavar="on|off",
        help="give up all rights that are not needed (default: on)",
    )
    parser.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print what a management layer wants to know, as JSON, and exit",
    )


def run(options: argparse.Namespace) -> int:
    """The main job."""
    if options.print_capabilities:
        return print_capabilities(options)
    logging.basicConfig(
        level=options.log_level.upper(), format="vhost-airlock: %(message)s"
    )
    return Daemon(config_of(options)).run()


def config_of(options: argparse.Namespace) -> Config:
    """Return the options as a Config, or say which don't go together."""
    kind = options.device_type
    if kind is not None and kind.refused:
        raise StartError(f"a {kind.name} device can't be isolated: {kind.refused}")
    if options.copy is None:
        options.copy = kind.copy if kind is not None else Config.copy
    _exactly_one(options, ("socket_path", "fd", "front_connect"))
    _exactly_one(options, ("backend", "backend_listen", "command"))
    return Config(
        **{name: getattr(options, name) for name in Config.__dataclass_fields__}
    )


def print_capabilities(options: argparse.Namespace) -> int:
    """Print the back-end's own capabilities if we start it, else the type we are told.

    The convention of vhost-user back-end programs: JSON on stdout, all other options
    ignored.
    """
    command = options.command
    if not command:
        kind = options.device_type
        print(json.dumps({"type": kind.name} if kind is not None else {}))
        return 0
    try:
        done = subprocess.run(
            [command[0], "--print-capabilities"], stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise StartError(f"can't start {command[0]}: {error.strerror}") from None
    return done.returncode


def _exactly_one(options: argparse.Namespace, names: Sequence[str]) -> None:
    given = [name for name in names if getattr(options, name) not in (None, ())]
    if len(given) != 1:
        flags = [
            "-- COMMAND" if name == "command" else "--" + name.replace("_", "-")
            for name in names
        ]
        raise UsageError(f"one of {', '.join(flags)} is needed, and only one")
