# SPDX-License-Identifier: Apache-2.0
"""The device side of the guest's ring: what is taken, and what is a fault."""

from __future__ import annotations

import itertools

import pytest

from tests.support.plane import PAGE, Lane, World
from vhost_airlock.peers import Buffer, TableArea
from vhost_airlock.peers.ring import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
)

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
HOLE = 5 << 20
"""Guest-physical address where no memory is."""


RINGS = [*itertools.product([1, 2, 4, 256, 1024], [False, True]), (32768, True)]


@pytest.fixture
def world():
    world = World()
    yield world
    world.check()


@pytest.fixture
def lane(world):
    return Lane(world, size=8)


def offer_raw(lane: Lane, head: int = 0) -> None:
    """Put a head in the avail ring, with descriptors as they stand."""
    ring = lane.ring
    ring.set_avail_entry(ring.avail_idx & ring.mask, head)
    ring.avail_idx = (ring.avail_idx + 1) & 0xFFFF


def write_table(lane: Lane, *entries: tuple[int, int, int, int]) -> tuple[int, int]:
    """An indirect table with these descriptors; its address and length."""
    table = b"".join(DESC.pack(*entry) for entry in entries)
    lane.world.ram.write(lane.tables_at, table)
    return lane.tables_at, len(table)


def taken(lane: Lane) -> list[tuple[int, bool]]:
    """Sizes and directions of the next chain that the back sees."""
    return [(buffer.length, buffer.writable) for buffer in lane.take().buffers]


class TestChains:
    @pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("readable", [0, 1, 2, 8])
    @pytest.mark.parametrize("form", ["direct", "indirect", "both"])
    def test_any_number_in_any_form(self, world, lane, count, readable, form):
        buffers = [
            Buffer(PAGE * i + 10 * i, 100 + 600 * i, i >= readable)
            for i in range(count)
        ]
        for buffer in buffers:
            world.ram.write(buffer.addr, bytes([buffer.length % 251]) * buffer.length)
        lane.offer(*buffers, indirect=form != "direct", direct=2 * (form == "both"))
        assert lane.step() == 1
        chain = lane.take()
        assert [(b.length, b.writable) for b in chain.buffers] == [
            (b.length, b.writable) for b in buffers
        ]
        assert lane.bytes_of(chain) == b"".join(
            bytes([b.length % 251]) * b.length for b in buffers if not b.writable
        )
        answer = bytes(
            i % 253 for i in range(sum(b.length for b in buffers if b.writable))
        )
        lane.complete(chain, answer)
        assert lane.step() == 1
        assert lane.used() == [(0, len(answer))]
        assert answer == b"".join(
            world.ram.read(b.addr, b.length) for b in buffers if b.writable
        )

    def test_a_table_is_a_chain_of_its_own_order(self, lane):
        table = write_table(
            lane,
            (0, 10, NEXT, 2),
            (0, 30, WRITE, 0),
            (0, 20, NEXT, 3),
            (0, 25, NEXT, 1),
            (0, 99, 0, 0),
        )
        lane.ring.write_desc(0, *table, INDIRECT)
        offer_raw(lane)
        lane.step()
        assert taken(lane) == [(10, False), (20, False), (25, False), (30, True)]

    def test_the_write_flag_of_an_indirect_descriptor_means_nothing(self, lane):
        table = write_table(lane, (0, 10, 0, 0))
        lane.ring.write_desc(0, *table, INDIRECT | WRITE)
        offer_raw(lane)
        lane.step()
        assert taken(lane) == [(10, False)]

    def test_flags_that_nobody_knows_mean_nothing(self, lane):
        lane.ring.write_desc(0, 0, 10, 0xFFF8 | WRITE)
        offer_raw(lane)
        lane.step()
        chain = lane.take()
        assert [(b.length, b.writable) for b in chain.buffers] == [(10, True)]
        assert lane.shadow.read_desc(chain.head).flags == WRITE

    def test_the_next_field_means_nothing_without_its_flag(self, lane):
        lane.ring.write_desc(0, 0, 10, 0, 0xFFFF)
        offer_raw(lane)
        assert lane.step() == 1

    @pytest.mark.parametrize("indirect", [False, True])
    @pytest.mark.parametrize("zero", [0, 1, 2, 3])
    def test_descriptors_without_bytes_are_left_out(self, lane, indirect, zero):
        buffers = [(0, 10), (0, 20), (0, 30, True)]
        # Where there is nothing, and whichever way it goes.
        buffers.insert(zero, (HOLE, 0, zero % 2 == 0))
        lane.offer(*buffers, indirect=indirect)
        assert lane.step() == 1
        assert taken(lane) == [(10, False), (20, False), (30, True)]

    def test_a_table_may_lie_over_two_regions(self, world, lane):
        entries = [DESC.pack(0, 16 + i, NEXT * (i < 9), i + 1) for i in range(10)]
        at = (2 << 20) - 3 * DESC_SIZE - 5
        world.ram.write(at, b"".join(entries))
        lane.ring.write_desc(0, at, 160, INDIRECT)
        offer_raw(lane)
        assert lane.step() == 1
        assert taken(lane) == [(16 + i, False) for i in range(10)]

    def test_1024_buffers_are_the_most(self, world):
        lane = Lane(world, size=2048)
        for count in (1024, 1025):
            for i in range(count):
                lane.ring.write_desc(i, 0, 1, NEXT * (i < count - 1), i + 1)
            offer_raw(lane)
            lane.step()
            if count == 1024:
                assert len(lane.take().buffers) == 1024
                assert lane.pump.fault == 0
                lane.device.complete(0, 0)
                lane.device.publish()
                lane.step()
        assert lane.fault == "a chain has a loop or too many descriptors"

    def test_1024_entries_are_the_largest_table(self, world):
        lane = Lane(world, size=2, entries=1025)
        lane.offer(*[(0, 1)] * 1024, indirect=True)
        assert lane.step() == 1
        assert len(lane.take().buffers) == 1024
        lane.offer(*[(0, 1)] * 1025, indirect=True)
        lane.step()
        assert lane.fault == "an indirect descriptor is malformed or was not negotiated"

    def test_1024_buffers_are_the_most_in_table_and_ring(self, world):
        lane = Lane(world, size=4, entries=1024)
        lane.offer(*[(0, 1)] * 1024, indirect=True, direct=2)
        assert lane.step() == 1
        assert len(lane.take().buffers) == 1024
        lane.device.complete(0, 0)
        lane.device.publish()
        lane.step()
        lane.used()
        lane.offer(*[(0, 1)] * 1025, indirect=True, direct=1)
        lane.step()
        assert lane.fault == "a chain has a loop or too many descriptors"

    @pytest.mark.parametrize(("size", "indirect"), RINGS)
    def test_rings_of_any_size_wrap_round(self, world, size, indirect):
        lane = Lane(world, size=size, base=65530, entries=2)
        left = 2 * size + 20
        number = 0
        while left:
            batch = min(left, size)
            left -= batch
            heads = []
            for _ in range(batch):
                heads.append(
                    lane.driver.offer(
                        [Buffer(0, 1 + number % 300, True)], indirect=indirect
                    )
                )
                number += 1
            lane.driver.publish()
            while lane.step(10_000):
                pass
            chains = [lane.take() for _ in range(batch)]
            assert lane.device.take() is None
            for i, chain in enumerate(chains):
                assert chain.buffers[0].length == 1 + (number - batch + i) % 300
                lane.device.complete(chain.head, chain.buffers[0].length)
            lane.device.publish()
            while lane.step(10_000):
                pass
            assert lane.used() == [
                (head, 1 + (number - batch + i) % 300) for i, head in enumerate(heads)
            ]
        assert lane.pump.fault == 0

    def test_completions_may_come_in_any_order(self, world):
        lane = Lane(world, size=4, base=0xFFFE)
        for order in itertools.permutations(range(4)):
            heads = [lane.offer((PAGE * i, 8, True)) for i in range(4)]
            lane.step()
            chains = [lane.take() for _ in range(4)]
            for i in order:
                lane.complete(chains[i], bytes([65 + i]) * 8)
            lane.step()
            assert [head for head, _ in lane.used()] == [heads[i] for i in order]
            for i in range(4):
                assert world.ram.read(PAGE * i, 8) == bytes([65 + i]) * 8


class TestLimits:
    """The one number that a chain may not exceed, from both sides."""

    def test_2_to_32_bytes_are_too_many(self):
        size = 1 << 32
        world = World(regions=[(0, 1 << 20), (1 << 33, size + PAGE)], pool=PAGE)
        lane = Lane(world, size=4)
        lane.offer((1 << 33, size - 1), (0, 1, True))
        lane.step()
        assert lane.fault == "a chain has more than 2^32 - 1 bytes"
        assert lane.pump.reason == f"{lane.fault}: head 0, 4294967296 bytes"

    def test_2_to_32_less_one_bytes_are_a_question_of_the_pool(self):
        size = 1 << 32
        world = World(regions=[(0, 1 << 20), (1 << 33, size + PAGE)], pool=PAGE)
        lane = Lane(world, size=4)
        lane.offer((1 << 33, size - 2), (0, 1, True))
        lane.step()
        assert lane.fault == "a chain is larger than the pool allows"

    @pytest.mark.parametrize("last", [1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    def test_g1_no_sum_of_lengths_wraps_round(self, last):
        """To a sum that would be good again, be it of 31 bits, 32 or more."""
        big = 0xFFFFFFFF
        world = World(regions=[(0, 1 << 20), (1 << 33, big + 1)], pool=PAGE)
        lane = Lane(world, size=16)
        lane.offer((0, 64), *[(1 << 33, big, True)] * 3, (1 << 33, last, True))
        lane.step()
        assert lane.fault == "a chain has more than 2^32 - 1 bytes"

    def test_the_largest_length_does_not_wrap_round(self, world, lane):
        lane.offer(*[(0, 0xFFFFFFFF)] * 8)
        lane.step()
        assert lane.fault == "a descriptor points outside of the guest's memory"


def loop_of_two(lane):
    lane.ring.write_desc(0, 0, 1, NEXT, 1)
    lane.ring.write_desc(1, 0, 1, NEXT, 0)
    offer_raw(lane)


def loop_of_one(lane):
    lane.ring.write_desc(0, 0, 1, NEXT, 0)
    offer_raw(lane)


def loop_without_bytes(lane):
    lane.ring.write_desc(0, 0, 0, NEXT, 0)
    offer_raw(lane)


def loop_in_table(lane):
    table = write_table(lane, (0, 1, NEXT, 1), (0, 1, NEXT, 0))
    lane.ring.write_desc(0, *table, INDIRECT)
    offer_raw(lane)


def avail_jump(lane):
    lane.ring.avail_idx += lane.size + 1


def avail_back(lane):
    lane.ring.avail_idx = (lane.ring.avail_idx - 1) & 0xFFFF


def head_beyond(lane):
    offer_raw(lane, lane.size)


def head_far_beyond(lane):
    offer_raw(lane, 0xFFFF)


def head_twice(lane):
    lane.ring.write_desc(0, 0, 1)
    offer_raw(lane)
    offer_raw(lane)


def next_beyond(lane):
    lane.ring.write_desc(0, 0, 1, NEXT, lane.size)
    offer_raw(lane)


def next_beyond_table(lane):
    table = write_table(lane, (0, 1, NEXT, 2), (0, 1, 0, 0))
    lane.ring.write_desc(0, *table, INDIRECT)
    offer_raw(lane)


def table_of(length):
    def broken(lane):
        lane.ring.write_desc(0, lane.tables_at, length, INDIRECT)
        offer_raw(lane)

    broken.__name__ = f"table_of_{length}"
    return broken


def indirect_with_next(lane):
    table = write_table(lane, (0, 1, 0, 0))
    lane.ring.write_desc(0, *table, INDIRECT | NEXT, 1)
    lane.ring.write_desc(1, 0, 1)
    offer_raw(lane)


def nested(lane):
    table = write_table(lane, (lane.tables_at, 16, INDIRECT, 0))
    lane.ring.write_desc(0, *table, INDIRECT)
    offer_raw(lane)


def nested_later(lane):
    table = write_table(lane, (0, 1, NEXT, 1), (lane.tables_at, 16, INDIRECT, 0))
    lane.ring.write_desc(0, *table, INDIRECT)
    offer_raw(lane)


def address(where, length, name):
    def broken(lane):
        lane.ring.write_desc(0, where, length)
        offer_raw(lane)

    broken.__name__ = name
    return broken


def table_nowhere(lane):
    lane.ring.write_desc(0, HOLE, 16, INDIRECT)
    offer_raw(lane)


def table_end_nowhere(lane):
    lane.ring.write_desc(0, (4 << 20) - 16, 32, INDIRECT)
    offer_raw(lane)


def table_address_nowhere(lane):
    table = write_table(lane, (HOLE, 16, 0, 0))
    lane.ring.write_desc(0, *table, INDIRECT)
    offer_raw(lane)


def read_after_write(lane):
    lane.offer((0, 1, True), (0, 1))


def read_after_write_in_table(lane):
    lane.offer((0, 1, True), (0, 1), indirect=True)


def read_in_table_after_write_in_ring(lane):
    lane.offer((0, 1, True), (0, 1), indirect=True, direct=1)


def one_empty(lane):
    lane.offer((0, 0))


def all_empty(lane):
    lane.offer((0, 0), (HOLE, 0, True), (0, 0))


def all_empty_in_table(lane):
    lane.offer((0, 0), (HOLE, 0, True), (0, 0), indirect=True)


BROKEN = {
    "the guest's avail index jumps by more than the ring holds": [
        avail_jump,
        avail_back,
    ],
    "a head in the guest's avail ring is beyond the ring": [
        head_beyond,
        head_far_beyond,
    ],
    "the guest offered a head that is still in flight": [head_twice],
    "a descriptor's next is beyond its table": [next_beyond, next_beyond_table],
    "a chain has a loop or too many descriptors": [
        loop_of_one,
        loop_of_two,
        loop_without_bytes,
        loop_in_table,
    ],
    "an indirect descriptor is malformed or was not negotiated": [
        table_of(0),
        table_of(15),
        table_of(17),
        table_of(1025 * 16),
        table_of(0xFFFFFFF0),
        table_of(0xFFFFFFFF),
        indirect_with_next,
    ],
    "an indirect table holds an indirect descriptor": [nested, nested_later],
    "a descriptor points outside of the guest's memory": [
        address(HOLE, 1, "in_hole"),
        address(HOLE - PAGE, 1 << 31, "over_hole"),
        address((4 << 20) - 1, 2, "last_byte_and_one"),
        address((8 << 20) - 1, 2, "byte_before"),
        address((1 << 64) - 1, 1, "last_address"),
        address((1 << 64) - 1, 2, "wraps_round"),
        address((1 << 64) - PAGE, 2 * PAGE, "wraps_into_memory"),
        address(1 << 46, 16, "isolated_memory"),
        table_nowhere,
        table_end_nowhere,
        table_address_nowhere,
    ],
    "a descriptor to read from follows one to write to": [
        read_after_write,
        read_after_write_in_table,
        read_in_table_after_write_in_ring,
    ],
    "a chain has no bytes at all": [one_empty, all_empty, all_empty_in_table],
}


FOUND_AT = {
    "avail_jump": "to 9 from 0",
    "avail_back": "to 65535 from 0",
    "head_beyond": "8 of 8",
    "head_far_beyond": "65535 of 8",
    "head_twice": "0 of 8",
    "next_beyond": "head 0, 8 of 8",
    "next_beyond_table": "head 0, 2 of 2",
    "loop_of_one": "head 0, 8 descriptors",
    "loop_of_two": "head 0, 8 descriptors",
    "loop_without_bytes": "head 0, 8 descriptors",
    "loop_in_table": "head 0, 3 descriptors",
    "table_of_0": "head 0, flags 0x4, 0 bytes",
    "table_of_15": "head 0, flags 0x4, 15 bytes",
    "table_of_17": "head 0, flags 0x4, 17 bytes",
    "table_of_16400": "head 0, flags 0x4, 16400 bytes",
    "table_of_4294967280": "head 0, flags 0x4, 4294967280 bytes",
    "table_of_4294967295": "head 0, flags 0x4, 4294967295 bytes",
    "indirect_with_next": "head 0, flags 0x5, 16 bytes",
    "nested": "head 0, entry 0 of 1",
    "nested_later": "head 0, entry 1 of 2",
    "in_hole": "head 0, address 0x500000, 1 bytes",
    "over_hole": "head 0, address 0x4ff000, 2147483648 bytes",
    "last_byte_and_one": "head 0, address 0x3fffff, 2 bytes",
    "byte_before": "head 0, address 0x7fffff, 2 bytes",
    "last_address": "head 0, address 0xffffffffffffffff, 1 bytes",
    "wraps_round": "head 0, address 0xffffffffffffffff, 2 bytes",
    "wraps_into_memory": "head 0, address 0xfffffffffffff000, 8192 bytes",
    "isolated_memory": "head 0, address 0x400000000000, 16 bytes",
    "table_nowhere": "head 0, address 0x500000, 16 bytes",
    "table_end_nowhere": "head 0, address 0x3ffff0, 32 bytes",
    "table_address_nowhere": "head 0, address 0x500000, 16 bytes",
    "read_after_write": "head 0, address 0x0, 1 bytes",
    "read_after_write_in_table": "head 0, address 0x0, 1 bytes",
    "read_in_table_after_write_in_ring": "head 0, address 0x0, 1 bytes",
    "one_empty": "head 0, 1 descriptors",
    "all_empty": "head 0, 3 descriptors",
    "all_empty_in_table": "head 0, 4 descriptors",
}
"""The text behind the fault in the message of each."""


@pytest.mark.parametrize(
    ("fault", "break_ring"),
    [
        pytest.param(fault, break_ring, id=break_ring.__name__)
        for fault, breaks in BROKEN.items()
        for break_ring in breaks
    ],
)
class TestFaults:
    def test_it_has_a_name(self, lane, fault, break_ring):
        break_ring(lane)
        lane.step()
        assert lane.fault == fault

    def test_its_message_names_head_or_index_and_value(self, lane, fault, break_ring):
        break_ring(lane)
        lane.step()
        assert lane.pump.reason == f"{fault}: {FOUND_AT[break_ring.__name__]}"

    def test_i6_what_came_before_is_still_completed(
        self, world, lane, fault, break_ring
    ):
        # From descriptors 7 and 6, as broken chains begin at 0.
        lane.driver.free = [0, 1, 2, 3, 4, 5, 6, 7]
        heads = [lane.offer((PAGE * i, 4, True)) for i in (1, 2)]
        lane.driver.free = [5, 4, 3, 2, 1, 0]
        lane.step()
        break_ring(lane)
        lane.step()
        assert lane.fault == fault
        chains = [lane.take(), lane.take()]
        for chain in reversed(chains):
            lane.complete(chain, b"done")
        assert lane.step() == 2
        ends = [lane.ring.used_entry(i) for i in range(2)]
        assert ends == [(heads[1], 4), (heads[0], 4)]
        assert world.ram.read(2 * PAGE, 4) == b"done"
        # Nothing more is taken, though there is more, and nobody is kept awake by it.
        offer_raw(lane, 5)
        assert lane.step() == 0
        assert not lane.pump.rest()

    def test_i6_other_rings_go_on(self, world, lane, fault, break_ring):
        other = Lane(world)
        break_ring(lane)
        lane.step()
        other.offer((0, 700), (PAGE, 700, True))
        assert other.step() == 1
        other.complete(other.take(), b"fine")
        assert other.step() == 1
        assert other.used() == [(0, 4)]
        assert (lane.pump.fault != 0, other.pump.fault) == (True, 0)

    def test_the_base_stays_before_the_broken_chain(
        self, world, lane, fault, break_ring
    ):
        break_ring(lane)
        lane.step()
        good = lane.shadow.avail_idx
        for _ in range(good):
            lane.complete(lane.take())
        lane.step()
        assert lane.stop(good) == (good, 0, True)
        assert world.pool.used == 0


class TestIndirect:
    def test_it_must_be_negotiated(self, world):
        lane = Lane(world, guest_indirect=False)
        lane.offer((0, 10), indirect=True)
        lane.step()
        assert lane.fault == "an indirect descriptor is malformed or was not negotiated"

    def test_a_guest_without_it_may_use_a_back_with_it(self, world):
        lane = Lane(world, guest_indirect=False)
        lane.offer((0, 10), (0, 20), (0, 30, True))
        lane.step()
        assert taken(lane) == [(10, False), (20, False), (30, True)]


class TestHeads:
    def test_a_head_is_free_again_once_its_chain_is_completed(self, lane):
        lane.ring.write_desc(0, 0, 16)
        for _ in range(20):
            offer_raw(lane)
            assert lane.step() == 1
            lane.complete(lane.take())
            assert lane.step() == 1
        assert lane.pump.fault == 0

    def test_descriptors_in_the_middle_may_be_shared(self, lane):
        """The guest's own harm: each chain is looked at by itself."""
        lane.ring.write_desc(0, 0, 10, NEXT, 2)
        lane.ring.write_desc(1, 0, 20, NEXT, 2)
        lane.ring.write_desc(2, 0, 30, WRITE)
        offer_raw(lane, 0)
        offer_raw(lane, 1)
        assert lane.step() == 2
        assert taken(lane) == [(10, False), (30, True)]
        assert taken(lane) == [(20, False), (30, True)]

    def test_what_the_guest_writes_to_the_used_ring_is_not_read(self, lane):
        lane.offer((0, 16))
        lane.step()
        lane.ring.used_idx = 1000
        lane.ring.set_used_entry(0, 7, 7)
        lane.complete(lane.take())
        lane.step()
        assert lane.ring.used_idx == 1
        assert lane.ring.used_entry(0) == (0, 0)


def test_tables_of_the_lane_are_apart(world):
    """The support module itself: one table a head."""
    lane = Lane(world, size=4, entries=3)
    heads = [lane.offer((0, 1), (0, 2), (0, i + 3), indirect=True) for i in range(4)]
    assert sorted(heads) == [0, 1, 2, 3]
    assert TableArea.length(4, 3) == 4 * 3 * DESC_SIZE
    lane.step()
    for i in range(4):
        assert taken(lane) == [(1, False), (2, False), (i + 3, False)]
