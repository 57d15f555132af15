# SPDX-License-Identifier: Apache-2.0
"""A guest's attacks by the words in its ring: forbidden chains and indices."""

from __future__ import annotations

from ..peers.disk import SECTOR, BlkType
from ..peers.ram import HIGH, MIB
from ..peers.ring import SplitLayout
from ..vhost.wire import Feature
from .catalogue import Catalogue, Verdict
from .guest_scene import GuestScene, N, T, W

CHAINS = Catalogue[GuestScene](Verdict.RING_STOPPED)
add = CHAINS.add

# The avail ring.

add("index-jump", "avail index one beyond the ring", lambda s: s.jump(s.ring.size + 1))
add("index-far-jump", "avail index half of 65536 ahead", lambda s: s.jump(0x8000))
add("index-back", "avail index goes back by one", lambda s: s.jump(-1))
add("head-beyond", "head equal to the ring's size", lambda s: s.offer(s.ring.size))
add("head-far-beyond", "head 65535", lambda s: s.offer(0xFFFF))


@CHAINS.attack()
def head_twice(scene: GuestScene) -> None:
    """One head offered twice at once"""
    scene.request((scene.data, SECTOR, W, 0))
    scene.offer(8)


@CHAINS.attack()
def head_everywhere(scene: GuestScene) -> None:
    """One head in every entry of the avail ring"""
    scene.set_header(BlkType.IN)
    scene.write(
        (scene.header, 16, N, 9),
        (scene.data, SECTOR, W | N, 10),
        (scene.status, 1, W, 0),
    )
    scene.offer(*[8] * scene.ring.size)


# Links.

add(
    "next-beyond",
    "next equal to the ring's size",
    lambda s: s.chain((s.page, 16, N, s.ring.size)),
)
add("next-far-beyond", "next 65535", lambda s: s.chain((s.page, 16, N, 0xFFFF)))
add("loop-of-one", "descriptor linked to itself", lambda s: s.chain((s.page, 16, N, 8)))
add(
    "loop-of-two",
    "two descriptors linked to each other",
    lambda s: s.chain((s.page, 16, N, 9), (s.data, 16, N, 8)),
)
add(
    "loop-of-writable",
    "a loop of descriptors to write to",
    lambda s: s.chain((s.page, 16, N, 9), (s.data, 512, W | N, 9)),
)

# Addresses and lengths.

add(
    "zero-length",
    "a good request with a descriptor of no bytes in it",
    lambda s: s.request((s.data, 0, W, 0), (s.data, SECTOR, W, 0)),
)
add(
    "zero-length-readable",
    "a write of nothing, with a descriptor of no bytes",
    lambda s: s.request((s.data, 0, 0, 0), kind=BlkType.OUT),
)
add("zero-length-only", "no bytes at all", lambda s: s.chain((s.page, 0, 0, 0)))
add(
    "zero-length-many",
    "a chain of all descriptors, without a byte",
    lambda s: s.chain(
        *[(s.data, 0, W | N, i + 1) for i in range(s.ring.size - 1)],
        (s.data, 0, W, 0),
        first=0,
    ),
)
add(
    "address-in-hole",
    "a buffer between the regions",
    lambda s: s.request((s.hole, SECTOR, W, 0)),
)
add(
    "address-over-edge",
    "a buffer that begins in memory and ends in a hole",
    lambda s: s.request((s.hole - 256, SECTOR, W, 0)),
)
add(
    "address-of-nothing",
    "a buffer where no memory can be",
    lambda s: s.request((1 << 60, SECTOR, W, 0)),
)
add(
    "address-wraps",
    "a buffer over the end of the address space",
    lambda s: s.request(((1 << 64) - 256, SECTOR, W, 0)),
)
add(
    "header-in-hole",
    "a request's header between the regions",
    lambda s: s.chain((s.hole, 16, N, 9), (s.status, 1, W, 0)),
)
add(
    "status-in-hole",
    "a request's status between the regions",
    lambda s: s.chain((s.header, 16, N, 9), (s.hole, 1, W, 0)),
)
add(
    "length-2^31",
    "a buffer of 2^31 bytes",
    lambda s: s.request((s.data, 1 << 31, W, 0)),
)
add(
    "length-2^32-1",
    "a buffer of 2^32 - 1 bytes",
    lambda s: s.request((0, 0xFFFFFFFF, W, 0)),
)
add(
    "length-sum",
    "buffers of more than 2^32 bytes together",
    lambda s: s.request(*[(HIGH, 128 * MIB, W, 0)] * 40),
)
add(
    "readable-after-writable",
    "a descriptor to read from after one to write to",
    lambda s: s.chain(
        (s.header, 16, N, 9), (s.data, SECTOR, W | N, 10), (s.data, 16, N, 11),
        (s.status, 1, W, 0),
    ),
)  # fmt: skip

# Indirect tables.

add("table-empty", "a table of no bytes", lambda s: s.indirect(length=0))
add("table-short", "a table of 15 bytes", lambda s: s.indirect(length=15))
add(
    "table-odd",
    "a table of one descriptor and a half",
    lambda s: s.indirect((s.page, 16, 0, 0), length=24),
)
add("table-huge", "a table of 4 GiB", lambda s: s.indirect(length=0xFFFFFFF0))
add(
    "table-large",
    "a table of 65536 descriptors, all one chain",
    lambda s: large_table(s, 65536),
)
add(
    "table-in-hole",
    "a table that ends in a hole",
    lambda s: s.chain((s.hole - 16, 32, T, 0)),
)
add(
    "table-and-next",
    "an indirect descriptor that has a next one",
    lambda s: s.chain((s.table, 16, T | N, 9), (s.status, 1, W, 0)),
)
add(
    "table-to-write",
    "an indirect descriptor that is to be written to",
    lambda s: s.chain((s.table, 32, T | W, 0)),
)
add(
    "table-in-table",
    "a table that holds an indirect descriptor",
    lambda s: s.indirect((s.table, 16, T, 0)),
)
add(
    "table-of-itself",
    "a table that holds itself, at the end of a request",
    lambda s: s.indirect((s.header, 16, N, 1), (s.table, 48, T | N, 2),
                         (s.status, 1, W, 0)),
)  # fmt: skip
add(
    "table-loop",
    "a loop in a table",
    lambda s: s.indirect((s.header, 16, N, 1), (s.data, 16, N, 0)),
)
add(
    "table-next-beyond",
    "a next beyond the table",
    lambda s: s.indirect((s.header, 16, N, 1), (s.data, 16, N, 2)),
)
add(
    "table-next-far-beyond",
    "next 65535 in a table",
    lambda s: s.indirect((s.header, 16, N, 0xFFFF)),
)
add(
    "table-zero-length",
    "a table with a descriptor of no bytes",
    lambda s: s.indirect((s.header, 16, N, 1), (s.data, 0, W | N, 2),
                         (s.status, 1, W, 0)),
)  # fmt: skip
add(
    "table-not-negotiated",
    "a table, though there is no INDIRECT_DESC",
    lambda s: s.indirect((s.header, 16, N, 1), (s.status, 1, W, 0)),
    without=(Feature.INDIRECT_DESC,),
)


def large_table(scene: GuestScene, count: int) -> None:
    ram = scene.guest.ram
    size = 16 * count
    addr = ram.alloc(size)
    rows = b"".join(
        scene.data.to_bytes(8, "little")
        + (1).to_bytes(4, "little")
        + (W | N).to_bytes(2, "little")
        + ((i + 1) & 0xFFFF).to_bytes(2, "little")
        for i in range(count)
    )
    ram.view(addr, size)[:] = rows
    scene.chain((addr, size, T, 0))


# Buffers in forbidden places.


@CHAINS.attack()
def buffer_over_ring(scene: GuestScene) -> None:
    """A disk's data read over the descriptors and the avail ring"""
    size = SplitLayout(scene.ring.size).used // SECTOR * SECTOR
    scene.request((scene.queue.ring_addr, size, W, 0))


@CHAINS.attack()
def buffer_over_used(scene: GuestScene) -> None:
    """A disk's data read over the used ring"""
    used = SplitLayout(scene.ring.size, scene.queue.ring_addr).used
    scene.request((used & ~3, SECTOR, W, 0))


@CHAINS.attack()
def status_over_used(scene: GuestScene) -> None:
    """The status of each request is in the used index"""
    used = SplitLayout(scene.ring.size, scene.queue.ring_addr).used
    for _ in range(4):
        scene.chain((scene.header, 16, N, 9), (used + 2, 1, W, 0))
        scene.settle()


@CHAINS.attack()
def buffers_overlap(scene: GuestScene) -> None:
    """One page as header, data and status"""
    scene.chain(
        (scene.page, 16, N, 9), (scene.page, SECTOR, W | N, 10), (scene.page, 1, W, 0)
    )
