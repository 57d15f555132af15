# SPDX-License-Identifier: Apache-2.0
"""`vhost-airlock swap`: another back-end takes the place of the one that is there."""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from typing import Any

from ..errors import StartError, UsageError
from ..process.control import KIND, LARGEST
from ..process.sockets import reason_of
from ..process.target import Target
from .stats_document import PATIENCE, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vhost-airlock swap`."""
    parser.usage = "vhost-airlock swap CONTROL (--backend PATH | -- COMMAND ...)"
    parser.epilog = (
        "After -- comes the command that starts the new back-end, as in `vhost-airlock"
        " run`. The airlock starts it, with its own user, folder and environment."
    )
    parser.add_argument(
        "control", metavar="CONTROL", help="the --control-path of the airlock"
    )
    parser.add_argument(
        "--backend", metavar="PATH", help="the new back-end listens here"
    )


def run(options: argparse.Namespace) -> int:
    """Order the swap, and wait for its end."""
    if (options.backend is None) == (not options.command):
        raise UsageError("one of --backend and -- COMMAND is needed")
    target: dict[str, Any]
    if options.command:
        target = {"command": list(options.command)}
    else:
        target = {"backend": os.path.abspath(options.backend)}
    print(order(options.control, {"do": "swap", **Target.parse(target).told()}))
    return 0


def order(path: str, command: dict[str, Any]) -> str:
    """Give a command at a control socket; returns the result. StartError if it is not
    carried out.
    """
    try:
        answer = json.loads(_exchange(path, json.dumps(command).encode() + b"\n"))
        if "result" in answer:
            return _printable(answer["result"])
        raise StartError(f"not swapped: {_printable(answer['error'])}")
    except (ValueError, KeyError, TypeError):
        raise StartError(f"no airlock's answer at {path}: it is another's") from None


def _exchange(path: str, command: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX, KIND) as sock:
        try:
            sock.settimeout(PATIENCE)
            connect(sock, path, time.monotonic() + PATIENCE)
            sock.send(command, socket.MSG_NOSIGNAL)
            sock.settimeout(None)
            answer = sock.recv(2 * LARGEST)
        except OSError as error:
            raise StartError(f"no airlock at {path}: {reason_of(error)}") from None
    if not answer:
        raise StartError(
            f"no answer at {path}: the airlock has ended, or it is another"
        )
    return answer


def _printable(text: str) -> str:
    """Return a text that a terminal can have: parts of it come from other processes."""
    return "".join(char if char.isprintable() else "?" for char in text)
