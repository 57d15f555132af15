# SPDX-License-Identifier: Apache-2.0
"""Ends on signals that clean up, for commands that have started processes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Clean up when we're told to end, which a signal alone wouldn't do.

    The first of SIGINT, SIGTERM, SIGHUP raises SystemExit with the status that a shell
    would see; further ones are passed over.
    """

    def on_signal(number: int, frame: FrameType | None) -> NoReturn:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
