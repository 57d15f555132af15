# SPDX-License-Identifier: Apache-2.0
"""The back-end's role: each request is checked, done, and answered as is due."""

import array
import contextlib
import os
import socket
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.profiles import FD_COUNTS, PROFILE
from tests.support.tables import each_row
from vhost_airlock.errors import (
    AirlockError,
    DeadlineExceeded,
    Disconnected,
    ProtocolError,
    RequestRefused,
    Stopped,
)
from vhost_airlock.vhost.backend import Backend, Handler, Responder
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, eventfd
from vhost_airlock.vhost.message import Answer
from vhost_airlock.vhost.rules import BACKEND_RULES, RULES, Ack
from vhost_airlock.vhost.wire import (
    U64,
    BackendRequest,
    Config,
    Empty,
    Header,
    HeaderFlag,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    VringFd,
    VringState,
)

R = Request
TIMEOUT = 0.05
VERSION, NEED_REPLY = HeaderFlag.VERSION, HeaderFlag.NEED_REPLY
ALL = ProtocolFeature((1 << 23) - 1)


def open_fds():
    return len(os.listdir("/proc/self/fd"))


class Front:
    """A front-end of bare bytes, before the back-end under test as `.backend`."""

    def __init__(self, responder=Backend, **more):
        self.fds_before = open_fds()
        self.sock, ours = socket.socketpair()
        self.handlers: dict[int, Handler] = {}
        self.backend = responder(
            Channel(ours, peer="front", timeout=TIMEOUT), self.handlers, **more
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.backend.channel.close()
        self.sock.close()
        if kind is None:
            assert open_fds() == self.fds_before

    def send(self, request, payload=b"", fds=(), flags=VERSION):
        control = []
        if fds:
            rights = array.array("i", fds)
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        data = Header(request, flags, len(payload)).pack() + payload
        assert self.sock.sendmsg([data], control) == len(data)

    def ask(self, request, payload=Empty(), fds=(), flags=VERSION):  # noqa: B008
        """Send a request, have it served, and return the bytes that came back."""
        self.send(request, payload.pack(), fds, flags)
        self.backend.handle_one(0)
        return self.received()

    def received(self):
        with contextlib.suppress(BlockingIOError):
            return self.sock.recv(5000, socket.MSG_DONTWAIT)
        return b""

    def negotiate(self, features):
        self.handlers[R.GET_PROTOCOL_FEATURES] = lambda payload, fds: U64(features)
        self.handlers[R.SET_PROTOCOL_FEATURES] = lambda payload, fds: None
        assert self.ask(R.GET_PROTOCOL_FEATURES) == reply(
            R.GET_PROTOCOL_FEATURES, U64(features)
        )
        assert self.ask(R.SET_PROTOCOL_FEATURES, U64(features)) == b""


def reply(request, payload):
    data = payload.pack()
    return Header(request, 0x5, len(data)).pack() + data


@pytest.fixture
def front():
    with Front() as front:
        yield front


@pytest.fixture
def null():
    with Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as fd:
        yield fd.fileno()


def done(payload, fds):
    """A handler that does nothing."""


def refuse(payload, fds):
    raise RequestRefused("no")


def test_a_handler_gets_the_decoded_payload(front):
    calls = []
    front.handlers[R.SET_VRING_NUM] = lambda payload, fds: calls.append((payload, fds))
    assert front.ask(R.SET_VRING_NUM, VringState(3, 128)) == b""
    assert calls == [(VringState(3, 128), [])]


def test_a_handlers_reply_is_sent(front):
    front.handlers[R.GET_FEATURES] = lambda payload, fds: U64(0x1234)
    assert front.ask(R.GET_FEATURES) == reply(R.GET_FEATURES, U64(0x1234))


def test_requests_are_served_in_order(front):
    front.handlers[R.GET_FEATURES] = lambda payload, fds: U64(1)
    front.handlers[R.GET_VRING_BASE] = lambda payload, fds: VringState(payload.index, 7)
    front.send(R.GET_VRING_BASE, VringState(2).pack())
    front.send(R.GET_FEATURES)
    front.backend.handle_one()
    front.backend.handle_one()
    assert front.received() == reply(R.GET_VRING_BASE, VringState(2, 7)) + reply(
        R.GET_FEATURES, U64(1)
    )


@pytest.mark.parametrize("features", [ProtocolFeature(0), ProtocolFeature.REPLY_ACK])
@pytest.mark.parametrize("flags", [VERSION, VERSION | NEED_REPLY])
def test_an_ack_is_sent_if_it_was_asked_for_and_agreed(front, features, flags):
    front.negotiate(features)
    front.handlers[R.SET_OWNER] = done
    due = features and flags & NEED_REPLY
    expected = reply(R.SET_OWNER, U64(0)) if due else b""
    assert front.ask(R.SET_OWNER, flags=flags) == expected


def test_what_a_front_end_remembers_is_served_and_acked_until_it_asks_anew():
    with Front(remembered=ProtocolFeature.STATUS) as front:
        front.handlers |= {R.SET_STATUS: done, R.SET_OWNER: done}
        flags = VERSION | NEED_REPLY
        acked = reply(R.SET_STATUS, U64(0))
        assert front.ask(R.SET_STATUS, U64(3), flags=flags) == acked
        assert front.ask(R.SET_STATUS, U64(3)) == b""
        assert front.ask(R.SET_OWNER, flags=flags) == b""
        front.negotiate(ProtocolFeature.MQ)
        with pytest.raises(ProtocolError, match=r"SET_STATUS needs .* STATUS"):
            front.ask(R.SET_STATUS, U64(3), flags=flags)


@pytest.mark.parametrize("features", [ProtocolFeature(0), ProtocolFeature.REPLY_ACK])
def test_need_reply_changes_nothing_for_a_request_with_a_reply(front, features):
    front.negotiate(features)
    front.handlers[R.GET_FEATURES] = lambda payload, fds: U64(5)
    answer = front.ask(R.GET_FEATURES, flags=VERSION | NEED_REPLY)
    assert answer == reply(R.GET_FEATURES, U64(5))


def test_the_request_that_switches_acks_on_is_acked(front):
    front.handlers[R.SET_PROTOCOL_FEATURES] = done
    flags = VERSION | NEED_REPLY
    features = U64(ProtocolFeature.REPLY_ACK)
    assert front.ask(R.SET_PROTOCOL_FEATURES, features, flags=flags) == reply(
        R.SET_PROTOCOL_FEATURES, U64(0)
    )
    assert front.ask(R.SET_PROTOCOL_FEATURES, U64(0), flags=flags) == b""
    assert front.backend.protocol_features == 0


def test_refused_protocol_features_are_not_in_use(front):
    front.handlers[R.SET_PROTOCOL_FEATURES] = refuse
    with pytest.raises(ProtocolError, match="front: can't be told no: no"):
        front.ask(R.SET_PROTOCOL_FEATURES, U64(ProtocolFeature.REPLY_ACK))
    assert front.backend.protocol_features == 0


def test_features_are_known_from_what_was_said(front):
    front.handlers[R.GET_PROTOCOL_FEATURES] = lambda payload, fds: U64(0x208)
    front.handlers[R.SET_PROTOCOL_FEATURES] = done
    front.ask(R.GET_PROTOCOL_FEATURES)
    assert front.backend.offered == 0x208
    assert front.backend.protocol_features == 0
    front.ask(R.SET_PROTOCOL_FEATURES, U64(0x8))
    assert front.backend.protocol_features is ProtocolFeature.REPLY_ACK


def test_what_was_offered_can_be_asked_for(front):
    """Front-ends of rust-vmm ask for the number of queues before they accept MQ."""
    front.handlers[R.GET_QUEUE_NUM] = lambda payload, fds: U64(4)
    with pytest.raises(ProtocolError, match=r"GET_QUEUE_NUM needs .* MQ"):
        front.ask(R.GET_QUEUE_NUM)
    front.handlers[R.GET_PROTOCOL_FEATURES] = lambda payload, fds: U64(1)
    front.ask(R.GET_PROTOCOL_FEATURES)
    assert front.ask(R.GET_QUEUE_NUM) == reply(R.GET_QUEUE_NUM, U64(4))


def test_the_log_is_echoed(front, null):
    front.negotiate(ProtocolFeature.LOG_SHMFD)
    front.handlers[R.SET_LOG_BASE] = done
    log = Log(4096, 8192)
    assert front.ask(R.SET_LOG_BASE, log, [null]) == reply(R.SET_LOG_BASE, log)


def test_an_iotlb_message_is_always_answered(front):
    front.handlers[R.IOTLB_MSG] = done
    message = Iotlb(1, 2, 3, 3, 2)
    assert front.ask(R.IOTLB_MSG, message) == reply(R.IOTLB_MSG, U64(0))
    front.handlers[R.IOTLB_MSG] = refuse
    assert front.ask(R.IOTLB_MSG, message) == reply(R.IOTLB_MSG, U64(1))


def test_a_refusal_is_acked_if_an_ack_is_due(front):
    front.negotiate(ProtocolFeature.REPLY_ACK)
    front.handlers[R.SET_FEATURES] = refuse
    answer = front.ask(R.SET_FEATURES, U64(1), flags=VERSION | NEED_REPLY)
    assert answer == reply(R.SET_FEATURES, U64(1))
    front.handlers[R.GET_FEATURES] = lambda payload, fds: U64(5)
    assert front.ask(R.GET_FEATURES) == reply(R.GET_FEATURES, U64(5))


def test_a_refusal_that_cannot_be_said_ends_the_connection(front):
    front.negotiate(ProtocolFeature.REPLY_ACK)
    front.handlers[R.SET_FEATURES] = refuse
    with pytest.raises(ProtocolError, match="front: can't be told no: no"):
        front.ask(R.SET_FEATURES, U64(1))
    assert front.received() == b""


@pytest.mark.parametrize(
    ("request_", "payload", "fds", "refusal"),
    [
        (R.GET_CONFIG, Config(0, 8, 0, bytes(8)), 0, Empty()),
        (R.GET_INFLIGHT_FD, Inflight(0, 0, 4, 128), 0, Inflight(0, 0, 0, 0)),
        (R.SET_DEVICE_STATE_FD, VringState(0), 1, U64(0x101)),
        (R.CHECK_DEVICE_STATE, Empty(), 0, U64(1)),
    ],
)
def test_a_refusal_is_the_reply_that_says_no(
    front, null, request_, payload, fds, refusal
):
    front.negotiate(ALL)
    assert front.ask(request_, payload, [null] * fds) == reply(request_, refusal)
    front.handlers[request_] = refuse
    assert front.ask(request_, payload, [null] * fds) == reply(request_, refusal)


@pytest.mark.parametrize("request_", [R.GET_FEATURES, R.GET_MAX_MEM_SLOTS])
def test_a_request_whose_reply_cannot_say_no_ends_the_connection(front, request_):
    front.negotiate(ALL)
    front.handlers[request_] = refuse
    with pytest.raises(ProtocolError, match="can't be told no"):
        front.ask(request_, flags=VERSION | NEED_REPLY)
    assert front.received() == b""


def test_a_request_without_a_handler_is_refused(front):
    front.negotiate(ALL)
    answer = front.ask(R.SEND_RARP, U64(1), flags=VERSION | NEED_REPLY)
    assert answer == reply(R.SEND_RARP, U64(1))
    with pytest.raises(ProtocolError, match="SEND_RARP isn't supported"):
        front.ask(R.SEND_RARP, U64(1))


@pytest.mark.parametrize("request_", [45, 1000, 2**32 - 1])
def test_a_request_that_nobody_knows_is_refused(front, null, request_):
    front.negotiate(ALL)
    payload, flags = U64(7), VERSION | NEED_REPLY
    assert front.ask(request_, payload, [null], flags) == reply(request_, U64(1))
    with pytest.raises(ProtocolError, match=f"request {request_} is unknown"):
        front.ask(request_, payload, [null])


def test_a_peer_cannot_fill_the_log_with_what_is_refused(front, caplog):
    front.negotiate(ALL)
    for request in (R.SEND_RARP, 45, 46, R.SEND_RARP, 45, 47):
        assert front.ask(request, U64(1), flags=VERSION | NEED_REPLY)
    assert [record.getMessage() for record in caplog.records] == [
        "front: refused: SEND_RARP isn't supported",
        "front: refused: request 45 is unknown",
    ]


def test_a_reply_from_the_front_is_no_request(front):
    front.handlers[R.SET_OWNER] = done
    with pytest.raises(ProtocolError, match="sent a reply"):
        front.ask(R.SET_OWNER, flags=0x5)


def test_a_broken_request_ends_the_connection_and_reaches_no_handler(front):
    front.negotiate(ALL)
    calls = []
    front.handlers[R.SET_VRING_ENABLE] = lambda *args: calls.append(args)
    front.send(R.SET_VRING_ENABLE, bytes(7), flags=VERSION | NEED_REPLY)
    with pytest.raises(ProtocolError, match=r"front: SET_VRING_ENABLE: .* 7 bytes"):
        front.backend.handle_one()
    assert calls == []
    assert front.received() == b""


def test_values_that_make_no_sense_are_refused_and_reach_no_handler(front, caplog):
    front.negotiate(ALL)
    calls = []
    front.handlers[R.SET_VRING_ENABLE] = lambda *args: calls.append(args)
    wrong = VringState(0, 2)
    assert front.ask(R.SET_VRING_ENABLE, wrong, flags=VERSION | NEED_REPLY) == reply(
        R.SET_VRING_ENABLE, U64(1)
    )
    assert caplog.messages == ["front: refused: SET_VRING_ENABLE: num is 2, not 0 to 1"]
    with pytest.raises(ProtocolError, match=r"can't be told no: .* num is 2"):
        front.ask(R.SET_VRING_ENABLE, wrong)
    assert calls == []


def test_a_handler_may_take_fds(front, null):
    taken = []
    front.handlers[R.SET_VRING_CALL] = lambda payload, fds: taken.append(fds.pop())
    front.ask(R.SET_VRING_CALL, VringFd(0), [null])
    (fd,) = taken
    assert os.path.sameopenfile(fd.fileno(), null)
    fd.close()


def test_what_a_handler_does_not_take_is_closed(front, null):
    seen = []
    front.handlers[R.SET_MEM_TABLE] = lambda payload, fds: seen.extend(fds)
    table = MemoryTable((MemoryRegion(0, 1, 2, 3),) * 3)
    front.ask(R.SET_MEM_TABLE, table, [null] * 3)
    assert [fd.closed for fd in seen] == [True] * 3


@pytest.mark.parametrize("error", [RequestRefused("no"), ProtocolError("x"), OSError()])
def test_fds_are_closed_when_the_handler_fails(front, null, error):
    def fail(payload, fds):
        raise error

    front.handlers[R.SET_VRING_CALL] = fail
    with pytest.raises((ProtocolError, OSError)):
        front.ask(R.SET_VRING_CALL, VringFd(0), [null])


def test_a_feature_that_was_accepted_without_asking_is_there(front):
    """Cloud Hypervisor does so when it connects again."""
    front.handlers[R.SET_PROTOCOL_FEATURES] = lambda payload, fds: None
    front.handlers[R.NET_SET_MTU] = lambda payload, fds: None
    accepted = ProtocolFeature.NET_MTU | ProtocolFeature.REPLY_ACK
    front.ask(R.SET_PROTOCOL_FEATURES, U64(accepted))
    found = front.ask(R.NET_SET_MTU, U64(1500), flags=VERSION | NEED_REPLY)
    assert found == reply(R.NET_SET_MTU, U64(0))


def test_an_answer_carries_fds_and_closes_them(front, null):
    front.negotiate(ProtocolFeature.INFLIGHT_SHMFD)
    copy = Fd.dup(null)
    inflight = Inflight(4096, 0, 1, 128)
    front.handlers[R.GET_INFLIGHT_FD] = lambda payload, fds: Answer(inflight, [copy])
    front.send(R.GET_INFLIGHT_FD, Inflight(0, 0, 1, 128).pack())
    front.backend.handle_one()
    assert copy.closed
    data, ((_, _, numbers),), _, _ = front.sock.recvmsg(100, 100)
    assert data == reply(R.GET_INFLIGHT_FD, inflight)
    (number,) = array.array("i", numbers)
    assert os.path.sameopenfile(number, null)
    os.close(number)


@pytest.mark.parametrize(
    ("request_", "result"),
    [
        (R.GET_FEATURES, None),
        (R.GET_FEATURES, VringState(0)),
        (R.SET_OWNER, U64(0)),
    ],
)
def test_a_handler_that_returns_the_wrong_thing_is_a_bug(front, request_, result):
    front.handlers[request_] = lambda payload, fds: result
    with pytest.raises(TypeError, match=f"request {int(request_)}"):
        front.ask(request_)


def test_a_handler_that_returns_too_many_fds_is_a_bug(front, null):
    copy = Fd.dup(null)
    front.handlers[R.GET_FEATURES] = lambda payload, fds: Answer(U64(1), [copy])
    with pytest.raises(TypeError, match="request 1"):
        front.ask(R.GET_FEATURES)
    assert copy.closed


def test_serve_until_the_front_leaves(front):
    calls = []
    front.handlers[R.SET_OWNER] = lambda payload, fds: calls.append(payload)
    front.send(R.SET_OWNER)
    front.send(R.SET_OWNER)
    front.sock.shutdown(socket.SHUT_WR)
    front.backend.serve()
    assert calls == [Empty(), Empty()]


def test_serve_ends_when_told_to_stop(front):
    with eventfd(1) as stop:
        front.backend.channel.stop = stop
        with pytest.raises(Stopped):
            front.backend.serve()


def test_serve_a_back_ends_own_requests():
    with Front(
        Responder,
        rules=BACKEND_RULES,
        features=ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK,
    ) as back:
        changes = []
        back.handlers[BackendRequest.CONFIG_CHANGE_MSG] = lambda payload, fds: (
            changes.append(payload)
        )
        assert back.ask(BackendRequest.CONFIG_CHANGE_MSG) == b""
        assert back.ask(
            BackendRequest.CONFIG_CHANGE_MSG, flags=VERSION | NEED_REPLY
        ) == reply(BackendRequest.CONFIG_CHANGE_MSG, U64(0))
        assert changes == [Empty()] * 2
        with pytest.raises(ProtocolError, match=r"VRING_CALL needs .*INBAND"):
            back.ask(BackendRequest.VRING_CALL, VringState(0))
        with pytest.raises(ProtocolError, match="request 0 is unknown"):
            back.ask(0)


# Serving without waiting.


@pytest.fixture
def asking():
    """A back-end as `.sock`, whose own requests are served without waiting."""
    features = ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
    with Front(Responder, rules=BACKEND_RULES, features=features) as back:
        back.changes = []
        back.handlers[BackendRequest.CONFIG_CHANGE_MSG] = lambda payload, fds: (
            back.changes.append(payload)
        )
        yield back


CHANGE = Header(BackendRequest.CONFIG_CHANGE_MSG, 0x9, 0).pack()
CHANGE_ACK = reply(BackendRequest.CONFIG_CHANGE_MSG, U64(0))


def test_what_has_come_is_served_one_by_one(asking):
    assert not asking.backend.handle_now()
    asking.sock.send(CHANGE * 2)
    assert asking.backend.handle_now()
    assert len(asking.changes) == 1
    assert asking.received() == CHANGE_ACK
    assert asking.backend.handle_now()
    assert not asking.backend.handle_now()
    assert asking.received() == CHANGE_ACK


def test_a_request_that_comes_byte_by_byte_is_served_when_it_is_whole(asking):
    for i in range(len(CHANGE)):
        assert not asking.backend.handle_now()
        assert asking.changes == []
        asking.sock.send(CHANGE[i : i + 1])
    assert asking.backend.handle_now()
    assert len(asking.changes) == 1
    assert asking.received() == CHANGE_ACK


def test_half_a_request_is_nobodys_business_but_its_senders(asking):
    """However often somebody looks; its descriptors are counted by the fixture."""
    asking.sock.send(CHANGE[:5])
    began = time.monotonic()
    for _ in range(100):
        assert not asking.backend.handle_now()
    assert time.monotonic() - began < 20 * TIMEOUT


def test_an_ack_for_which_there_is_no_room_is_not_waited_for(asking):
    asking.backend.channel.timeout = 100 * TIMEOUT
    with contextlib.suppress(BlockingIOError):
        while True:
            asking.backend.channel._sock.send(bytes(100), socket.MSG_DONTWAIT)
    asking.sock.send(CHANGE)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="did not read"):
        asking.backend.handle_now()
    assert time.monotonic() - began < 50 * TIMEOUT


def test_what_is_served_without_waiting_may_be_refused(asking):
    refused = BackendRequest.SHMEM_UNMAP
    data = bytes(BACKEND_RULES[refused].payload.MIN_SIZE)
    asking.send(refused, data, flags=VERSION | NEED_REPLY)
    assert asking.backend.handle_now()
    assert asking.received() == reply(refused, U64(1))
    asking.send(refused, data)
    with pytest.raises(ProtocolError, match="can't be told no"):
        asking.backend.handle_now()


@pytest.mark.parametrize("flags", [VERSION, VERSION | NEED_REPLY])
def test_c4_no_refusal_escapes(asking, flags):
    """Not even one that the handler got when it asked somebody else."""
    asking.handlers[BackendRequest.CONFIG_CHANGE_MSG] = refuse
    for serve in (asking.backend.handle_one, asking.backend.handle_now):
        asking.send(BackendRequest.CONFIG_CHANGE_MSG, flags=flags)
        if flags & NEED_REPLY:
            serve()
        else:
            with pytest.raises(ProtocolError, match="can't be told no"):
                serve()


@each_row(RULES)
def test_any_number_of_fds_with_any_request_leaks_none(request_, *, null):
    """F4."""
    rule = RULES[request_]
    for count in FD_COUNTS:
        with Front() as front:
            front.negotiate(ALL)
            front.handlers[request_] = done
            front.send(request_, bytes(rule.payload.MIN_SIZE), [null] * count, 0x9)
            with contextlib.suppress(ProtocolError, TypeError):
                front.backend.handle_one()


requests = st.one_of(st.sampled_from(list(Request)), st.integers(0, 60))
flags = st.sampled_from([VERSION, VERSION | NEED_REPLY, VERSION | NEED_REPLY, 5, 0])


@settings(PROFILE)
@given(
    st.lists(
        st.tuples(requests, flags, st.binary(max_size=50), st.integers(0, 40)),
        max_size=6,
    ),
    st.binary(max_size=20),
)
def test_whatever_a_front_sends_is_served_or_ends(messages, end):
    """No crash, no hang, no descriptor lost, and at most one reply a message."""
    with open(os.devnull) as null, Front() as front:
        front.negotiate(ALL)
        front.handlers.update(dict.fromkeys(Request, done))
        for name, rule in RULES.items():
            if rule.ack is Ack.REPLY:
                front.handlers[name] = refuse
        for request, flags, payload, count in messages:
            front.send(request, payload, [null.fileno()] * count, flags)
        if end:
            front.sock.send(end)
        front.sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ProtocolError):
            front.backend.serve()
        headers = replies(front.received())
        assert all(header.flags == 0x5 for header in headers)
        sent = iter(request for request, *_ in messages)
        assert all(header.request in sent for header in headers)


def replies(data):
    headers = []
    while data:
        headers.append(Header.unpack(data[:12]))
        data = data[12 + headers[-1].size :]
    return headers


def test_disconnect_is_told_to_whoever_serves_one(front):
    front.sock.close()
    with pytest.raises(Disconnected) as caught:
        front.backend.handle_one()
    assert isinstance(caught.value, AirlockError)
