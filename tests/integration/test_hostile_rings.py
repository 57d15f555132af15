# SPDX-License-Identifier: Apache-2.0
"""I5: what the back does in isolated memory and with its eventfds."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack, readable, wait_until
from tests.support.sessions import (
    LATE,
    TIMEOUT,
    assert_serves_the_next,
    await_reaped,
    serve,
    small_guest,
    wait_for_errors,
)
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import Io
from vhost_airlock.vhost.fds import drain, notify


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back, drain_timeout=TIMEOUT) as airlock:
        yield airlock


@pytest.fixture
def guest() -> Iterator[BlkGuest]:
    with small_guest() as guest:
        yield guest


@pytest.fixture
def session(airlock: Airlock, back: ScriptedBack, guest: BlkGuest) -> Iterator[Airlock]:
    """Two rings that run."""
    guest.connect(airlock.channel())
    guest.start()
    serve(back, guest)
    serve(back, guest, 1)
    yield airlock
    guest.disconnect()
    assert_serves_the_next(airlock, back)


def submitted(back: ScriptedBack, guest: BlkGuest) -> Io:
    """A request that the back can see, and has not taken."""
    io = guest.queues[0].submit(BlkType.FLUSH)
    guest.queues[0].kick()
    ring = back.ring().ring
    wait_until(lambda: ring.avail_idx == back.ring().next_avail + 1, "a chain comes")
    return io


def assert_broken(guest: BlkGuest, back: ScriptedBack, reason: str, log: list[str]):
    """Ring 0 is, and the front knows; the other is not; and it can be started again."""
    assert readable(guest.queues[0].err_fd)
    drain(guest.queues[0].err_fd)
    assert f"ring 0 is broken: {reason}" in log
    serve(back, guest, 1)
    guest.stop()
    guest.queues[0].reset()
    guest.start()
    serve(back, guest)
    serve(back, guest, 1)


@pytest.mark.parametrize("jump", [17, 1000, 0x8000, -1])
def test_i5_used_index_that_jumps_breaks_the_ring(
    session: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    jump: int,
) -> None:
    io = submitted(back, guest)
    back.take()
    ring = back.ring().ring
    old = ring.used_idx
    ring.used_idx = new = (old + jump) & 0xFFFF
    call(back)
    assert_broken(
        guest,
        back,
        f"the back's used index jumps by more than the ring holds: to {new} from {old}",
        wait_for_errors(caplog),
    )
    assert io.status is None


def call(back: ScriptedBack, index: int = 0) -> None:
    fd = back.vrings[index].call
    assert fd is not None
    notify(fd)


@pytest.mark.parametrize("head", [16, 17, 0xFFFF, 0x10000, 0xFFFFFFFF, 5])
def test_i5_completion_of_nothing_is_ignored(
    session: Airlock, back: ScriptedBack, guest: BlkGuest, head: int
) -> None:
    """Beyond the ring, or not in flight. Some devices do it by mistake."""
    io = submitted(back, guest)
    chain = back.take()
    back.ring().complete(head, 1)
    back.publish()
    back.complete(chain)
    await_reaped(guest.queues[0])
    assert io.status == BlkStatus.OK
    assert session.counters()["violations"] == 1
    assert session.counters()["completions"] == 2
    serve(back, guest)


def test_i5_completion_that_is_repeated_is_ignored(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    io = submitted(back, guest)
    chain = back.take()
    back.complete(chain)
    await_reaped(guest.queues[0])
    for _ in range(5):
        back.complete(chain, status=7)
    serve(back, guest)
    assert io.status == BlkStatus.OK
    assert guest.queues[0].driver.ring.used_idx == 3
    assert session.counters()["violations"] == 5


def test_i5_completions_of_nothing_without_end_break_the_ring(
    session: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    submitted(back, guest)
    back.take()
    for _ in range(17):
        back.ring().complete(15, 1)
        back.ring().publish()
        call(back)
        wait_until(
            lambda: session.counters()["violations"] >= 17 or not unseen(session, back),
            "it is seen",
        )
    assert_broken(
        guest,
        back,
        "the back completes chains that are not in flight, again and again:"
        " id 15, 17 in a row",
        wait_for_errors(caplog),
    )


def unseen(airlock: Airlock, back: ScriptedBack) -> bool:
    """Is there a completion that the airlock has not looked at?"""
    counters = airlock.counters()
    looked = counters["violations"] + counters["completions"]
    return looked != back.ring().next_used


@pytest.mark.parametrize("length", [0, 1, 512, 513, 514, 0xFFFFFFFF])
def test_i5_length_is_no_more_than_there_is_room_for(
    session: Airlock, back: ScriptedBack, guest: BlkGuest, length: int
) -> None:
    """And what is copied back does not depend on it."""
    queue = guest.queues[0]
    buffer = guest.ram.alloc(4096)
    guest.ram.view(buffer, 4096)[:] = b"g" * 4096
    io = queue.submit(BlkType.IN, 0, [(buffer + 512, 512)])
    queue.kick()
    back.complete(back.take(), b"d" * 512, length=length)
    await_reaped(queue)
    assert (io.status, io.written) == (BlkStatus.OK, min(length, 513))
    assert guest.ram.view(buffer, 4096) == b"g" * 512 + b"d" * 512 + b"g" * 3072
    assert session.counters()["clamped"] == (length > 513)


def test_i5_shadow_ring_may_be_overwritten_with_noise(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """All but the used ring: nothing of it is ever read back."""
    io = submitted(back, guest)
    chain = back.take()
    ring = back.ring().ring
    noise = os.urandom(len(ring.desc))
    for _ in range(3):
        ring.desc[:] = noise
        ring.avail_flags = 0xFFFF
        ring.avail_idx = 0x1234
        for slot in range(ring.size):
            ring.set_avail_entry(slot, 0xFFFF)
    back.complete(chain)
    await_reaped(guest.queues[0])
    assert io.status == BlkStatus.OK
    assert not guest.queues[0].err_fd.closed
    assert not readable(guest.queues[0].err_fd, 0)
    ring.avail_idx = back.ring().next_avail
    serve(back, guest)


def test_i5_isolated_memory_may_be_overwritten_while_it_is_used(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """By a thread that never rests, used rings and all: nothing but rings breaks."""
    ended = threading.Event()
    fds = [os.dup(fd.fileno()) for fd in back.memory_fds()]

    def scribble() -> None:
        chance = random.Random(1)
        while not ended.is_set():
            for fd in fds:
                size = 1 << 20
                at = chance.randrange(0, size) & ~7
                os.pwrite(fd, chance.randbytes(chance.choice([2, 8, 512])), at)

    thread = threading.Thread(target=scribble, name="scribble")
    thread.start()
    try:
        for _ in range(20):
            for queue in guest.queues:
                for _ in range(4):
                    queue.submit(BlkType.FLUSH)
                queue.kick()
            guest.stop()
            for queue in guest.queues:
                queue.reset()
            guest.start()
    finally:
        ended.set()
        thread.join()
        for fd in fds:
            os.close(fd)


def test_i5_err_descriptor_of_the_back_breaks_the_ring(
    session: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    err = back.vrings[0].err
    assert err is not None
    notify(err)
    log = wait_for_errors(caplog)
    for _ in range(5):
        notify(err)
    assert_broken(guest, back, "the back signalled an error of the ring", log)


@pytest.mark.timing
def test_i5_signals_without_end_cost_nothing_when_they_end(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The err and call descriptors stay readable; nobody looks all the time."""
    vring = back.vrings[0]
    assert vring.err is not None
    assert vring.call is not None
    for _ in range(100):
        for fd in (vring.err, vring.call):
            os.eventfd_write(fd.fileno(), 1 << 40)
    guest.front.barrier()
    idle(0.1)
    before = time.process_time()
    idle(0.3)
    assert time.process_time() - before < 0.1
    serve(back, guest, 1)


def idle(seconds: float) -> None:
    threading.Event().wait(seconds)


def test_i5_call_descriptor_may_be_made_blocking(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    for index in range(2):
        vring = back.vrings[index]
        for fd in (vring.call, vring.err, vring.kick):
            assert fd is not None
            os.set_blocking(fd.fileno(), True)
    for _ in range(3):
        serve(back, guest)
        serve(back, guest, 1)
    guest.stop()
    guest.start()
    serve(back, guest)


@pytest.mark.timing
def test_i5_requests_that_never_end_do_not_fill_anything(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """As many as the ring holds, and no more, whatever the guest does; the other ring
    goes on."""
    queue = guest.queues[0]
    buffer = guest.ram.alloc(64 << 10)
    for _ in range(queue.size):
        queue.submit(BlkType.IN, 0, [(buffer, 64 << 10)])
        queue.kick()
    chains = [back.take() for _ in range(queue.size)]
    assert session.counters()["chains"] == 1 + queue.size
    serve(back, guest, 1)
    guest.stop()
    session.assert_no_message_took_longer(LATE)
    # They are all unfinished and the last ones, so the guest can offer them again.
    assert queue.base == 1
    guest.start()
    for chain in chains:
        back.complete(chain, bytes(64 << 10))
    while queue.pending:
        await_reaped(queue)


def make_kicks_wait(back: ScriptedBack, guest: BlkGuest) -> Io:
    """Of ring 0, and have the worker kick; the request for which it does.

    The flag for not blocking belongs to everybody who has the eventfd.
    """
    kick = back.vrings[0].kick
    assert kick is not None
    back.ring().arm()
    drain(kick)
    os.set_blocking(kick.fileno(), True)
    os.eventfd_write(kick.fileno(), (1 << 64) - 2)
    return submitted(back, guest)


@pytest.mark.timing
def test_i5_kick_descriptor_that_is_full_does_not_keep_a_ring_from_its_end(
    session: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The device's other ring waits too, till somebody needs the worker."""
    io = make_kicks_wait(back, guest)
    other = guest.queues[1].submit(BlkType.FLUSH)
    guest.queues[1].kick()
    idle(0.1)
    assert back.ring(1).take() is None, "nothing waits"
    guest.front.barrier()
    guest.front.get_vring_base(0)
    session.assert_no_message_took_longer(LATE)
    assert io.status is None
    back.complete(back.take(1), index=1)
    await_reaped(guest.queues[1])
    assert other.status == BlkStatus.OK


@pytest.mark.timing
@pytest.mark.parametrize("end", ["front", "signal"])
def test_i5_kick_descriptor_that_is_full_does_not_keep_a_session_from_its_end(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest, end: str
) -> None:
    guest.connect(airlock.channel())
    guest.start()
    serve(back, guest)
    make_kicks_wait(back, guest)
    began = time.monotonic()
    if end == "front":
        guest.disconnect()
        airlock.join()
    else:
        airlock.end()
    assert time.monotonic() - began < LATE
