# SPDX-License-Identifier: Apache-2.0
"""One ring's pump: passes, budgets, notifications, stop and restart."""

from __future__ import annotations

import gc
import itertools

import pytest

from tests.support.plane import MIB, PAGE, Lane, World
from tests.support.profiles import SANITIZED
from vhost_airlock.dataplane.pool import Pool
from vhost_airlock.dataplane.pump import (
    BACK_SIGNALLED,
    FAULTS,
    POLICIES,
    Pump,
    shadow_bytes,
    slot_bytes,
)
from vhost_airlock.dataplane.regions import GuestMemory
from vhost_airlock.peers import Buffer, DriverRing
from vhost_airlock.peers.ring import DESC_F_NEXT, SplitRing

READ = (0x1000, 512)
WRITE = (0x8000, 512, True)


@pytest.fixture
def world():
    world = World()
    yield world
    world.check()


def run_chains(lane, count):
    """Chains that go all the way, so that positions are not where they began."""
    for _ in range(count):
        lane.offer(READ)
        lane.step()
        lane.complete(lane.take())
        lane.step()
        lane.used()


class TestStep:
    def test_a_chain_goes_through_and_comes_back(self, world):
        lane = Lane(world)
        world.ram.write(0x1000, b"question")
        head = lane.offer((0x1000, 8), (0x2000, 6, True))
        assert lane.pump.step() == (1, False, True)
        chain = lane.take()
        assert lane.bytes_of(chain) == b"question"
        assert lane.used() == []
        lane.complete(chain, b"answer")
        assert lane.pump.step() == (1, True, False)
        assert lane.used() == [(head, 6)]
        assert world.ram.read(0x2000, 7) == b"answer\0"

    def test_nothing_to_do_moves_nothing(self, world):
        lane = Lane(world)
        assert lane.pump.step() == (0, False, False)
        assert lane.device.take() is None
        assert lane.used() == []

    def test_a_step_ends_after_its_budget(self, world):
        lane = Lane(world, size=64)
        for _ in range(40):
            lane.offer(READ)
        assert lane.step(16) == 16
        assert lane.step(16) == 16
        lane.complete(lane.take())
        assert lane.step(16) == 1 + 8

    def test_the_guest_can_go_on_while_the_rest_is_copied(self, world):
        """A step completes a quarter of what is in flight, or four chains."""
        lane = Lane(world, size=64)
        for _ in range(40):
            lane.offer(READ)
        lane.step()
        for _ in range(24):
            lane.complete(lane.take())
        assert [lane.step() for _ in range(4)] == [10, 7, 5, 2]
        assert len(lane.used()) == 24
        for _ in range(16):
            lane.complete(lane.take())
        assert [lane.step() for _ in range(5)] == [4, 4, 4, 4, 0]

    def test_what_the_back_shows_at_once_the_guest_sees_at_once(self, world):
        """In whole batches: a network card's packet may be in several chains."""
        lane = Lane(world, size=64, whole_batches=True)
        for _ in range(40):
            lane.offer(READ)
        lane.step()
        for _ in range(24):
            lane.complete(lane.take())
        assert lane.step(16) == 24
        assert len(lane.used()) == 24
        assert lane.counter("calls") == 1
        assert lane.pump.outstanding == 16

    def test_a_step_ends_after_so_many_bytes(self):
        world = World(pool=16 * MIB)
        lane = Lane(world, size=64)
        for _ in range(12):
            lane.offer((1 << 32, MIB // 4, True))
        assert lane.step() == 4
        assert lane.step() == 4
        assert lane.step() == 4
        assert lane.step() == 0
        for _ in range(12):
            lane.complete(lane.take())
        assert [lane.step() for _ in range(4)] == [4, 4, 4, 0]

    def test_whole_batches_are_of_any_size(self):
        world = World(pool=16 * MIB)
        lane = Lane(world, size=64, whole_batches=True)
        for _ in range(12):
            lane.offer((1 << 32, MIB // 4, True))
        while lane.step():
            pass
        for _ in range(12):
            lane.complete(lane.take())
        assert lane.step() == 12

    def test_x2_a_step_ends_after_so_many_segments(self):
        """256 chains of 1024 bytes, each byte a segment: two of them make a step."""
        world = World(pool=32 * MIB)
        lane = Lane(world, size=256, entries=1024)
        for _ in range(256):
            lane.offer(*[(i, 1) for i in range(1024)], indirect=True)
        assert [lane.step() for _ in range(129)] == [2] * 128 + [0]
        for _ in range(256):
            lane.complete(lane.take())
        assert [lane.step() for _ in range(129)] == [2] * 128 + [0]
        assert len(lane.used()) == 256

    def test_x2_a_step_ends_after_so_many_descriptors(self, world):
        """Of no bytes, in a tail that all heads share: they cost nothing but time."""
        lane = Lane(world, size=2048)
        heads, tail = 1024, 1023
        for i in range(heads):
            lane.ring.write_desc(i, 0, 16, DESC_F_NEXT, heads)
            lane.ring.set_avail_entry(i, i)
        for i in range(heads, heads + tail):
            following = DESC_F_NEXT if i + 1 < heads + tail else 0
            lane.ring.write_desc(i, 0, 0, following, i + 1)
        lane.ring.avail_idx = heads
        assert [lane.step() for _ in range(4)] == [2] * 4
        assert len(lane.take().buffers) == 1

    def test_x2_a_step_ends_after_so_many_chains_of_before_a_stop(self):
        """To compare them with what the guest offers again takes as long."""
        world = World(pool=32 * MIB)
        lane = Lane(world, size=8, entries=1024)
        for _ in range(8):
            lane.offer(*[(i, 1) for i in range(1024)], indirect=True)
        while lane.step():
            pass
        base, unfinished, _ = lane.stop(8)
        assert unfinished == 8
        lane.start(base)
        assert [lane.step() for _ in range(5)] == [2, 2, 2, 2, 0]
        assert lane.counter("adopted") == 8

    def test_the_back_may_be_kicked_for_nothing(self, world):
        """As when its ring begins."""
        lane = Lane(world)
        lane.pump.kick()
        assert lane.pump.step() == (0, False, True)
        assert lane.pump.step() == (0, False, False)

    def test_a_detached_pump_does_nothing(self, world):
        lane = Lane(world, start=False)
        assert not lane.pump.attached
        assert lane.pump.step() == (0, False, False)
        assert lane.pump.rest() is False

    def test_only_completions_are_moved_when_chains_are_not_taken(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.step()
        head = lane.offer(READ)
        lane.pump.set_taking(False)
        lane.complete(lane.take())
        assert lane.step() == 1
        assert lane.device.take() is None
        assert not lane.pump.rest()
        lane.pump.set_taking(True)
        assert lane.pump.rest()
        assert lane.step() == 1
        lane.complete(lane.take())
        lane.step()
        assert [used for used, _ in lane.used()][-1] == head

    def test_counters_say_what_was_done(self, world):
        lane = Lane(world)
        for _ in range(3):
            lane.offer((0, 100), (PAGE, 1000), (2 * PAGE, 700, True))
        lane.step()
        for _ in range(3):
            lane.complete(lane.take(), length=701)
        lane.step()
        assert lane.pump.counters() == {
            "chains": 3,
            "completions": 3,
            "bytes_in": 3 * 1100,
            "bytes_out": 3 * 700,
            "kicks": 1,
            "calls": 1,
            "stalls": 0,
            "violations": 0,
            "clamped": 3,
            "faults": 0,
            "adopted": 0,
            "replayed": 0,
            "recovered": 0,
            "poisoned": 0,
            "outstanding": 0,
            "quarantined": 0,
            "used": 0,
            # In each, 1000 bytes at a page's start and 700 at another's.
            "high_water": 3 * 2 * PAGE,
            "window": 0,
            "logged": 0,
            "unlogged": 0,
        }

    def test_counters_say_what_is_held(self, world):
        lane = Lane(world)
        for _ in range(3):
            lane.offer((0, PAGE, True))
        lane.step()
        lane.complete(lane.take())
        lane.step()
        lane.take()
        counters = lane.pump.counters()
        assert (counters["outstanding"], counters["quarantined"]) == (2, 0)
        assert (counters["used"], counters["high_water"]) == (2 * PAGE, 3 * PAGE)
        lane.stop(2)
        counters = lane.pump.counters()
        assert (counters["outstanding"], counters["quarantined"]) == (0, 1)
        assert (counters["used"], counters["high_water"]) == (PAGE, 3 * PAGE)

    def test_a_chain_without_room_is_not_in_the_high_water(self):
        world = World(pool=2 * PAGE)
        lane = Lane(world)
        lane.offer((0, PAGE, True))
        lane.offer((0, 2 * PAGE, True))
        assert lane.step() == 1
        assert lane.counter("stalls") == 1
        assert lane.counter("high_water") == PAGE

    def test_each_fault_is_counted_once(self, world):
        lane = Lane(world, size=4)
        lane.ring.avail_idx = 9
        lane.step()
        lane.step()
        assert lane.counter("faults") == 1
        lane.pump.move(None)
        lane.pump.move(None)
        assert lane.counter("faults") == 2

    def test_counters_go_on_over_a_restart(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.step()
        lane.complete(lane.take())
        lane.device.complete(5)
        lane.device.publish()
        lane.step()
        before = lane.pump.counters()
        assert before["violations"] == 1
        lane.start(lane.stop(1)[0])
        assert lane.pump.counters() == before

    def test_a_chain_that_waits_is_counted_once(self):
        world = World(pool=2 * PAGE)
        lane = Lane(world)
        for _ in range(4):
            lane.offer((0, PAGE, True))
        for _ in range(5):
            lane.step()
        assert lane.counter("stalls") == 1
        for _ in range(2):
            lane.complete(lane.take())
            lane.step()
        assert lane.counter("stalls") == 2
        assert lane.counter("chains") == 4


class TestWindow:
    """With so much in flight the next chain waits, and goes on by itself."""

    @pytest.fixture
    def lane(self, world):
        lane = Lane(world)
        lane.pump.set_window(2 * PAGE)
        return lane

    def test_a_chain_goes_as_soon_as_there_is_room(self, lane):
        for number in range(6):
            lane.offer((number * PAGE, 16), (8 * PAGE, PAGE, True))
        assert lane.step() == 2
        assert lane.step() == 0
        assert lane.pump.rest() is False, "it waits, and nobody looks"
        for left in (3, 2, 1, 0):
            lane.complete(lane.take())
            assert lane.pump.rest() is True
            assert lane.step() == 2, "one is completed, and one is offered"
            assert lane.counter("outstanding") == 2
            assert lane.counter("chains") == 6 - left
        assert lane.counter("stalls") == 0, "these are for want of room"
        assert lane.counter("window") == 2 * PAGE

    def test_one_chain_always_goes(self, lane):
        lane.pump.set_window(0)
        for _ in range(2):
            lane.offer((0, 16), (PAGE, 64 * PAGE, True))
        assert lane.step() == 1
        lane.complete(lane.take())
        assert lane.step() == 2

    def test_buffers_that_wait_for_a_packet_are_never_held(self, lane):
        for _ in range(8):
            lane.offer((PAGE, PAGE, True))
        assert lane.step() == 8

    def test_chains_that_a_stop_left_behind_hold_nobody_for_ever(self, world):
        """Their pages are in use, and may be for long."""
        lane = Lane(world)
        for _ in range(4):
            lane.offer((0, 16), (PAGE, PAGE, True))
        lane.step()
        lane.take()
        lane.start(lane.stop(4)[0] + 8)
        lane.reset(12)
        lane.pump.set_window(PAGE)
        assert lane.counter("quarantined") == 4
        lane.offer((0, 16), (PAGE, PAGE, True))
        assert lane.step() == 1

    def test_a_held_chain_is_the_guests_again_after_a_stop(self, lane):
        for number in range(4):
            lane.offer((number * PAGE, 16), (8 * PAGE, PAGE, True))
        lane.step()
        lane.complete(lane.take())
        lane.complete(lane.take())
        lane.pump.set_taking(False)
        lane.step()
        base, unfinished, _ = lane.stop(2)
        assert (base, unfinished) == (2, 0)
        lane.start(base)
        assert lane.step() == 2

    def test_the_next_start_forgets_it(self, lane):
        for number in range(6):
            lane.offer((number * PAGE, 16), (8 * PAGE, PAGE, True))
        lane.step()
        lane.start(lane.stop(0)[0])
        assert lane.counter("window") == 0
        assert lane.step() == 6


class TestSetUp:
    @pytest.mark.parametrize("size", [0, 3, 12, 15])
    def test_a_size_that_is_no_power_of_two_is_refused(self, size):
        world = World()
        lane = Lane(world, start=False)
        lane.start(0)
        lane.stop(None)
        lane.size = size
        with pytest.raises(ValueError, match=f"^{size} entries"):
            lane.start(0)
        assert not lane.pump.attached

    def test_a_ring_has_no_more_entries_than_slots(self, world):
        lane = Lane(world, size=16)
        lane.stop(None)
        with pytest.raises(ValueError, match="ring 0: 32 entries, but fewer slots"):
            lane.pump.attach(
                size=32,
                base=0,
                guest=lane.guest_places,
                guest_event_idx=True,
                guest_indirect=True,
                shadow=world.isolated.host(lane.area_at),
                shadow_event_idx=True,
                shadow_indirect=True,
            )

    def test_it_is_attached_once(self, world):
        lane = Lane(world)
        with pytest.raises(ValueError, match="attached already"):
            lane.start(0)

    def test_it_is_detached_once(self, world):
        lane = Lane(world)
        assert lane.pump.detach() == (0, 0, True)
        with pytest.raises(ValueError, match="not attached"):
            lane.pump.detach()

    def test_an_unknown_policy_is_refused(self):
        with pytest.raises(KeyError):
            Pump(0, GuestMemory(), Pool(MIB, largest=MIB), "some")
        assert set(POLICIES) == {"full", "used", "used+tail"}

    @pytest.mark.parametrize("size", [1, 2, 4, 128, 1024])
    def test_parts_of_the_shadow_ring_are_apart_and_aligned(self, world, size):
        lane = Lane(world, size=size)
        desc, avail, used = (at - lane.area_at for at in lane.shadow_parts)
        assert (desc, avail % 2, used % 4) == (0, 0, 0)
        assert avail >= desc + 16 * size
        assert used >= avail + 6 + 2 * size
        assert shadow_bytes(size) >= used + 6 + 8 * size
        assert slot_bytes(size) == 512 * size

    def test_a_ring_starts_with_zeroed_memory_and_no_old_chains(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.step()
        base, unfinished, last = lane.stop(0)
        assert (base, unfinished, last) == (0, 0, True)
        for at in lane.rings_at:
            world.isolated.view(at, shadow_bytes(lane.size))[:] = bytes(
                [255] * shadow_bytes(lane.size)
            )
        lane.start(base)
        assert lane.step() == 1
        assert lane.device.take() is not None
        assert lane.device.take() is None

    def test_regression_the_pool_outlives_a_pump_that_is_cyclic_garbage(self):
        """The collector took the pool from the pump before its end. (ASan sees it.)"""
        for _ in range(10):
            world = World(pool=64 * PAGE)
            lane = Lane(world)
            lane.offer((0, 3 * PAGE), (0x8000, PAGE, True))
            assert lane.step() == 1
            cycle: list[object] = [lane.pump]
            cycle.append(cycle)
            del lane.pump, world.pool, cycle
            gc.collect()


NOTIFICATIONS = list(itertools.product([False, True], repeat=2))


@pytest.mark.parametrize(("guest_event_idx", "back_event_idx"), NOTIFICATIONS)
class TestNotifications:
    @pytest.fixture
    def lane(self, world, guest_event_idx, back_event_idx):
        return Lane(
            world,
            size=8,
            base=0xFFFA,
            guest_event_idx=guest_event_idx,
            back_event_idx=back_event_idx,
        )

    def test_a_kick_goes_to_a_back_that_asked(self, lane):
        for _ in range(20):
            lane.offer(READ)
            assert not lane.device.arm()
            assert lane.pump.step() == (1, False, True)
            lane.device.disarm()
            lane.complete(lane.take())
            lane.step()
            lane.used()

    def test_no_kick_goes_to_a_back_that_looks_by_itself(self, lane):
        lane.device.arm()
        lane.offer(READ)
        assert lane.pump.step()[2]
        lane.device.disarm()
        for _ in range(20):
            lane.offer(READ)
            assert lane.pump.step() == (1, False, False)
            lane.complete(lane.take())
            lane.step()
            lane.used()

    def test_one_kick_is_enough_for_a_batch(self, lane):
        lane.device.arm()
        for _ in range(5):
            lane.offer(READ)
        assert lane.pump.step() == (5, False, True)
        assert lane.pump.step() == (0, False, False)

    def test_a_call_goes_to_a_guest_that_asked(self, lane):
        for _ in range(20):
            lane.offer(READ)
            lane.step()
            assert not lane.driver.arm()
            lane.complete(lane.take())
            assert lane.pump.step() == (1, True, False)
            lane.driver.disarm()
            assert len(lane.used()) == 1

    def test_no_call_goes_to_a_guest_that_looks_by_itself(self, lane):
        lane.driver.arm()
        for called in [True, *([False] * 20)]:
            lane.offer(READ)
            lane.step()
            lane.complete(lane.take())
            assert lane.pump.step() == (1, called, False)
            lane.driver.disarm()
            lane.used()

    def test_one_call_is_enough_for_a_step(self, lane):
        lane.driver.arm()
        for _ in range(4):
            lane.offer(READ)
        lane.step()
        for _ in range(4):
            lane.complete(lane.take())
        assert lane.pump.step() == (4, True, False)

    def test_the_guest_kicks_a_pump_that_rests_and_none_other(self, lane):
        lane.driver.kick_needed()
        for _ in range(20):
            assert not lane.pump.rest()
            lane.offer(READ)
            assert lane.driver.kick_needed()
            assert lane.step() == 1
            lane.offer(READ)
            assert not lane.driver.kick_needed()
            assert lane.step() == 1
            for _ in range(2):
                lane.complete(lane.take())
            lane.step()
            lane.used()

    def test_the_back_calls_a_pump_that_rests_and_none_other(self, lane):
        for _ in range(20):
            lane.offer(READ)
            lane.offer(READ)
            lane.step()
            assert not lane.pump.rest()
            lane.complete(lane.take())
            assert lane.device.call_needed()
            lane.step()
            lane.complete(lane.take())
            assert not lane.device.call_needed()
            assert lane.step() == 1
            lane.used()

    def test_rest_sees_what_came_before_it(self, lane):
        lane.offer(READ)
        assert lane.pump.rest()
        lane.step()
        assert not lane.pump.rest()
        lane.complete(lane.take())
        assert lane.pump.rest()
        lane.step()
        assert not lane.pump.rest()

    def test_regression_a_bad_completion_does_not_cost_the_next_call(self, lane):
        """The pump had moved past its event index and thought it still armed."""
        lane.offer(READ)
        lane.step()
        chain = lane.take()
        assert not lane.pump.rest()
        lane.device.complete((chain.head + 1) % lane.size)
        lane.device.publish()
        assert lane.device.call_needed()
        assert lane.step() == 0
        assert not lane.pump.rest()
        lane.complete(chain)
        assert lane.device.call_needed()

    @pytest.mark.parametrize("by_another", [False, True])
    def test_a_ring_that_waits_for_room_asks_for_no_kicks(
        self, by_another, guest_event_idx, back_event_idx
    ):
        world = World(pool=2 * PAGE)
        events = {"guest_event_idx": guest_event_idx, "back_event_idx": back_event_idx}
        lane, other = Lane(world, **events), Lane(world, **events)
        full = other if by_another else lane
        for i in range(2):
            full.offer((PAGE * i, PAGE, True))
        full.step()
        lane.used()
        lane.pump.rest()
        lane.driver.kick_needed()
        lane.offer((0, PAGE, True))
        assert lane.driver.kick_needed()
        assert lane.step() == 0
        assert not lane.pump.rest()
        lane.offer((0, PAGE, True))
        assert not lane.driver.kick_needed()
        assert not lane.pump.rest()
        # There is room: it goes on by itself, and wants kicks again.
        for _ in range(2):
            full.complete(full.take())
        full.step()
        lane.step()
        assert lane.take()
        assert not lane.pump.rest()
        lane.offer((0, 16))
        assert lane.driver.kick_needed()


@pytest.mark.parametrize("event_idx", [False, True])
def test_i6_event_words_of_the_guest_only_suppress_calls(world, event_idx):
    lane = Lane(world, size=4, guest_event_idx=event_idx)
    for word in (0, 1, 0x7FFF, 0xFFFF):
        lane.ring.avail_flags = word
        lane.ring.used_event = word
        lane.offer(READ)
        assert lane.step() == 1
        lane.complete(lane.take())
        assert lane.step() == 1
        assert len(lane.used()) == 1
    assert lane.counter("calls") <= 4


class TestLeftBehind:
    """Chains that a stop leaves with the back, which may complete them at any time."""

    def stopped(self, world, *, done=(), chains=4, **options):
        """A ring that stopped with all of its chains but `done` at the back."""
        lane = Lane(world, size=8, **options)
        heads = [lane.offer((PAGE * i, PAGE, True)) for i in range(chains)]
        lane.step()
        old = [lane.take() for _ in range(chains)]
        for i in done:
            lane.complete(old[i], b"done")
        lane.step()
        lane.used()
        base, unfinished, last = lane.stop(chains)
        assert unfinished == chains - len(done)
        return lane, heads, old, base, last

    def late(self, lane, chain, data=b""):
        """The back completes a chain in the ring that it has by now."""
        view = lane.world.isolated.view
        room = next(b for b in chain.buffers if b.writable)
        view(room.addr, len(data))[:] = data
        lane.device.complete(chain.head, len(data))
        lane.device.publish()

    def test_the_guest_offers_the_last_ones_again_and_the_back_gets_them_once(
        self, world
    ):
        lane, heads, old, base, last = self.stopped(world, done=[0])
        assert (base, last) == (1, True)
        lane.start(base)
        assert lane.step() == 3
        assert lane.device.take() is None
        assert lane.counter("adopted") == 3
        assert lane.used() == []
        for i in (3, 1, 2):
            self.late(lane, old[i], b"late %d" % i)
        assert lane.step() == 3
        assert [head for head, _ in lane.used()] == [heads[i] for i in (3, 1, 2)]
        for i in (1, 2, 3):
            assert world.ram.read(PAGE * i, 6) == b"late %d" % i
        assert lane.pump.quarantined == 0
        assert world.pool.used == 0

    def test_new_chains_follow_those_that_were_adopted(self, world):
        lane, _, old, base, _ = self.stopped(world)
        lane.start(base)
        lane.step()
        new = lane.offer((5 * PAGE, PAGE, True))
        assert lane.step() == 1
        chain = lane.take()
        assert chain.head not in {c.head for c in old}
        lane.complete(chain, b"new")
        lane.step()
        assert [head for head, _ in lane.used()] == [new]
        # All four are before it: a stop can't say that with a base.
        assert lane.stop(1) == (5, 4, False)

    @pytest.mark.parametrize("said", [None, 0, 3, 0x7FFF, 0xFFFF])
    def test_what_was_adopted_is_not_handed_back(self, world, said):
        """The back has it, whatever it says of the ring that came after."""
        lane, _, _, base, _ = self.stopped(world)
        lane.start(base)
        for i in range(2):
            lane.offer(((5 + i) * PAGE, PAGE, True))
        assert lane.step() == 6
        # Of the two new chains it has fetched none for sure.
        assert lane.stop(said) == (0, 4, True)
        assert lane.pump.quarantined == 4
        assert world.pool.used == 4 * PAGE

    @pytest.mark.parametrize("when", ["stopped", "started"])
    def test_a_completion_between_stop_and_start_is_found(self, world, when):
        """Asynchronous back-ends write it to the ring that they have just left."""
        lane, heads, old, base, _ = self.stopped(world)
        self.late(lane, old[0], b"late")
        if when == "stopped":
            lane.pump.look_back()
            assert lane.pump.quarantined == 3
        assert world.ram.read(0, 4) != b"late"
        lane.start(base)
        assert lane.step() == 4
        assert [head for head, _ in lane.used()] == [heads[0]]
        assert world.ram.read(0, 4) == b"late"
        assert lane.pump.outstanding == 3

    def test_they_are_in_flight_as_before_if_later_ones_were_done(self, world):
        lane, heads, old, base, last = self.stopped(world, done=[1, 3])
        assert (base, last) == (4, False)
        self.late(lane, old[0], b"soon")
        calls = lane.counter("calls")
        lane.start(base)
        assert lane.counter("calls") == calls + 1
        assert lane.pump.step() == (0, True, False)
        assert [head for head, _ in lane.used()] == [heads[0]]
        assert lane.pump.outstanding == 1
        self.late(lane, old[2], b"late")
        assert lane.step() == 1
        assert [head for head, _ in lane.used()] == [heads[2]]
        assert world.ram.read(0, 4) == b"soon"
        assert world.ram.read(2 * PAGE, 4) == b"late"
        assert world.pool.used == 0

    def test_a_head_that_is_in_flight_still_may_not_be_offered(self, world):
        lane, heads, *_, base, _ = self.stopped(world, done=[3])
        lane.start(base)
        lane.ring.set_avail_entry(base & 7, heads[0])
        lane.ring.avail_idx = base + 1
        lane.step()
        assert lane.fault == "the guest offered a head that is still in flight"

    def test_c1_a_late_completion_ends_no_other_chain(self, world):
        """The guest has reset its ring: it waits for none of the old chains."""
        lane, _, old, *_ = self.stopped(world)
        lane.ring.avail_idx = lane.ring.used_idx = 0
        lane.driver = DriverRing(lane.ring, base=0, event_idx=True)
        lane.start(0)
        assert lane.pump.quarantined == 4
        new = [lane.offer((PAGE * (8 + i), PAGE, True)) for i in range(2)]
        assert lane.step() == 2
        chains = [lane.take() for _ in new]
        assert not {c.head for c in chains} & {c.head for c in old}
        for chain in old:
            self.late(lane, chain, b"old")
        lane.step()
        assert lane.used() == []
        assert lane.pump.quarantined == 0
        assert lane.counter("violations") == 0
        for chain in chains:
            lane.complete(chain, b"new")
        lane.step()
        assert sorted(head for head, _ in lane.used()) == sorted(new)
        assert world.ram.read(8 * PAGE, 3) == b"new"
        assert b"old" not in world.ram.read(0, 2 * MIB)
        assert world.pool.used == 0

    def test_a_ring_reset_to_the_base_where_it_stopped_is_another_one(self, world):
        """Its used index says so: what was not done then would be done now."""
        lane, _, old, base, last = self.stopped(world, done=[1, 3])
        assert (base, last) == (4, False)
        lane.reset(base)
        lane.start(base)
        assert (lane.pump.outstanding, lane.pump.quarantined) == (0, 2)
        head = lane.offer((8 * PAGE, PAGE, True))
        lane.step()
        new = lane.take()
        for i in (0, 2):
            self.late(lane, old[i], b"late")
        lane.step()
        assert lane.used() == []
        assert b"late" not in world.ram.read(0, 4 * PAGE)
        lane.complete(new)
        lane.step()
        assert lane.used() == [(head, 0)]

    @pytest.mark.parametrize("told", [True, False], ids=["it says so", "by its index"])
    def test_a_back_that_has_broken_the_ring_gets_the_chain_again(self, world, told):
        """It may have forgotten the first one, which ends for nobody."""
        lane = Lane(world, size=8)
        head = lane.offer((0, PAGE, True))
        lane.step()
        old = lane.take()
        if told:
            lane.pump.set_fault(BACK_SIGNALLED)
        else:
            lane.shadow.used_idx = 9
        lane.step()
        assert lane.fault is not None
        base, _, last = lane.stop(1)
        assert (base, last) == (0, True)
        lane.start(base)
        assert lane.step() == 1
        new = lane.take()
        assert new.head != old.head
        self.late(lane, old, b"old")
        lane.complete(new, b"new")
        lane.step()
        assert lane.used() == [(head, 3)]
        assert world.ram.read(0, 3) == b"new"
        assert (lane.counter("adopted"), lane.pump.quarantined) == (0, 0)

    def test_a_back_that_has_broken_the_ring_may_end_chains_that_nobody_offers(
        self, world
    ):
        """A later chain is done, so the base lies behind all of them."""
        lane = Lane(world, size=8)
        heads = [lane.offer((i * PAGE, PAGE, True)) for i in range(3)]
        lane.step()
        first, second, third = [lane.take() for _ in heads]
        lane.complete(second)
        lane.step()
        lane.pump.set_fault(BACK_SIGNALLED)
        base, unfinished, again = lane.stop(3)
        assert (base, unfinished, again) == (3, 2, False)
        lane.start(base)
        for chain in (first, third):
            self.late(lane, chain, b"old")
        while lane.step():
            pass
        assert [head for head, _ in lane.used()] == [heads[1], heads[0], heads[2]]

    def test_another_chain_in_its_place_is_no_adoption(self, world):
        """The same head and base, but other bytes for the device to read."""
        lane = Lane(world, size=8)
        world.ram.write(0, b"write 1")
        head = lane.offer((0, 7), (PAGE, 16, True))
        lane.step()
        old = lane.take()
        base, _, last = lane.stop(1)
        assert (base, last) == (0, True)
        world.ram.write(0, b"write 2")
        lane.start(base)
        assert lane.step() == 1
        new = lane.take()
        assert lane.bytes_of(new) == b"write 2"
        assert new.head != old.head
        self.late(lane, old, b"1")
        lane.step()
        assert lane.used() == []
        lane.complete(new, b"2")
        lane.step()
        assert [got for got, _ in lane.used()] == [head]
        assert lane.counter("adopted") == 0

    def test_adoption_goes_on_over_a_second_stop(self, world):
        lane, heads, old, base, _ = self.stopped(world)
        lane.start(base)
        assert lane.step(2) == 2
        self.late(lane, old[1], b"late 1")
        lane.step(0)
        lane.pump.step(0)
        lane.pump.set_taking(False)
        lane.step()
        assert [head for head, _ in lane.used()] == [heads[1]]
        base, unfinished, last = lane.stop(0)
        # Of the two that were adopted the first is not done; the others wait untouched.
        assert (base, unfinished, last) == (2, 1, False)
        lane.start(base)
        assert lane.step() == 2
        assert lane.device.take() is None
        for i in (0, 2, 3):
            self.late(lane, old[i], b"late %d" % i)
        lane.step()
        assert [head for head, _ in lane.used()] == [heads[i] for i in (0, 2, 3)]
        assert world.pool.used == 0

    def test_a_slot_that_the_back_has_is_never_used_again(self, world):
        """However often the ring is started, until the back completes it."""
        lane, _, old, *_ = self.stopped(world, chains=3)
        for _ in range(20):
            lane.ring.avail_idx = lane.ring.used_idx = 0
            lane.driver = DriverRing(lane.ring, base=0, event_idx=True)
            lane.start(0)
            lane.offer((8 * PAGE, PAGE, True))
            lane.step()
            chain = lane.take()
            assert chain.head not in {c.head for c in old}
            lane.complete(chain)
            lane.step()
            assert len(lane.used()) == 1
            assert lane.stop(1) == (1, 0, True)
            assert lane.pump.quarantined == 3

    def test_a_ring_all_in_quarantine_takes_no_chains(self, world):
        lane = Lane(world, size=2)
        for i in range(2):
            lane.offer((PAGE * i, PAGE, True))
        lane.step()
        old = [lane.take(), lane.take()]
        lane.stop(2)
        lane.ring.avail_idx = lane.ring.used_idx = 0x10
        lane.driver = DriverRing(lane.ring, base=0x10, event_idx=True)
        lane.start(0x10)
        lane.offer((8 * PAGE, PAGE, True))
        assert lane.step() == 0
        assert lane.pump.fault == 0
        assert not lane.pump.rest()
        self.late(lane, old[1])
        assert lane.step() == 2
        assert lane.take().head == old[1].head

    def test_a_slot_of_several_descriptors_leaves_quarantine_whole(self, world):
        lane = Lane(world, size=4, back_indirect=False)
        lane.offer((0, 16), (PAGE, 16, True), (2 * PAGE, 16, True))
        lane.step()
        old = lane.take()
        lane.stop(1)
        lane.ring.avail_idx = lane.ring.used_idx = 9
        lane.driver = DriverRing(lane.ring, base=9, event_idx=True)
        lane.start(9)
        self.late(lane, old)
        lane.step()
        assert lane.pump.quarantined == 0
        # All four descriptors are there again.
        lane.offer((0, 16), (PAGE, 16), (2 * PAGE, 16), (3 * PAGE, 16, True))
        assert lane.step() == 1
        assert len(lane.take().buffers) == 4

    def test_another_size_is_another_ring(self, world):
        lane = Lane(world, size=4)
        lane.offer((0, PAGE, True))
        lane.step()
        old = lane.take()
        lane.stop(1)
        other = Lane(world, size=64, start=False)
        other.pump = lane.pump
        slots_at = world.add_isolated(slot_bytes(60))
        other.pump.add_slots(64, world.isolated.host(slots_at), slots_at)
        other.start(0)
        for i in range(64):
            other.offer((PAGE * (i % 32), 700, True))
        assert other.step() == 63
        assert other.pump.quarantined == 1
        heads = {other.take().head for _ in range(63)}
        assert len(heads) == 63
        assert old.head not in heads
        assert other.stop(63) == (0, 63, True)
        assert other.pump.quarantined == 64
        # Smaller again: the numbers of its slots may be beyond the ring.
        lane.ring.avail_idx = lane.ring.used_idx = 0
        lane.start(0)
        for head in [old.head, *heads]:
            lane.device.complete(head)
            lane.device.publish()
            lane.step()
        assert other.pump.quarantined == 0
        assert world.pool.used == 0
        del other.pump, lane.pump

    def test_f8_without_a_base_a_ring_starts_at_the_used_index(self, world):
        lane = Lane(world, size=8, start=False)
        lane.ring.avail_idx = lane.ring.used_idx = 0xFFFE
        lane.driver = DriverRing(lane.ring, base=0xFFFE, event_idx=True)
        lane.start(None)
        assert lane.pump.base == 0xFFFE
        heads = [lane.offer((PAGE * i, PAGE, True)) for i in range(3)]
        assert lane.step() == 3
        for _ in heads:
            lane.complete(lane.take())
        lane.step()
        assert [head for head, _ in lane.used()] == heads
        assert lane.stop(3) == (1, 0, True)


class TestAnotherBack:
    """The back is gone, and another one takes its place."""

    def lost(self, world, *, done=(), chains=4, **options):
        """A ring whose back is gone with all of its chains but `done`."""
        lane = Lane(world, size=16, **options)
        heads = [
            lane.offer((PAGE * i, 6), (PAGE * (8 + i), PAGE, True))
            for i in range(chains)
        ]
        for i in range(chains):
            world.ram.write(PAGE * i, b"read %d" % i)
        lane.step()
        old = [lane.take() for _ in range(chains)]
        for i in done:
            lane.complete(old[i], b"done")
        lane.step()
        assert len(lane.used()) == len(done)
        found = lane.stop(None)
        world.lose_back()
        return lane, heads, found

    def finish(self, lane, count):
        """The back completes so many chains; returns the bytes that it has read."""
        read = []
        for _ in range(count):
            chain = lane.take()
            read.append(lane.bytes_of(chain))
            lane.complete(chain, b"again")
        while lane.step():
            pass
        assert lane.device.take() is None
        return read

    def test_the_guest_has_the_last_ones_still(self, world):
        lane, heads, (base, *_) = self.lost(world)
        assert base == 0
        lane.start(base)
        assert lane.step() == 4
        assert self.finish(lane, 4) == [b"read %d" % i for i in range(4)]
        assert lane.used() == [(head, 5) for head in heads]
        assert lane.counter("replayed") == 0

    def test_those_in_the_middle_are_offered_again_first_and_in_order(self, world):
        lane, heads, (base, unfinished, last) = self.lost(world, done=[1, 4], chains=6)
        assert (base, unfinished, last) == (5, 3, False)
        lane.start(base)
        assert lane.step() == 3
        assert lane.step() == 1
        assert self.finish(lane, 4) == [b"read %d" % i for i in (0, 2, 3, 5)]
        assert [head for head, _ in lane.used()] == [heads[i] for i in (0, 2, 3, 5)]
        for i in (0, 2, 3, 5):
            assert world.ram.read(PAGE * (8 + i), 5) == b"again"
        assert lane.counter("replayed") == 3
        assert world.pool.used == 0

    def test_their_bytes_are_read_again_and_their_descriptors_are_not(self, world):
        lane, heads, (base, *_) = self.lost(world, done=[1, 2, 3])
        world.ram.write(0, b"newer!")
        world.ram.write(lane.ring_at + 16 * heads[0], bytes(16))
        lane.start(base)
        lane.step()
        assert self.finish(lane, 1) == [b"newer!"]

    def test_a_head_that_is_offered_again_is_in_flight(self, world):
        lane, heads, (base, *_) = self.lost(world, done=[1])
        lane.start(base)
        lane.step()
        lane.ring.set_avail_entry(base & 15, heads[0])
        lane.ring.avail_idx = base + 1
        lane.step()
        assert lane.fault == "the guest offered a head that is still in flight"

    def test_a_ring_that_was_reset_waits_for_none(self, world):
        lane, *_ = self.lost(world, done=[1])
        lane.ring.avail_idx = lane.ring.used_idx = 0
        lane.driver = DriverRing(lane.ring, base=0, event_idx=True)
        lane.start(0)
        assert lane.step() == 0
        new = [lane.offer((PAGE * i, PAGE, True)) for i in range(8)]
        assert lane.step() == 8
        assert self.finish(lane, 8) == [b""] * 8
        assert [head for head, _ in lane.used()] == new

    def test_without_room_they_wait_and_nothing_else_is_taken(self):
        world = World(pool=4 * PAGE)
        lane = Lane(world, size=8)
        for i in range(3):
            lane.offer((PAGE * i, PAGE, True))
        lane.step()
        chains = [lane.take() for _ in range(3)]
        lane.complete(chains[2])
        lane.step()
        base, *_ = lane.stop(None)
        world.lose_back()
        other = Lane(world, size=8)
        for i in range(3):
            other.offer((PAGE * i, PAGE, True))
        assert other.step() == 3
        lane.start(base)
        lane.offer((PAGE, 16, True))
        assert lane.step() == 1
        assert lane.step() == 0
        assert not lane.pump.rest()
        for _ in range(3):
            other.complete(other.take())
        other.step()
        assert lane.step() == 1
        assert lane.step() == 1
        assert lane.counter("replayed") == 2

    def test_a_stop_before_they_were_fetched_keeps_them(self, world):
        """The new back is asked to stop before it has seen all of them."""
        lane, heads, (base, *_) = self.lost(world, done=[1, 4], chains=6)
        lane.start(base)
        lane.step()
        lane.step()
        lane.complete(lane.take(), b"again")
        lane.step()
        assert lane.used() == [(heads[0], 5)]
        assert lane.stop(1) == (5, 2, False)
        assert lane.pump.quarantined == 0
        lane.start(base)
        assert lane.step() == 2
        assert lane.step() == 1
        assert self.finish(lane, 3) == [b"read %d" % i for i in (2, 3, 5)]
        assert [head for head, _ in lane.used()] == [heads[i] for i in (2, 3, 5)]
        assert world.pool.used == 0

    def test_several_backs_may_be_lost_one_after_the_other(self, world):
        lane, heads, (base, *_) = self.lost(world, done=[1, 4], chains=6)
        for _ in range(3):
            lane.start(base)
            lane.step()
            lane.take()
            base, unfinished, last = lane.stop(None)
            assert (base, unfinished, last) == (5, 3, False)
            world.lose_back()
        lane.start(base)
        lane.step()
        lane.step()
        assert self.finish(lane, 4) == [b"read %d" % i for i in (0, 2, 3, 5)]
        assert [head for head, _ in lane.used()] == [heads[i] for i in (0, 2, 3, 5)]

    def test_chains_of_before_a_stop_are_recalled_too(self, world):
        """The ring stands still when the back is lost: some are done meanwhile."""
        lane = Lane(world, size=8)
        heads = [lane.offer((PAGE * i, PAGE, True)) for i in range(4)]
        lane.step()
        old = [lane.take() for _ in range(4)]
        lane.complete(old[3])
        lane.step()
        lane.used()
        base, *_ = lane.stop(4)
        assert lane.pump.quarantined == 3
        lane.device.complete(old[0].head, 0)
        lane.device.publish()
        lane.pump.look_back()
        world.lose_back()
        assert lane.pump.quarantined == 0
        lane.start(base)
        assert lane.step() == 3
        self.finish(lane, 3)
        assert [head for head, _ in lane.used()] == heads[:3]

    def test_a_quarantine_ends_with_its_back(self, world):
        lane = Lane(world, size=2)
        for i in range(2):
            lane.offer((PAGE * i, PAGE, True))
        lane.step()
        lane.stop(None)
        lane.ring.avail_idx = lane.ring.used_idx = 0
        lane.driver = DriverRing(lane.ring, base=0, event_idx=True)
        lane.start(0)
        lane.stop(None)
        world.lose_back()
        lane.start(0)
        for i in range(2):
            lane.offer((PAGE * i, PAGE, True))
        assert lane.step() == 2

    def test_memory_that_is_gone_meanwhile_breaks_the_ring(self, world):
        lane, _, (base, *_) = self.lost(world, done=[1])
        world.set_regions(without=[0])
        lane.start(base)
        assert lane.step() == 0
        assert lane.fault == "a descriptor points outside of the guest's memory"

    def test_a_ring_that_is_started_loses_no_back(self, world):
        with pytest.raises(ValueError, match="ring 0 is attached"):
            Lane(world).pump.lose_back()


class TestStop:
    @pytest.mark.parametrize("base", [0, 5, 0xFFFC])
    @pytest.mark.parametrize("before", [0, 3, 17])
    def test_what_the_back_did_not_fetch_is_handed_back(self, world, base, before):
        lane = Lane(world, size=8, base=base)
        run_chains(lane, before)
        heads = [lane.offer((PAGE * i, 16 + i)) for i in range(6)]
        lane.step()
        fetched = [lane.take() for _ in range(2)]
        for chain in fetched:
            lane.complete(chain)
        lane.step()
        assert [head for head, _ in lane.used()] == heads[:2]
        again, unfinished, last = lane.stop(lane.device.next_avail)
        assert again == (base + before + 2) & 0xFFFF
        assert (unfinished, last) == (0, True)
        assert world.pool.used == 0
        lane.start(again)
        assert lane.step() == 4
        for i in range(2, 6):
            chain = lane.take()
            assert chain.buffers[0].length == 16 + i
            lane.complete(chain)
        lane.step()
        assert [head for head, _ in lane.used()] == heads[2:]

    def test_a_chain_that_waits_for_room_is_handed_back(self):
        world = World(pool=2 * PAGE)
        lane = Lane(world, size=8)
        heads = [lane.offer((PAGE * i, PAGE, True)) for i in range(4)]
        assert lane.step() == 2
        assert lane.stop(0) == (0, 0, True)
        lane.start(0)
        for _ in range(4):
            lane.step()
            lane.complete(lane.take())
        lane.step()
        assert [head for head, _ in lane.used()] == heads

    def test_the_last_ones_are_told_from_those_in_the_middle(self, world):
        for done, base, unfinished, last in [(0, 1, 2, True), (1, 3, 2, False)]:
            lane = Lane(world, size=4)
            for i in range(4):
                lane.offer((PAGE * i, PAGE, True))
            lane.step()
            chains = [lane.take() for _ in range(3)]
            lane.complete(chains[done])
            lane.step()
            assert lane.stop(3) == (base, unfinished, last)
            assert lane.pump.quarantined == 2

    @pytest.mark.parametrize("said", [None, 0, 1, 2, 9, 0x7FFF, 0xFFFF])
    def test_regression_what_the_back_completed_is_never_handed_back(self, world, said):
        """Done out of order, the number of completions says less than their places."""
        lane = Lane(world, size=8)
        for i in range(6):
            lane.offer((PAGE * i, PAGE, True))
        lane.step()
        chains = [lane.take() for _ in range(4)]
        lane.complete(chains[3])
        lane.step()
        lane.used()
        # It has fetched at least 4 of 6, whatever it says.
        base, unfinished, last = lane.stop(said)
        assert (base, unfinished, last) == (4, 3, False)

    def test_a_chain_may_stay_out_while_positions_wrap_round(self, world):
        lane = Lane(world, size=2, base=0xFFF0)
        slow = lane.offer((0, 16, True))
        lane.step()
        slow_chain = lane.take()
        run_chains(lane, 300)
        base, unfinished, last = lane.stop(301)
        assert (base, unfinished, last) == ((0xFFF0 + 301) & 0xFFFF, 1, False)
        lane.start(base)
        lane.complete(slow_chain)
        lane.step()
        assert [head for head, _ in lane.used()] == [slow]

    def test_positions_wrap_round_more_than_once(self, world):
        lane = Lane(world, size=1024, base=0xFF00)
        batches = 2 if SANITIZED else 140
        for _ in range(batches):
            for _ in range(1000):
                lane.driver.offer([Buffer(0, 64)])
            lane.driver.publish()
            while lane.step():
                pass
            while chain := lane.device.take():
                lane.device.complete(chain.head)
            lane.device.publish()
            while lane.step():
                pass
            assert len(lane.used()) == 1000
        base, unfinished, _ = lane.stop(lane.device.next_avail)
        assert base == (0xFF00 + batches * 1000) & 0xFFFF
        assert unfinished == 0

    def test_i8_after_a_stop_guest_memory_is_not_written(self, world):
        lane = Lane(world, size=8)
        for i in range(4):
            lane.offer((PAGE * i, PAGE, True))
        lane.step()
        chains = [lane.take() for _ in range(4)]
        lane.complete(chains[0], b"in time")
        lane.stop(4)
        before = {at: bytes(piece.view) for at, piece in world.ram.pieces.items()}
        for chain in chains[1:]:
            lane.complete(chain, b"late")
        assert lane.pump.step() == (0, False, False)
        assert lane.pump.rest() is False
        lane.pump.set_taking(True)
        lane.pump.step()
        for at, piece in world.ram.pieces.items():
            assert piece.view == before[at]

    def test_whoever_comes_next_gets_kicks(self, world):
        lane = Lane(world, guest_event_idx=False)
        lane.pump.rest()
        lane.offer(READ)
        lane.step()
        assert lane.ring.used_flags == 1
        lane.stop(1)
        assert lane.ring.used_flags == 0


class TestDrain:
    def test_nothing_in_flight_is_drained(self, world):
        lane = Lane(world)
        assert lane.pump.drained
        lane.offer(READ)
        assert lane.pump.drained

    def test_with_event_idx_it_is_drained_when_all_is_done_that_was_fetched(
        self, world
    ):
        lane = Lane(world)
        for _ in range(4):
            lane.offer(READ)
        lane.step()
        chains = [lane.take() for _ in range(2)]
        lane.device.arm()
        assert not lane.pump.drained
        lane.complete(chains[0])
        lane.step()
        assert not lane.pump.drained
        lane.complete(chains[1])
        assert not lane.pump.drained
        lane.step()
        assert lane.pump.drained
        assert lane.pump.outstanding == 2

    def test_without_event_idx_it_is_drained_when_nothing_is_in_flight(self, world):
        lane = Lane(world, back_event_idx=False)
        for _ in range(2):
            lane.offer(READ)
        lane.step()
        lane.complete(lane.take())
        lane.step()
        assert not lane.pump.drained
        lane.complete(lane.take())
        assert not lane.pump.drained
        lane.step()
        assert lane.pump.drained

    def test_a_back_may_tell_how_far_it_has_fetched(self, world):
        lane = Lane(world)
        for _ in range(4):
            lane.offer(READ)
        lane.step()
        chain = lane.take()
        lane.take()
        lane.device.arm()
        assert lane.pump.tells
        assert lane.pump.owes(2) == 2
        lane.complete(chain)
        lane.step()
        assert lane.pump.owes(2) == 1
        assert lane.pump.tells
        for lie in (0, 5, 0x8000, 0xFFFF):
            lane.shadow.avail_event = lie
            assert not lane.pump.tells
        lane.stop(2)
        assert not lane.pump.tells

    def test_without_event_idx_it_does_not_tell(self, world):
        lane = Lane(world, back_event_idx=False)
        lane.offer(READ)
        lane.step()
        lane.take()
        assert not lane.pump.tells
        assert lane.pump.owes(1) == 1

    def test_a_detached_pump_is_drained(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.step()
        lane.device.take()
        lane.device.arm()
        assert not lane.pump.drained
        lane.stop(1)
        assert lane.pump.drained


def places(host, guest, layout):
    """Our addresses of a ring's parts, and the guest's."""
    return [(host + at, guest + at) for at in (layout.desc, layout.avail, layout.used)]


class TestMove:
    def test_the_ring_goes_on_at_other_addresses(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.step()
        there = world.add_ram(lane.layout.end)
        here = world.ram.view(lane.ring_at, lane.layout.end)
        world.ram.view(there, lane.layout.end)[:] = here
        host = world.ram.host(there)
        layout = lane.layout
        lane.pump.move(places(host, there, layout))
        before = bytes(here)
        lane.complete(lane.take())
        assert lane.step() == 1
        assert bytes(here) == before
        used = world.ram.read(there + layout.used, 12)
        assert used[2:4] == b"\1\0"

    @pytest.mark.parametrize("event_idx", [True, False])
    def test_regression_a_ring_that_rests_asks_for_kicks_where_it_is(
        self, world, event_idx
    ):
        """It had asked at the old place, after that was copied: no kick ever came."""
        lane = Lane(world, guest_event_idx=event_idx)
        assert not lane.pump.rest()
        lane.offer(READ)
        lane.step()
        lane.complete(lane.take())
        lane.step()
        there = world.add_ram(lane.layout.end)
        here = world.ram.view(lane.ring_at, lane.layout.end)
        world.ram.view(there, lane.layout.end)[:] = here
        assert not lane.pump.rest()
        host, layout = world.ram.host(there), lane.layout
        lane.pump.move(places(host, there, layout))
        assert not lane.pump.rest()
        moved = SplitRing.at(world.ram.view(there, layout.end), layout)
        if event_idx:
            assert moved.avail_event == lane.driver.next_avail
        else:
            assert moved.used_flags == 0

    def test_a_ring_without_memory_is_faulty_and_left_alone(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.step()
        lane.pump.move(None)
        assert lane.fault == "the ring's own memory is not there any more"
        before = bytes(world.ram.view(lane.ring_at, lane.layout.end))
        lane.complete(lane.take())
        assert lane.pump.step() == (0, False, False)
        assert not lane.pump.rest()
        lane.stop(1)
        assert bytes(world.ram.view(lane.ring_at, lane.layout.end)) == before

    def test_a_ring_that_lost_its_memory_after_a_fault_is_left_alone(self, world):
        lane = Lane(world)
        lane.pump.set_fault(-1)
        lane.pump.move(None)
        before = bytes(world.ram.view(lane.ring_at, lane.layout.end))
        lane.pump.step()
        lane.pump.rest()
        lane.stop(0)
        assert bytes(world.ram.view(lane.ring_at, lane.layout.end)) == before


class TestFaults:
    def test_a_fault_can_come_from_elsewhere(self, world):
        lane = Lane(world)
        lane.offer(READ)
        lane.pump.set_fault(-34)
        assert lane.fault == "the back signalled an error of the ring"
        assert lane.step() == 0
        assert not lane.pump.rest()

    def test_the_first_fault_is_kept(self, world):
        lane = Lane(world)
        lane.pump.set_fault(-34)
        lane.pump.set_fault(-1)
        assert lane.pump.fault == -34

    def test_an_unknown_fault_is_refused(self, world):
        lane = Lane(world)
        for fault in (0, 1, -14, -99):
            with pytest.raises(ValueError, match=f"fault {fault}"):
                lane.pump.set_fault(fault)

    def test_every_fault_has_words_of_its_own(self):
        assert len(set(FAULTS.values())) == len(FAULTS) == 19

    def test_a_restart_forgets_a_fault(self, world):
        lane = Lane(world)
        lane.pump.set_fault(-1)
        lane.start(lane.stop(None)[0])
        assert lane.pump.fault == 0
        lane.offer(READ)
        assert lane.step() == 1
