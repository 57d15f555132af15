# SPDX-License-Identifier: Apache-2.0
"""The search for the request over which backs are lost, when there is another back.

A ring with suspects, see dataplane/suspects.pxd, has its turn: its back gets one of its
requests at a time, and none of any other ring. The turn ends when the suspects have
ended, or when the time for it is over. In the end all rings are free.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable

from .ring import Ring
from .state import Turn


class Trial:
    """The turns of one device's rings, each for `patience` seconds at the most."""

    def __init__(self, log: logging.Logger, patience: float) -> None:
        self._log = log
        self._patience = patience
        self._rings: list[Ring] = []
        """All that have to wait meanwhile."""
        self._next: list[Ring] = []
        """Those with suspects; the first one has its turn."""
        self._until = math.inf

    def begin(self, rings: Iterable[Ring]) -> None:
        """There is another back, and none of these rings has started with it."""
        self._rings = list(rings)
        self._next = [ring for ring in self._rings if ring.suspected]
        if self._next:
            self._log.warning(
                "requests that were at the back-end when it was lost twice go to it"
                " one at a time: %s",
                ", ".join(
                    f"{each.suspected} of ring {each.index}" for each in self._next
                ),
            )
            for ring in self._rings:
                ring.set_turn(Turn.WAITS)
        self._call()

    def look(self) -> None:
        """Let the next ring have its turn, if that is due."""
        if not self._next:
            return
        ring = self._next[0]
        late = time.monotonic() >= self._until
        if ring.suspected and ring.runs and not late:
            return
        if ring.suspected and late:
            self._log.warning(
                "ring %d: its requests go to the back-end together again: they were"
                " not all done one at a time in %g s",
                ring.index,
                self._patience,
            )
        ring.set_turn(Turn.WAITS)
        del self._next[0]
        self._call()

    def wait(self) -> float:
        """Seconds until look() has something to do by itself."""
        return max(0.0, self._until - time.monotonic())

    def _call(self) -> None:
        """The turn of the next ring begins, or all are free."""
        self._until = math.inf
        if self._next:
            self._until = time.monotonic() + self._patience
            self._next[0].set_turn(Turn.ALONE)
            return
        for ring in self._rings:
            ring.set_turn(Turn.FREE)
        self._rings = []
