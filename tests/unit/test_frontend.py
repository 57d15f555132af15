# SPDX-License-Identifier: Apache-2.0
"""The front-end's role: asks by the rules, and believes only the reply that is due."""

import array
import contextlib
import os
import select
import socket
import threading
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
    PeerRefused,
    ProtocolError,
    RequestRefused,
)
from vhost_airlock.vhost.backend import Backend
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import Fd, eventfd
from vhost_airlock.vhost.frontend import Frontend, Requester
from vhost_airlock.vhost.message import Answer
from vhost_airlock.vhost.rules import BACKEND_RULES, RULES
from vhost_airlock.vhost.wire import (
    U64,
    BackendRequest,
    Config,
    CryptoSession,
    DeviceState,
    Empty,
    Feature,
    Header,
    HeaderFlag,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    Request,
    SharedObject,
    ShmemConfig,
    StateDirection,
    VringAddr,
    VringFd,
    VringState,
)

R = Request
ALL = ProtocolFeature((1 << 23) - 1)
SOON = 0.05


def open_fds():
    return len(os.listdir("/proc/self/fd"))


class Answering(Channel):
    """A channel whose peer acts whenever something was sent to it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.act = lambda: None

    def send(self, *args, **kwargs):
        super().send(*args, **kwargs)
        self.act()


class Pair:
    """A front-end as `.front`, and the raw socket of its peer as `.sock`."""

    def __init__(self, features=ALL):
        self.fds_before = open_fds()
        ours, self.sock = socket.socketpair()
        self.channel = Answering(ours, peer="back")
        self.front = Frontend(self.channel, timeout=SOON)
        self.front.protocol_features = features

    def __enter__(self):
        return self

    def __exit__(self, kind, *exc):
        self.front.close()
        self.sock.close()
        if kind is None:
            assert open_fds() == self.fds_before

    def answers(self, *parts):
        """Have the peer answer the next request with these (bytes, fds)."""

        def act():
            for data, fds in parts:
                control = []
                if fds:
                    rights = array.array("i", fds)
                    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                assert self.sock.sendmsg([data], control) == len(data)

        self.channel.act = act

    def sent(self):
        """Return (header, payload) that the front-end sent meanwhile; None: none."""
        try:
            data = self.sock.recv(10000, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return Header.unpack(data[:12]), data[12:]

    def serve(self, handlers):
        """Have a `Backend` answer every request."""
        backend = Backend(Channel(self.sock, peer="front"), handlers)
        backend.offered = backend.protocol_features = self.front.protocol_features
        self.channel.act = backend.handle_one
        return backend


def message(request, payload=b"", flags=0x5):
    return Header(request, flags, len(payload)).pack() + payload


def ack(request, value=0):
    return message(request, U64(value).pack()), ()


@pytest.fixture
def pair():
    with Pair() as pair:
        yield pair


@pytest.fixture
def silent():
    """A pair without protocol features, so that nothing is acked."""
    with Pair(ProtocolFeature(0)) as pair:
        yield pair


@pytest.fixture
def null():
    with Fd(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) as fd:
        yield fd


REGION = MemoryRegion(0x1000, 0x2000, 0x3000, 0)
ADDR = VringAddr(1, 0, 0x1000, 0x2000, 0x3000)
IOTLB = Iotlb(1, 2, 3, 3, 2)
INFLIGHT = Inflight(4096, 0, 2, 128)
SHMEM = ShmemConfig(1, (4096,) + (0,) * 255)
STATE = DeviceState(StateDirection.LOAD)

# Each method of the front-end: the call, the request's name, its payload, the number of
# its fds, what the back-end's handler returns, and what the method then returns.
METHODS = [
    (lambda f, fd: f.get_features(), R.GET_FEATURES, Empty(), 0, U64(7), 7),
    (lambda f, fd: f.barrier(), R.GET_FEATURES, Empty(), 0, U64(7), None),
    (lambda f, fd: f.set_features(5), R.SET_FEATURES, U64(5), 0, None, None),
    (
        lambda f, fd: f.get_protocol_features(),
        R.GET_PROTOCOL_FEATURES,
        Empty(),
        0,
        U64(8),
        ProtocolFeature.REPLY_ACK,
    ),
    (lambda f, fd: f.set_owner(), R.SET_OWNER, Empty(), 0, None, None),
    (lambda f, fd: f.reset_owner(), R.RESET_OWNER, Empty(), 0, None, None),
    (lambda f, fd: f.reset_device(), R.RESET_DEVICE, Empty(), 0, None, None),
    (lambda f, fd: f.get_status(), R.GET_STATUS, Empty(), 0, U64(15), 15),
    (lambda f, fd: f.set_status(15), R.SET_STATUS, U64(15), 0, None, None),
    (
        lambda f, fd: f.get_config(4, 2),
        R.GET_CONFIG,
        Config(4, 2, 0, b"\0\0"),
        0,
        Config(4, 2, 0, b"ab"),
        b"ab",
    ),
    (
        lambda f, fd: f.set_config(4, b"ab", 1),
        R.SET_CONFIG,
        Config(4, 2, 1, b"ab"),
        0,
        None,
        None,
    ),
    (
        lambda f, fd: f.send_rarp(b"\x52\x54\0\x12\x34\x56"),
        R.SEND_RARP,
        U64.unpack(b"\x52\x54\0\x12\x34\x56\0\0"),
        0,
        None,
        None,
    ),
    (lambda f, fd: f.net_set_mtu(9000), R.NET_SET_MTU, U64(9000), 0, None, None),
    (
        lambda f, fd: f.create_crypto_session(CryptoSession(b"question")),
        R.CREATE_CRYPTO_SESSION,
        CryptoSession(b"question"),
        0,
        CryptoSession(b"response"),
        CryptoSession(b"response"),
    ),
    (
        lambda f, fd: f.close_crypto_session(3),
        R.CLOSE_CRYPTO_SESSION,
        U64(3),
        0,
        None,
        None,
    ),
    (
        lambda f, fd: f.get_shmem_config(),
        R.GET_SHMEM_CONFIG,
        Empty(),
        0,
        SHMEM,
        SHMEM,
    ),
    (
        lambda f, fd: f.set_backend_req_fd(fd),
        R.SET_BACKEND_REQ_FD,
        Empty(),
        1,
        None,
        None,
    ),
    (
        lambda f, fd: f.get_max_mem_slots(),
        R.GET_MAX_MEM_SLOTS,
        Empty(),
        0,
        U64(509),
        509,
    ),
    (
        lambda f, fd: f.set_mem_table([(REGION, fd)] * 3),
        R.SET_MEM_TABLE,
        MemoryTable((REGION,) * 3),
        3,
        None,
        None,
    ),
    (lambda f, fd: f.add_mem_region(REGION, fd), R.ADD_MEM_REG, REGION, 1, None, None),
    (lambda f, fd: f.remove_mem_region(REGION), R.REM_MEM_REG, REGION, 0, None, None),
    (lambda f, fd: f.iotlb(IOTLB), R.IOTLB_MSG, IOTLB, 0, None, None),
    (lambda f, fd: f.get_queue_num(), R.GET_QUEUE_NUM, Empty(), 0, U64(4), 4),
    (
        lambda f, fd: f.set_vring_num(1, 128),
        R.SET_VRING_NUM,
        VringState(1, 128),
        0,
        None,
        None,
    ),
    (lambda f, fd: f.set_vring_addr(ADDR), R.SET_VRING_ADDR, ADDR, 0, None, None),
    (
        lambda f, fd: f.set_vring_base(1, 7),
        R.SET_VRING_BASE,
        VringState(1, 7),
        0,
        None,
        None,
    ),
    (
        lambda f, fd: f.get_vring_base(1),
        R.GET_VRING_BASE,
        VringState(1),
        0,
        VringState(1, 9),
        9,
    ),
    *(
        (lambda f, fd, m=method: m(f, 2, fd), request, VringFd(2), 1, None, None)
        for method, request in [
            (Frontend.set_vring_kick, R.SET_VRING_KICK),
            (Frontend.set_vring_call, R.SET_VRING_CALL),
            (Frontend.set_vring_err, R.SET_VRING_ERR),
        ]
    ),
    (
        lambda f, fd: f.set_vring_call(2, None),
        R.SET_VRING_CALL,
        VringFd(2, nofd=True),
        0,
        None,
        None,
    ),
    (
        lambda f, fd: f.set_vring_enable(1, True),
        R.SET_VRING_ENABLE,
        VringState(1, 1),
        0,
        None,
        None,
    ),
    (
        lambda f, fd: f.set_vring_endian(1, False),
        R.SET_VRING_ENDIAN,
        VringState(1, 0),
        0,
        None,
        None,
    ),
    (lambda f, fd: f.vring_kick(1), R.VRING_KICK, VringState(1), 0, None, None),
    (
        lambda f, fd: f.set_log_base(4096, 8, fd),
        R.SET_LOG_BASE,
        Log(4096, 8),
        1,
        None,
        None,
    ),
    (lambda f, fd: f.set_log_fd(fd), R.SET_LOG_FD, Empty(), 1, None, None),
    (
        lambda f, fd: f.set_inflight_fd(INFLIGHT, fd),
        R.SET_INFLIGHT_FD,
        INFLIGHT,
        1,
        None,
        None,
    ),
    (
        lambda f, fd: f.set_device_state_fd(StateDirection.LOAD, fd),
        R.SET_DEVICE_STATE_FD,
        STATE,
        1,
        U64(0x100),
        None,
    ),
    (
        lambda f, fd: f.check_device_state(),
        R.CHECK_DEVICE_STATE,
        Empty(),
        0,
        None,
        None,
    ),
]


@pytest.mark.parametrize(
    ("call", "request_", "payload", "fds", "result", "returned"),
    METHODS,
    ids=[method[1].name for method in METHODS],
)
def test_a_method_is_its_request(
    pair, null, call, request_, payload, fds, result, returned
):
    seen = []

    def handler(payload, fds):
        seen.append(payload)
        assert all(os.path.sameopenfile(fd.fileno(), null.fileno()) for fd in fds)
        seen.append(len(fds))
        return result

    pair.serve({request_: handler})
    assert call(pair.front, null) == returned
    assert seen == [payload, fds]
    assert not null.closed


def test_every_request_has_a_method_or_is_left_to_exchange():
    tested = {method[1] for method in METHODS}
    assert set(Request) - tested == {
        R.SET_PROTOCOL_FEATURES,  # the tests of negotiation
        R.GET_INFLIGHT_FD,  # the tests of fds that come back
        R.GET_SHARED_OBJECT,
        R.NONE,  # what follows has no method
        R.POSTCOPY_ADVISE,
        R.POSTCOPY_LISTEN,
        R.POSTCOPY_END,
        R.GPU_SET_SOCKET,
    }


def test_exchange_does_what_has_no_method(pair, null):
    pair.serve({R.GPU_SET_SOCKET: lambda payload, fds: None})
    assert pair.front.exchange(R.GPU_SET_SOCKET, fds=[null]).payload == U64(0)


def test_negotiation_takes_what_both_want(silent):
    offered = ProtocolFeature.REPLY_ACK | ProtocolFeature.MQ
    backend = silent.serve(
        {
            R.GET_PROTOCOL_FEATURES: lambda payload, fds: U64(offered),
            R.SET_PROTOCOL_FEATURES: lambda payload, fds: None,
        }
    )
    wanted = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
    assert silent.front.negotiate(wanted) is ProtocolFeature.REPLY_ACK
    assert silent.front.protocol_features is ProtocolFeature.REPLY_ACK
    assert backend.protocol_features is ProtocolFeature.REPLY_ACK


def test_protocol_features_are_set_without_an_ack(silent):
    silent.front.set_protocol_features(ProtocolFeature.REPLY_ACK)
    header, _ = silent.sent()
    assert header.flags == HeaderFlag.VERSION


def test_features_with_device_bits_pass(pair):
    features = 2**63 | 1 | Feature.VERSION_1
    pair.answers((message(R.GET_FEATURES, U64(features).pack()), ()))
    assert pair.front.get_features() == features


def test_an_ack_is_asked_for_when_acks_are_in_use(pair):
    pair.answers(ack(R.SET_OWNER))
    pair.front.set_owner()
    assert pair.sent() == (Header(R.SET_OWNER, 0x9, 0), b"")


def test_without_acks_nobody_waits(silent):
    silent.front.set_owner()
    assert silent.sent() == (Header(R.SET_OWNER, 0x1, 0), b"")


def test_need_reply_can_be_left_out(pair):
    pair.front.exchange(R.RESET_DEVICE, need_reply=False)
    assert pair.sent() == (Header(R.RESET_DEVICE, 0x1, 0), b"")


def test_need_reply_is_not_set_where_a_reply_comes_anyway(pair):
    pair.answers((message(R.GET_FEATURES, U64(1).pack()), ()))
    pair.front.get_features()
    header, _ = pair.sent()
    assert header.flags == 0x1


def test_an_iotlb_message_asks_for_its_answer_always(silent):
    """Some back-ends answer it only when need_reply is set, REPLY_ACK or not."""
    silent.answers(ack(R.IOTLB_MSG))
    silent.front.iotlb(IOTLB)
    header, _ = silent.sent()
    assert header.flags == 0x9


@pytest.mark.parametrize("value", [1, 2**64 - 1])
def test_an_ack_that_says_no_names_request_and_value(pair, value):
    pair.answers(ack(R.SET_VRING_NUM, value))
    with pytest.raises(PeerRefused, match=f"back: SET_VRING_NUM refused: .*{value}"):
        pair.front.set_vring_num(0, 128)
    pair.answers(ack(R.SET_OWNER))
    pair.front.set_owner()


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        (lambda f: f.net_set_mtu(1), R.NET_SET_MTU),
        (lambda f: f.set_config(0, b"a"), R.SET_CONFIG),
    ],
)
def test_what_a_sound_back_end_may_refuse_ends_only_the_request(pair, call, request_):
    pair.answers(ack(request_, 1))
    with pytest.raises(RequestRefused, match=request_.name):
        call(pair.front)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        Config(0, 0).pack(),
        Config(0, 8).pack(),
        Config(0, 4, 0, bytes(4)).pack(),
        Config(4, 8, 0, bytes(8)).pack(),
        Config(0, 8, 0, bytes(9)).pack(),
        Config(0, 2**32 - 1, 0, bytes(8)).pack(),
    ],
)
def test_a_config_that_is_not_what_was_asked_for_ends_only_the_request(pair, reply):
    pair.answers((message(R.GET_CONFIG, reply), ()))
    with pytest.raises(RequestRefused, match="GET_CONFIG"):
        pair.front.get_config(0, 8)
    pair.answers(ack(R.SET_OWNER))
    pair.front.set_owner()


def test_a_request_that_needs_a_feature_is_not_sent_without_it(silent):
    with pytest.raises(
        RequestRefused, match="GET_CONFIG needs protocol feature CONFIG"
    ):
        silent.front.get_config(0, 8)
    assert silent.sent() is None


def test_a_vring_base_is_of_the_vring_that_was_asked_for(pair):
    pair.answers((message(R.GET_VRING_BASE, VringState(1, 5).pack()), ()))
    with pytest.raises(ProtocolError, match="GET_VRING_BASE of 0"):
        pair.front.get_vring_base(0)


def test_a_crypto_session_keeps_its_size(pair):
    pair.answers((message(R.CREATE_CRYPTO_SESSION, b"9 bytes.."), ()))
    with pytest.raises(ProtocolError, match="9 bytes came back of 8"):
        pair.front.create_crypto_session(CryptoSession(b"question"))


# Replies with fds.


def test_an_fd_that_comes_back_is_the_callers(pair, null):
    copies = [Fd.dup(null)]
    pair.serve({R.GET_INFLIGHT_FD: lambda payload, fds: Answer(INFLIGHT, copies)})
    inflight, fd = pair.front.get_inflight_fd(2, 128)
    with fd:
        assert inflight == INFLIGHT
        assert os.path.sameopenfile(fd.fileno(), null.fileno())


def test_a_shared_object_is_its_fd(pair, null):
    copies = [Fd.dup(null)]
    pair.serve(
        {R.GET_SHARED_OBJECT: lambda payload, fds: Answer(SharedObject(), copies)}
    )
    with pair.front.get_shared_object(bytes(16)) as fd:
        assert os.path.sameopenfile(fd.fileno(), null.fileno())


def test_a_back_end_may_bring_its_own_fd_for_the_state(pair, null):
    copies = [Fd.dup(null)]
    pair.serve({R.SET_DEVICE_STATE_FD: lambda payload, fds: Answer(U64(0), copies)})
    with pair.front.set_device_state_fd(StateDirection.SAVE, null) as fd:
        assert os.path.sameopenfile(fd.fileno(), null.fileno())


@pytest.mark.parametrize("value", [0x101, 0x1FF, 0x1, 0x7])
def test_a_state_that_cannot_be_transferred_is_refused(pair, null, value):
    pair.answers((message(R.SET_DEVICE_STATE_FD, U64(value).pack()), [null.fileno()]))
    with pytest.raises(PeerRefused, match="SET_DEVICE_STATE_FD"):
        pair.front.set_device_state_fd(StateDirection.SAVE, null)


@pytest.mark.parametrize(
    ("call", "request_", "payload"),
    [
        (lambda f, fd: f.get_inflight_fd(2, 128), R.GET_INFLIGHT_FD, INFLIGHT),
        (
            lambda f, fd: f.get_inflight_fd(2, 8),
            R.GET_INFLIGHT_FD,
            Inflight(0, 0, 0, 0),
        ),
        (
            lambda f, fd: f.get_shared_object(bytes(16)),
            R.GET_SHARED_OBJECT,
            SharedObject(bytes(16)),
        ),
        (
            lambda f, fd: f.get_shared_object(bytes(16)),
            R.GET_SHARED_OBJECT,
            SharedObject(),
        ),
        (lambda f, fd: f.set_device_state_fd(0, fd), R.SET_DEVICE_STATE_FD, U64(0)),
    ],
)
def test_an_fd_that_is_missing_is_an_error(pair, null, call, request_, payload):
    pair.answers((message(request_, payload.pack()), ()))
    with pytest.raises(ProtocolError, match=request_.name):
        call(pair.front, null)


@each_row(RULES)
def test_fds_that_may_not_come_back_are_closed(request_, *, null):
    """F4, from the other side."""
    rule = RULES[request_]
    for count in FD_COUNTS[1:]:
        with Pair() as pair:
            payload = bytes(rule.reply.MIN_SIZE)
            pair.answers((message(request_, payload), [null.fileno()] * count))
            sent = rule.payload.unpack(bytes(rule.payload.MIN_SIZE))
            if count in rule.reply_fds:
                pair.front.exchange(request_, sent).close()
            else:
                with pytest.raises(ProtocolError, match="fds"):
                    pair.front.exchange(request_, sent)


# Replies that are not the one that is due.


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (message(R.SET_OWNER, U64(1).pack()), "message 3 with flags 0x5"),
        (message(0, U64(1).pack()), "message 0"),
        (message(2**32 - 1, U64(1).pack()), "message 4294967295"),
        (message(R.GET_FEATURES, U64(1).pack(), 0x1), "flags 0x1"),
        (message(R.GET_FEATURES, U64(1).pack(), 0xD), "flags 0xd"),
        (message(R.GET_FEATURES, U64(1).pack(), 0x4), "flags 0x4"),
        (message(R.GET_FEATURES, U64(1).pack(), 0x6), "flags 0x6"),
        (message(R.GET_FEATURES, U64(1).pack(), 0x15), "flags 0x15"),
        (message(R.GET_FEATURES), "U64 has 0 bytes"),
        (message(R.GET_FEATURES, bytes(7)), "U64 has 7 bytes"),
        (message(R.GET_FEATURES, bytes(9)), "9 bytes, at most 8"),
        (Header(R.GET_FEATURES, 5, 2**32 - 1).pack(), "at most 8"),
    ],
)
def test_a_reply_that_is_not_due_is_an_error(pair, reply, error):
    pair.answers((reply, ()))
    with pytest.raises(ProtocolError, match=error):
        pair.front.get_features()
    pair.answers((message(R.GET_FEATURES, U64(1).pack()), ()))
    with pytest.raises(AirlockError):
        pair.front.get_features()


@pytest.mark.timing
def test_no_reply_is_waited_for_in_vain(pair):
    start = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"^back: did not answer in time \(GET_FEATURES\)$"
    ):
        pair.front.get_features()
    assert time.monotonic() - start < 100 * SOON


def test_a_time_of_its_own(pair):
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        pair.front.get_vring_base(0, timeout=4 * SOON)
    assert time.monotonic() - start >= 4 * SOON


def test_half_a_reply_is_waited_for_in_vain(pair):
    pair.answers((message(R.GET_FEATURES, U64(1).pack())[:15], ()))
    with pytest.raises(DeadlineExceeded):
        pair.front.get_features()


def test_after_a_reply_that_never_came_nothing_more_is_asked(pair):
    """Or the late reply would be taken for the next one."""
    with pytest.raises(DeadlineExceeded):
        pair.front.get_features()
    with pytest.raises(ProtocolError, match="back: owes the reply to GET_FEATURES"):
        pair.front.get_features()
    assert pair.front.owed_until is None, "nobody is to collect it"


def test_a_peer_that_hangs_up_instead_is_a_disconnect(pair):
    pair.channel.act = pair.sock.close
    with pytest.raises(Disconnected):
        pair.front.get_features()


def test_a_reply_that_came_before_its_request_is_not_taken(pair):
    pair.sock.send(message(R.GET_FEATURES, U64(1).pack()))
    with pytest.raises(ProtocolError, match="bytes to no request"):
        pair.front.get_features()
    assert pair.sent() is None


def test_bytes_behind_a_reply_are_noticed_with_the_next_request(pair):
    pair.answers((message(R.GET_FEATURES, U64(1).pack()) + b"x", ()))
    assert pair.front.get_features() == 1
    with pytest.raises(ProtocolError, match="bytes to no request"):
        pair.front.get_features()


def test_one_can_wait_for_what_nobody_asked_for(pair):
    assert select.select([pair.front], [], [], 0) == ([], [], [])
    pair.sock.send(b"x")
    assert select.select([pair.front], [], [], 10)[0] == [pair.front]


def test_unsolicited_tells_what_became_of_an_idle_peer(pair, null):
    pair.front.unsolicited()
    pair.answers((b"x", [null.fileno()]))
    pair.channel.act()
    with pytest.raises(ProtocolError, match="back: sent bytes to no request"):
        pair.front.unsolicited()


def test_unsolicited_tells_that_an_idle_peer_is_gone(pair):
    pair.sock.close()
    with pytest.raises(Disconnected):
        pair.front.unsolicited()


# The time of several exchanges together.


class Peer(threading.Thread):
    """Answers requests with a success, each as `answer` does it."""

    def __init__(self, sock, answer):
        super().__init__()
        self.sock = sock
        self.answer = answer
        self.served = 0

    def run(self):
        channel = Channel(self.sock.dup(), peer="front", timeout=100 * SOON)
        with channel, contextlib.suppress(AirlockError, OSError):
            while True:
                with channel.recv() as asked:
                    self.answer(self.sock, ack(asked.request)[0])
                    self.served += 1


def just_in_time(sock, data):
    time.sleep(0.8 * SOON)
    sock.send(data)


def byte_by_byte(sock, data):
    for i in range(len(data)):
        time.sleep(0.8 * SOON / len(data))
        sock.send(data[i : i + 1])


def never(sock, data):
    pass


@contextlib.contextmanager
def answering(pair, answer):
    peer = Peer(pair.sock, answer)
    peer.start()
    try:
        yield peer
    finally:
        pair.sock.shutdown(socket.SHUT_RDWR)
        peer.join()


def ask_until_it_ends(front):
    """Exchange after exchange; returns how many there were, and how long they took."""
    began = time.monotonic()
    for count in range(100):
        try:
            front.set_owner()
        except DeadlineExceeded:
            return count, time.monotonic() - began
    raise AssertionError("there is no end")


@pytest.mark.parametrize("answer", [just_in_time, byte_by_byte, never])
def test_several_exchanges_have_one_deadline(pair, answer):
    """X1: each answer is in time, and together they are not."""
    with answering(pair, answer):
        pair.front.timeout = 100 * SOON
        pair.front.until = time.monotonic() + 3 * SOON
        count, took = ask_until_it_ends(pair.front)
        assert count <= 3
        assert took < 20 * SOON


def test_when_no_time_is_left_nothing_is_asked(pair):
    pair.front.until = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="left no time for SET_OWNER"):
        pair.front.set_owner()
    assert pair.sent() is None
    pair.front.until = None
    pair.answers(ack(R.SET_OWNER))
    pair.front.set_owner()


def test_a_later_deadline_gives_no_exchange_more_time(pair):
    pair.front.until = time.monotonic() + 100 * SOON
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        pair.front.set_owner()
    assert time.monotonic() - began < 50 * SOON


@pytest.mark.parametrize("stopped", [False, True])
def test_c9_stop_leaves_an_exchange_alone(pair, stopped):
    with eventfd(int(stopped)) as stop, answering(pair, just_in_time):
        pair.front.timeout = 100 * SOON
        pair.channel.stop = stop
        pair.front.set_owner()
        pair.channel.stop = None


# Replies that are collected later.


class Grown:
    """A posted ADD_MEM_REG, and as `.answers` what came of it."""

    def __init__(self, pair, fd, timeout=None):
        self.answers: list[Answer] = []
        pair.front.post(
            R.ADD_MEM_REG, REGION, [fd], self.answers.append, timeout=timeout
        )


@pytest.fixture
def posted(pair, null):
    grown = Grown(pair, null, 4 * SOON)
    data, control, _, _ = pair.sock.recvmsg(1000, 1000)
    assert data == message(R.ADD_MEM_REG, REGION.pack(), 0x9)
    for number in array.array("i", control[0][2]):
        os.close(number)
    return grown


def test_a_posted_request_is_not_waited_for(pair, posted):
    assert posted.answers == []
    left = pair.front.owed_until - time.monotonic()
    assert 2 * SOON < left <= 4 * SOON
    pair.front.collect()
    assert posted.answers == []


def test_the_reply_to_a_posted_request_is_collected_as_it_comes(pair, posted):
    data, _ = ack(R.ADD_MEM_REG)
    for i in range(len(data)):
        pair.front.collect()
        assert posted.answers == []
        pair.sock.send(data[i : i + 1])
    pair.front.collect()
    assert [answer.payload for answer in posted.answers] == [U64(0)]
    assert pair.front.owed_until is None
    pair.front.collect()
    pair.answers(ack(R.SET_OWNER))
    pair.front.set_owner()
    assert len(posted.answers) == 1


@pytest.mark.parametrize("size", [0, 1, 12, 19, 20])
def test_an_exchange_first_takes_the_reply_that_is_owed(pair, posted, size):
    """However much of it was collected."""
    data, _ = ack(R.ADD_MEM_REG)
    pair.sock.send(data[:size])
    pair.front.collect()
    pair.sock.send(data[size:])
    pair.answers(ack(R.SET_OWNER))
    pair.front.set_owner()
    assert len(posted.answers) == 1


def test_an_exchange_waits_for_the_reply_that_is_owed(pair, posted):
    timer = threading.Timer(SOON / 2, pair.sock.send, [ack(R.ADD_MEM_REG)[0]])
    pair.answers(ack(R.SET_OWNER))
    timer.start()
    pair.front.set_owner()
    timer.join()
    assert len(posted.answers) == 1


def test_an_exchange_waits_for_the_owed_reply_in_its_own_time(pair, posted):
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"in time \(ADD_MEM_REG\)"):
        pair.front.set_owner()
    assert time.monotonic() - began < 3 * SOON
    assert posted.answers == []
    assert pair.sent() is None, "it would be out of step"


def test_an_exchange_waits_for_the_owed_reply_until_that_is_due(pair, null):
    Grown(pair, null, SOON)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"in time \(ADD_MEM_REG\)"):
        pair.front.get_vring_base(0, timeout=50 * SOON)
    assert time.monotonic() - began < 25 * SOON


def test_a_reply_that_never_comes_is_an_end_at_its_deadline(pair, null):
    Grown(pair, null, 2 * SOON)
    pair.sock.send(ack(R.ADD_MEM_REG)[0][:19])
    with pytest.raises(DeadlineExceeded, match=r"in time \(ADD_MEM_REG\)"):
        collect_for(pair.front, 50 * SOON)


def collect_for(front, seconds):
    """Collect over and over; what was owed is due long before the end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        front.collect()


def test_one_reply_may_be_owed_at_a_time(pair, posted, null):
    with pytest.raises(RequestRefused, match="REM_MEM_REG: the reply to ADD_MEM_REG"):
        pair.front.post(R.REM_MEM_REG, REGION, [], posted.answers.append)
    assert pair.sent() is None


def test_without_acks_a_posted_request_is_done_at_once(null):
    with Pair(ProtocolFeature.CONFIGURE_MEM_SLOTS) as pair:
        grown = Grown(pair, null)
        assert [answer.payload for answer in grown.answers] == [Empty()]
        assert pair.front.owed_until is None
        pair.front.collect()


def test_a_posted_request_that_needs_a_feature_is_not_sent_without_it(silent, null):
    with pytest.raises(RequestRefused, match="CONFIGURE_MEM_SLOTS"):
        Grown(silent, null)
    assert silent.sent() is None


def test_a_posted_request_does_not_wait_for_room(pair, null):
    fill(pair.channel)
    began = time.monotonic()
    pair.front.timeout = 100 * SOON
    with pytest.raises(DeadlineExceeded, match="did not read"):
        Grown(pair, null)
    assert time.monotonic() - began < 50 * SOON
    assert pair.front.owed_until is None


def fill(channel):
    """Send until nothing more fits."""
    with (
        socket.socket(fileno=os.dup(channel.fileno())) as sock,
        contextlib.suppress(BlockingIOError),
    ):
        while True:
            sock.send(bytes(100), socket.MSG_DONTWAIT)


@pytest.mark.parametrize("collects", [True, False])
def test_a_posted_request_that_is_refused_is_nobodys_answer(pair, posted, collects):
    """NET_SET_MTU may be refused; it is not what the back-end said no to."""
    pair.sock.send(ack(R.ADD_MEM_REG, 5)[0])
    act = pair.front.collect if collects else lambda: pair.front.net_set_mtu(1500)
    with pytest.raises(ProtocolError, match=r"ADD_MEM_REG refused: .*5") as caught:
        act()
    assert not isinstance(caught.value, PeerRefused)
    assert posted.answers == []


@pytest.mark.parametrize(
    "data",
    [
        message(R.REM_MEM_REG, U64(0).pack()),
        message(R.ADD_MEM_REG, U64(0).pack(), 0x1),
        message(R.ADD_MEM_REG, bytes(7)),
        message(R.ADD_MEM_REG, bytes(9)),
        message(R.GET_FEATURES, bytes(8)),
    ],
)
@pytest.mark.parametrize("collects", [True, False])
def test_what_is_not_the_owed_reply_is_an_error(pair, posted, data, collects):
    pair.sock.send(data)
    with pytest.raises(ProtocolError):
        pair.front.collect() if collects else pair.front.set_owner()
    assert posted.answers == []


def test_bytes_behind_the_owed_reply_are_noticed(pair, posted):
    pair.sock.send(ack(R.ADD_MEM_REG)[0] + b"x")
    pair.front.collect()
    with pytest.raises(ProtocolError, match="bytes to no request"):
        pair.front.collect()


def test_a_peer_that_hangs_up_while_it_owes_is_a_disconnect(pair, posted):
    pair.sock.close()
    with pytest.raises(Disconnected):
        pair.front.collect()


def test_with_nothing_owed_all_that_comes_is_unsolicited(pair):
    pair.front.collect()
    pair.sock.send(ack(R.ADD_MEM_REG)[0])
    with pytest.raises(ProtocolError, match="bytes to no request"):
        pair.front.collect()


def test_connect(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with Frontend.connect(path) as front, listener.accept()[0] as sock:
            front.set_owner()
            assert sock.recv(100) == Header(R.SET_OWNER, 1, 0).pack()


def test_connect_to_nothing_is_a_disconnect(tmp_path):
    with pytest.raises(Disconnected, match="can't connect"):
        Frontend.connect(str(tmp_path / "absent"))


def test_a_back_end_can_ask_its_front_end():
    ours, sock = socket.socketpair()
    features = ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
    channel = Answering(ours, peer="front")
    with sock, Requester(channel, BACKEND_RULES, features, SOON) as back:
        channel.act = lambda: sock.sendall(ack(BackendRequest.CONFIG_CHANGE_MSG)[0])
        back.exchange(BackendRequest.CONFIG_CHANGE_MSG)
        assert sock.recv(100) == message(BackendRequest.CONFIG_CHANGE_MSG, flags=9)


replies = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.builds(
        lambda request, flags, payload: message(request, payload, flags),
        st.sampled_from(list(Request)),
        st.sampled_from([5, 5, 5, 1, 0xD]),
        st.binary(max_size=60),
    ),
)


@settings(PROFILE)
@given(
    st.sampled_from([method[0] for method in METHODS]),
    st.lists(st.tuples(replies, st.integers(0, 40)), max_size=3),
)
def test_whatever_a_back_end_answers_there_is_an_end(call, answers):
    """No crash, no hang, no descriptor lost."""
    with Fd(os.open("/dev/null", os.O_RDWR)) as null, Pair() as pair:
        pair.answers(*[(data, [null.fileno()] * count) for data, count in answers])
        pair.front.timeout = 0.002
        with contextlib.suppress(AirlockError):
            result = call(pair.front, null)
            if isinstance(result, Fd):
                result.close()
