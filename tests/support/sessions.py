# SPDX-License-Identifier: Apache-2.0
"""The course of sessions with a `ScriptedBack`, good ones and bad ones."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any, NoReturn

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import PATIENCE, ScriptedBack, readable, wait_until
from tests.support.profiles import SANITIZED
from vhost_airlock.errors import Disconnected
from vhost_airlock.peers.disk import BlkStatus, BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import GuestQueue, Io
from vhost_airlock.record import replaced
from vhost_airlock.vhost.fds import drain

TIMEOUT = 0.4
LATE = (20 if SANITIZED else 2) * TIMEOUT
"""The most that a front-end waits for one message: the time-out, and as much again for
a machine that is busy; more where a sanitizer makes everything slow."""
SLACK = 5.0
"""Seconds more than a deadline, for a machine that is busy."""
GONE = Disconnected("the test's back hangs up")


def small_guest(**options: Any) -> BlkGuest:
    return BlkGuest(num_queues=2, queue_size=16, seg_max=14, **options)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of log at the default level."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def wait_for_errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    wait_until(lambda: bool(errors(caplog)), "an error is logged")
    return errors(caplog)


def serve(back: ScriptedBack, guest: BlkGuest, index: int = 0) -> Io:
    """One request, well done."""
    queue = guest.queues[index]
    buffer = guest.ram.alloc(512)
    io = queue.submit(BlkType.IN, 0, [(buffer, 512)])
    queue.kick()
    back.complete(back.take(index), b"d" * 512, index=index)
    await_reaped(queue)
    assert (io.status, io.written) == (BlkStatus.OK, 513)
    assert guest.ram.view(buffer, 512) == b"d" * 512
    return io


def await_reaped(queue: GuestQueue) -> list[Io]:
    """Wait for completions of one queue, whatever the others do."""
    while True:
        drain(queue.call_fd)
        if queue.driver.arm():
            return queue.reap()
        assert readable(queue.call_fd), "no completion comes"


def live(airlock: Airlock, back: ScriptedBack, guest: BlkGuest) -> None:
    """All that a front-end does in its life."""
    guest.connect(airlock.channel())
    guest.start()
    serve(back, guest)
    serve(back, guest, 1)
    guest.stop()


def assert_serves_the_next(airlock: Airlock, back: ScriptedBack) -> None:
    """With no haste: the deadlines were for the one before."""
    airlock.join()
    back.join()
    back.instead.clear()
    airlock.config = replaced(airlock.config, timeout=PATIENCE, drain_timeout=PATIENCE)
    with small_guest() as guest:
        live(airlock, back, guest)


def lose(back: ScriptedBack) -> None:
    """The back's process ends."""
    assert back.channel is not None
    with socket.socket(fileno=os.dup(back.channel.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)


def hold(back: ScriptedBack) -> NoReturn:
    """Keep the connection open, and say nothing more, until it is closed.

    The back's own thread may have closed it by now.
    """
    assert back.channel is not None
    if back.channel.fileno() >= 0:
        readable(back.channel)
    raise GONE
