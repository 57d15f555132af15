# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock qemu`: QEMU, with an airlock in front of each vhost-user back-end.

The command becomes QEMU, by exec: the process number, standard descriptors, inherited
descriptors and signals are QEMU's. The airlocks are processes of their own and end with
it, see keeper.py; their sockets are in a folder that only their user can enter.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence

from ..errors import StartError, UsageError
from ..log import Logger
from ..process.log import log_to_stderr
from ..process.sockets import Listener, inherited, reason_of, require_socket
from . import run as airlock
from .arguments import LONGEST_NAME, Parser
from .keeper import Airlock, keep
from .qemu_options import has
from .qemu_plan import Isolated, Plan

log = Logger(__name__)

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""The status of a shell for a command that can't be run."""

RUN = (sys.executable, "-P", "-m", "vhost_airlock", "run")
"""An airlock, found where this process is; -P: not in the current folder."""

STDERR = 2

OWN = (
    *("socket_path", "fd", "front_connect"),
    *("backend", "backend_listen", "backend_fd"),
    *("name", "stats_path", "control_path", "exit_with_pipe", "print_capabilities"),
)
"""Options of an airlock that can't be the same for several."""

RIGHTS = ("--socket-mode", "--socket-group")
"""Options of an airlock that listens at a path for its back-end or for stats."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_rest=True)
    parser.usage = (
        "vhost-airlock qemu [options] [options of `vhost-airlock run`] --"
        " qemu-system-x86_64 ..."
    )
    parser.description = (
        "Start QEMU with memory isolation. Each vhost-user back-end on its command line"
        " gets an airlock; or, where devices have memory-isolation=on, theirs alone."
        " Options of `vhost-airlock run`, as --workers=2, are for all airlocks."
    )
    parser.add_argument(
        "--stats-dir",
        metavar="DIR",
        help="a folder for the airlocks' sockets for stats, CHARDEV.sock, for"
        " `vhost-airlock stats DIR`",
    )
    parser.add_argument(
        "--control-dir",
        metavar="DIR",
        help="a folder for the airlocks' control sockets, CHARDEV.control, for"
        " `vhost-airlock swap`",
    )
    parser.add_argument(
        "--log-file",
        metavar="PATH",
        help="append the airlocks' log to this file"
        " (default: stderr, or nowhere when QEMU has -daemonize)",
    )
    for flag in RIGHTS:
        parser.add_argument(
            flag,
            help="as for `vhost-airlock run`; for the sockets at which airlocks listen"
            " for a back-end or for stats",
        )


def run(options: argparse.Namespace) -> int:
    """Become QEMU; returns a status only if that is not possible."""
    if not options.command:
        raise UsageError("no command of QEMU (see vhost-airlock qemu --help)")
    log_to_stderr("warning", "qemu")
    check([*options.rest, *rights(options)])
    plan = Plan(options.command)
    for device in plan.isolated:
        if device.fd is not None:
            require_inherited(device.name, device.fd, listens=device.listens)
        elif not device.listens:
            require_socket(device.back, may_come=device.may_come)
    for flag, folder in folders(options).items():
        if not os.path.isdir(folder):
            raise StartError(f"{flag} {folder}: it is no folder")
    for warning in plan.warnings:
        log.warning("%s", warning)
    return become(isolate(plan, options) if plan.isolated else plan.words)


def check(words: Sequence[str]) -> None:
    """Raise UsageError unless all airlocks can have these options."""
    parser = Parser(prog="vhost-airlock qemu", allow_abbrev=False)
    airlock.add_arguments(parser)
    options = parser.parse_args(words)
    for name in OWN:
        if getattr(options, name) != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} can't be the same for all airlocks")
    options.fd, options.backend_listen, options.command = 0, ".", ()
    airlock.config_of(options)


def require_inherited(chardev: str, fd: int, *, listens: bool) -> None:
    """Raise StartError unless an inherited socket is as QEMU would use it.

    QEMU does not inherit it any more.
    """
    sock, listening = inherited(fd)
    sock.detach()
    if listening != listens:
        trouble = "does not listen" if listens else "listens"
        server = "on" if listens else "off"
        raise StartError(
            f"-chardev {chardev},server={server}: descriptor {fd} {trouble}"
        )


def isolate(plan: Plan, options: argparse.Namespace) -> list[str]:
    """Start the airlocks; returns QEMU's command with their sockets in it."""
    stderr = open_log(options.log_file, quiet=has(plan.words, "daemonize"))
    with contextlib.ExitStack() as undo:
        try:
            folder = tempfile.mkdtemp(prefix="vhost-airlock-")
            undo.callback(shutil.rmtree, folder)
            reading, writing = os.pipe()
            airlocks = []
            for device in plan.isolated:
                words, fds = ways(device, folder)
                words += [f"--exit-with-pipe={reading}", *options_of(device, options)]
                airlocks.append(Airlock([*RUN, *words, *options.rest], [reading, *fds]))
            keep(airlocks, folder, stderr)
        except OSError as error:
            raise StartError(f"can't start airlocks: {reason_of(error)}") from None
        undo.pop_all()
    os.set_inheritable(writing, True)
    return plan.command(folder)


def ways(device: Isolated, folder: str) -> tuple[list[str], list[int]]:
    """Return (options, descriptors that they name) of an airlock for its two sides.

    The socket on which it listens for QEMU is made here, so that QEMU need not wait
    until the airlock has started.
    """
    path = os.path.join(folder, device.file)
    words, fds = [], []
    if device.listens:
        words.append(f"--front-connect={path}")
    else:
        listener = Listener(path)
        listener.disown()
        fds.append(listener.socket.detach())
        words.append(f"--fd={fds[0]}")
    if device.fd is not None:
        words.append(f"--backend-fd={device.fd}")
        fds.append(device.fd)
    elif device.listens:
        words.append(f"--backend-listen={device.back}")
    else:
        words.append(f"--backend={device.back}")
    return words, fds


def options_of(device: Isolated, options: argparse.Namespace) -> list[str]:
    """Return the options of a device's airlock that are not the same for all."""
    words = [f"--name={device.name[:LONGEST_NAME]}"]
    if device.kind:
        words.append(f"--device-type={device.kind}")
    by_path = device.fd is None
    if by_path and not device.listens and not device.may_come:
        words.append("--no-wait")
    if options.stats_dir is not None:
        words.append(f"--stats-path={os.path.join(options.stats_dir, device.file)}")
    if options.control_dir is not None:
        name = device.file.removesuffix(".sock") + ".control"
        words.append(f"--control-path={os.path.join(options.control_dir, name)}")
    if options.stats_dir is not None or (by_path and device.listens):
        words += rights(options)
    return words


def folders(options: argparse.Namespace) -> dict[str, str]:
    """Return the folders for sockets of airlocks, by the options that name them."""
    named = {"--stats-dir": options.stats_dir, "--control-dir": options.control_dir}
    return {flag: folder for flag, folder in named.items() if folder is not None}


def rights(options: argparse.Namespace) -> list[str]:
    """Return the options about the rights to sockets that an airlock makes itself."""
    values = {flag: getattr(options, flag[2:].replace("-", "_")) for flag in RIGHTS}
    return [f"{flag}={value}" for flag, value in values.items() if value is not None]


def open_log(path: str | None, *, quiet: bool) -> int:
    """Return a descriptor for the airlocks' log."""
    if path is None and not quiet:
        return STDERR
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        return os.open(os.devnull if path is None else path, flags, 0o600)
    except OSError as error:
        raise StartError(f"can't write to {path}: {reason_of(error)}") from None


def environment() -> dict[str, str]:
    """Return the environment that this process was given.

    Where no locale is set, Python sets LC_CTYPE.
    """
    with open("/proc/self/environ", "rb") as file:
        given = file.read().split(b"\0")
    if any(each.startswith(b"LC_CTYPE=") for each in given):
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if name != "LC_CTYPE"}


def become(command: Sequence[str]) -> int:
    """Become another program; returns the status of a shell if that is not possible."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python has them ignored
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvpe(command[0], [*command], environment())
    except OSError as error:
        reason = reason_of(error)
        print(f"vhost-airlock: can't run {command[0]}: {reason}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
