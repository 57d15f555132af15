# SPDX-License-Identifier: Apache-2.0
"""The device's state on its way: all of it comes, or it is known that not."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from vhost_airlock.errors import ProtocolError, RequestRefused
from vhost_airlock.proxy.transfer import Transfer
from vhost_airlock.vhost.fds import Fd, eventfd

Ends = tuple[Fd, Fd]
"""Where to read, and where to write."""


def pipe() -> Ends:
    out, into = os.pipe2(os.O_CLOEXEC)
    return Fd(out), Fd(into)


def socketpair() -> Ends:
    one, two = socket.socketpair()
    return Fd(one.detach()), Fd(two.detach())


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    before = held()
    yield
    assert held() == before


class Sides:
    """The two peers' ends of a transfer."""

    def __init__(self, make: Callable[[], Ends], limit: int = 1 << 20) -> None:
        source, self.into = make()
        self.out, sink = make()
        self.transfer = Transfer(source, sink, limit)

    def send(self, data: bytes) -> None:
        """In a thread, as nobody may be reading."""
        with self.into:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self.into.fileno(), rest) :]

    def received(self) -> bytes:
        parts = []
        while part := os.read(self.out.fileno(), 1 << 16):
            parts.append(part)
        return b"".join(parts)

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *exc: object) -> None:
        self.transfer.close()
        self.into.close()
        self.out.close()


@pytest.mark.parametrize("make", [pipe, socketpair])
@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 65537, 1 << 20])
def test_all_of_it_comes(make: Callable[[], Ends], size: int) -> None:
    with Sides(make) as sides:
        data = os.urandom(size)
        thread = threading.Thread(target=sides.send, args=[data])
        thread.start()
        assert sides.received() == data, "up to its end"
        thread.join()
        sides.transfer.finish(5)


@pytest.mark.parametrize("make", [pipe, socketpair])
def test_there_may_be_too_much_of_it(make: Callable[[], Ends]) -> None:
    with Sides(make, limit=1000) as sides:
        sides.send(bytes(1001))
        sides.received()
        with pytest.raises(RequestRefused, match="there is too much of it"):
            sides.transfer.finish(5)


@pytest.mark.parametrize("make", [pipe, socketpair])
def test_source_may_never_end(make: Callable[[], Ends]) -> None:
    with Sides(make) as sides:
        os.write(sides.into.fileno(), b"some")
        assert os.read(sides.out.fileno(), 100) == b"some"
        with pytest.raises(RequestRefused, match="it was cut off"):
            sides.transfer.finish(0.02)
        assert sides.received() == b""


@pytest.mark.parametrize("make", [pipe, socketpair])
def test_sink_may_never_be_read(make: Callable[[], Ends]) -> None:
    with Sides(make) as sides:
        thread = threading.Thread(target=send_into, args=[sides])
        thread.start()
        with pytest.raises(RequestRefused, match="it was cut off"):
            sides.transfer.finish(0.05)
        thread.join()


def send_into(sides: Sides) -> None:
    try:
        sides.send(bytes(1 << 20))
    except OSError:
        return  # nobody reads any more


@pytest.mark.parametrize("make", [pipe, socketpair])
def test_sink_may_be_closed(make: Callable[[], Ends]) -> None:
    with Sides(make) as sides:
        sides.out.close()
        sides.send(b"data")
        with pytest.raises(RequestRefused, match="Broken pipe"):
            sides.transfer.finish(5)


@pytest.mark.timing
@pytest.mark.parametrize("make", [pipe, socketpair])
def test_sink_that_is_made_blocking_holds_nobody_up(
    make: Callable[[], Ends],
) -> None:
    """Its flags belong to everybody who has it, as with all descriptors of the back."""
    source, into = make()
    out, sink = make()
    with Fd.dup(sink) as copy:
        moving = Transfer(source, sink)
        os.set_blocking(copy.fileno(), True)
        os.set_blocking(into.fileno(), False)
        deadline = time.monotonic() + 0.1
        while time.monotonic() < deadline:
            try:
                os.write(into.fileno(), bytes(1 << 16))
            except BlockingIOError:
                threading.Event().wait(0.01)
        os.read(out.fileno(), 8192)  # now there is room, but not for all
        began = time.monotonic()
        with pytest.raises(RequestRefused, match="it was cut off"):
            moving.finish(0.1)
        assert time.monotonic() - began < 2
    into.close()
    out.close()


def test_transfer_ends_when_it_is_closed() -> None:
    with Sides(pipe) as sides:
        sides.transfer.close()
        assert sides.received() == b""
        sides.transfer.close()


@pytest.mark.parametrize("bad", [0, 1])
def test_anything_else_is_no_place_for_it(bad: int) -> None:
    """A file of the back's could be endless, or change while it is read."""
    for make in (
        eventfd,
        lambda: Fd(os.memfd_create("state", os.MFD_CLOEXEC)),
        lambda: Fd(os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)),
    ):
        ends = [*pipe()]
        ends[bad].close()
        ends[bad] = make()
        with pytest.raises(ProtocolError, match="no pipe and no socket"):
            Transfer(ends[0], ends[1])
        assert all(end.closed for end in ends)
