# SPDX-License-Identifier: Apache-2.0
"""A back-end's attacks by messages: wrong replies, and forbidden requests."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable

from ..errors import AirlockError, Disconnected
from ..peers.device import DeviceRing
from ..peers.ring import Chain
from ..peers.server import RING_FEATURES
from ..vhost.backend import Result
from ..vhost.fds import Fd
from ..vhost.wire import (
    REPLY_FLAGS,
    U64,
    BackendRequest,
    Config,
    Header,
    HeaderFlag,
    Iotlb,
    Payload,
    Request,
    ShmemMap,
    VringArea,
    VringState,
)
from .back_scene import BackScene
from .catalogue import Catalogue, Verdict

BACK_MESSAGES = Catalogue[BackScene](Verdict.CONNECTION_LOST)
R = Request
ALL = (1 << 64) - 1

Manner = Callable[[BackScene, Request], None]


def answering(
    name: str, what: str, request: Request, manner: Manner, *, hold: bool = True
) -> None:
    """Add an attack: whenever a request comes, this is the answer, and then silence."""

    def instead(scene: BackScene) -> Result:
        with contextlib.suppress(OSError):
            manner(scene, request)
        if hold:
            scene.hold()
        raise Disconnected("the hostile back-end hangs up")

    def arm(scene: BackScene) -> None:
        scene.instead[request] = instead

    BACK_MESSAGES.add(name, f"{what}, to {request.name}", arm)


def nothing(scene: BackScene, request: Request) -> None:
    pass


def header_and(
    size: int | None, data: bytes, flags: int = REPLY_FLAGS, other: int = 0
) -> Manner:
    """A header that announces `size` bytes, and this."""

    def manner(scene: BackScene, request: Request) -> None:
        announced = len(data) if size is None else size
        scene.send(Header(request ^ other, flags, announced).pack() + data)

    return manner


def without_end(scene: BackScene, request: Request) -> None:
    scene.send(Header(request, REPLY_FLAGS, 0xFFFFFFFF).pack())
    for _ in range(4096):
        scene.send(bytes(65536))


def byte_by_byte(scene: BackScene, request: Request) -> None:
    for byte in Header(request, REPLY_FLAGS, 8).pack() + bytes(8):
        scene.send(bytes([byte]))
        if scene.ended.wait(0.1):
            break


def with_fds(count: int) -> Manner:
    def manner(scene: BackScene, request: Request) -> None:
        with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
            scene.channel.send(request, bytes(8), [fd] * count, flags=REPLY_FLAGS)

    return manner


MANNERS: list[tuple[str, str, Manner]] = [
    ("withheld", "no reply", nothing),
    ("to-another", "the reply to another request", header_and(None, bytes(8), other=1)),
    (
        "no-flag",
        "a reply without its flag",
        header_and(None, bytes(8), HeaderFlag.VERSION),
    ),
    ("all-flags", "a reply with all flags", header_and(None, bytes(8), 0xFFFFFFFF)),
    ("short", "a reply of 3 bytes", header_and(None, b"abc")),
    ("long", "a reply of 4096 bytes", header_and(None, bytes(4096))),
    ("without-end", "a reply of 4 GiB", without_end),
    ("half", "half a reply", header_and(8, b"1234")),
    ("slow", "a reply byte by byte", byte_by_byte),
    ("fds", "a reply with 8 descriptors", with_fds(8)),
    ("fds-most", "a reply with 253 descriptors", with_fds(253)),
    ("noise", "noise", lambda scene, _: scene.send(b"\xff" * 100)),
]
for title, text, way in MANNERS:
    answering(f"reply-{title}", text, R.GET_CONFIG, way)
answering("first-reply-withheld", "no reply", R.GET_FEATURES, nothing)
answering("ack-withheld", "no ack", R.ADD_MEM_REG, nothing)
answering("ack-half", "half an ack", R.ADD_MEM_REG, header_and(8, b"1234"))
answering("ack-refuses", "an ack of 1", R.ADD_MEM_REG, header_and(None, U64(1).pack()))
answering("start-withheld", "no ack", R.SET_VRING_KICK, nothing)
answering("stop-withheld", "no reply", R.GET_VRING_BASE, nothing)
answering("stop-half", "half a reply", R.GET_VRING_BASE, header_and(8, b"1234"))
answering("stop-hangs-up", "the end", R.GET_VRING_BASE, nothing, hold=False)


def with_result(
    name: str,
    what: str,
    request: Request,
    *results: Payload,
    worst: Verdict | None = None,
) -> None:
    """Add an attack: these are the answers to a request, the last one for good."""

    def arm(scene: BackScene) -> None:
        left = list(results)
        scene.instead[request] = lambda _: left.pop(0) if left[1:] else left[0]

    BACK_MESSAGES.add(name, what, arm, worst=worst)


GOOD = U64(int(RING_FEATURES))
with_result("features-none", "no features", R.GET_FEATURES, U64(0))
with_result("features-all", "all features", R.GET_FEATURES, U64(ALL))
with_result("features-change", "features that vanish", R.GET_FEATURES, GOOD, U64(0))
with_result(
    "protocol-features-all", "all protocol features", R.GET_PROTOCOL_FEATURES, U64(ALL)
)
with_result("queues-none", "no queues", R.GET_QUEUE_NUM, U64(0))
with_result("queues-many", "2^64 - 1 queues", R.GET_QUEUE_NUM, U64(ALL))
with_result("slots-none", "no memory slots", R.GET_MAX_MEM_SLOTS, U64(0))
with_result("slots-many", "2^64 - 1 memory slots", R.GET_MAX_MEM_SLOTS, U64(ALL))
for title, reply in {
    "short": Config(0, 8, 0, b"1234"),
    "long": Config(0, 8, 0, bytes(4000)),
    "elsewhere": Config(4, 8, 0, bytes(8)),
    "huge": Config(0, 0xFFFFFFFF, 0, bytes(8)),
    "far": Config(0xFFFFFFFF, 8, 0, bytes(8)),
}.items():
    with_result(
        f"config-{title}", f"the configuration space, {title}", R.GET_CONFIG, reply
    )
for base in (0x7FFF, 0xFFFF, 0xFFFFFFFF):
    with_result(
        f"base-{base}",
        f"a ring stopped at {base}",
        R.GET_VRING_BASE,
        VringState(0, base),
    )
with_result("base-of-another", "the base of ring 7", R.GET_VRING_BASE, VringState(7, 0))


# Messages to no request, while requests are in flight.


def unasked(
    name: str, what: str, deed: Callable[[BackScene], None], seconds: float = 0.0
) -> None:
    """Add an attack at the first request in ring 0, done once or for some time."""

    def arm(scene: BackScene) -> None:
        def on_chain(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
            scene.behave()
            scene.complete(ring, chain)
            if seconds:
                scene.spawn(lambda: deed(scene), seconds)
                return
            with contextlib.suppress(AirlockError, OSError):
                deed(scene)

        scene.on_chain = on_chain

    BACK_MESSAGES.add(name, what, arm)


def shut(scene: BackScene) -> None:
    with socket.socket(fileno=os.dup(scene.channel.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)


unasked("hangs-up", "the connection ends with requests in flight", shut)
unasked("unasked-noise", "100 bytes of noise", lambda s: s.send(b"\xff" * 100))
unasked(
    "unasked-reply",
    "a reply to nothing",
    lambda s: s.send(Header(R.GET_FEATURES, REPLY_FLAGS, 8).pack() + bytes(8)),
)
unasked(
    "unasked-flood",
    "replies to nothing without a pause",
    lambda s: s.send(Header(R.GET_FEATURES, REPLY_FLAGS, 8).pack() + bytes(8)),
    0.3,
)
unasked(
    "unasked-fds",
    "a message with 253 descriptors",
    lambda s: with_fds(253)(s, R.GET_FEATURES),
)


# Requests of its own.


def asks(
    request: BackendRequest, payload: Payload | None = None, fds: int = 0
) -> Callable[[BackScene], None]:
    """Send a request on the channel for these, and wait for nothing."""

    def deed(scene: BackScene) -> None:
        if scene.asking is None:
            return
        with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
            data = b"" if payload is None else payload.pack()
            scene.asking.channel.send(request, data, [fd] * fds)

    return deed


B = BackendRequest
unasked(
    "config-storm",
    "changes of the configuration space without a pause",
    asks(B.CONFIG_CHANGE_MSG),
    0.3,
)
unasked(
    "asks-notifier",
    "memory to be mapped into the guest, for notifications",
    asks(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0), 1),
)
unasked(
    "asks-mapping",
    "memory to be mapped into the guest, for sharing",
    asks(B.SHMEM_MAP, ShmemMap(0, 0, 0, 1 << 40, 1), 1),
)
unasked(
    "asks-iotlb",
    "IOTLB misses without a pause",
    asks(B.IOTLB_MSG, Iotlb(0, 4096, 0, 3, 1)),
    0.3,
)
unasked("asks-unknown", "request 10 with descriptors", asks(B.SHMEM_UNMAP, None, 8))


def half_request(scene: BackScene) -> None:
    if scene.asking is not None:
        os.write(scene.asking.channel.fileno(), Header(2, 1, 0).pack()[:6])


def noise_of_its_own(scene: BackScene) -> None:
    if scene.asking is not None:
        os.write(scene.asking.channel.fileno(), b"\xff" * 64)


unasked("asks-half", "half a request", half_request)
unasked("asks-noise", "noise on the channel for its requests", noise_of_its_own)
