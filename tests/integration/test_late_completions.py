# SPDX-License-Identifier: Apache-2.0
"""Requests that a back-end completes while, or after, it is told to stop."""

from __future__ import annotations

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack, readable
from vhost_airlock.peers.disk import SECTOR, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import Request, VringState


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
        assert not readable(queue.call_fd)
        assert guest.front.get_vring_base(0) == 1
        assert readable(queue.call_fd)
        assert queue.reap() == [request]
        request.check()
