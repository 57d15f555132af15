# SPDX-License-Identifier: Apache-2.0
"""A front-end's attacks by the dirty log: its place, its file, and the time it comes.

They need LOG_SHMFD, and end with a device whose pages are not logged any more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ..peers.disk import SECTOR
from ..vhost.fds import Fd, eventfd
from ..vhost.wire import (
    U64,
    Feature,
    Log,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFlag,
)
from .catalogue import Catalogue, Verdict
from .guest_scene import STORM, W, until
from .vmm import VmmScene

R = Request
PAGE = 4096
END = 1 << 64
LARGE = PAGE << 8
"""Bytes of a log with bits for more than the guest's memory."""
MORE = 16
"""Bytes of a file behind the log."""

LOGS = Catalogue[VmmScene](Verdict.CONNECTION_LOST, also=(ProtocolFeature.LOG_SHMFD,))
add = LOGS.add


@contextmanager
def log_file(size: int) -> Iterator[Fd]:
    with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), size)
        yield fd


def use(scene: VmmScene, fd: Fd, size: int, offset: int = 0) -> None:
    scene.say(R.SET_LOG_BASE, Log(size, offset), [fd])


def log_all(scene: VmmScene) -> None:
    """Every store is to be logged: by the features, and the flag of each ring."""
    scene.say(R.SET_FEATURES, U64(scene.guest.features | Feature.LOG_ALL))
    for queue in scene.guest.queues:
        flag_ring(scene, queue.index)


def flag_ring(scene: VmmScene, index: int = 0) -> None:
    """Stores to the words of one ring are to be logged."""
    at = scene.guest.queues[index].vring_addr(scene.guest.ram)
    logged = VringAddr(index, VringFlag.LOG, at.desc, at.used, at.avail)
    scene.say(R.SET_VRING_ADDR, logged)


def begin_read(scene: VmmScene) -> None:
    """Let the device write a page."""
    scene.request((scene.data, SECTOR, W, 0))


def end_read(scene: VmmScene) -> bool:
    """Wait until it has done that, or has said that it can't. False: neither."""
    for left in until(STORM):
        if scene.ring.used_idx == scene.ring.avail_idx or scene.settle(left):
            return True
    return False


def read(scene: VmmScene) -> None:
    begin_read(scene)
    end_read(scene)


def log(size: int, offset: int = 0, file: int = LARGE) -> Callable[[VmmScene], None]:
    """A log there in a file of so many bytes, and a request that is logged."""

    def deed(scene: VmmScene) -> None:
        with log_file(file) as fd:
            use(scene, fd, size, offset)
            log_all(scene)
            read(scene)

    return deed


# Its place in the file.

add("log-beyond-file", "a log that ends behind its file", log(LARGE + PAGE))
add("log-behind-file", "a log that begins behind its file", log(PAGE, LARGE))
add("log-wraps", "a log of 2^64 - 1 bytes", log(END - 1, END - PAGE))
add("log-offset-wraps", "a log whose offset and size add up to 1 in 64 bits",
    log(PAGE + 1, END - PAGE))  # fmt: skip
add("log-of-no-file", "a log of an empty file", log(LARGE, file=0))
add("log-empty", "a log of no bytes", log(0))
add("log-huge", "a log of 2^60 bytes, which are all there", log(1 << 60, file=1 << 60))

# Logs that are unusual, but no more than that: all rings have to go on.

add("log-unaligned", "a log of odd size at an odd offset",
    log(LARGE - MORE + 1, 3), worst=Verdict.HELD)  # fmt: skip
add("log-short", "a log of one byte", log(1), worst=Verdict.HELD)


@LOGS.attack(worst=Verdict.HELD)
def log_late(scene: VmmScene) -> None:
    """Every store is to be logged, and no log is there yet"""
    log_all(scene)
    read(scene)
    with log_file(LARGE) as fd:
        use(scene, fd, LARGE)
    read(scene)


@LOGS.attack(worst=Verdict.HELD)
def log_swapped(scene: VmmScene) -> None:
    """Logs take turns under traffic, and each is cut when the next one is in use"""
    with ExitStack() as files:
        last = files.enter_context(log_file(LARGE))
        use(scene, last, LARGE)
        log_all(scene)
        for _ in until(STORM):
            begin_read(scene)
            following = files.enter_context(log_file(LARGE))
            use(scene, following, LARGE)
            os.ftruncate(last.fileno(), 0)
            last.close()
            last = following
            if not end_read(scene):
                return


# Its descriptor.


@LOGS.attack()
def log_no_file(scene: VmmScene) -> None:
    """A log without a descriptor"""
    scene.say(R.SET_LOG_BASE, Log(LARGE))


@LOGS.attack()
def log_two_files(scene: VmmScene) -> None:
    """A log with two descriptors"""
    with log_file(LARGE) as fd:
        scene.say(R.SET_LOG_BASE, Log(LARGE), [fd, fd])


@LOGS.attack()
def log_pipe(scene: VmmScene) -> None:
    """A pipe as the file of a log"""
    reader, writer = map(Fd, os.pipe())
    with reader, writer:
        use(scene, writer, PAGE)


@LOGS.attack()
def log_device(scene: VmmScene) -> None:
    """/dev/zero as the file of a log"""
    with Fd(os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)) as fd:
        use(scene, fd, LARGE)
        log_all(scene)
        read(scene)


@LOGS.attack()
def log_read_only(scene: VmmScene) -> None:
    """A log whose file may only be read"""
    with log_file(LARGE) as fd:
        path = f"/proc/self/fd/{fd.fileno()}"
        with Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as readable:
            use(scene, readable, LARGE)
        log_all(scene)
        read(scene)


@LOGS.attack()
def log_call_saturated(scene: VmmScene) -> None:
    """The eventfd that tells of marked pages is full, and does block"""
    with log_file(LARGE) as fd, eventfd() as told:
        use(scene, fd, LARGE)
        log_all(scene)
        scene.say(R.SET_LOG_FD, fds=[told])
        os.eventfd_write(told.fileno(), (1 << 64) - 2)
        os.set_blocking(told.fileno(), True)
        read(scene)
        os.read(told.fileno(), 8)  # a process that waits to write goes on


# A file that is cut short while the log is in use.


@LOGS.attack(worst=Verdict.RING_STOPPED)
def log_cut(scene: VmmScene) -> None:
    """The log of one ring's words is cut short, and its next stores find no page"""
    with log_file(LARGE) as fd:
        use(scene, fd, LARGE)
        flag_ring(scene)
        read(scene)
        os.ftruncate(fd.fileno(), 0)
        read(scene)


@LOGS.attack()
def log_cut_of_all(scene: VmmScene) -> None:
    """The log of every store is cut short before there is any"""
    with log_file(LARGE) as fd:
        use(scene, fd, LARGE)
        os.ftruncate(fd.fileno(), 0)
        log_all(scene)
        read(scene)
