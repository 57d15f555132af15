# SPDX-License-Identifier: Apache-2.0
"""A ring whose chains in flight are recorded: the rules of the record, one by one.

Which stores are made in which order, and that a kill after any of them loses nothing,
is shown in tests/proof/test_kills.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.plane import PAGE, Lane, Memory, Record, World
from vhost_airlock.dataplane.pump import BACK_SIGNALLED
from vhost_airlock.dataplane.recorded import erase
from vhost_airlock.peers.ring import Chain

SIZE = 8


class Recorded(Lane):
    """A lane with a record."""

    record: Record


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.check()
    for lane in world.lanes:
        assert lane.record is None or lane.record.memory.intact()


def recorded(world: World, *, size: int = SIZE, base: int = 0) -> Recorded:
    return Recorded(world, size=size, base=base, record=Record(size))


def offer(lane: Lane, count: int = 1) -> list[int]:
    """Offer chains of a byte to read, which is its head, and a byte to write."""
    heads = []
    for _ in range(count):
        head = lane.driver.free[-1]
        lane.world.ram.write(PAGE * (1 + head), bytes([head]))
        buffers = (PAGE * (1 + head), 1), (PAGE * (64 + head), 1, True)
        lane.offer(*buffers, indirect=True)
        heads.append(head)
    return heads


def with_back(lane: Lane, count: int) -> tuple[list[int], list[Chain]]:
    """Offer chains until the back has them: their heads, and the back's chains."""
    heads = offer(lane, count)
    lane.step()
    return heads, [lane.take() for _ in heads]


def killed(lane: Lane, base: int | None = None) -> None:
    """The airlock is killed, and a new one starts the ring, with a new back-end."""
    lane.renew()
    lane.start(lane.ring.used_idx if base is None else base)


def taken(lane: Lane) -> list[int]:
    """The heads of all chains that the back finds now, by the byte in each."""
    found = []
    while chain := lane.device.take():
        found.append(lane.bytes_of(chain)[0])
    return found


def complete_all(lane: Lane) -> list[int]:
    """The back completes all that it finds; the heads that the guest sees."""
    lane.step()
    while chain := lane.device.take():
        lane.complete(chain, b"d")
    while lane.step():
        pass
    return [head for head, _ in lane.used()]


class TestInOrder:
    """A ring that nobody kills."""

    def test_a_chain_is_marked_when_it_is_taken(self, world: World) -> None:
        lane = recorded(world)
        heads = offer(lane, 3)
        assert lane.record.marked == []
        lane.step()
        assert lane.record.marked == heads

    def test_marks_end_with_the_batch_that_the_guest_sees(self, world: World) -> None:
        lane = recorded(world)
        heads, chains = with_back(lane, 3)
        lane.complete(chains[1], b"d")
        lane.step()
        assert lane.record.marked == [heads[0], heads[2]]
        assert lane.record.used_idx == lane.ring.used_idx == 1

    def test_the_list_names_the_last_batch(self, world: World) -> None:
        lane = recorded(world)
        heads, chains = with_back(lane, 3)
        for chain in chains:
            lane.complete(chain, b"d")
        lane.step()
        last = lane.record.head[3]
        assert last == heads[2]
        assert lane.record.entry(last)[1] == heads[1]
        assert lane.record.entry(heads[1])[1] == heads[0]

    def test_a_chain_that_waits_for_room_is_marked_too(self) -> None:
        world = World(pool=2 * PAGE)
        lane = recorded(world)
        for i in range(4):
            lane.offer((PAGE * i, PAGE))
        lane.step()
        assert lane.pump.outstanding == 2
        assert len(lane.record.marked) == 3

    def test_a_chain_with_a_fault_is_not_marked(self, world: World) -> None:
        lane = recorded(world)
        good = offer(lane)
        lane.offer((1 << 50, 1))
        lane.step()
        assert lane.fault
        assert lane.record.marked == good

    def test_a_new_record_begins_at_the_used_index_of_the_ring(
        self, world: World
    ) -> None:
        """Not at 0: the list of the last batch would be made of stale entries."""
        lane = recorded(world, base=0xFFFE)
        assert lane.record.head == (0, 1, SIZE, 0, 0xFFFE)
        heads = offer(lane, 3)
        assert complete_all(lane) == heads
        assert lane.record.used_idx == lane.ring.used_idx == 1

    def test_an_unused_record_has_no_marks_whatever_is_there(
        self, world: World
    ) -> None:
        record = Record(SIZE)
        record.set_head(version=0, features=7, desc_num=3, used=9)
        record.set_entry(2, inflight=1, counter=5)
        lane = Recorded(world, size=SIZE, record=record)
        assert lane.record.head == (0, 1, SIZE, 0, 0)
        assert lane.record.marked == []
        assert lane.pump.recorded

    def test_after_a_clean_stop_nothing_is_marked(self, world: World) -> None:
        lane = recorded(world)
        offer(lane, 4)
        lane.step()
        for _ in range(2):
            lane.complete(lane.take(), b"d")
        lane.step()
        assert lane.stop(2) == (2, 0, True)
        assert lane.record.marked == []
        assert lane.record.used_idx == 2

    def test_without_a_record_nothing_is_recorded(self, world: World) -> None:
        lane = Lane(world)
        assert not lane.pump.recorded
        assert lane.pump.news is None


def test_a_back_that_has_broken_the_ring_gets_its_chains_again(world: World) -> None:
    """They are taken by the record; what the back says of the first ones is late."""
    lane = recorded(world)
    heads, old = with_back(lane, 3)
    lane.shadow.used_idx = 17
    lane.step()
    base, unfinished, _ = lane.stop(3)
    assert unfinished == 3
    lane.start(base)
    lane.step()
    new = [lane.take() for _ in heads]
    assert {chain.head for chain in new}.isdisjoint(chain.head for chain in old)
    for chain in (*old, *new):
        lane.complete(chain, b"d")
    while lane.step():
        pass
    assert [head for head, _ in lane.used()] == heads
    assert lane.record.marked == []


def test_a_back_that_has_broken_the_ring_gets_those_before_a_done_one_too(
    world: World,
) -> None:
    """The record has them, though no base could name them."""
    lane = recorded(world)
    heads, chains = with_back(lane, 3)
    lane.complete(chains[1], b"d")
    lane.step()
    lane.pump.set_fault(BACK_SIGNALLED)
    base, unfinished, _ = lane.stop(3)
    assert unfinished == 2
    lane.start(base)
    lane.step()
    assert taken(lane) == [heads[0], heads[2]]


class TestKills:
    """The next airlock finds exactly the chains that the guest waits for."""

    def test_chains_that_the_back_had_are_done_again_in_their_order(
        self, world: World
    ) -> None:
        lane = recorded(world)
        lane.driver.free[:] = [5, 1, 7, 0, 3]
        heads = offer(lane, 5)
        assert heads == [3, 0, 7, 1, 5]
        lane.step()
        chains = [lane.take() for _ in heads]
        for i in (3, 0):
            lane.complete(chains[i], b"d")
        lane.step()
        lane.used()
        killed(lane)
        lane.step()
        assert taken(lane) == [0, 7, 5]
        assert lane.counter("recovered") == 3

    @pytest.mark.parametrize("base", ["used index", "avail index", "anything"])
    def test_the_base_counts_for_nothing(self, world: World, base: str) -> None:
        """QEMU says the used index, Cloud Hypervisor the avail index."""
        lane = recorded(world, size=16, base=0xFFFA)
        heads, chains = with_back(lane, 6)
        lane.complete(chains[4], b"d")
        lane.step()
        lane.used()
        unseen = offer(lane, 2)
        said = {
            "used index": lane.ring.used_idx,
            "avail index": lane.ring.avail_idx,
            "anything": 77,
        }
        killed(lane, said[base])
        lane.step()
        assert taken(lane) == [*heads[:4], heads[5], *unseen]

    def test_chains_of_before_come_before_new_ones(self, world: World) -> None:
        lane = recorded(world)
        old = offer(lane, 2)
        lane.step()
        killed(lane)
        new = offer(lane, 2)
        assert complete_all(lane) == [*old, *new]

    def test_the_order_survives_two_kills(self, world: World) -> None:
        lane = recorded(world)
        lane.driver.free[:] = [6, 2, 4, 1, 5]
        heads = offer(lane, 2)
        lane.step()
        killed(lane)
        heads += offer(lane, 3)
        lane.step()
        killed(lane)
        assert complete_all(lane) == heads

    def test_chains_not_yet_taken_again_stay_for_the_next_airlock(
        self, world: World
    ) -> None:
        lane = recorded(world)
        heads = offer(lane, 4)
        lane.step()
        killed(lane)
        lane.step(2)
        assert lane.record.marked == heads
        killed(lane)
        assert complete_all(lane) == heads

    def test_a_chain_that_was_changed_meanwhile_is_checked_anew(
        self, world: World
    ) -> None:
        lane = recorded(world)
        (head,) = offer(lane)
        lane.step()
        lane.ring.write_desc(head, 1 << 50, 1)
        killed(lane)
        lane.step()
        assert lane.fault == "a descriptor points outside of the guest's memory"

    def test_the_batch_that_the_guest_saw_is_not_done_again(self, world: World) -> None:
        """Killed behind the store to the ring's used index."""
        lane = recorded(world)
        heads, chains = with_back(lane, 4)
        before = bytes(lane.record.view)
        for i in (2, 1):
            lane.complete(chains[i], b"d")
        lane.step()
        # The stores before that one, and none behind it.
        last, linked = lane.record.head[3], lane.record.entry(heads[1])[1]
        lane.record.view[:] = before
        lane.record.set_head(last=last, used=0)
        inflight, _, counter = lane.record.entry(heads[1])
        lane.record.set_entry(heads[1], inflight=1, next=linked, counter=counter)
        assert inflight == 1
        assert [head for head, _ in lane.used()] == [heads[2], heads[1]]
        killed(lane)
        assert lane.record.used_idx == 2
        assert complete_all(lane) == [heads[0], heads[3]]

    def test_the_guest_is_called_with_the_first_completion(self, world: World) -> None:
        lane = recorded(world)
        offer(lane)
        lane.step()
        killed(lane)
        lane.step()
        lane.complete(lane.take(), b"d")
        assert lane.pump.step()[1]

    def test_used_index_0_does_not_mean_that_the_ring_was_reset(
        self, world: World
    ) -> None:
        """It comes by wrapping round as well."""
        lane = recorded(world, base=0xFFFE)
        heads, chains = with_back(lane, 4)
        for i in (1, 3):
            lane.complete(chains[i], b"d")
        lane.step()
        lane.used()
        assert lane.ring.used_idx == 0
        killed(lane)
        assert complete_all(lane) == [heads[0], heads[2]]

    @pytest.mark.parametrize("size", [1, 2, 16])
    def test_rings_of_all_sizes_and_full(self, world: World, size: int) -> None:
        lane = recorded(world, size=size)
        for _ in range(3):
            heads = []
            while lane.driver.free:
                heads.append(lane.offer((PAGE, 1, True)))
            lane.step()
            killed(lane)
            assert complete_all(lane) == heads


class TestStops:
    """A ring that stops and starts again in the same session."""

    def test_what_the_back_has_not_fetched_is_unmarked(self, world: World) -> None:
        lane = recorded(world)
        heads = offer(lane, 4)
        lane.step()
        lane.complete(lane.take(), b"d")
        lane.take()
        lane.step()
        assert lane.stop(2) == (1, 1, True)
        assert lane.record.marked == [heads[1]]

    def test_a_chain_that_waits_for_room_is_unmarked(self) -> None:
        world = World(pool=2 * PAGE)
        lane = recorded(world)
        for i in range(4):
            lane.offer((PAGE * i, PAGE))
        lane.step()
        assert lane.stop(0) == (0, 0, True)
        assert lane.record.marked == []

    def test_unmarking_begins_with_the_last(self, world: World) -> None:
        """The test of the single stores is in tests/proof; here the order matters when
        slots are used out of order."""
        lane = recorded(world)
        offer(lane, 3)
        lane.step()
        chains = [lane.take() for _ in range(3)]
        for i in (0, 2, 1):
            lane.complete(chains[i], b"d")
        lane.step()
        lane.used()
        offer(lane, 5)
        lane.step()
        assert lane.stop(3) == (3, 0, True)
        assert lane.record.marked == []
        lane.start(3)
        assert len(complete_all(lane)) == 5

    @pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
    def test_the_back_does_not_get_a_chain_twice_that_it_has_still(
        self, world: World, late: bool
    ) -> None:
        """It completes it before the next start, or after it."""
        lane = recorded(world)
        heads = offer(lane, 3)
        lane.step()
        first = lane.take()
        lane.complete(lane.take(), b"d")
        lane.step()
        assert lane.stop(2)[1:] == (1, True)
        assert lane.record.marked == [heads[0]]
        if not late:
            lane.complete(first, b"e")
        lane.start(77)
        if late:
            lane.device.complete(first.head, 1)
            lane.device.publish()
        lane.step()
        assert taken(lane) == [heads[2]]
        assert [head for head, _ in lane.used()] == [heads[1], heads[0]]
        assert lane.record.marked == [heads[2]]

    def test_the_back_is_gone_and_everything_stays_marked(self, world: World) -> None:
        lane = recorded(world)
        heads = offer(lane, 3)
        lane.step()
        lane.take()
        lane.stop(None)
        assert lane.record.marked == heads
        killed(lane)
        assert complete_all(lane) == heads

    def test_chains_of_before_a_kill_are_not_handed_back(self, world: World) -> None:
        """The avail ring has other heads at their positions."""
        lane = recorded(world)
        heads, chains = with_back(lane, 3)
        lane.complete(chains[0], b"d")
        lane.step()
        lane.used()
        killed(lane)
        lane.step()
        base, _, _ = lane.stop(0)
        assert base == 3
        assert lane.record.marked == heads[1:]
        lane.start(base)
        assert complete_all(lane) == heads[1:]

    def test_a_ring_that_was_reset_has_nothing_in_flight(self, world: World) -> None:
        """The same session sees that neither its base nor its used index is there."""
        lane = recorded(world)
        offer(lane, 4)
        lane.step()
        old = lane.take()
        lane.complete(lane.take(), b"d")
        lane.step()
        lane.stop(2)
        assert lane.record.marked
        lane.reset()
        lane.start(0)
        assert lane.record.marked == []
        assert lane.record.used_idx == 0
        assert lane.pump.quarantined == 1
        assert lane.pump.news is None
        lane.device.complete(old.head, 1)
        lane.device.publish()
        lane.step()
        assert lane.used() == []
        assert complete_all(lane) == []

    def test_an_erased_record_has_nothing_in_flight(self, world: World) -> None:
        lane = recorded(world)
        offer(lane, 2)
        lane.step()
        assert lane.stop(None)
        assert erase(lane.record.place[0])
        lane.reset()
        lane.start(0)
        assert lane.record.marked == []
        assert complete_all(lane) == []

    def test_a_smaller_ring_after_a_reset(self, world: World) -> None:
        lane = recorded(world)
        offer(lane, 2)
        complete_all(lane)
        lane.stop(2)
        lane.reset(size=4)
        lane.start(0)
        assert lane.pump.recorded
        heads = offer(lane, 2)
        lane.step()
        assert lane.record.marked == heads

    def test_moved_to_other_addresses_nothing_changes(self, world: World) -> None:
        lane = recorded(world)
        heads = offer(lane, 2)
        lane.step()
        lane.pump.move(lane.guest_places)
        assert lane.record.marked == heads
        assert complete_all(lane) == heads


class TestNotRecorded:
    """Records that can't be used: the ring works, and the log is told."""

    def start(self, world: World, record: Record, size: int = SIZE) -> Lane:
        lane = Recorded(world, size=size, record=record)
        assert lane.pump.news
        before = bytes(record.view)
        heads = offer(lane, 2)
        assert complete_all(lane) == heads
        assert bytes(record.view) == before or lane.pump.recorded
        return lane

    def test_too_few_entries(self, world: World) -> None:
        """CVE-2026-86565, and a front that passes less than it was asked to."""
        lane = self.start(world, Record(SIZE // 2))
        assert lane.pump.news == (
            "requests in flight are not recorded: the record has room for 4 of its 8"
            " entries"
        )
        assert not lane.pump.recorded

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ({"version": 2}, "the record has version 2, not 1"),
            ({"features": 2}, "the record has features 0x2, not 0"),
            ({"desc_num": 4}, "the record says that it has 4 entries, not 8 to 16"),
            ({"desc_num": 17}, "the record says that it has 17 entries, not 8 to 16"),
        ],
    )
    def test_words_that_nobody_writes(
        self, world: World, words: dict[str, int], reason: str
    ) -> None:
        record = Record(16)
        record.set_head(**words)
        lane = self.start(world, record)
        assert lane.pump.news == f"requests in flight are not recorded: {reason}"
        assert not lane.pump.recorded

    def test_requests_that_no_record_has(self, world: World) -> None:
        """A new record, for a ring of which somebody else has requests in flight."""
        lane = Lane(world, size=SIZE)
        offer(lane, 3)
        lane.renew()
        lane.record = Record(SIZE)
        lane.start(2)
        assert not lane.pump.recorded
        assert lane.pump.news == (
            "requests in flight are not recorded: its base is 2 and its used index 0,"
            " and the record has none of the requests between"
        )

    def test_a_ring_without_its_record_leaves_no_chains_in_it(
        self, world: World
    ) -> None:
        """They would be taken for its own at a later start."""
        record = Record(SIZE)
        record.set_head(used=5, last=1)
        record.set_entry(1, inflight=1)
        lane = Recorded(world, size=SIZE, record=record, start=False)
        offer(lane, 3)
        lane.start(2)
        assert not lane.pump.recorded
        assert record.head[1] == 0

    def test_a_record_that_is_not_there(self, world: World) -> None:
        record = Record(SIZE)
        record.memory.cut()
        lane = Recorded(world, size=SIZE, record=record)
        record.memory.mend()
        assert not lane.pump.recorded
        assert (
            lane.fault
            == "a page of memory that the ring or a request is in can't be had"
        )

    def test_a_record_that_goes_away_ends_the_ring(self, world: World) -> None:
        lane = recorded(world)
        offer(lane, 2)
        lane.record.memory.cut()
        lane.step()
        lane.stop(0)
        lane.record.memory.mend()
        assert (
            lane.fault
            == "a page of memory that the ring or a request is in can't be had"
        )

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda record: record.set_head(used=3, last=1),
            lambda record: record.set_head(used=0xFFF0, last=1),
            lambda record: record.set_head(used=0xFFFE, last=SIZE),
            lambda record: record.set_entry(SIZE + 1, inflight=1),
        ],
        ids=["used index", "far away", "list", "head beyond the ring"],
    )
    def test_a_record_of_another_ring_is_begun_anew(
        self, world: World, break_it
    ) -> None:
        """The list of the last batch is a loop, or leaves the ring."""
        record = Record(16)
        record.set_head()
        for head in 1, 2:
            record.set_entry(head, inflight=1, next=head, counter=head)
        break_it(record)
        lane = self.start(world, record)
        assert lane.pump.recorded
        assert lane.pump.news is not None
        assert "does not fit to the ring" in lane.pump.news
        assert record.marked == []

    def test_a_record_that_libvhost_user_has_written(self, world: World) -> None:
        """It never writes `next`, and completes one chain at a time. It was killed
        behind the store to the ring's used index."""
        lane = Recorded(world, size=SIZE, record=Record(SIZE), start=False)
        heads = offer(lane, 3)
        lane.record.set_head(last=heads[1], used=0)
        for counter, head in enumerate(heads):
            lane.record.set_entry(head, inflight=1, counter=counter)
        lane.ring.set_used_entry(0, heads[1], 0)
        lane.ring.used_idx = 1
        assert [head for head, _ in lane.used()] == [heads[1]]
        lane.start(1)
        assert lane.pump.news is None
        assert complete_all(lane) == [heads[0], heads[2]]

    def test_leftovers_without_a_mark_say_nothing(self, world: World) -> None:
        """Whatever its used index and its list are."""
        record = Record(SIZE)
        record.set_head(used=1234, last=77)
        lane = Recorded(world, size=SIZE, record=record)
        assert lane.pump.news is None
        assert record.used_idx == 0
        assert complete_all(lane) == []

    def test_the_room_beyond_the_ring_is_kept(self, world: World) -> None:
        """A record of other back-ends has their number of entries, not the ring's."""
        record = Record(64)
        record.set_head(desc_num=64)
        lane = Recorded(world, size=SIZE, record=record)
        heads = offer(lane, 3)
        lane.step()
        killed(lane)
        assert record.head[2] == 64
        assert complete_all(lane) == heads


@given(st.binary(min_size=16 + 16 * SIZE, max_size=16 + 16 * SIZE), st.booleans())
@settings(max_examples=100, deadline=None)
def test_arbitrary_bytes_do_no_harm(data: bytes, known: bool) -> None:
    """At worst requests are not recorded, or heads are taken that were not in flight.

    With a head like that of a good one more of it is looked at.
    """
    world = World()
    record = Record(SIZE)
    record.view[:] = data
    if known:
        used = record.used_idx
        record.set_head(used=used % 16, last=record.head[3] % 16)
    lane = Recorded(world, size=SIZE, record=record)
    offer(lane, 2)
    for _ in range(4):
        lane.step()
        while chain := lane.device.take():
            lane.complete(chain, b"")
    lane.stop(0)
    assert record.memory.intact()
    world.check()


def test_the_largest_record(world: World) -> None:
    """Its list of the last batch leads through all of it."""
    size = 32768
    record = Record(size)
    record.set_head(used=0x8000, last=0)
    for head in range(size):
        record.set_entry(head, inflight=1, next=(head + 1) % size, counter=head)
    lane = Lane(world, size=size, record=record, entries=1)
    assert record.marked == []
    assert lane.pump.recorded
    assert lane.pump.news is None


def test_the_counter_goes_on_behind_the_largest(world: World) -> None:
    record = Record(SIZE)
    record.set_head()
    record.set_entry(3, counter=41)
    lane = Recorded(world, size=SIZE, record=record)
    (head,) = offer(lane)
    lane.step()
    assert record.entry(head)[2] == 42


def test_a_record_at_any_aligned_place() -> None:
    memory = Memory(PAGE)
    assert memory.address % PAGE == 0
    world = World()
    lane = Recorded(world, size=SIZE, record=Record(SIZE, offset=PAGE - 8))
    heads = offer(lane, 2)
    lane.step()
    assert lane.record.marked == heads
