# SPDX-License-Identifier: Apache-2.0
"""The workers' threads."""

from __future__ import annotations

import pytest

from vhost_airlock.proxy.workers import Workers
from vhost_airlock.vhost.fds import eventfd


def test_processor_that_has_gone_keeps_nobody_from_work(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with eventfd() as events:
        workers = Workers(2, events, poll_us=0, cpus=[0x7FFF])
        with workers.pause():
            pass
        workers.close()
    told = "processor 32767 can't be used: Invalid argument"
    assert [record.message for record in caplog.records] == [told, told]
