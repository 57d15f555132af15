# SPDX-License-Identifier: Apache-2.0
"""The traces of real front-ends, through an airlock, over the package's back-end."""

from __future__ import annotations

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import DiskBack
from tests.traces.guests import BlkGuest
from tests.traces.player import Player
from tests.traces.vmms import VMMS, Vmm
from vhost_airlock.errors import RequestRefused
from vhost_airlock.peers.server import DeviceServer
from vhost_airlock.vhost.backend import Handler
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import (
    Empty,
    Feature,
    ProtocolFeature,
    Request,
    VringState,
)


class ForgetfulServer(DeviceServer):
    """Forgets its features with a reset, as virtiofsd does, and wants them again."""

    def __init__(self, channel: Channel, back: DiskBack) -> None:
        super().__init__(channel, back.disk)
        self.protocol_offered |= int(ProtocolFeature.RESET_DEVICE)

    def _handlers(self) -> dict[Request, Handler]:
        return {**super()._handlers(), Request.RESET_DEVICE: self._on_reset}

    def _on_reset(self, _: Empty, fds: list[Fd]) -> None:
        self.features = 0

    def _on_enable(self, payload: VringState, fds: list[Fd]) -> None:
        if not self.features & Feature.PROTOCOL_FEATURES:
            raise RequestRefused("ENABLE without the feature that it belongs to")
        super()._on_enable(payload, fds)


class ForgetfulBack(DiskBack):
    """A disk of its own server."""

    def serve(self, channel: Channel) -> None:
        ForgetfulServer(channel, self).run()


@pytest.mark.parametrize("vmm", VMMS, ids=lambda vmm: vmm.name)
def test_whole_life(vmm: Vmm) -> None:
    """From the connection to its end, with requests wherever the rings run."""
    back = ForgetfulBack(num_queues=BlkGuest.all)
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
