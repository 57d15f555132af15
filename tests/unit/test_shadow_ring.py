# SPDX-License-Identifier: Apache-2.0
"""The driver side of the shadow ring: what the back sees, and what it may do."""

from __future__ import annotations

import itertools

import pytest

from tests.support.plane import BACK_BASE, MIB, PAGE, Lane, World
from tests.support.profiles import SANITIZED
from vhost_airlock.peers.ring import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

RINGS = [*itertools.product([1, 2, 4, 256, 1024], [False, True]), (32768, False)]

USED_INDEX = "the back's used index jumps by more than the ring holds"
USED_ID = "the back completes chains that are not in flight, again and again"


@pytest.fixture
def world():
    world = World()
    yield world
    world.check()


@pytest.fixture
def lane(world):
    return Lane(world, size=4)


def complete_raw(lane: Lane, *ends: tuple[int, int]) -> None:
    """Write used elements as they stand."""
    for head, length in ends:
        lane.device.complete(head, length)
    lane.device.publish()


class TestChains:
    @pytest.mark.parametrize(("size", "indirect"), RINGS)
    def test_rings_of_any_size_are_filled_and_emptied(self, world, size, indirect):
        lane = Lane(world, size=size, back_indirect=indirect)
        for _ in range(3):
            for i in range(size):
                lane.driver.free = [i]
                lane.offer((i % PAGE, 16))
            while lane.step(10_000):
                pass
            chains = [lane.take() for _ in range(size)]
            assert sorted(chain.head for chain in chains) == list(range(size))
            for chain in chains:
                lane.device.complete(chain.head)
            lane.device.publish()
            while lane.step(10_000):
                pass
            assert len(lane.used()) == size

    def test_with_indirect_one_descriptor_and_a_table(self, lane):
        lane.offer((1, 10), (2, 20), (3, 30, True))
        lane.step()
        head = lane.shadow.avail_entry(0)
        desc = lane.shadow.read_desc(head)
        assert (desc.length, desc.flags, desc.next) == (48, DESC_F_INDIRECT, 0)
        table = lane.world.isolated.view(desc.addr, desc.length)
        flags = [DESC.unpack_from(table, 16 * i)[1:] for i in range(3)]
        assert flags == [(10, DESC_F_NEXT, 1), (20, DESC_F_NEXT, 2), (30, 2, 0)]

    def test_with_indirect_one_buffer_needs_no_table(self, lane):
        lane.offer((0, 10, True), indirect=True)
        lane.step()
        desc = lane.shadow.read_desc(lane.shadow.avail_entry(0))
        assert (desc.length, desc.flags) == (10, DESC_F_WRITE)

    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_without_indirect_one_descriptor_for_each_buffer(self, world, count):
        lane = Lane(world, size=4, back_indirect=False)
        lane.offer(*[(PAGE * i, 10 + i, i > 1) for i in range(count)], indirect=True)
        lane.step()
        chain = lane.take()
        assert [(b.length, b.writable) for b in chain.buffers] == [
            (10 + i, i > 1) for i in range(count)
        ]

    def test_without_indirect_a_chain_waits_for_descriptors(self, world):
        lane = Lane(world, size=4, back_indirect=False)
        for _ in range(3):
            lane.offer((0, 10), (0, 20), (0, 30, True), indirect=True)
        assert lane.step() == 1
        assert not lane.pump.rest()
        for _ in range(3):
            lane.complete(lane.take())
            lane.step()
        assert len(lane.used()) == 3
        assert lane.counter("stalls") == 2
        assert lane.pump.fault == 0

    def test_without_indirect_a_chain_longer_than_the_ring_never_fits(self, world):
        lane = Lane(world, size=4, back_indirect=False)
        lane.offer(*[(0, 1)] * 4, indirect=True)
        assert lane.step() == 1
        lane.offer(*[(0, 1)] * 5, indirect=True)
        assert lane.step() == 0
        assert lane.fault == "a chain is larger than the pool allows"

    def test_without_indirect_descriptors_come_back_in_any_order(self, world):
        lane = Lane(world, size=8, back_indirect=False)
        taken = []
        for i in range(200):
            count = 1 + i * 7 % 5
            lane.offer(*[(PAGE * j, 1 + j) for j in range(count)], indirect=True)
            lane.step()
            while chain := lane.device.take():
                taken.append(chain)
            while taken and (len(taken) > 2 or i % 3 == 0):
                lane.complete(taken.pop(i % len(taken)))
                lane.step()
                lane.used()
        for chain in taken:
            lane.complete(chain)
        lane.step()
        assert lane.pump.outstanding == 0
        lane.used()
        # Every descriptor is there again.
        lane.offer(*[(0, 1)] * 8, indirect=True)
        assert lane.step() == 1

    def test_the_slot_that_came_back_last_goes_out_first(self, lane):
        for _ in range(3):
            lane.offer((0, 16))
        lane.step()
        chains = [lane.take() for _ in range(3)]
        for chain in chains:
            lane.complete(chain)
            lane.step()
        lane.used()
        for _ in range(3):
            lane.offer((0, 16))
        lane.step()
        again = [lane.take().head for _ in range(3)]
        assert again == [chain.head for chain in reversed(chains)]


class TestAddresses:
    def test_i2_all_addresses_are_of_isolated_memory(self, world, lane):
        lane.offer((1 << 32, 10), (1 << 32, 5000, True), (0, 100, True))
        lane.offer((1 << 32, 10))
        lane.step()
        seen = [lane.shadow.read_desc(i).addr for i in range(4)]
        seen += [b.addr for _ in range(2) for b in lane.take().buffers]
        assert all(address == 0 or address >= BACK_BASE for address in seen)

    def test_i2_no_address_of_ours_or_the_guests_is_anywhere(self):
        """All of isolated memory, as 8-byte numbers at any offset."""
        # The guest's addresses are such as no data or other field would be.
        world = World(regions=[(0x5EED_0000_0000, MIB)], pool=64 * PAGE)
        lane = Lane(world, size=16)
        for i in range(5):
            lane.offer(
                *[(0x5EED_0000_0000 + PAGE * i, 16 + 800 * i)] * 3,
                (0x5EED_0008_0000 + PAGE * i, 900, True),
                indirect=i % 2 == 0,
            )
        assert lane.step() == 5
        ours = [m.address for m in world.ram.pieces.values()]
        ours += [m.address for m in world.isolated.pieces.values()]
        for memory in world.isolated.pieces.values():
            data = bytes(memory.view)
            assert (0x5EED).to_bytes(2, "little") not in data
            for address in ours:
                # The high bytes of the addresses, low ones vary with the buffer.
                assert (address >> 24).to_bytes(5, "little") not in data


class TestUsedRing:
    """Used rings that the back may write, and their effect."""

    def offered(self, lane, count=3):
        for i in range(count):
            lane.offer((PAGE * i, 16, True))
        lane.step()
        return [lane.take() for _ in range(count)]

    @pytest.mark.parametrize("head", [4, 5, 255, 0xFFFF, 0x10000, 0xFFFFFFFF, 1 << 31])
    def test_an_id_beyond_the_ring_is_counted_and_skipped(self, lane, head):
        chains = self.offered(lane)
        complete_raw(lane, (head, 16), (chains[0].head, 16))
        assert lane.step() == 1
        assert len(lane.used()) == 1
        assert (lane.counter("violations"), lane.pump.fault) == (1, 0)

    def test_an_id_with_high_bits_is_not_taken_for_its_low_ones(self, lane):
        chains = self.offered(lane)
        complete_raw(lane, (chains[0].head + 0x10000, 16))
        assert lane.step() == 0
        assert lane.used() == []

    def test_an_id_that_is_not_in_flight_is_counted_and_skipped(self, lane):
        chains = self.offered(lane, 2)
        idle = ({0, 1, 2, 3} - {chain.head for chain in chains}).pop()
        complete_raw(lane, (idle, 16))
        assert lane.step() == 0
        assert lane.used() == []
        assert lane.counter("violations") == 1

    def test_a_second_completion_is_counted_and_skipped(self, world, lane):
        chain, *_ = self.offered(lane)
        lane.complete(chain, b"first")
        lane.complete(chain, b"other")
        assert lane.step() == 1
        assert len(lane.used()) == 1
        lane.complete(chain, b"third")
        assert lane.step() == 0
        assert lane.used() == []
        assert lane.counter("violations") == 2

    def test_a_descriptor_inside_a_chain_can_not_be_completed(self, world):
        lane = Lane(world, size=4, back_indirect=False)
        lane.offer((0, 1), (0, 2), (0, 3, True))
        lane.step()
        head = lane.take().head
        inner = lane.shadow.read_desc(head).next
        complete_raw(lane, (inner, 3))
        assert lane.step() == 0
        assert lane.counter("violations") == 1
        complete_raw(lane, (head, 3))
        assert lane.step() == 1

    def test_too_many_of_them_in_a_row_are_a_fault(self, lane):
        chains = self.offered(lane, 1)
        idle = (chains[0].head + 1) % 4
        for i in range(4):
            complete_raw(lane, (idle, 0))
            assert lane.step() == 0
            assert lane.pump.fault == 0, i
        complete_raw(lane, (idle, 0))
        lane.step()
        assert lane.fault == USED_ID
        assert lane.pump.reason == f"{USED_ID}: id {idle}, 5 in a row"

    def test_a_device_that_completes_twice_all_the_time_is_borne(self, lane):
        """vhost-device-console does so, once for each byte that it received."""
        for _ in range(50):
            chain, *_ = self.offered(lane, 1)
            complete_raw(lane, *[(chain.head, 1)] * 4)
            assert lane.step() == 1
            assert [length for _, length in lane.used()] == [1]
        assert lane.counter("violations") == 150
        assert lane.pump.fault == 0

    def test_after_a_fault_of_the_back_nothing_moves(self, world, lane):
        chain, *_ = self.offered(lane)
        lane.shadow.used_idx = 5
        lane.step()
        assert lane.fault == USED_INDEX
        before = world.ram.read(0, 4 * PAGE)
        lane.shadow.used_idx = 0
        lane.complete(chain, b"late")
        lane.offer((0, 16))
        assert lane.pump.step() == (0, False, False)
        assert not lane.pump.rest()
        assert lane.used() == []
        assert world.ram.read(0, 4 * PAGE) == before

    def test_what_came_before_the_fault_is_completed(self, lane):
        first, second, _ = self.offered(lane)
        complete_raw(lane, (first.head, 1), (9, 0), (9, 0), (second.head, 2))
        lane.step()
        complete_raw(lane, (9, 0), (9, 0), (9, 0), (9, 0))
        assert lane.step() == 0
        assert lane.pump.fault == 0
        complete_raw(lane, (9, 0))
        lane.step()
        assert lane.fault == USED_ID
        assert [length for _, length in lane.used()] == [1, 2]
        assert lane.pump.outstanding == 1

    @pytest.mark.parametrize("jump", [5, 6, 100, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF])
    @pytest.mark.parametrize("after", [0, 1, 9])
    def test_an_index_that_jumps_or_goes_back_is_a_fault(self, lane, jump, after):
        for _ in range(after):
            lane.offer((0, 16))
            lane.step()
            lane.complete(lane.take())
            lane.step()
            lane.used()
        self.offered(lane)
        lane.shadow.used_idx = (lane.shadow.used_idx + jump) & 0xFFFF
        assert lane.step() == 0
        assert lane.fault == USED_INDEX
        found = f"to {(after + jump) & 0xFFFF} from {after}"
        assert lane.pump.reason == f"{USED_INDEX}: {found}"

    @pytest.mark.parametrize("size", [32768, 1024])
    def test_an_index_that_goes_back_by_one_is_a_fault_in_large_rings(
        self, world, size
    ):
        lane = Lane(world, size=size)
        lane.offer((0, 16))
        lane.step()
        lane.complete(lane.take())
        lane.step()
        lane.shadow.used_idx = 0
        lane.step()
        assert lane.fault == USED_INDEX

    def test_an_index_in_the_ring_tells_of_old_elements_again(self, lane):
        """Within the ring, whatever stands there is judged like any other."""
        chains = self.offered(lane)
        lane.complete(chains[0])
        lane.step()
        lane.shadow.used_idx = 5
        lane.step()
        # Elements that were never written say 0; one of them may be in flight.
        assert lane.pump.fault == 0
        assert lane.counter("violations") >= 2

    @pytest.mark.parametrize("base", [0, 0xFFF0])
    def test_indices_wrap_round(self, world, base):
        lane = Lane(world, size=4, base=base)
        rounds = 2000 if SANITIZED else 70_000
        for i in range(rounds):
            lane.offer((0, 16))
            lane.step()
            lane.complete(lane.take(), length=0)
            lane.step()
            if i % 4 == 3:
                assert len(lane.used()) == 4
        assert lane.shadow.used_idx == rounds & 0xFFFF
        assert lane.pump.fault == 0


class TestTrust:
    """Nothing in isolated memory decides anything, whatever is written there."""

    def scribble(self, world: World, lane: Lane) -> None:
        for memory in world.isolated.pieces.values():
            memory.view[:] = b"\xff" * memory.size

    def test_i5_the_rings_descriptors_are_not_read_back(self, world):
        lane = Lane(world, size=4, back_indirect=False)
        for _ in range(40):
            head = lane.offer((0, 10), (PAGE, 600, True), (2 * PAGE, 10, True))
            lane.step()
            chain = lane.take()
            # Lengths, addresses, flags, next: all of them changed.
            for i in range(4):
                lane.shadow.write_desc(i, 0, 0xFFFFFFFF, 0xFFFF, 0xFFFF)
            lane.shadow.avail_idx = 77
            for i in range(4):
                lane.shadow.set_avail_entry(i, 0xFFFF)
            lane.device.complete(chain.head, 610)
            lane.device.publish()
            assert lane.step() == 1
            assert lane.used() == [(head, 610)]
            lane.shadow.avail_idx = lane.device.next_avail
        assert lane.pump.fault == 0

    def test_i5_tables_are_not_read_back(self, world, lane):
        for _ in range(40):
            lane.offer((0, 10), (PAGE, 600, True), (2 * PAGE, 10, True))
            lane.step()
            chain = lane.take()
            desc = lane.shadow.read_desc(chain.head)
            world.isolated.view(desc.addr, desc.length)[:] = b"\xff" * desc.length
            lane.complete(chain, b"\x11" * 610)
            assert lane.step() == 1
            assert lane.used()[0][1] == 610
            assert world.ram.read(PAGE + 600, 8) == bytes(8)
        assert lane.pump.fault == 0

    def test_i5_the_pool_keeps_nothing_in_isolated_memory(self, world, lane):
        for i in range(60):
            lane.offer((0, 10), (PAGE, 600 + 97 * i, True), (64 * PAGE, 9000, True))
            lane.step()
            chain = lane.take()
            ends = lane.shadow.used_idx, lane.shadow.avail_idx
            self.scribble(world, lane)
            lane.shadow.used_idx, lane.shadow.avail_idx = ends
            lane.shadow.used_flags = 0
            lane.device.complete(chain.head, 0)
            lane.device.publish()
            assert lane.step() == 1
            lane.used()
            assert world.pool.used == 0
        assert lane.pump.fault == 0
        world.check()

    def test_i5_event_words_only_suppress_kicks(self, world):
        for event_idx in (False, True):
            lane = Lane(world, size=4, back_event_idx=event_idx)
            for word in (0, 1, 0x7FFF, 0xFFFF):
                lane.shadow.used_flags = word
                lane.shadow.avail_event = word
                lane.offer((0, 16))
                assert lane.step() == 1
                lane.complete(lane.take())
                assert lane.step() == 1
                lane.used()
