# SPDX-License-Identifier: Apache-2.0
"""The pool: blocks, quotas, exhaustion, growth, and regions that come and go."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import threading
import time

import pytest

from tests.support.limits import no_more_fds
from tests.support.plane import BACK_BASE, MIB, PAGE, Lane, Wired, World
from vhost_airlock.dataplane.pool import DEBUG, Pool
from vhost_airlock.dataplane.pump import BACK_SIGNALLED, slot_bytes
from vhost_airlock.dataplane.worker import Worker
from vhost_airlock.peers import Chain

NEVER_FITS = r"a request has \d+ bytes, and those with more than \d+ are not placed"


@pytest.fixture
def world():
    """64 pages."""
    world = World(pool=64 * PAGE)
    yield world
    world.check()


@pytest.fixture
def lane(world):
    return Lane(world, size=128)


def take(lane: Lane, *pages: int) -> Chain | None:
    """A chain with a buffer of so many pages each, as far as there is room."""
    lane.offer(*[(1 << 32, count * PAGE, True) for count in pages])
    lane.step()
    return lane.device.take()


def must_take(lane: Lane, *pages: int) -> Chain:
    chain = take(lane, *pages)
    assert chain is not None
    return chain


def give(lane: Lane, *chains: Chain) -> None:
    for chain in chains:
        lane.complete(chain)
    while lane.step():
        lane.used()


def page_of(lane: Lane, chain: Chain) -> int:
    """Where in the pool's first region a chain's first buffer lies."""
    return (chain.buffers[0].addr - BACK_BASE) // PAGE


class TestBlocks:
    @pytest.mark.parametrize("pages", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64])
    def test_sizes_are_rounded_up_to_powers_of_two(self, world, lane, pages):
        chain = must_take(lane, pages)
        block = 1 << (pages - 1).bit_length()
        assert world.pool.used == block * PAGE
        assert page_of(lane, chain) % block == 0
        give(lane, chain)
        assert world.pool.used == 0

    def test_the_block_that_came_back_last_goes_out_first(self, lane):
        chains = [must_take(lane, 1) for _ in range(5)]
        places = [page_of(lane, chain) for chain in chains]
        for chain in chains:
            give(lane, chain)
        again = [page_of(lane, must_take(lane, 1)) for _ in range(5)]
        assert again == places[::-1]

    def test_the_same_block_serves_one_request_after_the_other(self, lane):
        places = set()
        for _ in range(50):
            chain = must_take(lane, 3)
            places.add(page_of(lane, chain))
            give(lane, chain)
        assert len(places) == 1

    def test_neighbours_are_joined_when_a_larger_block_is_wanted(self, world, lane):
        chains = [must_take(lane, 1) for _ in range(64)]
        assert world.pool.used == 64 * PAGE
        random.Random(1).shuffle(chains)
        give(lane, *chains)
        assert page_of(lane, must_take(lane, 64)) == 0

    def test_only_neighbours_are_joined(self, world, lane):
        chains = {page_of(lane, c): c for c in (must_take(lane, 1) for _ in range(64))}
        give(lane, *[chains.pop(page) for page in range(0, 64, 2)])
        assert take(lane, 2) is None
        assert world.pool.used == 32 * PAGE
        # Room for two where one more comes back.
        give(lane, chains.pop(9))
        chain = lane.take()
        assert page_of(lane, chain) in (8, 10)
        assert page_of(lane, chain) % 2 == 0

    def test_a_region_need_not_be_a_power_of_two(self):
        world = World(pool=37 * PAGE)
        lane = Lane(world, size=128)
        for _ in range(3):
            chains = [must_take(lane, 32), must_take(lane, 4), must_take(lane, 1)]
            assert take(lane, 1) is None
            give(lane, *chains)
            give(lane, lane.take())
            assert world.pool.used == 0

    def test_blocks_of_random_sizes_never_overlap_and_all_come_back(self):
        chance = random.Random(5)
        world = World(pool=[100 * PAGE, 64 * PAGE, 3 * PAGE])
        lane = Lane(world, size=256)
        flight: list[Chain] = []
        for _ in range(3000):
            if chance.random() < 0.55 and len(lane.driver.free) > 3:
                sizes = [chance.choice([1, 1, 2, 3, 7, 20]) for _ in range(2)]
                lane.offer(*[(1 << 32, n * PAGE, True) for n in sizes])
                lane.step()
            elif flight:
                give(lane, flight.pop(chance.randrange(len(flight))))
            while chain := lane.device.take():
                flight.append(chain)
            taken: set[int] = set()
            for chain in flight:
                for buffer in chain.buffers:
                    pages = range(buffer.addr, buffer.addr + buffer.length, PAGE)
                    assert taken.isdisjoint(pages)
                    taken.update(pages)
        while flight:
            give(lane, flight.pop())
            while chain := lane.device.take():
                flight.append(chain)
        assert world.pool.used == 0
        assert len(must_take(lane, 64, 64).buffers) == 2
        world.check()

    def test_regression_a_chain_stands_not_in_its_own_way(self):
        """A block of 2 pages cut the one of 4, in an empty pool, time and again."""
        world = World(pool=7 * PAGE)
        lane = Lane(world)
        give(lane, must_take(lane, 1, 1))
        assert len(must_take(lane, 2, 4).buffers) == 2

    def test_regression_nor_does_it_take_the_region_that_is_needed(self):
        world = World(pool=[4 * PAGE, 2 * PAGE], largest=4 * PAGE)
        lane = Lane(world)
        assert len(must_take(lane, 2, 4).buffers) == 2

    def test_blocks_are_joined_at_last_also_when_nobody_wants_a_large_one(self):
        """More than are kept apart: all is one block again, and cut from its start."""
        world = World(pool=2048 * PAGE)
        lane = Lane(world, size=2048)
        chains = [must_take(lane, 1) for _ in range(1025)]
        chains.sort(key=lambda chain: page_of(lane, chain))
        give(lane, *chains[:1024])
        last = must_take(lane, 1)
        assert page_of(lane, last) == 1023
        give(lane, last, chains[1024])
        assert page_of(lane, must_take(lane, 1)) == 0

    def test_to_join_blocks_takes_no_longer_in_a_large_region(self):
        """Full but for two pages, and used by turns as two blocks and as one."""

        def least_time(pages: int) -> int:
            world = World(pool=pages * PAGE)
            filler, lane = Lane(world, size=512, back_indirect=False), Lane(world)
            buffers = []
            for order in range(1, pages.bit_length() - 1):
                left = PAGE << order
                buffers += [MIB] * (left // MIB) or [left]
            take(filler, *(size // PAGE for size in buffers))
            assert world.pool.used == (pages - 2) * PAGE
            times = []
            for _ in range(200):
                give(lane, must_take(lane, 1, 1))
                lane.offer((1 << 32, 2 * PAGE, True))
                start = time.perf_counter_ns()
                lane.step()
                times.append(time.perf_counter_ns() - start)
                give(lane, lane.take())
            return min(times)

        assert least_time(1 << 16) < 3 * least_time(1 << 4)

    def test_the_most_ever_used_is_kept(self, world, lane):
        chains = [must_take(lane, 8) for _ in range(3)]
        give(lane, *chains)
        assert (world.pool.used, world.pool.high_water) == (0, 24 * PAGE)
        give(lane, must_take(lane, 16))
        assert world.pool.high_water == 24 * PAGE


class TestExhaustion:
    def test_chains_wait_and_go_on_in_order(self, world, lane):
        for i in range(10):
            lane.offer((1 << 32, 16 * PAGE - i, True))
        assert lane.step() == 4
        assert lane.step() == 0
        assert lane.counter("stalls") == 1
        seen = 0
        while seen < 10:
            chain = lane.take()
            assert chain.buffers[0].length == 16 * PAGE - seen
            seen += 1
            give(lane, chain)
        assert lane.pump.fault == 0
        assert world.pool.used == 0

    def test_no_small_chain_passes_a_large_one(self, lane):
        first = must_take(lane, 16)
        assert take(lane, 64) is None
        assert take(lane, 1) is None
        give(lane, first)
        large = lane.take()
        assert large.buffers[0].length == 64 * PAGE
        give(lane, large)
        assert lane.take().buffers[0].length == PAGE

    def test_a_chain_takes_all_its_blocks_or_none(self, world, lane):
        half = must_take(lane, 32)
        assert take(lane, 8, 8, 8, 16) is None
        assert world.pool.used == 32 * PAGE
        give(lane, half)
        assert world.pool.used == 40 * PAGE

    def test_a_chain_larger_than_pool_and_limit_is_a_fault(self, world, lane):
        assert take(lane, 65) is None
        assert lane.pump.reason == (
            "a request has 266240 bytes, and those with more than 262144 are not"
            " placed: see --request-limit"
        )
        assert world.pool.used == 0
        assert not world.pool.lone_due

    def test_so_is_one_with_too_many_bytes_in_all(self, world, lane):
        assert take(lane, 32, 16, 8, 8, 1) is None
        assert re.match(NEVER_FITS, lane.pump.reason or "")

    def test_the_limit_may_be_larger_than_the_pool(self):
        world = World(pool=4 * PAGE, lone_limit=16 * PAGE)
        assert world.pool.largest_chain == 16 * PAGE
        lane, other = Lane(world), Lane(world)
        assert take(lane, 16) is None
        assert lane.pump.fault == 0
        assert take(other, 16, 1) is None
        assert re.match(NEVER_FITS, str(other.pump.reason))

    def test_a_ring_goes_on_when_another_one_gives_room(self, world):
        """In the next step: nobody needs to tell it."""
        one, other = Lane(world), Lane(world)
        full = must_take(one, 64)
        assert take(other, 1) is None
        give(one, full)
        assert other.step() == 1
        assert other.device.take() is not None


class TestQuotas:
    """A ring has its guaranteed part, and what is left of the common one."""

    @pytest.fixture
    def lanes(self, world):
        """16 pages for each of two, 32 for whoever comes first."""
        lanes = [Lane(world, size=128) for _ in range(2)]
        world.pool.set_common(32 * PAGE)
        for lane in lanes:
            lane.pump.set_guaranteed(16 * PAGE)
        return lanes

    def fill(self, lane: Lane) -> list[Chain]:
        chains = []
        while chain := take(lane, 1):
            chains.append(chain)
        return chains

    def test_posted_buffers_of_one_ring_can_not_starve_another(self, lanes):
        greedy, poor = lanes
        assert len(self.fill(greedy)) == 48
        assert len(self.fill(poor)) == 16

    def test_the_common_part_is_for_whoever_comes_first(self, lanes):
        first, second = lanes
        chains = [must_take(first, 1) for _ in range(26)]
        assert len(self.fill(second)) == 16 + 22
        give(first, *chains)
        assert second.step() == 1

    def test_what_is_given_back_goes_to_the_common_part_first(self, lanes):
        greedy, other = lanes
        chains = self.fill(greedy)
        give(greedy, *chains[:20])
        # One more of its own was waiting, and took a page.
        assert greedy.device.take() is not None
        assert len(self.fill(other)) == 16 + 19

    def test_a_chain_larger_than_its_share_waits_for_a_lone_region(self, world, lanes):
        assert take(lanes[0], 32, 16) is not None
        assert take(lanes[1], 32, 16, 1) is None
        assert lanes[1].pump.fault == 0
        assert world.pool.close_lone() == 49 * PAGE

    def test_shares_may_change_while_blocks_are_out(self, world, lanes):
        one, other = lanes
        chains = self.fill(one)
        one.pump.set_guaranteed(0)
        other.pump.set_guaranteed(32 * PAGE)
        assert take(other, 1) is not None
        # More is out than the common part has: nothing new till that is less.
        give(one, *chains[:16])
        assert one.device.take() is None
        give(one, *chains[16:])
        assert one.device.take() is not None
        one.pump.set_guaranteed(16 * PAGE)
        assert len(self.fill(one)) + 1 == 48

    def test_quarantined_buffers_are_charged_to_their_ring(self, lanes):
        one, other = lanes
        for _ in range(48):
            must_take(one, 1)
        base, unfinished, _ = one.stop(48)
        assert unfinished == 48
        one.start(base)
        assert take(one, 1) is None
        assert len(self.fill(other)) == 16

    def test_a_pump_that_is_gone_gives_all_back(self, world, lanes):
        one, other = lanes
        self.fill(one)
        world.lanes.remove(one)
        del one.pump, one
        lanes.pop(0)
        assert world.pool.used == 0
        assert len(self.fill(other)) == 48


class TestLoneRegion:
    """Memory for a chain that does not fit into its ring's share."""

    @pytest.fixture
    def world(self):
        """16 pages, and chains may have four times as much."""
        world = World(pool=16 * PAGE, lone_limit=64 * PAGE)
        yield world
        world.check()

    def test_it_has_the_size_of_the_chain(self, world, lane):
        """Not a power of two: all buffers, one after the other, each at its offset."""
        buffers = [(8 * MIB + 5, 9 * PAGE), (1 << 32, 20 * PAGE, True)]
        world.ram.write(8 * MIB + 5, b"r" * 9 * PAGE)
        lane.offer(*buffers, (0, 7, True))
        lane.step()
        assert lane.device.take() is None
        assert world.pool.lone_due
        assert world.pool.close_lone() == 30 * PAGE
        at = world.open_lone(30 * PAGE)
        assert not world.pool.lone_due
        lane.step()
        chain = lane.take()
        first, second, small = chain.buffers
        assert (first.addr, second.addr) == (at + 5, at + 10 * PAGE)
        assert not at <= small.addr < at + 30 * PAGE, "it is in the slot's own area"
        assert lane.bytes_of(chain) == b"r" * 9 * PAGE
        lane.complete(chain, b"w" * 20 * PAGE + b"status!")
        lane.step()
        assert lane.used() == [(0, 20 * PAGE + 7)]
        assert world.ram.read(1 << 32, 20 * PAGE) == b"w" * 20 * PAGE
        assert world.ram.read(0, 7) == b"status!"
        assert world.pool.used == 0

    def test_small_buffers_that_are_many_have_it_too(self, world):
        lane = Lane(world, size=128, back_indirect=False)
        lane.offer(*[(i * 512, 512, True) for i in range(40)], (0, 500, True))
        lane.offer((0, 16))
        lane.step()
        assert world.pool.close_lone() == 40 * PAGE
        at = world.open_lone(40 * PAGE)
        lane.step()
        chain = lane.take()
        places = [buffer.addr for buffer in chain.buffers[:40]]
        assert places == [at + i * PAGE + i * 512 % PAGE for i in range(40)]
        assert lane.take().buffers[0].length == 16

    def test_table_and_small_buffers_lie_before_the_others(self, world):
        lane = Lane(world, size=128, back_indirect=True)
        sizes = [100] * 40 + [32 * PAGE]
        lane.offer(*[(i * 512, size, True) for i, size in enumerate(sizes)])
        lane.step()
        small = 41 * 16 + 40 * 128  # each at a multiple of 64 bytes
        pages = -(-small // PAGE)
        wanted = world.pool.close_lone()
        assert wanted in ((pages + 32) * PAGE, (pages + 33) * PAGE)
        at = world.open_lone(wanted)
        lane.step()
        chain = lane.take()
        desc = lane.shadow.read_desc(chain.head)
        assert desc.addr == at
        assert chain.buffers[-1].addr == at + pages * PAGE + 40 * 512 % PAGE
        lane.complete(chain, b"w" * (4000 + 32 * PAGE))
        lane.step()
        assert world.ram.read(39 * 512, 100) == b"w" * 100

    def test_each_chain_gets_it_anew(self, world, lane):
        for number in range(3):
            assert take(lane, 20) is None
            assert world.pool.lone_due
            assert world.pool.close_lone() == 20 * PAGE
            world.open_lone(20 * PAGE)
            lane.step()
            chain = lane.take()
            assert not world.pool.lone_due
            with pytest.raises(ValueError, match="in use"):
                world.pool.close_lone()
            lane.complete(chain, bytes([number]) * 20 * PAGE)
            lane.step()
            assert world.pool.lone_due
            assert lane.used()

    def test_one_that_is_used_is_no_longer_given_out(self, world, lane):
        assert take(lane, 20) is None
        world.open_lone(20 * PAGE)
        lane.step()
        lane.complete(lane.take())
        assert take(lane, 20) is None
        assert world.pool.close_lone() == 20 * PAGE

    def test_one_that_is_too_small_is_made_anew(self, world, lane):
        assert take(lane, 20) is None
        world.open_lone(19 * PAGE)
        assert lane.step() == 0
        assert world.pool.lone_due

    def test_it_has_only_zeros_for_the_back(self, world, lane):
        """Since it is new: it is not written before the back does."""
        assert take(lane, 20) is None
        world.ram.write(1 << 32, b"secret" * 1000)
        world.open_lone(20 * PAGE)
        lane.step()
        for view in lane.writable(lane.take()):
            assert bytes(view) == bytes(len(view))

    def test_rings_get_it_in_the_order_of_asking(self, world):
        lanes = [Lane(world) for _ in range(3)]
        for pages, lane in zip((18, 40, 20), lanes, strict=True):
            assert take(lane, pages) is None
        for pages, lane in zip((18, 40, 20), lanes, strict=True):
            assert world.pool.close_lone() == pages * PAGE
            world.open_lone(60 * PAGE)
            for other in reversed(lanes):
                assert other.step() == (other is lane)
            lane.complete(lane.take())
            lane.step()
        assert world.pool.close_lone() == 0

    def test_the_other_chains_of_the_pool_go_on(self, world):
        large, other = Lane(world), Lane(world)
        assert take(large, 20) is None
        give(other, must_take(other, 16))
        world.open_lone(20 * PAGE)
        large.step()
        chain = large.take()
        give(other, must_take(other, 16))
        large.complete(chain)
        large.step()

    @pytest.mark.parametrize("end", ["disabled", "broken", "stopped", "gone"])
    def test_a_ring_that_ends_waits_no_more(self, world, end):
        """Others would wait for it for ever."""
        first, second = Lane(world), Lane(world)
        assert take(first, 20) is None
        assert take(second, 30) is None
        assert world.pool.close_lone() == 20 * PAGE
        if end == "disabled":
            first.pump.set_taking(False)
            first.step()
        elif end == "broken":
            first.pump.set_fault(BACK_SIGNALLED)
            first.step()
        elif end == "stopped":
            first.stop(0)
        else:
            world.lanes.remove(first)
            del first.pump, first
        assert world.pool.close_lone() == 30 * PAGE

    def test_a_chain_that_fits_at_last_waits_no_more(self, world, lane):
        """Its ring's share has become larger."""
        world.pool.set_common(8 * PAGE)
        assert take(lane, 16) is None
        assert world.pool.lone_due
        world.pool.set_common(16 * PAGE)
        assert lane.step() == 1
        assert world.pool.used == 16 * PAGE
        assert not world.pool.lone_due
        assert world.pool.close_lone() == 0

    def test_a_chain_in_quarantine_keeps_it(self, world, lane):
        assert take(lane, 20) is None
        world.open_lone(20 * PAGE)
        lane.step()
        assert lane.take()
        _, unfinished, _ = lane.stop(1)
        assert unfinished == 1
        assert not world.pool.lone_due
        with pytest.raises(ValueError, match="in use"):
            world.pool.close_lone()

    def test_a_chain_that_is_handed_back_gives_it_back(self, world, lane):
        assert take(lane, 20) is None
        world.open_lone(20 * PAGE)
        lane.step()
        lane.stop(0)
        assert world.pool.lone_due
        assert world.pool.close_lone() == 0


class TestGrowth:
    def test_what_was_wanted_in_vain_is_told_once(self):
        world = World(pool=[], limit=64 * PAGE)
        lane = Lane(world)
        assert world.pool.take_wanted() == 0
        assert take(lane, 3) is None
        assert lane.pump.fault == 0
        assert world.pool.take_wanted() == 4 * PAGE
        assert world.pool.take_wanted() == 0

    def test_a_new_region_is_used_at_once(self):
        world = World(pool=[], limit=64 * PAGE)
        lane = Lane(world)
        assert take(lane, 3) is None
        world.grow(16 * PAGE)
        assert lane.step() == 1
        assert lane.take().buffers[0].length == 3 * PAGE
        assert world.pool.take_wanted() == 0

    def test_a_ring_at_its_quota_wants_no_more_memory(self, world, lane):
        chains = [must_take(lane, 32), must_take(lane, 32)]
        assert take(lane, 1) is None
        assert world.pool.take_wanted() == 0
        give(lane, *chains)

    def test_memory_in_pieces_makes_it_grow(self):
        world = World(pool=[4 * PAGE, 4 * PAGE], limit=64 * PAGE)
        lane = Lane(world)
        assert take(lane, 8) is None
        assert world.pool.take_wanted() == 8 * PAGE
        world.grow(8 * PAGE)
        lane.step()
        assert lane.take()

    def test_the_first_region_with_room_is_taken(self):
        world = World(pool=[4 * PAGE, 4 * PAGE])
        lane = Lane(world)
        chains = [must_take(lane, 2) for _ in range(4)]
        regions = [(chain.buffers[0].addr - BACK_BASE) >> 32 for chain in chains]
        assert regions == [0, 0, 1, 1]


def test_without_room_for_its_descriptor_there_is_no_shared_pool():
    gc.collect()
    before = os.listdir("/proc/self/fd")
    with no_more_fds(), pytest.raises(OSError, match="cannot make") as told:
        Pool(MIB, largest=MIB, shared=True)
    assert told.value.errno == errno.EMFILE
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.skipif(not DEBUG, reason="only a debug build checks this")
def test_in_a_debug_build_the_pool_changes_under_a_pause_only(world):
    events = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    worker = Worker(events)
    lane = Wired(world, worker)
    thread = threading.Thread(target=worker.run)
    thread.start()
    with worker.pause():
        world.pool.set_may_grow(True)
    lane.offer((0, 16))
    lane.kick()
    lane.complete(lane.await_chain())
    for method in (world.pool.used_pages, world.pool.remove_region):
        with pytest.raises(RuntimeError, match="without a pause"):
            method(0)
    with pytest.raises(RuntimeError, match="without a pause"):
        world.pool.set_may_grow(False)
    assert world.pool.take_wanted() == 0
    with worker.pause():
        assert world.pool.used_pages(0) == 0
    lane.close()
    assert world.pool.used_pages(0) == 0
    worker.stop()
    thread.join()
    os.close(events)


class TestRegions:
    def test_numbers_are_used_again(self):
        world = World(pool=[PAGE, PAGE, PAGE])
        world.pool.remove_region(1)
        assert world.grow(2 * PAGE) == 1
        assert world.grow(PAGE) == 3

    def test_64_regions_are_the_most(self):
        world = World(pool=[PAGE] * 64)
        with pytest.raises(ValueError, match="more than 64 regions"):
            world.grow(PAGE)
        world.pool.remove_region(63)
        assert world.grow(PAGE) == 63

    @pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, (4 << 30) + PAGE])
    def test_odd_sizes_are_refused(self, size):
        pool = Pool(MIB, largest=MIB)
        with pytest.raises(ValueError, match=f"region of {size} bytes"):
            pool.add_region(PAGE, BACK_BASE, size)

    @pytest.mark.parametrize("number", [-1, 1, 64, 1000])
    def test_unknown_numbers_are_refused(self, world, number):
        for method in (world.pool.remove_region, world.pool.used_pages):
            with pytest.raises(ValueError, match=f"no region {number}"):
                method(number)

    def test_a_region_is_removed_once(self, world):
        world.pool.remove_region(0)
        with pytest.raises(ValueError, match="no region 0"):
            world.pool.remove_region(0)

    def test_a_region_in_use_can_not_be_removed(self, world, lane):
        chain = must_take(lane, 2)
        assert world.pool.used_pages(0) == 2
        with pytest.raises(ValueError, match="region 0 has blocks in use"):
            world.pool.remove_region(0)
        give(lane, chain)
        assert world.pool.used_pages(0) == 0
        world.pool.remove_region(0)
        assert take(lane, 1) is None

    def test_the_place_of_a_removed_region_is_like_new(self):
        world = World(pool=[8 * PAGE, PAGE], limit=64 * PAGE)
        lane = Lane(world, size=64)
        give(lane, must_take(lane, 3))
        world.pool.remove_region(0)
        assert world.grow(16 * PAGE) == 0
        # All of the new one is there.
        must_take(lane, 8)
        must_take(lane, 8)
        assert world.pool.used_pages(0) == 16


class TestCanaries:
    """Bytes next to a buffer are nobody's, whichever way a copy goes."""

    @pytest.mark.parametrize("length", [1, 63, 64, 511, 512, 1000, PAGE, 2 * PAGE + 5])
    @pytest.mark.parametrize("offset", [0, 1, 2048, PAGE - 1])
    def test_m4_copies_stay_in_their_buffers(self, world, length, offset):
        lane = Lane(world, size=4)
        read_at, write_at = 8 * MIB + offset, (1 << 32) + offset
        world.ram.write(8 * MIB, b"g" * 8 * PAGE)
        world.ram.write(1 << 32, b"g" * 8 * PAGE)
        for memory in list(world.isolated.pieces.values())[:1]:
            memory.view[:] = b"i" * memory.size
        area = world.isolated.view(lane.slots_at, slot_bytes(lane.size))
        area[:] = b"i" * len(area)
        lane.offer((read_at, length), (write_at, length, True))
        lane.step()
        chain = lane.take()
        table = lane.shadow.read_desc(chain.head)
        given = [(b.addr, b.length) for b in chain.buffers]
        given.append((table.addr, table.length))
        lane.complete(chain, b"w" * length)
        lane.step()
        for address, size in given:
            world.isolated.view(address, size)[:] = b"i" * size
        assert set(bytes(area)) == {ord("i")}
        pool = next(iter(world.isolated.pieces.values()))
        assert set(bytes(pool.view)) == {ord("i")}
        assert world.ram.read(1 << 32, 8 * PAGE) == (
            b"g" * offset + b"w" * length + b"g" * (8 * PAGE - offset - length)
        )
        assert world.ram.read(8 * MIB, 8 * PAGE) == b"g" * 8 * PAGE
