# SPDX-License-Identifier: Apache-2.0
"""The device's internal state, saved and loaded through the airlock."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.airlock import Airlock
from tests.support.backs import ScriptedBack
from tests.support.sessions import LATE, TIMEOUT, errors, serve, small_guest
from vhost_airlock.errors import AirlockError, PeerRefused, RequestRefused
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.server import PROTOCOL_FEATURES, RING_FEATURES
from vhost_airlock.vhost.fds import Fd, close_all
from vhost_airlock.vhost.message import Answer
from vhost_airlock.vhost.wire import (
    U64,
    DeviceState,
    Empty,
    Feature,
    ProtocolFeature,
    Request,
    StateDirection,
    VringFd,
)

STATE = os.urandom(300_000)
OFFERED = RING_FEATURES | Feature.LOG_ALL
Ends = tuple[Fd, Fd]
"""Where to read, and where to write."""


class StatefulBack(ScriptedBack):
    """Its state goes through the pipe that it gets, or through one of its own."""

    def __init__(self, *, own: bool = False, features: int = OFFERED) -> None:
        super().__init__(
            features=features,
            protocol_features=PROTOCOL_FEATURES | ProtocolFeature.DEVICE_STATE,
        )
        self.own = own
        self.loaded = b""
        self.threads: list[threading.Thread] = []
        self.instead[Request.SET_DEVICE_STATE_FD] = self.transfer

    def transfer(self, state: DeviceState, fds: list[Fd]) -> Answer:
        saves = state.direction == StateDirection.SAVE
        if not self.own:
            self.begin(fds.pop(), saves)
            return Answer(U64(VringFd.NOFD))
        out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
        self.begin(into if saves else out, saves)
        return Answer(U64(0), [out if saves else into])

    def begin(self, fd: Fd, saves: bool) -> None:
        thread = threading.Thread(
            target=self.save if saves else self.load, args=[fd], name="state"
        )
        self.threads.append(thread)
        thread.start()

    def save(self, fd: Fd) -> None:
        self.forget_copies()
        with fd, contextlib.suppress(BrokenPipeError):
            rest = memoryview(STATE)
            while rest:
                rest = rest[os.write(fd.fileno(), rest) :]

    def load(self, fd: Fd) -> None:
        self.forget_copies()
        with fd:
            while part := os.read(fd.fileno(), 1 << 16):
                self.loaded += part

    def forget_copies(self) -> None:
        """The record's copy of a pipe would keep it open."""
        for seen in self.got(Request.SET_DEVICE_STATE_FD):
            close_all(seen.fds)
            seen.fds.clear()

    def close(self) -> None:
        for thread in self.threads:
            thread.join()
        super().close()


@pytest.fixture
def guest() -> Iterator[BlkGuest]:
    with small_guest(also=[ProtocolFeature.DEVICE_STATE]) as guest:
        yield guest


def pipe() -> Ends:
    out, into = os.pipe2(os.O_CLOEXEC)
    return Fd(out), Fd(into)


def socketpair() -> Ends:
    one, two = socket.socketpair()
    return Fd(one.detach()), Fd(two.detach())


def save(guest: BlkGuest, make: Callable[[], Ends] = pipe) -> bytes:
    out, into = make()
    with out:
        with into:
            assert guest.front.set_device_state_fd(StateDirection.SAVE, into) is None
        parts = []
        while part := os.read(out.fileno(), 1 << 16):
            parts.append(part)
    guest.front.check_device_state()
    return b"".join(parts)


def load(guest: BlkGuest, state: bytes, make: Callable[[], Ends] = pipe) -> None:
    out, into = make()
    with into:
        with out:
            assert guest.front.set_device_state_fd(StateDirection.LOAD, out) is None
        rest = memoryview(state)
        while rest:
            rest = rest[os.write(into.fileno(), rest) :]
    guest.front.check_device_state()


@pytest.mark.parametrize("own", [False, True], ids=["ours", "its own"])
def test_state_is_saved_and_loaded(guest: BlkGuest, own: bool) -> None:
    back = StatefulBack(own=own)
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        for _ in range(2):
            assert save(guest) == STATE
            load(guest, STATE)
            back.threads[-1].join()
            assert back.loaded == STATE
            back.loaded = b""
        guest.start()
        serve(back, guest)
        guest.stop()
        assert save(guest) == STATE
        guest.disconnect()


def test_back_does_not_get_the_fronts_descriptor(guest: BlkGuest) -> None:
    back = StatefulBack()
    inodes: list[int] = []
    usual = back.transfer

    def transfer(state: DeviceState, fds: list[Fd]) -> Answer:
        inodes.append(os.fstat(fds[0].fileno()).st_ino)
        return usual(state, fds)

    back.instead[Request.SET_DEVICE_STATE_FD] = transfer
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
        with out:
            mine = os.fstat(into.fileno()).st_ino
            with into:
                guest.front.set_device_state_fd(StateDirection.SAVE, into)
            assert inodes != [mine]
            while os.read(out.fileno(), 1 << 16):
                pass
        guest.disconnect()


def test_state_is_for_stopped_rings(
    guest: BlkGuest, caplog: pytest.LogCaptureFixture
) -> None:
    with Airlock(StatefulBack()) as airlock:
        guest.connect(airlock.channel())
        guest.start()
        with pytest.raises(PeerRefused):
            save(guest)
        assert errors(caplog) == [
            "VMM: refused: SET_DEVICE_STATE_FD: rings are started"
        ]
        guest.disconnect()


def test_nothing_to_check(guest: BlkGuest, caplog: pytest.LogCaptureFixture) -> None:
    with Airlock(StatefulBack()) as airlock:
        guest.connect(airlock.channel())
        with pytest.raises(PeerRefused):
            guest.front.check_device_state()
        assert errors(caplog) == [
            "VMM: refused: CHECK_DEVICE_STATE: nothing was transferred"
        ]
        assert save(guest) == STATE
        guest.disconnect()


@pytest.mark.timing
def test_back_that_never_ends_is_cut_off(guest: BlkGuest) -> None:
    """And what it said of its state is no matter then."""
    back = StatefulBack()
    held: list[Fd] = []

    def transfer(state: DeviceState, fds: list[Fd]) -> Answer:
        held.append(fds.pop())
        os.write(held[-1].fileno(), b"begin")
        return Answer(U64(VringFd.NOFD))

    back.instead[Request.SET_DEVICE_STATE_FD] = transfer
    with Airlock(back, timeout=TIMEOUT) as airlock:
        guest.connect(airlock.channel())
        out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
        with out:
            with into:
                guest.front.set_device_state_fd(StateDirection.SAVE, into)
            assert os.read(out.fileno(), 100) == b"begin"
            with pytest.raises(PeerRefused):
                guest.front.check_device_state()
            airlock.assert_no_message_took_longer(LATE)
            assert os.read(out.fileno(), 100) == b""
        assert Request.CHECK_DEVICE_STATE not in back.requests()
        guest.disconnect()
    close_all(held)


@pytest.mark.parametrize("kind", ["memfd", "zero", "eventfd"])
def test_i5_descriptor_of_the_back_that_is_no_pipe(guest: BlkGuest, kind: str) -> None:
    back = StatefulBack()

    def transfer(state: DeviceState, fds: list[Fd]) -> Answer:
        make = {
            "memfd": lambda: os.memfd_create("state", os.MFD_CLOEXEC),
            "zero": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
            "eventfd": lambda: os.eventfd(1, os.EFD_CLOEXEC),
        }
        return Answer(U64(0), [Fd(make[kind]())])

    back.instead[Request.SET_DEVICE_STATE_FD] = transfer
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        with pytest.raises(AirlockError):
            save(guest)
        guest.disconnect()
        airlock.join()
        back.instead.pop(Request.SET_DEVICE_STATE_FD)
        with small_guest() as other:
            other.connect(airlock.channel())
            other.start()
            serve(back, other)
            other.disconnect()


@pytest.mark.parametrize("value", [1, 0xFF, 0x101, 1 << 40 | 1])
def test_back_that_refuses(guest: BlkGuest, value: int) -> None:
    """The guest goes on with it."""
    back = StatefulBack()
    back.instead[Request.SET_DEVICE_STATE_FD] = lambda _, fds: U64(value)
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        with pytest.raises(PeerRefused):
            save(guest)
        guest.start()
        serve(back, guest)
        guest.disconnect()


def test_session_may_end_in_the_middle_of_it(guest: BlkGuest) -> None:
    back = StatefulBack()
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        out, into = map(Fd, os.pipe2(os.O_CLOEXEC))
        with out:
            with into:
                guest.front.set_device_state_fd(StateDirection.SAVE, into)
            assert os.read(out.fileno(), 10) == STATE[:10]
            guest.disconnect()
            airlock.join()


def told(back: ScriptedBack) -> list[int]:
    """The features that the back was told, in order."""
    return [seen.payload.value for seen in back.got(Request.SET_FEATURES)]


def log(guest: BlkGuest, on: bool) -> None:
    """Send the messages of a VMM whose migration begins, or has ended."""
    guest.front.set_features(guest.features | Feature.LOG_ALL * on)


def test_back_prepares_its_state_while_the_guest_is_logged(guest: BlkGuest) -> None:
    """It hears of it at once, while rings run, and of nothing else. It gets no log."""
    back = StatefulBack()
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        guest.start()
        (features,) = told(back)
        assert not features & Feature.LOG_ALL
        for _ in range(2):
            for on in (True, False):
                log(guest, on)
                assert told(back)[-1] == features | Feature.LOG_ALL * on
                log(guest, on)
                serve(back, guest)
        assert len(told(back)) == 5, "each change once"
        log(guest, True)
        guest.stop()
        assert save(guest) == STATE
        log(guest, False)
        guest.start()
        serve(back, guest)
        assert told(back)[-1] == features
        assert Request.SET_LOG_BASE not in back.requests()
        guest.disconnect()


OTHERS = {
    "no state": lambda: ScriptedBack(features=OFFERED),
    "no bit": lambda: StatefulBack(features=RING_FEATURES),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_backs_hear_nothing_of_the_log(guest: BlkGuest, kind: str) -> None:
    back = OTHERS[kind]()
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        guest.start()
        log(guest, True)
        serve(back, guest)
        log(guest, False)
        assert len(told(back)) == 1
        guest.disconnect()


def test_back_hears_nothing_if_the_front_does_not_transfer_its_state() -> None:
    back = StatefulBack()
    with small_guest() as guest, Airlock(back) as airlock:
        guest.connect(airlock.channel())
        guest.start()
        log(guest, True)
        serve(back, guest)
        assert len(told(back)) == 1
        guest.disconnect()


def test_log_is_on_before_the_rings_start(guest: BlkGuest) -> None:
    """A VMM that migrates before the guest has a driver."""
    back = StatefulBack()
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        log(guest, True)
        assert save(guest) == STATE
        assert told(back)[-1] & Feature.LOG_ALL
        guest.disconnect()


@pytest.mark.parametrize("make", [pipe, socketpair])
def test_state_is_loaded_before_everything_else(
    guest: BlkGuest, make: Callable[[], Ends]
) -> None:
    """Cloud Hypervisor loads before it tells features, memory and rings; and saves when
    all rings are stopped, and goes on."""
    back = StatefulBack()
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        load(guest, STATE, make)
        back.threads[-1].join()
        assert back.loaded == STATE
        assert not {Request.SET_FEATURES, *map(Request, range(8, 13))}.intersection(
            back.requests()
        )
        guest.start()
        serve(back, guest)
        guest.stop()
        assert save(guest, make) == STATE
        guest.start()
        serve(back, guest)
        serve(back, guest, 1)
        guest.disconnect()


def refuse(_: Empty, fds: list[Fd]) -> None:
    raise RequestRefused("a file has no path any more")


@pytest.mark.parametrize("direction", [save, load])
def test_back_may_not_like_the_state(
    guest: BlkGuest, direction: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    """A path that is not there at the destination; the guest goes on at the source."""
    back = StatefulBack()
    back.instead[Request.CHECK_DEVICE_STATE] = refuse
    arguments = (STATE,) if direction is load else ()
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        guest.start()
        guest.stop()
        with pytest.raises(PeerRefused):
            direction(guest, *arguments)
        guest.start()
        serve(back, guest)
        guest.disconnect()
    assert errors(caplog)[-1:] == [
        "VMM: refused: CHECK_DEVICE_STATE: the back-end says that it went wrong"
    ]


def test_back_may_be_slow(guest: BlkGuest) -> None:
    """It takes the state in small pieces, with pauses, while the front waits."""
    back = StatefulBack()
    go_on = threading.Semaphore(0)

    def load_slowly(fd: Fd) -> None:
        back.forget_copies()
        with fd:
            while go_on.acquire() and (part := os.read(fd.fileno(), 5000)):
                back.loaded += part

    back.load = load_slowly  # type: ignore[method-assign]
    with Airlock(back) as airlock:
        guest.connect(airlock.channel())
        thread = threading.Thread(target=load, args=[guest, STATE])
        thread.start()
        while thread.is_alive():
            go_on.release()
            thread.join(0.001)
        go_on.release(100)
        back.threads[-1].join()
        assert back.loaded == STATE
        guest.disconnect()
