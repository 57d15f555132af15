# SPDX-License-Identifier: Apache-2.0
"""Backs are lost at any point, airlocks too, rings stop and start: no chain is lost.

Each chain carries a number that the back reads and answers with. The back journals the
numbers as it executes them: each one that the guest offered is executed, comes out
once, and is not executed any more once the guest has seen that it is done. One that is
condemned, since backs were lost over it, ends with an error and is not executed again.
"""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.plane import PAGE, Lane, Record, World
from tests.support.profiles import PROFILE
from vhost_airlock.peers import Chain

SIZES = (1, 2, 8, 16)
STRIDE = 64
"""Bytes of guest memory for each chain: its number, and behind it the answer."""


class Journal:
    """One ring with a guest and a back that checks itself as it goes."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.world = World(pool=chance.choice([2, 64]) * PAGE)
        size = chance.choice(SIZES)
        self.recorded = chance.random() < 0.5
        """Whether the VMM has a record of the chains in flight."""
        self.lane = Lane(
            self.world,
            size=size,
            back_indirect=chance.random() < 0.5,
            back_event_idx=chance.random() < 0.5,
            record=Record(size) if self.recorded else None,
            has_error=True,
        )
        self.waits: dict[int, int] = {}
        """The number of the chain with each head that the guest waits for."""
        self.offered = 0
        self.done: set[int] = set()
        self.executed: set[int] = set()
        self.condemned: set[int] = set()
        self.taken: list[Chain] = []

    def offer(self) -> None:
        """The guest offers chains while it has descriptors."""
        for _ in range(self.chance.randint(1, 4)):
            if len(self.lane.driver.free) < 2:
                return
            at = self.offered * STRIDE
            self.world.ram.write(at, self.offered.to_bytes(8, "little"))
            large = self.chance.random() < 0.2
            head = self.lane.offer((at, 8), (at + 8, 520 if large else 8, True))
            self.waits[head] = self.offered
            self.offered += 9  # more than the largest chain has

    def take(self) -> None:
        for _ in range(self.chance.randint(0, 4)):
            chain = self.lane.device.take()
            if chain is None:
                return
            self.taken.append(chain)

    def complete(self, share: float = 0.5) -> None:
        """The back executes and completes some of its chains, in any order."""
        self.chance.shuffle(self.taken)
        left = []
        for chain in self.taken:
            if self.chance.random() >= share:
                left.append(chain)
                continue
            number = int.from_bytes(self.lane.bytes_of(chain), "little")
            assert number not in self.done | self.condemned
            self.executed.add(number)
            if self.chance.random() < share:
                self.lane.complete(chain, (~number).to_bytes(8, "little", signed=True))
            else:
                left.append(chain)
        self.taken = left

    def step(self) -> None:
        self.lane.step(self.chance.choice([1, 2, 256]))
        self.reap()

    def reap(self) -> None:
        for head, length in self.lane.used():
            number = self.waits.pop(head)
            self.done.add(number)
            if number in self.condemned:
                assert length == 0
                continue
            assert length == 8
            answer = self.world.ram.read(number * STRIDE + 8, 8)
            assert int.from_bytes(answer, "little", signed=True) == ~number
            assert number in self.executed

    def lose(self) -> None:
        """The back is gone. All that it has completed is done."""
        self.lane.pump.set_taking(False)
        while self.lane.step():
            pass
        self.reap()
        for head in self.lane.pump.accuse():
            self.condemned.add(self.waits[head])
        base, *_ = self.lane.stop(None)
        self.world.lose_back()
        self.taken.clear()
        self.lane.pump.set_alone(self.chance.random() < 0.7)
        self.lane.start(base)

    def kill(self) -> None:
        """The airlock is killed. If there is a record, another one goes on by that,
        with another back, whatever the base is.
        """
        if self.recorded:
            self.lane.renew()
            # The next one does not know of them.
            self.condemned &= self.done
            self.taken.clear()
            ring = self.lane.ring
            self.lane.start(self.chance.choice([ring.used_idx, ring.avail_idx, 7]))

    def stop(self) -> None:
        """The ring stops and starts; the back keeps the chains that it has taken."""
        base, *_ = self.lane.stop(self.lane.device.next_avail)
        self.lane.start(base)

    def settle(self) -> None:
        for _ in range(20 * len(self.waits) + 20):
            self.lane.step()
            self.reap()
            self.take()
            self.complete(1.0)
        assert not self.waits
        assert not self.taken
        assert self.world.pool.used == 0
        assert self.lane.pump.outstanding == self.lane.pump.quarantined == 0
        self.world.check()


@pytest.mark.timeout(0)
@settings(PROFILE)
@given(seed=st.integers(0, 2**64 - 1))
def test_no_chain_is_lost_with_its_back(seed):
    chance = Random(seed)
    journal = Journal(chance)
    deeds = [journal.offer, journal.take, journal.complete, journal.step]
    for _ in range(120):
        often = [*deeds, *deeds, *deeds]
        chance.choice([*often, journal.lose, journal.stop, journal.kill])()
    journal.settle()
    assert journal.condemned <= journal.done
