# SPDX-License-Identifier: Apache-2.0
"""The block back-end of blk.py, started as a process of its own and ended for sure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from typing import Self

from ..process.sockets import Listener

GRACE = 5.0
"""Seconds that a process has to end after SIGTERM."""


class BlkProcess:
    """A back-end that listens at a path from the moment this is made.

    `without` are the names of features that blk.py has an option to leave out.
    """

    def __init__(
        self,
        blk_file: str,
        path: str,
        *,
        num_queues: int = 1,
        read_only: bool = False,
        without: Collection[str] = (),
    ) -> None:
        self.path = path
        self._listener = Listener(path)
        fd = self._listener.fileno()
        command = [sys.executable, "-m", "vhost_airlock.peers.blk", f"--fd={fd}"]
        command += [f"--blk-file={blk_file}", f"--num-queues={num_queues}"]
        command += [f"--without={name}" for name in without]
        if read_only:
            command.append("--read-only")
        try:
            self.process = subprocess.Popen(command, pass_fds=[fd])
        except BaseException:
            self._listener.close()
            raise
        # If the process is gone, connections from now on shall be refused.
        self._listener.socket.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        """End the process, and remove the socket; again does nothing."""
        self._listener.close()
        end(self.process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def end(process: subprocess.Popen[bytes], grace: float = GRACE) -> int:
    """Send SIGTERM to a process, then SIGKILL if it does not end; return its status."""
    process.terminate()
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
