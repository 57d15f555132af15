# SPDX-License-Identifier: Apache-2.0
"""The broker: a process that connects, starts and removes for the airlock.

The airlock locks itself in, and from then on can connect to nothing, start nothing and
remove nothing; and a program that it started would be locked in with it, though
back-ends have sandboxes of their own. So this process is forked before. It still has
the user's rights, but no sockets of the airlock, no memory of a guest, and no choice:
no request has an argument. The paths and the command are fixed when it starts; another
one for the back-end comes from the airlock's owner alone, at the control socket, which
this process serves (control.py).

Airlock and broker talk over a pair of sockets, one packet a message, one request at a
time. The requests, and the answers to them:

    back     a socket connected to the back-end's path; or one connected to the program
             that was started, and the program's process number as text
    front    a socket connected to the path on which the front listens
    users    the users that the program runs as, as text; nothing if there is none
    lives    the reason why the back-end of the last connection to the path may still be
             at work, as text; "no" if its process has ended
    end      the program's status as text, as soon as it has ended
    adopt    the back-end of the order under way is the back-end from now on; the
             program of the last one is ended

"next back", "next users", "next lives" and "next end" are about the back-end of the
order under way, as long as there is one.

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
from typing import NoReturn

from ..errors import AirlockError, StartError, Stopped
from ..vhost.fds import Fd, HasFileno
from .command import GRACE, PATIENCE
from .control import Control
from .reach import CONNECTED, ENDED, Reach, dial
from .signals import ENDING
from .sockets import (
    Listener,
    ListeningSocket,
    Rights,
    SocketFile,
    inherited,
    reason_of,
)
from .target import Target

ANSWER = 10.0
"""Seconds that the broker has to answer, beside those that a program has to end."""

_BACK, _FRONT, _USERS, _LIVES, _END = b"back", b"front", b"users", b"lives", b"end"
_NEXT, _ADOPT = b"next ", b"adopt"
_SIZE = 4096
"""More than any message has."""
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
        self.target = Target(back, tuple(command))
        self.front = front
        self.pid = 0
        """The broker's process number, while it runs."""
        self._listeners: list[Listener] = []
        self._sock: socket.socket | None = None
        self._control: list[socket.socket] = []
        """The sockets of the broker's process for Control."""

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

    def control(self, listener: ListeningSocket) -> tuple[socket.socket, socket.socket]:
        """Let the broker serve this control socket, once it runs.

        Returns the socket at which orders come, and the one at which readers of stats
        are handed over.
        """
        orders, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        readers, handing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = [listener.socket, told, handing]
        return orders, readers

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
                _run(self, files, theirs, self._control)
        self._sock = ours
        self._close_control()
        for listener in self._listeners:
            listener.disown()

    def connect_back(
        self, *, following: bool = False
    ) -> tuple[socket.socket | None, str]:
        """Connect to the back-end, or start it. `following`, here and below: the one of
        the order under way.

        Returns (socket, text): the connected socket, and the process number of a
        program that was started; or None, and the reason. OSError: this process has no
        descriptor left for a socket.
        """
        with self._room():
            self._ask(_of(_BACK, following))
        return self._answer()

    def connect_front(self) -> tuple[socket.socket | None, str]:
        """Connect to the front.

        Returns (socket, text): the connected socket; or None, and the reason. OSError:
        this process has no descriptor left for a socket.
        """
        with self._room():
            self._ask(_FRONT)
        return self._answer()

    def users_of_back(self, *, following: bool = False) -> frozenset[int]:
        """Return the users that the program runs as; none if that is not known."""
        self._ask(_of(_USERS, following))
        _, text = self._answer()
        return frozenset(int(word) for word in text.split() if word.isdigit())

    def back_lives(self, *, following: bool = False) -> str:
        """Return the reason why the back-end of the last connection to its path may
        still be at work; "": its process has ended.
        """
        self._ask(_of(_LIVES, following))
        _, text = self._answer()
        return "" if text == ENDED else text

    def end_back(self, *, following: bool = False) -> int | None:
        """End the program; returns its exit status, None if that is not known."""
        self._ask(_of(_END, following))
        _, text = self._answer()
        return int(text) if text.lstrip("-").isdigit() else None

    def adopt_back(self) -> None:
        """The back-end of the order under way is the back-end from now on."""
        self._ask(_ADOPT)
        self._answer()

    def close(self) -> None:
        """End the broker and the program; the entrusted paths are removed then."""
        self._close_control()
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            os.waitpid(self.pid, 0)
            self.pid = 0

    def _close_control(self) -> None:
        """Close our copies of the broker's sockets."""
        for sock in self._control:
            sock.close()
        self._control.clear()

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


def _of(request: bytes, following: bool) -> bytes:
    return _NEXT + request if following else request


# The code from here on runs in the broker's process.


def _run(
    plan: Broker,
    made: Sequence[SocketFile],
    sock: socket.socket,
    control: Sequence[socket.socket],
) -> NoReturn:
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
        _close_all_but([sock, *control])
        served = Control(*control) if control else None
        _Server(plan, made, served).serve(sock)
        status = 0
    finally:
        os._exit(status)


def _close_all_but(kept: Sequence[socket.socket]) -> None:
    """Close all descriptors but those of a terminal and these."""
    first = 3
    for fd in sorted(sock.fileno() for sock in kept):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def _pass_over(number: int, frame: FrameType | None) -> None:
    pass


class _Server:
    """Serves the requests, and cleans up at the end."""

    def __init__(
        self, plan: Broker, made: Sequence[SocketFile], control: Control | None
    ) -> None:
        self.front = plan.front
        self.made = made
        self.back = Reach(plan.target)
        self.control = control

    def serve(self, sock: socket.socket) -> None:
        """Serve the airlock's requests until it is gone, and clean up after it."""
        try:
            with contextlib.suppress(OSError):  # the airlock ended before the answer
                while self._wait(sock):
                    asked = sock.recv(_SIZE)
                    if not asked:
                        break
                    self._answer(asked, sock)
        finally:
            for file in self.made:
                file.remove()
            if self.control is not None:
                self.control.close()
            self.back.close()

    def _wait(self, sock: socket.socket) -> bool:
        """Wait for the airlock's next request, and serve the control socket meanwhile.
        Returns True.
        """
        control = self.control
        while control is not None:
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            control.register(poll)
            wait = control.wait()
            ready = {fd for fd, _ in poll.poll(None if wait is None else wait * 1000)}
            if sock.fileno() in ready:
                break
            control.look(ready)
        return True

    def _answer(self, asked: bytes, sock: socket.socket) -> None:
        try:
            text, connected = self._do(asked, sock)
        except OSError as error:
            text, connected = reason_of(error)[:_SIZE], None
        if connected is None:
            sock.send(text.encode())
            return
        with connected:
            socket.send_fds(sock, [text.encode()], [connected.fileno()])

    def _do(
        self, asked: bytes, sock: socket.socket
    ) -> tuple[str, socket.socket | None]:
        """Do one of the fixed things; returns (text, socket, if one is connected)."""
        if asked == _FRONT and self.front is not None:
            return CONNECTED, dial(self.front)
        if asked == _ADOPT and self.control is not None:
            adopted = self.control.adopt()
            self.back.close()
            self.back = adopted
            return "adopted", None
        back = self.back
        if asked.startswith(_NEXT) and self.control is not None:
            asked, back = (
                asked.removeprefix(_NEXT),
                self.control.next or Reach(Target()),
            )
        if asked == _BACK:
            return back.connect()
        if asked == _USERS:
            return f"users: {' '.join(map(str, back.users()))}", None
        if asked == _LIVES:
            return back.lives(), None
        if asked == _END:
            return str(back.end(GRACE, sock)), None
        raise OSError("this is nothing that the broker does")
