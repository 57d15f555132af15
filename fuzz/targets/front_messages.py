# SPDX-License-Identifier: Apache-2.0
"""Any messages of a front, to a whole session with a good back."""

from __future__ import annotations

import os
import socket
import threading

from fuzz.playedback import PROTOCOL, PlayedBack
from fuzz.source import Source
from fuzz.talk import (
    PAGE,
    all_closed,
    memory,
    open_fds,
    replies,
    send_any,
    send_raw,
)
from vhost_airlock.proxy.config import Config
from vhost_airlock.proxy.session import Session
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, close_all, eventfd
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import (
    U64,
    Empty,
    Header,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    Request,
    VringAddr,
    VringFd,
    VringState,
)

CONFIG = Config(timeout=0.1, drain_timeout=0.01, poll_us=0, pool_limit=1 << 20)
R = Request
P = ProtocolFeature
REGION = MemoryRegion(0, 16 * PAGE, 0)


def good(index: int) -> list[tuple[Request, Payload, str]]:
    """The messages that start a ring."""
    return [
        (R.GET_FEATURES, Empty(), ""),
        (R.GET_PROTOCOL_FEATURES, Empty(), ""),
        (R.SET_PROTOCOL_FEATURES, U64(P.REPLY_ACK | P.CONFIG), ""),
        (R.SET_FEATURES, U64(0x170000000), ""),
        (R.SET_MEM_TABLE, MemoryTable((REGION,)), "memory"),
        (R.SET_VRING_NUM, VringState(index, 16), ""),
        (R.SET_VRING_BASE, VringState(index, 0), ""),
        (R.SET_VRING_ADDR, VringAddr(index, 0, 0x1000, used=0x1C00, avail=0x1800), ""),
        (R.SET_VRING_CALL, VringFd(index), "eventfd"),
        (R.SET_VRING_KICK, VringFd(index), "eventfd"),
        (R.SET_VRING_ENABLE, VringState(index, 1), ""),
        (R.GET_VRING_BASE, VringState(index), ""),
    ]


def send_good(sock: socket.socket, steps: list[tuple[Request, Payload, str]]) -> None:
    for request, payload, what in steps:
        fds = []
        if what:
            fds.append(Fd.dup(memory()) if what == "memory" else eventfd(1))
        body = payload.pack()
        send_raw(sock, Header(request, 9, len(body)).pack() + body, fds)
        close_all(fds)


def one(data: bytes) -> None:
    source = Source(data)
    before, threads = open_fds(), threading.active_count()
    fill_memory(source)
    ours, theirs = socket.socketpair()
    with eventfd() as stop, theirs:
        back = PlayedBack(PROTOCOL if source.flag() else P.MQ | P.CONFIG, CONFIG)
        sent = 0
        while source.more and sent < 60:
            if source.number(1) >= 0xC0:
                first = source.below(12)
                steps = good(source.below(2))[first : first + 1 + source.below(12)]
            else:
                send_any(theirs, source, RULES)
                steps = []
            send_good(theirs, steps)
            sent += len(steps) or 1
        theirs.shutdown(socket.SHUT_WR)
        front = Channel(ours, stop=stop, peer="VMM", timeout=CONFIG.timeout)
        session = Session(front, CONFIG, back, stop)
        assert session.run() is None
        answers = replies(theirs)
        # Bytes of lying headers can be requests too, none shorter than a header.
        assert len(answers) <= sent * 30
        for header, body in answers:
            rule = RULES.get(header.request)  # type: ignore[call-overload]
            sizes = {8, 0} if rule is None else {8, 0, len(body) * rule.answered}
            assert len(body) in sizes
        back.close()
        del session
    assert threading.active_count() == threads
    all_closed(before)


def fill_memory(source: Source) -> None:
    """The same few bytes again and again: descriptors, indices, tables at once."""
    content = source.take(16) * (16 * PAGE // 16)
    os.pwrite(memory().fileno(), content, 0)
