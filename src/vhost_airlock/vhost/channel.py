# SPDX-License-Identifier: Apache-2.0
"""One vhost-user socket: whole messages with their descriptors, and deadlines.

A channel doesn't know what messages mean. It guarantees:

- A message leaves in one sendmsg() with its descriptors, which go with its first byte,
  as the specification wants (and libvhost-user asserts). Bytes that don't fit into the
  socket at once follow without descriptors.
- A message arrives whole or not at all. No byte is read beyond it, and no more memory
  is allocated than its sender may send. Descriptors that come in the middle of a
  message, and more of them than a message can have, are closed.
- All waiting is done in `wait()`. Sending a message, and receiving the rest of one that
  has begun, has a deadline. Waiting for the peer's next message, which it may never
  send, has none, and ends with the stop event.
- `recv_now()` never waits: the beginning of a message is kept until the rest comes.
- When a message was left half sent, or was not whole at its deadline, the channel is of
  no use any more: each further use raises `lost`.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from array import array
from collections.abc import Sequence
from typing import NoReturn, Self

from ..errors import (
    DeadlineExceeded,
    Disconnected,
    ProtocolError,
    SessionError,
    Stopped,
)
from .fds import Fd, HasFileno, close_all, number_of
from .message import Incoming, Limit, Message, any_payload
from .wire import MAX_FDS, Header, HeaderFlag

TIMEOUT = 10.0
"""Seconds that a peer has for one message by default."""

_CONTROL_SIZE = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)


class Channel:
    """One end of a connected vhost-user socket, which it owns.

    `peer` is the name of the other end in error messages, `lost` the exception that is
    raised when it is gone, and `late` when it does not answer in time. `timeout` is for
    a message that has begun to come, or that is sent. `stop`, an eventfd, ends waits
    that have no deadline, with `Stopped`, once it is signalled; set it to None to go on
    after that.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        stop: HasFileno | None = None,
        peer: str = "back",
        timeout: float = TIMEOUT,
        lost: type[Disconnected] = Disconnected,
        late: type[DeadlineExceeded] = DeadlineExceeded,
    ) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._torn = False
        self._addressed = False
        self._incoming = Incoming(peer, first=True)
        self.stop = stop
        self.peer = peer
        self.timeout = timeout
        self.lost = lost
        self.late = late

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        stop: HasFileno | None = None,
        peer: str = "back",
        timeout: float = TIMEOUT,
        lost: type[Disconnected] = Disconnected,
    ) -> Self:
        """Connect to a peer that listens at a path."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except OSError as error:
            sock.close()
            reason = error.strerror or error
            raise lost(f"{peer}: can't connect to {path}: {reason}") from None
        return cls(sock, stop=stop, peer=peer, timeout=timeout, lost=lost)

    @property
    def silent(self) -> bool:
        """Has the peer never sent a message, though a message was for it?"""
        return self._addressed and self._incoming.first

    def fileno(self) -> int:
        """Return the socket's number; -1 when it's closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket, and descriptors of a message that has begun to come. A
        second call does nothing.
        """
        self._sock.close()
        self._incoming.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait(self, events: int, deadline: float | None = None) -> None:
        """Wait until the socket is ready: every wait for a peer ends up here.

        `deadline` is a time of time.monotonic(), at which `late` is raised.
        Without a deadline the peer owes no message, and `stop` ends the wait: with
        `Stopped` even when the socket is ready too, or a peer that sends without pause
        could keep the caller from stopping.
        """
        poll = select.poll()
        poll.register(self._sock, events)
        if deadline is not None:
            left = max(0.0, deadline - time.monotonic())
            if not poll.poll(left * 1000):
                does = "read" if events & select.POLLOUT else "answer"
                raise self.late(f"{self.peer}: did not {does} in time")
            return
        stop = -1 if self.stop is None else self.stop.fileno()
        if stop >= 0:
            poll.register(stop, select.POLLIN)
        if any(fd == stop for fd, _ in poll.poll()):
            raise Stopped(f"stopped while waiting for the {self.peer}")

    def pending(self) -> bool:
        """Has a message come, or the beginning of one? Asked before one is sent.

        Raises `lost` if the peer has closed its end.
        """
        self._require_whole()
        self._addressed = True
        if self._incoming.begun:
            return True
        try:
            data = self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            self._fail(error)
        if not data:
            self._fail(None)
        return True

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int | HasFileno] = (),
        *,
        flags: int = HeaderFlag.VERSION,
        deadline: float | None = None,
    ) -> None:
        """Send a message. The descriptors stay the caller's.

        `flags` are the header's. With a `deadline` that is over, the message is sent
        if it fits into the socket, and otherwise DeadlineExceeded is raised.
        """
        self._require_whole()
        self._addressed = True
        data = memoryview(Header(request, flags, len(payload)).pack() + payload)
        numbers = array("i", map(number_of, fds))
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        if deadline is None:
            deadline = time.monotonic() + self.timeout
        while data:
            try:
                sent = self._sock.sendmsg(
                    [data], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                )
            except BlockingIOError:
                self.wait(select.POLLOUT, deadline)
                continue
            except OSError as error:
                self._fail(error)
            control = []
            data = data[sent:]
            self._torn = bool(data)

    def recv(
        self, deadline: float | None = None, limit: Limit = any_payload
    ) -> Message:
        """Receive a message, or the rest of one that has begun to come.

        Without a deadline, its first byte may take for ever, and the rest `timeout`.
        `limit` says how large a payload may be.
        """
        self._require_whole()
        if deadline is None:
            if not self._incoming.begun:
                self.wait(select.POLLIN)
            deadline = time.monotonic() + self.timeout
        while (message := self.recv_now(limit)) is None:
            try:
                self.wait(select.POLLIN, deadline)
            except DeadlineExceeded:
                if self._incoming.begun:
                    self._tear()
                raise
        return message

    def recv_now(self, limit: Limit = any_payload) -> Message | None:
        """Receive the bytes that have come, without waiting; return the message if it
        is whole.

        None: its rest has yet to come. Its beginning is kept for the next call.
        """
        self._require_whole()
        incoming = self._incoming
        try:
            while wanted := incoming.wanted:
                piece = self._read(wanted)
                if piece is None:
                    return None
                incoming.add(*piece, limit)
        except ProtocolError:
            self._tear()
            raise
        self._incoming = Incoming(self.peer, first=False)
        return incoming.message()

    def _read(self, size: int) -> tuple[bytes, list[Fd]] | None:
        """Read at most `size` bytes; return (bytes, their descriptors), or None if no
        byte has come.
        """
        try:
            data, control, flags, _ = self._sock.recvmsg(
                size, _CONTROL_SIZE, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except OSError as error:
            self._fail(error)
        fds = _descriptors(control)
        if flags & socket.MSG_CTRUNC:
            # Either there were too many, or this process can't open so many.
            close_all(fds)
            raise ProtocolError(f"{self.peer}: sent more fds than we can take")
        if not data:
            close_all(fds)
            self._fail(None)
        return data, fds

    def _tear(self) -> None:
        """Give up the message that has begun to come: no other can follow it."""
        self._torn = True
        self._incoming.close()

    def _require_whole(self) -> None:
        if self._torn:
            raise self.lost(f"{self.peer}: was cut off in the middle of a message")

    def _fail(self, error: OSError | None) -> NoReturn:
        """Raise the exception for the end of the stream (None) or for an error."""
        if error is None or error.errno in (errno.EPIPE, errno.ECONNRESET):
            where = " before its first message" if self._incoming.first else ""
            if self._torn or self._incoming.begun:
                where = " in the middle of a message"
            raise self.lost(f"{self.peer}: closed the connection{where}")
        raise SessionError(f"{self.peer}: {error.strerror}") from error


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[Fd]:
    """Return an owner for each descriptor in control messages, cut off ones too."""
    fds = []
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += [Fd(number) for number in numbers]
    return fds
