# SPDX-License-Identifier: Apache-2.0
"""Sessions with a back-end that has requests of its own."""

from __future__ import annotations

import os
import socket
from typing import Self

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack
from tests.support.sessions import small_guest
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.server import PROTOCOL_FEATURES
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.rules import BACKEND_RULES
from vhost_airlock.vhost.wire import U64, BackendRequest, HeaderFlag, ProtocolFeature


def talking_back() -> ScriptedBack:
    return ScriptedBack(
        protocol_features=PROTOCOL_FEATURES | ProtocolFeature.BACKEND_REQ
    )


def talking_guest() -> BlkGuest:
    return small_guest(also=[ProtocolFeature.BACKEND_REQ])


class Talked:
    """A session with a back that makes requests, and what the front hears of it."""

    def __init__(self, airlock: Airlock, back: ScriptedBack, guest: BlkGuest) -> None:
        self.airlock = airlock
        guest.connect(airlock.channel())
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # a few messages
        with theirs:
            guest.front.set_backend_req_fd(theirs)
        self.heard = Channel(ours, peer="airlock")
        guest.start()
        assert back.asking is not None
        self.asking = back.asking

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.heard.close()

    def refused(self, request: BackendRequest) -> bool:
        """Does the airlock refuse a request, well formed and with its descriptors?"""
        rule = BACKEND_RULES[request]
        channel = self.asking.channel
        flags = HeaderFlag.VERSION | HeaderFlag.NEED_REPLY
        with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
            fds = [fd] * (rule.fds[-1] if rule.fds else 0)
            channel.send(request, bytes(rule.payload.MIN_SIZE), fds, flags=flags)
        with channel.recv() as answer:
            assert answer.request == request
            assert not answer.fds
            return U64.unpack(answer.payload).value != 0
