# SPDX-License-Identifier: Apache-2.0
"""The source of sessions' backs: connects to the back-end, judges its user, and keeps a
back or a connection from one session to the next.
"""

from __future__ import annotations

import select
import time

from ..errors import BackLate, BackLost, SessionError, Stopped
from ..proxy.back import Back
from ..proxy.recovery import ConfigChanged
from ..vhost.channel import Channel
from ..vhost.fds import HasFileno
from .broker import Broker
from .config import ProcessConfig
from .connector import Connector, make_connector
from .users import Users

FIRST_ANSWER = 1.0
"""Seconds that a back has for its first answer when it takes the place of another. If
it is late, the next one has twice as many, up to the time-out: the VMM waits meanwhile,
but on a busy machine a program takes long to start."""


class BackSource:
    """The backs of one process, which ends when `stop` is readable.

    It has no way to a back-end before open().
    """

    connector: Connector
    """The way by which back-ends come now."""

    def __init__(self, config: ProcessConfig, stop: HasFileno, broker: Broker) -> None:
        self.config = config
        self.stop = stop
        self.broker = broker
        self.log = config.device.log
        self.front_user = 0
        """The user of the front that is served."""
        self._reached: Channel | None = None
        """A connection to the back that no session has had yet."""
        self._kept: Back | None = None
        """A back that a session has left to the next one."""
        self._awaited = not config.no_wait
        """Whether the first back is waited for, for as long as it takes."""
        self._answer = FIRST_ANSWER
        self._users = Users(self.log, require=config.require_other_user)

    def open(self) -> None:
        """Make the way to the back-end, which may tell that there is none yet."""
        self.connector = make_connector(self.config, self.stop, self.broker)

    def close(self) -> None:
        """Close the way to the back-end; the back was dropped."""
        self.connector.close()

    # For the next session.

    @property
    def holds(self) -> bool:
        """Is there a back for the next session already?"""
        return (self._kept or self._reached) is not None

    @property
    def spent(self) -> bool:
        """Does no other back come, and is there none for the next session?"""
        return self.connector.spent and not self.holds

    def has_next(self) -> bool:
        """Look if there is a back for the next session that it can use.

        A connection that the last session did not need is used by the next, since some
        back-ends end with their first connection.
        """
        if self._kept is not None and not self._kept.usable:
            self.drop()
        if self._reached is not None and _hung_up(self._reached):
            self.drop()
        return self.holds

    def reach(self, until: float, interrupt: HasFileno | None) -> None:
        """Connect for the next session, until a time of time.monotonic(); the first
        connection is waited for, for as long as it takes, if the user has not said
        otherwise. SessionError if there is none; Interrupted when `interrupt` is
        readable.
        """
        connector = self.connector
        connector.interrupt = interrupt
        try:
            self._reached = connector.connect(None if self._awaited else until)
        finally:
            connector.interrupt = None
        self._awaited = False

    def end(self) -> None:
        """A session has ended: make a back that was kept ready for the next session, or
        tell the connector that the connection is closed.
        """
        if self._kept is not None:
            self._refresh(self._kept)
        elif self._reached is None:
            self.connector.disconnected()

    def keep(self, back: Back | None) -> None:
        """A session leaves its back, if it does, to the next one."""
        self._kept = back or self._kept

    def drop(self) -> None:
        """Let go of the back that is there for the next session."""
        held = self._kept or self._reached
        self._kept = self._reached = None
        if held is not None:
            held.close()
            self.connector.disconnected()

    def _refresh(self, back: Back) -> None:
        """Reset a kept back for the next front, if it can be reset, and empty its
        isolated memory of bytes of this front's requests.
        """
        try:
            back.reset_device()
        except SessionError as error:
            self.log.error("%s; the connection is not kept", error)
            self.drop()
            return
        if back.settled:
            back.memory.clear()
        self.log.info("the back-end's connection is kept for the next VMM")

    # For a session, see proxy/recovery.py, and for orders.

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
            self._users.check(connector.users(), self.front_user)
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


def _hung_up(channel: Channel) -> bool:
    """Has the peer closed its end?"""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
