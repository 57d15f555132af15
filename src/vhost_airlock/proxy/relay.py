# SPDX-License-Identifier: Apache-2.0
"""Messages that are passed on to the back as they are, or, while it is away, answered
from the record of what it has answered and what the front has set.
"""

from __future__ import annotations

from ..vhost import wire
from ..vhost.wire import U64, ProtocolFeature, Request
from .back_side import BackSide


class Relay:
    """Passes messages of one device's front on to the back."""

    def __init__(self, back_side: BackSide) -> None:
        self._side = back_side
        self._early_status = 0
        """The status that the front has told before it has accepted STATUS."""

    def set_status(self, status: int) -> None:
        """Tell the back the status of the device.

        It stays here if the front has not accepted STATUS: it is about the connection
        before, of which this back knows nothing.
        """
        side = self._side
        if ProtocolFeature.STATUS not in side.protocol_features:
            self._early_status = status
            return
        if not side.away:
            side.peer.set_status(status)
        if not status:
            side.known.was_reset()
        side.known.status = status

    def get_status(self) -> int:
        """Return the status that the back has, or the one that stayed here."""
        side = self._side
        if ProtocolFeature.STATUS not in side.protocol_features:
            return self._early_status
        return side.known.status if side.away else side.peer.get_status()

    def get_queue_num(self) -> int:
        known = self._side.known
        if known.queue_num is None or not self._side.away:
            known.queue_num = self._side.peer.get_queue_num()
        return known.queue_num

    def get_config(self, asked: wire.Config) -> bytes:
        """Return a piece of the configuration space."""
        known = self._side.known.config(asked.offset, asked.size)
        if known is not None and self._side.away:
            return known
        data = self._side.peer.get_config(asked.offset, asked.size, asked.flags)
        self._side.known.read_config(asked.offset, data)
        return data

    def set_config(self, config: wire.Config) -> None:
        self._side.peer.set_config(config.offset, config.data, config.flags)
        self._side.known.wrote_config(config.offset, config.data)

    def set_mtu(self, mtu: int) -> None:
        if not self._side.away:
            self._side.peer.net_set_mtu(mtu)
        self._side.known.mtu = mtu

    def send_rarp(self, mac: U64) -> None:
        if not self._side.away:
            self._side.peer.exchange(Request.SEND_RARP, mac)
