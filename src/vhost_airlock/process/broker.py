# SPDX-License-Identifier: Apache-2.0
"""The broker: a process that connects, starts and removes for the airlock.

The airlock locks itself in, and from then on can connect to nothing, start nothing and
remove nothing; and a program that it started would be locked in with it, though
back-ends have sandboxes of their own. So this process is forked before. It still has
the user's rights, but no sockets of the airlock, no memory of a guest, and no choice:
the paths and the command are fixed when it starts, and no request has an argument.

Airlock and broker talk over a pair of sockets, one packet a message, one request at a
time. The requests, and the answers to them:

    back     a socket connected to the back-end's path; or one connected to the program
             that was started, and the program's process number as text
    front    a socket connected to the path on which the front listens
    users    the users that the program runs as, as text; nothing if there is none
    lives    the reason why the back-end of the last connection to the path may still be
             at work, as text; "no" if its process has ended
    end      the program's status as text, as soon as it has ended

An answer without a socket is the reason why there is none. When the airlock's socket
is closed, which happens however the airlock ends, the broker removes the sockets
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
from typing import TYPE_CHECKING, NoReturn

from ..errors import AirlockError, StartError, Stopped
from ..vhost.fds import Fd, HasFileno
from .command import GRACE, PATIENCE
from .signals import ENDING
from .sockets import (
    Listener,
    ListeningSocket,
    Rights,
    SocketFile,
    inherited,
    peer_of,
    reason_of,
)

if TYPE_CHECKING:
    from .program import Program

ANSWER = 10.0
"""Seconds that the broker has to answer, beside those that a program has to end."""

_BACK, _FRONT, _USERS, _LIVES, _END = b"back", b"front", b"users", b"lives", b"end"
_SIZE = 4096
"""More than any message has."""
_CONNECTED = "connected"
_ENDED = "no"
_GONE = "the broker is gone"


class Broker:
    """The airlock's handle on the broker, which runs from start() to close().

    `back` and `front` are paths to connect to, `command` starts the back-end instead.
    `stop` ends every wait with Stopped; the broker is of no more use then. If the
    broker is gone, methods raise AirlockError, which ends the process: without it no
    session can be served any more.
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

    def listen(
        self,
        path: str | None,
        fd: int | None,
        rights: Rights,
        kind: int = socket.SOCK_STREAM,
    ) -> ListeningSocket:
        """Listen with an inherited socket, if there is the number of one, or else at a
        path, which the broker removes at the end. StartError if that can't be.
        """
        if fd is not None:
            sock, listening = inherited(fd, kind)
            if listening:
                return ListeningSocket(sock)
            sock.detach()
            raise StartError(f"descriptor {fd} does not listen")
        listener = Listener(path or "", rights, kind)
        self.entrust(listener)
        return listener

    def entrust(self, listener: Listener) -> None:
        """Let the broker remove this listener's path, once it runs."""
        self._listeners.append(listener)

    def start(self) -> None:
        """Fork the broker, while this process has one thread. StartError if that
        fails.
        """
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

        Returns (socket, text): the connected socket, and the process number of a
        program that was started; or None, and the reason. OSError: this process has no
        descriptor left for a socket.
        """
        with self._room():
            self._ask(_BACK)
        return self._answer()

    def connect_front(self) -> tuple[socket.socket | None, str]:
        """Connect to the front.

        Returns (socket, text): the connected socket; or None, and the reason. OSError:
        this process has no descriptor left for a socket.
        """
        with self._room():
            self._ask(_FRONT)
        return self._answer()

    def users_of_back(self) -> frozenset[int]:
        """Return the users that the program runs as; none if that is not known."""
        self._ask(_USERS)
        _, text = self._answer()
        return frozenset(int(word) for word in text.split() if word.isdigit())

    def back_lives(self) -> str:
        """Return the reason why the back-end of the last connection to its path may
        still be at work; "": its process has ended.
        """
        self._ask(_LIVES)
        _, text = self._answer()
        return "" if text == _ENDED else text

    def end_back(self) -> int | None:
        """End the program; returns its exit status, None if that is not known."""
        self._ask(_END)
        _, text = self._answer()
        return int(text) if text.lstrip("-").isdigit() else None

    def close(self) -> None:
        """End the broker and the program; the entrusted paths are removed then."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            os.waitpid(self.pid, 0)
            self.pid = 0

    @property
    def _connected(self) -> socket.socket:
        """The socket to the broker. AirlockError if it does not run."""
        if self._sock is None:
            raise AirlockError(_GONE)
        return self._sock

    def _room(self) -> Fd:
        """Return a descriptor to close before the answer: its number is for the socket
        that comes with that.
        """
        return Fd(os.dup(self._connected.fileno()))

    def _ask(self, request: bytes) -> None:
        """Send a request, and wait until the answer is there.

        After Stopped or a time-out no more answers are received: a late one would be
        taken for the answer to the next request.
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
        """Receive an answer; returns (its socket, or None, its text)."""
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


# The code from here on runs in the broker's process.


def _run(server: _Server, sock: socket.socket) -> NoReturn:
    """Be the broker. Nothing of the airlock's is closed, freed or flushed here."""
    status = 1
    try:
        # The signals of a terminal or of a service manager are not for the broker, nor
        # for the back-end, which is needed until the rings are drained. The back-end
        # would inherit SIG_IGN; it does not inherit a handler.
        os.setpgid(0, 0)
        for number in ENDING:
            signal.signal(number, _pass_over)
        # If the broker kept the airlock's sockets, they would not end with the airlock.
        kept = os.dup2(sock.fileno(), 3, inheritable=False)
        os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
        server.serve(socket.socket(fileno=kept))
        status = 0
    finally:
        os._exit(status)


def _pass_over(number: int, frame: FrameType | None) -> None:
    pass


class _Server:
    """Serves the requests, and cleans up at the end."""

    def __init__(self, plan: Broker, made: Sequence[SocketFile]) -> None:
        self.plan = plan
        self.made = made
        self.program: Program | None = None
        self.peer: Fd | None = None
        """Of the process that listens at the back-end's path, a pidfd."""
        self.peer_pid = 0

    def serve(self, sock: socket.socket) -> None:
        """Serve the airlock's requests until it is gone, and clean up after it."""
        try:
            with contextlib.suppress(OSError):  # the airlock ended before the answer
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
        if asked == _USERS:
            users = () if self.program is None else self.program.users()
            sock.send(f"users: {' '.join(map(str, users))}".encode())
            return
        if asked == _LIVES:
            sock.send(self._lives().encode())
            return
        try:
            text, connected = self._connect(asked)
        except OSError as error:
            sock.send(reason_of(error).encode()[:_SIZE])
            return
        with connected:
            socket.send_fds(sock, [text.encode()], [connected.fileno()])

    def _connect(self, asked: bytes) -> tuple[str, socket.socket]:
        """Return (text, connected socket) for one of the fixed requests."""
        if asked == _FRONT and self.plan.front is not None:
            return _CONNECTED, _dial(self.plan.front)
        if asked == _BACK and self.plan.back is not None:
            sock = _dial(self.plan.back)
            self._note_peer(sock)
            return _CONNECTED, sock
        if asked == _BACK and self.plan.command:
            from .program import Program  # see `command`

            self._end(GRACE, None)
            self.program = Program(self.plan.command)
            return str(self.program.pid), self.program.socket
        raise OSError("this is nothing that the broker does")

    def _note_peer(self, sock: socket.socket) -> None:
        if self.peer is not None:
            self.peer.close()
        self.peer, self.peer_pid = None, peer_of(sock).pid
        with contextlib.suppress(OSError):  # 0: it is in another namespace
            self.peer = Fd(os.pidfd_open(self.peer_pid))

    def _lives(self) -> str:
        """Return the reason why the last peer may be at work, or _ENDED."""
        if self.peer is None:
            return "its process is not known"
        poll = select.poll()
        poll.register(self.peer.fileno(), select.POLLIN)
        return _ENDED if poll.poll(0) else f"process {self.peer_pid} has not ended"

    def _end(self, grace: float, hurry: socket.socket | None) -> int | None:
        """End the program, if there is one; returns its exit status, None if that is
        not known.
        """
        program, self.program = self.program, None
        return None if program is None else program.end(grace, hurry)


def _dial(path: str) -> socket.socket:
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
