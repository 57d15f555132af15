# SPDX-License-Identifier: Apache-2.0
"""One vhost-user socket: whole messages with their descriptors, and deadlines.

A channel doesn't know what messages mean. It guarantees:

- A message leaves in one sendmsg() with its descriptors, which go with its first byte,
  as the specification wants (and libvhost-user asserts). What doesn't fit into the
  socket at once follows without descriptors.
- A message arrives whole or not at all. Nothing is read beyond it, and no more is
  allocated than its sender may send. Descriptors that come in the middle of a message,
  and more of them than a message can have, are closed.
- All waiting is done in `wait()`: it ends with the deadline, and with the stop event.
- When a message was left half sent or half received, the channel is of no use any more,
  and says so.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

from ..errors import (
    DeadlineExceeded,
    Disconnected,
    ProtocolError,
    SessionError,
    Stopped,
)
from .fds import Fd, HasFileno, close_all, number_of
from .wire import MAX_FDS, MAX_PAYLOAD, Header, HeaderFlag

TIMEOUT = 10.0
"""Seconds that a peer has for one message, unless we are told otherwise."""

_CONTROL_SIZE = socket.CMSG_SPACE(MAX_FDS * array("i").itemsize)
_KNOWN_FLAGS = HeaderFlag.REPLY | HeaderFlag.NEED_REPLY

Limit = Callable[[int], int]
"""From a request's number to the size of the largest payload that may come with it."""


def any_payload(request: int) -> int:
    """The limit when nothing is known about a message."""
    return MAX_PAYLOAD


class OwnsFds:
    """Has a list of descriptors, and closes those that nobody took out of it."""

    __slots__ = ()

    fds: list[Fd]

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        close_all(self.fds)
        self.fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(slots=True)
class Message(OwnsFds):
    """A message that was received."""

    request: int
    flags: int
    payload: bytes
    fds: list[Fd]

    @property
    def reply(self) -> bool:
        return bool(self.flags & HeaderFlag.REPLY)

    @property
    def need_reply(self) -> bool:
        return bool(self.flags & HeaderFlag.NEED_REPLY)


@dataclass(slots=True)
class Answer(OwnsFds):
    """What a handler returns, or a request got: a decoded payload and descriptors."""

    payload: Any
    """The reply's payload, of the class that the request's rule says."""
    fds: list[Fd] = field(default_factory=list)


class Channel:
    """One end of a connected vhost-user socket, which it owns.

    `peer` is what error messages call the other end. `stop`, an eventfd, ends every
    wait with `Stopped` once it is signalled; set it to None to go on after that.
    `timeout` is for a message that has begun to come, and for one that we send.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        stop: HasFileno | None = None,
        peer: str = "back",
        timeout: float = TIMEOUT,
    ) -> None:
        sock.settimeout(None)
        self._sock = sock
        self._torn = False
        self.stop = stop
        self.peer = peer
        self.timeout = timeout

    @classmethod
    def connect(
        cls,
        path: str,
        *,
        stop: HasFileno | None = None,
        peer: str = "back",
        timeout: float = TIMEOUT,
    ) -> Self:
        """Connect to a peer that listens at a path."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except OSError as error:
            sock.close()
            reason = error.strerror or error
            raise Disconnected(f"{peer}: can't connect to {path}: {reason}") from None
        return cls(sock, stop=stop, peer=peer, timeout=timeout)

    def fileno(self) -> int:
        """Return the socket's number; -1 when it's closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket; again does nothing."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def wait(self, events: int, deadline: float | None = None) -> None:
        """Wait until the socket is ready: every wait for a peer ends up here.

        `deadline` is a time of time.monotonic(), None is never. Raises `Stopped` even
        when the socket is ready too, or a peer that never rests could keep us from
        stopping.
        """
        poll = select.poll()
        poll.register(self._sock, events)
        if self.stop is not None:
            poll.register(self.stop.fileno(), select.POLLIN)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = [fd for fd, _ in poll.poll(None if left is None else left * 1000)]
        if self.stop is not None and self.stop.fileno() in ready:
            raise Stopped(f"stopped while waiting for the {self.peer}")
        if not ready:
            does = "read" if events & select.POLLOUT else "answer"
            raise DeadlineExceeded(f"{self.peer}: did not {does} in time")

    def pending(self) -> bool:
        """Is there something to receive? Raises `Disconnected` at the end of it."""
        self._require_whole()
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
        """Send a message. The descriptors stay the caller's."""
        self._require_whole()
        data = memoryview(Header(request, flags, len(payload)).pack() + payload)
        numbers = array("i", map(number_of, fds))
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if numbers else []
        if deadline is None:
            deadline = time.monotonic() + self.timeout
        while data:
            self.wait(select.POLLOUT, deadline)
            try:
                sent = self._sock.sendmsg(
                    [data], control, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                )
            except BlockingIOError:
                continue
            except OSError as error:
                self._fail(error)
            control = []
            data = data[sent:]
            self._torn = bool(data)

    def recv(
        self, deadline: float | None = None, limit: Limit = any_payload
    ) -> Message:
        """Receive a message; without a deadline, wait for its first byte for ever."""
        self._require_whole()
        self.wait(select.POLLIN, deadline)
        if deadline is None:
            deadline = time.monotonic() + self.timeout
        fds: list[Fd] = []
        try:
            # One read of all would not tell with which byte descriptors came.
            first = self._read(1, deadline, fds)
            rest = self._read(Header.LAYOUT.size - 1, deadline, None)
            header = Header.unpack(first + rest)
            if header.flags & ~_KNOWN_FLAGS != HeaderFlag.VERSION:
                raise ProtocolError(
                    f"{self.peer}: request {header.request} has flags {header.flags:#x}"
                )
            if header.size > limit(header.request):
                raise ProtocolError(
                    f"{self.peer}: request {header.request} has {header.size} bytes,"
                    f" at most {limit(header.request)} are possible"
                )
            payload = self._read(header.size, deadline, None)
        except BaseException:
            close_all(fds)
            raise
        self._torn = False
        return Message(header.request, header.flags, payload, fds)

    def _read(self, size: int, deadline: float, fds: list[Fd] | None) -> bytes:
        """Read exactly `size` bytes; fds may come, into `fds`, with the first."""
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            self.wait(select.POLLIN, deadline)
            try:
                count, control, flags, _ = self._sock.recvmsg_into(
                    [rest],
                    _CONTROL_SIZE,
                    socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC,
                )
            except BlockingIOError:
                continue
            except OSError as error:
                self._fail(error)
            came = _descriptors(control)
            if fds is None and came:
                close_all(came)
                raise ProtocolError(f"{self.peer}: sent fds in the middle of a message")
            if fds is not None:
                fds += came
                fds = None
            if flags & socket.MSG_CTRUNC:
                # Either there were too many, or this process has no room for them.
                raise ProtocolError(f"{self.peer}: sent more fds than we can take")
            if not count:
                self._fail(None)
            self._torn = True
            rest = rest[count:]
        return bytes(data)

    def _require_whole(self) -> None:
        if self._torn:
            raise Disconnected(f"{self.peer}: was cut off in the middle of a message")

    def _fail(self, error: OSError | None) -> NoReturn:
        """Raise what the end of the stream, or an error, means."""
        if error is None or error.errno in (errno.EPIPE, errno.ECONNRESET):
            where = " in the middle of a message" if self._torn else ""
            raise Disconnected(f"{self.peer}: closed the connection{where}")
        raise SessionError(f"{self.peer}: {error.strerror}") from error


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[Fd]:
    """Own what came in control messages, all of them, cut off ones too."""
    fds = []
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += [Fd(number) for number in numbers]
    return fds
