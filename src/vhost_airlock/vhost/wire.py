# SPDX-License-Identifier: Apache-2.0
"""The bytes on the wire: requests, flags, feature bits, the header and the payloads.

Declarations only, after the vhost-user specification that comes with QEMU 11.1. The
rule for each request is in `rules`; `channel` has the sockets.

All numbers are in the byte order of the machine.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

from ..errors import ProtocolError
from ..record import record, values

MAX_PAYLOAD = 4096
"""No payload is longer; most programs have this limit or a smaller one."""
MAX_FDS = 32
"""No message carries more descriptors: the most that rust-vmm sends or takes."""
MAX_VRINGS = 256
"""Descriptor messages name a vring in 8 bits."""
MAX_VRING_SIZE = 32768
"""The most entries of a vring, of whatever format (virtio 1.3, 2.7 and 2.8)."""


class Request(IntEnum):
    """The front-end's requests."""

    NONE = 0
    """No request. No front-end sends it, and some back-ends exit when they get it."""
    GET_FEATURES = 1
    """Which features do you offer? Also a barrier: earlier requests took effect."""
    SET_FEATURES = 2
    """These features are in use now."""
    SET_OWNER = 3
    """I'm your front-end: a session starts."""
    RESET_OWNER = 4
    """Deprecated: disable all rings."""
    SET_MEM_TABLE = 5
    """All of guest memory, with an fd for each region. Replaces the table before."""
    SET_LOG_BASE = 6
    """The bitmap in which to log the guest pages that you write."""
    SET_LOG_FD = 7
    """The eventfd to signal when a page was logged."""
    SET_VRING_NUM = 8
    """How many entries a vring has."""
    SET_VRING_ADDR = 9
    """Where a vring's three parts lie."""
    SET_VRING_BASE = 10
    """The index in the available ring at which to go on."""
    GET_VRING_BASE = 11
    """Stop a vring, and say at which index."""
    SET_VRING_KICK = 12
    """The eventfd on which the guest says: buffers were added. Starts the vring."""
    SET_VRING_CALL = 13
    """The eventfd on which to tell the guest: buffers were used."""
    SET_VRING_ERR = 14
    """The eventfd on which to say: this vring is broken."""
    GET_PROTOCOL_FEATURES = 15
    """Which protocol features do you offer?"""
    SET_PROTOCOL_FEATURES = 16
    """These protocol features are in use now."""
    GET_QUEUE_NUM = 17
    """How many queues do you have? (DPDK counts pairs.)"""
    SET_VRING_ENABLE = 18
    """Process a vring with all its effects, or without."""
    SEND_RARP = 19
    """Broadcast a RARP with this MAC address: the guest has moved."""
    NET_SET_MTU = 20
    """The MTU that the guest is told."""
    SET_BACKEND_REQ_FD = 21
    """The socket for requests of your own."""
    IOTLB_MSG = 22
    """An entry of the device IOTLB to update, or to forget."""
    SET_VRING_ENDIAN = 23
    """The byte order of a legacy vring."""
    GET_CONFIG = 24
    """A piece of the device's configuration space, please."""
    SET_CONFIG = 25
    """The guest wrote this into the configuration space."""
    CREATE_CRYPTO_SESSION = 26
    """Open a session for crypto operations."""
    CLOSE_CRYPTO_SESSION = 27
    """Close one."""
    POSTCOPY_ADVISE = 28
    """Post-copy migration may come: give me a userfaultfd."""
    POSTCOPY_LISTEN = 29
    """Post-copy has begun: register shared memory with it."""
    POSTCOPY_END = 30
    """Post-copy is over."""
    GET_INFLIGHT_FD = 31
    """Make the memory in which you track requests in flight."""
    SET_INFLIGHT_FD = 32
    """Track them in this memory, and first resubmit those noted there."""
    GPU_SET_SOCKET = 33
    """The socket of the vhost-user-gpu protocol."""
    RESET_DEVICE = 34
    """Disable all rings and be as new."""
    VRING_KICK = 35
    """Buffers were added (in-band, instead of the kick eventfd)."""
    GET_MAX_MEM_SLOTS = 36
    """How many memory regions can you take?"""
    ADD_MEM_REG = 37
    """One more region of guest memory, with its fd."""
    REM_MEM_REG = 38
    """One region less. After the ack the back-end touches it no more."""
    SET_STATUS = 39
    """The virtio device status, as the driver wrote it."""
    GET_STATUS = 40
    """The virtio device status, please."""
    GET_SHARED_OBJECT = 41
    """The dma-buf that you export under this UUID, please."""
    SET_DEVICE_STATE_FD = 42
    """Save your internal state to, or load it from, this fd."""
    CHECK_DEVICE_STATE = 43
    """Was all of the state transferred?"""
    GET_SHMEM_CONFIG = 44
    """Which shared memory regions does the device have?"""


class BackendRequest(IntEnum):
    """The back-end's requests, on the socket of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    """An address isn't in the device IOTLB, or access to it failed."""
    CONFIG_CHANGE_MSG = 2
    """The configuration space has changed."""
    VRING_HOST_NOTIFIER_MSG = 3
    """Memory to map into the guest in which it can notify the device by itself."""
    VRING_CALL = 4
    """Buffers were used (in-band, instead of the call eventfd)."""
    VRING_ERR = 5
    """A vring is broken (in-band, instead of the err eventfd)."""
    SHARED_OBJECT_ADD = 6
    """I export a dma-buf under this UUID."""
    SHARED_OBJECT_REMOVE = 7
    """Not any more."""
    SHARED_OBJECT_LOOKUP = 8
    """The dma-buf that another device exports under this UUID, please."""
    SHMEM_MAP = 9
    """Map this fd into one of the device's shared memory regions."""
    SHMEM_UNMAP = 10
    """Take a mapping away."""


def _invert(mask: int) -> int:
    """The `~` of flags that are named bits among others without a name.

    IntFlag's own forgets the bits above the highest named one, so that
    `features & ~Feature.EVENT_IDX` would clear those of the device type as well. Each
    class has to say this for itself, since enum doesn't let operators be inherited.
    """
    return ~int(mask)


class HeaderFlag(IntFlag):
    """The header's flags. The lowest two bits are the version, which is 1."""

    __invert__ = _invert  # type: ignore[assignment]

    VERSION = 1
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


REPLY_FLAGS = HeaderFlag.VERSION | HeaderFlag.REPLY
"""The flags of every reply: QEMU takes no others."""


class ProtocolFeature(IntFlag):
    """The features that GET_PROTOCOL_FEATURES offers, as bit masks."""

    __invert__ = _invert  # type: ignore[assignment]

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22
    """rust-vmm of 2026 still has it at bit 20, its place before it was merged."""


class Feature(IntFlag):
    """The features that GET_FEATURES offers, as bit masks, but for the device type's.

    Bits 0 to 23 and from 50 on belong to the device type, and 41 and 42 may.
    """

    __invert__ = _invert  # type: ignore[assignment]

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    """vhost's own: log what you write."""
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    """vhost-user's own: there are protocol features."""
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40
    ADMIN_VQ = 1 << 41
    SUSPEND = 1 << 43


class VringFlag(IntFlag):
    """The flags of SET_VRING_ADDR."""

    __invert__ = _invert  # type: ignore[assignment]

    LOG = 1
    """Log writes to the used ring."""


class IotlbType(IntEnum):
    """The types of an IOTLB message."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class StateDirection(IntEnum):
    """Which way SET_DEVICE_STATE_FD transfers."""

    SAVE = 0
    LOAD = 1


class Payload:
    """The bytes after the header. `Fixed` payloads have one size, others a range."""

    __slots__ = ()

    MIN_SIZE: ClassVar[int]
    MAX_SIZE: ClassVar[int]

    def pack(self) -> bytes:
        """Return the bytes on the wire."""
        raise NotImplementedError  # not reached: every kind has its own

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read the bytes on the wire, or raise ProtocolError."""
        raise NotImplementedError  # not reached: every kind has its own

    @classmethod
    def check_size(cls, size: int) -> None:
        """Raise ProtocolError unless a payload of this kind can have this size."""
        if not cls.MIN_SIZE <= size <= cls.MAX_SIZE:
            expected = f"{cls.MIN_SIZE}"
            if cls.MAX_SIZE > cls.MIN_SIZE:
                expected += f" to {cls.MAX_SIZE}"
            raise ProtocolError(f"{cls.__name__} has {size} bytes, not {expected}")


class Fixed(Payload):
    """A payload of fixed size: its fields in wire order, LAYOUT their struct format."""

    __slots__ = ()

    LAYOUT: ClassVar[struct.Struct]

    def __init_subclass__(cls) -> None:
        cls.MIN_SIZE = cls.MAX_SIZE = cls.LAYOUT.size

    def pack(self) -> bytes:
        return self.LAYOUT.pack(*values(self))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        return cls(*cls.LAYOUT.unpack(data))


@record
class Header(Fixed):
    """The beginning of each message."""

    LAYOUT: ClassVar = struct.Struct("=III")

    request: int
    flags: int
    size: int
    """The payload's bytes."""


@record
class Empty(Fixed):
    """No payload."""

    LAYOUT: ClassVar = struct.Struct("=")


@record
class U64(Fixed):
    """A number: features, a count, a status; as an ack, 0 is success."""

    LAYOUT: ClassVar = struct.Struct("=Q")

    value: int


@record
class VringFd(Payload):
    """A vring's index, and whether an fd comes with it: eventfd, or none to poll."""

    MIN_SIZE: ClassVar = 8
    MAX_SIZE: ClassVar = 8
    NOFD: ClassVar = 1 << 8

    index: int
    nofd: bool = False

    def pack(self) -> bytes:
        return U64(self.index | (self.NOFD if self.nofd else 0)).pack()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        value = U64.unpack(data).value
        return cls(value & 0xFF, bool(value & cls.NOFD))


@record
class VringState(Fixed):
    """A vring's index and one number about it."""

    LAYOUT: ClassVar = struct.Struct("=II")

    index: int
    num: int = 0


@record
class VringAddr(Fixed):
    """Where the three parts of a vring lie, in the sender's user addresses."""

    LAYOUT: ClassVar = struct.Struct("=IIQQQQ")

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int = 0
    """The guest address under which writes to the used ring are logged."""


@record
class MemoryRegion(Fixed):
    """A piece of guest memory, and where its mapping starts in the fd."""

    LAYOUT: ClassVar = struct.Struct("=8xQQQQ")

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int = 0


@record
class MemoryTable(Payload):
    """All of guest memory; the fds are in the order of the regions."""

    COUNT: ClassVar = struct.Struct("=I4x")
    REGION: ClassVar = struct.Struct("=QQQQ")
    MIN_SIZE: ClassVar = COUNT.size
    MAX_SIZE: ClassVar = COUNT.size + MAX_FDS * REGION.size

    regions: tuple[MemoryRegion, ...]

    def pack(self) -> bytes:
        return self.COUNT.pack(len(self.regions)) + b"".join(
            self.REGION.pack(*values(region)) for region in self.regions
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        (count,) = cls.COUNT.unpack_from(data)
        body = data[cls.COUNT.size :]
        if len(body) != count * cls.REGION.size:
            raise ProtocolError(f"{len(data)} bytes can't hold {count} memory regions")
        return cls(tuple(MemoryRegion(*v) for v in cls.REGION.iter_unpack(body)))


@record
class Log(Fixed):
    """Where the dirty bitmap lies in its fd."""

    LAYOUT: ClassVar = struct.Struct("=QQ")

    size: int
    offset: int = 0


@record
class Iotlb(Fixed):
    """An entry of the device IOTLB."""

    LAYOUT: ClassVar = struct.Struct("=QQQBB6x")

    iova: int
    size: int
    user_addr: int
    perm: int
    """Bit 0: read, bit 1: write."""
    type: int


@record
class Config(Payload):
    """A piece of the configuration space.

    Programs differ on whether a GET_CONFIG request, and a reply that says no, has room
    for the data. So `size` and the data's length can differ.
    """

    HEAD: ClassVar = struct.Struct("=III")
    MIN_SIZE: ClassVar = HEAD.size
    MAX_SIZE: ClassVar = MAX_PAYLOAD
    MAX_DATA: ClassVar = MAX_PAYLOAD - HEAD.size

    offset: int
    size: int
    flags: int = 0
    """1 is live migration in the specification; rust-vmm means that by 2."""
    data: bytes = b""

    def __repr__(self) -> str:
        return f"Config(offset={self.offset}, size={self.size}, flags={self.flags})"

    def pack(self) -> bytes:
        return self.HEAD.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        offset, size, flags = cls.HEAD.unpack_from(data)
        return cls(offset, size, flags, data[cls.HEAD.size :])


@record
class Inflight(Fixed):
    """The memory in which requests in flight are tracked."""

    LAYOUT: ClassVar = struct.Struct("=QQHH4x")

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


@record
class DeviceState(Fixed):
    """How the device's internal state shall be transferred."""

    LAYOUT: ClassVar = struct.Struct("=II")

    direction: int
    phase: int = 0
    """0: the vrings are stopped. There is no other phase."""


@record
class CryptoSession(Payload):
    """A crypto session, with its keys. No address is in it, so it is not decoded.

    Programs differ on its content, but for the number of the session, of 64 bits.
    """

    MIN_SIZE: ClassVar = 8
    MAX_SIZE: ClassVar = MAX_PAYLOAD

    data: bytes

    def __repr__(self) -> str:
        return "CryptoSession()"  # without its keys

    def pack(self) -> bytes:
        return self.data

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        return cls(data)


@record
class SharedObject(Payload):
    """The UUID of a dma-buf. QEMU 10.2 forgets to send it in GET_SHARED_OBJECT."""

    MIN_SIZE: ClassVar = 0
    MAX_SIZE: ClassVar = 16

    uuid: bytes = b""

    def pack(self) -> bytes:
        return self.uuid

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        if len(data) not in (0, 16):
            raise ProtocolError(f"a UUID has 16 bytes, not {len(data)}")
        return cls(data)


@record
class VringArea(Fixed):
    """Memory for notifications: the vring's index, and where it lies in its fd."""

    LAYOUT: ClassVar = struct.Struct("=QQQ")

    index: int
    """As in `VringFd`: bit 8 says that no fd comes with it."""
    size: int
    offset: int


@record
class ShmemMap(Fixed):
    """A mapping in one of the device's shared memory regions."""

    LAYOUT: ClassVar = struct.Struct("=B7xQQQQ")
    WRITABLE: ClassVar = 1

    shmid: int
    fd_offset: int
    shm_offset: int
    size: int
    flags: int = 0


@record
class ShmemConfig(Payload):
    """The size of each shared memory region; the index is its id, 0 means none."""

    LAYOUT: ClassVar = struct.Struct("=I4x256Q")
    MIN_SIZE: ClassVar = LAYOUT.size
    MAX_SIZE: ClassVar = LAYOUT.size

    count: int
    sizes: tuple[int, ...]

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.count, *self.sizes)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        cls.check_size(len(data))
        count, *sizes = cls.LAYOUT.unpack(data)
        return cls(count, tuple(sizes))
