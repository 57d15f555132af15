# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is while requests over which backs may be lost are tried."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import pytest

from vhost_airlock.log import Logger
from vhost_airlock.proxy.ring import Ring
from vhost_airlock.proxy.state import Turn
from vhost_airlock.proxy.trial import Trial

PATIENCE = 10.0
LOG = Logger(__name__)

FREE, ALONE, WAITS = Turn.FREE, Turn.ALONE, Turn.WAITS


@dataclass(eq=False)
class Fake:
    """A ring, as far as turns need it."""

    index: int
    suspected: int = 0
    runs: bool = False
    turn: Turn = FREE

    def set_turn(self, turn: Turn) -> None:
        self.turn = turn


class Turns:
    """A trial of fake rings with so many suspects, each of which starts at once."""

    def __init__(self, *suspected: int) -> None:
        self.rings = [Fake(index, count) for index, count in enumerate(suspected)]
        self._known = {ring.index: cast("Ring", ring) for ring in self.rings}
        self.trial = Trial(self._known, LOG, PATIENCE)

    def begin(self) -> None:
        for ring in self.rings:
            ring.runs = False
        self.trial.begin()
        assert all(ring.turn is not ALONE for ring in self.rings)
        for ring in self.rings:
            ring.runs = True
        self.trial.look()

    def make(self, *, suspected: int = 0) -> Fake:
        """A ring that the front has not spoken of before; it runs at once."""
        ring = Fake(len(self.rings), suspected)
        self.rings.append(ring)
        self._known[ring.index] = cast("Ring", ring)
        self.trial.join(cast("Ring", ring))
        ring.runs = True
        return ring

    @property
    def seen(self) -> list[Turn]:
        self.trial.look()
        return [ring.turn for ring in self.rings]


class Clock:
    """The time, for turns."""

    now = 100.0


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    Clock.now = 100.0


def test_without_suspects_all_are_free() -> None:
    turns = Turns(0, 0)
    turns.begin()
    assert turns.seen == [FREE, FREE]
    turns.make()
    assert turns.seen == [FREE] * 3


def test_rings_with_suspects_have_their_turns_and_others_wait() -> None:
    turns = Turns(0, 2, 1)
    turns.begin()
    assert turns.seen == [WAITS, ALONE, WAITS]
    turns.rings[1].suspected = 1
    assert turns.seen == [WAITS, ALONE, WAITS]
    turns.rings[1].suspected = 0
    assert turns.seen == [WAITS, WAITS, ALONE]
    turns.rings[2].suspected = 0
    assert turns.seen == [FREE] * 3


def test_ring_that_is_made_meanwhile_waits() -> None:
    turns = Turns(1)
    turns.begin()
    made = turns.make()
    assert made.turn is WAITS
    assert turns.seen == [ALONE, WAITS]
    turns.rings[0].suspected = 0
    assert turns.seen == [FREE, FREE]


def test_time_of_a_turn_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    turns = Turns(1, 1)
    turns.begin()
    assert turns.trial.wait() == PATIENCE
    Clock.now += PATIENCE - 1
    assert turns.seen == [ALONE, WAITS]
    Clock.now += 1
    assert turns.seen == [WAITS, ALONE]
    assert "ring 0: its requests go to the back-end together again" in caplog.text
    assert turns.trial.wait() == PATIENCE
    Clock.now += PATIENCE
    assert turns.seen == [FREE, FREE]
    assert turns.trial.wait() == float("inf")


def test_ring_that_stops_in_its_turn_has_another_when_it_runs_again() -> None:
    turns = Turns(1, 1)
    turns.begin()
    turns.rings[0].runs = False
    assert turns.seen == [WAITS, ALONE]
    turns.rings[0].runs = True
    assert turns.seen == [WAITS, ALONE]
    turns.rings[1].suspected = 0
    assert turns.seen == [ALONE, WAITS]


def test_none_waits_for_a_ring_that_does_not_run() -> None:
    turns = Turns(1, 0)
    turns.begin()
    turns.rings[0].runs = False
    assert turns.seen == [FREE, FREE]


def test_next_loss_begins_all_turns_anew() -> None:
    turns = Turns(1, 1)
    turns.begin()
    turns.rings[0].suspected = 0
    assert turns.seen == [WAITS, ALONE]
    Clock.now += PATIENCE / 2
    turns.rings[0].suspected = 1
    turns.begin()
    assert turns.seen == [ALONE, WAITS]
    assert turns.trial.wait() == PATIENCE
