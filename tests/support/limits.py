# SPDX-License-Identifier: Apache-2.0
"""Want of what a process may have only so much of."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_more_fds(room: int = 0) -> Iterator[None]:
    """Meanwhile, this process can get no more than `room` new descriptors."""
    gc.collect()  # what it would close meanwhile were room
    free = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.close(free)
    with _fds_below(free + room):
        yield


@contextlib.contextmanager
def many_fds(count: int) -> Iterator[None]:
    """Meanwhile, this process may have so many descriptors. Most users get 1,024."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with _fds_below(max(soft, count)):
        yield


@contextlib.contextmanager
def _fds_below(limit: int) -> Iterator[None]:
    """Meanwhile, numbers of new descriptors are below this."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
