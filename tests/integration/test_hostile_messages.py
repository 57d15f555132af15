# SPDX-License-Identifier: Apache-2.0
"""I5: the back may answer as it likes; the airlock lives, in time, and goes on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import ScriptedBack, readable
from tests.support.sessions import (
    GONE,
    LATE,
    TIMEOUT,
    assert_serves_the_next,
    errors,
    hold,
    live,
    serve,
    small_guest,
)
from vhost_airlock.errors import AirlockError, Disconnected
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.server import RING_FEATURES
from vhost_airlock.vhost.backend import Result
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.rules import RULES
from vhost_airlock.vhost.wire import (
    REPLY_FLAGS,
    U64,
    BackendRequest,
    Config,
    Feature,
    Header,
    HeaderFlag,
    Payload,
    ProtocolFeature,
    Request,
    VringState,
)

R = Request


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back, timeout=TIMEOUT, drain_timeout=TIMEOUT) as airlock:
        yield airlock


@pytest.fixture
def guest() -> Iterator[BlkGuest]:
    with small_guest() as guest:
        yield guest


# Deeds of a back in place of an answer. Each is called in the back's thread; to
# return is to answer as usual, to raise is to hang up.

Deed = Callable[[ScriptedBack, Channel, Request], None]


def say_nothing(back: ScriptedBack, channel: Channel, request: Request) -> None:
    hold(back)


def hang_up(back: ScriptedBack, channel: Channel, request: Request) -> None:
    raise GONE


def answer_another(back: ScriptedBack, channel: Channel, request: Request) -> None:
    channel.send(request ^ 1, U64(0).pack(), flags=REPLY_FLAGS)
    hold(back)


def answer_without_flag(back: ScriptedBack, channel: Channel, request: Request) -> None:
    channel.send(request, U64(0).pack(), flags=HeaderFlag.VERSION)
    hold(back)


def answer_with_all_flags(
    back: ScriptedBack, channel: Channel, request: Request
) -> None:
    channel.send(request, U64(0).pack(), flags=0xFFFFFFFF)
    hold(back)


def answer_too_short(back: ScriptedBack, channel: Channel, request: Request) -> None:
    channel.send(request, b"abc", flags=REPLY_FLAGS)
    hold(back)


def answer_too_long(back: ScriptedBack, channel: Channel, request: Request) -> None:
    size = RULES[request].reply.MAX_SIZE
    channel.send(request, bytes(size + 1), flags=REPLY_FLAGS)
    hold(back)


def answer_without_end(back: ScriptedBack, channel: Channel, request: Request) -> None:
    header = Header(request, REPLY_FLAGS, 0xFFFFFFFF).pack()
    with contextlib.suppress(OSError):
        os.write(channel.fileno(), header)
        while True:
            os.write(channel.fileno(), bytes(65536))
    raise GONE


def answer_half(back: ScriptedBack, channel: Channel, request: Request) -> None:
    os.write(channel.fileno(), Header(request, REPLY_FLAGS, 8).pack() + b"1234")
    hold(back)


def answer_half_and_hang_up(
    back: ScriptedBack, channel: Channel, request: Request
) -> None:
    os.write(channel.fileno(), Header(request, REPLY_FLAGS, 8).pack() + b"1234")
    raise GONE


def answer_byte_by_byte(back: ScriptedBack, channel: Channel, request: Request) -> None:
    """Each byte well within the deadline, but not all of them."""
    with contextlib.suppress(OSError):
        for byte in Header(request, REPLY_FLAGS, 8).pack() + bytes(8):
            os.write(channel.fileno(), bytes([byte]))
            if gone := readable(channel, TIMEOUT / 4):
                assert gone
                break
    raise GONE


def answer_with_descriptors(
    back: ScriptedBack, channel: Channel, request: Request
) -> None:
    with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
        channel.send(request, U64(0).pack(), [fd] * 8, flags=REPLY_FLAGS)
    hold(back)


def answer_with_all_descriptors(
    back: ScriptedBack, channel: Channel, request: Request
) -> None:
    with Fd(os.memfd_create("hostile", os.MFD_CLOEXEC)) as fd:
        channel.send(request, U64(0).pack(), [fd] * 253, flags=REPLY_FLAGS)
    hold(back)


def send_noise(back: ScriptedBack, channel: Channel, request: Request) -> None:
    os.write(channel.fileno(), b"\xff" * 100)
    hold(back)


def ask_something(back: ScriptedBack, channel: Channel, request: Request) -> None:
    """Requests of its own, on the socket that is not for them."""
    channel.send(BackendRequest.CONFIG_CHANGE_MSG)
    hold(back)


DEEDS: list[Deed] = [
    say_nothing,
    hang_up,
    answer_another,
    answer_without_flag,
    answer_with_all_flags,
    answer_too_short,
    answer_too_long,
    answer_without_end,
    answer_half,
    answer_half_and_hang_up,
    answer_byte_by_byte,
    answer_with_descriptors,
    answer_with_all_descriptors,
    send_noise,
    ask_something,
]

MESSAGES = [
    R.GET_FEATURES,
    R.GET_PROTOCOL_FEATURES,
    R.SET_OWNER,
    R.GET_MAX_MEM_SLOTS,
    R.GET_QUEUE_NUM,
    R.GET_CONFIG,
    R.SET_FEATURES,
    R.ADD_MEM_REG,
    R.SET_VRING_NUM,
    R.SET_VRING_BASE,
    R.SET_VRING_ADDR,
    R.SET_VRING_CALL,
    R.SET_VRING_ERR,
    R.SET_VRING_KICK,
    R.SET_VRING_ENABLE,
    R.GET_VRING_BASE,
]


def test_these_are_all_messages(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    live(airlock, back, guest)
    assert set(back.requests()) == {*MESSAGES, R.SET_PROTOCOL_FEATURES}


MOST_TELLING = [R.GET_FEATURES, R.GET_CONFIG, R.ADD_MEM_REG, R.GET_VRING_BASE]
"""With a number in return, with data, with an ack, and while rings run."""

CASES = [
    pytest.param(request, deed, id=f"{request.name}-{deed.__name__}")
    for request in MESSAGES
    for deed in (DEEDS if request in MOST_TELLING else DEEDS[:3])
]


@pytest.mark.timing
@pytest.mark.parametrize(("request_", "deed"), CASES)
def test_i5_any_message_may_be_answered_in_any_way(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    request_: Request,
    deed: Deed,
) -> None:
    def handler(payload: object, fds: list[Fd]) -> None:
        assert back.channel is not None
        deed(back, back.channel, request_)

    back.instead[request_] = handler
    with pytest.raises(AirlockError):
        live(airlock, back, guest)
    guest.disconnect()
    airlock.join()
    airlock.assert_no_message_took_longer(LATE)
    lines = errors(caplog)
    assert lines
    assert all(line.startswith(("back-end: ", "VMM: ")) for line in lines), lines
    assert lines[0].startswith("back-end: "), lines
    assert_serves_the_next(airlock, back)


@pytest.mark.timing
def test_i10_back_that_answers_just_in_time_has_one_deadline_a_message(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """One message of the front can take many of ours: all within one time-out."""
    ended = threading.Event()
    for request in MESSAGES:

        def late(payload: Payload, fds: list[Fd], request: Request = request) -> Result:
            ended.wait(0.8 * TIMEOUT)
            return back.answer(request, payload, fds)

        back.instead[request] = late
    with contextlib.suppress(AirlockError):
        live(airlock, back, guest)
    guest.disconnect()
    ended.set()
    airlock.join()
    airlock.assert_no_message_took_longer(LATE)
    assert_serves_the_next(airlock, back)


@pytest.mark.parametrize("request_", MESSAGES, ids=lambda request: request.name)
def test_i5_any_message_may_be_refused(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    request_: Request,
) -> None:
    """With the reply that says no; a number of 1 where there is none."""

    def handler(payload: object, fds: list[Fd]) -> None:
        assert back.channel is not None
        rule = RULES[request_]
        refusal = rule.refusal.pack() if rule.refusal else U64(1).pack()
        back.channel.send(request_, refusal, flags=REPLY_FLAGS)
        hold(back)

    back.instead[request_] = handler
    with pytest.raises(AirlockError):
        live(airlock, back, guest)
    guest.disconnect()
    assert_serves_the_next(airlock, back)


# Numbers that make no sense.


@pytest.mark.parametrize(
    ("request_", "value", "text"),
    [
        (R.GET_FEATURES, 0, "lack VIRTIO_F_VERSION_1"),
        (R.GET_FEATURES, (1 << 64) - 1 - (1 << 32), "lack VIRTIO_F_VERSION_1"),
        (R.GET_MAX_MEM_SLOTS, 0, "GET_MAX_MEM_SLOTS: 0 are too few"),
        (R.GET_MAX_MEM_SLOTS, 1, "GET_MAX_MEM_SLOTS: 1 are too few"),
    ],
)
def test_back_that_is_of_no_use_is_named(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    request_: Request,
    value: int,
    text: str,
) -> None:
    back.instead[request_] = lambda _, fds: U64(value)
    with pytest.raises(AirlockError):
        live(airlock, back, guest)
    guest.disconnect()
    airlock.join()
    (line,) = errors(caplog)
    assert line.startswith("back-end: ")
    assert text in line
    assert_serves_the_next(airlock, back)


@pytest.mark.parametrize(
    ("request_", "value"),
    [
        (R.GET_FEATURES, (1 << 64) - 1),
        (R.GET_PROTOCOL_FEATURES, (1 << 64) - 1 - int(ProtocolFeature.BACKEND_REQ)),
        (R.GET_MAX_MEM_SLOTS, (1 << 64) - 1),
        (R.GET_QUEUE_NUM, (1 << 64) - 1),
    ],
)
def test_back_that_offers_everything_is_used_as_it_can_be(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    request_: Request,
    value: int,
) -> None:
    back.instead[request_] = lambda _, fds: U64(value)
    live(airlock, back, guest)


@pytest.mark.parametrize(
    "reply",
    [
        Config(0, 8, 0, b""),
        Config(0, 0, 0, b""),
        Config(4, 8, 0, bytes(8)),
        Config(0, 9, 0, bytes(9)),
        Config(0, 8, 0, bytes(4000)),
        Config(0, 0xFFFFFFFF, 0, bytes(8)),
        Config(0xFFFFFFFF, 8, 0, bytes(8)),
    ],
    ids=str,
)
def test_configuration_that_was_not_asked_for_is_not_passed_on(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest, reply: Config
) -> None:
    live(airlock, back, guest)
    back.instead[R.GET_CONFIG] = lambda asked, fds: reply
    channel = guest.front.channel
    asked = Config(0, 8, 0, bytes(8))
    channel.send(R.GET_CONFIG, asked.pack())
    with channel.recv() as answer:
        assert (answer.request, answer.payload) == (R.GET_CONFIG, b"")
    guest.start()
    serve(back, guest)


@pytest.mark.parametrize("base", [2, 0x7FFF, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_base_that_can_not_be_is_not_believed(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest, base: int
) -> None:
    guest.connect(airlock.channel())
    guest.start()
    serve(back, guest)
    back.instead[R.GET_VRING_BASE] = lambda state, fds: VringState(state.index, base)
    guest.stop()
    assert [queue.base for queue in guest.queues] == [1, 0]
    back.instead.clear()
    guest.start()
    serve(back, guest)


def test_base_of_another_ring_ends_the_session(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    guest.connect(airlock.channel())
    guest.start()
    back.instead[R.GET_VRING_BASE] = lambda _, fds: VringState(7, 0)
    with pytest.raises(AirlockError):
        guest.stop()
    assert_serves_the_next(airlock, back)


def test_i5_features_are_those_of_the_first_answer(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """A back that changes its mind confuses nobody."""
    answers = iter([int(RING_FEATURES), 0, 0, 0, 0, 0, 0, 0, 0, 0])
    back.instead[R.GET_FEATURES] = lambda _, fds: U64(next(answers, 0))
    live(airlock, back, guest)
    assert guest.front.get_features() & Feature.VERSION_1
    back.instead.clear()


# Deeds of a back when no request is out.


@pytest.mark.parametrize("deed", [hang_up, send_noise, ask_something])
def test_i5_back_may_do_anything_at_any_time(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    deed: Deed,
) -> None:
    guest.connect(airlock.channel())
    guest.start()
    io = guest.queues[0].submit(BlkType.FLUSH)
    guest.queues[0].kick()
    back.take()
    assert back.channel is not None
    if deed is hang_up:
        os.close(os.dup(back.channel.fileno()))
        with contextlib.suppress(OSError):
            shut(back.channel)
    else:
        with pytest.raises(Disconnected):
            deed(back, back.channel, R.GET_FEATURES)
    assert hung_up(guest.front.channel)
    airlock.join()
    assert io.status is None
    assert errors(caplog)[0].startswith("back-end: ")
    assert_serves_the_next(airlock, back)


def shut(channel: Channel) -> None:
    with socket.socket(fileno=os.dup(channel.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)
