# SPDX-License-Identifier: Apache-2.0
"""Orders to take another back, in place of the broker and its control socket."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tests.support.backs import PATIENCE, RecordedBack
from vhost_airlock.errors import BackLate, BackLost
from vhost_airlock.proxy.back import Back
from vhost_airlock.proxy.config import Config
from vhost_airlock.proxy.recovery import ConfigChanged
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import drain, eventfd, notify


class Owner(Protocol):
    """Its back is the one by which back-ends come."""

    back: RecordedBack
    config: Config


class Swap:
    """One order, which takes `back`; and what became of it."""

    def __init__(
        self,
        owner: Owner,
        back: RecordedBack,
        *,
        beside: bool,
        refused: str,
        working: str,
        ended: Callable[[], None] | None,
    ) -> None:
        self.owner = owner
        self.back = back
        self.beside = beside
        self.refused = refused
        """Why the new back can't be reached; empty: it can."""
        self.working = working
        """Why the lost back may be at work; empty: it is not."""
        self.ended = ended
        """Called when the last back has ended."""
        self.result = ""
        self.reason = ""
        self.answers = 0
        self._answered = threading.Event()

    def await_answer(self) -> None:
        assert self._answered.wait(PATIENCE), "the order is not answered"

    def await_result(self) -> str:
        self.await_answer()
        assert self.reason == ""
        return self.result

    def await_failure(self) -> str:
        self.await_answer()
        assert self.result == ""
        return self.reason

    # The order, for the airlock.

    def connect(self, config_changed: ConfigChanged, until: float) -> Back:
        if self.refused:
            raise BackLost(self.refused)
        return connect_to(self.back, self.owner.config, config_changed, until)

    def drop(self) -> None:
        self.back.join()

    def end_last(self) -> None:
        self.owner.back.join()
        if self.ended is not None:
            self.ended()

    def adopt(self) -> None:
        self.owner.back = self.back

    def connect_last(self, config_changed: ConfigChanged, until: float) -> Back:
        back = self.owner.back
        return connect_to(back, self.owner.config, config_changed, until)

    def at_work(self) -> str:
        return self.working

    def done(self, result: str) -> None:
        self.result = result
        self._answer()

    def failed(self, reason: str) -> None:
        self.reason = reason
        self._answer()

    def _answer(self) -> None:
        self.answers += 1
        self._answered.set()


class Orders:
    """A queue of orders for a session."""

    def __init__(self) -> None:
        self._event = eventfd()
        self._queue: deque[Swap] = deque()

    def give(self, swap: Swap) -> None:
        self._queue.append(swap)
        notify(self._event)

    def fileno(self) -> int:
        return self._event.fileno()

    def take(self) -> Swap:
        swap = self._queue.popleft()
        drain(self._event)
        if self._queue:
            notify(self._event)
        return swap

    def close(self) -> None:
        self._event.close()


def connect_to(
    back: RecordedBack,
    config: Config,
    config_changed: ConfigChanged,
    until: float | None = None,
) -> Back:
    """Return a new connection to a back."""
    ours, theirs = socket.socketpair()
    back.start(theirs)
    channel = Channel(
        ours,
        peer="back-end",
        timeout=config.timeout,
        lost=BackLost,
        late=BackLate,
    )
    try:
        return Back(channel, config, config_changed, until)
    except BaseException:
        channel.close()
        raise
