# SPDX-License-Identifier: Apache-2.0
"""Connections to fronts, one after the other: accepted, inherited, or made.

wait() returns when a front is there; take() is called once the airlock can serve it.
Until then a front that connects is in the kernel's queue: its connect() has succeeded,
and its first message waits.
"""

from __future__ import annotations

import select
import socket
from abc import ABC, abstractmethod

from ..log import Logger
from ..proxy.session import Others
from ..vhost.fds import HasFileno
from .broker import Broker
from .config import ProcessConfig
from .sockets import ListeningSocket, Peer, inherited, peer_of

RETRY = 0.5
"""Seconds between attempts to connect to a front that listens."""


class Fronts(ABC):
    """A way to the fronts. `where` says in words where they are."""

    where: str

    others: Others | None = None
    """Tells of fronts that wait while another one is served, if they can."""

    @abstractmethod
    def wait(self, other: HasFileno | None = None) -> bool:
        """Wait for the next front, or until another descriptor is readable. False:
        there is no front, or `stop` was signalled.
        """

    @abstractmethod
    def waiting(self) -> bool:
        """Is there a front that was not taken yet? Any thread may ask."""

    @abstractmethod
    def take(self) -> socket.socket:
        """Return the front's connection. OSError: the system has no room for it."""

    @abstractmethod
    def close(self) -> None:
        """No more fronts are wanted."""


class Accepted(Fronts):
    """Fronts that connect to a listening socket."""

    def __init__(self, listener: ListeningSocket, stop: HasFileno, log: Logger) -> None:
        self.where = f"listening for the VMM at {listener.path}"
        self.others = self
        self.log = log
        self._listener = listener
        self._stop = stop
        self._served: Peer | None = None

    def fileno(self) -> int:
        """The number of the socket, which is readable while a front waits."""
        return self._listener.fileno()

    def tell(self) -> None:
        """Say in the log that a front waits while another one is served.

        Its process can't be known before it is accepted.
        """
        self.log.warning(
            "another VMM waits: one is served at a time, and the VMM that is (%s) has"
            " to leave first",
            self._served,
        )

    def wait(self, other: HasFileno | None = None) -> bool:
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        poll.register(self._stop.fileno(), select.POLLIN)
        if other is not None:
            poll.register(other.fileno(), select.POLLIN)
        return all(fd != self._stop.fileno() for fd, _ in poll.poll())

    def waiting(self) -> bool:
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def take(self) -> socket.socket:
        sock = self._listener.accept()
        self._served = peer_of(sock)
        return sock

    def close(self) -> None:
        self._listener.close()


class Given(Fronts):
    """One front, whose connection is there already."""

    where = "the VMM is connected already"

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock

    def wait(self, other: HasFileno | None = None) -> bool:
        return self._sock is not None

    def waiting(self) -> bool:
        return self._sock is not None

    def take(self) -> socket.socket:
        sock, self._sock = self._sock, None
        assert sock is not None, "wait() comes first"
        return sock

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()


class Dialled(Given):
    """A path on which fronts listen: connected to again each time one has left."""

    def __init__(self, path: str, stop: HasFileno, broker: Broker, log: Logger) -> None:
        super().__init__(None)
        self.where = f"connecting to the VMM at {path}"
        self.path = path
        self.log = log
        self._stop = stop
        self._broker = broker
        self._pause = 0.0

    def wait(self, other: HasFileno | None = None) -> bool:
        poll = select.poll()
        poll.register(self._stop.fileno(), select.POLLIN)
        if other is not None:
            poll.register(other.fileno(), select.POLLIN)
        told = False
        while self._sock is None:
            if ready := poll.poll(self._pause * 1000):
                return all(fd != self._stop.fileno() for fd, _ in ready)
            self._pause = RETRY
            self._sock, reason = self._broker.connect_front()
            if self._sock is None and not told:
                self.log.warning(
                    "VMM: can't connect to %s: %s; trying again", self.path, reason
                )
                told = True
        return True


def make_fronts(config: ProcessConfig, stop: HasFileno, broker: Broker) -> Fronts:
    """Return the way to the fronts that the user chose. StartError if it can't be."""
    log = config.device.log
    if config.front_connect is not None:
        return Dialled(config.front_connect, stop, broker, log)
    if config.fd is not None:
        sock, listening = inherited(config.fd)
        return Accepted(ListeningSocket(sock), stop, log) if listening else Given(sock)
    listener = broker.listen(config.socket_path, None, config.rights)
    return Accepted(listener, stop, log)
