# SPDX-License-Identifier: Apache-2.0
"""The promises of the design, I1 to I9, as far as they are the data plane's.

Each has one test here that says it as directly as it can be said; more of the same is
in the tests of the single modules, in test_races.py, and in tests/property. What is
said of descriptors, messages and sessions is tested with whole sessions.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
from pathlib import Path

import pytest

from tests.support.plane import BACK_BASE, MIB, PAGE, Lane, World
from tests.support.profiles import SANITIZED
from vhost_airlock.dataplane.pump import POLICIES
from vhost_airlock.peers import Buffer, Chain, DeviceRing, DriverRing

MARK = b"\xf5NOT FOR YOU\xf5\xf5\xf5\xf5"
"""16 bytes that all of guest memory is full of, save what the back may read."""


def isolated_bytes(world: World) -> bytes:
    return b"".join(bytes(piece.view) for piece in world.isolated.pieces.values())


def guest_bytes(world: World) -> dict[int, bytes]:
    return {at: bytes(piece.view) for at, piece in world.ram.pieces.items()}


def random_chain(chance: random.Random, at: int, room: int) -> list[Buffer]:
    """Readable buffers, then writable ones, somewhere in [at, at + room)."""
    count = chance.randint(1, 6)
    each = room // count
    lengths = [chance.choice([1, 16, 100, 511, 512, 4096, 6000]) for _ in range(count)]
    readable = chance.randint(0, count)
    return [
        Buffer(at + i * each + chance.randrange(each - length), length, i >= readable)
        for i, length in enumerate(lengths)
    ]


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("back_indirect", [False, True])
def test_i1_nothing_but_what_the_back_may_read_is_in_isolated_memory(
    policy, back_indirect
):
    world = World(pool=[256 * PAGE, 64 * PAGE])
    chance = random.Random(1)
    for piece in world.ram.pieces.values():
        piece.view[:] = MARK * (piece.size // len(MARK))
    lane = Lane(world, size=16, policy=policy, back_indirect=back_indirect)
    flight: list[Chain] = []
    given = 0
    for i in range(600):
        if len(lane.driver.free) >= 6 and chance.random() < 0.6:
            slot = lane.driver.free[-1]
            chain = random_chain(chance, slot * 16 * PAGE + MIB * (slot % 2), 16 * PAGE)
            for buffer in chain:
                world.ram.write(
                    buffer.addr,
                    bytes([i % 200]) * buffer.length
                    if not buffer.writable
                    else (MARK * (buffer.length // 16 + 1))[: buffer.length],
                )
            lane.offer(*chain, indirect=chance.random() < 0.5)
        lane.step()
        while taken := lane.device.take():
            given += len(lane.bytes_of(taken))
            assert MARK not in lane.bytes_of(taken)
            flight.append(taken)
        if flight and chance.random() < 0.6:
            lane.complete(flight.pop(chance.randrange(len(flight))), b"")
            lane.step()
            lane.used()
        if i % 50 == 0 and lane.pump.outstanding == 0:
            lane.start(lane.stop(lane.device.next_avail)[0])
        # Nor half a mark, from a copy that was a little too long.
        assert MARK[1:9] not in isolated_bytes(world)
    assert given > 100_000
    assert lane.pump.fault == 0
    world.check()


def test_i2_isolated_memory_holds_no_address_but_its_own():
    """Guest-physical addresses and ours would be found by their upper bytes."""
    start = 0x5EED_4D00_0000
    world = World(regions=[(start, 4 * MIB)], pool=64 * PAGE)
    lane = Lane(world, size=16)
    foreign = {(start >> 32).to_bytes(2, "little")}
    for space in (world.ram, world.isolated):
        for piece in space.pieces.values():
            foreign.add((piece.address >> 24).to_bytes(5, "little"))
    flight: list[Chain] = []
    for i in range(100):
        lane.offer(
            (start + 5000 * i, 16),
            (start + 3000 * i, 700 + i),
            (start + 7000 * i, 3000, True),
            indirect=i % 2 == 0,
        )
        lane.step()
        flight.append(lane.take())
        for buffer in flight[-1].buffers:
            assert BACK_BASE <= buffer.addr < BACK_BASE + (16 << 32)
        if len(flight) == 3:
            lane.complete(flight.pop(i % 3))
            lane.step()
            lane.used()
        held = isolated_bytes(world)
        for address in foreign:
            assert address not in held


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("fetched", [0, 1, 2])
def test_i3_every_chain_is_done_once_or_in_flight_or_handed_back(size, fetched):
    """All orders of completion, all points to stop at, all that the back may say."""
    cases = 0
    for done in range(fetched + 1):
        for order in itertools.permutations(range(fetched), done):
            for said in (None, *range(3), 3, 0xFFFF):
                for base in (0, 0xFFFF):
                    stop_and_count(size, base, fetched, order, said)
                    cases += 1
    assert cases >= 12


def stop_and_count(
    size: int, base: int, fetched: int, order: tuple[int, ...], said: int | None
) -> None:
    world = World(pool=16 * PAGE, regions=[(0, 64 * PAGE)])
    lane = Lane(world, size=size, base=base)
    heads = [lane.offer((PAGE * i, 600, True)) for i in range(2)]
    lane.step()
    chains = [lane.take() for _ in range(fetched)]
    for i in order:
        lane.complete(chains[i])
    lane.step()
    done = [head for head, _ in lane.used()]
    assert done == [heads[i] for i in order]

    again, unfinished, last = lane.stop(said)
    end = (again - base) & 0xFFFF
    left = [head for head in heads[: fetched_for_sure(order, said)] if head not in done]
    assert len(left) == unfinished
    if last:
        assert heads[end : end + unfinished] == left
        end += unfinished
    assert end >= max(order, default=-1) + 1

    # Chains that were handed back come again, in their order, and no others.
    lane.start(again)
    lane.step()
    for _ in heads[end:]:
        lane.complete(lane.take())
    assert lane.device.take() is None
    lane.step()
    assert [head for head, _ in lane.used()] == heads[end:]
    assert sorted([*done, *left, *heads[end:]]) == sorted(heads)
    # Parked chains complete too, once, in the ring that the back has by now.
    late = [i for i in range(fetched) if heads[i] in left]
    for i in late:
        lane.complete(chains[i])
    lane.step()
    assert [head for head, _ in lane.used()] == [heads[i] for i in late]
    assert world.pool.used == PAGE * (len(left) - len(late))


def fetched_for_sure(order: tuple[int, ...], said: int | None) -> int:
    """How many of two chains the back has fetched, by what it did and what it says."""
    least = max(order, default=-1) + 1
    return said if said is not None and least <= said <= 2 else least


@pytest.mark.parametrize("event_idx", [False, True])
def test_i4_the_guest_has_what_it_would_have_without_us(event_idx):
    """The same guest and the same device, once through the pump and once direct."""
    through, direct = World(pool=2 * MIB), World()
    lane = Lane(through, size=32, base=0xFFF0, guest_event_idx=event_idx)
    aside = Lane(direct, size=32, base=0xFFF0, guest_event_idx=event_idx, start=False)
    device = DeviceRing(aside.ring, direct.ram.view, base=0xFFF0, event_idx=event_idx)
    chance = random.Random(4)
    noise = chance.randbytes(MIB)
    for world in (through, direct):
        world.ram.write(0, noise)

    def serve(space, chain: Chain) -> int:
        """The device's work: a digest of all it reads, over all it may write."""
        data = b"".join(
            space.read(buffer.addr, buffer.length)
            for buffer in chain.buffers
            if not buffer.writable
        )
        source = random.Random(data)
        written = 0
        for buffer in chain.buffers:
            if buffer.writable:
                space.write(buffer.addr, source.randbytes(buffer.length))
                written += buffer.length
        return written

    ends: list[list[tuple[int, int]]] = [[], []]
    for _ in range(300):
        chains = [
            random_chain(chance, 32 * PAGE * i, 16 * PAGE)
            for i in range(chance.randint(1, 4))
        ]
        indirect = chance.random() < 0.5
        for chain in chains:
            lane.offer(*chain, indirect=indirect)
            aside.offer(*chain, indirect=indirect)
        lane.step()
        taken = [lane.take() for _ in chains]
        plain = [device.take() for _ in chains]
        for i in chance.sample(range(len(chains)), len(chains)):
            lane.device.complete(taken[i].head, serve(through.isolated, taken[i]))
            there = plain[i]
            assert there is not None
            device.complete(there.head, serve(direct.ram, there))
        lane.device.publish()
        device.publish()
        lane.step()
        ends[0] += lane.used()
        ends[1] += list(aside.driver.used())
    assert ends[0] == ends[1]
    for at in (0, 2 * MIB):
        assert through.ram.read(at, 2 * MIB) == direct.ram.read(at, 2 * MIB)


@pytest.mark.parametrize("filling", [0x00, 0xFF, 0x01, 0x80])
def test_i5_whatever_the_back_writes_only_given_buffers_change(filling):
    """All of isolated memory, again and again, at every step of a request."""
    faults = set()
    for size, back_indirect in itertools.product((1, 4, 16), (False, True)):
        world = World(pool=64 * PAGE)
        world.ram.write(0, MARK * (4 * MIB // 16))
        lane = Lane(world, size=size, back_indirect=back_indirect, guest_indirect=True)
        open_to = range(8 * MIB, 8 * MIB + 3000)

        def scribble(world=world):
            for piece in world.isolated.pieces.values():
                piece.view[:] = bytes([filling]) * piece.size

        before = guest_bytes(world)
        for _ in range(size):
            count = 3 if back_indirect else min(3, size)
            writable = Buffer(open_to.start, len(open_to), True)
            buffers = [Buffer(0, 600), Buffer(100, 700), writable]
            lane.offer(*buffers[-count:], indirect=True)
            lane.step()
            scribble()
            lane.step()
            scribble()
            lane.pump.rest()
        faults.add(lane.pump.fault)
        lane.stop(filling)
        scribble()
        lane.pump.step()
        for at, old in before.items():
            if at == lane.ring_at:
                continue
            new = bytearray(world.ram.pieces[at].view)
            if at == 8 * MIB:
                new[: len(open_to)] = old[: len(open_to)]
            assert new == old
        world.check()
    assert faults <= {0, -32, -33}


@pytest.mark.whole_process
def test_i6_whatever_the_guest_writes_costs_no_memory_and_no_other_ring():
    world = World(pool=8 * MIB)
    healthy = Lane(world)
    lane = Lane(world, size=64)
    world.pool.set_common(4 * MIB)
    for victim in (healthy, lane):
        victim.pump.set_guaranteed(2 * MIB)
    chance = random.Random(6)
    addresses = (0, PAGE - 8, 4 * MIB - 8, 5 * MIB, lane.ring_at, lane.tables_at, -1)
    lengths = (0, 1, 16, 160, 5000, MIB, 0xFFFFFFFF)
    faults = set()
    before = 0
    for i in range(6000):
        for index in range(8):
            lane.ring.write_desc(
                index,
                chance.choice(addresses) & ((1 << 64) - 1),
                chance.choice(lengths),
                chance.choice([0, 0, 1, 1, 2, 3, 4, 5]),
                chance.choice([0, 1, 2, 7, 63, 64, 0xFFFF]),
            )
        slot = lane.ring.avail_idx & lane.ring.mask
        lane.ring.set_avail_entry(slot, chance.choice([0, 1, 2, 7, 64]))
        lane.ring.avail_idx = (lane.ring.avail_idx + 1) & 0xFFFF
        lane.step()
        while chain := lane.device.take():
            assert all(buffer.length for buffer in chain.buffers)
            if chance.random() < 0.9:
                lane.complete(chain, b"")
        if lane.pump.fault or lane.pump.outstanding > 20:
            faults.add(lane.pump.fault)
            while lane.step():
                pass
            lane.stop(lane.device.next_avail)
            lane.renew()
            lane.pump.set_guaranteed(2 * MIB)
            lane.driver = DriverRing(lane.ring, event_idx=True)
            lane.start(0)
        healthy.offer((0, 1000), (MIB, 1000, True))
        assert healthy.step() == 1
        healthy.complete(healthy.take(), b"fine")
        healthy.step()
        assert len(healthy.used()) == 1
        if i == 1000:
            before = resident_pages()
    assert len(faults) > 6
    assert SANITIZED or resident_pages() - before < 2 * MIB // PAGE
    world.check()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length", [1, 64, 511, 512, 4096, 10_000])
def test_i7_one_requests_bytes_are_not_shown_to_another(policy, length):
    """Two rings, one pool: what went through one buffer never comes out of another."""
    world = World(pool=4 * PAGE)
    lanes = [Lane(world, policy=policy) for _ in range(2)]
    secret = b"\x99" * length
    for i in range(8):
        first, second = lanes[i % 2], lanes[(i // 2) % 2]
        # Written by the guest, then by the back; both leave their bytes in the pool.
        for buffer in ((0, length), (0, length, True)):
            world.ram.write(0, secret)
            first.offer(buffer)
            first.step()
            chain = first.take()
            first.complete(chain, secret if buffer[2:] else b"")
            first.step()
            first.used()
        for said in (0, length // 2, length):
            world.ram.write(MIB, b"\x11" * length)
            second.offer((MIB, length, True))
            second.step()
            second.complete(second.take(), b"", length=said)
            second.step()
            second.used()
            assert set(world.ram.read(MIB, length)) <= {0x00, 0x11}


@pytest.mark.parametrize("restart", [False, True])
def test_i8_after_a_stop_the_ring_does_not_write_guest_memory(restart):
    """Nor for what it had in flight, when that ends after a new start."""
    world = World()
    lane = Lane(world, size=8)
    for i in range(6):
        lane.offer((PAGE * i, 600), (MIB + PAGE * i, 3000, True), indirect=True)
    lane.step()
    late = [lane.take() for _ in range(5)]
    lane.complete(late.pop(2), b"in time")
    lane.step()
    lane.complete(late.pop(0), b"not seen any more")
    base, unfinished, _ = lane.stop(5)
    assert unfinished == 4
    before = guest_bytes(world)
    if restart:
        lane.pump.set_taking(False)
        lane.start((base + 1) & 0xFFFF)  # with nothing to take
    for chain in late:
        lane.complete(chain, b"late")
    for _ in range(3):
        lane.step()
    assert guest_bytes(world) == before


@pytest.mark.whole_process
def test_i9_rings_and_pumps_leave_nothing_behind():
    world = World(pool=MIB)
    lane = Lane(world, size=64)
    fds = pages = 0
    for i in range(2000):
        if i == 500:
            gc.collect()
            fds, pages = len(os.listdir("/proc/self/fd")), resident_pages()
        lane.offer(*[(PAGE * j, 600) for j in range(8)], (MIB, 9000, True))
        lane.step()
        lane.complete(lane.take(), b"done")
        lane.step()
        lane.used()
        base, _, _ = lane.stop(lane.device.next_avail)
        if i % 2:
            lane.renew()
        lane.start(base)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == fds
    assert SANITIZED or resident_pages() - pages < MIB // PAGE
    assert world.pool.used == 0
    world.check()
