# SPDX-License-Identifier: Apache-2.0
"""The front's socket for requests: the front gets what it has accepted, late or never,
and nobody waits for it.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from vhost_airlock.errors import RequestRefused
from vhost_airlock.proxy.config import Config
from vhost_airlock.proxy.front_requests import FrontRequests
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import ProtocolFeature

CHANGED = struct.pack("<III", 2, 1, 0)
"""VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no payload, no ack asked."""
CONFIG = ProtocolFeature.CONFIG


@pytest.fixture
def requests() -> Iterator[FrontRequests]:
    requests = FrontRequests(Config().log)
    yield requests
    requests.close()


@pytest.fixture
def front(requests: FrontRequests) -> Iterator[socket.socket]:
    """The front's end of a socket that `requests` has."""
    with connected(requests) as front:
        yield front


def connected(requests: FrontRequests) -> socket.socket:
    front, ours = socket.socketpair()
    front.setblocking(False)
    requests.connect(Fd(ours.detach()))
    return front


def test_front_is_told(requests, front):
    requests.config_changed(CONFIG)
    assert front.recv(99) == CHANGED


def test_front_that_has_not_accepted_config_is_not_told(requests, front):
    requests.config_changed(ProtocolFeature.REPLY_ACK)
    with pytest.raises(BlockingIOError):
        front.recv(99)


def test_a_newer_socket_replaces_the_older_one(requests, front):
    with connected(requests) as newer:
        requests.config_changed(CONFIG)
        assert newer.recv(99) == CHANGED
        assert front.recv(99) == b"", "the older one is closed"


def test_front_that_does_not_read_gets_whole_messages(requests, front):
    for _ in range(5000):
        requests.config_changed(CONFIG)
    told = 0
    while True:
        try:
            message = front.recv(len(CHANGED))
        except BlockingIOError:
            break
        assert message == CHANGED
        told += 1
    assert 0 < told < 5000, "the socket was never full"
    requests.config_changed(CONFIG)
    assert front.recv(99) == CHANGED


def test_front_that_hangs_up_is_told_no_more(requests, front, caplog):
    front.close()
    with caplog.at_level(logging.WARNING):
        requests.config_changed(CONFIG)
        requests.config_changed(CONFIG)
    (message,) = caplog.messages
    assert "VMM: closed the connection" in message


def test_what_is_no_socket_is_refused_and_closed(requests, front):
    out, into = os.pipe()
    with Fd(out), pytest.raises(RequestRefused, match="SET_BACKEND_REQ_FD"):
        requests.connect(Fd(into))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(into)
    requests.config_changed(CONFIG)
    assert front.recv(99) == CHANGED, "the socket of before is used still"
