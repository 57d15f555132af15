# SPDX-License-Identifier: Apache-2.0
"""What was negotiated, and what a ring's state is; decisions only, no I/O.

Features. The airlock ends both rings, so the format of one says nothing about the
other: ring features are chosen for each side alone. What belongs to the device passes
through. Everything else is masked, and so is what nobody has heard of yet.

Rings. A ring is started by its kick descriptor and stopped by GET_VRING_BASE; beside
that it is enabled or not. `TRANSITIONS` is the whole life of a ring, and `Vring` is
changed nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from ..errors import ProtocolError, RequestRefused, SessionError
from ..vhost.wire import Feature, ProtocolFeature, VringAddr

DEVICE = ((1 << 24) - 1) | (((1 << 14) - 1) << 50)
"""The feature bits of the device type: 0 to 23 and 50 to 63 (virtio 1.3, section 6)."""
PASSED = DEVICE | Feature.VERSION_1 | Feature.ANY_LAYOUT
"""Features that the front gets if the back has them, and the other way round."""
OWN = Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES
"""Features that the front gets whatever the back has."""
IF_BACK = Feature.INDIRECT_DESC
"""Ours, but offered only with the back's: a chain in an indirect table may be longer
than a ring, and only another such table can hold it."""
DRIVEN = Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES | Feature.INDIRECT_DESC
"""Features that we accept from the back, whatever the front says."""

_P = ProtocolFeature
PASSED_PROTOCOL = (
    _P.MQ
    | _P.RARP
    | _P.NET_MTU
    | _P.CRYPTO_SESSION
    | _P.CONFIG
    | _P.RESET_DEVICE
    | _P.STATUS
    | _P.DEVICE_STATE
)
"""Protocol features that the front gets if the back has them."""
OWN_PROTOCOL = _P.REPLY_ACK | _P.CONFIGURE_MEM_SLOTS
"""Protocol features that the front gets whatever the back has."""
DRIVEN_PROTOCOL = _P.MQ | _P.REPLY_ACK | _P.CONFIGURE_MEM_SLOTS
"""Protocol features that we accept from the back, whatever the front says."""


def front_offer(back: int) -> int:
    """Return the features to offer the front when the back offers these.

    SessionError when the back lacks what we need.
    """
    if not back & Feature.VERSION_1:
        raise SessionError(f"back: features {back:#x} lack VIRTIO_F_VERSION_1")
    return back & (PASSED | IF_BACK) | OWN


def front_accepts(offered: int, accepted: int) -> int:
    """Return what the front accepted of what it was offered, or refuse it."""
    if surplus := accepted & ~offered:
        raise RequestRefused(f"SET_FEATURES: bits {surplus:#x} were not offered")
    if not accepted & Feature.VERSION_1:
        raise RequestRefused(
            f"SET_FEATURES: {accepted:#x} lacks VIRTIO_F_VERSION_1;"
            " legacy drivers can't be isolated"
        )
    return accepted


def back_features(front: int, back: int) -> int:
    """Return what to accept of the back's features when the front accepted its own."""
    return back & (front & PASSED | DRIVEN)


def front_protocol_offer(back: int) -> ProtocolFeature:
    """Return the protocol features to offer the front when the back offers these."""
    offer = ProtocolFeature(back & PASSED_PROTOCOL) | OWN_PROTOCOL
    if back & _P.BACKEND_REQ and back & _P.CONFIG:
        offer |= _P.BACKEND_REQ  # for changes of the configuration space
    return offer


def front_accepts_protocol(offered: int, accepted: int) -> ProtocolFeature:
    """Return what the front accepted of what it was offered, or refuse it."""
    if surplus := accepted & ~offered:
        raise RequestRefused(f"SET_PROTOCOL_FEATURES: {surplus:#x} were not offered")
    return ProtocolFeature(accepted)


def back_protocol(front: ProtocolFeature, back: int) -> ProtocolFeature:
    """Return what to accept of the back's protocol features."""
    wanted = front & (PASSED_PROTOCOL | _P.BACKEND_REQ) | DRIVEN_PROTOCOL
    return ProtocolFeature(back & wanted)


class Event(Enum):
    """What happens to a ring."""

    START = auto()
    """The front sent its kick descriptor."""
    STOP = auto()
    """The front asked for its base, or the device is reset, or the session ends."""
    ENABLE = auto()
    DISABLE = auto()


class Phase(Enum):
    """The states of a ring."""

    STOPPED = auto()
    """Not started and not enabled: this is how a ring begins."""
    ENABLED = auto()
    """Enabled, and to be started yet."""
    DISABLED = auto()
    """Started and not enabled: what is in flight ends, nothing new begins."""
    RUNNING = auto()

    @property
    def started(self) -> bool:
        return self in (Phase.DISABLED, Phase.RUNNING)

    @property
    def enabled(self) -> bool:
        return self in (Phase.ENABLED, Phase.RUNNING)


TRANSITIONS: dict[tuple[Phase, Event], Phase] = {
    (Phase.STOPPED, Event.START): Phase.DISABLED,
    (Phase.STOPPED, Event.STOP): Phase.STOPPED,
    (Phase.STOPPED, Event.ENABLE): Phase.ENABLED,
    (Phase.STOPPED, Event.DISABLE): Phase.STOPPED,
    (Phase.ENABLED, Event.START): Phase.RUNNING,
    (Phase.ENABLED, Event.STOP): Phase.ENABLED,
    (Phase.ENABLED, Event.ENABLE): Phase.ENABLED,
    (Phase.ENABLED, Event.DISABLE): Phase.STOPPED,
    (Phase.DISABLED, Event.START): Phase.DISABLED,
    (Phase.DISABLED, Event.STOP): Phase.STOPPED,
    (Phase.DISABLED, Event.ENABLE): Phase.RUNNING,
    (Phase.DISABLED, Event.DISABLE): Phase.DISABLED,
    (Phase.RUNNING, Event.START): Phase.RUNNING,
    (Phase.RUNNING, Event.STOP): Phase.ENABLED,
    (Phase.RUNNING, Event.ENABLE): Phase.RUNNING,
    (Phase.RUNNING, Event.DISABLE): Phase.DISABLED,
}


@dataclass(slots=True)
class Vring:
    """A ring as the front describes it."""

    index: int
    phase: Phase = Phase.STOPPED
    num: int = 0
    """Entries; 0: not said yet."""
    base: int = 0
    """The position in the avail ring at which to start."""
    addr: VringAddr | None = None

    @property
    def configured(self) -> bool:
        return self.num > 0 and self.addr is not None

    def happen(self, event: Event) -> None:
        """Change the phase."""
        self.phase = TRANSITIONS[self.phase, event]

    def set_num(self, num: int) -> None:
        """Set the number of entries (virtio 1.3, 2.7: a power of two up to 32768)."""
        self._require_stopped("SET_VRING_NUM")
        if not 0 < num <= 32768 or num & (num - 1):
            raise RequestRefused(f"SET_VRING_NUM: ring {self.index}: {num} entries")
        self.num = num

    def set_base(self, base: int) -> None:
        """Set the position at which to start, 16 bits for a split ring."""
        self._require_stopped("SET_VRING_BASE")
        if base > 0xFFFF:
            raise RequestRefused(f"SET_VRING_BASE: ring {self.index}: base {base:#x}")
        self.base = base

    def set_addr(self, addr: VringAddr) -> None:
        """Set where the ring's parts are, aligned as virtio 1.3, 2.7 says."""
        for name, value, align in (
            ("desc", addr.desc, 16),
            ("avail", addr.avail, 2),
            ("used", addr.used, 4),
        ):
            if value % align:
                raise RequestRefused(
                    f"SET_VRING_ADDR: ring {self.index}: {name} {value:#x}"
                    f" is not aligned to {align}"
                )
        self.addr = addr

    def parts(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Return (user address, bytes) of descriptors, avail ring and used ring."""
        if self.addr is None:
            raise ProtocolError(f"ring {self.index} has no address")
        return (
            (self.addr.desc, 16 * self.num),
            (self.addr.avail, 6 + 2 * self.num),
            (self.addr.used, 6 + 8 * self.num),
        )

    def _require_stopped(self, request: str) -> None:
        if self.phase.started:
            raise RequestRefused(f"{request}: ring {self.index} is started")
