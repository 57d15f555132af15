# SPDX-License-Identifier: Apache-2.0
"""Any answer of a back to each request."""

from __future__ import annotations

from fuzz.source import Source
from fuzz.talk import PlayedChannel, all_closed, open_fds, payload, some_fd
from vhost_airlock.errors import RequestRefused, SessionError
from vhost_airlock.vhost.fds import Fd, close_all
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import (
    CryptoSession,
    Header,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddr,
)

ALL = ProtocolFeature((1 << 23) - 1)
REGION = MemoryRegion(0, 4096, 0)


def calls(front: Frontend, fd: Fd) -> list:  # type: ignore[type-arg]
    return [
        front.get_features,
        front.get_protocol_features,
        front.get_queue_num,
        front.get_max_mem_slots,
        front.get_status,
        front.get_shmem_config,
        front.set_owner,
        front.check_device_state,
        lambda: front.get_config(4, 8),
        lambda: front.set_config(0, b"config"),
        lambda: front.net_set_mtu(1500),
        lambda: front.create_crypto_session(CryptoSession(b"key")),
        lambda: front.get_shared_object(bytes(16)),
        lambda: front.get_inflight_fd(1, 64),
        lambda: front.set_device_state_fd(0, fd),
        lambda: front.set_log_base(4096, 0, fd),
        lambda: front.set_mem_table([(REGION, fd)]),
        lambda: front.get_vring_base(1),
        lambda: front.set_vring_addr(VringAddr(1, 0, 0, 0, 0)),
        lambda: front.set_vring_kick(1, None),
    ]


def one(data: bytes) -> None:
    source = Source(data)
    before = open_fds()
    wrong = [False]
    """Of each reply: can't it be the one that is due?"""

    def answer(
        request: int, flags: int, asked: bytes, fds: list[Fd]
    ) -> tuple[bytes, list[Fd]]:
        rule = RULES[Request(request)]
        lies = source.number(1)
        body = asked if lies & 1 else payload(source, rule.reply)
        if lies < 0x40:
            body = bytes(8)
        number = request if lies < 0xF0 else source.number(4)
        flags = 5 if lies < 0xE0 else source.number(1)
        size = len(body) if lies < 0xD0 else source.number(2)
        count = source.below(10) if lies & 2 else max(rule.reply_fds)
        wrong.append(number != request or flags != 5)
        more = source.take(4) if lies & 0x1C == 0x1C else b""
        sent = [some_fd(source) for _ in range(count)]
        return Header(number, flags, size).pack() + body + more, sent

    with Frontend(PlayedChannel(answer, timeout=0.01), timeout=0.01) as front:
        front.protocol_features = ALL
        with some_fd(source) as fd:
            possible = calls(front, fd)
            for _ in range(8):
                if not source.more:
                    break
                try:
                    result = source.choice(possible)()
                except RequestRefused:
                    continue  # of the two kinds of no, the one after which all goes on
                except SessionError:
                    break
                assert not wrong[-1], "a reply to something else was taken"
                # The result keeps the promises of its method.
                if isinstance(result, Fd):
                    result.close()
                elif isinstance(result, tuple):
                    close_all([result[1]])
                elif isinstance(result, bytes):
                    assert len(result) == 8
                elif isinstance(result, int):
                    assert 0 <= result < 1 << 64
    all_closed(before)
