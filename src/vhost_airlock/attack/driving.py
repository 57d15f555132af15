# SPDX-License-Identifier: Apache-2.0
"""A well-behaved guest, whose queues are driven and waited for one by one."""

from __future__ import annotations

import select
import time
from collections.abc import Collection

from ..errors import AirlockError, DeadlineExceeded
from ..peers.disk import SECTOR, BlkType
from ..peers.events import clear
from ..peers.guest import BlkGuest
from ..peers.guest_queue import GuestQueue, Io
from ..peers.ram import GuestRam
from ..peers.ring import RingFault
from ..vhost.channel import Channel
from ..vhost.wire import Feature, ProtocolFeature


def connected(
    path: str,
    *,
    queue_size: int,
    timeout: float,
    ram: GuestRam | None = None,
    without: Collection[Feature | ProtocolFeature] = (),
    also: Collection[ProtocolFeature] = (),
) -> BlkGuest:
    """A guest with two queues if the device has them, else one; not started."""
    failure: AirlockError | None = None
    for num_queues in (2, 1):
        guest = BlkGuest(
            ram=ram,
            num_queues=num_queues,
            queue_size=queue_size,
            seg_max=queue_size - 2,
            without=without,
            also=also,
            timeout=timeout,
        )
        try:
            guest.connect(Channel.connect(path, peer="program", timeout=timeout))
            return guest
        except AirlockError as error:
            guest.close()
            if ram is not None or "queues" not in str(error):
                raise
            failure = error
    assert failure is not None
    raise failure


def read(guest: BlkGuest, index: int, timeout: float) -> Io:
    """Read a sector by one queue, and wait for no other queue."""
    queue = guest.queues[index]
    buffer = guest.ram.alloc(SECTOR, SECTOR)
    io = queue.submit(BlkType.IN, 0, [(buffer, SECTOR)])
    await_done(guest, queue, io, timeout)
    return io


def await_done(guest: BlkGuest, queue: GuestQueue, io: Io, timeout: float) -> None:
    """Kick, and wait until a request has ended well."""
    queue.kick()
    poll = select.poll()
    for fd in (guest.front, queue.call_fd, queue.err_fd):
        poll.register(fd.fileno(), select.POLLIN)
    deadline = time.monotonic() + timeout
    while io.status is None:
        clear(queue.call_fd)
        if queue.driver.arm():
            queue.reap()
            continue
        ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1e3)}
        if guest.front.fileno() in ready:
            guest.front.unsolicited()
        if queue.err_fd.fileno() in ready:
            raise RingFault(f"ring {queue.index} is said to be broken")
        if not ready:
            raise DeadlineExceeded(f"ring {queue.index}: nothing in {timeout} s")
    io.check()


def set_up_anew(guest: BlkGuest, index: int = 0) -> None:
    """Stop all rings, and start them; one of them from nothing, as after a reset."""
    guest.stop()
    clear(guest.queues[index].err_fd)
    guest.queues[index].reset()
    guest.start()
