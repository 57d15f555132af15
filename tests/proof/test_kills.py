# SPDX-License-Identifier: Apache-2.0
"""The airlock is killed after any instruction, and no request is lost or done twice.

Of an airlock that is killed, only memory that it shares is left, and that changes by
stores alone. So a pump runs through scenes with each store into guest memory and into
the record of chains in flight watched, and after each one both are copied. Of each copy
a new pump starts, as the next airlock does. It has to take exactly the chains that the
guest has offered and does not see as used, in the guest's order; the guest has to see
each of them once, with its bytes. The new pump can be killed at any store as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.proof.bench import pieces_of
from tests.proof.watching import CAN_WATCH, Watcher
from tests.support.plane import PAGE, AddressSpace, Lane, Record, World
from tests.support.profiles import PROFILE, SANITIZED
from vhost_airlock.peers import Chain, DriverRing

SIZE = 4
LENGTH = 64
"""Bytes of each of the two buffers of a chain, one to read and one to write."""

Shot = list[bytes]


class Machine:
    """A guest with a ring and its record, in little memory."""

    def __init__(self, base: int, event_idx: bool = True) -> None:
        self.world = World(pool=16 * PAGE, regions=[(0, 2 * PAGE)])
        self.record = Record(SIZE)
        self.lane = Lane(
            self.world,
            size=SIZE,
            base=base,
            entries=2,
            guest_event_idx=event_idx,
            record=self.record,
        )
        self.space = AddressSpace()
        self.space.pieces = {**self.world.ram.pieces, -1: self.record.memory}

    @property
    def pieces(self) -> list[tuple[int, int]]:
        return pieces_of(self.space)

    def set(self, shot: Shot) -> None:
        """All that the killed airlock has left."""
        for memory, data in zip(self.space.pieces.values(), shot, strict=True):
            memory.view[:] = data

    def question(self, head: int) -> bytes:
        return bytes(self.world.ram.view(LENGTH * head, LENGTH))

    def answer(self, head: int) -> bytes:
        return bytes(self.world.ram.view(PAGE + LENGTH * head, LENGTH))


def turned(question: bytes) -> bytes:
    """The answer of the back."""
    return bytes(byte ^ 0xFF for byte in question)


class Play(Machine):
    """A scene with the first pump; each of its acts is watched."""

    def __init__(self, watcher: Watcher, base: int, **options: bool) -> None:
        super().__init__(base, **options)
        self.watcher = watcher
        self.understudy = Machine(base, **options)
        self.offered: list[int] = []
        """The heads that the guest waits for, in its order."""
        self.at_back: list[Chain] = []
        self.names = iter(range(1, 256))
        self.kills = 0

    # Acts of the guest and of the back; neither of them is killed.

    def offer(self, count: int) -> None:
        for _ in range(min(count, len(self.lane.driver.free))):
            head = self.lane.driver.free[-1]
            name = bytes([next(self.names)]) * LENGTH
            self.world.ram.write(LENGTH * head, name)
            self.world.ram.write(PAGE + LENGTH * head, bytes(LENGTH))
            self.lane.offer(
                (LENGTH * head, LENGTH),
                (PAGE + LENGTH * head, LENGTH, True),
                indirect=True,
            )
            self.offered.append(head)

    def complete(self, *which: int) -> None:
        """The back completes chains, by their place among those that it has."""
        while chain := self.lane.device.take():
            self.at_back.append(chain)
        chosen = [self.at_back[i % len(self.at_back)] for i in which if self.at_back]
        for head in dict.fromkeys(each.head for each in chosen):
            (found,) = (each for each in self.at_back if each.head == head)
            self.at_back.remove(found)
            self.lane.complete(found, turned(self.lane.bytes_of(found)))

    def reap(self) -> None:
        for head, _ in self.lane.used():
            assert self.answer(head) == turned(self.question(head))
            self.offered.remove(head)

    # Acts of the airlock.

    def step(self) -> None:
        self.watch(self.lane.step)

    def stop(self, unfetched: int = 0) -> None:
        """Stop, and start again in the same session."""
        fetched = max(0, self.lane.shadow.avail_idx - unfetched)
        self.watch(lambda: self.lane.stop(fetched))
        while self.lane.device.take():
            pass
        self.watch(lambda: self.lane.start(self.lane.ring.used_idx))

    def lose(self) -> None:
        """The back is gone, and another one takes its place in the same session."""
        self.watch(lambda: self.lane.stop(None))
        self.world.lose_back()
        self.at_back.clear()
        self.watch(lambda: self.lane.start(self.lane.ring.used_idx))

    def kill(self) -> None:
        self.lane.renew()
        self.at_back.clear()
        self.watch(lambda: self.lane.start(self.lane.ring.used_idx))

    def watch(self, act: Callable[[], object]) -> None:
        for shot in self.watcher.shots_during(act, self.pieces):
            self.kills += 1
            self.recover(shot, self.kills, deeper=True)

    # The next airlock.

    def recover(self, shot: Shot, number: int, *, deeper: bool = False) -> None:
        """Start from what is left. `number` chooses among what may differ."""
        then = self.understudy
        then.set(shot)
        lane = then.lane
        lane.driver = double(self.lane.driver, lane)
        seen = [head for head, _ in lane.used()]
        waits = [head for head in self.offered if head not in seen]
        lane.renew()
        ring = lane.ring
        base = (ring.used_idx, ring.avail_idx, ring.used_idx + 1)[number % 3]

        def start() -> None:
            lane.start(base & 0xFFFF)
            lane.step()

        if deeper:
            for inner in self.watcher.shots_during(start, then.pieces):
                self.kills += 1
                self.recover(inner, self.kills)
            return
        start()
        assert then.record.marked[: len(waits)] == waits
        taken = []
        while chain := lane.device.take():
            taken.append(chain)
        assert [lane.bytes_of(chain) for chain in taken] == [
            then.question(head) for head in waits
        ]
        for chain in reversed(taken) if number % 2 else taken:
            lane.complete(chain, turned(lane.bytes_of(chain)))
        while lane.step():
            pass
        assert sorted(head for head, _ in lane.used()) == sorted(waits)
        for head in [*seen, *waits]:
            assert then.answer(head) == turned(then.question(head))
        assert then.record.marked == []
        assert not lane.driver.outstanding


def double(driver: DriverRing, lane: Lane) -> DriverRing:
    """The guest's driver as it is at this moment, in another memory."""
    other = copy.copy(driver)
    other.ring = lane.ring
    other.tables = lane.tables
    other.free = [*driver.free]
    other._chains = dict(driver._chains)
    return other


@pytest.fixture(scope="module")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Watcher:
    return Watcher(tmp_path_factory.mktemp("watch"))


pytestmark = [
    pytest.mark.skipif(not CAN_WATCH, reason="stops after instructions of x86-64 only"),
    pytest.mark.skipif(
        SANITIZED, reason="the code that users run is what is looked at"
    ),
]

BASES = [0, 0xFFFE]
"""At the beginning, and where the indices soon wrap round."""


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("event_idx", [True, False], ids=["event", "flags"])
def test_killed_while_chains_go_through(
    watcher: Watcher, base: int, event_idx: bool
) -> None:
    """Out of order, in batches, with a full ring; and the slots are used again."""
    play = Play(watcher, base, event_idx=event_idx)
    play.offer(3)
    play.step()
    play.complete(1)
    play.step()
    play.complete(1, 0)
    play.offer(1)
    play.step()
    play.reap()
    play.offer(4)
    play.step()
    play.complete(2, 0, 1)
    play.step()
    play.reap()
    assert play.kills > 200


@pytest.mark.parametrize("base", BASES)
def test_killed_while_the_ring_stops_and_starts(watcher: Watcher, base: int) -> None:
    """With chains that the back has not fetched, and others that it has still."""
    play = Play(watcher, base)
    play.offer(4)
    play.step()
    play.complete(1)
    play.step()
    play.stop(1)
    play.complete(0)
    play.step()
    play.reap()
    play.stop(1)
    play.step()
    assert play.kills > 200


@pytest.mark.parametrize("base", BASES)
def test_killed_while_another_back_takes_over(watcher: Watcher, base: int) -> None:
    """With chains between that are done; some stay in slots, others in the record."""
    play = Play(watcher, base)
    play.offer(4)
    play.step()
    play.complete(1)
    play.step()
    play.lose()
    play.step()
    play.complete(1)
    play.step()
    play.reap()
    play.lose()
    play.step()
    assert play.kills > 150
    play.complete(0, 0, 0, 0)
    play.step()


@pytest.mark.parametrize("base", BASES)
def test_killed_again_and_again(watcher: Watcher, base: int) -> None:
    """By the time of each kill the back has done some of the chains."""
    play = Play(watcher, base)
    for i in range(4):
        play.offer(3)
        play.step()
        play.complete(i, 0)
        play.step()
        play.kill()
        play.step()
        play.reap()
    assert play.kills > 300


ACTS = st.one_of(
    st.tuples(st.just("offer"), st.integers(1, SIZE)),
    st.tuples(st.just("complete"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.sampled_from(["step", "step", "step", "kill", "lose", "reap"])),
    st.tuples(st.just("stop"), st.integers(0, 2)),
)


@given(st.lists(ACTS, min_size=4, max_size=14), st.sampled_from(BASES))
@settings(PROFILE, max_examples=max(1, PROFILE.max_examples // 12))
def test_killed_in_any_play(
    watcher: Watcher, acts: list[tuple[str, int]], base: int
) -> None:
    play = Play(watcher, base)
    play.offer(2)
    for act, *numbers in acts:
        getattr(play, act)(*numbers)


def test_a_store_in_the_wrong_place_is_noticed(watcher: Watcher) -> None:
    """The test of the test: the guest sees a batch before the record lists it."""
    play = Play(watcher, 0)
    play.offer(2)
    play.step()
    play.complete(1)
    shots = watcher.shots_during(play.lane.step, play.pieces)
    used = play.lane.ring.used_idx
    before = shots[0]
    for shot in shots:
        play.understudy.set(shot)
        if play.understudy.lane.ring.used_idx == used:
            break
    # Guest memory of after the store to the used index, the record of before all.
    with pytest.raises(AssertionError):
        play.recover([*shot[:-1], before[-1]], 0)
