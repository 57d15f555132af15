# SPDX-License-Identifier: Apache-2.0
"""The broker's way to one back-end: it connects to a path, or starts a program.

This runs in the broker's process, see broker.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from ..vhost.fds import Fd
from .command import GRACE
from .sockets import has_ended, peer_of
from .target import Target

if TYPE_CHECKING:
    from .program import Program

CONNECTED = "connected"
ENDED = "no"


class Reach:
    """One back-end, with the program that was started, if that was so."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._program: Program | None = None
        self._peer: Fd | None = None
        """Of the process that listens at the back-end's path, a pidfd."""
        self._peer_pid = 0
        self._reached = False
        """Whether the path was ever connected to."""

    def connect(self) -> tuple[str, socket.socket]:
        """Return (text, connected socket): the text is the process number of a program
        that was started. OSError if that can't be.
        """
        if self.target.path is not None:
            sock = dial(self.target.path)
            self._note_peer(sock)
            return CONNECTED, sock
        if not self.target.command:
            raise OSError("this is nothing that the broker does")
        from .program import Program  # see `command`

        self.end(GRACE, None)
        self._program = Program(self.target.command)
        return str(self._program.pid), self._program.socket

    def users(self) -> list[int]:
        """Return the users of the program; none if there is none."""
        return [] if self._program is None else self._program.users()

    def lives(self) -> str:
        """Return the reason why the last peer may be at work, or ENDED: there was none
        yet, or it has ended.
        """
        if not self._reached or (self._peer is not None and has_ended(self._peer)):
            return ENDED
        if self._peer is None:
            return "its process is not known"
        return f"process {self._peer_pid} has not ended"

    def end(self, grace: float, hurry: socket.socket | None) -> int | None:
        """End the program, if there is one; returns its exit status, None if that is
        not known.
        """
        program, self._program = self._program, None
        return None if program is None else program.end(grace, hurry)

    def close(self) -> None:
        """End the program at once, and forget the back-end."""
        self.end(0, None)
        self._forget_peer()

    def _note_peer(self, sock: socket.socket) -> None:
        self._forget_peer()
        self._reached = True
        self._peer_pid = peer_of(sock).pid
        with contextlib.suppress(OSError):  # 0: it is in another namespace
            self._peer = Fd(os.pidfd_open(self._peer_pid))

    def _forget_peer(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


def dial(path: str) -> socket.socket:
    """Return a socket that is connected to a path. OSError instead of a wait."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    return sock
