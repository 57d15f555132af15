# SPDX-License-Identifier: Apache-2.0
"""The time of one message of the front: all that it makes us ask the back has one
deadline, for however many rings, and so have the chains that its stops wait for.

Times are of time.monotonic().
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..vhost.frontend import Frontend
from .config import Config


class Deadline:
    """The deadline of one device's message at hand."""

    def __init__(self, config: Config) -> None:
        self._timeout = config.timeout
        self._drain_timeout = config.drain_timeout
        self._until: float | None = None
        self._drains_until: float | None = None
        self._asked: Frontend | None = None

    @property
    def until(self) -> float | None:
        """When the message at hand has to be answered; None: there is none."""
        return self._until

    def left(self) -> float:
        """Seconds until then; not above 0 without a message."""
        return (self._until or 0.0) - time.monotonic()

    def suffices(self) -> bool:
        """Has a back as much time for the message at hand as it may need, about?"""
        return self.left() > self._timeout / 2

    @contextmanager
    def message(self) -> Iterator[None]:
        """A context for one message of the front."""
        self._set(time.monotonic() + self._timeout)
        try:
            yield
        finally:
            self._set(None)
            self._drains_until = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context with a time of its own, whatever the message at hand has."""
        outer = self._until
        self._set(time.monotonic() + self._timeout)
        try:
            yield
        finally:
            self._set(outer)

    def renew(self) -> None:
        """Begin the time of the message at hand anew, and that of a drain."""
        self._set(time.monotonic() + self._timeout)
        self._drains_until = None

    def drains_until(self) -> float:
        """When the wait for chains in flight ends, for all rings of a message.

        The message has so much longer.
        """
        if self._drains_until is None:
            self._drains_until = time.monotonic() + self._drain_timeout
            if self._until is not None:
                self._set(self._until + self._drain_timeout)
        return self._drains_until

    def apply_to(self, peer: Frontend | None) -> None:
        """This back is asked from now on, and none before it any more."""
        self._asked = peer
        self._set(self._until)

    def _set(self, until: float | None) -> None:
        self._until = until
        if self._asked is not None:
            self._asked.until = until
