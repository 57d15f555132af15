# SPDX-License-Identifier: Apache-2.0
"""How often a peer can make us write the same kind of line to the log."""

from __future__ import annotations

import time

from ..log import ERROR, Logger

INTERVAL = 10.0
"""Seconds in which a peer gets its lines."""
LINES = 8
"""Lines in INTERVAL about a course of things that a guest repeats: each of its drivers,
firmware first, sets up its device and resets it.
"""


class Ration:
    """`lines` of their level in INTERVAL; the others are for DEBUG, and counted."""

    def __init__(self, lines: int = 1) -> None:
        self._lines = lines
        self._next = 0.0
        self._had = 0
        self._left_out = 0

    def log(
        self,
        logger: Logger,
        text: str,
        *arguments: object,
        level: int = ERROR,
    ) -> None:
        """Log a line, with how many were left out since the last one."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + INTERVAL
            self._had = 0
        if self._had >= self._lines:
            self._left_out += 1
            logger.debug(text, *arguments)
            return
        self._had += 1
        if self._left_out:
            text += " (and %d times since the last such line)"
            arguments = (*arguments, self._left_out)
        self._left_out = 0
        logger.log(level, text, *arguments)
