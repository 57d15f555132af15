# SPDX-License-Identifier: Apache-2.0
"""The two ends of the plain Python virtqueue, against each other and a model."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.support.profiles import PROFILE
from vhost_airlock.peers import (
    Buffer,
    Chain,
    DeviceRing,
    DriverRing,
    RingFull,
    SplitLayout,
    SplitRing,
    TableArea,
)
from vhost_airlock.peers.ring import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    RingFault,
    need_event,
)

TABLES_AT = 0x10_0000
ENTRIES = 8


class Rig:
    """A ring, memory for its indirect tables, and both its ends."""

    def __init__(self, size: int, *, base: int = 0, event_idx: bool = False) -> None:
        layout = SplitLayout(size)
        self.ring = SplitRing.at(memoryview(bytearray(layout.end)), layout)
        self.tables = memoryview(bytearray(TableArea.length(size, ENTRIES)))
        self.driver = DriverRing(
            self.ring,
            base=base,
            event_idx=event_idx,
            tables=TableArea(self.tables, TABLES_AT, ENTRIES),
        )
        self.device = DeviceRing(
            self.ring, self.translate, base=base, event_idx=event_idx
        )

    def translate(self, addr: int, length: int) -> memoryview:
        start = addr - TABLES_AT
        assert 0 <= start <= start + length <= len(self.tables)
        return self.tables[start : start + length]


def chains(max_size: int) -> st.SearchStrategy[list[Buffer]]:
    """Readable buffers, then writable ones, of any address and length."""
    pieces = st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=max_size,
    )
    return st.tuples(pieces, st.integers(0, max_size)).map(
        lambda drawn: [
            Buffer(addr, length, i >= drawn[1])
            for i, (addr, length) in enumerate(drawn[0])
        ]
    )


class TwoEnds(RuleBasedStateMachine):
    """In any order of the deeds of both ends, no chain and no event is lost.

    Each end goes on looking until it decides to sleep, and then only the other end's
    notification wakes it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.offered: deque[Chain] = deque()
        self.public = 0
        self.taken: dict[int, Chain] = {}
        self.completed: deque[tuple[int, int]] = deque()
        self.visible = 0
        self.device_sleeps = False
        self.driver_sleeps = False
        self.kicked = self.called = False

    @initialize(
        size=st.sampled_from([1, 2, 8, 64]),
        base=st.sampled_from([0, 1, 0x7FFF, 0xFFF0, 0xFFFF]),
        event_idx=st.booleans(),
    )
    def start(self, size: int, base: int, event_idx: bool) -> None:
        self.rig = Rig(size, base=base, event_idx=event_idx)
        self.driver, self.device = self.rig.driver, self.rig.device

    @rule(
        buffers=chains(6),
        indirect=st.booleans(),
        direct=st.integers(0, 3),
        random=st.randoms(use_true_random=False),
    )
    def offer(self, buffers: list[Buffer], indirect: bool, direct: int, random) -> None:
        random.shuffle(self.driver.free)
        if indirect:
            buffers = buffers[: direct + ENTRIES]
        needed = len(buffers)
        if indirect and needed > direct:
            needed = direct + 1
        if needed > len(self.driver.free):
            with pytest.raises(RingFull):
                self.driver.offer(buffers, indirect=indirect, direct=direct)
            return
        head = self.driver.offer(buffers, indirect=indirect, direct=direct)
        self.offered.append(Chain(head, buffers))

    @rule()
    def publish(self) -> None:
        self.driver.publish()
        fresh = self.public != len(self.offered)
        self.public = len(self.offered)
        kick = self.driver.kick_needed()
        if kick:
            assert fresh
            self.kicked = True

    @precondition(lambda self: not self.device_sleeps)
    @rule(limit=st.integers(1, 8))
    def take(self, limit: int) -> None:
        for _ in range(limit):
            chain = self.device.take()
            if not self.public:
                assert chain is None
                return
            assert chain == self.offered.popleft()
            self.public -= 1
            self.taken[chain.head] = chain

    @precondition(lambda self: not self.device_sleeps)
    @rule()
    def device_waits(self) -> None:
        self.kicked = False
        more = self.device.arm()
        assert more == (self.public > 0)
        self.device_sleeps = not more

    @precondition(lambda self: self.device_sleeps and self.kicked)
    @rule()
    def device_wakes(self) -> None:
        self.device.disarm()
        self.device_sleeps = False

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), length=st.integers(0, 2**32 - 1))
    def complete(self, data: st.DataObject, length: int) -> None:
        head = data.draw(st.sampled_from(sorted(self.taken)))
        del self.taken[head]
        self.device.complete(head, length)
        self.completed.append((head, length))

    @rule()
    def publish_used(self) -> None:
        self.device.publish()
        fresh = self.visible != len(self.completed)
        self.visible = len(self.completed)
        call = self.device.call_needed()
        if call:
            assert fresh
            self.called = True

    @precondition(lambda self: not self.driver_sleeps)
    @rule(limit=st.integers(1, 8))
    def reap(self, limit: int) -> None:
        for _, got in zip(range(limit), self.driver.used(), strict=False):
            assert got == self.completed.popleft()
            self.visible -= 1

    @precondition(lambda self: not self.driver_sleeps)
    @rule()
    def driver_waits(self) -> None:
        self.called = False
        more = self.driver.arm()
        assert more == (self.visible > 0)
        self.driver_sleeps = not more

    @precondition(lambda self: self.driver_sleeps and self.called)
    @rule()
    def driver_wakes(self) -> None:
        self.driver.disarm()
        self.driver_sleeps = False

    @invariant()
    def no_event_is_lost(self) -> None:
        if self.device_sleeps and self.public:
            assert self.kicked
        if self.driver_sleeps and self.visible:
            assert self.called

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if hasattr(self, "rig"):
            alive = [chain.head for chain in self.offered]
            alive += [*self.taken, *(head for head, _ in self.completed)]
            assert sorted(alive) == sorted(self.driver.outstanding)


TwoEnds.TestCase.settings = settings(PROFILE, max_examples=PROFILE.max_examples // 5)
TestTwoEnds = TwoEnds.TestCase


@pytest.mark.parametrize("size", [2**n for n in range(16)])
def test_layout_is_the_specifications(size: int) -> None:
    layout = SplitLayout(size, start=0x4000)
    assert layout.desc == 0x4000
    assert layout.avail == 0x4000 + 16 * size
    assert layout.used % 4 == 0
    assert 0 <= layout.used - (layout.avail + 6 + 2 * size) < 4
    assert layout.end == layout.used + 6 + 8 * size


@pytest.mark.parametrize("size", [0, 3, 65536, -1])
def test_bad_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        SplitLayout(size)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("size", [1, 2, 256])
def test_indices_wrap_at_16_bits(size: int, event_idx: bool) -> None:
    base = 0x10000 - 3 * size
    rig = Rig(size, base=base, event_idx=event_idx)
    moved = base
    while moved < 0x10000 + 3 * size:
        for i in range(size):
            rig.driver.offer([Buffer(moved + i, 1)])
        rig.driver.publish()
        assert rig.driver.kick_needed()
        for i in range(size):
            chain = rig.device.take()
            assert chain is not None
            assert chain.buffers == [Buffer(moved + i, 1)]
            rig.device.complete(chain.head, moved + i)
        rig.device.publish()
        assert rig.device.call_needed()
        assert [length for _, length in rig.driver.used()] == [
            moved + i for i in range(size)
        ]
        assert not rig.device.arm()
        assert not rig.driver.arm()
        moved += size
    assert rig.driver.next_used == moved & 0xFFFF


def test_largest_ring_can_be_full() -> None:
    rig = Rig(32768, base=0xC000, event_idx=True)
    for i in range(32768):
        rig.driver.offer([Buffer(i, 1)])
    with pytest.raises(RingFull):
        rig.driver.offer([Buffer(0, 1)])
    rig.driver.publish()
    taken = [rig.device.take() for _ in range(32768)]
    assert [chain.buffers[0].addr for chain in taken if chain] == list(range(32768))
    assert rig.device.take() is None


def test_need_event_counts_steps_modulo_16_bits() -> None:
    for old in (0, 5, 0xFFFE):
        for steps in range(6):
            new = (old + steps) & 0xFFFF
            passed = {(old + i) & 0xFFFF for i in range(steps)}
            for event in range(0x10000):
                assert need_event(event, new, old) == (event in passed)


def test_call_may_be_asked_for_later() -> None:
    rig = Rig(8, event_idx=True)
    for _ in range(4):
        rig.driver.offer([Buffer(0, 1)])
    rig.driver.publish()
    assert not rig.driver.arm(after=2)
    calls = []
    for _ in range(4):
        chain = rig.device.take()
        assert chain is not None
        rig.device.complete(chain.head)
        rig.device.publish()
        calls.append(rig.device.call_needed())
    assert calls == [False, False, True, False]
    assert rig.driver.arm(after=2)


def test_direct_then_indirect_stands_in_memory_as_specified() -> None:
    rig = Rig(4)
    buffers = [Buffer(0x1000 * i, i, i > 2) for i in range(1, 5)]
    head = rig.driver.offer(buffers, indirect=True, direct=1)
    first = rig.ring.read_desc(head)
    assert (first.addr, first.length, first.flags) == (0x1000, 1, DESC_F_NEXT)
    second = rig.ring.read_desc(first.next)
    assert second.addr == TABLES_AT + head * 16 * ENTRIES
    assert (second.length, second.flags) == (48, DESC_F_INDIRECT)
    flags = [rig.tables[16 * (head * ENTRIES + i) + 12] for i in range(3)]
    assert flags == [DESC_F_NEXT, DESC_F_NEXT | DESC_F_WRITE, DESC_F_WRITE]


def test_new_device_gets_what_the_lost_one_had_not_completed() -> None:
    rig = Rig(8, base=0xFFFD)
    heads = [rig.driver.offer([Buffer(i, 1)]) for i in range(5)]
    rig.driver.publish()
    for _ in range(4):
        rig.device.take()
    for head in (heads[1], heads[3]):
        rig.device.complete(head)
    rig.device.publish()
    assert [head for head, _ in rig.driver.used()] == [heads[1], heads[3]]

    base = rig.driver.reoffer()
    assert base == 0xFFFF
    device = DeviceRing(rig.ring, rig.translate, base=base)
    for i in (0, 2, 4):
        assert device.take() == Chain(heads[i], [Buffer(i, 1)])
        device.complete(heads[i])
    assert device.take() is None
    device.publish()
    assert len(list(rig.driver.used())) == 3
    assert not rig.driver.outstanding
    assert rig.driver.next_used == rig.driver.next_avail == 2


def offer_raw(rig: Rig, head: int = 0) -> None:
    rig.ring.set_avail_entry(0, head)
    rig.ring.avail_idx = 1


@pytest.mark.parametrize(
    ("descriptors", "reason"),
    [
        ([(0, 1, DESC_F_NEXT, 0)], "longer"),
        ([(0, 1, DESC_F_NEXT, 4)], "descriptor 4 of 4"),
        ([(0, 1, DESC_F_WRITE | DESC_F_NEXT, 1), (0, 1, 0, 0)], "readable"),
        ([(TABLES_AT, 0, DESC_F_INDIRECT, 0)], "table of 0"),
        ([(TABLES_AT, 17, DESC_F_INDIRECT, 0)], "table of 17"),
        ([(TABLES_AT, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1)], "nested"),
    ],
)
def test_device_refuses_malformed_chains(
    descriptors: list[tuple[int, int, int, int]], reason: str
) -> None:
    rig = Rig(4)
    for i, descriptor in enumerate(descriptors):
        rig.ring.write_desc(i, *descriptor)
    offer_raw(rig)
    with pytest.raises(RingFault, match=reason):
        rig.device.take()


def test_device_refuses_nested_tables() -> None:
    rig = Rig(4)
    rig.driver.offer([Buffer(TABLES_AT, 16)], indirect=True)
    rig.tables[12] = DESC_F_INDIRECT
    rig.driver.publish()
    with pytest.raises(RingFault, match="nested"):
        rig.device.take()


def test_indices_that_jump_are_refused() -> None:
    rig = Rig(4)
    rig.ring.avail_idx = 5
    with pytest.raises(RingFault, match="available index"):
        rig.device.take()
    rig.ring.used_idx = 1
    with pytest.raises(RingFault, match="used index"):
        list(rig.driver.used())


def test_driver_refuses_a_head_that_is_not_outstanding() -> None:
    rig = Rig(4)
    head = rig.driver.offer([Buffer(0, 1), Buffer(1, 1, True)])
    rig.driver.publish()
    rig.device.complete(head + 1)
    rig.device.publish()
    with pytest.raises(RingFault, match="not outstanding"):
        list(rig.driver.used())
