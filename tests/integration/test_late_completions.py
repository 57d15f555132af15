# SPDX-License-Identifier: Apache-2.0
"""Requests that a back-end completes while, or after, it is told to stop."""

from __future__ import annotations

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack, readable, wait_until
from vhost_airlock.peers.disk import SECTOR, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.server import RING_FEATURES
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import Feature, Request, VringAddr, VringState


def test_guest_is_called_for_what_is_done_at_a_stop() -> None:
    """The back-end can't call any more, but the guest would wait for that for ever."""

    def stop(payload: VringState, fds: list[Fd]) -> VringState:
        base = back.stop_ring(payload, fds)
        back.complete(chain, bytes(SECTOR))
        return base

    back = ScriptedBack(instead={Request.GET_VRING_BASE: stop})
    with Airlock(back) as airlock, BlkGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        queue = guest.queues[0]
        buffer = guest.ram.alloc(SECTOR)
        request = queue.submit(BlkType.IN, 0, [(buffer, SECTOR)])
        assert not queue.driver.arm()
        queue.kick()
        chain = back.take()
        assert not readable(queue.call_fd, 0)
        assert guest.front.get_vring_base(0) == 1
        assert readable(queue.call_fd)
        assert queue.reap() == [request]
        request.check()


@pytest.mark.parametrize(
    "features",
    [RING_FEATURES, RING_FEATURES & ~Feature.EVENT_IDX],
    ids=["event-idx", "flags"],
)
def test_stopped_ring_wants_no_calls(features: int) -> None:
    """The back-end has no descriptor for them any more: libvhost-user gives the
    connection up over the first call that is wanted."""
    back = ScriptedBack(features=features)
    with Airlock(back, drain_timeout=0.2) as airlock, BlkGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        for _ in range(2):
            guest.queues[0].submit(BlkType.IN, 0, [(guest.ram.alloc(SECTOR), SECTOR)])
        guest.queues[0].kick()
        ring, chains = back.ring(), [back.take(), back.take()]
        ring.arm()
        guest.front.get_vring_base(0)
        for chain in chains:
            ring.complete(chain.head, SECTOR + 1)
            ring.publish()
            assert not ring.call_needed()


def test_back_end_that_has_stopped_can_call_for_what_is_unfinished() -> None:
    """libvhost-user calls for the first completion after a start, wanted or not."""
    back = ScriptedBack()
    with Airlock(back, drain_timeout=0.2) as airlock, BlkGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        guest.queues[0].submit(BlkType.IN, 0, [(guest.ram.alloc(SECTOR), SECTOR)])
        guest.queues[0].kick()
        back.take()
        back.ring().arm()
        guest.front.get_vring_base(0)
        wait_until(lambda: back.vrings[0].call is not None, "it has a descriptor")


def test_back_end_can_call_as_soon_as_it_has_a_ring() -> None:
    """Chains that a stop has left with it may end there at once."""

    def take_address(payload: VringAddr, fds: list[Fd]) -> None:
        can_call.append(back.vrings[payload.index].call is not None)
        back.answer(Request.SET_VRING_ADDR, payload, fds)

    can_call: list[bool] = []
    back = ScriptedBack(instead={Request.SET_VRING_ADDR: take_address})
    with Airlock(back) as airlock, BlkGuest() as guest:
        guest.connect(airlock.channel())
        guest.start()
        assert can_call == [True]
