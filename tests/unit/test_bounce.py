# SPDX-License-Identifier: Apache-2.0
"""A chain's doubles: framing, alignment, zeroing, and what is copied back."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.support.plane import MIB, PAGE, Lane, World
from vhost_airlock.peers import Chain
from vhost_airlock.peers.ring import DESC_F_INDIRECT

SMALL = 512


@pytest.fixture
def world():
    world = World()
    yield world
    world.check()


def spans(chain: Chain) -> list[tuple[int, int]]:
    return sorted((b.addr, b.addr + b.length) for b in chain.buffers)


def overlaps(taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where a span begins before the one below it ends."""
    return [
        (end, start)
        for (_, end), (start, _) in itertools.pairwise(sorted(taken))
        if start < end
    ]


class TestFraming:
    LENGTHS = (1, 2, 15, 16, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 65536)

    @pytest.mark.parametrize("back_indirect", [False, True])
    @pytest.mark.parametrize("readable", [0, 5, 14])
    def test_descriptors_are_one_to_one(self, world, back_indirect, readable):
        lane = Lane(world, back_indirect=back_indirect)
        buffers = [
            (0x10_0000 + i * 0x1_0000 + 7 * i, length, i >= readable)
            for i, length in enumerate(self.LENGTHS)
        ]
        lane.offer(*buffers)
        assert lane.step() == 1
        assert [(b.length, b.writable) for b in lane.take().buffers] == [
            (length, writable) for _, length, writable in buffers
        ]

    def test_adjacent_buffers_stay_apart(self, world):
        lane = Lane(world)
        lane.offer((0, PAGE), (PAGE, PAGE), (2 * PAGE, 16), (2 * PAGE + 16, 16))
        lane.step()
        assert [b.length for b in lane.take().buffers] == [PAGE, PAGE, 16, 16]

    def test_the_same_guest_memory_twice_has_two_doubles(self, world):
        lane = Lane(world)
        lane.offer((0, 1000), (0, 1000), (0, 1000, True))
        lane.step()
        assert len(set(spans(lane.take()))) == 3

    @pytest.mark.parametrize("length", [SMALL, 700, PAGE - 1, PAGE, 3 * PAGE + 1])
    @pytest.mark.parametrize("offset", [0, 1, 511, 512, 2048, PAGE - 1])
    @pytest.mark.parametrize("region", [0, 1 << 32])
    def test_large_buffers_lie_at_the_guests_offset_in_the_page(
        self, world, length, offset, region
    ):
        lane = Lane(world)
        lane.offer((region + 5 * PAGE + offset, length), (offset, length, True))
        lane.step()
        chain = lane.take()
        assert [b.addr % PAGE for b in chain.buffers] == [offset, offset]
        (_, end), (start, _) = spans(chain)
        # No page is shared.
        assert (end - 1) // PAGE < start // PAGE

    @pytest.mark.parametrize("count", [1, 3, 8, 9, 60])
    def test_small_buffers_are_aligned_to_64(self, world, count):
        lane = Lane(world, size=64)
        sizes = [1 + 37 * i % (SMALL - 1) for i in range(count)]
        lane.offer(*[(i * 7, size) for i, size in enumerate(sizes)])
        lane.step()
        chain = lane.take()
        assert all(b.addr % 64 == 0 for b in chain.buffers)
        assert not overlaps(spans(chain))

    def test_a_few_small_buffers_take_nothing_of_the_pool(self, world):
        lane = Lane(world)
        lane.offer((0, 16), (0, 128), (0, 1, True))
        lane.step()
        assert world.pool.used == 0
        lane.offer((0, SMALL - 1))
        lane.step()
        assert world.pool.used == 0

    def test_more_of_them_take_one_block(self, world):
        lane = Lane(world)
        lane.offer(*[(0, 100)] * 5)  # 5 * 128 and a table of 80 bytes
        lane.step()
        assert world.pool.used == PAGE
        lane.complete(lane.take())
        lane.step()
        assert world.pool.used == 0

    def test_that_block_may_have_to_be_waited_for(self):
        world = World(pool=PAGE, limit=8 * PAGE)
        lane = Lane(world)
        lane.offer((0, PAGE))
        lane.offer(*[(0, 100)] * 5)
        assert lane.step() == 1
        assert world.pool.used == PAGE
        assert world.pool.take_wanted() == PAGE
        lane.complete(lane.take())
        lane.step()
        assert [b.length for b in lane.take().buffers] == [100] * 5
        world.check()

    @pytest.mark.parametrize("back_indirect", [False, True])
    def test_the_areas_of_slots_do_not_touch(self, world, back_indirect):
        """All slots at once, each with its area full to the last byte."""
        lane = Lane(world, size=16, back_indirect=back_indirect)
        for i in range(16):
            lane.driver.free = [i]
            lane.offer((i * PAGE, SMALL - 1))
            world.ram.write(i * PAGE, bytes([i]) * (SMALL - 1))
        assert lane.step() == 16
        chains = [lane.take() for _ in range(16)]
        assert not overlaps([span for chain in chains for span in spans(chain)])
        for i, chain in enumerate(chains):
            assert lane.bytes_of(chain) == bytes([i]) * (SMALL - 1)

    def test_buffers_in_flight_never_overlap(self, world):
        """Nor do they touch the rings or another chain's table."""
        chance = random.Random(7)
        lane = Lane(world, size=32, entries=12)
        flight: list[Chain] = []
        for _ in range(400):
            if len(lane.driver.free) and chance.random() < 0.6:
                lane.offer(
                    *[
                        (
                            (1 << 32) + chance.randrange(3 * MIB),
                            chance.choice([1, 64, 511, 512, 3000, 9000, 70_000]),
                        )
                        for _ in range(chance.randint(1, 12))
                    ],
                    indirect=True,
                )
                lane.step()
                while chain := lane.device.take():
                    flight.append(chain)
            elif flight:
                lane.complete(flight.pop(chance.randrange(len(flight))))
                lane.step()
                lane.used()
            taken = [(lane.area_at, lane.shadow_parts[2] + 6 + 8 * 32)]
            for chain in flight:
                taken += spans(chain)
                desc = lane.shadow.read_desc(chain.head)
                if desc.flags & DESC_F_INDIRECT:
                    taken.append((desc.addr, desc.addr + desc.length))
            assert not overlaps(taken)


class TestZeroing:
    """Buffers that the device may write never show bytes from before."""

    @pytest.mark.parametrize("length", [16, 511, 512, 5000, 70_000])
    @pytest.mark.parametrize("policy", ["full", "used", "used+tail"])
    def test_m3_what_the_back_may_write_is_zero(self, world, length, policy):
        lane = Lane(world, policy=policy)
        for i in range(3):
            # Earlier requests, the guest's old bytes, and the back's own leavings.
            world.ram.write(MIB, b"\xee" * length)
            lane.offer((MIB, length))
            lane.step()
            lane.complete(lane.take())
            lane.step()
            lane.used()
            for memory in list(world.isolated.pieces.values())[:1]:
                memory.view[:] = b"\xdd" * memory.size
            world.ram.write(0, b"\xcc" * length)
            lane.offer((0, length, True))
            lane.step()
            chain = lane.take()
            assert bytes(lane.writable(chain)[0]) == bytes(length), i
            lane.complete(chain)
            lane.step()
            lane.used()

    def test_what_the_guest_has_where_the_back_writes_is_not_copied(self, world):
        secret = b"not for the back"
        lane = Lane(world)
        world.ram.write(0, secret * 256)
        lane.offer((PAGE, 16), (0, PAGE, True), (0, 16, True))
        lane.step()
        for memory in world.isolated.pieces.values():
            assert secret not in bytes(memory.view)

    def test_bytes_around_a_readable_buffer_are_not_copied(self, world):
        lane = Lane(world)
        world.ram.write(0, b"A" * 1000 + b"B" * 3000 + b"A" * 1000)
        lane.offer((1000, 3000), (1000, 10))
        lane.step()
        for memory in world.isolated.pieces.values():
            assert b"A" not in bytes(memory.view)


OLD = 0x4F
"""The guest's bytes in a buffer before the device writes there."""


class TestPolicies:
    """10 bytes to read; 600, 700 and `tail` bytes to write."""

    def run(self, world, policy, *, wrote=b"", said=0, tail=1) -> list[bytes]:
        """The guest's three buffers, after a completion with len `said`."""
        lane = Lane(world, policy=policy)
        sizes = (600, 700, tail)
        for i, size in enumerate(sizes):
            world.ram.write(MIB * i, bytes([OLD]) * (size + 1))
        buffers = [(MIB * i, size, True) for i, size in enumerate(sizes)]
        lane.offer((8 * MIB, 10), *buffers)
        lane.step()
        lane.complete(lane.take(), wrote, length=said)
        assert lane.step() == 1
        self.clamped = lane.counter("clamped")
        self.copied = lane.counter("bytes_out")
        self.told = lane.used()[0][1]
        for i, size in enumerate(sizes):
            assert world.ram.read(MIB * i + size, 1) == bytes([OLD])
        return [world.ram.read(MIB * i, size) for i, size in enumerate(sizes)]

    @pytest.mark.parametrize("said", [0, 1, 600, 601, 1300, 1301])
    def test_full_copies_all_whatever_is_said(self, world, said):
        wrote = bytes(i % 251 for i in range(1301))
        assert b"".join(self.run(world, "full", wrote=wrote, said=said)) == wrote
        assert (self.told, self.clamped, self.copied) == (said, 0, 1301)

    def test_full_shows_zeros_where_nothing_was_written(self, world):
        buffers = self.run(world, "full", wrote=b"x" * 10, said=1301)
        assert b"".join(buffers) == b"x" * 10 + bytes(1291)

    @pytest.mark.parametrize("said", [0, 1, 599, 600, 601, 1300, 1301])
    def test_used_copies_what_is_said(self, world, said):
        wrote = bytes(i % 251 for i in range(1301))
        buffers = b"".join(self.run(world, "used", wrote=wrote, said=said))
        assert buffers == wrote[:said] + bytes([OLD]) * (1301 - said)
        assert (self.told, self.copied) == (said, said)

    @pytest.mark.parametrize("said", [0, 1, 600, 1300, 1301])
    @pytest.mark.parametrize("tail", [1, 16, 64])
    def test_used_tail_copies_a_small_last_buffer_too(self, world, said, tail):
        wrote = bytes(i % 251 for i in range(1300 + tail))
        buffers = b"".join(
            self.run(world, "used+tail", wrote=wrote, said=said, tail=tail)
        )
        head = min(said, 1300)
        assert buffers == wrote[:head] + bytes([OLD]) * (1300 - head) + wrote[1300:]
        assert self.told == said

    def test_used_tail_is_for_small_ones_only(self, world):
        wrote = bytes(i % 251 for i in range(1300 + 65))
        buffers = b"".join(self.run(world, "used+tail", wrote=wrote, said=700, tail=65))
        assert buffers == wrote[:700] + bytes([OLD]) * 665

    @pytest.mark.parametrize("policy", ["full", "used", "used+tail"])
    @pytest.mark.parametrize("said", [1302, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF])
    def test_b1_more_than_there_is_room_for_is_cut_and_counted(
        self, world, policy, said
    ):
        wrote = bytes(i % 251 for i in range(1301))
        assert b"".join(self.run(world, policy, wrote=wrote, said=said)) == wrote
        assert (self.told, self.clamped) == (1301, 1)

    @pytest.mark.parametrize("policy", ["full", "used", "used+tail"])
    @pytest.mark.parametrize("room", [1, 2, 9, 10, 11])
    def test_g3_less_room_than_any_header_takes(self, world, policy, room):
        """Lengths are what the guest says, and nothing is taken off them."""
        lane = Lane(world, policy=policy)
        world.ram.write(0, b"g" * 100)
        lane.offer((PAGE, 1), (10, room, True))
        lane.step()
        chain = lane.take()
        assert [buffer.length for buffer in chain.buffers] == [1, room]
        lane.complete(chain, b"w" * room, length=12)
        lane.step()
        assert [length for _, length in lane.used()] == [room]
        assert world.ram.read(0, 100) == b"g" * 10 + b"w" * room + b"g" * (90 - room)

    @pytest.mark.parametrize("policy", ["full", "used", "used+tail"])
    @pytest.mark.parametrize("said", [0, 5, 0xFFFFFFFF])
    def test_with_nothing_to_write_nothing_is_written(self, world, policy, said):
        lane = Lane(world, policy=policy)
        world.ram.write(0, b"question")
        lane.offer((0, 8))
        lane.step()
        chain = lane.take()
        # Readable, but the back's to scribble on: that never goes back.
        world.isolated.view(chain.buffers[0].addr, 8)[:] = b"scribble"
        lane.complete(chain, length=said)
        lane.step()
        assert lane.used() == [(0, 0)]
        assert world.ram.read(0, 8) == b"question"
        assert lane.counter("clamped") == (said > 0)

    def test_status_behind_what_is_said_reaches_the_guest(self, world):
        """Real back-ends say 0 or 1 and leave a status byte at the end."""
        for policy in ("full", "used+tail"):
            lane = Lane(world, policy=policy)
            world.ram.write(PAGE, b"\xff")
            lane.offer((0, 16), (2 * PAGE, 512, True), (PAGE, 1, True))
            lane.step()
            chain = lane.take()
            lane.writable(chain)[1][:] = b"\x02"
            lane.complete(chain, length=1)
            lane.step()
            assert world.ram.read(PAGE, 1) == b"\x02"


class TestSingleCopy:
    def test_overlapping_writable_buffers_end_as_the_last_says(self, world):
        lane = Lane(world)
        lane.offer((0, 1000, True), (500, 1000, True))
        lane.step()
        lane.complete(lane.take(), b"a" * 1000 + b"b" * 1000)
        lane.step()
        assert world.ram.read(0, 1501) == b"a" * 500 + b"b" * 1000 + b"\0"

    def test_a_buffer_over_the_guests_own_ring_harms_only_the_guest(self, world):
        lane = Lane(world)
        lane.offer((lane.ring_at, lane.layout.end, True))
        lane.step()
        lane.complete(lane.take(), b"\xff" * lane.layout.end)
        lane.step()
        # Ours came last: the element and the index are as they should be.
        assert lane.ring.used_idx == 1
        assert lane.ring.used_entry(0) == (0, lane.layout.end)
        assert lane.step() == 0
        assert lane.fault is not None


class TestPastTheCaches:
    """From 256 KiB in a chain and 4 MiB in a ring on, other instructions copy."""

    LARGE = 256 * 1024

    @pytest.fixture
    def world(self):
        world = World(pool=32 * MIB, regions=[(0, 32 * MIB)])
        yield world
        world.check()

    @pytest.mark.parametrize("count", [1, 12])
    @pytest.mark.parametrize("length", [LARGE - 1, LARGE, LARGE + 65])
    def test_each_byte_arrives_and_no_other_changes(self, world, count, length):
        """At all offsets in a line, and over the end of a line or not."""
        lane = Lane(world, size=64)
        ram = bytearray(random.Random(1).randbytes(32 * MIB))
        world.ram.write(0, bytes(ram))
        places = [
            (2 * i * MIB + 7 * i, (2 * i + 1) * MIB + 5 * i) for i in range(count)
        ]
        for read, written in places:
            lane.offer((read, length), (written, length, True))
        while lane.step():
            pass
        assert (world.pool.used > 4 * MIB) == (count > 1)
        for i, (read, written) in enumerate(places):
            chain = lane.take()
            assert lane.bytes_of(chain) == ram[read : read + length]
            data = random.Random(i).randbytes(length)
            lane.complete(chain, data)
            ram[written : written + length] = data
        while lane.step():
            pass
        assert world.ram.read(0, 32 * MIB) == ram

    def test_memory_may_end_in_the_middle(self, world):
        world.ram.add(64 * MIB, MIB)
        world.set_regions()
        lane = Lane(world, size=64)
        for i in range(10):
            lane.offer((2 * i * MIB, MIB, True))
        while lane.step():
            pass
        lane.offer((64 * MIB, MIB))
        world.ram.pieces[64 * MIB].cut(MIB // 2)
        assert lane.step() == 0
        assert (
            lane.fault
            == "a page of memory that the ring or a request is in can't be had"
        )
        assert world.pool.used == 10 * MIB
        world.ram.pieces[64 * MIB].mend()
