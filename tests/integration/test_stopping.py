# SPDX-License-Identifier: Apache-2.0
"""I3, I8: how rings stop, with requests in flight that end, end late, or never end."""

from __future__ import annotations

import queue as queues
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import PATIENCE, ScriptedBack, readable, wait_until
from tests.support.sessions import (
    SLACK,
    await_reaped,
    errors,
    serve,
    small_guest,
)
from vhost_airlock.dataplane.pump import Pump
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import Io
from vhost_airlock.peers.ring import Chain
from vhost_airlock.peers.server import PROTOCOL_FEATURES, RING_FEATURES
from vhost_airlock.proxy import coupling
from vhost_airlock.proxy import drain as drains
from vhost_airlock.vhost.fds import Fd, drain, notify
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.wire import (
    Config,
    Feature,
    ProtocolFeature,
    Request,
    VringState,
)

DRAIN = 1.0
R = Request


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def back(request: pytest.FixtureRequest) -> ScriptedBack:
    """With EVENT_IDX it tells how far it has fetched, otherwise not."""
    features = RING_FEATURES if request.param else RING_FEATURES & ~Feature.EVENT_IDX
    return ScriptedBack(features=features)


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back, drain_timeout=DRAIN) as airlock:
        yield airlock


@pytest.fixture
def guest(airlock: Airlock) -> Iterator[BlkGuest]:
    """Its rings run."""
    with small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        yield guest
        guest.disconnect()


def submit(guest: BlkGuest, count: int = 1, size: int = 4096) -> list[Io]:
    """Reads, each to memory of its own that is full of 'g'."""
    ios = []
    for _ in range(count):
        buffer = guest.ram.alloc(size)
        guest.ram.view(buffer, size)[:] = b"g" * size
        ios.append(guest.queues[0].submit(BlkType.IN, 0, [(buffer, size)]))
    guest.queues[0].kick()
    return ios


def take(back: ScriptedBack, count: int) -> list[Chain]:
    """Take this number of chains, and tell the test that they were taken."""
    chains = [back.take() for _ in range(count)]
    back.ring().arm()
    return chains


def arrived(back: ScriptedBack, count: int) -> None:
    """Wait until so many chains are there which the back has not taken."""
    ring = back.ring()
    wait_until(lambda: ring.ring.avail_idx == ring.next_avail + count, "chains come")


def complete(back: ScriptedBack, *chains: Chain) -> None:
    for chain in chains:
        back.complete(chain, b"d" * 4096)


def everything(guest: BlkGuest) -> list[bytes]:
    """The bytes in all parts of guest memory that were ever used."""
    free = guest.ram._free
    return [
        bytes(mapped.view[: free[mapped.region.guest_addr] - mapped.region.guest_addr])
        for mapped in guest.ram.regions
    ]


def statuses(ios: list[Io]) -> list[int | None]:
    return [io.status for io in ios]


def later(act: Callable[[], None], seconds: float = 0.05) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def unfinished_at_stops(back: ScriptedBack) -> list[int]:
    """Return a list that grows with each stop: of how many requests are unfinished."""
    unfinished = []
    usual = back.stop_ring

    def stop_ring(state: VringState, fds: list[Fd]) -> VringState:
        ring = back.ring(state.index)
        unfinished.append(ring.next_avail - ring.next_used)
        return usual(state, fds)

    back.instead[R.GET_VRING_BASE] = stop_ring
    return unfinished


def test_i3_stop_waits_for_what_the_back_has_taken(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    ios = submit(guest, 3)
    chains = take(back, 3)
    unfinished = unfinished_at_stops(back)
    timer = later(lambda: complete(back, *reversed(chains)))
    guest.stop()
    timer.join()
    assert unfinished == [0, 0], "qemu-storage-daemon dies of others"
    assert guest.queues[0].base == 3
    guest.queues[0].reap()
    assert statuses(ios) == [BlkStatus.OK] * 3
    assert guest.ram.view(*ios[0].segments[0]) == b"d" * 4096


def test_i3_what_the_back_has_not_taken_is_handed_back(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """In its order, and untouched."""
    ios = submit(guest, 5)
    first, second = take(back, 2)
    arrived(back, 3)
    timer = later(lambda: complete(back, second, first))
    began = time.monotonic()
    guest.stop()
    assert time.monotonic() - began < DRAIN + SLACK
    timer.join()
    queue = guest.queues[0]
    assert queue.base == 2
    queue.reap()
    assert statuses(ios) == [BlkStatus.OK] * 2 + [None] * 3
    for io in ios[2:]:
        assert guest.ram.view(*io.segments[0]) == b"g" * 4096
    guest.start()
    for _ in ios[2:]:
        back.complete(back.take())
    while queue.pending:
        await_reaped(queue)
    assert statuses(ios) == [BlkStatus.OK] * 5


def test_i3_nothing_more_is_taken_from_a_ring_that_stops(
    back: ScriptedBack, guest: BlkGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the guest goes on, and nobody has disabled it before."""
    stops = threading.Event()
    usual = drains.await_fetched

    def await_fetched(*arguments: Any) -> None:
        stops.set()
        usual(*arguments)

    monkeypatch.setattr(coupling, "await_fetched", await_fetched)
    ios = submit(guest, 1)
    (chain,) = take(back, 1)
    channel = guest.front.channel
    channel.send(R.GET_VRING_BASE, VringState(0, 0).pack())
    assert stops.wait(PATIENCE)
    ios += submit(guest, 3)
    assert not readable(channel, 0.05)
    assert not list(back.take_all())
    back.complete(chain, b"d" * 4096)
    with channel.recv() as answer:
        assert VringState.unpack(answer.payload) == VringState(0, 1)
    guest.queues[0].reap()
    assert statuses(ios) == [BlkStatus.OK, None, None, None]


class ToldPump:
    """A pump that lets the test know when it is asked whether the back tells."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self.told = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pump, name)

    @property
    def tells(self) -> bool:
        tells = self._pump.tells
        self.told.set()
        return tells


def test_i8_back_that_fetches_without_a_word_does_not_draw_out_a_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has told of the first chain, and ends two later ones: its word can't be true,
    so it is asked to stop as one that tells nothing. No signal comes with that.
    """
    pumps: queues.Queue[ToldPump] = queues.Queue()
    usual = drains.await_fetched

    def await_fetched(pump: Any, *arguments: Any) -> None:
        told: Any = ToldPump(pump)
        pumps.put(told)
        usual(told, *arguments)

    monkeypatch.setattr(coupling, "await_fetched", await_fetched)
    back = ScriptedBack()
    with Airlock(back, drain_timeout=3 * PATIENCE) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        ios = submit(guest, 1)
        chains = take(back, 1)
        ios += submit(guest, 2)
        arrived(back, 2)
        chains += back.take_all()
        channel = guest.front.channel
        channel.send(R.GET_VRING_BASE, VringState(0, 0).pack())
        pump = pumps.get(timeout=PATIENCE)
        assert pump.told.wait(PATIENCE)
        assert pump.tells
        for chain in chains[1:]:
            back.ring().complete(chain.head, 1)
        back.publish()
        wait_until(lambda: R.GET_VRING_BASE in back.requests(), "it is asked to stop")
        assert not pump.drained
        back.complete(chains[0], b"d" * 4096)
        with channel.recv() as answer:
            assert VringState.unpack(answer.payload) == VringState(0, 3)
        guest.disconnect()


def test_i3_completion_while_the_ring_stops_is_called_for(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """The back answers GET_VRING_BASE before it is done, and calls nobody then."""
    (io,) = submit(guest)
    (chain,) = take(back, 1)
    queue = guest.queues[0]
    usual = back.stop_ring

    def stop_ring(state: VringState, fds: list[Fd]) -> VringState:
        if state.index == 0:
            timers.append(later(lambda: back.complete(chain)))
        return usual(state, fds)

    timers: list[threading.Timer] = []
    back.instead[R.GET_VRING_BASE] = stop_ring
    if back.features & Feature.EVENT_IDX:
        # It seems to be done with all that it has taken.
        back.ring().ring.avail_event = 0
    drain(queue.call_fd)
    queue.driver.arm()
    guest.stop()
    timers[0].join()
    assert queue.base == 1
    assert readable(queue.call_fd)
    queue.reap()
    assert io.status == BlkStatus.OK


def test_the_remedy_is_told(
    back: ScriptedBack, guest: BlkGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """A later request is done, so no base tells the VMM which ones are not."""
    submit(guest, 3)
    chains = take(back, 3)
    back.complete(chains[1], b"d" * 512)
    await_reaped(guest.queues[0])
    guest.stop()
    assert errors(caplog)[-1] == (
        "ring 0: stopped with 2 requests unfinished, and later ones done: they end only"
        " if this ring goes on; raise --drain-timeout, or let the VMM keep a record of"
        " requests in flight"
    )


def test_i8_ring_whose_requests_never_end_stops_in_time(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From then on guest memory is not written, whatever the back completes."""
    ios = submit(guest, 4)
    chains = take(back, 4)
    began = time.monotonic()
    guest.stop()
    assert time.monotonic() - began < DRAIN + SLACK
    assert guest.queues[0].base == 0, "they are the last ones: the guest's again"
    assert "ring 0: stopped with 4 requests unfinished" in errors(caplog)
    before = everything(guest)
    for chain in chains:
        back.complete(chain, b"late" * 1024)
    guest.front.barrier()
    assert everything(guest) == before
    # The ring goes on, and the guest waits for these requests again.
    guest.start()
    while guest.queues[0].pending:
        await_reaped(guest.queues[0])
    assert statuses(ios) == [BlkStatus.OK] * 4
    for io in ios:
        assert guest.ram.view(*io.segments[0]) == b"late" * 1024


@pytest.mark.parametrize("moment", ["stopped", "started"])
def test_c1_an_asynchronous_back_ends_its_own_requests(
    back: ScriptedBack, guest: BlkGuest, moment: str
) -> None:
    """It keeps requests over a stop, and completes them by their old numbers in the
    ring that it has by then, as libvhost-user and rust-vmm do.
    """
    ios = submit(guest, 2)
    chains = take(back, 2)
    guest.stop()
    if moment == "stopped":
        back.complete(chains[0], b"old1" * 1024)
    guest.start()
    ios += submit(guest, 2)
    new = [back.take() for _ in range(2)]
    kept = chains[moment == "stopped" :]
    assert not {chain.head for chain in new} & {chain.head for chain in kept}
    for chain in kept:
        back.complete(chain, (b"old1" if chain is chains[0] else b"old2") * 1024)
    for chain in new:
        back.complete(chain, b"new!" * 1024)
    while guest.queues[0].pending:
        await_reaped(guest.queues[0])
    assert statuses(ios) == [BlkStatus.OK] * 4
    data = [bytes(guest.ram.view(*io.segments[0])[:4]) for io in ios]
    assert data == [b"old1", b"old2", b"new!", b"new!"]


def serve_all(back: ScriptedBack, guest: BlkGuest, data: bytes, count: int) -> None:
    for _ in range(count):
        back.complete(back.take(), data)
    while guest.queues[0].pending:
        await_reaped(guest.queues[0])


def test_c2_late_completions_are_no_violations(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The guest resets its ring each time: what is left behind adds up, and ends."""
    chains = []
    for _ in range(3):
        submit(guest, 2)
        chains += take(back, 2)
        guest.stop()
        guest.queues[0].reset()
        guest.start()
    assert airlock.counters()["quarantined"] == 6
    assert len({chain.head for chain in chains}) == 6
    for chain in chains:
        back.complete(chain, b"late" * 1024)
    wait_until(lambda: airlock.counters()["quarantined"] == 0, "all are given back")
    assert airlock.counters()["violations"] == 0
    # Only the next request shows that the guest waits for none of them any more.
    submit(guest)
    serve_all(back, guest, b"", 1)
    assert airlock.counters()["used"] == 0


def test_i8_buffers_of_unfinished_requests_are_not_used_again(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """The back may still write to them: what it writes must not be another's data."""
    submit(guest, 4)
    chains = take(back, 4)
    old = {buffer.addr // 512 for chain in chains for buffer in chain.buffers}
    guest.stop()
    late = [room for chain in chains for room in back.room(chain)]
    guest.queues[0].reset()
    guest.start()
    for turn in range(3):
        submit(guest, 4)
        again = take(back, 4)
        new = {buffer.addr // 512 for chain in again for buffer in chain.buffers}
        assert not new & old
        for room in late:
            room[:] = b"x" * len(room)
        for chain in again:
            back.complete(chain, b"%d" % turn * 4096)
        while guest.queues[0].pending:
            for io in await_reaped(guest.queues[0]):
                assert guest.ram.view(*io.segments[0]) == b"%d" % turn * 4096
    for room in late:
        room.release()


def test_i8_rings_stop_together_when_the_front_leaves() -> None:
    """Each of them has a request that never ends; they have one time-out, not 24."""
    back = ScriptedBack(num_queues=24)
    with (
        Airlock(back, drain_timeout=DRAIN) as airlock,
        BlkGuest(num_queues=24, queue_size=4, seg_max=2) as guest,
    ):
        guest.connect(airlock.channel())
        guest.start()
        for queue in guest.queues:
            queue.submit(BlkType.FLUSH)
            queue.kick()
            back.take(queue.index)
            back.ring(queue.index).arm()
        began = time.monotonic()
        guest.disconnect()
        airlock.join()
        assert time.monotonic() - began < DRAIN + SLACK


def test_i12_order_that_no_base_can_tell_ends_when_the_ring_goes_on(
    back: ScriptedBack, guest: BlkGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """The first request does not end in time, later ones did: as with the back alone,
    the base lies behind all of them, and the first one ends when it ends.
    """
    ios = submit(guest, 3)
    first, second, third = take(back, 3)
    back.complete(second)
    back.complete(third)
    while guest.queues[0].pending > 1:
        await_reaped(guest.queues[0])
    guest.stop()
    assert guest.queues[0].base == 3
    assert "and later ones done" in "".join(errors(caplog))
    before = everything(guest)
    back.complete(first, b"late" * 1024)
    guest.front.barrier()
    assert everything(guest) == before
    guest.start()
    while guest.queues[0].pending:
        await_reaped(guest.queues[0])
    assert statuses(ios) == [BlkStatus.OK] * 3
    assert bytes(guest.ram.view(*ios[0].segments[0])[:4]) == b"late"


def test_c3_ring_that_the_guest_broke_drains_before_it_stops(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """Requests in flight end before the back is asked to stop: none is unfinished."""
    ios = submit(guest, 3)
    chains = take(back, 3)
    queue = guest.queues[0]
    queue.driver.ring.avail_idx = queue.driver.next_avail + 1000
    notify(queue.kick_fd)
    assert readable(queue.err_fd)
    unfinished = unfinished_at_stops(back)
    timer = later(lambda: complete(back, *reversed(chains)))
    guest.front.get_vring_base(0)
    timer.join()
    assert unfinished == [0]
    queue.reap()
    assert statuses(ios) == [BlkStatus.OK] * 3
    drain(queue.err_fd)


def test_c8_reset_needs_no_base(airlock: Airlock) -> None:
    """One request is stuck and a later one done, which no base can tell."""
    back = airlock.back = ScriptedBack(
        protocol_features=PROTOCOL_FEATURES | ProtocolFeature.RESET_DEVICE
    )
    with small_guest(also=[ProtocolFeature.RESET_DEVICE]) as guest:
        guest.connect(airlock.channel())
        guest.start()
        ios = submit(guest, 2)
        _, later_one = take(back, 2)
        complete(back, later_one)
        await_reaped(guest.queues[0])
        assert statuses(ios) == [None, BlkStatus.OK]
        guest.front.reset_device()
        for queue in guest.queues:
            queue.reset()
        guest.start()
        serve(back, guest)
        guest.disconnect()
        airlock.join()


def test_i3_broken_ring_does_no_request_twice(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The same order, but the back gave up the ring: the session goes on."""
    queue = guest.queues[0]
    submit(guest, 3)
    _, second, _ = take(back, 3)
    back.complete(second)
    await_reaped(queue)
    err = back.vrings[0].err
    assert err is not None
    notify(err)
    assert readable(queue.err_fd)
    guest.stop()
    assert queue.base == 3
    guest.start()
    fourth = queue.submit(BlkType.FLUSH)
    queue.kick()
    back.complete(back.take())
    assert await_reaped(queue) == [fourth]


@pytest.mark.parametrize("how", ["front leaves", "signal"])
def test_i8_end_of_the_session_drains_the_rings(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest, how: str
) -> None:
    """The front learns of the end when its memory is not used any more."""
    ios = submit(guest, 3)
    chains = take(back, 3)
    timer = later(lambda: complete(back, *chains))
    if how == "signal":
        ended = threading.Thread(target=airlock.end, name="end")
        ended.start()
        assert hung_up(guest.front.channel)
        assert airlock.session.stopped
    else:
        guest.disconnect()
        airlock.join()
    guest.queues[0].reap()
    assert statuses(ios) == [BlkStatus.OK] * 3
    before = everything(guest)
    timer.join()
    if how == "signal":
        ended.join()
    assert everything(guest) == before
    assert airlock.session.device.memory.find(0x7E57_0000_0000, 1) is None
    assert not airlock.session.back_lost


def test_c9_signal_while_the_back_owes_an_answer_drains_the_rings(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The exchange goes on to its end, or the back would be out of step with us."""
    asked, answered = threading.Event(), threading.Event()

    def late(config: Config, fds: list[Fd]) -> Config:
        asked.set()
        answered.wait(PATIENCE)
        return Config(config.offset, config.size, config.flags, bytes(config.size))

    ios = submit(guest, 3)
    chains = take(back, 3)
    back.instead[R.GET_CONFIG] = late
    guest.front.channel.send(R.GET_CONFIG, Config(0, 8).pack())
    assert asked.wait(PATIENCE)
    notify(airlock.stop)
    answering = later(answered.set)
    answering.join()
    timer = later(lambda: complete(back, *chains))
    airlock.join()
    timer.join()
    guest.queues[0].reap()
    assert statuses(ios) == [BlkStatus.OK] * 3
    assert airlock.session.stopped


def test_i3_guest_is_called_for_completions_at_the_end_of_the_session(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The back completes a request after it was told to stop, and the airlock ends."""
    queue = guest.queues[0]
    (io,) = submit(guest)
    (chain,) = take(back, 1)
    usual = back.stop_ring

    def stop_ring(state: VringState, fds: list[Fd]) -> VringState:
        if state.index == 0:
            back.complete(chain)
        return usual(state, fds)

    back.instead[R.GET_VRING_BASE] = stop_ring
    if back.features & Feature.EVENT_IDX:
        # It seems to be done with all that it has taken.
        back.ring().ring.avail_event = 0
    drain(queue.call_fd)
    queue.driver.arm()
    notify(airlock.stop)
    assert hung_up(guest.front.channel)
    assert readable(queue.call_fd, 0)
    queue.reap()
    assert io.status == BlkStatus.OK


def test_i8_front_that_is_gone_is_not_waited_for_by_its_memory(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """Its mappings end with the session, in time, though a request never ends."""
    submit(guest, 1)
    take(back, 1)
    began = time.monotonic()
    guest.disconnect()
    airlock.join()
    assert time.monotonic() - began < DRAIN + SLACK
    assert len(airlock.session.device.memory) == 0


def test_reset_drains_and_disables(airlock: Airlock) -> None:
    """RESET_DEVICE is as a stop of all rings, and then it is passed on."""
    back = ScriptedBack(
        protocol_features=PROTOCOL_FEATURES | ProtocolFeature.RESET_DEVICE
    )
    airlock.back.close()
    airlock.back = back
    with small_guest() as guest:
        guest._wanted_protocol |= ProtocolFeature.RESET_DEVICE
        guest.connect(airlock.channel())
        guest.front.reset_device()
        guest.start()
        ios = submit(guest, 2)
        chains = take(back, 2)
        timer = later(lambda: complete(back, *chains))
        guest.front.reset_device()
        timer.join()
        guest.queues[0].reap()
        assert statuses(ios) == [BlkStatus.OK] * 2
        assert back.requests().count(R.RESET_DEVICE) == 2
        assert back.requests()[-1] == R.RESET_DEVICE
        for queue in guest.queues:
            queue.reset()
        guest.start()
        serve(back, guest)
        guest.disconnect()
        airlock.join()


def test_disabled_ring_ends_what_is_in_flight(
    back: ScriptedBack, guest: BlkGuest
) -> None:
    """And takes nothing new, until it is enabled again."""
    ios = submit(guest, 2)
    chains = take(back, 2)
    front: Frontend = guest.front
    front.set_vring_enable(0, False)
    ios += submit(guest, 1)
    for chain in chains:
        back.complete(chain)
    while len([io for io in ios if io.status is not None]) < 2:
        await_reaped(guest.queues[0])
    serve(back, guest, 1)
    front.barrier()
    assert back.ring().take() is None
    front.set_vring_enable(0, True)
    serve_all(back, guest, b"", 1)
    assert statuses(ios) == [BlkStatus.OK] * 3


def test_ring_may_stop_and_start_without_end(
    back: ScriptedBack, guest: BlkGuest, airlock: Airlock
) -> None:
    """With something in flight each time that is not taken yet."""
    queue = guest.queues[0]
    (io,) = submit(guest)
    for _ in range(50 if back.features & Feature.EVENT_IDX else 5):
        arrived(back, 1)
        guest.stop()
        assert queue.base == 0
        guest.start()
    serve_all(back, guest, b"", 1)
    assert io.status == BlkStatus.OK
    assert airlock.counters()["completions"] == 1
