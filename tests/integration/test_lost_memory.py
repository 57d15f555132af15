# SPDX-License-Identifier: Apache-2.0
"""The VMM cuts short a file with guest memory: rings end, and the process lives on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backs import ScriptedBack, readable
from tests.support.program import LINE, UNBOXED, Program, listening
from tests.support.sessions import serve
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue
from vhost_airlock.peers.ram import HIGH, MIB, GuestRam
from vhost_airlock.vhost.fds import notify
from vhost_airlock.vhost.wire import MemoryRegion

PLUGGED = HIGH << 4
BROKEN = (
    f"{LINE}: error: ring 0 is broken:"
    " a page of memory that the ring or a request is in can't be had"
)
UNFINISHED = f"{LINE}: warning: ring 0: stopped with 1 requests unfinished"


@pytest.fixture
def program(front: Path, back: ScriptedBack, tmp_path: Path) -> Iterator[Program]:
    with (
        listening(back, tmp_path / "back.sock") as where,
        Program(f"--socket-path={front}", f"--backend={where}", *UNBOXED) as program,
    ):
        yield program
        assert program.stop() == 0
        first, *others = program.errors().splitlines()
        assert first == BROKEN
        assert all(line.startswith(UNFINISHED) for line in others)


def cut(ram: GuestRam, region: MemoryRegion) -> None:
    """From here on, nobody may touch it: this process neither."""
    (fd,) = [fd for shared, fd in ram.shared() if shared == region]
    os.ftruncate(fd.fileno(), 0)


@pytest.mark.parametrize("kind", [BlkType.IN, BlkType.OUT])
def test_buffers_are_gone(
    program: Program, front: Path, back: ScriptedBack, kind: BlkType
) -> None:
    """With a request in flight, or with one that comes."""
    with BlkGuest(num_queues=2, queue_size=16, seg_max=14) as guest:
        guest.connect(program.connect(front))
        guest.start()
        region = guest.plug(PLUGGED, MIB)
        queue = guest.queues[0]
        queue.submit(kind, 0, [(guest.ram.alloc(4096, region=region), 4096)])
        if kind == BlkType.IN:
            queue.kick()
            chain = back.take()
            cut(guest.ram, region)
            back.complete(chain, b"d" * 4096)
        else:
            cut(guest.ram, region)
            queue.kick()
        assert readable(queue.err_fd)
        serve(back, guest, 1)
        # The ring is whole, and can be set up anew.
        guest.stop()
        guest.unplug(region)
        queue.reset()
        guest.queues[1].reset()
        guest.start()
        serve(back, guest, 0)
        serve(back, guest, 1)


def test_ring_is_gone(program: Program, front: Path, back: ScriptedBack) -> None:
    ram = GuestRam(low=MIB, high=MIB)
    lost = ram.plug(PLUGGED, 16 * MIB)
    with BlkGuest(ram=ram, num_queues=2, queue_size=16, seg_max=14) as guest:
        ram.plug(2 * PLUGGED, 64 * MIB)  # where whatever comes now is
        guest.queues[1].close()
        guest.queues[1] = GuestQueue(ram, 1, 16, 14)
        guest.connect(program.connect(front))
        guest.start()
        serve(back, guest, 0)
        cut(ram, lost)
        notify(guest.queues[0].kick_fd)
        assert readable(guest.queues[0].err_fd)
        for _ in range(20):
            serve(back, guest, 1)
        guest.disconnect()
