# SPDX-License-Identifier: Apache-2.0
"""A message that was received, a message that is still coming, and an answer.

`Incoming` puts a message together from pieces as a socket has them. It does no I/O of
its own, so one set of checks serves those that wait for a message and those that don't.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from ..errors import ProtocolError
from ..record import changeable
from .fds import Fd, close_all
from .wire import MAX_PAYLOAD, Header, HeaderFlag

_KNOWN_FLAGS = HeaderFlag.REPLY | HeaderFlag.NEED_REPLY

Limit = Callable[[int], int]
"""From a request's number to the size of the largest payload that may come with it."""


def any_payload(request: int) -> int:
    """The limit when nothing is known about a message."""
    return MAX_PAYLOAD


class OwnsFds:
    """Has a list of descriptors, and closes those that were not taken out of it."""

    __slots__ = ()

    fds: list[Fd]

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        close_all(self.fds)
        self.fds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@changeable
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


class Answer(OwnsFds):
    """A reply that a handler returns, or that a request got, with its descriptors.

    `payload` is the reply's payload, of the class in the request's rule.
    """

    def __init__(self, payload: Any, fds: list[Fd] | None = None) -> None:
        self.payload = payload
        self.fds = [] if fds is None else fds


class Incoming(OwnsFds):
    """The part of a message that has come. `peer` is its sender's name in errors.

    A `first` message tells whether its sender speaks vhost-user at all.
    """

    __slots__ = ("_data", "_header", "fds", "first", "peer")

    def __init__(self, peer: str, *, first: bool) -> None:
        self.peer = peer
        self.first = first
        self.fds: list[Fd] = []
        self._data = bytearray()
        self._header: Header | None = None

    @property
    def begun(self) -> bool:
        """Has the first byte come?"""
        return bool(self._data)

    @property
    def wanted(self) -> int:
        """The number of bytes that may be read next; 0 when the message is whole.

        The first byte is read alone: a longer read would not tell with which byte
        descriptors came.
        """
        if not self._data:
            return 1
        payload = 0 if self._header is None else self._header.size
        return Header.LAYOUT.size + payload - len(self._data)

    def add(self, data: bytes, fds: list[Fd], limit: Limit) -> None:
        """Add the bytes that came next, at most `wanted`, and their descriptors.

        ProtocolError if no message can begin like this.
        """
        if fds and self._data:
            close_all(fds)
            raise ProtocolError(f"{self.peer}: sent fds in the middle of a message")
        self.fds += fds
        self._data += data
        if self._header is None and len(self._data) == Header.LAYOUT.size:
            self._header = self._checked(Header.unpack(bytes(self._data)), limit)

    def _checked(self, header: Header, limit: Limit) -> Header:
        if header.flags & ~_KNOWN_FLAGS != HeaderFlag.VERSION:
            if self.first:
                raise ProtocolError(
                    f"{self.peer}: does not speak vhost-user: it begins with"
                    f" {bytes(self._data)!r} (flags {header.flags:#x})"
                )
            raise ProtocolError(
                f"{self.peer}: request {header.request} has flags {header.flags:#x}"
            )
        if header.size > limit(header.request):
            raise ProtocolError(
                f"{self.peer}: request {header.request} has {header.size} bytes,"
                f" at most {limit(header.request)} are possible"
            )
        return header

    def message(self) -> Message:
        """Return the message, which is whole. It owns the descriptors from now on."""
        assert self._header is not None
        payload = bytes(self._data[Header.LAYOUT.size :])
        fds, self.fds = self.fds, []
        return Message(self._header.request, self._header.flags, payload, fds)
