# SPDX-License-Identifier: Apache-2.0
"""Any bytes in the record of chains in flight, at a start and while the ring runs.

The record is another process's memory. At worst it makes the pump take chains that are
not in flight, or none: no access goes beyond record, ring and buffers, and when the
record is erased and the ring reset, all is well again. A record that nobody has
tampered with loses no chain, whenever the airlock is killed.
"""

from __future__ import annotations

from fuzz.source import Source
from tests.support.plane import PAGE, Lane, Record, World
from vhost_airlock.dataplane.recorded import erase
from vhost_airlock.peers import Chain

SIZES = (4, 1, 2, 16)
WORDS = (0, 1, 2, 3, 4, 15, 16, 17, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
BASES = (0, 0xFFFE, 0x7FFF)
QUESTION, ANSWER = 64, 8
"""Bytes of each chain to read and to write."""


class Scene:
    """A ring with a record that need not have room for it."""

    def __init__(self, size: int, room: int, base: int, offset: int) -> None:
        self.world = World(pool=16 * PAGE, regions=[(0, 2 * PAGE)])
        self.record = Record(room, offset)
        self.lane = Lane(
            self.world, size=size, base=base, entries=2, record=self.record
        )
        self.at_back: list[Chain] = []
        self.tampered = room < size
        self.waits: list[int] = []
        """The heads for which the guest waits, if nobody has tampered."""

    # Deeds.

    def offer(self, source: Source) -> None:
        for _ in range(1 + source.below(3)):
            if not self.lane.driver.free:
                return
            head = self.lane.driver.free[-1]
            question = bytes([1 + head]) * QUESTION
            self.world.ram.write(QUESTION * head, question)
            self.lane.offer(
                (QUESTION * head, QUESTION),
                (PAGE + ANSWER * head, ANSWER, True),
                indirect=True,
            )
            self.waits.append(head)

    def step(self, source: Source) -> None:
        self.lane.step()
        self.reap()

    def complete(self, source: Source) -> None:
        self.take()
        if self.at_back:
            chain = self.at_back.pop(source.below(len(self.at_back)))
            self.lane.complete(chain, bytes(ANSWER))

    def kill(self, source: Source) -> None:
        """The next airlock has the record, and any base."""
        self.lane.renew()
        self.at_back.clear()
        self.start(source)

    def stop(self, source: Source) -> None:
        """The back has stopped anywhere, or is gone."""
        if source.flag():
            self.lane.stop(None)
            self.world.lose_back()
            self.at_back.clear()
        else:
            self.take()
            self.lane.stop(self.lane.device.next_avail)
        self.start(source)

    def tamper_with_a_word(self, source: Source) -> None:
        self.tampered = True
        at = 2 * source.below(len(self.record.view) // 2)
        self.record.view[at : at + 2] = source.choice(WORDS).to_bytes(2, "little")

    def tamper_with_an_entry(self, source: Source) -> None:
        self.tampered = True
        self.record.set_entry(
            source.below(self.record.entries),
            inflight=source.number(1),
            next=source.choice(WORDS),
            counter=source.number(8) if source.flag() else source.number(1),
        )

    def tamper_with_the_head(self, source: Source) -> None:
        self.tampered = True
        self.record.set_head(
            features=source.choice((0, 0, 0, 1)),
            version=source.choice((1, 1, 0, 2)),
            desc_num=source.choice((self.record.entries, *WORDS)),
            last=source.choice(WORDS),
            used=(self.lane.ring.used_idx - source.choice(WORDS)) & 0xFFFF,
        )

    # Parts of deeds.

    def start(self, source: Source) -> None:
        ring = self.lane.ring
        self.lane.start(source.choice((ring.used_idx, ring.avail_idx, 0xFFFF)))

    def take(self) -> None:
        self.at_back += iter(self.lane.device.take, None)

    def reap(self) -> None:
        """The guest looks, until somebody has tampered: then there may be anything."""
        if not self.tampered:
            for head, _ in self.lane.used():
                self.waits.remove(head)

    # The end.

    def check(self) -> None:
        self.world.check()
        assert self.record.memory.intact()
        assert self.lane.pump.outstanding <= self.lane.size
        for head in range(self.lane.size):
            question = self.world.ram.read(QUESTION * head, QUESTION)
            assert question in (bytes([1 + head]) * QUESTION, bytes(QUESTION))

    def end(self) -> None:
        """All chains end, if nobody has tampered; a ring that is reset works."""
        if not self.tampered:
            for _ in range(3 * self.lane.size):
                self.lane.step()
                self.take()
                for chain in self.at_back:
                    self.lane.complete(chain, bytes(ANSWER))
                self.at_back.clear()
            self.reap()
            assert self.waits == self.record.marked == []
        self.check()
        self.lane.stop(None)
        self.world.lose_back()
        erase(self.record.place[0])
        self.lane.ring.avail_idx = self.lane.ring.used_idx = 0
        self.lane.reset()
        self.lane.start(0)
        assert self.lane.step() == 0
        head = self.lane.offer((0, QUESTION), (PAGE, ANSWER, True), indirect=True)
        assert self.lane.step() == 1
        self.lane.complete(self.lane.take(), bytes(ANSWER))
        assert self.lane.step() == 1
        assert self.lane.used() == [(head, ANSWER)]
        assert self.world.pool.used == 0
        self.check()


DEEDS = (
    *(Scene.offer, Scene.step, Scene.complete, Scene.step, Scene.kill, Scene.stop),
    *(Scene.tamper_with_a_word, Scene.tamper_with_an_entry, Scene.tamper_with_the_head),
)


def one(data: bytes) -> None:
    source = Source(data)
    size = source.choice(SIZES)
    room = source.choice((size, size, 2 * size, max(1, size // 2)))
    scene = Scene(size, room, source.choice(BASES), source.choice((0, 64, 8)))
    for _ in range(100):
        if not source.more:
            break
        source.choice(DEEDS)(scene, source)
    scene.end()
