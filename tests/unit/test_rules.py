# SPDX-License-Identifier: Apache-2.0
"""The rules: complete, as the specification says, and applied to the last byte."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.profiles import PROFILE
from tests.support.tables import each_row
from vhost_airlock.errors import ProtocolError, RequestRefused
from vhost_airlock.record import fields
from vhost_airlock.vhost.rules import (
    BACKEND_RULES,
    FAILURE,
    RULES,
    Ack,
    check,
    check_reply,
    examine,
    payload_limit,
    permit,
)
from vhost_airlock.vhost.wire import (
    MAX_FDS,
    MAX_PAYLOAD,
    U64,
    BackendRequest,
    Config,
    CryptoSession,
    DeviceState,
    Empty,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SharedObject,
    StateDirection,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)

EVERY_RULE = [*RULES.items(), *BACKEND_RULES.items()]
R = Request
every_rule = each_row(EVERY_RULE)


def refused(request, payload=Empty(), fds=0):  # noqa: B008
    """The text with which a request is found to break its rule."""
    with pytest.raises(ProtocolError, match=request.name) as caught:
        check(request, RULES[request], payload.pack(), fds)
    return str(caught.value)


def accepted(request, payload=Empty(), fds=0):  # noqa: B008
    rule = RULES[request]
    examine(request, rule, payload)
    return check(request, rule, payload.pack(), fds) == payload


def unfit(request, payload, fds=0):
    """The text with which a request of good form is refused."""
    rule = RULES[request]
    checked = check(request, rule, payload.pack(), fds)
    with pytest.raises(RequestRefused, match=f"^{request.name}: ") as caught:
        examine(request, rule, checked)
    return str(caught.value).removeprefix(f"{request.name}: ")


def test_every_request_has_a_rule():
    assert list(RULES) == list(Request)
    assert list(BACKEND_RULES) == list(BackendRequest)


@every_rule
def test_acks_are_numbers(request_, rule):
    if rule.ack in (Ack.ASKED, Ack.ALWAYS):
        assert rule.reply is U64
        assert rule.refusal == FAILURE


@every_rule
def test_no_other_number_of_fds_passes(request_, rule):
    if rule.fds is None:
        return  # the payload says how many: see below
    assert max(rule.fds) <= 1
    data = bytes(rule.payload.MIN_SIZE)
    for count in range(254):
        if count in rule.fds:
            assert isinstance(check(request_, rule, data, count), rule.payload)
        else:
            with pytest.raises(ProtocolError, match=f"{count} fds"):
                check(request_, rule, data, count)


def test_payloads_that_say_how_many_fds_come_are_those_tested_here():
    says = [request for request, rule in EVERY_RULE if rule.fds is None]
    assert says == [R.SET_MEM_TABLE, *EVENTS]


EVENTS = [R.SET_VRING_KICK, R.SET_VRING_CALL, R.SET_VRING_ERR]


@each_row(EVENTS)
def test_an_event_has_an_fd_or_says_that_it_has_none(request_):
    assert accepted(request_, VringFd(5), fds=1)
    assert accepted(request_, VringFd(5, nofd=True), fds=0)
    refused(request_, VringFd(5), fds=0)
    refused(request_, VringFd(5, nofd=True), fds=1)
    refused(request_, VringFd(5), fds=2)


def test_a_memory_table_has_an_fd_for_each_region():
    for count in (0, 1, 8, MAX_FDS):
        table = MemoryTable((MemoryRegion(1, 2, 3, 4),) * count)
        assert accepted(R.SET_MEM_TABLE, table, fds=count)
        refused(R.SET_MEM_TABLE, table, fds=count + 1)
    refused(R.SET_MEM_TABLE, MemoryTable((MemoryRegion(1, 2, 3, 4),)), fds=0)


@each_row([R.SET_VRING_NUM, R.SET_VRING_BASE, R.GET_VRING_BASE, R.VRING_KICK])
def test_there_are_256_vrings(request_):
    assert accepted(request_, VringState(255, 7))
    assert unfit(request_, VringState(256, 7)) == "index is 256, not 0 to 255"


def test_there_are_256_vrings_with_addresses():
    assert accepted(R.SET_VRING_ADDR, VringAddr(255, 0, 1, 2, 3))
    far = VringAddr(256, 0, 1, 2, 3)
    assert unfit(R.SET_VRING_ADDR, far) == "index is 256, not 0 to 255"


@each_row([R.SET_VRING_ENABLE, R.SET_VRING_ENDIAN])
def test_a_switch_is_on_or_off(request_):
    assert accepted(request_, VringState(0, 0))
    assert accepted(request_, VringState(255, 1))
    assert unfit(request_, VringState(0, 2)) == "num is 2, not 0 to 1"
    assert unfit(request_, VringState(256, 1)) == "index is 256, not 0 to 255"


INDEXED = [
    (r, rule) for r, rule in EVERY_RULE if rule.payload in (VringState, VringAddr)
]


@each_row(INDEXED)
def test_no_bit_of_an_index_is_lost(request_, rule):
    """F2: on every message that has one; the low bits alone would be a good index."""
    rest = [0, 0, 0, 0] if rule.payload is VringAddr else []
    examine(request_, rule, rule.payload(1, *rest))
    for high in (1 << 8, 1 << 15, 1 << 16, 1 << 31, 0xFFFFFF00):
        payload = check(request_, rule, rule.payload(high + 1, *rest).pack(), 0)
        with pytest.raises(RequestRefused, match=f"index is {high + 1},"):
            examine(request_, rule, payload)


@every_rule
def test_every_message_with_an_index_is_tested(request_, rule):
    """In those with a descriptor it has 8 bits; the notifier's is always refused."""
    if "index" in fields(rule.payload):
        assert (request_, rule) in INDEXED or rule.payload in (VringFd, VringArea)


def test_a_status_has_8_bits():
    assert accepted(R.SET_STATUS, U64(255))
    assert unfit(R.SET_STATUS, U64(256)) == "status is 256, not 0 to 255"


@each_row([R.GET_CONFIG, R.SET_CONFIG])
def test_a_configuration_space_has_4_kib(request_):
    assert accepted(request_, Config(0, 256, 0, bytes(256)))
    assert accepted(request_, Config(4088, 8, 0, bytes(8)))
    beyond = Config(4089, 8, 0, bytes(8))
    assert unfit(request_, beyond) == "offset is 4089, not 0 to 4088"
    assert "offset is 4294967295," in unfit(request_, Config(2**32 - 1, 8, 0, bytes(8)))
    refused(request_, Config(0, 8, 0, bytes(7)))
    refused(request_, Config(0, 8, 0, bytes(9)))


@each_row([R.GET_CONFIG, R.SET_CONFIG])
def test_a_piece_of_the_configuration_space_is_not_empty(request_):
    """qemu-storage-daemon ends the session over it."""
    assert unfit(request_, Config(0, 0)) == "size is 0, not 1 to 4084"
    assert accepted(request_, Config(0, 1, 0, b"x"))


@each_row([R.GET_CONFIG, R.SET_CONFIG])
def test_the_configuration_space_is_for_writing_or_for_migration(request_):
    assert accepted(request_, Config(0, 1, 1, b"x"))
    for flags in (2, 3, 2**32 - 1):
        wrong = unfit(request_, Config(0, 1, flags, b"x"))
        assert wrong == f"flags is {flags}, not 0 to 1"


def test_only_a_question_needs_no_data():
    assert accepted(R.GET_CONFIG, Config(0, 8))
    assert unfit(R.GET_CONFIG, Config(0, Config.MAX_DATA + 1)).startswith("size is ")
    assert unfit(R.GET_CONFIG, Config(0, 2**32 - 1)).startswith("size is ")
    refused(R.SET_CONFIG, Config(0, 8))


def test_a_network_device_has_an_mtu_of_the_specification():
    for mtu in (68, 1500, 65535):
        assert accepted(R.NET_SET_MTU, U64(mtu))
    for mtu in (0, 67, 65536, 2**64 - 1):
        assert unfit(R.NET_SET_MTU, U64(mtu)) == f"MTU is {mtu}, not 68 to 65535"


def test_a_mac_has_6_bytes():
    assert accepted(R.SEND_RARP, U64.unpack(b"\x52\x54\0\x12\x34\xff\0\0"))
    for end in (b"\1\0", b"\0\1"):
        mac = U64.unpack(b"\x52\x54\0\x12\x34\x56" + end)
        text = f"MAC 52:54:00:12:34:56:{end.hex(':')} has more than 6 bytes"
        assert unfit(R.SEND_RARP, mac) == text


def test_a_crypto_session_has_a_number_that_is_no_error():
    assert accepted(R.CLOSE_CRYPTO_SESSION, U64(2**63 - 1))
    assert unfit(R.CLOSE_CRYPTO_SESSION, U64(2**64 - 1)).startswith("session id is 184")
    assert accepted(R.CREATE_CRYPTO_SESSION, CryptoSession(bytes(8)))


def test_a_state_is_saved_or_loaded_while_the_device_is_stopped():
    for direction in StateDirection:
        assert accepted(R.SET_DEVICE_STATE_FD, DeviceState(direction), fds=1)
    wrong = unfit(R.SET_DEVICE_STATE_FD, DeviceState(2), fds=1)
    assert wrong == "direction is 2, not 0 to 1"
    wrong = unfit(R.SET_DEVICE_STATE_FD, DeviceState(0, 1), fds=1)
    assert wrong == "phase is 1, not 0 to 0"


@every_rule
def test_a_wrong_size_is_refused(request_, rule):
    for size in {rule.payload.MIN_SIZE - 1, rule.payload.MAX_SIZE + 1} - {-1}:
        with pytest.raises(ProtocolError, match=f"{request_.name}.* {size}"):
            check(request_, rule, bytes(size), 0)


@every_rule
@settings(PROFILE, max_examples=PROFILE.max_examples // 4)
@given(data=st.data())
def test_any_message_passes_or_is_refused(request_, rule, data):
    size = data.draw(st.integers(0, rule.payload.MAX_SIZE + 9))
    noise = data.draw(st.binary(min_size=size, max_size=size))
    for judge, kind in ((check, rule.payload), (check_reply, Payload)):
        with contextlib.suppress(ProtocolError):
            payload = judge(request_, rule, noise, data.draw(st.integers(0, 253)))
            assert isinstance(payload, kind)


@every_rule
def test_limits_let_every_payload_through_and_no_more(request_, rule):
    rules = BACKEND_RULES if isinstance(request_, BackendRequest) else RULES
    assert payload_limit(rules)(int(request_)) == rule.payload.MAX_SIZE <= MAX_PAYLOAD


def test_an_unknown_request_may_have_any_payload():
    assert payload_limit(RULES)(45) == MAX_PAYLOAD
    assert payload_limit(BACKEND_RULES)(0) == MAX_PAYLOAD


NEEDS: dict[ProtocolFeature, list[Request | BackendRequest]] = {
    ProtocolFeature.MQ: [R.GET_QUEUE_NUM],
    ProtocolFeature.LOG_SHMFD: [R.SET_LOG_BASE],
    ProtocolFeature.RARP: [R.SEND_RARP],
    ProtocolFeature.NET_MTU: [R.NET_SET_MTU],
    ProtocolFeature.BACKEND_REQ: [R.SET_BACKEND_REQ_FD],
    ProtocolFeature.CROSS_ENDIAN: [R.SET_VRING_ENDIAN],
    ProtocolFeature.CRYPTO_SESSION: [R.CREATE_CRYPTO_SESSION, R.CLOSE_CRYPTO_SESSION],
    ProtocolFeature.PAGEFAULT: [R.POSTCOPY_ADVISE, R.POSTCOPY_LISTEN, R.POSTCOPY_END],
    ProtocolFeature.CONFIG: [
        R.GET_CONFIG,
        R.SET_CONFIG,
        BackendRequest.CONFIG_CHANGE_MSG,
    ],
    ProtocolFeature.INFLIGHT_SHMFD: [R.GET_INFLIGHT_FD, R.SET_INFLIGHT_FD],
    ProtocolFeature.RESET_DEVICE: [R.RESET_DEVICE],
    ProtocolFeature.INBAND_NOTIFICATIONS: [
        R.VRING_KICK,
        BackendRequest.VRING_CALL,
        BackendRequest.VRING_ERR,
    ],
    ProtocolFeature.CONFIGURE_MEM_SLOTS: [
        R.GET_MAX_MEM_SLOTS,
        R.ADD_MEM_REG,
        R.REM_MEM_REG,
    ],
    ProtocolFeature.STATUS: [R.SET_STATUS, R.GET_STATUS],
    ProtocolFeature.SHARED_OBJECT: [
        R.GET_SHARED_OBJECT,
        BackendRequest.SHARED_OBJECT_ADD,
        BackendRequest.SHARED_OBJECT_REMOVE,
        BackendRequest.SHARED_OBJECT_LOOKUP,
    ],
    ProtocolFeature.DEVICE_STATE: [R.SET_DEVICE_STATE_FD, R.CHECK_DEVICE_STATE],
    ProtocolFeature.HOST_NOTIFIER: [BackendRequest.VRING_HOST_NOTIFIER_MSG],
    ProtocolFeature.SHMEM_MAP: [
        R.GET_SHMEM_CONFIG,
        BackendRequest.SHMEM_MAP,
        BackendRequest.SHMEM_UNMAP,
    ],
}


@every_rule
def test_features_are_needed(request_, rule):
    # By identity: a back-end's request would equal the front-end's of its number.
    needed = [
        f for f, requests in NEEDS.items() if any(r is request_ for r in requests)
    ]
    everything = ProtocolFeature((1 << 23) - 1)
    permit(request_, rule, everything)
    for feature in needed:
        with pytest.raises(
            RequestRefused, match=f"{request_.name} needs .*{feature.name}"
        ):
            permit(request_, rule, everything & ~feature)
    if not needed:
        permit(request_, rule, ProtocolFeature(0))


@every_rule
def test_a_refusal_is_a_reply_that_is_understood_as_one(request_, rule):
    if rule.refusal is None:
        return
    reply = check_reply(request_, rule, rule.refusal.pack(), 0)
    assert rule.refuses(reply, 0)


@each_row([1, 2, 2**64 - 1])
def test_any_number_but_0_is_no(value):
    for request in (R.SET_FEATURES, R.IOTLB_MSG, R.CHECK_DEVICE_STATE):
        reply = check_reply(request, RULES[request], U64(value).pack(), 0)
        assert RULES[request].refuses(reply, 0)


@every_rule
def test_success_is_not_taken_for_a_refusal(request_, rule):
    if rule.ack in (Ack.ASKED, Ack.ALWAYS):
        assert not rule.refuses(U64(0), 0)
    assert not RULES[R.GET_FEATURES].refuses(U64(1), 0)
    assert not RULES[R.GET_SHARED_OBJECT].refuses(SharedObject(), 1)
    assert not RULES[R.GET_INFLIGHT_FD].refuses(Inflight(4096, 0, 1, 128), 1)


@every_rule
def test_no_other_number_of_fds_may_come_back(request_, rule):
    assert max(rule.reply_fds) <= 1
    data = bytes(rule.reply.MIN_SIZE)
    for count in range(254):
        if count in rule.reply_fds:
            check_reply(request_, rule, data, count)
        else:
            with pytest.raises(ProtocolError, match=f"{count} fds"):
                check_reply(request_, rule, data, count)


@every_rule
def test_a_reply_of_wrong_size_is_refused(request_, rule):
    if rule.ack is Ack.ECHO:
        return
    fds = rule.reply_fds.start
    for size in {rule.reply.MIN_SIZE - 1, rule.reply.MAX_SIZE + 1} - {-1}:
        if rule.refusal is not None and size == len(rule.refusal.pack()):
            continue
        with pytest.raises(ProtocolError, match=f"{request_.name}.* {size}"):
            check_reply(request_, rule, bytes(size), fds)


@each_row([0, 8, 16])
def test_nobody_looks_at_the_echo_of_a_log(size):
    assert RULES[R.SET_LOG_BASE].reply is Log
    reply = check_reply(R.SET_LOG_BASE, RULES[R.SET_LOG_BASE], b"\xff" * size, 0)
    assert reply == Empty()
