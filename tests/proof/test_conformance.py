# SPDX-License-Identifier: Apache-2.0
"""The compiled data plane does what the model of notifying.py says.

One lane is driven through everything that can happen to it in turns: the guest offers,
the pump steps and rests, the back completes, either of them asks for notifications.
After each turn the words in memory and what was signalled are compared with four models
that made the same turn, one for each index. A turn is tried once in every situation
that can be reached; where there are many, in as many as there is time for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from tests.proof.notifying import C, Model, P, State
from tests.support.plane import Lane, World
from tests.support.profiles import STRESS
from vhost_airlock.peers import Chain
from vhost_airlock.peers.ring import need_event

FAR = 3
"""Beyond so many steps past the ring's size, an event index is just out of reach."""


class Follower:
    """The model of an index that is followed by us: of the guest's kicks, and the
    back's calls."""

    def __init__(self, model: Model, start: int) -> None:
        self.model = model
        self.state = next(model.starts())._replace(
            shown=start, seen=start, known=start, old=start, new=start, event=0
        )

    def put(self) -> None:
        """The other side moves its index by one."""
        index = (self.state.shown + 1) % self.model.modulus
        self.state = self.state._replace(shown=index)

    def step(self) -> int:
        """Take all that there is; how much it was."""
        before = self.state.seen
        self.go(C.LOOK)
        while self.state.consumer in (C.LOOK, C.TAKE):
            self.go_on()
        self.go_on()  # DISARM
        return (self.state.seen - before) % self.model.modulus

    def rest(self) -> bool:
        """Ask to be woken. Is there something to do still?"""
        self.go(C.ARM)
        while self.state.consumer is not C.LOOK_AGAIN:
            self.go_on()
        self.go_on()
        return self.state.consumer in (C.LOOK, C.TAKE)

    def go(self, place: C) -> None:
        self.state = self.state._replace(consumer=place)

    def go_on(self) -> None:
        """One step, in which all is taken that can be; and what it stored is there."""
        *_, self.state = self.model.consumer_steps(self.state)
        while self.state.consumer_stores:
            (self.state,) = self.model.memory_steps(self.state)


class Leader:
    """The model of an index that we move: of our kicks, and our calls."""

    def __init__(self, model: Model, start: int) -> None:
        self.model = model
        self.state = next(model.starts())._replace(
            shown=start, seen=start, old=start, new=start, event=0
        )

    def publish(self, count: int) -> bool:
        """Move it; is there a signal?"""
        if not count:
            return False
        # That there is room is the lane's affair here.
        state = self.state._replace(seen=self.state.new)
        state = [*self.model.producer_steps(state)][count - 1]
        (state,) = self.model.memory_steps(state)
        signalled = False
        while state.producer is not P.IDLE:
            (state,) = self.model.producer_steps(state)
            signalled = signalled or state.producer is P.SIGNAL
        self.state = state
        return signalled

    def ask(self, event: int) -> None:
        """The other side asks for a signal, when `event` is passed or from now on."""
        self.state = self.state._replace(event=event, quiet=False)

    def hush(self) -> None:
        self.state = self.state._replace(quiet=True)


class Twin:
    """A lane and its models."""

    def __init__(self, size: int, base: int, event_idx: bool) -> None:
        self.lane = Lane(
            World(),
            size=size,
            guest_event_idx=event_idx,
            back_event_idx=event_idx,
            base=base,
            whole_batches=True,
            start=False,
        )
        self.lane.ring.avail_event = self.lane.ring.used_event = 0
        self.lane.start(base)
        self.event_idx = event_idx
        model = Model(size, event_idx, whole_words=True)
        calls_first = Model(size, event_idx, whole_words=True, calls_first=True)
        self.from_guest = Follower(model, base)
        self.to_back = Leader(model, 0)
        self.from_back = Follower(model, 0)
        self.to_guest = Leader(calls_first, base)
        self.at_back: deque[Chain] = deque()
        self.in_flight: deque[int] = deque()
        self.turns = {
            "offer": self.offer,
            "step": self.step,
            "rest": self.rest,
            "complete": self.complete,
            "guest asks": self.guest_asks,
            "back asks": self.back_asks,
            "guest hushes": self.guest_hushes,
            "back hushes": self.back_hushes,
        }

    def offer(self) -> None:
        if self.lane.driver.free:
            self.in_flight.append(self.lane.offer((0x1000, 16, True)))
            self.from_guest.put()

    def step(self) -> None:
        reaped = self.from_back.step()
        call = self.to_guest.publish(reaped)
        taken = self.from_guest.step()
        kick = self.to_back.publish(taken)
        assert self.lane.pump.step() == (reaped + taken, call, kick)

    def rest(self) -> None:
        pending = [self.from_guest.rest(), self.from_back.rest()]
        assert self.lane.pump.rest() == any(pending)

    def complete(self) -> None:
        """The back takes all that it finds, and completes the oldest."""
        while chain := self.lane.device.take():
            self.at_back.append(chain)
        if self.at_back:
            self.lane.complete(self.at_back.popleft())
            self.from_back.put()

    def guest_asks(self) -> None:
        """The guest takes all that is done, in the order in which it was offered."""
        for head, _ in self.lane.used():
            assert head == self.in_flight.popleft()
        self.lane.ring.avail_flags = 0
        if self.event_idx:
            self.lane.ring.used_event = self.to_guest.state.shown
        self.to_guest.ask(self.to_guest.state.shown)

    def back_asks(self) -> None:
        self.lane.shadow.used_flags = 0
        if self.event_idx:
            self.lane.shadow.avail_event = self.to_back.state.shown
        self.to_back.ask(self.to_back.state.shown)

    def guest_hushes(self) -> None:
        if not self.event_idx:
            self.lane.ring.avail_flags = 1
            self.to_guest.hush()

    def back_hushes(self) -> None:
        if not self.event_idx:
            self.lane.shadow.used_flags = 1
            self.to_back.hush()

    def compare(self) -> None:
        lane = self.lane
        assert lane.fault is None
        assert lane.ring.used_idx == self.to_guest.state.shown
        assert lane.shadow.avail_idx == self.to_back.state.shown
        assert len(self.in_flight) <= lane.size
        if self.event_idx:
            assert lane.ring.avail_event == self.from_guest.state.event
            assert lane.shadow.used_event == self.from_back.state.event
        else:
            assert bool(lane.ring.used_flags) == self.from_guest.state.quiet
            assert bool(lane.shadow.avail_flags) == self.from_back.state.quiet

    def situation(self) -> tuple[object, ...]:
        """The words that decide over all that follows, at any place in the rings."""

        def from_here(state: State) -> tuple[object, ...]:
            gap = (state.shown - state.event + FAR) % (1 << 16)
            return (
                (state.shown - state.seen) % (1 << 16),
                min(gap, self.lane.size + 2 * FAR) if self.event_idx else state.quiet,
                state.armed,
                state.first,
            )

        followers = self.from_guest.state, self.from_back.state
        leaders = self.to_back.state, self.to_guest.state
        return (
            *map(from_here, followers),
            *(from_here(state._replace(seen=state.shown)) for state in leaders),
            len(self.at_back),
            len(self.in_flight),
        )


SIZES = [1, 2, 4, 8]
BASES = [0, 1, 65533, 65534, 65535]
MOST = 4000
"""Turns in those that have many situations."""


@pytest.mark.parametrize("event_idx", [True, False], ids=["event", "flags"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("size", SIZES)
def test_every_turn_in_every_situation(size, base, event_idx):
    twin = Twin(size, base, event_idx)
    if not event_idx:
        twin.guest_asks()
    leads: dict[object, dict[str, object]] = {}
    turns = 0
    twin.compare()
    here = twin.situation()
    while way := way_to_new(here, leads, list(twin.turns)):
        for turn in way:
            twin.turns[turn]()
            twin.compare()
            there = twin.situation()
            leads.setdefault(here, {})[turn] = there
            here = there
            turns += 1
        if turns > MOST and not STRESS:
            break
    twin.lane.world.check()
    assert turns > 400


def events(count: int) -> Iterator[int]:
    """Event indices, counted from the old index, that `count` chains may pass or not:
    all that are near, and others all over the 2^16.
    """
    yield from range(-2, count + 2)
    yield from range(0, 1 << 16, 97)
    for bit in range(16):
        yield from ((1 << bit) - 1, (1 << bit) + count, -(1 << bit) + count)


@pytest.mark.parametrize("count", range(1, 9))
def test_a_kick_and_a_call_by_the_naive_rule(count):
    """One is due if the event index is among those that were passed."""
    lane = Lane(World(), size=8, base=65533, whole_batches=True)
    lane.offer((0x1000, 16, True))
    lane.step()
    lane.complete(lane.take())
    lane.step()  # the first call is due anyway
    lane.used()
    for event in events(count):
        old = lane.shadow.avail_idx
        lane.shadow.avail_event = (old + event) & 0xFFFF
        passed = {(old + i) & 0xFFFF for i in range(count)}
        for _ in range(count):
            lane.offer((0x1000, 16, True))
        _, call, kick = lane.pump.step()
        assert (call, kick) == (False, lane.shadow.avail_event in passed)

        old = lane.ring.used_idx
        lane.ring.used_event = (old + event) & 0xFFFF
        passed = {(old + i) & 0xFFFF for i in range(count)}
        for _ in range(count):
            lane.complete(lane.take())
        _, call, kick = lane.pump.step()
        assert (call, kick) == (lane.ring.used_event in passed, False)
        assert len(lane.used()) == count


def test_need_event_is_the_naive_rule():
    """In the model and in the tests' own rings, for each of the 2^16 event indices."""
    model = Model(8, event_idx=True, whole_words=True)
    for old in (0, 65530):
        for count in range(9):
            new = (old + count) & 0xFFFF
            passed = {(old + i) & 0xFFFF for i in range(count)}
            for rule in (model.need_event, need_event):
                found = {each for each in range(1 << 16) if rule(each, new, old)}
                assert found == passed


def way_to_new(
    here: object, leads: dict[object, dict[str, object]], turns: list[str]
) -> list[str]:
    """The shortest way from here that ends in a turn not tried yet, if there is any."""
    ways: deque[tuple[object, list[str]]] = deque([(here, [])])
    reached = {here}
    while ways:
        place, way = ways.popleft()
        known = leads.get(place, {})
        for turn in turns:
            if turn not in known:
                return [*way, turn]
            if known[turn] not in reached:
                reached.add(known[turn])
                ways.append((known[turn], [*way, turn]))
    return []
