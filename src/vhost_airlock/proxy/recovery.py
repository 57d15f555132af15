# SPDX-License-Identifier: Apache-2.0
"""The search for another back when one is gone: whether, how often and how long.

Backs are given up if they are lost too often within PERIOD seconds, or if none is found
within the time that the user has set. Attempts come after pauses that double.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from ..errors import BackLost, SessionError
from .back import Back
from .config import Config

PERIOD = 60.0
"""Seconds within which the losses of backs are counted."""
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0

ConfigChanged = Callable[[], None]
"""Called when the back says that its configuration space has changed."""


class Backs(Protocol):
    """Makes the backs of a session. BackLost if there is none."""

    def connect(self, config_changed: ConfigChanged) -> Back:
        """Return the first one; a back that is away is waited for a while."""

    def reconnect(self, config_changed: ConfigChanged) -> Back:
        """Return another one, now that the last one is closed; waits for none."""

    def pause(self, seconds: float) -> None:
        """Wait, or raise Stopped."""


class Recovery:
    """The search of one session's device."""

    def __init__(self, config: Config) -> None:
        self._log = config.log
        self._recovers = config.recover
        self._patience = config.recover_time
        self._losses: deque[float] = deque(maxlen=config.recover_times)
        self._began: float | None = None
        self._pause = FIRST_PAUSE
        self._next = 0.0
        self.losses = 0
        self.away = 0.0
        """Seconds without a back, in the searches that have ended."""

    @property
    def active(self) -> bool:
        """Is there no back just now, and another one looked for?"""
        return self._began is not None

    def begin(self, lost: BackLost) -> None:
        """The back is lost, for this reason, which is raised if no other is looked for.

        SessionError if backs are lost too often.
        """
        now = time.monotonic()
        if not self._recovers:
            raise lost
        if self._began is None:
            self._began, self._pause = now, FIRST_PAUSE
        times = len(self._losses)
        if times == self._losses.maxlen and now - self._losses[0] < PERIOD:
            raise SessionError(
                f"{lost}; it was lost {times + 1} times in {PERIOD:.0f} s"
            )
        self._losses.append(now)
        self.losses += 1
        self._next = now
        self._log.warning("%s; waiting for another back-end", lost)

    def wait(self) -> float:
        """Seconds until the next attempt."""
        return max(0.0, self._next - time.monotonic())

    def hurry(self) -> None:
        """The next attempt is due now."""
        self._next, self._pause = time.monotonic(), FIRST_PAUSE

    def attempt(self, connect: Callable[[], Back]) -> Back | None:
        """Return another back, None if there is none yet. SessionError: none comes."""
        if self.wait():
            return None
        try:
            return connect()
        except SessionError as error:
            now = time.monotonic()
            if self._began is not None and now - self._began >= self._patience:
                raise SessionError(
                    f"{error}; no other back-end came in {self._patience:g} s"
                ) from None
            self._next = now + self._pause * random.uniform(0.8, 1.2)
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            return None

    def counters(self) -> dict[str, int]:
        return {"losses": self.losses, "away": int(self.away * 1e9)}

    def end(self) -> float:
        """There is a back again; returns the seconds without one."""
        assert self._began is not None
        away = time.monotonic() - self._began
        self._began = None
        self.away += away
        return away
