"""How the airlock comes by its back-end: it connects, waits to be called, or starts it.

A connector gives one connected socket for each session. A back-end that was started
lives as long as its session; the others are nobody's children.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod

from .config import CONNECTED_FD, LISTENING_FD, Config
from .errors import DeadlineExceeded, SessionError, StartError, Stopped, UsageError
from .sockets import Listener, require_socket
from .vhost.channel import Channel
from .vhost.fds import HasFileno

GRACE = 0.5
"""Seconds that a back-end which we started has to end with its connection."""
PATIENCE = 3.0
"""Seconds that it has when it is told to end, before it is made to."""


class Connector(ABC):
    """A way to the back-end. `stop` ends every wait with Stopped."""

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
        return Channel(sock, stop=self.stop, peer="back", timeout=self.config.timeout)


class Dialler(Connector):
    """Connects to a path on which the back-end listens."""

    def __init__(self, config: Config, stop: HasFileno) -> None:
        super().__init__(config, stop)
        self.path = config.backend or ""
        require_socket(self.path)

    def connect(self) -> Channel:
        return Channel.connect(
            self.path, stop=self.stop, peer="back", timeout=self.config.timeout
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
        self.command = config.command
        whole = " ".join(self.command)
        if (CONNECTED_FD in whole) == (LISTENING_FD in whole):
            raise UsageError(
                f"the back-end's command must have either {CONNECTED_FD}"
                f" or {LISTENING_FD} in it: {whole}"
            )
        if shutil.which(self.command[0]) is None:
            raise StartError(f"no back-end: there is no program {self.command[0]}")
        self.process: subprocess.Popen[bytes] | None = None

    def connect(self) -> Channel:
        if CONNECTED_FD in " ".join(self.command):
            ours, theirs = socket.socketpair()
        else:
            ours, theirs = _listening_pair()
        number = str(theirs.fileno())
        command = [
            part.replace(CONNECTED_FD, number).replace(LISTENING_FD, number)
            for part in self.command
        ]
        try:
            # In a process group of its own, as the terminal's SIGINT is not for it:
            # we need it to drain the rings.
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        except OSError as error:
            ours.close()
            raise SessionError(
                f"back: can't start {command[0]}: {error.strerror}"
            ) from None
        finally:
            theirs.close()
        return self._channel(ours)

    def disconnected(self) -> None:
        """Most back-ends end with their connection; the others are told to.

        At once, if we are about to end ourselves.
        """
        process, self.process = self.process, None
        if process is None:
            return
        grace = 0.0 if _signalled(self.stop) else GRACE
        for seconds, end in ((grace, process.terminate), (PATIENCE, process.kill)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
                return
            end()
        process.wait()


def make_connector(config: Config, stop: HasFileno) -> Connector:
    """Return the way to the back-end that the user chose."""
    if config.command:
        return Starter(config, stop)
    if config.backend_listen is not None:
        return Waiter(config, stop)
    return Dialler(config, stop)


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
