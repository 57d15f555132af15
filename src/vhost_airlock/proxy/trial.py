# SPDX-License-Identifier: Apache-2.0
"""The search for the request over which backs are lost, when there is another back.

A ring with suspects, see dataplane/suspects.pxd, has its turn: its back gets one of its
requests at a time, and none of any other ring. The turn ends when the suspects have
ended, when the ring stops, or when the time for it is over. When no ring that runs has
a turn left, all rings are free.

A ring that is made or starts meanwhile waits like the others, and one with suspects
has its turn too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from ..log import Logger
from .ring import Ring
from .state import Turn


class Trial:
    """The turns of one device's rings, each for `patience` seconds at the most."""

    def __init__(self, rings: Mapping[int, Ring], log: Logger, patience: float) -> None:
        """`rings` are all that there are now, by their numbers."""
        self._rings = rings
        self._log = log
        self._patience = patience
        self._left: list[Ring] = []
        """Those with suspects that have had no turn, or not all of it."""
        self._alone: Ring | None = None
        """The one that has its turn."""
        self._until = math.inf

    def begin(self) -> None:
        """There is another back, and no ring has started with it."""
        self._alone, self._until = None, math.inf
        self._left = [ring for ring in self._rings.values() if ring.suspected]
        if self._left:
            self._log.warning(
                "requests that were at the back-end when it was lost twice go to it"
                " one at a time: %s",
                ", ".join(
                    f"{each.suspected} of ring {each.index}" for each in self._left
                ),
            )
        for ring in self._rings.values():
            self.join(ring)

    def join(self, ring: Ring) -> None:
        """The ring has not started yet: it waits for its turn if there are turns."""
        ring.set_turn(Turn.WAITS if self._left else Turn.FREE)

    def look(self) -> None:
        """Let the next ring have its turn, if that is due."""
        if not self._left:
            return
        now, late = self._alone, time.monotonic() >= self._until
        if now is not None:
            if now.suspected and now.runs and not late:
                return
            if now.suspected and late:
                self._log.warning(
                    "ring %d: its requests go to the back-end together again: they"
                    " were not all done one at a time in %g s",
                    now.index,
                    self._patience,
                )
                self._left.remove(now)
            now.set_turn(Turn.WAITS)
        self._call()

    def wait(self) -> float:
        """Seconds until look() has something to do by itself."""
        return max(0.0, self._until - time.monotonic())

    def _call(self) -> None:
        """The turn of the next ring begins, or all are free."""
        self._alone, self._until = None, math.inf
        self._left = [ring for ring in self._left if ring.suspected]
        for ring in self._left:
            if ring.runs:
                self._alone = ring
                self._until = time.monotonic() + self._patience
                ring.set_turn(Turn.ALONE)
                return
        self._left = []
        for ring in self._rings.values():
            ring.set_turn(Turn.FREE)
