# SPDX-License-Identifier: Apache-2.0
"""I5: what the back says on the socket for requests of its own."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import ScriptedBack, readable
from tests.support.sessions import (
    LATE,
    TIMEOUT,
    errors,
    serve,
)
from tests.support.talk import Talked, talking_back, talking_guest
from vhost_airlock.errors import AirlockError, Disconnected
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.frontend import Requester
from vhost_airlock.vhost.wire import (
    BackendRequest,
    Header,
    HeaderFlag,
)


@pytest.fixture
def guest() -> Iterator[BlkGuest]:
    with talking_guest() as guest:
        yield guest


@pytest.fixture
def talker() -> ScriptedBack:
    return talking_back()


@pytest.fixture
def talk(talker: ScriptedBack, guest: BlkGuest) -> Iterator[Talked]:
    with (
        Airlock(talker, drain_timeout=TIMEOUT) as airlock,
        Talked(airlock, talker, guest) as talked,
    ):
        yield talked
        guest.disconnect()


def test_change_of_the_configuration_is_passed_on(talk: Talked) -> None:
    for _ in range(3):
        talk.asking.exchange(BackendRequest.CONFIG_CHANGE_MSG)
        with talk.heard.recv() as message:
            assert message.request == BackendRequest.CONFIG_CHANGE_MSG
            assert message.flags == HeaderFlag.VERSION, "no ack: it may be asking us"
            assert message.payload == b""


@pytest.mark.timing
def test_i5_flood_of_changes_reaches_the_front_as_a_trickle(
    talk: Talked, talker: ScriptedBack, guest: BlkGuest
) -> None:
    """Nobody reads what the front-end hears; it is served all the same, and quickly."""
    ended = threading.Event()

    def flood() -> None:
        with contextlib.suppress(AirlockError):
            while not ended.is_set():
                talk.asking.exchange(BackendRequest.CONFIG_CHANGE_MSG, need_reply=False)

    thread = threading.Thread(target=flood, name="flood")
    thread.start()
    try:
        began = time.monotonic()
        slowest = 0.0
        while time.monotonic() - began < 1:
            before = time.monotonic()
            guest.front.barrier()
            serve(talker, guest)
            slowest = max(slowest, time.monotonic() - before)
    finally:
        ended.set()
        guest.disconnect()
        thread.join()
    assert slowest < LATE
    heard = 0
    with contextlib.suppress(Disconnected):
        while True:
            talk.heard.recv().close()
            heard += 1
    assert 1 <= heard <= 100


@pytest.mark.timing
def test_i10_back_that_dribbles_does_not_keep_the_front_waiting(
    talker: ScriptedBack, guest: BlkGuest
) -> None:
    """The end of each request comes late, with the beginning of the next one."""
    ended = threading.Event()

    def dribble(asking: Requester) -> None:
        request = Header(BackendRequest.CONFIG_CHANGE_MSG, 1, 0).pack()
        with contextlib.suppress(OSError):
            os.write(asking.channel.fileno(), request[:-1])
            while not ended.wait(0.8 * TIMEOUT):
                os.write(asking.channel.fileno(), request[-1:] + request[:-1])

    with (
        Airlock(talker, timeout=TIMEOUT, drain_timeout=TIMEOUT) as airlock,
        Talked(airlock, talker, guest) as talked,
    ):
        thread = threading.Thread(target=dribble, args=[talked.asking], name="dribble")
        thread.start()
        try:
            with contextlib.suppress(AirlockError):
                for _ in range(10):
                    guest.front.get_features()
                    ended.wait(TIMEOUT / 4)
        finally:
            ended.set()
            thread.join()
            guest.disconnect()
        airlock.join()
        airlock.assert_no_message_took_longer(LATE)


@pytest.mark.timing
def test_front_that_hears_nothing_is_not_waited_for(
    talk: Talked, talker: ScriptedBack, guest: BlkGuest
) -> None:
    """Its socket is full: there are changes enough in it that it has yet to hear of."""
    for _ in range(30):
        talk.asking.exchange(BackendRequest.CONFIG_CHANGE_MSG)
        guest.front.barrier()
    serve(talker, guest)
    talk.airlock.assert_no_message_took_longer(LATE)
    heard = 0
    while readable(talk.heard, 0):
        talk.heard.recv().close()
        heard += 1
    assert 0 < heard < 30
    talk.asking.exchange(BackendRequest.CONFIG_CHANGE_MSG)
    talk.heard.recv().close()


@pytest.mark.parametrize(
    "request_",
    sorted(set(BackendRequest) - {BackendRequest.CONFIG_CHANGE_MSG}),
    ids=lambda request: request.name,
)
def test_i5_other_requests_of_the_back_are_refused(
    talk: Talked, talker: ScriptedBack, guest: BlkGuest, request_: BackendRequest
) -> None:
    assert talk.refused(request_)
    serve(talker, guest)


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        (b"\xff" * 64, 0),
        (Header(BackendRequest.CONFIG_CHANGE_MSG, 1, 4).pack() + b"1234", 0),
        (Header(BackendRequest.CONFIG_CHANGE_MSG, 1, 0xFFFFFFFF).pack(), 0),
        (Header(BackendRequest.CONFIG_CHANGE_MSG, 1, 0).pack(), 1),
        (Header(BackendRequest.CONFIG_CHANGE_MSG, 1, 0).pack(), 253),
        (Header(99, 1, 0).pack(), 0),
        (Header(99, 5, 0).pack(), 0),
    ],
    ids=str,
)
def test_i5_nonsense_on_the_backs_own_socket_ends_the_session(
    talk: Talked,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    data: bytes,
    fds: int,
) -> None:
    with (
        socket.socket(fileno=os.dup(talk.asking.fileno())) as sock,
        Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd,
    ):
        rights = array.array("i", [fd.fileno()] * fds)
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    assert hung_up(guest.front.channel)
    assert errors(caplog)[0].startswith("back-end: ")


def test_i5_back_that_closes_its_own_socket(
    talk: Talked, talker: ScriptedBack, guest: BlkGuest
) -> None:
    """It has no requests any more, that is all."""
    talker.forget_seen()  # which has a copy
    talk.asking.close()
    for _ in range(5):
        guest.front.barrier()
        serve(talker, guest)
