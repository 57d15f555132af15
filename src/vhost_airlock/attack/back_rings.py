# SPDX-License-Identifier: Apache-2.0
"""A back-end's attacks by isolated memory, its rings and its eventfds."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import random
import socket
import time
from collections.abc import Callable

from ..errors import Disconnected
from ..peers.device import DeviceRing
from ..peers.disk import SECTOR
from ..peers.ring import INDEX_MASK, Chain
from ..vhost.fds import Fd, notify
from .back_scene import BackScene
from .catalogue import Catalogue, Verdict

BACK_RINGS = Catalogue[BackScene](Verdict.RING_STOPPED)
"""Attacks that leave requests unfinished may cost the connection: if later requests
did end, no base at which the ring stops can tell that."""
FULL = (1 << 64) - 2
LAST_WORDS = 0.3
"""Seconds for which a back-end goes on when it has hung up."""
NOISE = 1 << 20
"""Bytes at the beginning of each piece of memory, where most of it is in use."""
_PUNCH_HOLE = 0x02 | 0x01

Deed = Callable[[BackScene, DeviceRing, Chain], None]


def with_chain(
    worst: Verdict | None = None, again: bool = False
) -> Callable[[Deed], Deed]:
    """Add an attack by the first chain of ring 0; with `again`, by every one."""

    def add(deed: Deed) -> Deed:
        def arm(scene: BackScene) -> None:
            def on_chain(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
                if not again:
                    scene.behave()
                deed(scene, ring, chain)

            scene.on_chain = on_chain

        arm.__name__, arm.__doc__ = deed.__name__, deed.__doc__
        BACK_RINGS.attack(worst)(arm)
        return deed

    return add


# The rings.


@with_chain()
def rewrites_descriptors(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Noise in the descriptors and the avail ring before a completion"""
    raw = ring.ring
    raw.desc[:] = os.urandom(len(raw.desc))
    raw.avail_flags = 0xFFFF
    for slot in range(raw.size):
        raw.set_avail_entry(slot, 0xFFFF)
    scene.complete(ring, chain)


@with_chain()
def rewrites_avail_index(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """The avail index is set back and forth before a completion"""
    raw = ring.ring
    index = raw.avail_idx
    for value in (0, 0x8000, 0xFFFF):
        raw.avail_idx = value
    raw.avail_idx = index
    scene.complete(ring, chain)


@with_chain()
def rewrites_buffers(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Noise in buffers that the device may only read"""
    for addr, length, writable in chain.buffers:
        if not writable:
            for piece in scene.memory.views(addr, length):
                piece[:] = os.urandom(len(piece))
    scene.complete(ring, chain)


@with_chain()
def used_id_beyond(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Completions of heads beyond the ring"""
    for head in (ring.ring.size, 0xFFFF, 0x10000, 0x80000000, 0xFFFFFFFF):
        ring.complete(head, SECTOR)
    scene.publish(ring)
    scene.complete(ring, chain)


@with_chain()
def used_id_unknown(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """A completion of a chain that is not in flight"""
    ring.complete(ring.ring.size - 1, SECTOR)
    scene.publish(ring)
    scene.complete(ring, chain)


@with_chain()
def used_id_replayed(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """One completion, eight times"""
    for _ in range(8):
        scene.complete(ring, chain)


@with_chain()
def used_id_without_end(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Completions of nothing, without an end"""

    def step() -> None:
        ring.complete(ring.ring.size - 1, SECTOR)
        scene.publish(ring)

    scene.spawn(step)


@with_chain(Verdict.CONNECTION_LOST)
def used_index_jumps(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """The used index is half of 65536 ahead"""
    ring.ring.used_idx = (ring.ring.used_idx + 0x8000) & INDEX_MASK
    scene.call()


@with_chain(Verdict.CONNECTION_LOST)
def used_index_back(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """The used index goes back by one"""
    ring.ring.used_idx = (ring.ring.used_idx - 1) & INDEX_MASK
    scene.call()


@with_chain()
def used_length_huge(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """A used length of 2^32 - 1"""
    scene.complete(ring, chain, 0xFFFFFFFF)


@with_chain()
def used_length_zero(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """A used length of 0"""
    scene.complete(ring, chain, 0)


@with_chain()
def event_words(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """avail_event and the flags are set to anything while requests complete"""
    scene.complete(ring, chain)
    raw = ring.ring
    chance = random.Random(1)

    def step() -> None:
        raw.avail_event = chance.randrange(1 << 16)
        raw.used_flags = chance.randrange(1 << 16)

    scene.spawn(step)


@with_chain(Verdict.CONNECTION_LOST, again=True)
def never_completes(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Requests are taken and never completed"""


@with_chain(Verdict.CONNECTION_LOST, again=True)
def completes_when_stopped(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Requests are completed when the ring is about to stop"""

    def late(scene: BackScene) -> None:
        scene.complete(ring, chain)

    scene.on_stop = late


# The memory.


@with_chain()
def writes_after_completion(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Buffers are written to long after their completion"""
    room = scene.room(chain)
    scene.complete(ring, chain)

    def step() -> None:
        for piece in room:
            piece[:] = b"\xee" * len(piece)

    scene.spawn(step)


@with_chain(Verdict.CONNECTION_LOST, again=True)
def writes_after_stop(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Buffers and used ring are written to after the ring stopped"""

    def late(scene: BackScene) -> None:
        scene.spawn(lambda: scribble(scene))

    scene.on_stop = late


@with_chain(Verdict.CONNECTION_LOST)
def scribbles(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Noise all over isolated memory while it is used"""
    scene.spawn(lambda: scribble(scene))


def scribble(scene: BackScene) -> None:
    for fd in scene.fds:
        at = random.randrange(1 << 18) & ~7
        os.pwrite(fd.fileno(), os.urandom(random.choice([2, 8, 512])), at)


def with_memory(deed: Callable[[Fd], None]) -> Deed:
    """Do a deed to each memory file, which may fail, and complete the chain."""

    def on_chain(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
        for fd in scene.fds:
            with contextlib.suppress(OSError):
                deed(fd)
        for other in filter(None, (scene.vring(index).ring for index in (0, 1))):
            other.arm()  # or the back-end would have lost its own kicks
        scene.complete(ring, chain)

    on_chain.__name__, on_chain.__doc__ = deed.__name__, deed.__doc__
    return with_chain(Verdict.CONNECTION_LOST)(on_chain)


@with_memory
def truncates_memory(fd: Fd) -> None:
    """The files of isolated memory are cut short"""
    os.ftruncate(fd.fileno(), 0)


@with_memory
def grows_memory(fd: Fd) -> None:
    """The files of isolated memory grow"""
    os.ftruncate(fd.fileno(), os.fstat(fd.fileno()).st_size * 2)


@with_memory
def seals_memory(fd: Fd) -> None:
    """The files of isolated memory are sealed against writing"""
    for seal in (fcntl.F_SEAL_WRITE, 0x10):  # 0x10: F_SEAL_FUTURE_WRITE
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seal)


@with_memory
def punches_holes(fd: Fd) -> None:
    """Holes in the files of isolated memory"""
    size = os.fstat(fd.fileno()).st_size
    ctypes.CDLL(None).fallocate(
        fd.fileno(), _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(size)
    )


@with_chain(Verdict.CONNECTION_LOST, again=True)
def goes_on_after_it_hung_up(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """It hangs up, and goes on to write to all memory and eventfds"""
    with contextlib.ExitStack() as stack:
        maps = []
        for fd in scene.fds:
            maps.append(mmap.mmap(fd.fileno(), 0))
            stack.callback(maps[-1].close)
        with socket.socket(fileno=os.dup(scene.channel.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        end = time.monotonic() + LAST_WORDS
        while time.monotonic() < end:
            for memory in maps:
                size = min(len(memory), NOISE)
                memory[:size] = os.urandom(size)
            scene.room(chain)[-1][-1] = 0
            ring.complete(chain.head, SECTOR + 1)
            ring.publish()
            for vring in (scene.vring(0), scene.vring(1)):
                for signal in (vring.call, vring.err, vring.kick):
                    if signal is not None:
                        notify(signal)
    raise Disconnected("the hostile back-end has hung up")


# Eventfds.


@with_chain()
def call_storm(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """Calls without a pause"""
    scene.complete(ring, chain)

    def step() -> None:
        scene.call(0)
        scene.call(1)

    scene.spawn(step)


@with_chain(Verdict.CONNECTION_LOST)
def call_saturated(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """The call eventfd's counter is full, and does block"""
    call = scene.vring().call
    if call is not None:
        saturate(call)
        scene.fds.append(call)
        scene.vring().call = None  # or the next call would block ourselves
    scene.room(chain)[-1][-1] = 0
    ring.complete(chain.head, SECTOR + 1)
    ring.publish()


@with_chain()
def err_storm(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """The err eventfd is signalled without a pause"""
    err = scene.vring().err
    if err is not None:
        copy = Fd.dup(err)
        scene.fds.append(copy)
        scene.spawn(lambda: notify(copy))


@with_chain(Verdict.CONNECTION_LOST, again=True)
def kick_saturated(scene: BackScene, ring: DeviceRing, chain: Chain) -> None:
    """The kick eventfd's counter is full, and does block"""
    kick = scene.vring().kick
    if kick is not None:
        scene.ignore_kicks()
        saturate(kick)


def saturate(fd: Fd) -> None:
    os.set_blocking(fd.fileno(), False)
    with contextlib.suppress(BlockingIOError):
        os.read(fd.fileno(), 8)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd.fileno(), FULL)
    os.set_blocking(fd.fileno(), True)
