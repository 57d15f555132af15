# SPDX-License-Identifier: Apache-2.0
"""How often a peer can make us write the same kind of line to the log."""

from __future__ import annotations

import logging
import time

INTERVAL = 10.0
"""Seconds in which a peer gets one line."""


class Ration:
    """One line of ERROR in INTERVAL; the others are for DEBUG, and counted."""

    def __init__(self) -> None:
        self._next = 0.0
        self._left_out = 0

    def log(self, logger: logging.Logger, text: str, *arguments: object) -> None:
        """Log a line, with how many were left out since the last one."""
        now = time.monotonic()
        if now < self._next:
            self._left_out += 1
            logger.debug(text, *arguments)
            return
        self._next = now + INTERVAL
        if self._left_out:
            text += " (and %d times since the last such line)"
            arguments = (*arguments, self._left_out)
        self._left_out = 0
        logger.error(text, *arguments)
