# SPDX-License-Identifier: Apache-2.0
"""Messages of a fuzzer's choice, with descriptors, on sockets that never block."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import struct
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from fuzz.source import Source
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, HasFileno, close_all, eventfd, number_of
from vhost_airlock.vhost.rules import AnyRules, Rule
from vhost_airlock.vhost.wire import (
    U64,
    Config,
    Empty,
    Header,
    HeaderFlag,
    MemoryRegion,
    MemoryTable,
    VringAddr,
    VringFd,
    VringState,
)

PAGE = 4096
FLAGS = (1, 9, 5, 13, 0, 3, 0xFFFFFFFF)
SMALL = (0, 1, 2, 3, 4, 8, 16, 255, 256, 0x8000, 0x10000, 0xFFFFFFFF)
ADDRESSES = (0, 0x1000, 0x1800, 0x1C00, 0x2000, 0x10000, 1 << 46, (1 << 64) - 0x1000)
FEATURES = (0x170000000, 0x140000000, 0x100000000, 0x40000000, 0, (1 << 64) - 1)


@cache
def memory() -> Fd:
    """The guest's memory, 16 pages."""
    fd = Fd(os.memfd_create("fuzz-guest", os.MFD_CLOEXEC))
    os.ftruncate(fd.fileno(), 16 * PAGE)
    atexit.register(fd.close)
    return fd


def open_fds() -> int:
    """Return the number of descriptors that this process has."""
    memory()
    return len(os.listdir("/proc/self/fd"))


def all_closed(before: int) -> None:
    """Check that no descriptor since then is still open."""
    if open_fds() != before:
        gc.collect()  # an exception may still hold what it went through
        assert open_fds() == before, "descriptors were lost"


def some_fd(source: Source) -> Fd:
    kind = source.below(4)
    if kind == 0:
        return Fd.dup(memory())
    if kind == 1:
        return eventfd()
    if kind == 2:
        return Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
    ours, theirs = socket.socketpair()
    ours.close()
    return Fd(theirs.detach())


def payload(source: Source, kind: type[Any]) -> bytes:
    """Return a payload that can be of this kind, more or less."""
    shape = source.number(1)
    if shape >= 0xF0:
        return source.take(source.number(1))
    index = source.choice((0, 0, 0, 1, 2, 255, 256))
    if kind is U64:
        return U64(source.choice(FEATURES) if shape & 1 else source.number(8)).pack()
    if kind is VringState:
        return VringState(index, source.choice(SMALL)).pack()
    if kind is VringFd:
        return VringFd(index & 0xFF, bool(shape & 1)).pack()
    if kind is VringAddr:
        places = [source.choice(ADDRESSES) for _ in range(3)]
        return VringAddr(index, shape & 1, *places).pack()
    if kind is MemoryRegion:
        return _region(source).pack()
    if kind is MemoryTable:
        regions = tuple(_region(source) for _ in range(source.below(3)))
        return MemoryTable(regions).pack()
    if kind is Config:
        size = source.choice((0, 1, 8, 60, 256, 300))
        return Config(source.choice(SMALL), size, 0, source.take(size)).pack()
    if kind is Empty:
        return b""
    return source.take(min(kind.MIN_SIZE + shape % 3, kind.MAX_SIZE))


def _region(source: Source) -> MemoryRegion:
    start = source.choice(ADDRESSES)
    size = source.choice((16 * PAGE, PAGE, 0, 0x1800, 17 * PAGE))
    return MemoryRegion(start, size, start, source.choice((0, 0, PAGE, 1 << 63)))


def send(
    sock: socket.socket,
    source: Source,
    request: int,
    body: bytes,
    fds: Sequence[HasFileno],
) -> None:
    """Send a message as it should be, or with a header that lies, or in pieces."""
    lies = source.number(1)
    flags = 9 if lies < 0xC0 else source.choice(FLAGS)
    size = len(body) if lies < 0xE0 else source.number(lies >> 2 & 3)
    send_raw(sock, Header(request, flags, size).pack() + body, fds, lies == 0xFF)


def send_raw(
    sock: socket.socket, data: bytes, fds: Sequence[HasFileno], late: bool = False
) -> None:
    """`late`: the descriptors come in the middle."""
    control = []
    if fds:
        numbers = array("i", map(number_of, fds))
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
    try:
        if late:
            sock.send(data[:5], socket.MSG_DONTWAIT)
            data = data[5:]
        sock.sendmsg([data or b"\0"], control, socket.MSG_DONTWAIT)
    except OSError:
        pass  # it is full, or the other end hung up


def send_any(sock: socket.socket, source: Source, rules: AnyRules) -> None:
    """One message by these rules, or rather not."""
    request = source.choice(list(rules))
    rule: Rule = rules[request]
    fds_at_most = source.number(1)
    number = request if fds_at_most != 0xFF else source.number(4)
    body = payload(source, rule.payload)
    if fds_at_most >= 0xF0:
        count = source.below(12)
    elif rule.fds is not None:
        count = max(rule.fds)
    elif rule.payload is MemoryTable:
        count = min(body[0] if body else 0, 8)
    else:
        count = 0 if len(body) > 1 and body[1] & 1 else 1
    fds = [some_fd(source) for _ in range(count)]
    try:
        send(sock, source, number, body, fds)
    finally:
        close_all(fds)


def replies(sock: socket.socket) -> list[tuple[Header, bytes]]:
    """Return all that came back, which must be whole replies with a reply's flags."""
    data = bytearray()
    while True:
        try:
            part, control, _, _ = sock.recvmsg(1 << 16, 1 << 10, socket.MSG_DONTWAIT)
        except OSError:
            break
        for _, _, numbers in control:
            for (number,) in struct.iter_unpack("i", numbers):
                os.close(number)
        if not part:
            break
        data += part
    found = []
    while data:
        header = Header.unpack(bytes(data[: Header.LAYOUT.size]))
        end = Header.LAYOUT.size + header.size
        assert header.flags == HeaderFlag.VERSION | HeaderFlag.REPLY
        assert len(data) >= end, "half a reply"
        found.append((header, bytes(data[Header.LAYOUT.size : end])))
        del data[:end]
    return found


Answer = Callable[[int, int, bytes, list[Fd]], tuple[bytes, list[Fd]] | None]
"""From a request, its flags, payload and descriptors to all that comes in return."""


class PlayedChannel(Channel):
    """A channel whose peer needs no thread: it answers when a message is sent."""

    def __init__(self, answer: Answer, **more: Any) -> None:
        ours, self.theirs = socket.socketpair()
        super().__init__(ours, **more)
        self.answer = answer

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int | HasFileno] = (),
        *,
        flags: int = HeaderFlag.VERSION,
        deadline: float | None = None,
    ) -> None:
        self._require_whole()
        copies = [Fd.dup(fd) for fd in fds]
        try:
            answer = self.answer(request, flags, payload, copies)
        finally:
            close_all(copies)
        if answer is not None:
            send_raw(self.theirs, *answer)
            close_all(answer[1])

    def close(self) -> None:
        super().close()
        self.theirs.close()
