# SPDX-License-Identifier: Apache-2.0
"""Sessions that record the requests in flight for the next one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest

from tests.support.airlock import Airlock, hung_up
from tests.support.backs import ScriptedBack, wait_until
from tests.support.sessions import await_reaped, errors, lose, serve, small_guest
from vhost_airlock.errors import PeerRefused
from vhost_airlock.peers.disk import BlkType
from vhost_airlock.peers.guest import BlkGuest
from vhost_airlock.peers.guest_queue import Io
from vhost_airlock.peers.ring import Chain
from vhost_airlock.proxy.inflight import room
from vhost_airlock.vhost.fds import Fd
from vhost_airlock.vhost.wire import Inflight, ProtocolFeature, Request

DRAIN = 0.2


@pytest.fixture
def back() -> ScriptedBack:
    return ScriptedBack(
        protocol_features=int(
            ProtocolFeature.MQ
            | ProtocolFeature.REPLY_ACK
            | ProtocolFeature.CONFIGURE_MEM_SLOTS
            | ProtocolFeature.CONFIG
            | ProtocolFeature.RESET_DEVICE
        )
    )


@pytest.fixture
def airlock(back: ScriptedBack) -> Iterator[Airlock]:
    with Airlock(back, drain_timeout=DRAIN) as airlock:
        yield airlock


@pytest.fixture
def guest(airlock: Airlock) -> Iterator[BlkGuest]:
    also = ProtocolFeature.INFLIGHT_SHMFD, ProtocolFeature.RESET_DEVICE
    with small_guest(also=also) as guest:
        guest.connect(airlock.channel())
        yield guest


def submit(guest: BlkGuest, count: int, index: int = 0) -> list[Io]:
    """Requests to read one sector each, whose number is their name."""
    queue = guest.queues[index]
    found = []
    for _ in range(count):
        sector = len(guest_sectors(guest))
        guest_sectors(guest).append(sector)
        found.append(queue.submit(BlkType.IN, sector, [(guest.ram.alloc(512), 512)]))
    queue.kick()
    return found


def guest_sectors(guest: BlkGuest) -> list[int]:
    """The sectors that were asked for so far."""
    sectors: list[int] = guest.__dict__.setdefault("sectors", [])
    return sectors


def sector_of(back: ScriptedBack, chain: Chain) -> int:
    return int.from_bytes(back.read(chain)[8:16], "little")


def take(back: ScriptedBack, count: int, index: int = 0) -> dict[int, Chain]:
    """The next chains that the back gets, by their sectors, in order."""
    found = {}
    for _ in range(count):
        chain = back.take(index)
        found[sector_of(back, chain)] = chain
    return found


def complete(back: ScriptedBack, chains: Sequence[tuple[int, Chain]]) -> None:
    for sector, chain in chains:
        back.complete(chain, bytes([sector]) * 512)


def assert_done(guest: BlkGuest, ios: Sequence[Io]) -> None:
    guest.finish()
    for io in ios:
        io.check()
        (address, size) = io.segments[0]
        assert guest.ram.view(address, size) == bytes([io.sector]) * size


@pytest.mark.parametrize("base", ["used index", "avail index"])
def test_the_next_session_gets_what_the_last_one_left(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest, base: str
) -> None:
    """Out of order, so that no base says it, whatever the VMM says."""
    guest.start()
    ios = submit(guest, 5)
    chains = take(back, 5)
    complete(back, [(i, chains[i]) for i in (3, 1)])
    done = await_reaped(guest.queues[0])
    while len(done) < 2:
        done += await_reaped(guest.queues[0])
    guest.disconnect()
    airlock.join()
    back.join()

    guest.connect(airlock.channel())
    queue = guest.queues[0]
    avail = queue.driver.next_avail
    queue.base = queue.driver.next_used if base == "used index" else avail
    guest.start()
    again = take(back, 3)
    assert list(again) == [0, 2, 4]
    complete(back, list(again.items()))
    assert_done(guest, ios)
    assert list(back.take_all()) == []
    serve(back, guest)


def test_what_was_left_is_told(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    guest.start()
    submit(guest, 2)
    take(back, 2)
    guest.disconnect()
    airlock.join()
    assert errors(caplog) == [
        "ring 0: stopped with 2 requests unfinished, which stay in the VMM's record"
    ]


def test_a_back_that_dies_loses_nothing(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The VMM is told by the end of its connection, and comes again."""
    guest.start()
    ios = submit(guest, 4)
    chains = take(back, 3)
    complete(back, [(1, chains[1])])
    await_reaped(guest.queues[0])
    lose(back)
    airlock.join()
    back.join()
    guest.reconnect(airlock.channel())
    again = take(back, 3)
    assert list(again) == [0, 2, 3]
    complete(back, list(again.items()))
    assert_done(guest, ios)


def test_the_back_does_not_get_twice_what_it_has_still(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """A stop and a start in one session."""
    guest.start()
    ios = submit(guest, 3)
    chains = take(back, 3)
    complete(back, [(1, chains[1])])
    await_reaped(guest.queues[0])
    guest.stop()
    guest.start()
    back.complete(chains[2], bytes([2]) * 512)
    back.complete(chains[0], bytes(512))
    assert_done(guest, ios)
    assert list(back.take_all()) == []
    assert airlock.counters()["recovered"] == 0


def test_the_guest_is_called_once_at_each_start(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """An airlock that was killed may have owed it a call."""
    guest.start()
    queue = guest.queues[0]
    wait_until(lambda: os.eventfd_read(queue.call_fd.fileno()) > 0, "a call")


def test_a_record_is_not_changed_under_a_ring(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    guest.start()
    record, fd = guest.front.get_inflight_fd(2, 16)
    with fd, pytest.raises(PeerRefused):
        guest.front.set_inflight_fd(record, fd)
    serve(back, guest)
    guest.stop()
    guest.forget_record()
    guest.start()
    serve(back, guest)


def test_a_reset_forgets_all_requests(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """Also those that the back does not end in time."""
    guest.start()
    submit(guest, 2)
    old = list(take(back, 2).values())
    guest.front.reset_device()
    for queue in guest.queues:
        queue.reset()
    guest.start()
    back.complete(old[0])
    serve(back, guest)
    assert airlock.counters()["recovered"] == 0
    assert list(back.take_all()) == []


def test_a_vmm_that_gives_no_record_gets_none(
    airlock: Airlock,
    back: ScriptedBack,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It has accepted the feature, and that is all."""
    with small_guest(also=[ProtocolFeature.INFLIGHT_SHMFD]) as guest:
        guest._share_record = lambda: None  # type: ignore[method-assign]
        guest.connect(airlock.channel())
        guest.start()
        serve(back, guest)
        guest.stop()
    assert errors(caplog) == []


@pytest.mark.parametrize(
    ("queues", "size", "told"),
    [
        (1, 16, "ring 1: requests in flight are not recorded: the record has room for"
         " 0 of its 16 entries"),
        (2, 8, "ring 0: requests in flight are not recorded: the record has room for 8"
         " of its 16 entries"),
    ],
    ids=["queues", "entries"],
)  # fmt: skip
def test_a_record_that_is_too_small_is_told(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
    queues: int,
    size: int,
    told: str,
) -> None:
    with Fd(os.memfd_create("record", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 4096)
        record = Inflight(queues * room(size), 0, queues, size)
        guest._share_record = (  # type: ignore[method-assign]
            lambda: guest.front.set_inflight_fd(record, fd)
        )
        guest.start()
        for index in range(2):
            serve(back, guest, index)
        assert told in errors(caplog)


@pytest.mark.parametrize(
    ("queues", "size"), [(0, 16), (257, 16), (2, 0), (2, 32769), (65535, 65535)]
)
def test_numbers_that_no_device_has_are_refused(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest, queues: int, size: int
) -> None:
    """GET_INFLIGHT_FD has a reply that says no; SET_INFLIGHT_FD may have an ack."""
    with pytest.raises(PeerRefused):
        guest.front.get_inflight_fd(queues, size)
    with Fd(os.memfd_create("record", os.MFD_CLOEXEC)) as fd:
        os.ftruncate(fd.fileno(), 1 << 20)
        with pytest.raises(PeerRefused):
            guest.front.set_inflight_fd(Inflight(1 << 20, 0, queues, size), fd)
    guest.start()
    serve(back, guest)


def test_a_refused_record_without_an_ack_ends_the_session(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """The VMM would believe that its requests are recorded."""
    with Fd(os.memfd_create("record", os.MFD_CLOEXEC)) as fd:
        guest.front.channel.send(
            Request.SET_INFLIGHT_FD, Inflight(4096, 0, 1, 16).pack(), [fd]
        )
        assert hung_up(guest.front.channel)
    airlock.join()


def test_bytes_of_anybody_do_no_harm(
    airlock: Airlock,
    back: ScriptedBack,
    guest: BlkGuest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Fd(os.memfd_create("record", os.MFD_CLOEXEC)) as fd:
        os.pwrite(fd.fileno(), b"\xa5" * 4096, 0)
        record = Inflight(2 * room(16), 0, 2, 16)
        guest._share_record = (  # type: ignore[method-assign]
            lambda: guest.front.set_inflight_fd(record, fd)
        )
        guest.start()
        serve(back, guest)
    assert "the record has version 42405, not 1" in errors(caplog)[0]


def test_the_back_is_told_nothing_of_it(
    airlock: Airlock, back: ScriptedBack, guest: BlkGuest
) -> None:
    """Two records would have requests done twice."""
    back.protocol_offered |= int(ProtocolFeature.INFLIGHT_SHMFD)
    guest.start()
    serve(back, guest)
    assert not back.protocol_features & ProtocolFeature.INFLIGHT_SHMFD
    assert not {Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD} & {*back.requests()}
