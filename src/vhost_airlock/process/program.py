# SPDX-License-Identifier: Apache-2.0
"""The back-end's program: started with a socket of its own, and ended.

It leads a process group, so that processes that it starts end with it. Most programs
end when their connection does; the others get SIGTERM, and at last SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..vhost.fds import Fd
from .command import CONNECTED_FD, LISTENING_FD, PATIENCE
from .sockets import reason_of

TICK = 0.02
"""Seconds between looks at a process group, whose end is no event."""
_LONGEST_LINE = 256
"""Bytes of a script's first line at which the kernel looks."""


def unusable(program: str) -> str:
    """Return why a program can't be started, as far as its file shows it; else ""."""
    found = shutil.which(program)
    if found is None:
        if os.path.dirname(program) and os.path.exists(program):
            return f"{program} is no file that may be executed"
        return f"there is no program {program}"
    with contextlib.suppress(OSError), open(found, "rb") as file:
        if interpreter := re.match(rb"#!\s*(\S+)", file.readline(_LONGEST_LINE)):
            path = os.fsdecode(interpreter[1])
            if not os.path.exists(path):
                return f"{program} is a script for {path}, which is not there"
    return ""


def why_not_started(program: str, error: OSError) -> str:
    """Return words for the error with which the start of a program has failed."""
    if error.errno == errno.ENOEXEC:
        return "it is neither a program for this machine nor a script that begins #!"
    if error.errno == errno.ENOENT and shutil.which(program):
        return "its interpreter or dynamic loader is not there"
    return reason_of(error)


class Program:
    """A program that runs; OSError if it does not. `socket` is connected to it."""

    def __init__(self, command: Sequence[str]) -> None:
        if CONNECTED_FD in " ".join(command):
            ours, theirs = socket.socketpair()
        else:
            ours, theirs = _listening_pair()
        with theirs:
            number = str(theirs.fileno())
            try:
                self._process = subprocess.Popen(
                    [
                        part.replace(CONNECTED_FD, number).replace(LISTENING_FD, number)
                        for part in command
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    process_group=0,
                )
            except OSError as error:
                ours.close()
                reason = why_not_started(command[0], error)
                raise OSError(error.errno, reason) from None
        self.socket = ours
        self.pid = self._process.pid

    def users(self) -> list[int]:
        """Return the users of its process: real, effective, saved, and for files. None
        if it has ended, or can't be seen.
        """
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("Uid:"):
                    return [int(word) for word in line.split()[1:]]
        return []

    def end(self, grace: float, hurry: socket.socket | None = None) -> int | None:
        """End the program; returns its exit status, None if it can't be ended.

        It has `grace` seconds to end by itself, or until the peer of `hurry` hangs up.
        """
        with Fd(os.pidfd_open(self.pid)) as pidfd:
            if not _ready(pidfd, grace, hurry):
                self._signal(signal.SIGTERM)
                if not _ready(pidfd, PATIENCE, None):
                    self._signal(signal.SIGKILL)
            if not _ready(pidfd, PATIENCE, None):
                return None
        status = self._process.wait()
        self._end_rest()
        return status

    def _end_rest(self) -> None:
        """End the processes that the program has started and left behind."""
        deadline = time.monotonic() + PATIENCE
        left = self._signal(signal.SIGTERM)
        while left and time.monotonic() < deadline:
            time.sleep(TICK)
            left = self._signal(0)
        if left:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> bool:
        """Send a signal to the whole group; returns False if there is no group."""
        with contextlib.suppress(PermissionError):  # the program has changed its user
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                return False
        return True


def _ready(pidfd: Fd, seconds: float, hurry: socket.socket | None) -> bool:
    """Wait for the end of a process; returns False if it has not ended."""
    poll = select.poll()
    poll.register(pidfd.fileno(), select.POLLIN)
    if hurry is not None:
        poll.register(hurry, select.POLLRDHUP)
    return pidfd.fileno() in {fd for fd, _ in poll.poll(seconds * 1000)}


def _listening_pair() -> tuple[socket.socket, socket.socket]:
    """Return (connected socket, listening socket whose queue has that connection)."""
    folder = tempfile.mkdtemp(prefix="vhost-airlock-")
    path = os.path.join(folder, "back.sock")
    theirs = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        theirs.bind(path)
        theirs.listen(1)
        ours.connect(path)
    except BaseException:
        ours.close()
        theirs.close()
        raise
    finally:
        shutil.rmtree(folder)
    return ours, theirs
