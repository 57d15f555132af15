# SPDX-License-Identifier: Apache-2.0
"""Airlocks that live as long as another process, and the keeper that tidies up.

That process holds the other end of a pipe, and so does every process that it becomes or
leaves its work to, by exec or by fork: the airlocks end with the last of them. So they
need no signal, and get none: they are in a session of their own, which the terminal's
Ctrl-C does not reach, and serve until the process is done with them.

The keeper starts the airlocks, waits for their ends, and removes the folder with their
sockets. It is no child of the process, which would not expect one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from ..log import Logger
from ..process.signals import ENDING

log = Logger(__name__)

HELD = 3
"""The first number after the standard descriptors."""


@dataclass(frozen=True)
class Airlock:
    """An airlock that the keeper starts."""

    words: Sequence[str]
    """Its command."""
    fds: Sequence[int]
    """The descriptors that it inherits, by numbers which `words` name."""


def keep(airlocks: Sequence[Airlock], folder: str, stderr: int) -> None:
    """Fork the keeper, which starts these airlocks and removes the folder at the end.

    `stderr` is a descriptor, which becomes that of all of them. OSError: no process can
    be made.
    """
    child = os.fork()
    if child == 0:
        _run(airlocks, folder, stderr)
    os.waitpid(child, 0)


def _run(airlocks: Sequence[Airlock], folder: str, stderr: int) -> NoReturn:
    """Be the keeper. Nothing of the parent's is closed, freed or flushed here."""
    try:
        os.setsid()
        if os.fork() == 0:
            _serve(airlocks, folder, stderr)
    except OSError as error:
        log.error("can't start airlocks: %s", error.strerror)
    finally:
        os._exit(0)


def _serve(airlocks: Sequence[Airlock], folder: str, stderr: int) -> None:
    # A service manager's signals go to all processes: the keeper ends last. A handler
    # is not inherited by the airlocks, as SIG_IGN would be.
    for number in ENDING:
        signal.signal(number, _pass_over)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(stderr, 2)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _close_all_but({fd for airlock in airlocks for fd in airlock.fds})
    os.environ.pop("NOTIFY_SOCKET", None)  # QEMU is the service, the airlocks are not
    try:
        running = [
            subprocess.Popen(airlock.words, pass_fds=airlock.fds)
            for airlock in airlocks
        ]
        os.closerange(HELD, os.sysconf("SC_OPEN_MAX"))
        for process in running:
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _close_all_but(kept: set[int]) -> None:
    """Close the descriptors that the keeper has inherited, beside the standard ones."""
    first = HELD
    for fd in sorted(kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _pass_over(number: int, frame: FrameType | None) -> None:
    pass
