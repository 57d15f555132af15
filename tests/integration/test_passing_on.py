# SPDX-License-Identifier: Apache-2.0
"""Messages without address and descriptor go to the back, and its answer back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import ScriptedBack
from tests.support.sessions import errors, serve, small_guest
from vhost_airlock.errors import PeerRefused, RequestRefused
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.proxy.features import PASSED_PROTOCOL
from vhost_airlock.proxy.handlers import PASSED
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.frontend import Frontend
from vhost_airlock.vhost.rules import RULES, Ack
from vhost_airlock.vhost.wire import (
    U64,
    Config,
    CryptoSession,
    Empty,
    Payload,
    ProtocolFeature,
    Request,
    VringState,
)

R = Request
OFFERED = int(
    PASSED_PROTOCOL | ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
SAMPLES: dict[Request, tuple[Payload, Payload | None]] = {
    R.GET_QUEUE_NUM: (Empty(), U64(12345)),
    R.SEND_RARP: (U64(0x0000_5634_1290_0052), None),
    R.NET_SET_MTU: (U64(9000), None),
    R.GET_CONFIG: (Config(4, 8, 1, bytes(8)), Config(4, 8, 1, b"config..")),
    R.SET_CONFIG: (Config(32, 3, 1, b"new"), None),
    R.CREATE_CRYPTO_SESSION: (
        CryptoSession(b"key" * 300),
        CryptoSession(b"session id" * 90),
    ),
    R.CLOSE_CRYPTO_SESSION: (U64(77), None),
    R.SET_STATUS: (U64(0x0F), None),
    R.GET_STATUS: (Empty(), U64(0x4F)),
}
"""A request, and what a back may answer."""


@pytest.fixture
def back() -> ScriptedBack:
    return ScriptedBack(protocol_features=OFFERED)


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back) as airlock:
        yield airlock


@pytest.fixture
def guest(airlock: Airlock) -> Iterator[BlkGuest]:
    with small_guest(also=[OFFERED]) as guest:
        guest.connect(airlock.channel())
        guest.start()
        yield guest
        guest.disconnect()


def answer(back: ScriptedBack, request: Request, reply: Payload | None) -> None:
    def handler(payload: Payload, fds: list[Fd]) -> Payload | None:
        return reply

    back.instead[request] = handler


def test_these_are_all_that_are_passed_on() -> None:
    assert set(SAMPLES) == set(PASSED)


@pytest.mark.parametrize("request_", sorted(SAMPLES))
def test_request_and_reply_arrive_as_they_are(
    back: ScriptedBack, guest: BlkGuest, request_: Request
) -> None:
    payload, reply = SAMPLES[request_]
    answer(back, request_, reply)
    got = guest.front.exchange(request_, payload)
    seen = back.got(request_)[-1]
    assert seen.payload == payload
    assert seen.fds == got.fds == []
    if RULES[request_].ack is Ack.REPLY:
        assert got.payload == reply
    serve(back, guest)


@pytest.mark.parametrize("request_", [R.NET_SET_MTU, R.SET_CONFIG])
def test_verdict_of_the_back_is_passed_on(
    back: ScriptedBack, guest: BlkGuest, request_: Request
) -> None:
    """It may say no to these without being broken."""
    refuse(back, request_)
    with pytest.raises(PeerRefused):
        guest.front.exchange(request_, SAMPLES[request_][0])
    serve(back, guest)


def refuse(back: ScriptedBack, request: Request) -> None:
    def handler(payload: Payload, fds: list[Fd]) -> None:
        raise RequestRefused("no")

    back.instead[request] = handler


@pytest.mark.parametrize(
    "request_", [R.SEND_RARP, R.CLOSE_CRYPTO_SESSION, R.SET_STATUS]
)
def test_any_other_refusal_ends_the_session(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    request_: Request,
) -> None:
    refuse(back, request_)
    guest.front.channel.send(request_, SAMPLES[request_][0].pack(), flags=9)
    assert hung_up(guest.front.channel)
    airlock.join()
    assert f"back-end: {request_.name} refused: U64(value=1)" in errors(caplog)


@pytest.mark.parametrize("request_", sorted(SAMPLES))
def test_request_that_the_back_has_no_feature_for_is_refused(
    back: ScriptedBack, request_: Request
) -> None:
    """It never gets there."""
    back.protocol_offered &= ~int(RULES[request_].needs)
    needs = RULES[request_].needs
    with (
        Airlock(back) as airlock,
        small_guest(also=[OFFERED], without=[needs]) as guest,
    ):
        guest.connect(airlock.channel())
        guest.start()
        rule = RULES[request_]
        flags = 9
        guest.front.channel.send(request_, SAMPLES[request_][0].pack(), flags=flags)
        if rule.refusal is None:
            assert hung_up(guest.front.channel)
        else:
            with guest.front.channel.recv() as got:
                assert got.payload == rule.refusal.pack()
            serve(back, guest)
        assert not back.got(request_)
        guest.disconnect()


MAC = 0x0000_5634_1290_0052
SENSELESS: list[tuple[Request, Payload]] = [
    (R.GET_CONFIG, Config(0, 0)),
    (R.GET_CONFIG, Config(4089, 8)),
    (R.GET_CONFIG, Config(0, 4085)),
    (R.GET_CONFIG, Config(0, 8, 2)),
    (R.SET_CONFIG, Config(0, 0)),
    (R.SET_CONFIG, Config(4096, 1, 0, b"x")),
    (R.SET_CONFIG, Config(0, 1, 2, b"x")),
    (R.NET_SET_MTU, U64(67)),
    (R.NET_SET_MTU, U64(65536)),
    (R.SEND_RARP, U64(MAC | 1 << 48)),
    (R.CLOSE_CRYPTO_SESSION, U64(1 << 63)),
    (R.SET_STATUS, U64(256)),
]
"""Of a form that can be, with values that can't."""


@pytest.mark.parametrize(("request_", "payload"), SENSELESS, ids=str)
def test_values_that_make_no_sense_never_reach_the_back(
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    request_: Request,
    payload: Payload,
) -> None:
    """A hostile VMM; qemu-storage-daemon would end over some. The session lives."""
    before = back.got(request_)
    guest.front.channel.send(request_, payload.pack(), flags=9)
    refusal = RULES[request_].refusal
    assert refusal is not None
    with guest.front.channel.recv() as got:
        assert (got.request, got.payload) == (request_, refusal.pack())
    (line,) = errors(caplog)
    assert line.startswith(f"VMM: refused: {request_.name}: ")
    serve(back, guest)
    assert back.got(request_) == before


def test_status_comes_with_features_that_are_known(
    airlock: Airlock, back: ScriptedBack
) -> None:
    """QEMU sets FEATURES_OK after the features: the back must have them by then."""
    with small_guest(also=[OFFERED]) as guest:
        guest.connect(airlock.channel())
        guest.front.set_features(guest.features)
        guest.front.set_status(8)
        assert guest.front.get_status() == 0
        order = back.requests()
        assert order.index(R.SET_FEATURES) < order.index(R.SET_STATUS)
        guest.start()
        guest.front.set_status(15)
        assert len(back.got(R.SET_FEATURES)) == 1
        guest.disconnect()


def test_status_before_the_protocol_features_stays_here(
    airlock: Airlock, back: ScriptedBack
) -> None:
    """DPDK's virtio-user begins so when it connects again, and waits for the acks that
    it had before. A status that it tells later reaches the back."""
    with small_guest(also=[OFFERED]) as guest:
        channel = airlock.channel()
        early = Frontend(channel)
        early.protocol_features = ProtocolFeature(OFFERED)
        early.exchange(R.SET_VRING_ENABLE, VringState(0, 0), need_reply=False)
        assert early.get_vring_base(0) == 0
        assert early.get_status() == 0
        for status in (1, 3):
            early.set_status(status)
            assert early.get_status() == status
        assert back.requests() == []
        guest.connect(channel)
        guest.start()
        guest.front.set_status(15)
        (told,) = back.got(R.SET_STATUS)
        assert told.payload == U64(15)
        serve(back, guest)
        guest.disconnect()
