# SPDX-License-Identifier: Apache-2.0
"""Whatever VMM, guest and back do in whatever order, a session keeps to the table.

A real session with two rings and its worker. The VMM says its messages in any order,
and stops, resets and leaves as it likes; the guest breaks its rings and resets its
driver; the back is late, is told to stop with requests in its hands, and goes away.
tests/support/life.py says in which state each ring has to be after each message, and
tests/support/walk.py that each request comes out once and with its own data (I3), and
that nothing is written for one which the guest has forgotten (I8).

Each change of the table is made once by directed steps. By chance all of them are made
in `make stress`; with few examples, how busy the machine is decides it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from tests.support.backs import PATIENCE, wait_until
from tests.support.leftovers import held
from tests.support.life import walking
from tests.support.profiles import PROFILE, STRESS
from tests.support.tables import each_row
from tests.support.walk import DRAIN, RINGS, SET_UP, SIZES, Walk
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.proxy.state import TABLE, Event, State
from vhost_airlock.vhost.wire import Request

R = Request
S, E = State, Event

# Directed: each change of the table.


def run_ring(walk: Walk) -> None:
    walk.set_up(0)
    walk.set_up(1)


def hold_ring(walk: Walk) -> None:
    walk.set_up(0)
    walk.set_up(1, enable=False)


def break_ring(walk: Walk) -> None:
    run_ring(walk)
    walk.break_ring(1)


def lose_memory(walk: Walk) -> None:
    walk.set_table({0})


def kill_ring(walk: Walk) -> None:
    run_ring(walk)
    lose_memory(walk)


REACH: dict[State, Callable[[Walk], None]] = {
    S.STOPPED: lambda walk: walk.set_up(0),
    S.STARTING: lambda walk: walk.set_up(0),
    S.HELD: hold_ring,
    S.RUNNING: run_ring,
    S.DRAINING: run_ring,
    S.BROKEN: break_ring,
    S.DEAD: kill_ring,
}
"""How ring 1 comes to a state, or nearly: two last as long as an action does."""

CAUSE: dict[Event, Callable[[Walk], None]] = {
    E.READY: lambda walk: walk.set_up(1),
    E.STARTED: lambda walk: walk.set_up(1),
    E.ENABLE: lambda walk: walk.tell(1, R.SET_VRING_ENABLE),
    E.DISABLE: lambda walk: walk.tell(1, R.SET_VRING_ENABLE, on=False),
    E.RETELL: lambda walk: walk.tell(1, R.SET_VRING_NUM),
    E.STOP: lambda walk: walk.stop(1),
    E.GUEST_FAULT: lambda walk: walk.break_ring(1),
    E.FAULT: lose_memory,
    E.DRAINED: lambda walk: walk.stop(1),
    E.LOST: lambda walk: walk.back_leaves(R.GET_CONFIG, lambda: None),
}
"""The deed of a peer that makes an event happen to ring 1."""


def break_held_ring(walk: Walk) -> None:
    walk.tell(1, R.SET_VRING_ENABLE)
    walk.break_while_disabled(1)


SPECIAL: dict[tuple[State, Event], Callable[[Walk], None]] = {
    (S.STARTING, E.LOST): lambda walk: walk.back_leaves(
        R.SET_VRING_KICK, lambda: walk.set_up(1)
    ),
    (S.DRAINING, E.LOST): lambda walk: walk.back_leaves(
        R.GET_VRING_BASE, lambda: walk.stop(1)
    ),
    (S.HELD, E.GUEST_FAULT): break_held_ring,
}
"""Events that need a situation of their own."""


@pytest.fixture(autouse=True)
def _nothing_of_other_tests_is_left() -> None:
    """Descriptors in their garbage would be counted, and not be there later."""
    gc.collect()


@contextmanager
def walk(*, drain_timeout: float = DRAIN) -> Iterator[Walk]:
    """A walk, at whose end all comes out, and after which nothing is left."""
    before = held()
    walk = Walk(drain_timeout=drain_timeout)
    try:
        yield walk
        with walk.step():
            walk.settle()
    finally:
        walk.close()
    assert held() == before


@each_row(TABLE)
def test_each_change_of_the_table(state: State, event: Event) -> None:
    cause = SPECIAL.get((state, event), CAUSE[event])
    with walking() as walked, walk() as steps:
        with steps.step():
            REACH[state](steps)
            for index in RINGS:
                steps.offer(index, BlkType.IN, 4096, 3)
                steps.take(index, 2)
            walked.times.clear()
            cause(steps)
        assert walked.times[state, event], "the change was not made"


def test_a_ring_is_draining_while_its_stop_waits() -> None:
    """Ring.condition() tells of the draining before the back is asked to stop."""
    seen: list[tuple[object, bool]] = []

    def look() -> None:
        asked = R.GET_VRING_BASE in steps.back.requests()
        seen.append((steps.ring(0).condition()["phase"], asked))
        steps.back.finish_some(1)

    with walk(drain_timeout=PATIENCE) as steps:
        steps.set_up(0)
        steps.offer(0, BlkType.OUT, 4096)
        wait_until(lambda: steps.take(0, 1) == 1, "the back has a request")
        steps.stop(0, look)
    assert seen == [("draining", False)]


def test_a_broken_ring_whose_memory_goes_is_dead() -> None:
    with walk() as steps:
        break_ring(steps)
        lose_memory(steps)
        assert steps.ring(1).state is State.DEAD


def test_a_reset_takes_back_a_start_that_waits_for_memory() -> None:
    """When the memory comes, the ring does not start at what was told before."""
    with walk() as steps:
        run_ring(steps)
        steps.stop(1)
        steps.set_table({0})
        for request in SET_UP:
            steps.tell(1, request)
        steps.reset_device()
        steps.set_table({0, 1})
        assert steps.ring(1).state is State.STOPPED


# By chance.

ring = st.sampled_from(RINGS)
some = st.integers(0, 1000)
ABOUT_A_RING = (*SET_UP, R.SET_VRING_ERR, R.GET_VRING_BASE)


class SessionMachine(RuleBasedStateMachine):
    """Few rules, each with many ways, since a run leaves whole rules out at times."""

    walk: Walk

    @initialize(event_idx=st.booleans(), start=st.booleans())
    def begin(self, event_idx, start) -> None:
        self.before = held()
        self.walk = Walk(event_idx=event_idx)
        if start:
            for index in RINGS:
                self.walk.set_up(index)

    @rule(
        i=ring,
        what=st.lists(
            st.tuples(st.sampled_from(ABOUT_A_RING), st.booleans()),
            min_size=1,
            max_size=4,
        ),
    )
    def vmm_tells(self, i, what) -> None:
        with self.walk.step():
            for request, on in what:
                self.walk.tell(i, request, on=on)

    @rule(i=ring, order=st.permutations(SET_UP), enable=st.sampled_from([1, 1, 1, 0]))
    def vmm_sets_up(self, i, order, enable) -> None:
        with self.walk.step():
            self.walk.set_up(i, order, enable=bool(enable))

    @rule(
        i=ring,
        way=st.sampled_from(
            ["same features", "features", "table", "without", "device", "owner"]
        ),
    )
    def vmm_does(self, i, way) -> None:
        walk = self.walk
        with walk.step():
            {
                "same features": walk.set_features,
                "features": lambda: walk.set_features(others=True),
                "table": lambda: walk.set_table(set(RINGS)),
                "without": lambda: walk.set_table(walk.life.there - {i}),
                "device": walk.reset_device,
                "owner": walk.reset_owner,
            }[way]()

    @rule(i=ring, completes=st.sampled_from([0, 0, 1, 3]), which=some)
    def vmm_stops(self, i, completes, which) -> None:
        """The back completes some while the airlock waits for that."""
        walk = self.walk
        with walk.step():
            walk.stop(i, lambda: walk.back.finish_some(completes, which))

    @rule(
        i=ring,
        kind=st.sampled_from([BlkType.IN, BlkType.OUT]),
        size=st.sampled_from(SIZES),
        count=st.sampled_from([1, 2, 5, 16]),
        takes=st.sampled_from([0, 1, 3, 16]),
    )
    def guest_offers(self, i, kind, size, count, takes) -> None:
        self.walk.offer(i, kind, size, count)
        self.walk.take(i, takes)

    @rule(i=ring)
    def guest_reaps(self, i) -> None:
        self.walk.reap(i)

    @rule(i=ring, disabled=st.booleans())
    def guest_breaks(self, i, disabled) -> None:
        walk = self.walk
        with walk.step():
            walk.set_up(i)
            if disabled:
                walk.set_up(1 - i)
                walk.break_while_disabled(list(walk.life.rings)[1])
            else:
                walk.break_ring(i)

    @rule(i=ring)
    def guest_resets(self, i) -> None:
        with self.walk.step():
            if self.walk.state(i) is not State.STOPPED:
                self.walk.stop(i)
            self.walk.reset_driver(i)

    @rule(
        i=ring,
        takes=st.sampled_from([0, 1, 2, 16]),
        finishes=st.sampled_from([0, 1, 2, 16]),
        which=some,
    )
    def back_works(self, i, takes, finishes, which) -> None:
        self.walk.take(i, takes)
        self.walk.back.finish_some(finishes, which)

    @rule(i=ring)
    def back_says_error(self, i) -> None:
        with self.walk.step():
            self.walk.signal_error(i)

    @rule(
        i=ring,
        at=st.sampled_from(
            [R.GET_CONFIG, R.GET_CONFIG, R.SET_VRING_KICK, R.GET_VRING_BASE, None]
        ),
    )
    def somebody_leaves(self, i, at) -> None:
        """The back, instead of an answer; or the VMM."""
        walk = self.walk
        with walk.step():
            match at:
                case None:
                    walk.front_leaves()
                case R.GET_VRING_BASE:
                    walk.back_leaves(at, lambda: walk.stop(i))
                case R.SET_VRING_KICK:
                    walk.back_leaves(at, lambda: walk.set_up(i))
                case _:
                    walk.back_leaves(at, lambda: None)

    @rule(which=some)
    def settle(self, which) -> None:
        with self.walk.step():
            self.walk.settle(which)

    def teardown(self) -> None:
        if not hasattr(self, "walk"):
            return
        try:
            if not self.walk.is_amid:
                self.walk.settle()
        finally:
            self.walk.close()
        assert held() == self.before


@pytest.mark.timeout(0)
def test_session_in_any_life() -> None:
    with walking() as walked:
        run_state_machine_as_test(
            SessionMachine,
            settings=settings(
                PROFILE,
                max_examples=PROFILE.max_examples,
                stateful_step_count=PROFILE.stateful_step_count,
                derandomize=not STRESS,
            ),
        )
    if STRESS:
        assert set(walked.times) == set(TABLE), "a change that was never made"
