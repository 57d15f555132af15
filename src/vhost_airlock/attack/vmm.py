# SPDX-License-Identifier: Apache-2.0
"""A front-end's attacks by messages: malformed ones, and forbidden ones."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from array import array
from collections.abc import Callable, Sequence

from ..errors import DeadlineExceeded
from ..peers.disk import SECTOR
from ..peers.guest import BlkGuest
from ..vhost.fds import Fd, eventfd
from ..vhost.frontend import AnyFd
from ..vhost.wire import (
    U64,
    Config,
    Empty,
    Header,
    HeaderFlag,
    Inflight,
    Iotlb,
    MemoryRegion,
    Payload,
    Request,
    VringAddr,
    VringFd,
    VringState,
)
from .catalogue import Catalogue, Verdict
from .guest_scene import SETTLE, GuestScene, W, until

R = Request
ASKING = HeaderFlag.VERSION | HeaderFlag.NEED_REPLY
PAGE = 4096
FAR = 1 << 40
"""A guest and user address without memory."""


class VmmScene(GuestScene):
    """A connection whose rings run, and functions to send other messages on it."""

    def __init__(self, guest: BlkGuest) -> None:
        super().__init__(guest)
        self.channel = guest.front.channel

    def say(
        self,
        request: int,
        payload: Payload = Empty(),  # noqa: B008 (it can't change)
        fds: Sequence[AnyFd] = (),
        *,
        flags: int = ASKING,
    ) -> None:
        """Send a message, and take the answer if there is one."""
        self.channel.send(request, payload.pack(), fds, flags=flags)
        self.answer()

    def answer(self) -> None:
        with contextlib.suppress(DeadlineExceeded):
            self.channel.recv(time.monotonic() + SETTLE).close()

    def send(self, data: bytes) -> None:
        """Write bytes, as no message, without waiting."""
        with contextlib.suppress(OSError), self.socket() as sock:
            sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def socket(self) -> socket.socket:
        return socket.socket(fileno=os.dup(self.channel.fileno()))


MESSAGES = Catalogue[VmmScene](Verdict.CONNECTION_LOST)
add = MESSAGES.add

# The form of a message.

add("request-none", "request 0", lambda s: s.say(R.NONE))
add("request-unknown", "request 2^32 - 1", lambda s: s.say(0xFFFFFFFF))
add("flags-wrong-version", "version 2", lambda s: s.say(R.GET_FEATURES, flags=2))
add("flags-all", "all flags", lambda s: s.say(R.GET_FEATURES, flags=0xFFFFFFFF))
add("flags-reply", "a reply to nothing", lambda s: s.say(R.GET_FEATURES, flags=5))
add(
    "size-huge",
    "a header that announces 4 GiB",
    lambda s: s.send(Header(R.SET_FEATURES, 1, 0xFFFFFFFF).pack() + bytes(65536)),
)
add("size-wrong", "SET_FEATURES of 4096 bytes", lambda s: wrong_size(s, 4096))
add("size-short", "SET_FEATURES of 1 byte", lambda s: wrong_size(s, 1))
add("noise", "100 bytes of 0xff", lambda s: s.send(b"\xff" * 100))


def wrong_size(scene: VmmScene, size: int) -> None:
    scene.channel.send(R.SET_FEATURES, bytes(size), flags=ASKING)
    scene.answer()


@MESSAGES.attack()
def half_header(scene: VmmScene) -> None:
    """Half a header, then nothing, then the end"""
    scene.send(Header(R.GET_FEATURES, 1, 0).pack()[:6])
    scene.settle()
    scene.guest.disconnect()


@MESSAGES.attack()
def half_payload(scene: VmmScene) -> None:
    """Half a payload, then nothing, then the end"""
    scene.send(Header(R.SET_FEATURES, 1, 8).pack() + b"1234")
    scene.settle()
    scene.guest.disconnect()


@MESSAGES.attack()
def flood(scene: VmmScene) -> None:
    """Requests as fast as they go, whose replies are not read"""
    data = Header(R.GET_FEATURES, 1, 0).pack() * 500
    for _ in range(20):
        scene.send(data)
    scene.settle(0.05)
    scene.guest.disconnect()


# Descriptors.


def with_fds(
    count: int, request: Request, payload: Payload
) -> Callable[[VmmScene], None]:
    def deed(scene: VmmScene) -> None:
        with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
            scene.say(request, payload, [fd] * count)

    return deed


add("fds-unexpected", "8 with GET_FEATURES", with_fds(8, R.GET_FEATURES, Empty()))
add("fds-most", "253 with GET_FEATURES", with_fds(253, R.GET_FEATURES, Empty()))
add("fds-most-kick", "253 with SET_VRING_KICK", with_fds(253, R.SET_VRING_KICK, U64(0)))
add(
    "fds-missing",
    "none with ADD_MEM_REG",
    with_fds(0, R.ADD_MEM_REG, MemoryRegion(FAR, PAGE, FAR)),
)
add(
    "kick-no-eventfd", "a file as a kick eventfd", with_fds(1, R.SET_VRING_KICK, U64(0))
)
add(
    "call-no-eventfd", "a file as a call eventfd", with_fds(1, R.SET_VRING_CALL, U64(0))
)
add("kick-none", "a ring without a kick eventfd",
    lambda s: s.say(R.SET_VRING_KICK, VringFd(0, nofd=True)))  # fmt: skip


@MESSAGES.attack()
def fds_in_payload(scene: VmmScene) -> None:
    """Descriptors that come in the middle of a message"""
    with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd, scene.socket() as sock:
        sock.send(Header(R.SET_FEATURES, 9, 8).pack() + b"1234")
        numbers = array("i", [fd.fileno()] * 4)
        sock.sendmsg([b"5678"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)])
        scene.answer()


@MESSAGES.attack()
def kick_saturated(scene: VmmScene) -> None:
    """The kick eventfd's counter is full, and does block"""
    fd = scene.queue.kick_fd.fileno()
    scene.settle(0.05)
    os.set_blocking(fd, False)
    try:
        os.eventfd_write(fd, (1 << 64) - 2)
    except BlockingIOError:
        return  # the last kick is still there: as full as can be
    os.set_blocking(fd, True)
    scene.settle()
    os.set_blocking(fd, False)


@MESSAGES.attack()
def call_saturated(scene: VmmScene) -> None:
    """The call eventfd's counter is full, and does block, while requests complete"""
    fd = scene.queue.call_fd.fileno()
    try:
        os.eventfd_write(fd, (1 << 64) - 2)
    except BlockingIOError:
        os.read(fd, 8)
        os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)
    for _ in range(4):
        scene.request((scene.data, SECTOR, W, 0))
        for _ in until(0.1):
            if scene.ring.used_idx == scene.ring.avail_idx:
                break
    os.read(fd, 8)  # a process that waits to write goes on
    os.set_blocking(fd, False)


# Rings.

STATES = (R.SET_VRING_NUM, R.SET_VRING_BASE, R.SET_VRING_ENABLE, R.GET_VRING_BASE)


def far_ring(request: Request, index: int) -> Callable[[VmmScene], None]:
    return lambda scene: scene.say(request, VringState(index, 1))


for each in STATES:
    title = each.name.lower().replace("_", "-")
    add(f"{title}-256", f"{each.name} of ring 256", far_ring(each, 256))
    add(f"{title}-far", f"{each.name} of ring 2^32 - 1", far_ring(each, 0xFFFFFFFF))
add(
    "set-vring-addr-far",
    "SET_VRING_ADDR of ring 2^32 - 1",
    lambda s: s.say(R.SET_VRING_ADDR, VringAddr(0xFFFFFFFF, 0, 0, 0, 0)),
)
add(
    "set-vring-kick-far",
    "SET_VRING_KICK of ring 255",
    lambda s: with_fds(1, R.SET_VRING_KICK, U64(255))(s),
)
add(
    "size-while-running",
    "the size of a ring that runs",
    lambda s: s.say(R.SET_VRING_NUM, VringState(0, 32768)),
)
add(
    "address-while-running",
    "other addresses for a ring that runs",
    lambda s: s.say(R.SET_VRING_ADDR, VringAddr(0, 0, FAR, FAR, FAR)),
)


def restarted(
    num: int | None = None, base: int | None = None, **parts: int
) -> Callable[[VmmScene], None]:
    """Stop a ring, set it up with these values, and start it."""

    def deed(scene: VmmScene) -> None:
        queue = scene.queue
        scene.guest.front.get_vring_base(0)
        addr = queue.vring_addr(scene.guest.ram)
        values = {"desc": addr.desc, "used": addr.used, "avail": addr.avail, **parts}
        scene.say(R.SET_VRING_NUM, VringState(0, queue.size if num is None else num))
        scene.say(R.SET_VRING_BASE, VringState(0, queue.base if base is None else base))
        scene.say(R.SET_VRING_ADDR, VringAddr(0, 0, **values))
        scene.say(R.SET_VRING_KICK, VringFd(0), [queue.kick_fd])
        scene.say(R.SET_VRING_ENABLE, VringState(0, 1))
        scene.kick()
        scene.settle()

    return deed


add("ring-size-0", "a ring of no entries", restarted(0))
add("ring-size-3", "a ring of 3 entries", restarted(3))
add("ring-size-65536", "a ring of 65536 entries", restarted(65536))
add("ring-size-2^31", "a ring of 2^31 entries", restarted(1 << 31))
add("ring-base-far", "a base of 65535 for a new ring", restarted(base=0xFFFF))
add("ring-base-2^32-1", "a base of 2^32 - 1", restarted(base=0xFFFFFFFF))
add(
    "ring-nowhere", "a ring outside of memory", restarted(desc=FAR, used=FAR, avail=FAR)
)
add("ring-wraps", "a ring over the end of addresses", restarted(used=(1 << 64) - 16))
add("ring-unaligned", "a ring at an odd address", restarted(desc=FAR + 1, used=3))

# Memory.


def region(
    size: int, addr: int = FAR, user: int = FAR, offset: int = 0, file: int = PAGE
) -> Callable[[VmmScene], None]:
    """Add a region, of a file that has a certain size."""

    def deed(scene: VmmScene) -> None:
        with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
            os.ftruncate(fd.fileno(), file)
            scene.say(R.ADD_MEM_REG, MemoryRegion(addr, size, user, offset), [fd])

    return deed


add("memory-empty", "a region of no bytes", region(0))
add("memory-huge", "a region of 2^64 - 1 bytes", region((1 << 64) - 1))
add(
    "memory-wraps",
    "a region over the end of addresses",
    region(2 * PAGE, (1 << 64) - PAGE),
)
add("memory-beyond-file", "a region beyond its file", region(PAGE << 8))
add("memory-offset-wraps", "an offset near 2^64", region(PAGE, offset=(1 << 64) - PAGE))
add("memory-overlaps", "a region where one is", region(PAGE, addr=0))
add("memory-overlaps-user", "user addresses where some are",
    lambda s: region(PAGE, user=s.guest.ram.user_addr(0))(s))  # fmt: skip


@MESSAGES.attack()
def memory_many(scene: VmmScene) -> None:
    """More regions than there are slots"""
    with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), PAGE)
        for i, _ in zip(range(600), until(3.0), strict=False):
            at = FAR + i * 2 * PAGE
            scene.say(R.ADD_MEM_REG, MemoryRegion(at, PAGE, at), [fd])


@MESSAGES.attack()
def memory_no_file(scene: VmmScene) -> None:
    """An eventfd as a region's file"""
    with eventfd() as fd:
        scene.say(R.ADD_MEM_REG, MemoryRegion(FAR, PAGE, FAR), [fd])


@MESSAGES.attack()
def memory_count_lies(scene: VmmScene) -> None:
    """A memory table that claims 2^32 - 1 regions"""
    with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
        data = struct.pack("=I4x", 0xFFFFFFFF) + bytes(32)
        scene.channel.send(R.SET_MEM_TABLE, data, [fd], flags=ASKING)
        scene.answer()


@MESSAGES.attack()
def memory_gone(scene: VmmScene) -> None:
    """Memory is taken away under running rings"""
    for shared, _ in scene.guest.ram.shared():
        scene.say(R.REM_MEM_REG, shared)
    scene.offer(8)
    scene.settle()


# Other messages.

add("features-all", "all features are accepted",
    lambda s: s.say(R.SET_FEATURES, U64((1 << 64) - 1)))  # fmt: skip
add("protocol-features-all", "all protocol features are accepted",
    lambda s: s.say(R.SET_PROTOCOL_FEATURES, U64((1 << 64) - 1)))  # fmt: skip
add("config-huge", "4 GiB of the configuration space",
    lambda s: s.say(R.GET_CONFIG, Config(0, 0xFFFFFFFF)))  # fmt: skip
add("config-far", "configuration space near 2^32",
    lambda s: s.say(R.GET_CONFIG, Config(0xFFFFFFF0, 32, 0, bytes(32))))  # fmt: skip
add("config-written", "the configuration space is overwritten",
    lambda s: s.say(R.SET_CONFIG, Config(0, 256, 0, b"\xff" * 256)))  # fmt: skip
add("inflight-lies", "a table of requests in flight beyond its file",
    with_fds(1, R.SET_INFLIGHT_FD, Inflight(1 << 40, 0, 65535, 65535)))  # fmt: skip
add("inflight-many", "memory to track 65535 queues",
    lambda s: s.say(R.GET_INFLIGHT_FD, Inflight(0, 0, 65535, 65535)))  # fmt: skip
add("iotlb-unasked", "an IOTLB entry that answers no miss",
    lambda s: s.say(R.IOTLB_MSG, Iotlb(0, (1 << 64) - 1, 0, 3, 2)))  # fmt: skip
add("postcopy-unasked", "post-copy begins", lambda s: s.say(R.POSTCOPY_LISTEN))
add("owner-again", "SET_OWNER while rings run", lambda s: s.say(R.SET_OWNER))
add("reset-device", "RESET_DEVICE while rings run", lambda s: s.say(R.RESET_DEVICE))
add("stop-unstarted", "GET_VRING_BASE of a ring that never ran",
    lambda s: s.say(R.GET_VRING_BASE, VringState(200)))  # fmt: skip


@MESSAGES.attack()
def reset_owner(scene: VmmScene) -> None:
    """RESET_OWNER while rings run, which disables them"""
    scene.say(R.RESET_OWNER)
    for queue in scene.guest.queues:
        scene.guest.front.set_vring_enable(queue.index, True)


@MESSAGES.attack()
def restarts(scene: VmmScene) -> None:
    """All rings are stopped and started thirty times"""
    guest = scene.guest
    for _ in range(30):
        guest.stop()
        guest.start()


@MESSAGES.attack()
def settings_again(scene: VmmScene) -> None:
    """Four hundred eventfds for one ring"""
    with eventfd() as fd:
        for _ in range(200):
            scene.guest.front.set_vring_call(0, fd)
            scene.guest.front.set_vring_err(0, fd)


@MESSAGES.attack()
def hangs_up(scene: VmmScene) -> None:
    """The connection ends with everything running"""
    scene.guest.disconnect()
