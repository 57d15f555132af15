# SPDX-License-Identifier: Apache-2.0
"""The pool grows and shrinks by messages, and in the steady state there are none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack, wait_until
from tests.support.sessions import await_reaped, errors, serve
from vhost_airlock.errors import RequestRefused
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.ram import MIB, GuestRam
from vhost_airlock.peers.ring import Chain
from vhost_airlock.peers.server import PROTOCOL_FEATURES
from vhost_airlock.proxy import pool_policy
from vhost_airlock.proxy.isolated import BASE, REGION_SIZE, RINGS_SIZE, ROUNDING
from vhost_airlock.vhost.wire import MemoryRegion, ProtocolFeature, Request

P = ProtocolFeature
R = Request
MEMORY = (R.SET_MEM_TABLE, R.ADD_MEM_REG, R.REM_MEM_REG)
BIG = 8 * MIB


class Scene:
    """A ring, and how to fill the pool by it."""

    def __init__(self, back: ScriptedBack, **options: object) -> None:
        self.back = back
        self.airlock = Airlock(back, drain_timeout=0.2, **options)
        self.guest = BlkGuest(
            ram=GuestRam(MIB, 600 * MIB), num_queues=2, queue_size=64, seg_max=14
        )
        self.guest.connect(self.airlock.channel())
        self.guest.start()
        self.buffer = self.guest.ram.alloc(128 * MIB)

    def close(self) -> None:
        self.guest.close()
        self.airlock.__exit__(None, None, None)

    def submit(self, count: int, size: int = BIG) -> None:
        for _ in range(count):
            self.guest.queues[0].submit(BlkType.IN, 0, [(self.buffer, size)])
        self.guest.queues[0].kick()

    def complete(self, chains: list[Chain]) -> None:
        for chain in chains:
            self.back.complete(chain)

    def reap(self) -> None:
        queue = self.guest.queues[0]
        while queue.pending:
            for io in await_reaped(queue):
                assert io.status == BlkStatus.OK

    def memory_messages(self) -> list[Request]:
        return [request for request in self.back.requests() if request in MEMORY]

    def regions(self) -> list[MemoryRegion]:
        """The back's regions, in the order of addresses."""
        regions = [mapped.region for mapped in self.back.memory.regions]
        return sorted(regions, key=lambda region: region.guest_addr)

    @property
    def pool(self) -> int:
        """Bytes of it that the back has."""
        return sum(region.size for region in self.regions()[1:])


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Scene]]:
    """Without looks for idle regions, however slow the machine is, unless told."""
    monkeypatch.setattr(pool_policy, "IDLE_CHECK", 3600.0)
    scenes: list[Scene] = []

    def play(back: ScriptedBack | None = None, **options: object) -> Scene:
        scenes.append(Scene(back or ScriptedBack(), **options))
        return scenes[-1]

    yield play
    for scene in scenes:
        scene.close()


Play = Callable[..., Scene]


def test_first_region_comes_with_the_first_ring(play: Play) -> None:
    scene = play()
    assert scene.memory_messages() == [R.ADD_MEM_REG] * 2
    rings, pool = scene.regions()
    assert (rings.guest_addr, rings.size) == (BASE, RINGS_SIZE)
    assert (pool.guest_addr, pool.size) == (BASE + RINGS_SIZE, REGION_SIZE)
    first = scene.back.requests().index(R.ADD_MEM_REG)
    assert first < scene.back.requests().index(R.SET_VRING_ADDR)


def test_steady_state_has_no_memory_messages(play: Play) -> None:
    scene = play()
    for turn in range(200):
        scene.submit(3, 1 << 12 + turn % 10)
        scene.complete([scene.back.take() for _ in range(3)])
        scene.reap()
        if turn % 50 == 0:
            scene.guest.stop()
            scene.guest.start()
    assert scene.memory_messages() == [R.ADD_MEM_REG] * 2


def test_pool_grows_when_it_is_wanted(play: Play) -> None:
    """Region by region; every chain comes, and nothing fails."""
    scene = play(pool_limit=256 * MIB)
    scene.submit(16)
    chains = [scene.back.take() for _ in range(16)]
    assert scene.pool >= 128 * MIB
    assert scene.memory_messages().count(R.REM_MEM_REG) == 0
    places = sorted(chain.buffers[1].addr for chain in chains)
    assert all(b - a >= BIG for a, b in pairwise(places))
    scene.complete(chains)
    scene.reap()
    before = scene.memory_messages()
    for _ in range(3):
        scene.submit(16)
        scene.complete([scene.back.take() for _ in range(16)])
        scene.reap()
    assert scene.memory_messages() == before, "what there is, is used again"


def test_pool_has_a_limit(play: Play) -> None:
    """Beyond it chains wait for their turn, in order. A part is for the other ring."""
    scene = play(pool_limit=64 * MIB)
    scene.submit(12)
    served = 0
    chains = [scene.back.take() for _ in range(6)]
    while served < 12:
        chains += scene.back.take_all()
        if not chains:
            chains.append(scene.back.take())
        assert len(chains) <= 6
        scene.complete([chains.pop(0)])
        served += 1
    scene.reap()
    assert scene.pool == 64 * MIB
    counters = scene.airlock.session.device.counters()
    assert counters["pool"]["high_water"] <= 48 * MIB
    assert counters["ring 0"]["stalls"] > 0


def assert_idle() -> None:
    """Nobody in this process has anything to do."""
    threading.Event().wait(0.1)
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.1


@pytest.mark.timing
def test_waiting_for_room_costs_nothing(play: Play) -> None:
    """At the limit, while the back takes its time."""
    scene = play(pool_limit=64 * MIB)
    scene.submit(12)
    chains = [scene.back.take() for _ in range(4)]
    wait_until(lambda: scene.airlock.counters()["stalls"] > 0, "the pool is full")
    assert_idle()
    serve(scene.back, scene.guest, 1)
    while scene.guest.queues[0].pending:
        scene.complete(chains)
        chains = list(scene.back.take_all())
        scene.guest.queues[0].reap()


def fill(scene: Scene) -> list[list[Chain]]:
    """Make the pool grow, and return the chains of each region."""
    scene.submit(21)
    chains = [scene.back.take() for _ in range(21)]
    starts = [region.guest_addr for region in scene.regions()[1:]]
    assert len(starts) == 6
    return [
        [chain for chain in chains if 0 <= chain.buffers[1].addr - start < REGION_SIZE]
        for start in starts
    ]


@pytest.mark.timing
def test_waiting_for_a_large_buffer_costs_nothing(play: Play) -> None:
    """There would be room, but it is in pieces. Then one region more is all free."""
    scene = play(pool_limit=224 * MIB)
    kept = []
    for chains in fill(scene):
        kept.append(chains.pop())
        scene.complete(chains)
    scene.submit(1, 40 * MIB)
    wait_until(lambda: scene.airlock.counters()["stalls"] > 0, "there is no room")
    assert_idle()
    assert not list(scene.back.take_all())
    serve(scene.back, scene.guest, 1)
    scene.complete(kept)
    scene.complete([scene.back.take()])
    scene.reap()


def test_idle_regions_are_given_back(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first, when they were not needed at two looks in a row."""
    monkeypatch.setattr(pool_policy, "IDLE_CHECK", 0.05)
    scene = play(pool_limit=256 * MIB)
    scene.submit(16)
    chains = [scene.back.take() for _ in range(16)]
    grown = len(scene.regions())
    assert grown > 4
    threading.Event().wait(0.2)
    assert len(scene.regions()) == grown, "they are in use"
    resident = scene.airlock.session.device.counters()["pool"]["resident"]
    assert resident >= 128 * MIB
    scene.complete(chains)
    scene.reap()
    wait_until(lambda: len(scene.regions()) == 2, "they are given back")
    assert scene.memory_messages().count(R.REM_MEM_REG) == grown - 2
    resident = scene.airlock.session.device.counters()["pool"]["resident"]
    assert resident <= 40 * MIB
    for seen in scene.back.got(R.REM_MEM_REG):
        assert seen.fds == []
    # And taken again when they are wanted.
    scene.submit(16)
    chains = [scene.back.take() for _ in range(16)]
    assert scene.pool >= 128 * MIB
    scene.complete(chains)
    scene.reap()


def test_region_with_a_buffer_in_use_is_kept(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it is."""
    monkeypatch.setattr(pool_policy, "IDLE_CHECK", 0.05)
    scene = play(pool_limit=256 * MIB)
    scene.submit(16)
    chains = [scene.back.take() for _ in range(16)]
    kept = max(chains, key=lambda chain: chain.buffers[1].addr)
    chains.remove(kept)
    scene.complete(chains)
    wait_until(lambda: len(scene.regions()) == 3, "the others are given back")
    threading.Event().wait(0.2)
    (region,) = [
        region
        for region in scene.regions()
        if 0 <= kept.buffers[1].addr - region.guest_addr < region.size
    ]
    assert region.guest_addr > BASE + RINGS_SIZE
    scene.complete([kept])
    scene.reap()
    wait_until(lambda: len(scene.regions()) == 2, "this one is given back, too")


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_back_with_few_slots(play: Play, slots: int) -> None:
    """It never gets more, and all of the pool can be used."""
    scene = play(ScriptedBack(slots=slots), pool_limit=128 * MIB)
    most = 0
    for _ in range(3):
        scene.submit(16)
        chains = [scene.back.take() for _ in range(12)]
        most = max(most, len(scene.regions()))
        while scene.guest.queues[0].pending:
            scene.complete(chains)
            chains = list(scene.back.take_all())
            scene.guest.queues[0].reap()
    assert most <= slots
    assert scene.pool == 128 * MIB


def test_large_buffer_makes_idle_regions_go(play: Play) -> None:
    """Where there is no room for a region that is large enough, others make way."""
    scene = play(pool_limit=224 * MIB)
    for chains in fill(scene):
        scene.complete(chains)
    scene.reap()
    scene.submit(1, 40 * MIB)
    scene.complete([scene.back.take()])
    scene.reap()
    assert R.REM_MEM_REG in scene.memory_messages()
    assert max(region.size for region in scene.regions()[1:]) >= 64 * MIB


@pytest.mark.parametrize("lacks", [P.CONFIGURE_MEM_SLOTS, P.REPLY_ACK])
def test_back_without_slots_or_acks_gets_one_table(play: Play, lacks: P) -> None:
    """For good, though all of the pool is used: without acks nobody would know when
    the back has a region more."""
    features = PROTOCOL_FEATURES & ~lacks
    scene = play(ScriptedBack(protocol_features=features), pool_limit=96 * MIB)
    assert scene.memory_messages() == [R.SET_MEM_TABLE]
    rings, pool = scene.regions()
    assert (rings.size, pool.size) == (RINGS_SIZE + 1024 * MIB + ROUNDING, 96 * MIB)
    for _ in range(2):
        scene.submit(16)
        chains: list[Chain] = []
        while scene.guest.queues[0].pending:
            chains += scene.back.take_all()
            scene.complete(chains)
            chains.clear()
            scene.guest.queues[0].reap()
    assert scene.memory_messages() == [R.SET_MEM_TABLE]


@pytest.mark.parametrize("request_", [R.ADD_MEM_REG, R.REM_MEM_REG])
def test_back_that_refuses_a_region_is_of_no_use(
    play: Play,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request_: Request,
) -> None:
    """Its regions are not known after a refusal."""
    monkeypatch.setattr(pool_policy, "IDLE_CHECK", 0.05)
    scene = play(pool_limit=256 * MIB)

    def refuse(payload: object, fds: list[object]) -> None:
        raise RequestRefused("no")

    scene.back.instead[request_] = refuse  # type: ignore[assignment]
    scene.submit(8)
    chains = [scene.back.take() for _ in range(3)]
    if request_ is R.REM_MEM_REG:
        chains += [scene.back.take() for _ in range(5)]
        scene.complete(chains)
    scene.airlock.join()
    assert any(f"back-end: {request_.name} refused" in line for line in errors(caplog))
