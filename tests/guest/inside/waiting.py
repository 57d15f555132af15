# SPDX-License-Identifier: Apache-2.0
"""Wait in a guest for what has no event to wait for."""

import time
from collections.abc import Callable


def wait(condition: Callable[[], bool], problem: Callable[[], str]) -> None:
    """Wait until it is so; else raise TimeoutError, which says what is not."""
    deadline = time.monotonic() + 50
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(problem())
        time.sleep(0.01)
