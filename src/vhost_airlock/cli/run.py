# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock run`: arguments to ProcessConfig, that to Daemon."""

from __future__ import annotations

import argparse
import os
from collections.abc import MutableMapping, Sequence
from typing import Any

from ..dataplane.pump import POLICIES
from ..errors import AirlockError, UsageError
from ..process import manager
from ..process.command import CONNECTED_FD, LISTENING_FD
from ..process.config import FENCES, ProcessConfig
from ..process.daemon import Daemon
from ..process.log import LEVELS, log_to_stderr
from ..process.sockets import LONGEST_PATH, address_of, listens
from ..proxy.caches import cached_bytes
from ..proxy.config import Config
from ..proxy.device_types import find_type
from ..record import fields
from .arguments import (
    LONGEST_NAME,
    cpus,
    features,
    group,
    mode,
    name,
    number,
    seconds,
    size,
    switch,
)

FRONT = ("socket_path", "fd", "front_connect")
BACK = ("backend", "backend_listen", "backend_fd", "command")
"""The options for one side, of which one is needed."""
PATHS = (
    *("socket_path", "front_connect", "backend", "backend_listen"),
    *("stats_path", "control_path"),
)
"""The options that name a socket by its path."""
FD = number(0, (1 << 31) - 1)
LOSS = ("recover", "close", "exit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "vhost-airlock run (--socket-path PATH | --fd N | --front-connect PATH)"
        " (--backend PATH | --backend-listen PATH | --backend-fd N | -- COMMAND ...)"
        " [options]"
    )
    front = parser.add_argument_group("the VMM's side, one of")
    front.add_argument("--socket-path", metavar="PATH", help="listen here for the VMM")
    front.add_argument(
        "--fd",
        type=FD,
        metavar="N",
        help="use this inherited socket, listening or connected",
    )
    front.add_argument(
        "--front-connect", metavar="PATH", help="connect to a VMM that listens here"
    )
    back = parser.add_argument_group(
        "the back-end's side, one of",
        f"Or, after --, the command that starts it, with {CONNECTED_FD} in place of the"
        f" number of a connected socket, or {LISTENING_FD} of a listening one.",
    )
    back.add_argument("--backend", metavar="PATH", help="connect to the back-end here")
    back.add_argument(
        "--backend-listen", metavar="PATH", help="listen here for the back-end"
    )
    back.add_argument(
        "--backend-fd",
        type=FD,
        metavar="N",
        help="use this inherited socket, listening or connected; a connected one serves"
        " until it ends, and the airlock ends then",
    )
    waits = parser.add_mutually_exclusive_group()
    waits.add_argument(
        "--wait-for",
        type=seconds,
        metavar="S",
        help="seconds after the start in which a socket has to be at --backend, or the"
        " airlock ends (default: no limit)",
    )
    waits.add_argument(
        "--no-wait",
        action="store_true",
        help="fail at the start if the back-end is not there, and do not wait for it",
    )
    parser.add_argument(
        "--keep-backend",
        action="store_true",
        help="keep the connection to the back-end from one VMM to the next",
    )
    parser.add_argument(
        "--on-backend-loss",
        choices=LOSS,
        help="when the back-end goes away: recover, if another one comes that is the"
        " same device; close the VMM's connection; or exit, with status 1 (default:"
        " recover or close, by the device type)",
    )
    parser.add_argument(
        "--recover-for",
        type=seconds,
        dest="recover_time",
        default=Config.recover_time,
        metavar="S",
        help="seconds in which another back-end has to come (default: %(default)s)",
    )
    parser.add_argument(
        "--fence",
        choices=FENCES,
        default=ProcessConfig.fence,
        help="the sign that a lost back-end has ended its requests, so that another one"
        " may get them: its reply on a new connection, or the exit of its process too"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--recover-times",
        type=number(1, 1_000_000),
        default=Config.recover_times,
        metavar="N",
        help="the losses within a minute after which no other back-end is looked for"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--exit-with-pipe",
        type=FD,
        metavar="N",
        help="end when no process has the other end of this inherited pipe any more",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="end when the first VMM has left",
    )
    parser.add_argument(
        "--copy",
        choices=sorted(POLICIES),
        metavar="POLICY",
        help="how much of a request's writable buffers is copied back to the guest:"
        f" {', '.join(sorted(POLICIES))} (default: that of the device type, or"
        f" {Config.copy})",
    )
    parser.add_argument(
        "--device-type",
        type=find_type,
        metavar="TYPE",
        help="choose defaults for this type of device, as net or block",
    )
    parser.add_argument(
        "--withhold-features",
        type=features,
        default=Config.withhold_features,
        metavar="LIST",
        help="do not offer the VMM these features, by names and masks as in the log,"
        " as EVENT_IDX,0x4000: its guest can then move to a host without them",
    )
    parser.add_argument(
        "--workers",
        type=number(1, 64),
        default=Config.workers,
        metavar="N",
        help="number of threads that move requests; queues are spread over them"
        " (default: %(default)s)",
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
        "--request-limit",
        type=size("0", "4G"),
        default=Config.request_limit,
        metavar="SIZE",
        help="the largest single request; it may be larger than the pool (default: 1G)",
    )
    parser.add_argument(
        "--cached",
        type=size("0", "4G"),
        metavar="SIZE",
        help="what caches hold: with more in flight a fast back-end may have to wait;"
        " 0: never (default: as the system says, 4M or more)",
    )
    parser.add_argument(
        "--poll-us",
        type=number(0, 1_000_000),
        default=Config.poll_us,
        metavar="N",
        help="microseconds to poll before sleeping, at most; 0 never polls"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=Config.timeout,
        metavar="S",
        help="seconds that the back-end may take to answer a message; also all messages"
        " to it that one message of the VMM needs (default: %(default)s)",
    )
    parser.add_argument(
        "--drain-timeout",
        type=seconds,
        default=Config.drain_timeout,
        metavar="S",
        help="seconds that requests at the back-end may take to end when queues stop"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--stats-path", metavar="PATH", help="listen here for `vhost-airlock stats`"
    )
    parser.add_argument(
        "--control-path",
        metavar="PATH",
        help="listen here for `vhost-airlock swap` and `vhost-airlock stats`, for the"
        " airlock's own user alone",
    )
    parser.add_argument(
        "--name",
        type=name,
        help="the device's name in the log and in stats"
        " (default: that of the VMM's socket, without its folder)",
    )
    parser.add_argument(
        "--socket-mode",
        type=mode,
        metavar="MODE",
        help="the mode of the sockets at which the airlock listens, in octal digits"
        " (default: 0600, with a group 0660)",
    )
    parser.add_argument(
        "--socket-group",
        type=group,
        metavar="GROUP",
        help="the group of these sockets, by name or number",
    )
    parser.add_argument(
        "--require-other-user",
        action="store_true",
        help="refuse a back-end that runs as root, or as the user of the VMM or of the"
        " airlock",
    )
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        metavar="LEVEL",
        default=ProcessConfig.log_level,
        help=f"leave out messages below this level of {', '.join(LEVELS)}"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--sandbox",
        type=switch,
        default=ProcessConfig.sandbox,
        metavar="on|off",
        help="drop all rights that serving does not need (default: on)",
    )
    parser.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print the device's type and features as JSON for management layers, and"
        " exit; takes --device-type, or -- COMMAND, which is asked for them",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until a signal comes; returns the exit status."""
    if options.print_capabilities:
        from .capabilities import capabilities  # it needs modules that serving does not

        print(capabilities(options.device_type, options.command).as_json())
        return 0
    take_from_manager(options, os.environ)
    config = config_of(options)
    log_to_stderr(config.log_level, config.device.name)
    try:
        return Daemon(config).run()
    except UsageError:
        raise
    except AirlockError as error:
        config.device.log.error("%s", error)
        return error.status


def take_from_manager(
    options: argparse.Namespace, environ: MutableMapping[str, str]
) -> None:
    """Add the sockets of the service manager to the options, and where it hears us.

    UsageError if there is an option for the same side.
    """
    options.notify_socket = environ.pop("NOTIFY_SOCKET", None)
    passed = manager.take_sockets(environ)
    for side, field, others in (
        (manager.FRONT, "fd", FRONT),
        (manager.BACK, "backend_fd", BACK),
        (manager.STATS, "stats_fd", ("stats_path",)),
        (manager.CONTROL, "control_fd", ("control_path",)),
    ):
        if side in passed:
            for other in _given(options, others):
                raise UsageError(
                    f"{_flag(other)}: the service manager passes a socket for this side"
                    f" ({side})"
                )
            setattr(options, field, passed[side])


def config_of(options: argparse.Namespace) -> ProcessConfig:
    """Return the options as one object. UsageError if some don't go together."""
    kind = options.device_type
    if kind is not None:
        kind.require_isolation()
    if options.copy is None:
        options.copy = kind.copy if kind is not None else Config.copy
    options.whole_batches = kind.whole_batches if kind else Config.whole_batches
    options.has_error = kind is not None and kind.has_error
    if options.cached is None:
        options.cached = cached_bytes()
    options.grows = kind is not None and kind.grows
    if options.wait_for is not None and options.backend is None:
        raise UsageError("--wait-for goes with --backend")
    single = options.backend_fd is not None and not listens(options.backend_fd)
    loss = options.on_backend_loss
    if loss == "recover" and single:
        raise UsageError(
            f"--on-backend-loss recover: descriptor {options.backend_fd} is one"
            " connection, after which no other back-end can come"
        )
    if loss == "recover" and kind is not None and kind.stateful:
        raise UsageError(
            f"--on-backend-loss recover: a back-end of type {kind.name} has"
            f" {kind.stateful}, which another one has not"
        )
    if loss is None:
        recovers = kind is not None and kind.recovers and not single
        loss = "recover" if recovers else "close"
    options.recover = loss == "recover"
    options.stateful = kind.stateful if kind is not None else ""
    options.exit_with_backend = loss == "exit"
    _exactly_one(options, FRONT)
    _exactly_one(options, BACK)
    if options.fd is not None and options.fd == options.backend_fd:
        raise UsageError(f"--fd and --backend-fd are the same socket: {options.fd}")
    if options.name is None:
        options.name = _default_name(options)
    _need_listening(options)
    _need_paths_of_their_own(options)
    return ProcessConfig(
        device=Config(**_chosen(options, Config)),
        **_chosen(options, ProcessConfig),
    )


def _default_name(options: argparse.Namespace) -> str:
    """Return the name of the VMM's socket, with ? for what can't be printed."""
    path = options.socket_path or options.front_connect
    if path is None:
        path = address_of(options.fd) or f"fd {options.fd}"
    base = os.path.basename(path)
    printable = "".join(char if char.isprintable() else "?" for char in base)
    return printable[:LONGEST_NAME] or Config.name


def _chosen(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the options that are fields of this class, by name."""
    names = fields(kind)
    return {name: value for name, value in vars(options).items() if name in names}


def _need_listening(options: argparse.Namespace) -> None:
    """Raise UsageError if there are rights for sockets, and no sockets to have them."""
    paths = ("socket_path", "backend_listen", "stats_path")
    for right in _given(options, ("socket_mode", "socket_group")):
        if not _given(options, paths):
            flags = ", ".join(map(_flag, paths))
            raise UsageError(f"{_flag(right)} needs one of {flags}")


def _need_paths_of_their_own(options: argparse.Namespace) -> None:
    """Raise UsageError if two options have the same socket, or one has none."""
    paths: dict[str, str] = {}
    for option in _given(options, PATHS):
        path = getattr(options, option)
        told = f"{_flag(option)} {path}"
        if not path:
            raise UsageError(f"{_flag(option)}: no path")
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise UsageError(
                f"{told}: a socket's path has at most {LONGEST_PATH} bytes"
            )
        other = paths.setdefault(os.path.realpath(path), told)
        if other is not told:
            raise UsageError(f"{other} and {told} are the same socket")


def _exactly_one(options: argparse.Namespace, names: Sequence[str]) -> None:
    given = _given(options, names)
    if not given:
        raise UsageError(f"one of {', '.join(map(_flag, names))} is needed")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(map(_flag, given))} exclude each other")


def _given(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(options, name) not in (None, ())]


def _flag(name: str) -> str:
    return "-- COMMAND" if name == "command" else "--" + name.replace("_", "-")
