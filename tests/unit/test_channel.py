# SPDX-License-Identifier: Apache-2.0
"""Channels: whole messages or none, no descriptor lost, no wait without an end."""

import array
import contextlib
import itertools
import os
import select
import signal
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.limits import no_more_fds
from tests.support.profiles import PROFILE
from vhost_airlock.errors import (
    BackLost,
    DeadlineExceeded,
    Disconnected,
    FrontLost,
    ProtocolError,
    SessionError,
    Stopped,
)
from vhost_airlock.vhost.channel import Channel
from vhost_airlock.vhost.fds import drain, eventfd, notify
from vhost_airlock.vhost.wire import MAX_FDS, MAX_PAYLOAD, Header, HeaderFlag

SOON = 0.05
GET_FEATURES = Header(1, 1, 0).pack()


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def send_raw(sock, data, fds=()):
    """Send bytes with descriptors, as any peer can."""
    control = []
    if fds:
        rights = array.array("i", fds)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    assert sock.sendmsg([data], control) == len(data)


def soon():
    return time.monotonic() + SOON


@pytest.fixture
def peer():
    """A bare socket, and beside it as `.channel` the channel under test."""
    with Peer() as peer:
        yield peer


class Peer:
    """The other end of a channel, which can send whatever it likes."""

    def __enter__(self):
        self.fds_before = open_fds()
        self.sock, ours = socket.socketpair()
        self.channel = Channel(ours, peer="back", timeout=SOON)
        return self

    def __exit__(self, kind, *exc):
        self.channel.close()
        self.sock.close()
        if kind is None:
            assert open_fds() == self.fds_before


@pytest.fixture
def null():
    number = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    yield number
    os.close(number)


def test_a_message_leaves_in_one_piece(peer, null):
    peer.channel.send(12, b"12345678", [null, null])
    data, control, _, _ = peer.sock.recvmsg(100, 100)
    assert data == Header(12, HeaderFlag.VERSION, 8).pack() + b"12345678"
    ((level, kind, numbers),) = control
    assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    received = array.array("i", numbers)
    assert [os.path.sameopenfile(number, null) for number in received] == [True] * 2
    for number in received:
        os.close(number)


def test_a_message_arrives_with_its_fds(peer, null):
    send_raw(peer.sock, Header(37, 0x9, 3).pack() + b"abc", [null])
    with peer.channel.recv() as message:
        assert (message.request, message.payload) == (37, b"abc")
        assert message.need_reply
        assert not message.reply
        (fd,) = message.fds
        assert os.path.sameopenfile(fd.fileno(), null)
        assert not os.get_inheritable(fd.fileno())


def test_a_message_keeps_what_nobody_took_and_closes_it(peer, null):
    send_raw(peer.sock, GET_FEATURES, [null, null])
    with peer.channel.recv() as message:
        taken, left = message.fds.pop(0), message.fds[0]
    assert left.closed
    assert message.fds == []
    assert os.path.sameopenfile(taken.fileno(), null)
    taken.close()


def test_messages_are_told_apart(peer, null):
    send_raw(peer.sock, GET_FEATURES + Header(2, 1, 1).pack() + b"x" + GET_FEATURES)
    assert [peer.channel.recv(soon()).request for _ in range(3)] == [1, 2, 1]
    assert not peer.channel.pending()


def test_fds_belong_to_the_message_with_which_they_came(peer, null):
    send_raw(peer.sock, GET_FEATURES)
    send_raw(peer.sock, GET_FEATURES, [null])
    send_raw(peer.sock, GET_FEATURES)
    counts = []
    for _ in range(3):
        with peer.channel.recv(soon()) as message:
            counts.append(len(message.fds))
    assert counts == [0, 1, 0]


def test_a_message_may_come_byte_by_byte(peer, null):
    data = Header(5, 1, 6).pack() + b"abcdef"

    def trickle():
        send_raw(peer.sock, data[:1], [null])
        for i in range(1, len(data)):
            peer.sock.send(data[i : i + 1])

    thread = threading.Thread(target=trickle)
    thread.start()
    with peer.channel.recv() as message:
        assert message.payload == b"abcdef"
        assert len(message.fds) == 1
    thread.join()


@pytest.mark.parametrize("place", range(1, 18))
def test_fds_in_the_middle_of_a_message_are_closed_and_refused(peer, null, place):
    data = Header(5, 1, 6).pack() + b"abcdef"
    send_raw(peer.sock, data[:place])
    send_raw(peer.sock, data[place:], [null])
    with pytest.raises(ProtocolError, match=r"back: .*in the middle"):
        peer.channel.recv()


@pytest.mark.parametrize("count", [*range(1, 5), MAX_FDS - 1, MAX_FDS])
def test_as_many_fds_as_a_message_can_have_arrive(peer, null, count):
    send_raw(peer.sock, GET_FEATURES, [null] * count)
    with peer.channel.recv() as message:
        assert len(message.fds) == count


@pytest.mark.parametrize("count", [MAX_FDS + 1, MAX_FDS + 2, 100, 253])
def test_too_many_fds_are_closed_and_refused(peer, null, count):
    send_raw(peer.sock, GET_FEATURES, [null] * count)
    with pytest.raises(ProtocolError, match="more fds than we can take"):
        peer.channel.recv()


def test_fds_for_which_the_process_has_no_room_are_refused(peer, null):
    send_raw(peer.sock, GET_FEATURES, [null] * 4)
    with (
        no_more_fds(room=2),
        pytest.raises(ProtocolError, match="more fds than we can take"),
    ):
        peer.channel.recv()


def test_a_closed_peer_is_a_disconnect(peer):
    peer.sock.close()
    with pytest.raises(Disconnected, match=r"back: closed the connection before"):
        peer.channel.recv()


def test_what_a_peer_said_before_it_left_is_heard(peer):
    send_raw(peer.sock, GET_FEATURES)
    peer.sock.close()
    assert peer.channel.recv().request == 1
    with pytest.raises(Disconnected, match=r"back: closed the connection$"):
        peer.channel.recv()
    with pytest.raises(Disconnected):
        peer.channel.recv()


@pytest.mark.parametrize("size", range(1, 18))
def test_a_peer_that_leaves_in_the_middle_is_a_disconnect(peer, null, size):
    send_raw(peer.sock, (Header(5, 1, 6).pack() + b"abcdef")[:size], [null])
    peer.sock.close()
    with pytest.raises(Disconnected, match="in the middle"):
        peer.channel.recv()


def test_a_reset_is_a_disconnect(peer):
    peer.channel.send(1)
    peer.sock.close()  # with our message unread
    with pytest.raises(Disconnected):
        peer.channel.recv()


def test_sending_to_a_closed_peer_is_a_disconnect(peer):
    peer.sock.close()
    with pytest.raises(Disconnected):
        peer.channel.send(1)


def test_sending_to_a_closed_peer_raises_no_signal(peer):
    """A program that embeds us may have SIGPIPE at its default, which is to die."""
    signals = []
    before = signal.signal(signal.SIGPIPE, lambda *args: signals.append(args))
    try:
        peer.sock.close()
        with pytest.raises(Disconnected):
            peer.channel.send(1)
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert signals == []


@pytest.mark.parametrize("asked", [False, True])
def test_credentials_are_not_asked_for_and_change_nothing(peer, asked):
    """Of all ancillary data that a peer may send, only descriptors are looked at.

    A socket that is inherited might ask for them.
    """
    peer.channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, asked)
    identity = array.array("i", [os.getpid(), os.getuid(), os.getgid()])
    control = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, identity)]
    assert peer.sock.sendmsg([GET_FEATURES], control) == len(GET_FEATURES)
    with peer.channel.recv(soon()) as message:
        assert message.request == 1
        assert not message.fds


def test_an_error_of_the_socket_ends_the_session():
    # Not connected: recvmsg() fails with EINVAL, sendmsg() with ENOTCONN.
    with Channel(socket.socket(socket.AF_UNIX), peer="front") as channel:
        with pytest.raises(SessionError, match="front: ") as caught:
            channel.recv(soon())
        assert not isinstance(caught.value, Disconnected)
        with pytest.raises(SessionError, match="front: "):
            channel.pending()
        with pytest.raises(SessionError, match="front: "):
            channel.send(1)


@pytest.mark.parametrize("flags", [0x0, 0x2, 0x3, 0x4, 0x11, 0x8000_0001])
def test_strange_flags_are_refused(peer, null, flags):
    send_raw(peer.sock, Header(1, flags, 0).pack(), [null])
    with pytest.raises(ProtocolError, match=f"flags {flags:#x}"):
        peer.channel.recv()


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "b'GET / HTTP/1'"),
        (b'{"execute": "qmp_capabilities"}', """b'{"execute": '"""),
        (bytes(12), r"b'(\\x00){12}'"),
    ],
)
def test_peer_that_does_not_speak_vhost_user_is_called_that(peer, text, begins):
    peer.sock.send(text)
    said = f"back: does not speak vhost-user: it begins with {begins}"
    with pytest.raises(ProtocolError, match=said):
        peer.channel.recv()


def test_peer_that_has_spoken_vhost_user_does(peer):
    """It is out of step since."""
    send_raw(peer.sock, GET_FEATURES)
    assert peer.channel.recv().request == 1
    peer.sock.send(b"GET / HTTP/1.1")
    with pytest.raises(ProtocolError, match="back: request 542393671 has flags 0x"):
        peer.channel.recv()


def test_silent_peer_has_got_a_message_and_sent_none(peer):
    assert not peer.channel.silent
    peer.channel.send(1)
    assert peer.channel.silent
    send_raw(peer.sock, GET_FEATURES)
    peer.channel.recv()
    assert not peer.channel.silent


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 2**31, 2**32 - 1])
def test_a_size_beyond_every_payload_is_refused_at_once(peer, null, size):
    send_raw(peer.sock, Header(1, 1, size).pack(), [null])
    with pytest.raises(ProtocolError, match=f"{size} bytes, at most {MAX_PAYLOAD}"):
        peer.channel.recv()


def test_a_size_beyond_the_requests_payload_is_refused_at_once(peer):
    send_raw(peer.sock, Header(7, 1, 9).pack())
    with pytest.raises(ProtocolError, match="request 7 has 9 bytes, at most 8"):
        peer.channel.recv(limit={7: 8}.__getitem__)


def test_the_largest_payload_passes(peer):
    payload = os.urandom(MAX_PAYLOAD)
    send_raw(peer.sock, Header(26, 1, MAX_PAYLOAD).pack() + payload)
    assert peer.channel.recv().payload == payload


@pytest.mark.timing
def test_waiting_for_a_message_ends_at_the_deadline(peer):
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="back: did not answer"):
        peer.channel.recv(start + SOON)
    assert SOON <= time.monotonic() - start < 100 * SOON


def test_a_deadline_that_is_over_does_not_wait(peer):
    with pytest.raises(DeadlineExceeded):
        peer.channel.recv(time.monotonic() - 1)


def test_a_deadline_that_missed_a_whole_message_changes_nothing(peer):
    with pytest.raises(DeadlineExceeded):
        peer.channel.recv(soon())
    send_raw(peer.sock, GET_FEATURES)
    assert peer.channel.recv(soon()).request == 1


@pytest.mark.parametrize("size", range(1, 18))
def test_a_message_that_has_begun_has_a_deadline_of_its_own(peer, null, size):
    send_raw(peer.sock, (Header(5, 1, 6).pack() + b"abcdef")[:size], [null])
    with pytest.raises(DeadlineExceeded):
        peer.channel.recv(None)


def test_after_half_a_message_the_channel_is_of_no_use(peer):
    send_raw(peer.sock, GET_FEATURES[:5])
    with pytest.raises(DeadlineExceeded):
        peer.channel.recv()
    send_raw(peer.sock, GET_FEATURES)
    for use in (peer.channel.recv, peer.channel.pending, lambda: peer.channel.send(1)):
        with pytest.raises(Disconnected, match="cut off in the middle"):
            use()


def fill(sock):
    """Send until nothing more fits."""
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(4096), socket.MSG_DONTWAIT)


def test_a_peer_that_does_not_read_does_not_hang_us(peer):
    fill(peer.channel._sock)
    with pytest.raises(DeadlineExceeded, match="back: did not read"):
        peer.channel.send(1)


def test_a_peer_that_reads_late_gets_all_of_it(null):
    """A payload larger than the socket's buffer: the fds go with the first part."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    payload = os.urandom(1 << 20)
    data = bytearray()
    fds = []

    def read():
        while len(data) < Header.LAYOUT.size + len(payload):
            part, control, _, _ = theirs.recvmsg(4096, 1024, socket.MSG_CMSG_CLOEXEC)
            if control:
                assert not data
            data.extend(part)
            fds.extend(control)

    with theirs, Channel(ours, timeout=10) as channel:
        thread = threading.Thread(target=read)
        thread.start()
        channel.send(1, payload, [null])
        thread.join()
    assert data == Header(1, 1, len(payload)).pack() + payload
    ((_, _, numbers),) = fds
    (number,) = array.array("i", numbers)
    os.close(number)


def test_after_half_a_message_was_sent_the_channel_is_of_no_use():
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with theirs, Channel(ours, timeout=SOON) as channel:
        with pytest.raises(DeadlineExceeded):
            channel.send(1, bytes(1 << 20))
        with pytest.raises(Disconnected, match="cut off"):
            channel.send(1)


def test_stop_ends_a_wait(peer):
    with eventfd() as stop:
        peer.channel.stop = stop
        timer = threading.Timer(SOON, notify, [stop])
        timer.start()
        with pytest.raises(Stopped, match="back"):
            peer.channel.recv()
        timer.join()


def test_stop_wins_over_a_peer_that_never_rests(peer):
    send_raw(peer.sock, GET_FEATURES)
    with eventfd(1) as stop:
        peer.channel.stop = stop
        with pytest.raises(Stopped):
            peer.channel.recv()


def test_stop_leaves_a_message_alone_that_has_begun(peer):
    """C9: what has a deadline goes on to its end, in either direction."""
    send_raw(peer.sock, GET_FEATURES[:5])
    with eventfd(1) as stop:
        assert peer.channel.recv_now() is None
        peer.channel.stop = stop
        timer = threading.Timer(SOON / 2, peer.sock.send, [GET_FEATURES[5:]])
        timer.start()
        assert peer.channel.recv().request == 1
        timer.join()
        peer.channel.send(1)
        with pytest.raises(DeadlineExceeded):
            peer.channel.recv(soon())


def test_after_stop_one_can_go_on_talking(peer):
    send_raw(peer.sock, GET_FEATURES)
    with eventfd(1) as stop:
        peer.channel.stop = stop
        with pytest.raises(Stopped):
            peer.channel.recv()
        assert drain(stop) == 1  # nobody had read it
    peer.channel.stop = None
    assert peer.channel.recv().request == 1


def test_readiness_that_is_none_is_waited_out(peer):
    """A socket that poll() calls ready may not be ready any more for a read."""

    class Hasty(Channel):
        early = 3

        def wait(self, events, deadline=None):
            self.early -= 1
            if self.early < 0:
                super().wait(events, deadline)

    with Hasty(peer.sock.dup()) as channel:
        thread = threading.Timer(SOON, peer.channel.send, [1])
        thread.start()
        assert channel.recv().request == 1
        thread.join()
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += channel._sock.send(bytes(4096), socket.MSG_DONTWAIT)
        channel.early = 3
        thread = threading.Timer(SOON, lambda: discard(peer.channel._sock, sent))
        thread.start()
        channel.send(12)
        thread.join()
    assert peer.channel.recv().request == 12


def discard(sock, size):
    """Receive so many bytes, for nothing."""
    while size:
        size -= len(sock.recv(size))


def test_all_waiting_is_done_in_one_place(peer):
    """A subclass that overrides `wait` sees every wait."""
    waits = []

    class Watched(Channel):
        def wait(self, events, deadline=None):
            waits.append(events)
            super().wait(events, deadline)

    with Watched(peer.sock.dup()) as channel:
        peer.channel.send(1, b"x")
        channel.recv()
        assert set(waits) == {select.POLLIN}
        waits.clear()
        fill(channel._sock)
        with pytest.raises(DeadlineExceeded):
            channel.send(1, deadline=soon())
        assert set(waits) == {select.POLLOUT}


# Receiving without waiting.

MESSAGE = Header(5, 1, 6).pack() + b"abcdef"


def test_what_comes_byte_by_byte_is_put_together(peer, null):
    send_raw(peer.sock, MESSAGE[:1], [null])
    for i in range(1, len(MESSAGE)):
        assert peer.channel.recv_now() is None
        assert peer.channel.pending()
        peer.sock.send(MESSAGE[i : i + 1])
    with peer.channel.recv_now() as message:
        assert (message.request, message.payload) == (5, b"abcdef")
        assert len(message.fds) == 1
    assert peer.channel.recv_now() is None
    assert not peer.channel.pending()


def test_receiving_without_waiting_waits_for_nothing(peer):
    class Impatient(Channel):
        def wait(self, events, deadline=None):
            raise AssertionError("it waits")

    with Impatient(peer.sock.dup()) as channel:
        assert channel.recv_now() is None
        peer.channel._sock.send(MESSAGE[:15])
        assert channel.recv_now() is None
        peer.channel._sock.send(MESSAGE[15:])
        message = channel.recv_now()
        assert message is not None
        assert message.payload == b"abcdef"


def test_each_look_takes_one_message(peer):
    send_raw(peer.sock, GET_FEATURES * 2 + MESSAGE[:7])
    assert peer.channel.recv_now().request == 1
    assert peer.channel.recv_now().request == 1
    assert peer.channel.recv_now() is None


@pytest.mark.parametrize("size", range(1, len(MESSAGE)))
def test_one_can_wait_for_the_rest_of_a_message(peer, null, size):
    send_raw(peer.sock, MESSAGE[:size], [null])
    assert peer.channel.recv_now() is None
    peer.sock.send(MESSAGE[size:])
    with peer.channel.recv() as message:
        assert message.payload == b"abcdef"
        assert len(message.fds) == 1


@pytest.mark.parametrize("size", range(1, len(MESSAGE)))
def test_the_rest_of_a_message_has_a_deadline(peer, null, size):
    send_raw(peer.sock, MESSAGE[:size], [null])
    assert peer.channel.recv_now() is None
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        peer.channel.recv()
    assert SOON <= time.monotonic() - began < 100 * SOON
    with pytest.raises(Disconnected, match="cut off in the middle"):
        peer.channel.recv_now()


def test_the_rest_of_a_message_may_not_have_fds(peer, null):
    send_raw(peer.sock, MESSAGE[:13], [null])
    assert peer.channel.recv_now() is None
    send_raw(peer.sock, MESSAGE[13:], [null])
    with pytest.raises(ProtocolError, match="fds in the middle"):
        peer.channel.recv_now()
    with pytest.raises(Disconnected, match="cut off in the middle"):
        peer.channel.recv_now()


def test_limits_hold_for_what_comes_in_pieces(peer):
    header = Header(7, 1, 9).pack()
    send_raw(peer.sock, header[:5])
    assert peer.channel.recv_now({7: 8}.__getitem__) is None
    send_raw(peer.sock, header[5:])
    with pytest.raises(ProtocolError, match="request 7 has 9 bytes, at most 8"):
        peer.channel.recv_now({7: 8}.__getitem__)


def test_a_peer_that_leaves_between_two_looks_is_a_disconnect(peer, null):
    send_raw(peer.sock, MESSAGE[:13], [null])
    assert peer.channel.recv_now() is None
    peer.sock.close()
    with pytest.raises(Disconnected, match="in the middle"):
        peer.channel.recv_now()


def test_half_a_message_is_closed_with_its_channel(peer, null):
    """The fixture counts descriptors."""
    send_raw(peer.sock, MESSAGE[:13], [null] * 3)
    assert peer.channel.recv_now() is None


@pytest.mark.parametrize("lost", [FrontLost, BackLost])
def test_a_channel_says_whose_end_it_was(lost, tmp_path):
    for size in (0, 13):
        ours, theirs = socket.socketpair()
        with Channel(ours, lost=lost) as channel:
            theirs.send(MESSAGE[:size])
            theirs.close()
            for use in (channel.recv, lambda: channel.send(1)):
                with pytest.raises(lost):
                    use()
    with pytest.raises(lost):
        Channel.connect(str(tmp_path / "absent"), lost=lost)


def test_pending_tells_and_takes_nothing(peer, null):
    assert not peer.channel.pending()
    send_raw(peer.sock, GET_FEATURES, [null])
    assert peer.channel.pending()
    assert peer.channel.pending()
    with peer.channel.recv() as message:
        assert len(message.fds) == 1
    peer.sock.close()
    with pytest.raises(Disconnected):
        peer.channel.pending()


def test_connect(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with Channel.connect(path) as channel, listener.accept()[0] as sock:
            channel.send(1)
            assert sock.recv(100) == GET_FEATURES


@pytest.mark.parametrize("name", ["absent", "x" * 200])
def test_connect_to_nothing_is_a_disconnect(tmp_path, name):
    before = open_fds()
    with pytest.raises(Disconnected, match=f"back: can't connect to .*{name}: "):
        Channel.connect(str(tmp_path / name))
    assert open_fds() == before


def test_close_twice(peer):
    peer.channel.close()
    peer.channel.close()
    assert peer.channel.fileno() == -1


noise = st.one_of(
    st.binary(max_size=40),
    st.builds(
        lambda header, payload: header.pack() + payload,
        st.builds(
            Header,
            st.integers(0, 50),
            st.sampled_from([1, 5, 9, 0]),
            st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
        ),
        st.binary(max_size=40),
    ),
)


@settings(PROFILE)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.binary(max_size=40)), max_size=4),
    st.lists(st.integers(1, 30), min_size=1),
)
def test_pieces_of_any_size_are_the_same_messages(messages, sizes):
    data = b"".join(Header(r, 1, len(p)).pack() + p for r, p in messages)
    received = []
    with Peer() as peer:
        for size in itertools.cycle(sizes):
            while message := peer.channel.recv_now():
                received.append((message.request, message.payload))
            if not data:
                break
            peer.sock.send(data[:size])
            data = data[size:]
    assert received == messages


def receive_all(channel):
    """Receive until it ends, with an exception."""
    while True:
        with channel.recv(soon()) as message:
            assert len(message.payload) <= MAX_PAYLOAD
            assert len(message.fds) <= MAX_FDS


@settings(PROFILE)
@given(st.lists(st.tuples(noise, st.integers(0, 253)), max_size=5))
def test_whatever_comes_there_is_an_end_and_no_fd_is_lost(parts):
    with open(os.devnull) as null, Peer() as peer:
        for data, count in parts:
            if data:
                send_raw(peer.sock, data, [null.fileno()] * count)
        peer.sock.shutdown(socket.SHUT_WR)
        with pytest.raises((ProtocolError, Disconnected)):
            receive_all(peer.channel)
