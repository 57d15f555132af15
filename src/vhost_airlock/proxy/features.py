# SPDX-License-Identifier: Apache-2.0
"""Which features each side is offered, and may accept; decisions only, no I/O.

The airlock ends both rings, so the format of one says nothing about the other: ring
features are chosen for each side alone. Features of the device pass through. All others
are masked, also those that no specification has yet.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Self

from ..errors import RequestRefused, SessionError
from ..record import record
from ..vhost.wire import Feature, ProtocolFeature

DEVICE = ((1 << 24) - 1) | (((1 << 14) - 1) << 50)
"""The feature bits of the device type: 0 to 23 and 50 to 63 (virtio 1.3, section 6)."""
PASSED = DEVICE | Feature.VERSION_1 | Feature.ANY_LAYOUT
"""Features that the front gets if the back has them, and the other way round."""
OWN = Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
"""Features that the front gets, also if the back lacks them."""
IF_BACK = Feature.INDIRECT_DESC
"""Ours, but offered only with the back's: a chain in an indirect table may be longer
than a ring, and only another indirect table can hold it."""
DRIVEN = Feature.EVENT_IDX | Feature.PROTOCOL_FEATURES | Feature.INDIRECT_DESC
"""Features that we accept from the back, also if the front does not accept them."""

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
OWN_PROTOCOL = _P.REPLY_ACK | _P.CONFIGURE_MEM_SLOTS | _P.INFLIGHT_SHMFD | _P.LOG_SHMFD
"""Protocol features that the front gets, also if the back lacks them."""
DRIVEN_PROTOCOL = _P.MQ | _P.REPLY_ACK | _P.CONFIGURE_MEM_SLOTS
"""Protocol features that we accept from the back, also without the front."""
NEEDED = Feature.VERSION_1 | Feature.PROTOCOL_FEATURES
"""Features without which nothing works: they can't be withheld."""


@record
class Withheld:
    """Features that the user keeps from the front, so that its guest can move to a
    host that lacks them.
    """

    features: int = 0
    protocol: ProtocolFeature = ProtocolFeature(0)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return those of a list of names and masks as the log has them, with commas.

        ValueError says which of them is wrong, and why.
        """
        features, protocol = 0, ProtocolFeature(0)
        for word in text.split(","):
            if word in ProtocolFeature.__members__:
                protocol |= ProtocolFeature[word]
            elif word in Feature.__members__:
                features |= Feature[word]
            else:
                features |= _mask(word)
            if features & NEEDED:
                raise ValueError(
                    f"{word}: nothing works without {names(features & NEEDED, Feature)}"
                )
        return cls(features, protocol)


def _mask(word: str) -> int:
    try:
        value = int(word, 16) if word.startswith("0x") else 0
    except ValueError:
        value = 0
    if not 0 < value < 1 << 64:
        raise ValueError(f"{word}: no name of a feature, and no mask as 0x20000000")
    return value


NONE = ProtocolFeature(0)
NOTHING = Withheld()


def front_offer(back: int, withheld: Withheld = NOTHING) -> int:
    """Return the features to offer the front when the back offers these.

    SessionError when the back lacks a feature that we need.
    """
    if not back & Feature.VERSION_1:
        raise SessionError(f"back-end: features {back:#x} lack VIRTIO_F_VERSION_1")
    return (back & (PASSED | IF_BACK) | OWN) & ~withheld.features


def front_accepts(offered: int, accepted: int) -> int:
    """Return the accepted features. RequestRefused if one was not offered."""
    if surplus := accepted & ~offered:
        raise RequestRefused(f"SET_FEATURES: bits {surplus:#x} were not offered")
    return accepted


def require_modern(accepted: int) -> None:
    """Refuse the features with which a ring is about to start, if they lack VERSION_1.

    Until then they are not judged: some front-ends send them in two messages.
    """
    if not accepted & Feature.VERSION_1:
        raise RequestRefused(
            f"SET_FEATURES: {accepted:#x} lacks VIRTIO_F_VERSION_1;"
            " legacy drivers can't be isolated"
        )


def back_features(front: int, back: int, protocol: ProtocolFeature = NONE) -> int:
    """Return the back's features to accept, when the front has accepted these.

    `protocol` are those in use with the back. A back whose state is going to be
    transferred (DEVICE_STATE) prepares it while LOG_ALL is set; it gets no log, for it
    can't write to the guest's memory. Others have no use for that bit.
    """
    passed = PASSED
    if protocol & _P.DEVICE_STATE:
        passed |= Feature.LOG_ALL
    return back & (front & passed | DRIVEN)


def front_protocol_offer(back: int, withheld: Withheld = NOTHING) -> ProtocolFeature:
    """Return the protocol features to offer the front when the back offers these."""
    offer = ProtocolFeature(back & PASSED_PROTOCOL) | OWN_PROTOCOL
    if back & _P.BACKEND_REQ and back & _P.CONFIG:
        offer |= _P.BACKEND_REQ  # for changes of the configuration space
    return offer & ~withheld.protocol


def front_accepts_protocol(offered: int, accepted: int) -> ProtocolFeature:
    """Return the accepted features. RequestRefused if one was not offered."""
    if surplus := accepted & ~offered:
        raise RequestRefused(f"SET_PROTOCOL_FEATURES: {surplus:#x} were not offered")
    return ProtocolFeature(accepted)


def back_protocol(front: ProtocolFeature, back: int) -> ProtocolFeature:
    """Return the back's protocol features to accept.

    Without acks there is no knowing when the back has a region of the pool, so it gets
    all of the pool at the start.
    """
    wanted = front & (PASSED_PROTOCOL | _P.BACKEND_REQ) | DRIVEN_PROTOCOL
    if not back & _P.REPLY_ACK:
        wanted &= ~_P.CONFIGURE_MEM_SLOTS
    return ProtocolFeature(back & wanted)


def names(features: int, kind: type[IntFlag]) -> str:
    """Return the names of features, for the log, and as a number those without one."""
    found = [flag for flag in kind if features & flag]
    words = [flag.name or "" for flag in found]
    if rest := features & ~sum(found):
        words.append(f"{rest:#x}")
    return " ".join(words) or "none"
