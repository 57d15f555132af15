# SPDX-License-Identifier: Apache-2.0
"""The process: listens for the front, serves one session after the other, and ends.

It serves one front at a time, as a vhost-user back-end does; the next one waits to be
accepted. So does a front that comes while the back-end is away: it is accepted when the
back-end was reached, or, to be closed at once, when it was not reached in time.
SIGTERM, SIGINT and SIGHUP end the process, and so does the end of a pipe that the user
names: rings are drained first, within the drain time-out. Before the process serves a
front it locks itself in, see sandbox/enter.py; from then on only the broker can
connect, start and remove.
"""

from __future__ import annotations

import contextlib
import select
import signal
import time
from types import FrameType

from ..errors import (
    AirlockError,
    FrontLost,
    Interrupted,
    SessionError,
    Stopped,
)
from ..log import Logger
from ..proxy.session import Session
from ..sandbox import enter as sandbox
from ..vhost.channel import Channel
from ..vhost.fds import eventfd, notify
from .back_source import BackSource
from .broker import Broker
from .config import ProcessConfig
from .fronts import make_fronts
from .manager import Manager
from .orders import Orders, listen_for_orders
from .signals import ENDING
from .sockets import inherited_pipe, peer_of, reason_of
from .stats_server import KIND as STATS_KIND
from .stats_server import Stats

log = Logger(__name__)
"""For what is about no device."""

PAUSE = 0.1
"""Seconds until the next try, when the system has no room for another session."""

WAITING = "STATUS=waiting for a VMM"
REACHING = "STATUS=a VMM waits for the back-end"
SERVING = "STATUS=a VMM is connected"
DRAINING = "STATUS=ending"
"""News for the service manager."""

WANT = (OSError, MemoryError)
"""Raised for want of descriptors or memory."""


class Daemon:
    """Everything that lives as long as the process. StartError when it can't begin."""

    def __init__(self, config: ProcessConfig) -> None:
        self.config = config
        self.log = config.device.log
        self._open = contextlib.ExitStack()
        self._told = self._open.enter_context(eventfd())
        self.stop = self._open.enter_context(select.epoll())
        """Ready when the process shall end: by a signal, or with a pipe."""
        self.stop.register(self._told.fileno(), select.EPOLLIN)
        self._wanting = False
        self._session: Session | None = None
        self._sessions = 0
        self._stats: Stats | None = None
        self._manager = Manager(config.notify_socket)
        self._open.callback(self._manager.close)
        # From here on there may be sockets and processes to clean away.
        for number in ENDING:
            old = signal.signal(number, self._on_signal)
            self._open.callback(signal.signal, number, old)
        with contextlib.ExitStack() as undo:
            undo.callback(self._open.close)
            if config.exit_with_pipe is not None:
                pipe = inherited_pipe(config.exit_with_pipe)
                self._open.callback(pipe.close)
                self.stop.register(pipe.fileno(), 0)  # EPOLLHUP comes without asking
            broker = Broker(
                self.stop,
                back=config.backend,
                front=config.front_connect,
                command=config.command,
            )
            # The broker is closed last: it removes the paths of the other sockets.
            self._open.callback(broker.close)
            self._backs = BackSource(config, self.stop, broker)
            self._orders, handed = listen_for_orders(self._backs)
            if self._orders is not None:
                self._open.callback(self._orders.close)
            stats = None
            if config.stats_path is not None or config.stats_fd is not None:
                stats = broker.listen(
                    config.stats_path, config.stats_fd, config.rights, STATS_KIND
                )
            if stats is not None or handed is not None:
                self._stats = Stats(stats, self.describe, handed)
                self._open.callback(self._stats.close)
            # Behind those for stats and orders: where the VMM's socket is, these are.
            self._fronts = make_fronts(config, self.stop, broker)
            self._open.callback(self._fronts.close)
            # The last one, since it may tell that there is no back-end yet.
            self._backs.open()
            self._open.callback(self._backs.close)
            if self._stats is not None:
                self._open.callback(self._stats.stop)
            broker.start()
            undo.pop_all()

    def run(self) -> int:
        """Lock the process in, serve until a signal comes; returns the exit status."""
        with contextlib.closing(self):
            with contextlib.suppress(Stopped):
                self._backs.connector.await_there()
                if self.config.sandbox:
                    sandbox.enter()
                if self._stats is not None:
                    self._stats.start()
                self._manager.tell("READY=1")
                self.log.info("%s", self._fronts.where)
                while self._wait():
                    lost = self._serve_next()
                    if lost and self.config.exit_with_backend:
                        self.log.error(
                            "the back-end is gone: ending (--on-backend-loss=exit)"
                        )
                        return 1
                    if self._backs.spent:
                        self.log.info(
                            "the back-end's only connection has ended: ending"
                        )
                        return int(lost)
                    if self._sessions and self.config.once:
                        return 0
            if any(event & select.EPOLLHUP for _, event in self.stop.poll(0)):
                self.log.info("the pipe has no other end any more: ending")
        return 0

    def describe(self) -> dict[str, object]:
        """Return the state of the process, as JSON can hold it. Any thread may ask."""
        session = self._session
        idle = {
            "backend_connected": self._backs.holds,
            "rings": {},
            "counters": {},
        }
        return {
            "name": self.config.device.name,
            "sessions": self._sessions,
            "vmm_connected": session is not None,
            "vmm_waits": self._fronts.waiting(),
            **(idle if session is None else session.describe()),
        }

    def close(self) -> None:
        """Close everything, and remove the sockets that were made."""
        self._backs.drop()
        self._open.close()

    def _wait(self) -> bool:
        """Wait for the next front. False: there is none, or the process is to end."""
        self._manager.tell(WAITING)
        while came := self._fronts.wait(self._orders):
            if self._orders is None or not self._orders.waiting():
                break
            self._obey(self._orders)
        return came

    def _obey(self, orders: Orders) -> None:
        """Carry out an order while no front is served."""
        way = orders.take()
        if way is None:
            self._orders = None
            return
        self._backs.drop()
        way.end_last()
        way.adopt()
        way.done("the next VMM gets the new back-end")

    def _serve_next(self) -> bool:
        """Serve the front that waits; returns True if the back was lost."""
        try:
            reached = self._reach()
            sock = self._fronts.take()
        except WANT as error:
            # The front waits on, and may be served when there is room again.
            if not self._wanting:
                self.log.error(
                    "no room for another session: %s; a VMM waits, trying again",
                    reason_of(error),
                )
            self._wanting = True
            self._backs.pause(PAUSE)
            return False
        self._wanting = False
        peer = peer_of(sock)
        self.log.info("VMM connected: %s", peer)
        self._backs.front_user = peer.uid
        front = Channel(
            sock,
            stop=self.stop,
            peer="VMM",
            timeout=self.config.device.timeout,
            lost=FrontLost,
        )
        with contextlib.closing(front):
            return self._serve(front) if reached else True

    def _serve(self, front: Channel) -> bool:
        """Serve a front to its end; returns True if the back was lost."""
        try:
            session = Session(
                front,
                self.config.device,
                self._backs,
                self.stop,
                keep_backend=self.config.keep_backend,
                others=self._fronts.others,
                orders=self._orders,
            )
        except (AirlockError, RuntimeError, *WANT) as error:  # ... or of threads
            self.log.error(
                "no session for this VMM: %s; its connection is closed", error
            )
            self.log.debug("where it failed", exc_info=True)
            return False
        self._session = session
        self._sessions += 1
        self._manager.tell(SERVING)
        try:
            self._backs.keep(session.run())
        finally:
            self._session = None
        if session.stopped:
            raise Stopped("stopped in a session")
        self._backs.end()
        return session.back_lost

    def _reach(self) -> bool:
        """Have a back for the next session; False: there is none, and the log says why.

        An order that comes meanwhile is carried out.
        """
        if not self._backs.has_next():
            self._manager.tell(REACHING)
            try:
                self._connect_first()
            except SessionError as error:
                self.log.error("%s; the VMM's connection is closed", error)
                return False
        return True

    def _connect_first(self) -> None:
        until = time.monotonic() + self.config.device.timeout
        while not self._backs.holds:
            try:
                self._backs.reach(until, self._orders)
            except Interrupted:
                assert self._orders is not None, "it is what interrupts"
                self._obey(self._orders)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: the airlock ends", signal.Signals(number).name)
        self._manager.tell("STOPPING=1", DRAINING)
        notify(self._told)
