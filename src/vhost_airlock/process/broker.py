# SPDX-License-Identifier: Apache-2.0
"""A process that starts the back-end's program, time and again, and does nothing else.

The airlock locks itself in and can start nothing from then on, and what it starts must
not be locked in with it: back-ends have sandboxes of their own. So this process is
forked before. It has the user's rights still, but no sockets of the airlock, no memory
of a guest, and no choice of what it starts.

They talk over a pair of sockets, a datagram a message, one request at a time:

    start      the program's process number, with a socket that is connected to it; or
               what was wrong, as text
    end        its status, as soon as it is gone; it has GRACE seconds to end by itself
    end now    the same, but it has none

It ends when the airlock does, however that ends, since the pair of sockets is no more
then; a back-end that does not end by itself goes first.
"""

from __future__ import annotations

import array
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ..errors import SessionError
from ..proxy.config import CONNECTED_FD, LISTENING_FD

GRACE = 0.5
"""Seconds that a back-end has to end with its connection."""
PATIENCE = 3.0
"""Seconds that it has when it is told to end, before it is made to."""
ANSWER = 10.0
"""Seconds that the process has beside these, for what takes no time."""

_START, _END, _END_NOW = b"start", b"end", b"end now"
_SIZE = 4096
"""More than any message has."""


class StarterProcess:
    """The airlock's handle on it: it runs from now on, until close()."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.pid = os.fork()
            if self.pid == 0:
                _run(command, theirs)
        ours.settimeout(GRACE + PATIENCE + ANSWER)
        self._sock = ours

    def start(self) -> tuple[int, socket.socket]:
        """Start the program; its process number, and the connection to it."""
        text, sock = self._ask(_START)
        if sock is None:
            raise SessionError(f"back: {text or 'nobody is there to start it'}")
        return int(text), sock

    def end(self, *, now: bool) -> int | None:
        """Wait until the program is gone, or see to that; its status, if known."""
        text, _ = self._ask(_END_NOW if now else _END)
        return int(text) if text else None

    def close(self) -> None:
        """End the process; a program that it has started goes first."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            os.waitpid(self.pid, 0)

    def _ask(self, request: bytes) -> tuple[str, socket.socket | None]:
        """Return the answer, and the socket that came with it; "" if there is none."""
        fds = array.array("i")
        room = socket.CMSG_SPACE(fds.itemsize)
        try:
            self._sock.send(request, socket.MSG_NOSIGNAL)
            data, control, _, _ = self._sock.recvmsg(
                _SIZE, room, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            # A late answer would be taken for that of the next request.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            return "", None
        for _, _, packed in control:
            fds.frombytes(packed)
        return data.decode(), socket.socket(fileno=fds[0]) if fds else None


# What follows runs in the process itself.


def _run(command: Sequence[str], sock: socket.socket) -> NoReturn:
    """Be the process. Nothing of the airlock's is closed, freed or flushed here."""
    status = 1
    try:
        # The signals of a terminal or of a service manager are not for us, nor for the
        # back-end, which is needed until the rings are drained. To ignore them would be
        # inherited by the back-end; a handler is not.
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _pass_over)
        # Whoever holds the airlock's sockets keeps them from ending with it.
        kept = os.dup2(sock.fileno(), 3, inheritable=False)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        _serve(command, socket.socket(fileno=kept))
        status = 0
    finally:
        os._exit(status)


def _pass_over(number: int, frame: FrameType | None) -> None:
    pass


def _serve(command: Sequence[str], sock: socket.socket) -> None:
    """Do what the airlock asks for until it is gone."""
    process: subprocess.Popen[bytes] | None = None
    try:
        while asked := sock.recv(_SIZE):
            if asked == _START:
                try:
                    process, ours = _start(command)
                except OSError as error:
                    text = f"can't start {command[0]}: {error.strerror or error}"
                    sock.send(text.encode()[:_SIZE])
                    continue
                with ours:
                    socket.send_fds(sock, [str(process.pid).encode()], [ours.fileno()])
            else:
                status = _end(process, grace=GRACE if asked == _END else 0)
                process = None
                sock.send(str(status).encode())
    finally:
        _end(process, grace=GRACE)


def _start(
    command: Sequence[str],
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the program with a socket of its own; return our end of that too."""
    if CONNECTED_FD in " ".join(command):
        ours, theirs = socket.socketpair()
    else:
        ours, theirs = _listening_pair()
    number = str(theirs.fileno())
    try:
        process = subprocess.Popen(
            [
                part.replace(CONNECTED_FD, number).replace(LISTENING_FD, number)
                for part in command
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _end(process: subprocess.Popen[bytes] | None, *, grace: float) -> int:
    """Wait for a program's end. Most end with their connection; others are told to."""
    if process is None:
        return 0
    for seconds, end in ((grace, process.terminate), (PATIENCE, process.kill)):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            end()
    return process.wait()


def _listening_pair() -> tuple[socket.socket, socket.socket]:
    """Return a connected socket, and the listening one that it waits to be taken by."""
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
