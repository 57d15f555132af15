# SPDX-License-Identifier: Apache-2.0
"""A peer gets one line of the log in a while, and no more."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from vhost_airlock.log import Logger
from vhost_airlock.proxy import ration
from vhost_airlock.proxy.ration import INTERVAL, Ration

log = Logger("test")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [1000.0]
    monkeypatch.setattr(ration, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def lines(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


def test_one_line_in_an_interval_and_the_others_counted(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = Ration()
    for number in range(5):
        told.log(log, "ring %d is broken", number)
    clock[0] += INTERVAL
    told.log(log, "ring %d is broken", 5)
    assert lines(caplog, logging.ERROR) == [
        "ring 0 is broken",
        "ring 5 is broken (and 4 times since the last such line)",
    ]
    assert lines(caplog, logging.DEBUG) == [f"ring {i} is broken" for i in range(1, 5)]


def test_as_many_lines_as_it_has_and_the_others_counted(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = Ration(3)
    for number in range(5):
        told.log(log, "ring %d started", number, level=logging.INFO)
    clock[0] += INTERVAL
    told.log(log, "ring %d started", 5, level=logging.INFO)
    assert lines(caplog, logging.INFO) == [
        *(f"ring {number} started" for number in range(3)),
        "ring 5 started (and 2 times since the last such line)",
    ]
    assert len(lines(caplog, logging.DEBUG)) == 2


def test_a_line_is_as_it_is_when_none_was_left_out(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    told = Ration()
    for _ in range(3):
        told.log(log, "broken")
        clock[0] += INTERVAL
    assert lines(caplog, logging.ERROR) == ["broken"] * 3


def test_each_has_a_ration_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        Ration().log(log, "broken")
    assert lines(caplog, logging.ERROR) == ["broken"] * 3
