# SPDX-License-Identifier: Apache-2.0
"""Features that the user keeps from the front: hosts that differ offer the same."""

from __future__ import annotations

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack, ScriptedBack
from tests.support.sessions import errors, small_guest
from vhost_airlock.errors import PeerRefused
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.proxy.features import Withheld
from vhost_airlock.vhost.wire import Feature, ProtocolFeature, Request

LACKING = ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.INFLIGHT_SHMFD
WITHHELD = Withheld(Feature.EVENT_IDX | Feature.INDIRECT_DESC | 1 << 9, LACKING)


def test_guest_does_without_them() -> None:
    """Its rings are those of a back-end that lacks them. The back is used as ever."""
    back = DiskBack(num_queues=2)
    with Airlock(back, withhold_features=WITHHELD) as airlock, small_guest() as guest:
        guest.connect(airlock.channel())
        assert not guest.features & WITHHELD.features
        assert not guest.front.protocol_features & LACKING
        guest.start()
        buffer = guest.ram.alloc(4096)
        guest.ram.view(buffer, 4)[:] = b"here"
        guest.write(8, [(buffer, 4096)])
        guest.read(8, [(guest.ram.alloc(4096), 4096)])
        assert back.content(8 * 512 + 4)[-4:] == b"here"
        guest.stop()
        guest.disconnect()
        accepted = back.got(Request.SET_FEATURES)[-1].payload.value
    assert accepted & WITHHELD.features == Feature.EVENT_IDX | Feature.INDIRECT_DESC


def test_front_can_not_accept_them(
    guest: BlkGuest, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a guest comes that uses them."""
    with Airlock(ScriptedBack(), withhold_features=WITHHELD) as airlock:
        guest.connect(airlock.channel())
        with pytest.raises(PeerRefused):
            guest.front.set_features(guest.features | Feature.EVENT_IDX)
        assert errors(caplog) == [
            "VMM: refused: SET_FEATURES: bits 0x20000000 were not offered"
        ]
        guest.disconnect()


@pytest.fixture
def guest():
    with small_guest() as guest:
        yield guest
