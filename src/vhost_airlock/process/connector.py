# SPDX-License-Identifier: Apache-2.0
"""How the airlock comes by its back-end: it connects, waits to be called, or starts it.

A connector gives one connected socket for each session. A back-end that was started
lives as long as its session; the others are nobody's children.
"""

from __future__ import annotations

import select
import shutil
import socket
from abc import ABC, abstractmethod

from ..errors import BackLost, DeadlineExceeded, StartError, Stopped, UsageError
from ..proxy.config import CONNECTED_FD, LISTENING_FD, Config
from ..vhost.channel import Channel
from ..vhost.fds import HasFileno
from .broker import StarterProcess
from .sockets import Listener, require_socket


class Connector(ABC):
    """A way to the back-end. `stop` ends the wait for one to come, with Stopped."""

    def __init__(self, config: Config, stop: HasFileno) -> None:
        self.config = config
        self.stop = stop

    @abstractmethod
    def connect(self) -> Channel:
        """Return a connection, or raise SessionError."""

    def disconnected(self) -> None:  # noqa: B027 (most have nothing to do)
        """The connection is closed."""

    def close(self) -> None:  # noqa: B027
        """No more connections are wanted."""

    def _channel(self, sock: socket.socket) -> Channel:
        return Channel(sock, peer="back", timeout=self.config.timeout, lost=BackLost)


class Dialler(Connector):
    """Connects to a path on which the back-end listens."""

    def __init__(self, config: Config, stop: HasFileno) -> None:
        super().__init__(config, stop)
        self.path = config.backend or ""
        require_socket(self.path)

    def connect(self) -> Channel:
        return Channel.connect(
            self.path, peer="back", timeout=self.config.timeout, lost=BackLost
        )


class Waiter(Connector):
    """Listens at a path to which the back-end connects."""

    def __init__(self, config: Config, stop: HasFileno) -> None:
        super().__init__(config, stop)
        self.listener = Listener(config.backend_listen or "")

    def connect(self) -> Channel:
        ready = _wait(self.listener, self.stop, self.config.timeout)
        if not ready:
            raise DeadlineExceeded(
                f"back: did not connect to {self.listener.path}"
                f" in {self.config.timeout} s"
            )
        return self._channel(self.listener.accept())

    def close(self) -> None:
        self.listener.close()


class Starter(Connector):
    """Starts the back-end's program with a socket of its own."""

    def __init__(self, config: Config, stop: HasFileno) -> None:
        super().__init__(config, stop)
        command = config.command
        whole = " ".join(command)
        if (CONNECTED_FD in whole) == (LISTENING_FD in whole):
            raise UsageError(
                f"the back-end's command must have either {CONNECTED_FD}"
                f" or {LISTENING_FD} in it: {whole}"
            )
        if shutil.which(command[0]) is None:
            raise StartError(f"no back-end: there is no program {command[0]}")
        self.starter = StarterProcess(command)
        self.pid: int | None = None
        """The program's process number, while there is one."""
        self.status: int | None = None
        """How the last one ended, as far as is known."""

    def connect(self) -> Channel:
        self.pid, sock = self.starter.start()
        return self._channel(sock)

    def disconnected(self) -> None:
        """The program shall end; at once, if we are about to end ourselves."""
        if self.pid is not None:
            self.status = self.starter.end(now=_signalled(self.stop))
            self.pid = None

    def close(self) -> None:
        self.starter.close()


def make_connector(config: Config, stop: HasFileno) -> Connector:
    """Return the way to the back-end that the user chose."""
    if config.command:
        return Starter(config, stop)
    if config.backend_listen is not None:
        return Waiter(config, stop)
    return Dialler(config, stop)


def _signalled(stop: HasFileno) -> bool:
    poll = select.poll()
    poll.register(stop.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _wait(listener: HasFileno, stop: HasFileno, timeout: float) -> bool:
    """Wait until somebody connects. False: nobody did in time."""
    poll = select.poll()
    poll.register(listener.fileno(), select.POLLIN)
    poll.register(stop.fileno(), select.POLLIN)
    ready = poll.poll(timeout * 1000)
    if any(fd == stop.fileno() for fd, _ in ready):
        raise Stopped("stopped while waiting for the back to connect")
    return bool(ready)
