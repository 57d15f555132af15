# SPDX-License-Identifier: Apache-2.0
"""The program under attack: its path, and its process if it is started here."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Sequence
from typing import Self

from ..errors import StartError
from ..peers.blk_process import end
from ..process.program import unusable, why_not_started

TICK = 0.01


class Program:
    """A program that listens at a path. With a command it is started, and started
    again after it has ended.

    Its output goes to `log`, a descriptor.
    """

    def __init__(
        self, path: str, command: Sequence[str], timeout: float, log: int
    ) -> None:
        self.path = path
        self.command = command
        self.timeout = timeout
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def require(self) -> None:
        """Raise StartError if there is no program that could be attacked."""
        if self.command:
            if trouble := unusable(self.command[0]):
                raise StartError(trouble)
        elif not listens(self.path):
            raise StartError(f"no process listens at {self.path}")

    def ensure(self) -> None:
        """Start the program if it does not run. StartError: no process listens then."""
        self.require()
        if not self.command:
            return
        if self._process is not None and self._process.poll() is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(self.path).st_mode):
                os.unlink(self.path)
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
            )
        except OSError as error:
            reason = why_not_started(self.command[0], error)
            raise StartError(f"can't start {self.command[0]}: {reason}") from None
        deadline = time.monotonic() + self.timeout
        while not os.path.exists(self.path) or not listens(self.path):
            if self._process.poll() is not None:
                raise StartError(f"{self.command[0]} ended: {self.ending()}")
            if time.monotonic() > deadline:
                raise StartError(f"{self.command[0]} does not listen at {self.path}")
            time.sleep(TICK)

    @property
    def gone(self) -> bool:
        """Has its process ended, or does no process listen any more?"""
        if self._process is not None:
            return self._process.poll() is not None
        return not listens(self.path)

    def ending(self) -> str:
        """Return a text about how it ended."""
        status = None if self._process is None else self._process.poll()
        if status is None:
            return "no process listens any more"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        return f"exit status {status}"

    def restart(self) -> None:
        """End its process, when it is of no use any more."""
        if self._process is not None:
            end(self._process, 1.0)
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            end(self._process)


def listens(path: str) -> bool:
    """Does a process listen at a path? Finds out without connecting, if it can.

    A connection would be a client of the program, maybe the one that it exits with.
    """
    accepts = 1 << 16
    with open("/proc/net/unix") as table:
        next(table)
        for line in table:
            fields = line.rstrip("\n").split(maxsplit=7)
            if fields[7:] == [path] and int(fields[3], 16) & accepts:
                return True
    return False
