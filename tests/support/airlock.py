# SPDX-License-Identifier: Apache-2.0
"""The airlock between a front-end and back-ends of the test's, all in this process.

    with Airlock(DiskBack()) as airlock, BlkGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()

Each `channel()` is a session of its own, which ends when the front-end hangs up.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from tests.support.backs import PATIENCE, RecordedBack, ScriptedBack
from tests.support.swaps import Orders, Swap, connect_to
from vhost_airlock.errors import BackLost, Disconnected, FrontLost
from vhost_airlock.proxy.back import Back
from vhost_airlock.proxy.config import Config
from vhost_airlock.proxy.recovery import ConfigChanged
from vhost_airlock.proxy.session import Session
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import HasFileno, eventfd, notify
from vhost_airlock.vhost.message import Limit, Message, any_payload
from vhost_airlock.vhost.wire import HeaderFlag


class TimedChannel(Channel):
    """Notes how long the front-end waits: from a message to its answer, or to the end
    of the connection."""

    _sent: float | None = None
    longest = 0.0
    """The longest wait, in seconds."""
    message: int | None = None
    """The request for which it was."""

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int | HasFileno] = (),
        *,
        flags: int = HeaderFlag.VERSION,
        deadline: float | None = None,
    ) -> None:
        self._sent, self._request = time.monotonic(), request
        super().send(request, payload, fds, flags=flags, deadline=deadline)

    def recv(
        self, deadline: float | None = None, limit: Limit = any_payload
    ) -> Message:
        try:
            return super().recv(deadline, limit)
        finally:
            if self._sent is not None:
                waited = time.monotonic() - self._sent
                if waited > self.longest:
                    self.longest, self.message = waited, self._request
                self._sent = None


class Airlock:
    """Sessions with the back that is given. `options` are those of Config.

    At the end of the with block nothing of it is left: no thread, no connection.
    """

    def __init__(self, back: RecordedBack | None = None, **options: object) -> None:
        self.back = ScriptedBack() if back is None else back
        self.config = Config(**options)  # type: ignore[arg-type]
        self.stop = eventfd()
        self.orders = Orders()
        self._first = self.back
        self._others: list[RecordedBack] = []
        """Those that an order has named."""
        self.sessions: list[Session] = []
        self.fronts: list[TimedChannel] = []
        self.away = False
        """Whether a back that was lost stays away."""
        self.failures: list[BaseException] = []
        """Exceptions that left a session, which none must."""
        self._threads: list[threading.Thread] = []

    def channel(self) -> Channel:
        """A front-end's connection to a new session."""
        ours, theirs = socket.socketpair()
        front = Channel(
            theirs,
            stop=self.stop,
            peer="VMM",
            timeout=self.config.timeout,
            lost=FrontLost,
        )
        session = Session(front, self.config, self, self.stop, orders=self.orders)
        thread = threading.Thread(target=self._run, args=[session], name="session")
        self.sessions.append(session)
        self._threads.append(thread)
        thread.start()
        self.fronts.append(TimedChannel(ours, peer="airlock"))
        return self.fronts[-1]

    def assert_no_message_took_longer(self, seconds: float) -> None:
        """The front-end never waited longer for the answer to one message."""
        for front in self.fronts:
            took = f"request {front.message} took {front.longest:.1f} s"
            assert front.longest < seconds, took

    def _run(self, session: Session) -> None:
        try:
            kept = session.run()
            assert kept is None
        except BaseException as error:
            self.failures.append(error)

    # The source of backs.

    def reconnect(self, config_changed: ConfigChanged) -> Back:
        """Another connection, as soon as the test has said that there is a back."""
        if self.away:
            raise BackLost("back-end: it is away")
        self.back.join()
        return self.connect(config_changed)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def connect(self, config_changed: ConfigChanged) -> Back:
        return connect_to(self.back, self.config, config_changed)

    def swap(
        self,
        back: RecordedBack,
        *,
        beside: bool = True,
        refused: str = "",
        working: str = "",
        ended: Callable[[], None] | None = None,
    ) -> Swap:
        """Order the last session to take this back. Returns the order, which is under
        way. `beside`: it is there already; `ended`: called when the last one has ended.
        """
        swap = Swap(
            self, back, beside=beside, refused=refused, working=working, ended=ended
        )
        self._others.append(back)
        self.orders.give(swap)
        return swap

    @property
    def session(self) -> Session:
        """The last one."""
        return self.sessions[-1]

    def counters(self, ring: int = 0) -> dict[str, int]:
        """The counters of a ring of the last session."""
        return self.session.device.counters()[f"ring {ring}"]

    def join(self, timeout: float = PATIENCE) -> None:
        """Wait for the end of all sessions, which something else must bring about."""
        for thread in self._threads:
            thread.join(timeout)
            assert not thread.is_alive(), "the session goes on"
        self._threads.clear()
        if self.failures:
            raise self.failures[0]

    def end(self) -> None:
        """End all sessions as a signal does."""
        notify(self.stop)
        self.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        notify(self.stop)
        try:
            self.join()
        finally:
            self.stop.close()
            self.orders.close()
            for back in {self._first, self.back, *self._others}:
                back.close()


class Direct:
    """In place of the airlock, nothing: the front-end talks to the back-end itself."""

    def __init__(self, back: RecordedBack, **options: object) -> None:
        self.back = back

    def channel(self) -> Channel:
        ours, theirs = socket.socketpair()
        self.back.start(theirs)
        return Channel(ours, peer="back")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.back.close()


def hung_up(channel: Channel) -> bool:
    """Does the other end hang up, without another message?"""
    try:
        channel.recv(None)
    except Disconnected:
        return True
    return False
