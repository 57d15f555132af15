# SPDX-License-Identifier: Apache-2.0
"""The process: listens for the front, serves one session after the other, and ends.

It serves one front at a time, as a vhost-user back-end does; the next one waits to be
accepted. SIGTERM and SIGINT end it: rings are drained first, within the time for that.
Before it serves anybody it locks itself in, see sandbox/enter.py.
"""

from __future__ import annotations

import contextlib
import logging
import select
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

from ..errors import FrontLost, SessionError
from ..proxy.back import Back
from ..proxy.config import Config
from ..proxy.session import Session
from ..sandbox import enter as sandbox
from ..vhost.channel import Channel
from ..vhost.fds import eventfd, notify
from ..vhost.wire import ProtocolFeature
from .connector import make_connector
from .sockets import Listener, inherited
from .stats_server import Stats

log = logging.getLogger(__name__)

RETRY = 0.5
"""Seconds between attempts to connect to a front that listens."""


class Daemon:
    """Everything that lives as long as the process. StartError when it can't begin."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._open = contextlib.ExitStack()
        self.stop = self._open.enter_context(eventfd())
        self._kept: Back | None = None
        self._session: Session | None = None
        self._sessions = 0
        self._stats: Stats | None = None
        # From here on there may be something to clean away.
        for number in (signal.SIGTERM, signal.SIGINT):
            old = signal.signal(number, self._on_signal)
            self._open.callback(signal.signal, number, old)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self.connector = make_connector(config, self.stop)
            self._open.callback(self.connector.close)
            self._fronts = self._listen()
            if config.stats_path is not None:
                self._stats = Stats(config.stats_path, self.describe)
                self._open.callback(self._stats.close)
            undo.pop_all()

    def run(self) -> int:
        """Lock the process in, serve until told to stop; returns the exit status."""
        with contextlib.closing(self):
            if self.config.sandbox:
                sandbox.enter(self._to_remove)
            if self._stats is not None:
                self._stats.start()
            for sock in self._fronts:
                session = self._serve(sock)
                if session.stopped:
                    return 0
                if session.back_lost and self.config.exit_with_backend:
                    log.error("the back is gone: ending as told")
                    return 1
        return 0

    def describe(self) -> dict[str, object]:
        """What the process is doing, as JSON can hold it. Any thread may ask."""
        session = self._session
        idle = {
            "backend_connected": self._kept is not None,
            "rings": {},
            "counters": {},
        }
        return {
            "sessions": self._sessions,
            "vmm_connected": session is not None,
            **(idle if session is None else session.describe()),
        }

    def close(self) -> None:
        """Close everything; nothing is left of the sockets that were made."""
        if self._kept is not None:
            self._drop_back()
        self._open.close()

    def _serve(self, sock: socket.socket) -> Session:
        log.info("front: connected")
        front = Channel(
            sock,
            stop=self.stop,
            peer="front",
            timeout=self.config.timeout,
            lost=FrontLost,
        )
        session = Session(front, self.config, self._connect, self.stop)
        self._session = session
        self._sessions += 1
        try:
            kept = session.run()
        finally:
            self._session = None
        if self._kept is not None:
            return session  # it left before it needed the back, which is ours still
        if kept is None:
            self.connector.disconnected()
        else:
            self._kept = kept
            self._refresh(kept)
        return session

    def _connect(self, config_changed: Callable[[], None]) -> Back:
        """Return the back of a new session: the kept one, or a new connection."""
        kept, self._kept = self._kept, None
        if kept is not None:
            if kept.usable:
                kept.config_changed = config_changed
                return kept
            kept.close()
            self.connector.disconnected()
        channel = self.connector.connect()
        try:
            return Back(channel, self.config, config_changed)
        except BaseException:
            channel.close()
            raise

    def _refresh(self, back: Back) -> None:
        """Make a kept device as new for the next front, as far as it can be."""
        if back.frontend.protocol_features & ProtocolFeature.RESET_DEVICE:
            try:
                back.frontend.reset_device()
            except SessionError as error:
                log.error("%s", error)
                self._drop_back()

    def _drop_back(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None
            self.connector.disconnected()

    def _listen(self) -> Iterator[socket.socket]:
        """Prepare for fronts now; return what yields them one by one."""
        if self.config.front_connect is not None:
            return self._dial(self.config.front_connect)
        if self.config.fd is not None:
            sock, listening = inherited(self.config.fd)
            if not listening:
                return iter([sock])
            self._open.enter_context(sock)
            return self._accept(sock, lambda: sock.accept()[0])
        listener = Listener(self.config.socket_path or "")
        self._open.callback(listener.close)
        return self._accept(listener.socket, listener.accept)

    @property
    def _to_remove(self) -> list[str]:
        """The paths of sockets that we have made, and remove at the end."""
        config = self.config
        paths = (config.socket_path, config.backend_listen, config.stats_path)
        return [path for path in paths if path is not None]

    def _accept(
        self, waited: socket.socket, accept: Callable[[], socket.socket]
    ) -> Iterator[socket.socket]:
        poll = select.poll()
        poll.register(waited.fileno(), select.POLLIN)
        poll.register(self.stop.fileno(), select.POLLIN)
        while True:
            if any(fd == self.stop.fileno() for fd, _ in poll.poll()):
                return
            yield accept()

    def _dial(self, path: str) -> Iterator[socket.socket]:
        """Connect to a front that listens, again and again, as it may come back."""
        poll = select.poll()
        poll.register(self.stop.fileno(), select.POLLIN)
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(path)
            except OSError as error:
                sock.close()
                log.info("front: can't connect to %s: %s", path, error.strerror)
            else:
                yield sock
            if poll.poll(RETRY * 1000):
                return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: ending", signal.Signals(number).name)
        notify(self.stop)
