# SPDX-License-Identifier: Apache-2.0
"""The guest's memory as the data plane sees it, through chains that lie in it."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.limits import many_fds
from tests.support.plane import MIB, PAGE, Lane, World
from vhost_airlock.dataplane.regions import GuestMemory

ADDRESS = "a descriptor points outside of the guest's memory"


@pytest.fixture
def world():
    """[0, 2 MiB) and [2 MiB, 4 MiB) in two files, then holes and more."""
    world = World()
    yield world
    world.check()


def pattern(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def read_through(lane: Lane, address: int, length: int) -> bytes:
    """The bytes that the back reads in a guest's buffer of `length` bytes."""
    lane.offer((address, length))
    assert lane.step() == 1, lane.fault
    chain = lane.take()
    data = lane.bytes_of(chain)
    lane.complete(chain)
    lane.step()
    lane.used()
    return data


def write_through(lane: Lane, address: int, data: bytes) -> None:
    """The back writes this where the guest has room for it."""
    lane.offer((address, len(data), True))
    assert lane.step() == 1, lane.fault
    lane.complete(lane.take(), data)
    lane.step()
    lane.used()


class TestCrossing:
    @pytest.mark.parametrize("before", [1, 15, 600, PAGE, 3 * PAGE + 7])
    @pytest.mark.parametrize("after", [1, 15, 600, PAGE, 3 * PAGE + 7])
    def test_a_buffer_may_lie_over_two_regions(self, world, before, after):
        lane = Lane(world)
        address, length = 2 * MIB - before, before + after
        data = pattern(length, before * after)
        world.ram.write(address, data)
        assert read_through(lane, address, length) == data
        data = pattern(length, before + after)
        write_through(lane, address, data)
        assert world.ram.read(address, length) == data

    def test_a_buffer_may_lie_over_many_regions(self):
        regions = [(0x100000 + i * PAGE, PAGE) for i in range(64)]
        world = World(regions=regions)
        lane = Lane(world)
        data = pattern(64 * PAGE)
        world.ram.write(0x100000, data)
        assert read_through(lane, 0x100000, 64 * PAGE) == data
        write_through(lane, 0x100001, data[: 64 * PAGE - 1])
        assert world.ram.read(0x100001, 64 * PAGE - 1) == data[: 64 * PAGE - 1]
        world.check()

    @pytest.mark.parametrize("writable", [False, True])
    @pytest.mark.parametrize(
        ("address", "length"),
        [
            (4 * MIB - 1, 2),
            (4 * MIB - PAGE, 4 * MIB + 2 * PAGE),
            (8 * MIB - 10, 100),
            (8 * MIB - 10, 10),
            (4 * MIB, 1),
            (10 * MIB - 100, 101),
        ],
        ids=["over_end", "over_hole", "over_start", "before", "at_end", "over_last"],
    )
    def test_no_buffer_may_lie_over_a_hole(self, world, address, length, writable):
        lane = Lane(world)
        lane.offer((address, length, writable))
        assert lane.step() == 0
        assert lane.fault == ADDRESS

    @pytest.mark.parametrize("writable", [False, True])
    @given(
        address=st.one_of(
            st.integers(0, (1 << 64) - 1),
            st.builds(
                lambda edge, by: (edge + by) % (1 << 64),
                st.sampled_from([0, 2 * MIB, 4 * MIB, 8 * MIB, 10 * MIB, 1 << 32]),
                st.integers(-2 * PAGE, 2 * PAGE),
            ),
        ),
        length=st.sampled_from([1, 2, 64, 3000, PAGE, MIB, 1 << 31, 0xFFFFFFFF]),
    )
    @settings(max_examples=100, deadline=None)
    def test_m2_any_address_is_memory_or_a_fault(self, writable, address, length):
        """G1 too: lengths up to the largest."""
        world = World()
        lane = Lane(world)
        inside = any(
            start <= address and address + length <= end
            for start, end in [
                (0, 4 * MIB),
                (8 * MIB, 10 * MIB),
                (1 << 32, (1 << 32) + 4 * MIB),
            ]
        )
        lane.offer((address, length, writable))
        lane.step()
        if inside:
            assert lane.fault is None
            lane.complete(lane.take(), b"w" * length if writable else b"")
            lane.step()
            assert len(lane.used()) == 1
        else:
            assert lane.fault == ADDRESS
            assert lane.device.take() is None
        world.check()

    def test_every_last_byte_is_there(self, world):
        lane = Lane(world)
        for address, memory in world.ram.pieces.items():
            if address == lane.ring_at:
                continue
            memory.view[0], memory.view[-1] = 0xA5, 0x5A
            assert read_through(lane, address, 1) == b"\xa5"
            assert read_through(lane, address + memory.size - 1, 1) == b"\x5a"
            assert read_through(lane, address, memory.size)[-1] == 0x5A

    def test_memory_may_end_where_addresses_do(self):
        top = (1 << 64) - PAGE
        world = World(regions=[(0, PAGE), (top - PAGE, PAGE), (top, PAGE - 1)])
        lane = Lane(world)
        data = pattern(2 * PAGE - 1)
        world.ram.write(top - PAGE, data)
        assert read_through(lane, top - PAGE, 2 * PAGE - 1) == data
        lane.offer((top - PAGE, 2 * PAGE))
        lane.step()
        assert lane.fault == ADDRESS


@pytest.fixture
def room_for_regions() -> Iterator[None]:
    """A file each, which is mapped twice."""
    with many_fds(2048):
        yield
        gc.collect()


class TestTable:
    @pytest.mark.usefixtures("room_for_regions")
    def test_it_may_be_full(self):
        """511 regions and the ring's own, half of them with a hole behind them."""
        shuffled = random.Random(3)
        regions = [(i * 3 * PAGE, PAGE * (2 + i % 2)) for i in range(511)]
        shuffled.shuffle(regions)
        world = World(regions=regions)
        lane = Lane(world)
        for _ in range(400):
            address, size = shuffled.choice(regions)
            data = pattern(size, address)
            world.ram.write(address, data)
            assert read_through(lane, address, size) == data
        address, size = max(regions)
        lane.offer((address + size, 1))
        lane.step()
        assert lane.fault == ADDRESS
        world.check()

    def test_more_than_512_regions_are_refused(self):
        memory = GuestMemory()
        with pytest.raises(ValueError, match="513 regions, more than 512"):
            memory.set_regions([(i * PAGE, PAGE, PAGE) for i in range(513)])

    def test_a_table_that_is_refused_leaves_the_old_one(self, world):
        lane = Lane(world)
        with pytest.raises(ValueError, match="more than 512"):
            world.memory.set_regions([(i * PAGE, PAGE, PAGE) for i in range(513)])
        assert read_through(lane, 0, 16) == bytes(16)

    def test_no_regions_at_all(self, world):
        lane = Lane(world)
        world.memory.set_regions([])
        lane.offer((0, 1))
        lane.step()
        assert lane.fault == ADDRESS

    def test_a_region_may_come_to_another_place(self, world):
        lane = Lane(world)
        world.ram.write(0, b"here")
        assert read_through(lane, 0, 4) == b"here"
        moved = world.ram.pieces.pop(0)
        world.ram.pieces[1 << 34] = moved
        world.set_regions()
        assert read_through(lane, 1 << 34, 4) == b"here"
        lane.offer((0, 4))
        lane.step()
        assert lane.fault == ADDRESS


class TestRemoval:
    """Regions that go away under chains in flight."""

    def test_what_is_not_there_any_more_is_not_written(self, world):
        lane = Lane(world)
        lane.offer((PAGE, 600, True), (8 * MIB, 600, True), (9 * MIB, 16, True))
        lane.step()
        chain = lane.take()
        before = world.ram.read(8 * MIB, 2 * MIB)
        world.set_regions(without=[8 * MIB])
        lane.complete(chain, b"x" * 1216)
        assert lane.step() == 1
        assert world.ram.read(8 * MIB, 2 * MIB) == before
        assert world.ram.read(PAGE, 600) == b"x" * 600
        # The chain is done all the same.
        assert lane.used() == [(0, 1216)]
        assert lane.counter("bytes_out") == 600
        assert lane.pump.fault == 0

    def test_the_part_before_a_new_hole_is_written(self, world):
        lane = Lane(world)
        lane.offer((2 * MIB - 1000, 2000, True))
        lane.step()
        chain = lane.take()
        world.set_regions(without=[2 * MIB])
        lane.complete(chain, b"x" * 2000)
        assert lane.step() == 1
        assert world.ram.read(2 * MIB - 1000, 1000) == b"x" * 1000
        assert world.ram.read(2 * MIB, 1000) == bytes(1000)

    def test_a_chain_that_waits_for_room_is_looked_up_again(self):
        world = World(pool=PAGE)
        lane = Lane(world)
        lane.offer((0, PAGE, True))
        lane.offer((8 * MIB, PAGE))
        assert lane.step() == 1
        world.set_regions(without=[8 * MIB])
        lane.complete(lane.take())
        assert lane.step() == 1
        assert lane.fault == ADDRESS
        found = f"head 1, address {8 * MIB:#x}, {PAGE} bytes"
        assert lane.pump.reason == f"{ADDRESS}: {found}"
        assert world.pool.used == 0
        assert lane.stop(1) == (1, 0, True)

    def test_a_chain_that_waits_to_be_written_to_is_not_written(self):
        world = World(pool=PAGE)
        lane = Lane(world)
        lane.offer((0, PAGE, True))
        lane.offer((8 * MIB, PAGE, True))
        lane.step()
        world.set_regions(without=[8 * MIB])
        lane.complete(lane.take())
        lane.step()
        lane.complete(lane.take(), b"x")
        lane.step()
        assert world.ram.read(8 * MIB, 4) == bytes(4)

    def test_memory_may_come_back(self, world):
        lane = Lane(world)
        for _ in range(3):
            world.set_regions(without=[8 * MIB, 0])
            world.set_regions()
            write_through(lane, 8 * MIB, b"back")
            assert read_through(lane, 8 * MIB, 4) == b"back"
