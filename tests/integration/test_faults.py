# SPDX-License-Identifier: Apache-2.0
"""Faults of earlier versions, each shown by the life of a session that met it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import PATIENCE, ScriptedBack, readable, wait_until
from tests.support.hung import hung
from tests.support.sessions import (
    LATE,
    TIMEOUT,
    await_reaped,
    errors,
    live,
    serve,
    small_guest,
)
from tests.support.talk import talking_back, talking_guest
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.ram import HIGH, MIB
from vhost_airlock.proxy import device as devices
from vhost_airlock.proxy import ration
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, drain, notify
from vhost_airlock.vhost.wire import BackendRequest, Request

KIB = 1024
PLUGGED = HIGH << 4


def test_c4_socket_for_requests_may_come_before_the_protocol_features() -> None:
    """Which features the front has accepted counts when a request of the back comes."""
    back = talking_back()
    with Airlock(back) as airlock, talking_guest() as guest:
        channel = airlock.channel()
        channel.send(Request.GET_PROTOCOL_FEATURES)
        channel.recv().close()
        ours, theirs = socket.socketpair()
        with theirs, Channel(ours, peer="airlock") as heard:
            channel.send(Request.SET_BACKEND_REQ_FD, fds=[theirs])
            guest.connect(channel)
            guest.start()
            assert back.asking is not None
            back.asking.exchange(BackendRequest.CONFIG_CHANGE_MSG, need_reply=False)
            with heard.recv(time.monotonic() + PATIENCE) as message:
                assert message.request == BackendRequest.CONFIG_CHANGE_MSG
            serve(back, guest)
            guest.disconnect()


def test_c6_ring_has_its_share_before_it_takes_a_chain() -> None:
    """Enabled before its kick, with a chain of 10 of the 16 pages that the pool has."""
    back = ScriptedBack()
    with Airlock(back, pool_limit=64 * KIB) as airlock:
        for _ in range(20):
            with small_guest() as guest:
                guest.connect(airlock.channel())
                queue = guest.queues[1]
                first, second = guest.ram.alloc(32 * KIB), guest.ram.alloc(8 * KIB)
                io = queue.submit(
                    BlkType.OUT, 0, [(first, 32 * KIB), (second, 8 * KIB)]
                )
                queue.kick()
                guest.front.set_vring_enable(1, True)
                guest.start()
                back.complete(back.take(1), index=1)
                await_reaped(queue)
                assert io.status == BlkStatus.OK
                assert airlock.counters(1)["faults"] == 0
                # Nor had it to have memory of its own, for which others wait.
                assert len(back.got(Request.ADD_MEM_REG)) == 2
                guest.disconnect()
                airlock.join()
                back.join()
                back.forget_seen()


def test_c10_worker_that_hangs_does_not_keep_the_session_from_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It reads guest memory whose pages do not come. All that it may use stays."""
    back = ScriptedBack()
    with Airlock(back) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        region = guest.plug(PLUGGED, MIB)
        place = airlock.session.device.memory.find(region.user_addr, MIB)
        assert place is not None
        with hung(place[0], MIB) as waited_for:
            buffer = guest.ram.alloc(4096, region=region)
            guest.queues[0].submit(BlkType.OUT, 0, [(buffer, 4096)])
            guest.queues[0].kick()
            assert readable(waited_for)
            guest.disconnect()
            airlock.join(timeout=30)
        assert "rings and descriptors stay as they are" in errors(caplog)[-1]
        # When the pages come at last, the worker goes on where it was.
        (device,) = devices._never_closed
        assert back.read(back.take())[16:] == bytes(4096)
        devices._never_closed.clear()
        kept = device.close()
        assert kept is None


def test_x5_guest_can_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It breaks its ring and resets it, again and again."""
    back = ScriptedBack()
    with Airlock(back) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        queue = guest.queues[0]
        start = time.monotonic()
        for _ in range(60):
            queue.driver.ring.avail_idx = queue.driver.next_avail + 1000
            notify(queue.kick_fd)
            assert readable(queue.err_fd)
            drain(queue.err_fd)
            guest.stop()
            queue.reset()
            guest.start()
        lines = len(errors(caplog))
        assert 1 <= lines <= 1 + (time.monotonic() - start) / ration.INTERVAL
        assert airlock.counters()["faults"] == 60
        serve(back, guest)
        guest.disconnect()


def full_eventfd() -> tuple[Fd, ...]:
    fd = Fd(os.eventfd(0, os.EFD_CLOEXEC))
    os.eventfd_write(fd.fileno(), (1 << 64) - 2)
    return (fd,)


def full_pipe() -> tuple[Fd, ...]:
    """The end to write to is the first."""
    into, out = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(out, bytes(4096))
    os.set_blocking(out, True)
    return Fd(out), Fd(into)


@pytest.fixture(params=[full_eventfd, full_pipe])
def full(request: pytest.FixtureRequest) -> Iterator[Fd]:
    """A descriptor to which a write waits for ever."""
    fds = request.param()
    yield fds[0]
    for fd in fds:
        fd.close()


def test_i10_descriptor_that_is_full_does_not_keep_the_front_waiting(full: Fd) -> None:
    """As call, which is signalled when it is set, and as err of a ring that breaks.

    The worker waits there until the next message, and with it the VMM's own rings.
    """
    back = ScriptedBack()
    with Airlock(back, timeout=TIMEOUT, drain_timeout=TIMEOUT) as airlock:
        with small_guest() as guest:
            guest.connect(airlock.channel())
            guest.start()
            front, queue = guest.front, guest.queues[0]
            for _ in range(3):
                front.set_vring_call(0, full)
                front.set_vring_err(0, full)
                front.get_features()
                front.set_vring_call(0, queue.call_fd)
                serve(back, guest)
            queue.driver.ring.avail_idx = queue.driver.next_avail + 1000
            notify(queue.kick_fd)
            wait_until(lambda: airlock.counters()["faults"] == 1, "the ring breaks")
            front.get_features()
            front.get_vring_base(0)
            guest.disconnect()
        with small_guest() as guest:
            live(airlock, back, guest)
        airlock.assert_no_message_took_longer(LATE)
