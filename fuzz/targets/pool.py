# SPDX-License-Identifier: Apache-2.0
"""Requests of all sizes on two rings that share a pool, whose regions come and go."""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from fuzz.source import Source
from tests.support.model import SMALL, power_above, up_to
from tests.support.plane import PAGE, Lane, World
from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.peers import Buffer, Chain
from vhost_airlock.peers.ring import DESC_F_INDIRECT

PIECES = (16, 4, 7, 1, 16, 37)
"""Pages of the memory that can be a region."""
LIMIT = 64
LARGEST = 16
LONE = 80
"""Pages of the lone region: enough for LIMIT pages in any six buffers."""
RAM = 128
LENGTHS = (16, 511, 512, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE, 300, 9 * PAGE, 17 * PAGE)

Block = tuple[int, int]
"""Where it begins, in the back's addresses, and its pages."""


@cache
def kept() -> tuple[World, list[int]]:
    """A world with two lanes, what can be its pool's regions, and its lone region."""
    world = World(pool=PAGE, largest=PAGE, regions=[(0, RAM * PAGE)])
    for back_indirect in (True, False):
        Lane(world, size=16, back_indirect=back_indirect, start=False)
    ring_areas = {lane.piece_at for lane in world.lanes}
    for pages in (*PIECES, LONE):
        world.grow(pages * PAGE)
    pieces = [at for at in world.isolated.pieces if at not in ring_areas]
    return world, pieces[1:]


class Held(NamedTuple):
    """A chain that is with the back."""

    head: int
    chain: Chain
    blocks: list[Block]
    alone: bool = False
    """It is in the lone region."""


class Lone(Enum):
    """The state of the lone region."""

    NONE = auto()
    OPEN = auto()
    BUSY = auto()
    USED = auto()


class PoolModel:
    def __init__(self) -> None:
        self.world, (*self.pieces, self.room_at) = kept()
        self.pool = self.world.pool = Pool(LIMIT * PAGE, largest=LARGEST * PAGE)
        self.regions: dict[int, int] = {}
        """By piece: the number of the region that it is."""
        self.lone = Lone.NONE
        self.queue: list[int] = []
        """The lanes that wait for the lone region."""
        self.common = LIMIT
        self.guaranteed = [0, 0]
        self.flight: list[dict[int, Held]] = [{}, {}]
        self.waiting: list[tuple[int, list[Buffer]] | None] = [None, None]
        for lane in self.world.lanes:
            self.start(lane)

    def start(self, lane: Lane) -> None:
        lane.renew()
        lane.ring.avail_idx = lane.ring.used_idx = 0
        lane.start(0)
        lane.pump.set_guaranteed(self.guaranteed[lane.index] * PAGE)
        for held in self.flight[lane.index].values():
            self.ended(held)
        self.flight[lane.index] = {}
        self.waiting[lane.index] = None
        self.leave_queue(lane.index)

    # Regions.

    def change_regions(self, source: Source) -> None:
        piece = source.choice(self.pieces)
        size = self.world.isolated.pieces[piece].size
        if piece not in self.regions:
            host = self.world.isolated.host(piece)
            self.regions[piece] = self.pool.add_region(host, piece, size)
            return
        number = self.regions[piece]
        used = self.used_in(piece)
        assert self.pool.used_pages(number) == used
        if source.flag():
            try:
                self.pool.remove_region(number)
            except ValueError:
                assert used, "an unused region can't be removed"
            else:
                assert not used, "a region that is in use was removed"
                del self.regions[piece]

    def change_shares(self, source: Source) -> None:
        """Set shares as the control plane does: their sum is no more than the limit."""
        lane = self.world.lanes[source.below(2)]
        self.guaranteed[lane.index] = source.choice((0, 8, 16, 32))
        lane.pump.set_guaranteed(self.guaranteed[lane.index] * PAGE)
        self.common = LIMIT - sum(self.guaranteed)
        self.pool.set_common(self.common * PAGE)

    def serve_lone(self) -> None:
        """Make the lone region anew when that is due, as the control plane does."""
        due = self.lone is Lone.USED or bool(self.lone is Lone.NONE and self.queue)
        assert self.pool.lone_due == due
        if due:
            wanted = self.pool.close_lone()
            assert bool(wanted) == bool(self.queue)
            assert wanted <= LONE * PAGE
            host = self.world.isolated.host(self.room_at)
            self.pool.open_lone(host, self.room_at, LONE * PAGE)
            self.lone = Lone.OPEN

    def ended(self, held: Held) -> None:
        if held.alone:
            self.lone = Lone.USED

    def leave_queue(self, index: int) -> None:
        if index in self.queue:
            self.queue.remove(index)

    def blocks(self) -> list[Block]:
        held = [held for flight in self.flight for held in flight.values()]
        return [block for each in held for block in each.blocks]

    def used_in(self, piece: int) -> int:
        end = piece + self.world.isolated.pieces[piece].size
        return sum(pages for at, pages in self.blocks() if piece <= at < end)

    # Requests.

    def wanted(self, lane: Lane, buffers: list[Buffer]) -> list[int]:
        """The pages of the blocks that a chain takes."""
        blocks = [pages for pages in self.large(buffers) if pages]
        small = sum(up_to(64, b.length) for b in buffers if b.length < SMALL)
        if lane.back_indirect and len(buffers) > 1:
            small += up_to(64, 16 * len(buffers))
        if small > SMALL:
            blocks.append(power_above(-(-small // PAGE)))
        return blocks

    def share_of(self, index: int) -> int:
        held = self.flight[index].values()
        return sum(pages for each in held for _, pages in each.blocks)

    def allowed(self, index: int, pages: int) -> bool:
        """Do the rings' shares allow so many pages more?"""

        def over(ring: int, more: int = 0) -> int:
            return max(self.share_of(ring) + more - self.guaranteed[ring], 0)

        more = over(index, pages) - over(index)
        return not more or over(0) + over(1) + more <= self.common

    def room(self, wanted: list[int]) -> bool:
        """Could all these blocks be placed, each at a multiple of its size?"""
        free = {
            piece: [True] * (self.world.isolated.pieces[piece].size // PAGE)
            for piece in self.regions
        }
        for at, pages in self.blocks():
            for piece, map_ in free.items():
                first = (at - piece) // PAGE
                if 0 <= first < len(map_):
                    map_[first : first + pages] = [False] * pages
        for pages in sorted(wanted, reverse=True):
            for map_ in free.values():
                starts = range(0, len(map_) - pages + 1, pages)
                first = next((s for s in starts if all(map_[s : s + pages])), -1)
                if first >= 0:
                    map_[first : first + pages] = [False] * pages
                    break
            else:
                return False
        return True

    def offer(self, source: Source) -> None:
        """A chain, if none waits already; it is placed, or waits, or never fits."""
        lane = self.world.lanes[source.below(2)]
        busy = {held.head for held in self.flight[lane.index].values()}
        head = next((head for head in range(16) if head not in busy), None)
        if self.waiting[lane.index] is None and head is not None:
            buffers = []
            at = source.number(2) % (4 * PAGE)
            count = 1 + source.below(6)
            for i in range(count):
                length = source.choice(LENGTHS)
                buffers.append(Buffer(at, length, 2 * i >= count))
                # Descriptors of chains before may go: the pump has copied them.
                flags = (2 if 2 * i >= count else 0) | (1 if i + 1 < count else 0)
                index = (head + i) % 16
                lane.ring.write_desc(index, at, length, flags, (index + 1) % 16)
                at += length
            lane.ring.set_avail_entry(lane.ring.avail_idx % 16, head)
            lane.ring.avail_idx = (lane.ring.avail_idx + 1) & 0xFFFF
            self.waiting[lane.index] = head, buffers
        self.step(lane)

    def complete(self, source: Source) -> None:
        lane = self.world.lanes[source.below(2)]
        flight = self.flight[lane.index]
        if flight:
            held = flight.pop(sorted(flight)[source.below(len(flight))])
            self.ended(held)
            lane.complete(held.chain)
            self.step(lane, 1)

    def step(self, lane: Lane, done: int = 0) -> None:
        moved = lane.step()
        waiting = self.waiting[lane.index]
        if waiting is not None:
            head, buffers = waiting
            wanted = self.wanted(lane, buffers)
            alone = self.alone(lane.index, wanted)
            if lane.pump.fault:
                large = sum(b.length for b in buffers if b.length >= SMALL)
                assert alone, "it fits"
                assert large > LIMIT * PAGE, "there is a lone region for it"
                lane.pump.detach(None)
                self.start(lane)
            elif moved == done:
                self.check_stall(lane, buffers, wanted)
            else:
                moved -= 1
                self.waiting[lane.index] = None
                if alone:
                    self.placed_alone(lane, head, buffers)
                else:
                    self.placed(lane, head, buffers, sorted(wanted))
                self.leave_queue(lane.index)
        assert moved == done or lane.pump.fault
        assert self.pool.used == PAGE * sum(pages for _, pages in self.blocks())

    def check_stall(self, lane: Lane, buffers: list[Buffer], wanted: list[int]) -> None:
        """Check that every chain that can fit does."""
        needs = [1 if lane.back_indirect else len(buffers)]
        for held in self.flight[lane.index].values():
            needs.append(1 if lane.back_indirect else len(held.chain.buffers))
        if sum(needs) > 16:
            return
        if not self.alone(lane.index, wanted):
            self.leave_queue(lane.index)
            assert not (self.allowed(lane.index, sum(wanted)) and self.room(wanted))
            return
        if lane.index not in self.queue:
            self.queue.append(lane.index)
        assert not (self.lone is Lone.OPEN and self.queue[0] == lane.index)

    def alone(self, index: int, wanted: list[int]) -> bool:
        """Is it too large for its ring's share?"""
        most = self.guaranteed[index] + self.common
        return max(wanted, default=0) > LARGEST or sum(wanted) > most

    def placed_alone(self, lane: Lane, head: int, buffers: list[Buffer]) -> None:
        """In the lone region, one behind the other, each at its offset in a page."""
        assert self.lone is Lone.OPEN
        assert self.queue[:1] in ([], [lane.index]), "another ring was first"
        self.lone = Lone.BUSY
        chain = lane.take()
        at = self.room_at
        for double, buffer in zip(chain.buffers, buffers, strict=True):
            assert double.length == buffer.length
            if double.length >= SMALL:
                assert double.addr >= at
                assert double.addr % PAGE == buffer.addr % PAGE
                at = double.addr + double.length
        assert at <= self.room_at + LONE * PAGE
        self.flight[lane.index][chain.head] = Held(head, chain, [], alone=True)

    def placed(
        self, lane: Lane, head: int, buffers: list[Buffer], wanted: list[int]
    ) -> None:
        assert self.allowed(lane.index, sum(wanted)), "more than its share"
        chain = lane.take()
        small = [double.addr for double in chain.buffers if double.length < SMALL]
        desc = lane.shadow.read_desc(chain.head)
        if desc.flags & DESC_F_INDIRECT:
            small.insert(0, desc.addr)
        blocks = []
        for double, pages in zip(chain.buffers, self.large(buffers), strict=True):
            if pages:
                blocks.append((double.addr // PAGE * PAGE, pages))
        if len(blocks) < len(wanted):
            rest = sum(wanted) - sum(pages for _, pages in blocks)
            assert small[0] % PAGE == 0
            blocks.append((small[0], rest))
        assert sorted(pages for _, pages in blocks) == wanted
        for block in blocks:
            self.check_block(*block)
        self.flight[lane.index][chain.head] = Held(head, chain, blocks)
        spans = sorted(self.blocks())
        for (at, pages), (after, _) in pairwise(spans):
            assert at + pages * PAGE <= after, "two chains share a block"

    @staticmethod
    def large(buffers: list[Buffer]) -> list[int]:
        return [
            power_above(-(-(addr % PAGE + length) // PAGE)) if length >= SMALL else 0
            for addr, length, _ in buffers
        ]

    def check_block(self, at: int, pages: int) -> None:
        """It lies in a region, at a multiple of its size."""
        for piece in self.regions:
            size = self.world.isolated.pieces[piece].size
            if piece <= at < piece + size:
                assert (at - piece) % (pages * PAGE) == 0
                assert at + pages * PAGE <= piece + size
                return
        raise AssertionError(f"a block at {at:#x}, which is in no region")

    def end(self) -> None:
        for lane in self.world.lanes:
            lane.pump.detach(None)
            lane.renew()
        assert self.pool.used == 0
        self.world.check()


def one(data: bytes) -> None:
    source = Source(data)
    model = PoolModel()
    for _ in range(80):
        if not source.more:
            break
        kind = source.below(8)
        if kind < 3:
            model.offer(source)
        elif kind < 5:
            model.complete(source)
        elif kind < 7:
            model.change_regions(source)
            model.serve_lone()
        else:
            model.change_shares(source)
    model.end()
