# SPDX-License-Identifier: Apache-2.0
"""A process that opens the outside for the airlock, and does nothing else.

The airlock locks itself in and can connect to nothing, start nothing and remove nothing
from then on; and what it starts must not be locked in with it, since back-ends have
sandboxes of their own. So this process is forked before. It has the user's rights
still, but no sockets of the airlock, no memory of a guest, and no choice: the paths
and the command are fixed when it starts, and no request has an argument.

They talk over a pair of sockets, a datagram a message, one request at a time:

    back     a socket that is connected to the back-end: at its path, or to the program
             that was started for it, with its process number as text
    front    a socket that is connected to the front, which listens
    end      the program's status as text, as soon as it is gone

An answer without a socket says why there is none. When the pair of sockets is no more,
which is when the airlock ends, however that happens, the broker removes the sockets
that the airlock has made, ends the program, and ends itself.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ..errors import AirlockError, StartError, Stopped
from ..vhost.fds import Fd, HasFileno
from .program import GRACE, PATIENCE, Program
from .sockets import Listener, SocketFile, reason_of

ANSWER = 10.0
"""Seconds that the broker has for what takes no time, beside those for a program."""

_BACK, _FRONT, _END = b"back", b"front", b"end"
_SIZE = 4096
"""More than any message has."""
_CONNECTED = "connected"
_GONE = "the broker is gone"


class Broker:
    """The airlock's handle on it. It runs from start() to close().

    `back` and `front` are paths to connect to, `command` starts the back-end instead.
    `stop` ends every wait with Stopped; the broker is of no more use then. Without it
    nothing can be served any more: AirlockError, which ends the process.
    """

    def __init__(
        self,
        stop: HasFileno,
        *,
        back: str | None = None,
        front: str | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self.stop = stop
        self.back = back
        self.front = front
        self.command = command
        self.pid = 0
        """The broker's process number, while it runs."""
        self._listeners: list[Listener] = []
        self._sock: socket.socket | None = None

    def entrust(self, listener: Listener) -> None:
        """Let the broker remove this listener's path, once it runs."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Fork it, while this process has one thread. StartError if that can't be."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.pid = os.fork()
            except OSError as error:
                ours.close()
                raise StartError(
                    f"no process for the broker: {error.strerror}"
                ) from None
            if self.pid == 0:
                files = [listener.file for listener in self._listeners]
                _run(_Server(self, files), theirs)
        self._sock = ours
        for listener in self._listeners:
            listener.disown()

    def connect_back(self) -> tuple[socket.socket | None, str]:
        """Connect to the back-end, or start it.

        Returns the socket and the program's number, or None and what was wrong.
        OSError: this process has no room for a socket.
        """
        with self._room():
            self._ask(_BACK)
        return self._answer()

    def connect_front(self) -> tuple[socket.socket | None, str]:
        """Connect to the front; returns the socket, or None and what was wrong.

        OSError: this process has no room for a socket.
        """
        with self._room():
            self._ask(_FRONT)
        return self._answer()

    def end_back(self) -> int | None:
        """Wait until the program is gone, or see to that; its status, if known."""
        self._ask(_END)
        _, text = self._answer()
        return int(text) if text.lstrip("-").isdigit() else None

    def close(self) -> None:
        """End it, and the program; the paths that were entrusted to it are gone."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            os.waitpid(self.pid, 0)
            self.pid = 0

    @property
    def _connected(self) -> socket.socket:
        """The socket to it."""
        if self._sock is None:
            raise AirlockError(_GONE)
        return self._sock

    def _room(self) -> Fd:
        """Return a descriptor whose place is for the one that an answer brings."""
        return Fd(os.dup(self._connected.fileno()))

    def _ask(self, request: bytes) -> None:
        """Send a request, and wait for the answer.

        It is received at once: a late answer would be taken for the next request's.
        """
        sock = self._connected
        try:
            sock.send(request, socket.MSG_NOSIGNAL)
        except OSError:
            raise AirlockError(_GONE) from None
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        poll.register(self.stop.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll((GRACE + 3 * PATIENCE + ANSWER) * 1000)}
        stopped = self.stop.fileno() in ready
        if stopped or not ready:
            sock.shutdown(socket.SHUT_RDWR)
        if stopped:
            raise Stopped("stopped while the broker was at work")

    def _answer(self) -> tuple[socket.socket | None, str]:
        """Receive an answer: its socket, if it has one, and its text."""
        fds = array.array("i")
        room = socket.CMSG_SPACE(fds.itemsize)
        try:
            data, control, flags, _ = self._connected.recvmsg(
                _SIZE, room, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            raise AirlockError(_GONE) from None
        if not data:
            raise AirlockError(_GONE)
        for _, _, packed in control:
            fds.frombytes(packed)
        if fds:
            return socket.socket(fileno=fds[0]), data.decode()
        if flags & socket.MSG_CTRUNC:
            return None, "there is no descriptor left for the connection"
        return None, data.decode()


# What follows runs in the process itself.


def _run(server: _Server, sock: socket.socket) -> NoReturn:
    """Be the process. Nothing of the airlock's is closed, freed or flushed here."""
    status = 1
    try:
        # The signals of a terminal or of a service manager are not for us, nor for the
        # back-end, which is needed until the rings are drained. To ignore them would be
        # inherited by the back-end; a handler is not.
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _pass_over)
        # Whoever holds the airlock's sockets keeps them from ending with it.
        kept = os.dup2(sock.fileno(), 3, inheritable=False)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        server.serve(socket.socket(fileno=kept))
        status = 0
    finally:
        os._exit(status)


def _pass_over(number: int, frame: FrameType | None) -> None:
    pass


class _Server:
    """What the process does: the three requests, and the end."""

    def __init__(self, plan: Broker, made: Sequence[SocketFile]) -> None:
        self.plan = plan
        self.made = made
        self.program: Program | None = None

    def serve(self, sock: socket.socket) -> None:
        """Do what the airlock asks for until it is gone, and clean up after it."""
        try:
            with contextlib.suppress(OSError):  # it went while it was answered
                while asked := sock.recv(_SIZE):
                    self._answer(asked, sock)
        finally:
            for file in self.made:
                file.remove()
            self._end(0, None)

    def _answer(self, asked: bytes, sock: socket.socket) -> None:
        if asked == _END:
            sock.send(str(self._end(GRACE, sock)).encode())
            return
        try:
            text, connected = self._connect(asked)
        except OSError as error:
            sock.send(reason_of(error).encode()[:_SIZE])
            return
        with connected:
            socket.send_fds(sock, [text.encode()], [connected.fileno()])

    def _connect(self, asked: bytes) -> tuple[str, socket.socket]:
        """Return a text and a connected socket for one of the fixed requests."""
        if asked == _FRONT and self.plan.front is not None:
            return _CONNECTED, _dial(self.plan.front)
        if asked == _BACK and self.plan.back is not None:
            return _CONNECTED, _dial(self.plan.back)
        if asked == _BACK and self.plan.command:
            self._end(GRACE, None)
            self.program = Program(self.plan.command)
            return str(self.program.pid), self.program.socket
        raise OSError("this is nothing that the broker does")

    def _end(self, grace: float, hurry: socket.socket | None) -> int | None:
        """End the program, if there is one; returns its status, if it is known."""
        program, self.program = self.program, None
        return None if program is None else program.end(grace, hurry)


def _dial(path: str) -> socket.socket:
    """Return a socket that is connected to a path, without waiting for anybody."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    return sock
