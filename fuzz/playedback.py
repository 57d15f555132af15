# SPDX-License-Identifier: Apache-2.0
"""A back that needs no thread: it answers well, and a target acts in its rings. It
searches all messages and memory that it gets for things that a back must never get."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from fuzz.talk import PlayedChannel, memory
from tests.support.backs import Seen
from tests.support.order import check_order
from vhost_airlock.peers.device import DeviceRing
from vhost_airlock.peers.memory import Memory
from vhost_airlock.peers.vring import Vring
from vhost_airlock.proxy.back import Back
from vhost_airlock.proxy.config import Config as AirlockConfig
from vhost_airlock.proxy.recovery import ConfigChanged
from vhost_airlock.vhost.fds import Fd, close_all
from vhost_airlock.vhost.rules import RULES, Ack
from vhost_airlock.vhost.wire import (
    REPLY_FLAGS,
    U64,
    Config,
    Feature,
    Header,
    HeaderFlag,
    Payload,
    ProtocolFeature,
    Request,
    VringState,
)

OURS = 1 << 46
"""Where the back's addresses begin."""
FEATURES = (
    Feature.VERSION_1
    | Feature.PROTOCOL_FEATURES
    | Feature.EVENT_IDX
    | Feature.INDIRECT_DESC
)
P = ProtocolFeature
PROTOCOL = (
    P.MQ | P.REPLY_ACK | P.CONFIG | P.STATUS | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS
)


class PlayedBack:
    def __init__(self, protocol: int, config: AirlockConfig) -> None:
        self.protocol = protocol
        self.config = config
        self.seen: list[Seen] = []
        self.memory = Memory()
        self.vrings: defaultdict[int, Vring] = defaultdict(Vring)
        self.features = 0
        self._files: list[Fd] = []
        self._old: list[DeviceRing] = []

    def connect(self, config_changed: ConfigChanged) -> Back:
        channel = PlayedChannel(self.answer, timeout=self.config.timeout)
        return Back(channel, self.config, config_changed)

    def reconnect(self, config_changed: ConfigChanged) -> Back:
        raise AssertionError("a back that is played is never lost")

    def pause(self, seconds: float) -> None:
        raise AssertionError("nothing waits for a back that is played")

    def answer(
        self, number: int, flags: int, data: bytes, fds: list[Fd]
    ) -> tuple[bytes, list[Fd]] | None:
        request = Request(number)
        rule = RULES[request]
        payload = rule.payload.unpack(data)
        self.seen.append(Seen(request, flags, data))
        self.check(request, payload, fds)
        reply = self.act(request, payload, fds)
        if rule.ack is Ack.ASKED and not flags & HeaderFlag.NEED_REPLY:
            return None
        body = (reply or U64(0)).pack()
        return Header(number, REPLY_FLAGS, len(body)).pack() + body, []

    def check(self, request: Request, payload: Any, fds: list[Fd]) -> None:
        """I1 and I2: no memory of the guest's, no address but isolated memory's."""
        guest = os.fstat(memory().fileno())
        assert all(os.fstat(fd.fileno()).st_ino != guest.st_ino for fd in fds)
        if request is Request.SET_VRING_ADDR:
            assert min(payload.desc, payload.used, payload.avail) >= OURS
            assert payload.flags == payload.log == 0
        elif request in (Request.ADD_MEM_REG, Request.SET_MEM_TABLE):
            for region in getattr(payload, "regions", (payload,)):
                assert region.guest_addr == region.user_addr >= OURS

    def act(self, request: Request, payload: Any, fds: list[Fd]) -> Payload | None:
        if request is Request.GET_FEATURES:
            return U64(FEATURES)
        if request is Request.GET_PROTOCOL_FEATURES:
            return U64(self.protocol)
        if request is Request.SET_FEATURES:
            self.features = payload.value
        elif request is Request.GET_QUEUE_NUM:
            return U64(2)
        elif request is Request.GET_MAX_MEM_SLOTS:
            return U64(32)
        elif request is Request.GET_CONFIG:
            return Config(payload.offset, payload.size, 0, bytes(payload.size))
        elif request in (Request.ADD_MEM_REG, Request.SET_MEM_TABLE):
            regions = getattr(payload, "regions", (payload,))
            for region, fd in zip(regions, fds, strict=True):
                self.memory.add(region, fd)
                self._files.append(Fd.dup(fd))
        elif request in VRING:
            return self.act_on_ring(request, self.vrings[payload.index], payload, fds)
        return None

    def act_on_ring(
        self, request: Request, vring: Vring, payload: Any, fds: list[Fd]
    ) -> Payload | None:
        if request is Request.SET_VRING_NUM:
            if vring.ring is not None:
                self._old.append(vring.ring)
                vring.ring = None
            vring.num = payload.num
        elif request is Request.SET_VRING_ADDR:
            vring.addr = payload
        elif request is Request.SET_VRING_CALL:
            vring.set_call(fds.pop())
        elif request is Request.SET_VRING_KICK:
            vring.set_kick(fds.pop())
            vring.start(self.memory, bool(self.features & Feature.EVENT_IDX))
        elif request is Request.GET_VRING_BASE:
            assert vring.ring is not None
            vring.close()
            return VringState(payload.index, vring.ring.next_avail)
        return None

    def all_it_has(self) -> Iterator[bytes]:
        """All bytes, but for holes, of all memory that it ever got."""
        for fd in self._files:
            end = 0
            with contextlib.suppress(OSError):
                while True:
                    start = os.lseek(fd.fileno(), end, os.SEEK_DATA)
                    end = os.lseek(fd.fileno(), start, os.SEEK_HOLE)
                    yield os.pread(fd.fileno(), end - start, start)

    def close(self) -> None:
        """The connection has ended: was all in an order that backs take?"""
        for vring in self.vrings.values():
            vring.stop()
            vring.close()
        for ring in self._old:
            ring.ring.release()
        self.memory.clear()
        close_all(self._files)
        check_order(self.seen)


VRING = (
    Request.SET_VRING_NUM,
    Request.SET_VRING_ADDR,
    Request.SET_VRING_CALL,
    Request.SET_VRING_KICK,
    Request.GET_VRING_BASE,
)
