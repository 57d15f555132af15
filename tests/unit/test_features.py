# SPDX-License-Identifier: Apache-2.0
"""Features bit by bit: what each side is offered, and may accept."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_airlock.errors import RequestRefused, SessionError
from vhost_airlock.proxy.features import (
    Withheld,
    back_features,
    back_protocol,
    front_accepts,
    front_accepts_protocol,
    front_offer,
    front_protocol_offer,
    require_modern,
)
from vhost_airlock.vhost.wire import Feature, ProtocolFeature

# The policy, written down once more and as a table: for each bit, whether the front is
# offered it ("own": always, "back": when the back offers it, "mask": never) and when we
# accept it from the back ("ours": whenever it is offered, "front": when the front has
# accepted it as well, "mask": never).

DEVICE_BITS = [*range(24), *range(50, 64)]
FEATURES = {
    **dict.fromkeys(range(64), ("mask", "mask")),
    **dict.fromkeys(DEVICE_BITS, ("back", "front")),
    26: ("own", "mask"),  # LOG_ALL
    27: ("back", "front"),  # ANY_LAYOUT
    28: ("back", "ours"),  # INDIRECT_DESC
    29: ("own", "ours"),  # EVENT_IDX
    30: ("own", "ours"),  # PROTOCOL_FEATURES
    32: ("back", "front"),  # VERSION_1
}

PROTOCOL_FEATURES = {
    **dict.fromkeys(range(64), ("mask", "mask")),
    0: ("back", "ours"),  # MQ
    1: ("own", "mask"),  # LOG_SHMFD
    2: ("back", "front"),  # RARP
    3: ("own", "ours"),  # REPLY_ACK
    4: ("back", "front"),  # NET_MTU
    7: ("back", "front"),  # CRYPTO_SESSION
    9: ("back", "front"),  # CONFIG
    12: ("own", "mask"),  # INFLIGHT_SHMFD
    13: ("back", "front"),  # RESET_DEVICE
    15: ("own", "ours"),  # CONFIGURE_MEM_SLOTS
    16: ("back", "front"),  # STATUS
    19: ("back", "front"),  # DEVICE_STATE
}
"""Bit 5, BACKEND_REQ, has a rule of its own."""

VERSION_1 = 1 << 32
EVERYTHING = (1 << 64) - 1
MASKS = st.integers(0, EVERYTHING)


def offered_by(offer: Callable[[int], int], bit: int, always: int = 0) -> str:
    """How a bit is offered to the front."""
    with_it = offer(1 << bit | always) >> bit & 1
    without = offer(always) >> bit & 1
    return {(1, 1): "own", (1, 0): "back", (0, 0): "mask"}[with_it, without]


def accepted_by(accept: Callable[[int, int], int], bit: int) -> str:
    """How a bit is accepted from the back."""
    front, alone = (accept(front, 1 << bit) >> bit & 1 for front in (EVERYTHING, 0))
    return {(1, 1): "ours", (1, 0): "front", (0, 0): "mask"}[front, alone]


def test_feature_is_offered_by_its_rule() -> None:
    found = {
        bit: (
            "back" if bit == 32 else offered_by(front_offer, bit, VERSION_1),
            accepted_by(back_features, bit),
        )
        for bit in range(64)
    }
    assert found == FEATURES


def test_only_a_back_whose_state_is_transferred_hears_of_the_log() -> None:
    log, state = Feature.LOG_ALL, ProtocolFeature.DEVICE_STATE
    others = ProtocolFeature(EVERYTHING) & ~state
    assert back_features(log, EVERYTHING, state) & log
    assert not back_features(log, EVERYTHING, others) & log
    assert not back_features(0, EVERYTHING, state) & log
    assert not back_features(log, EVERYTHING & ~log, state) & log


@given(MASKS, MASKS, MASKS)
def test_log_all_changes_no_other_feature(front: int, back: int, bits: int) -> None:
    protocol, log = ProtocolFeature(bits), Feature.LOG_ALL
    without = back_features(front & ~log, back, protocol)
    assert back_features(front | log, back, protocol) & ~log == without


@given(MASKS, MASKS)
def test_the_back_never_gets_a_bit_that_it_did_not_offer(front: int, back: int) -> None:
    assert back_features(front, back) & ~back == 0
    assert back_protocol(ProtocolFeature(front), back) & ~back == 0


def test_a_back_without_version_1_is_of_no_use() -> None:
    assert front_offer(VERSION_1) & VERSION_1
    with pytest.raises(
        SessionError, match=r"back-end: features 0x40000000 lack .*VERSION"
    ):
        front_offer(Feature.PROTOCOL_FEATURES)


def test_the_front_accepts_what_was_offered_and_no_more() -> None:
    offered = front_offer(EVERYTHING)
    assert front_accepts(offered, offered) == offered
    assert front_accepts(offered, VERSION_1) == VERSION_1
    with pytest.raises(RequestRefused, match="SET_FEATURES: bits 0x400000000 "):
        front_accepts(offered, VERSION_1 | Feature.RING_PACKED)


def test_a_ring_of_a_legacy_driver_is_refused() -> None:
    """Not its features: other front-ends send these in two messages."""
    legacy = int(Feature.EVENT_IDX)
    assert front_accepts(front_offer(EVERYTHING), legacy) == legacy
    require_modern(legacy | VERSION_1)
    with pytest.raises(RequestRefused, match=r"SET_FEATURES: 0x20000000 lacks"):
        require_modern(legacy)


@given(MASKS, MASKS)
def test_features_are_accepted_all_or_none(offered: int, bits: int) -> None:
    good = bits & offered | VERSION_1
    assert front_accepts(offered | VERSION_1, good) == good
    if bits & ~offered:
        with pytest.raises(RequestRefused, match="SET_FEATURES: "):
            front_accepts(offered, bits | VERSION_1)


def test_protocol_feature_is_offered_by_its_rule() -> None:
    def accept(front: int, back: int) -> int:
        return back_protocol(ProtocolFeature(front), back | ProtocolFeature.REPLY_ACK)

    bits = sorted(PROTOCOL_FEATURES.keys() - {5})
    found = {
        bit: (offered_by(front_protocol_offer, bit), accepted_by(accept, bit))
        for bit in bits
    }
    assert found == {bit: PROTOCOL_FEATURES[bit] for bit in bits}


def test_a_socket_for_requests_of_the_back_is_for_changes_of_the_configuration() -> (
    None
):
    p = ProtocolFeature
    assert front_protocol_offer(p.BACKEND_REQ | p.CONFIG) & p.BACKEND_REQ
    assert not front_protocol_offer(p.CONFIG) & p.BACKEND_REQ
    assert not front_protocol_offer(p.BACKEND_REQ) & p.BACKEND_REQ
    assert back_protocol(p.BACKEND_REQ, p.BACKEND_REQ) == p.BACKEND_REQ
    assert not back_protocol(p.CONFIG, p.BACKEND_REQ)


def test_regions_are_added_only_where_acks_tell_that_the_back_has_them() -> None:
    p = ProtocolFeature
    assert back_protocol(p(0), p.CONFIGURE_MEM_SLOTS | p.REPLY_ACK) == (
        p.CONFIGURE_MEM_SLOTS | p.REPLY_ACK
    )
    assert not back_protocol(p(0), p.CONFIGURE_MEM_SLOTS)


@given(MASKS, MASKS)
def test_protocol_features_are_accepted_all_or_none(offered: int, bits: int) -> None:
    assert front_accepts_protocol(offered, bits & offered) == bits & offered
    if surplus := bits & ~offered:
        with pytest.raises(RequestRefused, match=f"{surplus:#x} were not offered"):
            front_accepts_protocol(offered, bits)


WITHHELD = {
    "EVENT_IDX": Withheld(1 << 29),
    "RING_PACKED": Withheld(1 << 34),
    "INFLIGHT_SHMFD": Withheld(0, ProtocolFeature.INFLIGHT_SHMFD),
    "0x4000": Withheld(0x4000),
    "0x8000000000000000": Withheld(1 << 63),
    "EVENT_IDX,MQ,0x6e44,INDIRECT_DESC": Withheld(
        1 << 28 | 1 << 29 | 0x6E44, ProtocolFeature.MQ
    ),
}


@pytest.mark.parametrize("text", WITHHELD)
def test_features_to_withhold_have_names_and_masks(text: str) -> None:
    assert Withheld.parse(text) == WITHHELD[text]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": no name of a feature, and no mask as 0x20000000"),
        ("EVENT_IDX,", ": no name of a feature"),
        ("event_idx", "event_idx: no name of a feature"),
        ("29", "29: no name of a feature"),
        ("0x", "0x: no name of a feature"),
        ("0x0", "0x0: no name of a feature"),
        ("0x-1", "0x-1: no name of a feature"),
        ("0x10000000000000000", "0x10000000000000000: no name of a feature"),
        ("MQ,VERSION_1", "VERSION_1: nothing works without VERSION_1"),
        ("0x140000000", "0x140000000: nothing works without PROTOCOL_FEATURES VERSION"),
    ],
)
def test_what_is_wrong_with_a_feature_to_withhold_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        Withheld.parse(text)


@given(MASKS, MASKS, MASKS)
def test_front_is_not_offered_what_is_withheld(
    back: int, bits: int, protocol: int
) -> None:
    """And all else as ever."""
    withheld = Withheld(bits, ProtocolFeature(protocol))
    back |= VERSION_1
    assert front_offer(back, withheld) == front_offer(back) & ~bits
    offer = front_protocol_offer(back, withheld)
    assert offer == front_protocol_offer(back) & ~protocol
