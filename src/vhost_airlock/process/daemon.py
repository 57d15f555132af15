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
import logging
import select
import signal
import time
from types import FrameType

from ..errors import (
    AirlockError,
    BackLate,
    BackLost,
    FrontLost,
    Interrupted,
    SessionError,
    Stopped,
)
from ..proxy.back import Back
from ..proxy.recovery import ConfigChanged
from ..proxy.session import Session
from ..sandbox import enter as sandbox
from ..vhost.channel import Channel
from ..vhost.fds import eventfd, notify
from .broker import Broker
from .config import ProcessConfig
from .connector import Connector, make_connector
from .fronts import make_fronts
from .manager import Manager
from .orders import Orders, listen_for_orders
from .signals import ENDING
from .sockets import inherited_pipe, peer_of, reason_of
from .stats_server import KIND as STATS_KIND
from .stats_server import Stats
from .users import Users

log = logging.getLogger(__name__)
"""For what is about no device."""

PAUSE = 0.1
"""Seconds until the next try, when the system has no room for another session."""

WAITING = "STATUS=waiting for a VMM"
REACHING = "STATUS=a VMM waits for the back-end"
SERVING = "STATUS=a VMM is connected"
DRAINING = "STATUS=ending"
"""News for the service manager."""
FIRST_ANSWER = 1.0
"""Seconds that a back has for its first answer when it takes the place of another. If
it is late, the next one has twice as many, up to the time-out: the VMM waits meanwhile,
but on a busy machine a program takes long to start."""

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
        self._reached: Channel | None = None
        """A connection to the back that no session has had yet."""
        self._kept: Back | None = None
        """A back that a session has left to the next one."""
        self._awaited = not config.no_wait
        """Whether the first back is waited for, for as long as it takes."""
        self._answer = FIRST_ANSWER
        self._wanting = False
        self._session: Session | None = None
        self._sessions = 0
        self._stats: Stats | None = None
        self._users = Users(self.log, require=config.require_other_user)
        self._front_user = 0
        """The user of the front that is served."""
        self._manager = Manager(config.notify_socket)
        self._open.callback(self._manager.close)
        # From here on there may be sockets and processes to clean away.
        for number in ENDING:
            old = signal.signal(number, self._on_signal)
            self._open.callback(signal.signal, number, old)
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
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
            self.broker = broker
            self._orders, handed = listen_for_orders(self)
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
            self.connector = make_connector(config, self.stop, broker)
            self._open.callback(lambda: self.connector.close())
            broker.start()
            undo.pop_all()

    def run(self) -> int:
        """Lock the process in, serve until a signal comes; returns the exit status."""
        with contextlib.closing(self):
            with contextlib.suppress(Stopped):
                self.connector.await_there()
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
                    if self.connector.spent and not self._holds_back():
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
            "backend_connected": self._holds_back(),
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
        self._drop_back()
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
        self._drop_back()
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
            self.pause(PAUSE)
            return False
        self._wanting = False
        peer = peer_of(sock)
        self.log.info("VMM connected: %s", peer)
        self._front_user = peer.uid
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
                self,
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
            self._kept = session.run() or self._kept
        finally:
            self._session = None
        if session.stopped:
            raise Stopped("stopped in a session")
        self._tidy()
        return session.back_lost

    def _reach(self) -> bool:
        """Have a back for the next session; False: there is none, and the log says why.

        A connection that the last session did not need is used by the next, since some
        back-ends end with their first connection.
        """
        if self._kept is not None and not self._kept.usable:
            self._drop_back()
        if self._reached is not None and _hung_up(self._reached):
            self._drop_back()
        if self._kept is None and self._reached is None:
            self._manager.tell(REACHING)
            try:
                self._reached = self._connect_first()
            except SessionError as error:
                self.log.error("%s; the VMM's connection is closed", error)
                return False
        self._awaited = False
        return True

    def _connect_first(self) -> Channel:
        """Return a connection for the next session. An order that comes meanwhile is
        carried out.
        """
        deadline = time.monotonic() + self.config.device.timeout
        while True:
            connector = self.connector
            connector.interrupt = self._orders
            try:
                return connector.connect(None if self._awaited else deadline)
            except Interrupted:
                assert self._orders is not None, "it is what interrupts"
                self._obey(self._orders)
            finally:
                connector.interrupt = None

    # The daemon is the source of a session's backs.

    def connect(self, config_changed: ConfigChanged) -> Back:
        """Return the back of the session, which needs it now."""
        return self._checked(self._first_back(config_changed), self.connector)

    def reconnect(self, config_changed: ConfigChanged) -> Back:
        """Return another back for the session, if there is one at once.

        Its first answer is waited for: a back-end that lives on after it has hung up
        gives it when it is done with the requests that it had.
        """
        self.connector.disconnected()
        if self.config.fence == "exit" and (reason := self.connector.lives()):
            raise BackLost(f"back-end: the last one may still be at work: {reason}")
        timeout = self.config.device.timeout
        until, answer = time.monotonic(), min(self._answer, timeout)
        try:
            back = self.back_by(self.connector, config_changed, until, answer)
        except BackLate:
            self._answer = min(2 * self._answer, timeout)
            raise
        self._answer = FIRST_ANSWER
        return back

    def back_by(
        self,
        connector: Connector,
        config_changed: ConfigChanged,
        until: float,
        answer: float,
    ) -> Back:
        """Return another back by this way, if it comes until a time of time.monotonic()
        and has answered within `answer` seconds. BackLost, or SessionError if its user
        won't do.
        """
        back = self._back(connector, None, config_changed, until, answer)
        return self._checked(back, connector)

    def take_connector(self, connector: Connector) -> None:
        """All backs come by this way from now on."""
        self.connector.close()
        self.connector = connector

    def pause(self, seconds: float) -> None:
        """Wait for a moment. Raises Stopped."""
        poll = select.poll()
        poll.register(self.stop.fileno(), select.POLLIN)
        if poll.poll(seconds * 1000):
            raise Stopped("stopped while it waited")

    def _checked(self, back: Back, connector: Connector) -> Back:
        """Return the back, which has come by this way, if its user will do.

        A program has made itself at home, and changed its user if it does that, when it
        has answered its first message.
        """
        try:
            self._users.check(connector.users(), self._front_user)
        except BaseException:
            back.close()
            raise
        return back

    def _first_back(self, config_changed: ConfigChanged) -> Back:
        """Return the back that is there, or a new one."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.config_changed = config_changed
            return kept
        channel, self._reached = self._reached, None
        timeout = self.config.device.timeout
        until = time.monotonic() + timeout
        return self._back(self.connector, channel, config_changed, until, timeout)

    def _back(
        self,
        connector: Connector,
        channel: Channel | None,
        config_changed: ConfigChanged,
        until: float,
        answer: float,
    ) -> Back:
        """Return a back, which has to come until a time of time.monotonic() if there is
        no channel to it, and has `answer` seconds for its first answer. BackLost if
        there is none.
        """
        try:
            if channel is None:
                channel = connector.connect(until)
            answered = time.monotonic() + answer
            return Back(channel, self.config.device, config_changed, answered)
        except BaseException as error:
            if channel is not None:
                channel.close()
            if isinstance(error, SessionError) and not isinstance(error, BackLost):
                raise BackLost(str(error)) from None
            raise

    def _refresh(self, back: Back) -> None:
        """Reset a kept back for the next front, if it can be reset, and empty its
        isolated memory of bytes of this front's requests.
        """
        try:
            back.reset_device()
        except SessionError as error:
            self.log.error("%s; the connection is not kept", error)
            self._drop_back()
            return
        if back.settled:
            back.memory.clear()
        self.log.info("the back-end's connection is kept for the next VMM")

    def _tidy(self) -> None:
        """After a session: make a kept back ready for the next session, or tell the
        connector that the connection is closed.
        """
        if self._kept is not None:
            self._refresh(self._kept)
        elif self._reached is None:
            self.connector.disconnected()

    def _holds_back(self) -> bool:
        """Is there a back for the next session already?"""
        return (self._kept or self._reached) is not None

    def _drop_back(self) -> None:
        """Let go of the back that is there for the next session."""
        held = self._kept or self._reached
        self._kept = self._reached = None
        if held is not None:
            held.close()
            self.connector.disconnected()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        log.info("%s: the airlock ends", signal.Signals(number).name)
        self._manager.tell("STOPPING=1", DRAINING)
        notify(self._told)


def _hung_up(channel: Channel) -> bool:
    """Has the peer closed its end?"""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
