# SPDX-License-Identifier: Apache-2.0
"""Eventfds that another process may have made: their flags are not known."""

from __future__ import annotations

import contextlib
import os

from ..vhost.fds import HasFileno


def clear(fd: HasFileno) -> None:
    """Set an eventfd's count to 0, and don't wait even if reading it would block."""
    with contextlib.suppress(BlockingIOError):
        os.preadv(fd.fileno(), [bytearray(8)], -1, os.RWF_NOWAIT)
