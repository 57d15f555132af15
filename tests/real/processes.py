# SPDX-License-Identifier: Apache-2.0
"""Programs that tests start: awaited by events, never left behind."""

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TICK = 0.01
"""Seconds between looks at what has no event: other processes' sockets and logs."""


class Process:
    """One program with its output in a file, which failures quote.

    It dies with the test run, however that ends (setpriv's parent-death signal).
    """

    def __init__(
        self,
        argv: Sequence[str],
        log: Path,
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.argv = list(argv)
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                env={**os.environ, **env} if env else None,
            )
        self.pidfd = os.pidfd_open(self.popen.pid)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(self.describe())
        self.kill()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def describe(self) -> str:
        """The command, how it is, and the end of what it said."""
        status = self.popen.poll()
        state = "running" if status is None else f"status {status}"
        lines = [line for line in self.output().splitlines() if self.tells(line)][-40:]
        return "\n".join([f"$ {' '.join(self.argv)}   [{state}]", *lines])

    def tells(self, line: str) -> bool:
        """Is this line of its output worth quoting?"""
        return True

    def ended(self, timeout: float = 0) -> bool:
        return bool(select.select([self.pidfd], [], [], timeout)[0])

    def wait(self, timeout: float) -> int:
        """Its exit status; a program that goes on for longer fails the test."""
        if not self.ended(timeout):
            raise AssertionError(f"still running after {timeout} s\n{self.describe()}")
        return self.popen.wait()

    def wait_until(self, condition: Callable[[], bool], timeout: float = 10) -> None:
        """Wait for something that this process brings about."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.ended(TICK):
                raise AssertionError(f"ended too soon\n{self.describe()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not so in {timeout} s\n{self.describe()}")

    def stop(self, timeout: float = 10) -> int:
        """End it by SIGTERM: its exit status."""
        if not self.ended():
            self.popen.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        if self.pidfd >= 0:
            self.popen.kill()
            self.popen.wait()
            if self.popen.stdin is not None:
                self.popen.stdin.close()
            os.close(self.pidfd)
            self.pidfd = -1


def run(argv: Sequence[str], log: Path, timeout: float = 60) -> str:
    """Run a program that must succeed: its output."""
    with Process(argv, log) as process:
        status = process.wait(timeout)
        assert status == 0, process.describe()
        return process.output()


def listening(path: Path, pid: int | str = "self") -> bool:
    """Does somebody listen there? Asks the kernel: a connection would have effects.

    `pid` is a process in the network namespace where that is.
    """
    accepts = 1 << 16
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == str(path) and int(fields[3], 16) & accepts:
            return True
    return False
