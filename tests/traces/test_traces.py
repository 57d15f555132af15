# SPDX-License-Identifier: Apache-2.0
"""The traces of real front-ends, through an airlock, over the package's back-end."""

from __future__ import annotations

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack
from tests.traces.guests import BlkGuest
from tests.traces.known import expect_failure
from tests.traces.player import Player
from tests.traces.vmms import VMMS, Vmm
from vhost_airlock.vhost.channel import Channel


@pytest.mark.parametrize("vmm", VMMS, ids=lambda vmm: vmm.name)
def test_whole_life(vmm: Vmm, request: pytest.FixtureRequest) -> None:
    """From the connection to its end, with requests wherever the rings run."""
    expect_failure(request, BlkGuest.kind, vmm.name)
    back = DiskBack(num_queues=BlkGuest.all)
    with Airlock(back) as airlock:

        def dial() -> Channel:
            airlock.join()
            back.join()
            return airlock.channel()

        with BlkGuest() as guest, Player(vmm, guest, dial) as player:
            player.play()
        airlock.join()
        back.join()
        assert back.errors == []
