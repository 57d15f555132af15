# SPDX-License-Identifier: Apache-2.0
"""A guest's attacks by requests: malformed, too many, and their notifications."""

from __future__ import annotations

from ..peers.disk import SECTOR, BlkType
from ..peers.ram import MIB
from ..vhost.fds import notify
from .catalogue import Catalogue, Verdict
from .guest_scene import GuestScene, N, W, until

REQUESTS = Catalogue[GuestScene](Verdict.RING_STOPPED)
add = REQUESTS.add

add(
    "request-without-header",
    "a block request with a status and nothing else",
    lambda s: s.chain((s.status, 1, W, 0)),
)
add(
    "request-without-status",
    "a block request with a header and nothing else",
    lambda s: s.chain((s.header, 16, 0, 0)),
)
add(
    "request-short-header",
    "a header of 8 bytes",
    lambda s: s.chain((s.header, 8, N, 9), (s.status, 1, W, 0)),
)
add(
    "request-split-header",
    "a good request with its header in 16 pieces",
    lambda s: s.chain(
        *[(s.header + i, 1, N, 9 + i) for i in range(16)],
        (s.data, SECTOR, W | N, 25),
        (s.status, 1, W, 0),
    ),
)
add(
    "request-odd-data",
    "three bytes of data",
    lambda s: s.request((s.data, 3, W, 0)),
)
add(
    "request-unknown",
    "a request of an unknown type",
    lambda s: s.request((s.data, SECTOR, W, 0), kind=0x7FFFFFFF),
)
add(
    "request-far-sector",
    "a read of sector 2^64 - 1",
    lambda s: s.request((s.data, SECTOR, W, 0), sector=(1 << 64) - 1),
)
add(
    "request-short-range",
    "WRITE_ZEROES with a range of 3 bytes",
    lambda s: s.request((s.data, 3, 0, 0), kind=BlkType.WRITE_ZEROES),
)


@REQUESTS.attack(worst=Verdict.CONNECTION_LOST)
def malformed_without_end(scene: GuestScene) -> None:
    """A whole ring of requests without a header, several times

    A back-end that never completes these may need a new connection afterwards, with or
    without an airlock.
    """
    for head in range(scene.ring.size):
        scene.ring.write_desc(head, scene.status, 1, W)
    for _ in range(4):
        scene.offer(*range(scene.ring.size))
        scene.settle()


@REQUESTS.attack()
def pool_exhausted(scene: GuestScene) -> None:
    """A whole ring of reads of 1 MiB"""
    size = min(MIB, scene.guest.capacity * SECTOR) or MIB
    data = scene.guest.ram.alloc(size)
    scene.ring.write_desc(0, scene.header, 16, N, 1)
    scene.ring.write_desc(1, data, size, W | N, 2)
    scene.ring.write_desc(2, scene.status, 1, W)
    for head in range(3, scene.ring.size):
        scene.ring.write_desc(head, scene.header, 16, N, 1)
    scene.offer(0, *range(3, scene.ring.size))
    scene.settle()


@REQUESTS.attack()
def kick_storm(scene: GuestScene) -> None:
    """Kicks of all rings without a pause"""
    queues = scene.guest.queues
    for _ in until(0.3):
        for queue in queues:
            for _ in range(50):
                notify(queue.kick_fd)


@REQUESTS.attack()
def used_ring_overwritten(scene: GuestScene) -> None:
    """The guest rewrites the device's part of the ring"""
    ring = scene.ring
    for value in (0, 0x1234, 0x7FFF, 0xFFFF):
        ring.used_flags = ring.used_idx = ring.avail_event = value
        for slot in range(ring.size):
            ring.set_used_entry(slot, 0xFFFFFFFF, 0xFFFFFFFF)
        scene.request((scene.data, SECTOR, W, 0))
        scene.settle(0.05)


@REQUESTS.attack()
def events_toggled(scene: GuestScene) -> None:
    """used_event and the flags change at random while requests complete"""
    ring = scene.ring

    def toggle() -> None:
        ring.used_event = (ring.used_event + 12345) & 0xFFFF
        ring.avail_flags ^= 0xFFFF

    with scene.racing(toggle) as rest:
        for _ in rest:
            scene.request((scene.data, SECTOR, W, 0))
            scene.settle(0.01)


@REQUESTS.attack(worst=Verdict.CONNECTION_LOST)
def leaves_with_requests(scene: GuestScene) -> None:
    """The VMM hangs up with a whole ring of requests in flight"""
    pool_exhausted(scene)
    scene.guest.disconnect()


@REQUESTS.attack(worst=Verdict.CONNECTION_LOST)
def leaves_with_malformed(scene: GuestScene) -> None:
    """The VMM hangs up after a request without a header"""
    scene.chain((scene.status, 1, W, 0))
    scene.settle()
    scene.guest.disconnect()
