# SPDX-License-Identifier: Apache-2.0
"""No wake-up is ever lost: all states of the model of notifying.py are looked at.

That the model does what the code does is for test_conformance.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.proof.notifying import Broken, C, Model, P, explore
from tests.support.profiles import STRESS

VARIANTS: dict[str, dict[str, Any]] = {
    # The worker waits for the guest's kick; without stalls, for the back's call.
    "worker waits": {},
    "worker waits, or has no room": {"stalls": True},
    # The worker calls the guest; kicks the back.
    "guest waits": {"calls_first": True, "disarms_awake": True},
    "back waits": {"disarms_awake": True},
}

both_ways = pytest.mark.parametrize("event_idx", [True, False], ids=["event", "flags"])


# A ring of 8 has up to 264,000 states: half a minute.
SIZES = [1, 2, 4, 8] if STRESS else [1, 2, 4]


@both_ways
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_wake_up_is_lost(variant, size, event_idx):
    states = explore(Model(size, event_idx, **VARIANTS[variant]))
    # Both could sleep, be full, and be woken: the model is not stuck somewhere.
    assert {state.consumer for state in states} == set(C)
    assert {state.producer for state in states} == set(P) - {P.LATE_STORE}
    assert any((state.shown - state.seen) % (2 * size) == size for state in states)
    assert any(state.consumer is C.SLEEP and state.signal for state in states)


MISTAKES = {
    "no producer fence": "both",
    "no consumer fence": "both",
    "look before store": "both",
    "no second look": "both",
    "not armed": "both",
    "armed one late": "event",
    "still armed": "event",
    "need_event too early": "event",
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("mistake", "event_idx"),
    [(mistake, True) for mistake in MISTAKES]
    + [(mistake, False) for mistake, where in MISTAKES.items() if where == "both"],
)
def test_a_mistake_loses_one(mistake, event_idx, variant):
    model = Model(2, event_idx, **VARIANTS[variant]).with_mistake(mistake)
    with pytest.raises(Broken, match="lost"):
        explore(model)


@both_ways
def test_where_in_the_ring_makes_no_difference(event_idx):
    """States that were counted as one do the same, wherever indices wrap round."""
    model = Model(2, event_idx, stalls=True)
    everywhere = explore(model, shifted=False)
    assert {model.normal(state) for state in everywhere} == explore(model)
    assert {state.seen for state in everywhere} == set(range(model.modulus))
