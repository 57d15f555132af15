# SPDX-License-Identifier: Apache-2.0
"""Features bit by bit, and the life of a ring, every state with every event."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhost_airlock.errors import ProtocolError, RequestRefused, SessionError
from vhost_airlock.proxy.state import (
    TRANSITIONS,
    Event,
    Phase,
    Vring,
    back_features,
    back_protocol,
    front_accepts,
    front_accepts_protocol,
    front_offer,
    front_protocol_offer,
)
from vhost_airlock.vhost.wire import Feature, ProtocolFeature, VringAddr

# The policy, written down once more and as a table: for each bit, whether the front is
# offered it ("own": always, "back": when the back offers it, "mask": never) and when we
# accept it from the back ("ours": whenever it is offered, "front": when the front has
# accepted it as well, "mask": never).

DEVICE_BITS = [*range(24), *range(50, 64)]
FEATURES = {
    **dict.fromkeys(range(64), ("mask", "mask")),
    **dict.fromkeys(DEVICE_BITS, ("back", "front")),
    27: ("back", "front"),  # ANY_LAYOUT
    28: ("back", "ours"),  # INDIRECT_DESC
    29: ("own", "ours"),  # EVENT_IDX
    30: ("own", "ours"),  # PROTOCOL_FEATURES
    32: ("back", "front"),  # VERSION_1
}

PROTOCOL_FEATURES = {
    **dict.fromkeys(range(64), ("mask", "mask")),
    0: ("back", "ours"),  # MQ
    2: ("back", "front"),  # RARP
    3: ("own", "ours"),  # REPLY_ACK
    4: ("back", "front"),  # NET_MTU
    7: ("back", "front"),  # CRYPTO_SESSION
    9: ("back", "front"),  # CONFIG
    13: ("back", "front"),  # RESET_DEVICE
    15: ("own", "ours"),  # CONFIGURE_MEM_SLOTS
    16: ("back", "front"),  # STATUS
    19: ("back", "front"),  # DEVICE_STATE
}
"""Bit 5, BACKEND_REQ, has a rule of its own."""

VERSION_1 = 1 << 32
EVERYTHING = (1 << 64) - 1
MASKS = st.integers(0, EVERYTHING)


@pytest.mark.parametrize("bit", sorted(set(range(64)) - {32}))
def test_feature_is_offered_by_its_rule(bit: int) -> None:
    rule, _ = FEATURES[bit]
    with_it = front_offer(1 << bit | VERSION_1) >> bit & 1
    without = front_offer(VERSION_1) >> bit & 1
    assert (with_it, without) == {"own": (1, 1), "back": (1, 0), "mask": (0, 0)}[rule]


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("front", [0, EVERYTHING], ids=["no", "yes"])
def test_feature_is_accepted_from_the_back_by_its_rule(bit: int, front: int) -> None:
    rule = FEATURES[bit][1]
    wanted = rule == "ours" or (rule == "front" and front != 0)
    assert back_features(front, 1 << bit) == (1 << bit if wanted else 0)


@given(MASKS, MASKS)
def test_the_back_never_gets_a_bit_that_it_did_not_offer(front: int, back: int) -> None:
    assert back_features(front, back) & ~back == 0
    assert back_protocol(ProtocolFeature(front), back) & ~back == 0


def test_a_back_without_version_1_is_of_no_use() -> None:
    assert front_offer(VERSION_1) & VERSION_1
    with pytest.raises(SessionError, match=r"back: features 0x40000000 lack .*VERSION"):
        front_offer(Feature.PROTOCOL_FEATURES)


def test_the_front_accepts_what_was_offered_and_no_more() -> None:
    offered = front_offer(EVERYTHING)
    assert front_accepts(offered, offered) == offered
    assert front_accepts(offered, VERSION_1) == VERSION_1
    with pytest.raises(RequestRefused, match="SET_FEATURES: bits 0x400000000 "):
        front_accepts(offered, VERSION_1 | Feature.RING_PACKED)


def test_a_legacy_driver_is_refused() -> None:
    with pytest.raises(RequestRefused, match=r"SET_FEATURES: 0x20000000 lacks"):
        front_accepts(front_offer(EVERYTHING), Feature.EVENT_IDX)


@given(MASKS, MASKS)
def test_features_are_accepted_all_or_none(offered: int, bits: int) -> None:
    good = bits & offered | VERSION_1
    assert front_accepts(offered | VERSION_1, good) == good
    if bits & ~offered:
        with pytest.raises(RequestRefused, match="SET_FEATURES: "):
            front_accepts(offered, bits | VERSION_1)


@pytest.mark.parametrize("bit", sorted(set(range(64)) - {5}))
def test_protocol_feature_is_offered_by_its_rule(bit: int) -> None:
    rule, _ = PROTOCOL_FEATURES[bit]
    with_it = front_protocol_offer(1 << bit) >> bit & 1
    without = front_protocol_offer(0) >> bit & 1
    assert (with_it, without) == {"own": (1, 1), "back": (1, 0), "mask": (0, 0)}[rule]


@pytest.mark.parametrize("bit", sorted(set(range(64)) - {5}))
@pytest.mark.parametrize("front", [0, EVERYTHING], ids=["no", "yes"])
def test_protocol_feature_is_accepted_by_its_rule(bit: int, front: int) -> None:
    rule = PROTOCOL_FEATURES[bit][1]
    wanted = rule == "ours" or (rule == "front" and front != 0)
    accepted = back_protocol(ProtocolFeature(front), 1 << bit)
    assert accepted == (1 << bit if wanted else 0)


def test_a_socket_for_requests_of_the_back_is_for_changes_of_the_configuration() -> (
    None
):
    p = ProtocolFeature
    assert front_protocol_offer(p.BACKEND_REQ | p.CONFIG) & p.BACKEND_REQ
    assert not front_protocol_offer(p.CONFIG) & p.BACKEND_REQ
    assert not front_protocol_offer(p.BACKEND_REQ) & p.BACKEND_REQ
    assert back_protocol(p.BACKEND_REQ, p.BACKEND_REQ) == p.BACKEND_REQ
    assert not back_protocol(p.CONFIG, p.BACKEND_REQ)


@given(MASKS, MASKS)
def test_protocol_features_are_accepted_all_or_none(offered: int, bits: int) -> None:
    assert front_accepts_protocol(offered, bits & offered) == bits & offered
    if surplus := bits & ~offered:
        with pytest.raises(RequestRefused, match=f"{surplus:#x} were not offered"):
            front_accepts_protocol(offered, bits)


def test_every_phase_has_a_transition_for_every_event() -> None:
    assert set(TRANSITIONS) == set(itertools.product(Phase, Event))


@pytest.mark.parametrize(("phase", "event"), sorted(TRANSITIONS, key=str), ids=str)
def test_transition(phase: Phase, event: Event) -> None:
    """An event changes what it says, and nothing else."""
    vring = Vring(3, phase)
    vring.happen(event)
    started = {Event.START: True, Event.STOP: False}.get(event, phase.started)
    enabled = {Event.ENABLE: True, Event.DISABLE: False}.get(event, phase.enabled)
    assert (vring.phase.started, vring.phase.enabled) == (started, enabled)


def test_phases_differ_in_what_they_mean() -> None:
    assert len({(phase.started, phase.enabled) for phase in Phase}) == len(Phase) == 4


@pytest.mark.parametrize("num", [1, 2, 256, 32768])
def test_ring_size(num: int) -> None:
    vring = Vring(0)
    vring.set_num(num)
    assert vring.num == num


@pytest.mark.parametrize("num", [0, 3, 255, 32767, 65536, 1 << 31])
def test_impossible_ring_size_is_named(num: int) -> None:
    with pytest.raises(RequestRefused, match=f"SET_VRING_NUM: ring 7: {num} entries"):
        Vring(7).set_num(num)


def test_base_has_16_bits() -> None:
    vring = Vring(7)
    vring.set_base(0xFFFF)
    assert vring.base == 0xFFFF
    with pytest.raises(RequestRefused, match="SET_VRING_BASE: ring 7: base 0x10000"):
        vring.set_base(0x10000)
    assert vring.base == 0xFFFF


@pytest.mark.parametrize("phase", Phase)
def test_size_and_base_are_for_stopped_rings(phase: Phase) -> None:
    vring = Vring(7, phase)
    if not phase.started:
        vring.set_num(8)
        vring.set_base(1)
        return
    with pytest.raises(RequestRefused, match="SET_VRING_NUM: ring 7 is started"):
        vring.set_num(8)
    with pytest.raises(RequestRefused, match="SET_VRING_BASE: ring 7 is started"):
        vring.set_base(1)


ALIGNED = VringAddr(7, 0, desc=0x1000, used=0x3004, avail=0x2002)


def test_parts_of_a_ring() -> None:
    vring = Vring(7, num=4)
    vring.set_addr(ALIGNED)
    assert vring.parts() == ((0x1000, 64), (0x2002, 14), (0x3004, 38))


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        (VringAddr(7, 0, desc=0x1008, used=0x3004, avail=0x2002), "desc 0x1008.*16"),
        (VringAddr(7, 0, desc=0x1000, used=0x3002, avail=0x2002), "used 0x3002.*4"),
        (VringAddr(7, 0, desc=0x1000, used=0x3004, avail=0x2001), "avail 0x2001.*2"),
    ],
)
def test_misaligned_part_is_named(addr: VringAddr, text: str) -> None:
    vring = Vring(7, num=4)
    vring.set_addr(ALIGNED)
    with pytest.raises(RequestRefused, match=f"SET_VRING_ADDR: ring 7: {text}"):
        vring.set_addr(addr)
    assert vring.addr == ALIGNED


def test_a_ring_without_size_or_address_is_not_configured() -> None:
    vring = Vring(7)
    assert not vring.configured
    vring.set_num(8)
    assert not vring.configured
    with pytest.raises(ProtocolError, match="ring 7 has no address"):
        vring.parts()
    vring.set_addr(ALIGNED)
    assert vring.configured
    assert not Vring(7, addr=ALIGNED).configured
