# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all unit tests."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vhost_airlock.dataplane.worker import Worker


@pytest.fixture(scope="module", autouse=True)
def no_garbage_of_other_modules():
    """Tests count descriptors: what others left to the collector must be gone."""
    gc.collect()


@pytest.fixture
def worker() -> Iterator[Worker]:
    """One that runs, in a thread of its own."""
    # Not before pytest has set its handler of SIGBUS, which would replace ours.
    from vhost_airlock.dataplane.worker import Worker

    events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    worker = Worker(events, poll_us=50)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield worker
    worker.stop()
    thread.join(10)
    assert not thread.is_alive()
    os.close(events)
