# SPDX-License-Identifier: Apache-2.0
"""Connections to the back-end: made, awaited, or to a program that is started.

A connector gives one connected socket at a time. A back-end that was started lives as
long as its connection; one that was not started is independent of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import time
from abc import ABC, abstractmethod

from ..errors import (
    AirlockError,
    BackLate,
    BackLost,
    DeadlineExceeded,
    Interrupted,
    SessionError,
    StartError,
    Stopped,
)
from ..record import replaced
from ..vhost.channel import Channel
from ..vhost.fds import Fd, HasFileno
from .broker import Broker
from .command import CONNECTED_FD, LISTENING_FD
from .config import ProcessConfig
from .sockets import (
    ListeningSocket,
    Peer,
    has_ended,
    inherited,
    peer_of,
    pidfd_of,
    require_socket,
)
from .target import Target, require_command, require_program

PAUSE = 0.05
"""Seconds between attempts to connect to a back-end that is away."""
LONGEST_PAUSE = 5.0
"""Seconds at most between two starts of a program that fails."""
SHORT_LIFE = 10.0
"""Seconds. A program that fails after a longer life is started again at once."""


class Connector(ABC):
    """A way to the back-end. `stop` ends the wait for a back-end, with Stopped."""

    following = False
    """Is it the way to the back-end of the broker's order under way?"""
    interrupt: HasFileno | None = None
    """Ends a wait for the back-end too, with Interrupted."""
    spent = False
    """Can no back-end come this way any more?"""

    def __init__(self, config: ProcessConfig, stop: HasFileno, broker: Broker) -> None:
        self.config = config
        self.log = config.device.log
        self.stop = stop
        self.broker = broker
        self._users: frozenset[int] = frozenset()

    @abstractmethod
    def connect(self, deadline: float | None) -> Channel:
        """Return a connection, or raise SessionError.

        A back-end that is away is waited for until `deadline`, a time of
        time.monotonic(); with None for as long as it takes. OSError: there is no
        descriptor left for the socket.
        """

    def users(self) -> frozenset[int]:
        """Return the numbers of the users that the last back-end to be connected runs
        as; none if that is not known.
        """
        return self._users

    def await_there(self) -> None:  # noqa: B027
        """Wait for the first back-end, if the user has set a limit for that. StartError
        when it is over. The process is not locked in yet.
        """

    def lives(self) -> str:
        """Return the reason why the last back-end may still be at work, after its
        connection has ended; "": its process has ended too.
        """
        return "its process is not known"

    def disconnected(self) -> None:  # noqa: B027 (most have nothing to do)
        """The connection is closed."""

    def close(self) -> None:  # noqa: B027
        """No more connections are wanted."""

    def _channel(self, sock: socket.socket, came: str) -> Channel:
        """Return the channel of a back-end that is there, and say how it came."""
        self._users = frozenset({peer_of(sock).uid})
        self.log.info("back-end %s", came)
        return Channel(
            sock,
            peer="back-end",
            timeout=self.config.device.timeout,
            lost=BackLost,
            late=BackLate,
        )

    def _wait(self, seconds: float | None, waited: HasFileno | None = None) -> bool:
        """Wait until a descriptor is ready; returns whether it is."""
        poll = select.poll()
        poll.register(self.stop.fileno(), select.POLLIN)
        for other in (waited, self.interrupt):
            if other is not None:
                poll.register(other.fileno(), select.POLLIN)
        ready = {fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)}
        if self.stop.fileno() in ready:
            raise Stopped("stopped while waiting for the back-end")
        if self.interrupt is not None and self.interrupt.fileno() in ready:
            raise Interrupted("an order came while waiting for the back-end")
        return bool(ready)


class Dialler(Connector):
    """Connects to a path on which the back-end listens."""

    def __init__(self, config: ProcessConfig, stop: HasFileno, broker: Broker) -> None:
        super().__init__(config, stop, broker)
        self.path = config.backend or ""

    def connect(self, deadline: float | None) -> Channel:
        told = False
        while True:
            sock, reason = self.broker.connect_back(following=self.following)
            if sock is not None:
                return self._channel(sock, f"connected: {peer_of(sock)}")
            trouble = f"back-end: can't connect to {self.path}: {reason}"
            left = _left(deadline)
            if left == 0:
                raise BackLost(trouble)
            if not told:
                self.log.warning("%s; a VMM waits, trying again", trouble)
                told = True
            self._wait(PAUSE if left is None else min(PAUSE, left))

    def await_there(self) -> None:
        limit = self.config.wait_for
        if limit is None:
            return
        deadline = time.monotonic() + limit
        while absent := require_socket(self.path, may_come=True):
            left = _left(deadline)
            if not left:
                raise StartError(f"{absent}, {limit:g} s after the start")
            self._wait(min(PAUSE, left))

    def lives(self) -> str:
        return self.broker.back_lives(following=self.following)


class Waiter(Connector):
    """Listens where the back-end connects."""

    def __init__(
        self,
        config: ProcessConfig,
        stop: HasFileno,
        broker: Broker,
        listener: ListeningSocket,
    ) -> None:
        super().__init__(config, stop, broker)
        self.listener = listener
        self._came = False
        """Whether a back-end has ever connected."""
        self._peer: Fd | None = None
        """Of the process that was the last to connect, a pidfd; None: not known."""
        self._peer_pid = 0

    def connect(self, deadline: float | None) -> Channel:
        if not self._wait(0, self.listener):
            left = _left(deadline)
            if left != 0:
                self.log.warning(
                    "no back-end has connected to %s; a VMM waits for it",
                    self.listener.path,
                )
            if not self._wait(left, self.listener):
                raise DeadlineExceeded(
                    f"back-end: did not connect to {self.listener.path} in time"
                )
        sock = self.listener.accept()
        self._note_peer(sock)
        return self._channel(sock, f"connected: {peer_of(sock)}")

    def lives(self) -> str:
        if not self._came or (self._peer is not None and has_ended(self._peer)):
            return ""
        if self._peer is None:
            return "its process is not known; one that connects is taken"
        return f"process {self._peer_pid} has not ended"

    def close(self) -> None:
        self._forget_peer()
        self.listener.close()

    def _note_peer(self, sock: socket.socket) -> None:
        """Note which process has connected, at this moment: it may end any time."""
        self._forget_peer()
        self._came = True
        self._peer, self._peer_pid = pidfd_of(sock), peer_of(sock).pid

    def _forget_peer(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None


class Given(Connector):
    """One back-end, whose connection is there already."""

    def __init__(
        self,
        config: ProcessConfig,
        stop: HasFileno,
        broker: Broker,
        sock: socket.socket,
    ) -> None:
        super().__init__(config, stop, broker)
        self._sock = sock

    def connect(self, deadline: float | None) -> Channel:
        if self.spent:
            raise BackLost(
                "back-end: the connection that was passed to the airlock has ended,"
                " and there is no other"
            )
        self.spent = True
        return self._channel(self._sock, f"connected already: {peer_of(self._sock)}")

    def close(self) -> None:
        if not self.spent:
            self._sock.close()


class Starter(Connector):
    """Has the broker start the back-end's program with a socket of its own.

    A program that fails soon after its start is started again after a pause, which
    doubles each time.
    """

    def __init__(self, config: ProcessConfig, stop: HasFileno, broker: Broker) -> None:
        super().__init__(config, stop, broker)
        self.pid: int | None = None
        """The program's process number, while there is one."""
        self.status: int | None = None
        """The exit status of the last program that ended; None: not known."""
        self._connection: Channel | None = None
        self._started = 0.0
        self.pause = 0.0
        """Seconds from the last failure to the next start."""
        self._not_before = 0.0
        """The time of the next start, of time.monotonic()."""

    def connect(self, deadline: float | None) -> Channel:
        left = _left(deadline)
        pause = self._not_before - time.monotonic()
        if left is not None and pause > left:
            self._wait(left)
            raise BackLost(
                f"back-end: {self.config.command[0]} has failed,"
                f" and is started again in {pause - left:.1f} s"
            )
        if pause > 0:
            self._wait(pause)
        self._started = time.monotonic()
        sock, text = self.broker.connect_back(following=self.following)
        if sock is None:
            self._lengthen_pause()
            raise SessionError(
                f"back-end: can't start {self.config.command[0]}: {text}"
            )
        self.pid = int(text)
        program = Peer(self.pid, os.getuid(), os.getgid())
        self._connection = self._channel(
            sock, f"started: {self.config.command[0]}, {program}"
        )
        return self._connection

    def users(self) -> frozenset[int]:
        """Return the users of the program's own process as they are now: the socket's
        pair was made by the broker, and says nothing of the program.
        """
        return self.broker.users_of_back(following=self.following)

    def lives(self) -> str:
        """It has ended with its connection."""
        return ""

    def disconnected(self) -> None:
        """End the program. If the process ends meanwhile, the broker ends it."""
        if self.pid is None:
            return
        pid, self.pid, self.status = self.pid, None, None
        with contextlib.suppress(AirlockError):
            self.status = self.broker.end_back(following=self.following)
        lived = time.monotonic() - self._started
        silent = self._connection is not None and self._connection.silent
        if not silent and self.status in (None, 0, -signal.SIGTERM):
            self.pause = self._not_before = 0.0
            return
        self.log.warning(
            "back-end: %s (process %d) ended: %s%s",
            self.config.command[0],
            pid,
            _end(self.status),
            self._hint() if silent else "",
        )
        if lived < SHORT_LIFE:
            self._lengthen_pause()
        else:
            self.pause = self._not_before = 0.0

    def _hint(self) -> str:
        """Return the likeliest reason why a program has sent no message at all."""
        has, lacks = CONNECTED_FD, LISTENING_FD
        if has not in " ".join(self.config.command):
            has, lacks = lacks, has
        return f", and sent no message: does it take {lacks} in place of {has}?"

    def _lengthen_pause(self) -> None:
        self.pause = min(LONGEST_PAUSE, max(PAUSE, 2 * self.pause))
        # Many airlocks whose program fails at once do not start it at once again.
        self._not_before = time.monotonic() + self.pause * random.uniform(0.7, 1)


def make_connector(config: ProcessConfig, stop: HasFileno, broker: Broker) -> Connector:
    """Return the way to the back-end that the user chose. The broker need not run.

    UsageError or StartError if no back-end can come that way.
    """
    if config.command:
        require_command(config.command)
        require_program(config.command[0])
        return Starter(config, stop, broker)
    if config.backend_fd is not None:
        sock, listening = inherited(config.backend_fd)
        if not listening:
            return Given(config, stop, broker, sock)
        return Waiter(config, stop, broker, ListeningSocket(sock))
    if config.backend_listen is not None:
        listener = broker.listen(config.backend_listen, None, config.rights)
        return Waiter(config, stop, broker, listener)
    path = config.backend or ""
    if absent := require_socket(path, may_come=not config.no_wait):
        config.device.log.warning("%s; waiting for it", absent)
    return Dialler(config, stop, broker)


def next_connector(
    target: Target, config: ProcessConfig, stop: HasFileno, broker: Broker
) -> Connector:
    """Return the way to the back-end of the broker's order under way."""
    config = replaced(
        config,
        backend=target.path,
        backend_listen=None,
        backend_fd=None,
        command=target.command,
    )
    kind = Starter if target.command else Dialler
    made = kind(config, stop, broker)
    made.following = True
    return made


def _end(status: int | None) -> str:
    """Return words for the status of a program."""
    if status is None:
        return "status unknown"
    return f"status {status}" if status >= 0 else f"signal {-status}"


def _left(deadline: float | None) -> float | None:
    """Return the seconds that are left; None if there is no deadline."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())
