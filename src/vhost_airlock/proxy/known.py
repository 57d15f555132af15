# SPDX-License-Identifier: Apache-2.0
"""A record of the back's answers that the VMM got, and of the values that it has set.

By it another back is judged that takes the place of one that is gone, the VMM gets
answers while there is no back, and the next back is told what the last one knew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ..errors import RequestRefused, SessionError
from ..vhost.frontend import Frontend
from .back import Back
from .features import front_offer, front_protocol_offer

CAPACITY = 8
"""Bytes of a capacity (virtio 1.3, 5.2.4)."""
DRIVER_OK = 4
"""Of the device's status (virtio 1.3, 2.1): the driver is ready."""


class Known:
    """The answers of one session's backs, the first of which is `back`."""

    def __init__(self, back: Back) -> None:
        self._withheld = back.config.withhold_features
        self._grows = back.config.grows
        self.offer = front_offer(back.offered, self._withheld)
        """The features that the front was offered."""
        self.protocol_offer = front_protocol_offer(
            back.offered_protocol, self._withheld
        )
        self.queue_num: int | None = None
        """None: the front did not ask."""
        self.status = 0
        """As the front has set it last."""
        self.mtu: int | None = None
        self._config: dict[int, int] = {}
        """The bytes of the configuration space that the front has read, by offset."""
        self._written: dict[int, int] = {}
        """Those that it has written."""

    # Notes of what was passed on.

    def read_config(self, offset: int, data: bytes) -> None:
        self._config |= enumerate(data, offset)

    def wrote_config(self, offset: int, data: bytes) -> None:
        written = dict(enumerate(data, offset))
        self._written |= written
        self._config |= {at: byte for at, byte in written.items() if at in self._config}

    def config_changed(self) -> None:
        """The back has changed it: the front is told, and reads it again."""
        self._config.clear()

    def was_reset(self) -> None:
        self.status = 0
        self._written.clear()

    # For the time without a back.

    def config(self, offset: int, size: int) -> bytes | None:
        """Bytes of the configuration space; None: the front has not read all of them
        before.
        """
        try:
            return bytes(self._config[at] for at in range(offset, offset + size))
        except KeyError:
            return None

    # For another back.

    def require(self, back: Back) -> bool:
        """Raise SessionError if this back is not the device that the front knows.

        If it is not settled, the front knows its offers only. Returns whether its
        capacity has grown, of which the front has to be told.
        """
        fewer = self.offer & ~front_offer(back.offered)
        if fewer:
            raise _changed(f"it has no features {fewer:#x} any more")
        lacking = self.protocol_offer & ~front_protocol_offer(back.offered_protocol)
        if lacking:
            raise _changed(f"it has no protocol features {lacking:#x} any more")
        grown = False
        if not back.settled:
            return grown
        if self.queue_num is not None:
            queues = back.peer.get_queue_num()
            if queues < self.queue_num:
                raise _changed(f"it has {queues} queues, and had {self.queue_num}")
        for start, known in _runs(self._config.items()):
            try:
                found = back.peer.get_config(start, len(known))
            except RequestRefused as refused:
                raise _changed(str(refused)) from None
            if found == known:
                continue
            if not (self._grows and start == 0 and _has_grown(found, known)):
                raise _changed(
                    f"its configuration space has {found.hex()} at {start},"
                    f" and had {known.hex()}"
                )
            grown = True
        return grown

    def tell(self, peer: Frontend) -> None:
        """Tell a back the values that the front has set, before any ring starts."""
        for start, data in _runs(self._written.items()):
            peer.set_config(start, data)
        if self.mtu is not None:
            peer.net_set_mtu(self.mtu)
        if self.status:
            peer.set_status(self.status & ~DRIVER_OK)

    def tell_ready(self, peer: Frontend) -> None:
        """Tell a back that the driver is ready, when the rings are started."""
        if self.status & DRIVER_OK:
            peer.set_status(self.status)


def _runs(items: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """Return (offset, bytes) of each run of adjacent bytes."""
    in_order = enumerate(sorted(items))
    for _, run in groupby(in_order, key=lambda item: item[1][0] - item[0]):
        found = [byte for _, byte in run]
        yield found[0][0], bytes(value for _, value in found)


def _has_grown(found: bytes, known: bytes) -> bool:
    """Is the capacity at the beginning larger than it was, and all else the same?"""
    return (
        len(known) >= CAPACITY
        and found[CAPACITY:] == known[CAPACITY:]
        and int.from_bytes(found[:CAPACITY], "little")
        > int.from_bytes(known[:CAPACITY], "little")
    )


def _changed(difference: str) -> SessionError:
    return SessionError(
        f"back-end: it is not the device that the VMM knows: {difference}"
    )
