# SPDX-License-Identifier: Apache-2.0
"""The workers' threads."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from tests.support.limits import no_more_fds
from vhost_airlock.proxy.config import Config
from vhost_airlock.proxy.workers import Workers
from vhost_airlock.vhost.fds import eventfd

LOG = Config().log


def test_processor_that_has_gone_keeps_nobody_from_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with eventfd() as events:
        workers = Workers(2, events, poll_us=0, cpus=[0x7FFF], log=LOG)
        with workers.pause():
            pass
        workers.close()
    told = (
        "processor 32767 of --worker-cpus can't be used: Invalid argument;"
        " this worker runs on any"
    )
    assert [record.message for record in caplog.records] == [told, told]


def test_want_of_descriptors_leaves_no_worker() -> None:
    """Not even those that there was room for."""
    with eventfd() as events:
        gc.collect()
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        with no_more_fds(3), pytest.raises(OSError, match=r"make a worker|open files"):
            Workers(8, events, poll_us=0, log=LOG)
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


def test_want_of_threads_leaves_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def want(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", want)
    with eventfd() as events:
        gc.collect()
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        with pytest.raises(RuntimeError):
            Workers(8, events, poll_us=0, log=LOG)
        assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
        assert not any(thread.is_alive() for thread in started)
