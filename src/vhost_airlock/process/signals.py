# SPDX-License-Identifier: Apache-2.0
"""Signals raise SystemExit in a command, so that it ends processes that it started."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let signals unwind the stack, which by default they would not do.

    The first of SIGINT, SIGTERM, SIGHUP raises SystemExit with the status that a shell
    would see; further ones are ignored.
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
