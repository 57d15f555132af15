# SPDX-License-Identifier: Apache-2.0
"""Payloads are packed as the specification says, and unpacked or refused."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.profiles import PROFILE
from tests.support.tables import each_row
from vhost_airlock.errors import ProtocolError
from vhost_airlock.vhost import wire
from vhost_airlock.vhost.wire import (
    U64,
    BackendRequest,
    Config,
    CryptoSession,
    DeviceState,
    Empty,
    Feature,
    Header,
    HeaderFlag,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    SharedObject,
    ShmemConfig,
    ShmemMap,
    VringAddr,
    VringArea,
    VringFd,
    VringState,
)

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))

region = st.builds(MemoryRegion, u64, u64, u64, u64)
PAYLOADS = {
    Header: st.builds(Header, u32, u32, u32),
    Empty: st.builds(Empty),
    U64: st.builds(U64, u64),
    VringFd: st.builds(VringFd, u8, st.booleans()),
    VringState: st.builds(VringState, u32, u32),
    VringAddr: st.builds(VringAddr, u32, u32, u64, u64, u64, u64),
    MemoryRegion: region,
    MemoryTable: st.builds(
        MemoryTable, st.lists(region, max_size=wire.MAX_FDS).map(tuple)
    ),
    Log: st.builds(Log, u64, u64),
    Iotlb: st.builds(Iotlb, u64, u64, u64, u8, u8),
    Config: st.builds(Config, u32, u32, u32, st.binary(max_size=Config.MAX_DATA)),
    Inflight: st.builds(Inflight, u64, u64, u16, u16),
    DeviceState: st.builds(DeviceState, u32, u32),
    CryptoSession: st.builds(CryptoSession, st.binary(min_size=8, max_size=4096)),
    SharedObject: st.builds(
        SharedObject, st.just(b"") | st.binary(min_size=16, max_size=16)
    ),
    VringArea: st.builds(VringArea, u64, u64, u64),
    ShmemMap: st.builds(ShmemMap, u8, u64, u64, u64, u64),
    ShmemConfig: st.builds(
        ShmemConfig, u32, st.lists(u64, min_size=256, max_size=256).map(tuple)
    ),
}

SIZES = [
    (Header(1, 1, 0), 12),
    (Empty(), 0),
    (U64(1), 8),
    (VringFd(1), 8),
    (VringState(1, 2), 8),
    (VringAddr(1, 0, 2, 3, 4, 5), 40),
    (MemoryRegion(1, 2, 3, 4), 40),
    (MemoryTable(()), 8),
    (MemoryTable((MemoryRegion(1, 2, 3, 4),) * 8), 264),
    (Log(1, 2), 16),
    (Iotlb(1, 2, 3, 3, 2), 32),
    (Config(0, 0), 12),
    (Config(0, 256, 0, bytes(256)), 268),
    (Inflight(1, 2, 3, 4), 24),
    (DeviceState(0, 0), 8),
    (SharedObject(bytes(16)), 16),
    (VringArea(1, 2, 3), 24),
    (ShmemMap(1, 2, 3, 4, 1), 40),
    (ShmemConfig(0, (0,) * 256), 2056),
]

FIELDS = [
    (Header(1, 5, 8), struct.pack("=III", 1, 5, 8)),
    (VringFd(3, nofd=True), struct.pack("=Q", 0x103)),
    (
        VringAddr(1, 0, desc=0x10, used=0x20, avail=0x30, log=0x40),
        struct.pack("=IIQQQQ", 1, 0, 0x10, 0x20, 0x30, 0x40),
    ),
    (
        MemoryRegion(guest_addr=1, size=2, user_addr=3, mmap_offset=4),
        struct.pack("=QQQQQ", 0, 1, 2, 3, 4),
    ),
    (
        MemoryTable((MemoryRegion(1, 2, 3, 4), MemoryRegion(5, 6, 7, 8))),
        struct.pack("=II8Q", 2, 0, 1, 2, 3, 4, 5, 6, 7, 8),
    ),
    (
        Iotlb(iova=1, size=2, user_addr=3, perm=2, type=1),
        struct.pack("=QQQBB6x", 1, 2, 3, 2, 1),
    ),
    (
        Config(offset=4, size=2, flags=1, data=b"ab"),
        struct.pack("=III2s", 4, 2, 1, b"ab"),
    ),
    (
        Inflight(mmap_size=1, mmap_offset=2, num_queues=3, queue_size=4),
        struct.pack("=QQHH4x", 1, 2, 3, 4),
    ),
    (
        ShmemMap(shmid=1, fd_offset=2, shm_offset=3, size=4, flags=1),
        struct.pack("=B7xQQQQ", 1, 2, 3, 4, 1),
    ),
]


def subclasses(cls):
    return {cls}.union(*map(subclasses, cls.__subclasses__()))


def test_every_payload_is_tested_here():
    named = {cls for cls in vars(wire).values() if isinstance(cls, type)}
    assert set(PAYLOADS) == (subclasses(Payload) & named) - {Payload, wire.Fixed}
    assert {type(payload) for payload, _ in SIZES} == set(PAYLOADS) - {CryptoSession}


@each_row(SIZES)
def test_size_is_the_specifications(payload, size):
    assert len(payload.pack()) == size


@each_row(FIELDS)
def test_fields_are_in_the_specifications_order(payload, data):
    assert payload.pack() == data


@each_row(PAYLOADS)
@settings(PROFILE, max_examples=PROFILE.max_examples // 4)
@given(data=st.data())
def test_what_was_packed_is_unpacked(kind, data):
    payload = data.draw(PAYLOADS[kind])
    packed = payload.pack()
    assert kind.MIN_SIZE <= len(packed) <= kind.MAX_SIZE <= wire.MAX_PAYLOAD
    assert kind.unpack(packed) == payload


@each_row(PAYLOADS)
@settings(PROFILE, max_examples=PROFILE.max_examples // 4)
@given(data=st.data())
def test_any_bytes_are_unpacked_or_refused(kind, data):
    size = data.draw(st.integers(0, kind.MAX_SIZE + 9))
    noise = data.draw(st.binary(min_size=size, max_size=size))
    try:
        payload = kind.unpack(noise)
    except ProtocolError:
        return
    assert isinstance(payload, kind)
    assert len(payload.pack()) == size


@each_row(PAYLOADS)
def test_a_size_out_of_range_is_refused(kind):
    for size in {kind.MIN_SIZE - 1, kind.MAX_SIZE + 1} - {-1}:
        with pytest.raises(ProtocolError, match=f"{size}"):
            kind.unpack(bytes(size))


@each_row([0, 2, 2**32 - 1])
def test_a_table_must_have_as_many_regions_as_it_says(count):
    data = struct.pack("=II4Q", count, 0, 1, 2, 3, 4)
    with pytest.raises(ProtocolError, match=f"{count} memory regions"):
        MemoryTable.unpack(data)


def test_unknown_bits_of_a_vring_fd_are_ignored():
    assert VringFd.unpack(struct.pack("=Q", 0xABCD_0000_0000_FE07)) == VringFd(7)


def test_a_uuid_is_whole_or_absent():
    with pytest.raises(ProtocolError, match="8"):
        SharedObject.unpack(bytes(8))


# In the order of their numbers; the specification's VHOST_USER_ and _F_ left out.
NAMES = """
    NONE GET_FEATURES SET_FEATURES SET_OWNER RESET_OWNER SET_MEM_TABLE SET_LOG_BASE
    SET_LOG_FD SET_VRING_NUM SET_VRING_ADDR SET_VRING_BASE GET_VRING_BASE
    SET_VRING_KICK SET_VRING_CALL SET_VRING_ERR GET_PROTOCOL_FEATURES
    SET_PROTOCOL_FEATURES GET_QUEUE_NUM SET_VRING_ENABLE SEND_RARP NET_SET_MTU
    SET_BACKEND_REQ_FD IOTLB_MSG SET_VRING_ENDIAN GET_CONFIG SET_CONFIG
    CREATE_CRYPTO_SESSION CLOSE_CRYPTO_SESSION POSTCOPY_ADVISE POSTCOPY_LISTEN
    POSTCOPY_END GET_INFLIGHT_FD SET_INFLIGHT_FD GPU_SET_SOCKET RESET_DEVICE VRING_KICK
    GET_MAX_MEM_SLOTS ADD_MEM_REG REM_MEM_REG SET_STATUS GET_STATUS GET_SHARED_OBJECT
    SET_DEVICE_STATE_FD CHECK_DEVICE_STATE GET_SHMEM_CONFIG
"""
BACKEND_NAMES = """
    IOTLB_MSG CONFIG_CHANGE_MSG VRING_HOST_NOTIFIER_MSG VRING_CALL VRING_ERR
    SHARED_OBJECT_ADD SHARED_OBJECT_REMOVE SHARED_OBJECT_LOOKUP SHMEM_MAP SHMEM_UNMAP
"""
FEATURE_NAMES = """
    MQ LOG_SHMFD RARP REPLY_ACK NET_MTU BACKEND_REQ CROSS_ENDIAN CRYPTO_SESSION
    PAGEFAULT CONFIG BACKEND_SEND_FD HOST_NOTIFIER INFLIGHT_SHMFD RESET_DEVICE
    INBAND_NOTIFICATIONS CONFIGURE_MEM_SLOTS STATUS XEN_MMAP SHARED_OBJECT DEVICE_STATE
    GET_VRING_BASE_INFLIGHT GPA_ADDRESSES SHMEM_MAP
"""


def test_requests_have_the_specifications_numbers():
    assert [(r.value, r.name) for r in Request] == list(enumerate(NAMES.split()))
    assert [(r.value, r.name) for r in BackendRequest] == list(
        enumerate(BACKEND_NAMES.split(), start=1)
    )


def test_protocol_features_are_masks_of_the_specifications_bits():
    assert {f.name: f.value for f in ProtocolFeature} == {
        name: 1 << bit for bit, name in enumerate(FEATURE_NAMES.split())
    }


@each_row(
    [
        (Feature.LOG_ALL, 26),
        (Feature.INDIRECT_DESC, 28),
        (Feature.EVENT_IDX, 29),
        (Feature.PROTOCOL_FEATURES, 30),
        (Feature.VERSION_1, 32),
        (Feature.ACCESS_PLATFORM, 33),
        (Feature.RING_PACKED, 34),
        (Feature.IN_ORDER, 35),
        (Feature.RING_RESET, 40),
    ],
)
def test_features_are_masks_of_the_specifications_bits(feature, bit):
    assert feature == 1 << bit


@each_row([*Feature, *ProtocolFeature, *HeaderFlag])
def test_a_bit_can_be_cleared_without_losing_any_other(feature):
    everything = 2**64 - 1
    assert everything & ~feature == everything - feature.value
    assert type(feature)(everything) & ~feature == everything - feature.value


def test_replies_have_the_flags_that_qemu_takes():
    assert wire.REPLY_FLAGS == 0x5
    assert HeaderFlag.NEED_REPLY.value == 0x8
