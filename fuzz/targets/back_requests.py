# SPDX-License-Identifier: Apache-2.0
"""Any bytes of a back on the socket for requests of its own."""

from __future__ import annotations

import contextlib
import socket

from fuzz.source import Source
from fuzz.talk import all_closed, open_fds, replies, send_any
from vhost_airlock.errors import SessionError
from vhost_airlock.vhost.backend import Responder
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.rules import BACKEND_RULES
from vhost_airlock.vhost.wire import BackendRequest, ProtocolFeature


def one(data: bytes) -> None:
    source = Source(data)
    before = open_fds()
    features = ProtocolFeature(source.number(4))
    changed = []
    ours, theirs = socket.socketpair()
    with theirs, Channel(ours, timeout=0.2) as channel:
        responder = Responder(
            channel,
            {BackendRequest.CONFIG_CHANGE_MSG: lambda _, fds: changed.append(1)},
            BACKEND_RULES,
            features,
        )
        sent = 0
        while source.more and sent < 50:
            send_any(theirs, source, BACKEND_RULES)
            sent += 1
        theirs.shutdown(socket.SHUT_WR)
        with contextlib.suppress(SessionError):
            responder.serve()
        answers = replies(theirs)
        assert len(answers) <= sent * 50
        if not features & ProtocolFeature.CONFIG:
            assert not changed, "a request without its feature was served"
        if not features & ProtocolFeature.REPLY_ACK:
            lookup = BackendRequest.SHARED_OBJECT_LOOKUP
            assert all(header.request == lookup for header, _ in answers)
        for header, body in answers:
            served = header.request == BackendRequest.CONFIG_CHANGE_MSG
            assert len(body) == 8
            assert served or any(body), "a success for what is not served"
    all_closed(before)
